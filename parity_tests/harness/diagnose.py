"""What a difference looks like: repairs are tried on the first divergence, and the one that reproduces it is said in one phrase.

    symptoms     what the arrays alone tell: a uniform factor, a permutation, a shift in time, a cast, one channel, the last chunk, ...
    weights      the reference again with a leaf missing, transposed, permuted, at its initial value, exchanged with another
    arguments    the reference again with an argument dropped, coarse, averaged over the batch, without its last step
    settings     the reference again with another epsilon, constant, truth value or name among the module's settings
    functions    the reference again with one function in it replaced: tanh gelu, another axis, a missing term, an inverted gate
    values       the reference again with one function in it reading another value: the one from before an update

A repair counts when it leaves less than a thousandth of the difference (of the part of it that is not rounding), in every output of the
module that differs. Of those that count the most particular is spoken. When none does, a symptom of the checked output alone is spoken as
such, or where or how the difference stands, which is a place to look and no explanation; when there is none of these, that is said.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from . import repairs, tree
from .adapters.base import Call
from .compare import Check
from .convert import ConversionError
from .explain import Diagnosis, Evidence, explained, read, spoken, tried
from .leaves import NORMS
from .recording import Forced, Recording
from .regimes import AS_IS, BY_NAME, Regime
from .symptoms import FITTED, Axes, Finding, explains, one_pass_variance, size
from .tiers import glued

if TYPE_CHECKING:
    from .battery import Battery

TIERS = ("forced", "free", "rounding", "gradients", "splits", "optimiser")
FIRST_STEPS = 6  # of an optimiser run, by which another setting has shown


def diagnose(battery: Battery, check: Check) -> Diagnosis | None:
    """The diagnosis of a failed check; None for checks that say themselves what is wrong (a shape, an error, coverage, side effects)."""
    if check.tier == "conversion" and battery.candidate is None:
        return _unused(check)
    if check.held or check.tier not in TIERS or check.quantity in ("a result", "leaves") or (check.quantity == "cosine" and check.detail):
        return None
    if check.tier == "optimiser":
        return _optimiser(battery, check)
    if check.tier == "gradients":
        return _gradients(battery, check)
    if check.tier == "splits":
        return _splits(battery, check)
    evidence = _free(battery, check) if check.tier == "free" else _forced(battery, check)
    if evidence is None or not evidence.differing:
        return None
    found = explained(evidence, rerun=check.tier != "rounding", norm=_norm(battery, check))
    node = battery.recording.adapter("float64").modules().get(check.where)
    if found.family == "shift in time" and not found.phrase.startswith("taps ") and node is not None and node.layer.startswith("conv"):
        return replace(found, family="padding side", phrase=f"padded on the other side ({found.phrase})")
    return found


def _unused(check: Check) -> Diagnosis | None:
    """A map that fails because the candidate has no place for some biases of the reference."""
    names = re.findall(r"missing bias: (\S+)", check.detail)
    if not names or "missing: " in check.detail or "unused: " in check.detail:
        return None
    return Diagnosis("missing bias", f"missing bias ({', '.join(names)}), for which the candidate has no place", 0.0, 0)


def _axes(battery: Battery, regime: Regime) -> Axes:
    case = battery.case
    inputs = battery.recording.inputs(BY_NAME[AS_IS] if regime.on_floats else regime)
    time = batch = None
    along = [name for name in case.along(inputs) if name in inputs]
    if case.states is not None and along:
        time = inputs[along[0]].shape[case.states.axis]
        batch = inputs[along[0]].shape[1 if case.states.axis == 0 else 0]
    else:
        first = next((value for value in inputs.values() if value.ndim), None)
        batch = None if first is None else first.shape[0]
        time = first.shape[1] if first is not None and first.ndim > 1 and case.accepts("length") else None
    return Axes({value: name for name, value in case.sizes.items()}, time, batch)


def _leaves(value: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in tree.named(value).items() if np.asarray(leaf).dtype.kind in "fiub"}


def _given(args: tuple, kwargs: dict) -> dict[str, np.ndarray]:
    named = {f"argument {name}": value for name, value in tree.named(args).items()} | {f"argument {n!r}": v for n, v in tree.named(kwargs).items()}
    return {name: value for name, value in named.items() if isinstance(value, np.ndarray) and value.dtype.kind == "f"}


def _fresh(battery: Battery) -> dict[str, np.ndarray]:
    """What the candidate was made with, by reference names, as far as the weight map goes back leaf by leaf."""
    made: dict[str, np.ndarray] = {}
    for rule in battery.candidate.map.rules:
        if not rule.constant:
            try:
                made.update(zip(rule.sources, rule.inverse([np.asarray(battery.candidate.fresh[name]) for name in rule.targets]), strict=True))
            except ConversionError:
                continue
    return made


def _subject(battery: Battery, recording: Recording, path: str, args: tuple, kwargs: dict, call: Callable[[tuple, dict], Any],
             axes: Axes) -> repairs.Subject:
    right = frozenset()
    if recording.kind != "callable" and battery.candidate.kind != "callable":
        # the first layer to part is spoken of, and what it calls ended before it
        inside = f"{path}." if path else ""
        right = frozenset(layer.path for layer in recording.forced(recording.plain()[0])
                          if layer.path.startswith(inside) and layer.path != path and battery.candidate.path(layer.path) is not None)
    return repairs.Subject(recording.adapter("float64"), path, recording.leaves, recording.weights, battery.case.ties, _fresh(battery), args, kwargs,
                           call, axes.time, axes.batch, right)


def _layer(battery: Battery, check: Check, regime: Regime) -> Forced | None:
    """The call of the layer that is farthest off."""
    worst, found = -1.0, None
    for layer in battery.recording.within(check.dtype).forced(regime):
        if layer.path == check.where:
            left, right = _leaves(layer.outputs).get(check.leaf), _leaves(battery.candidate.call(layer, check.dtype)).get(check.leaf)
            if left is not None and right is not None and left.shape == right.shape:
                apart = size(np.asarray(right, np.float64) - np.asarray(left, np.float64)) / (size(np.asarray(left, np.float64)) or 1.0)
                if not apart <= worst:
                    worst, found = apart, layer
    return found


def _forced(battery: Battery, check: Check) -> Evidence | None:
    name = check.regime.removesuffix(", end to end")
    regime = next((item for item in battery.recording.regimes if item.name == name), None)
    if regime is None:
        return None
    if not check.where:
        return _free(battery, replace(check, regime=name))
    layer = _layer(battery, check, regime)
    if layer is None:
        return None
    axes = _axes(battery, regime)
    recording = battery.recording.within(check.dtype)
    call = lambda args, kwargs: recording.adapter("float64").call(layer.path, args, kwargs)  # noqa: E731
    return Evidence(_leaves(layer.outputs), _leaves(battery.candidate.call(layer, check.dtype)), check.leaf, axes, check.dtype,
                    _given(layer.args, layer.kwargs), _subject(battery, recording, layer.path, layer.args, layer.kwargs, call, axes))


def _free(battery: Battery, check: Check) -> Evidence | None:
    """The whole model; or what a module receives, when the layers by themselves are right and their wiring is not."""
    regime = next((item for item in battery.recording.regimes if item.name == check.regime), BY_NAME.get(check.regime))
    if regime is None:
        return None
    recording, axes = battery.recording.within(check.dtype), _axes(battery, regime)
    reference, candidate = recording.run(regime), battery.free_run(regime, check.dtype)
    if check.where:
        calls = list(battery.matched(reference, candidate))
        around = [(call, other) for call, other in calls if call.path and check.where.startswith(f"{call.path}.")]
        for call, other in [*sorted(around, key=lambda pair: len(pair[0].path)), *calls]:  # the outermost that was handed something wrong
            if call.path == check.where or _wrong(call, other):
                left, right = _leaves((call.args, call.kwargs)), _leaves((other.args, other.kwargs))
                wrong = _wrong(call, other)
                if wrong:
                    args, _ = _whole(recording, regime)
                    return Evidence(left, right, wrong[0], axes, check.dtype, _given(args, {}), _subject(
                        battery, "", args, {}, lambda given, _, call=call: _received(recording, regime, given, call), axes))
                return Evidence(_leaves(call.outputs), _leaves(other.outputs), check.leaf, axes, check.dtype, _given(call.args, call.kwargs))
        return None
    args, call = _whole(recording, regime)
    return Evidence(_leaves(reference.outputs), _leaves(candidate.outputs), check.leaf, axes, check.dtype, _given(args, {}),
                    _subject(battery, recording, "", args, {}, call, axes))


def _whole(recording: Recording, regime: Regime, tap: bool = False) -> tuple[tuple, Callable[[tuple, dict], Any]]:
    """The arguments of the reference as a whole, and how to call it with such: for its outputs, with `tap` for its whole run."""
    inputs, states = recording.inputs(regime), recording.states(regime)

    def call(given: tuple, _: dict) -> Any:
        carried = given[len(inputs)] if len(given) > len(inputs) else None
        run = recording.adapter("float64").run(dict(zip(inputs, given, strict=False)), carried, tap=tap)
        return run if tap else run.outputs

    return tuple(inputs.values()) + (() if states is None else (states,)), call


def _received(recording: Recording, regime: Regime, given: tuple, wanted: Call) -> Any:
    """What a module of the reference is handed when the whole is called with these arguments."""
    run = _whole(recording, regime, tap=True)[1](given, {})
    return next((call.args, call.kwargs) for call in run.calls if (call.path, call.index) == (wanted.path, wanted.index))


def _wrong(call: Call, other: Call) -> list[str]:
    """What two calls were handed that differs by more than the last digits."""
    left, right = _leaves((call.args, call.kwargs)), _leaves((other.args, other.kwargs))
    return [name for name, value in left.items() if name in right and value.shape == right[name].shape
            and not size(np.asarray(right[name], np.float64) - value) <= 1e-9 * size(np.asarray(value, np.float64))]


def _norm(battery: Battery, check: Check) -> Finding | None:
    """A variance in one pass, which is rounding and shows in the kind of layer, its input and the size of the error."""
    if not check.where or check.tier not in ("forced", "rounding"):
        return None
    node = battery.recording.adapter("float64").modules().get(check.where)
    regime = next((item for item in battery.recording.regimes if item.name == check.regime), None)
    layer = None if node is None or node.layer not in NORMS or regime is None else _layer(battery, check, regime)
    if layer is None or not layer.args or not isinstance(layer.args[0], np.ndarray):
        return None
    held = battery.recording.within(check.dtype).weights
    return one_pass_variance(_leaves(layer.outputs)[check.leaf], _leaves(battery.candidate.call(layer, check.dtype))[check.leaf].astype(np.float64),
                             layer.args[0], weight=held.get(f"{check.where}.weight"), bias=held.get(f"{check.where}.bias"), dtype=check.dtype)


def _gradients(battery: Battery, check: Check) -> Diagnosis | None:
    """Gradients by name: stopped, let through, only one use of a tied leaf, one function in the reference that stops them, or a symptom."""
    recording, candidate, seed = battery.recording, battery.candidate, battery.case.seed
    name, _, scope = check.regime.rpartition(", ")
    regime = next((item for item in recording.plain() if item.name == name), None)
    if regime is None:
        return None
    adapter, ties = recording.adapter("float64"), battery.case.ties
    if scope == "layer":
        layer = next((item for item in recording.forced(regime) if item.path == check.where), None)
        if layer is None:
            return None
        args, kwargs, path = layer.args, layer.kwargs, layer.path
        other = candidate.adapter("float64").call_gradients(*candidate.arguments(layer), seed)

        def again(args: tuple, kwargs: dict) -> Any:
            return named(adapter.call_gradients(path, args, kwargs, seed))
    else:
        args, kwargs, path = (recording.inputs(regime), recording.states(regime)), {}, ""
        other = candidate.adapter("float64").gradients(args[0], battery.states(regime), seed)

        def again(args: tuple, kwargs: dict) -> Any:
            return named(adapter.gradients(*args, seed))

    def named(found: Any) -> dict[str, np.ndarray]:
        return {ties.get(leaf, leaf): value for leaf, value in found.parameters.items()} | found.inputs

    expected = again(args, kwargs)
    found = candidate.map.gradients(other.parameters) | other.inputs
    if check.leaf not in expected or check.leaf not in found:
        return None
    axes = _axes(battery, regime)
    evidence = Evidence(expected, found, check.leaf, axes, "float64", {}, _subject(battery, battery.recording, path, args, kwargs, again, axes))
    wrong = evidence.differing
    if all(not np.any(found[leaf]) for leaf in wrong):
        return Diagnosis("gradient stopped", "a gradient stopped: zero where the reference's is not", 0.0, 0)
    if all(not np.any(expected[leaf]) for leaf in wrong):
        return Diagnosis("gradient let through", "a missing stop_gradient: not zero where the reference's is", 0.0, 0)
    tied = _untied(battery, check, evidence, regime) if scope != "layer" and check.leaf in ties.values() else None
    if tied is not None:
        return tied
    trials = list(_stops(evidence.subject)) if hasattr(adapter, "variations") else []
    made, count = tried(evidence, iter(trials))
    return spoken([*made, *(item for item in read(evidence) if item.rank <= FITTED)], count)


def _stops(subject: repairs.Subject) -> Iterator[repairs.Trial]:
    again = lambda: subject.call(subject.args, subject.kwargs)  # noqa: E731
    for item in subject.adapter.variations(subject.path, subject.right).functions(again, None, gradients=True):
        def compute(value: float, item: Any = item) -> Any:
            with item.change(value):
                return again()

        yield repairs.Trial(item.family, item.phrase, compute)


def _untied(battery: Battery, check: Check, evidence: Evidence, regime: Regime) -> Diagnosis | None:
    """Whether the gradient of a tied leaf is that of some of its uses only."""
    adapter = battery.recording.adapter("float64")
    if not hasattr(adapter, "untied_gradients"):
        return None
    uses = [check.leaf, *(name for name, owner in battery.case.ties.items() if owner == check.leaf)]
    inputs, states = battery.recording.inputs(regime), battery.recording.states(regime)
    parts = adapter.untied_gradients(inputs, states, battery.case.seed, battery.case.ties).parameters
    expected, found = evidence.expected[check.leaf], evidence.found[check.leaf]
    for use in uses:
        share = size(found - (expected - parts[use])) / size(found - expected)
        if explains(share, size(found - expected) / size(expected)):
            return Diagnosis("untied", f"tied weights untied: the gradient through {use} is missing", share, len(uses))
    return None


def _splits(battery: Battery, check: Check) -> Diagnosis | None:
    """The first wrong split of the candidate, joined, against the whole; and its second part as if no state had been handed on."""
    case, recording = battery.case, battery.recording
    if case.states is None or check.regime.endswith("reference"):
        return None
    inputs = recording.grid(case.draw(case.seed, length=case.states.split_length if case.accepts("length") else None))
    along, axis, cut = case.along(inputs), case.states.axis, check.order
    length, batch = inputs[along[0]].shape[axis], inputs[along[0]].shape[1 if axis == 0 else 0]
    start = own = None
    if "carried" in check.regime:
        start, own = recording.states(recording.plain()[1]), battery.states(recording.plain()[1])
    whole = recording.adapter("float64").run(inputs, start, tap=False).outputs
    parts = [{name: np.take(value, part, axis=axis) if name in along else value for name, value in inputs.items()}
             for part in (np.arange(cut), np.arange(cut, length))]
    adapter = battery.candidate.adapter("float64")
    first = adapter.run(parts[0], own, tap=False).outputs
    second = adapter.run(parts[1], recording.state_of(first), tap=False).outputs
    alone = _leaves(adapter.run(parts[1], None, tap=False).outputs)
    if all(np.array_equal(alone[name], value) for name, value in _leaves(second).items() if name in alone):
        return Diagnosis("state dropped", "the state handed on is dropped: the second part runs as from the beginning", 0.0, 1)
    axes = Axes({value: name for name, value in case.sizes.items()}, length, batch)
    joined = _leaves(glued(first, second, case.states.output, axis))
    return spoken(read(Evidence(_leaves(whole), joined, check.leaf, axes, "float64")), 1)


def _optimiser(battery: Battery, check: Check) -> Diagnosis | None:
    """The reference's first steps with other settings of AdamW, by the losses; the candidate's are those of the tier."""
    trained, trajectory = battery.trained, battery.case.trajectory
    if trained is None or trajectory is None or trajectory.steps < 3:
        return None
    steps = min(FIRST_STEPS, trajectory.steps)
    batches = battery.batches()[:steps]
    adapter = battery.recording.adapter("float64")
    expected, found = battery.reference_training(battery.batches()).losses[:steps], trained.losses[:steps]
    evidence = Evidence({"loss": expected}, {"loss": found}, "loss", Axes({}), "float64")

    def trial(family: str, field: str, value: Any, fit: float | None = None) -> repairs.Trial:
        def compute(other: float) -> Any:
            changed = replace(trajectory, **{field: value if fit is None else other})
            return {"loss": adapter.train(batches, changed, battery.case.seed).losses}

        held = getattr(trajectory, field)
        return repairs.Trial(family, f"{field} {value if fit is None else '{value:.4g}'} for {held}", compute, value=fit)

    options = {"weight_decay": (0.0, 1e-4, 1e-2, 0.1), "eps": (1e-8, 1e-6, 1e-7, 1e-5, 1e-10), "clip": (None, 1.0),
               "betas": ((0.9, 0.999), (0.9, 0.95)), "lr": (1e-3, 1e-4, 3e-4, 1e-2)}
    trials = [trial(f"optimiser {field}", field, value) for field, values in options.items() for value in values
              if value != getattr(trajectory, field)]
    trials += [trial(f"optimiser {field}", field, None, getattr(trajectory, field)) for field in ("weight_decay", "eps", "lr")]
    made, count = tried(evidence, iter(trials))
    return spoken(made, count)
