"""The tiers beyond the forward pass: gradients, optimiser, side effects, observability of every leaf."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from . import ahead
from .adapters.base import Gradients, Leaf, Unsupported, digest
from .bounds import Bound
from .compare import EPS, Check, Place, exact, failed, passed
from .leaves import moved
from .measure import MeasureError, measure
from .recording import ReferenceRaised, Skip, matching, of_reference
from .regimes import AS_IS, Regime
from .series import TRAINING, Series
from .tiers import guarded

if TYPE_CHECKING:
    from .adapters.base import Trained
    from .battery import Battery

AMPLIFIED = Bound(16.0, "training multiplies a rounding of the first weights by as much: 16 times what that does to the reference itself",
                  on="optimiser")
CEILING = 1e-5  # a bug that training does not show above this would hide in a trajectory that multiplies roundings by so much
NOISE = Bound(16.0, "a gradient that is zero in exact arithmetic is rounding of the terms that cancel: 16 eps of all gradients", on="floor")


def gradients(battery: Battery) -> list[Check]:
    """Gradients by name, float64: of every layer by itself, then of the whole model, with and without a carried state."""
    ahead.gradients(battery)
    return layer_gradients(battery) + whole_gradients(battery)


def layer_gradients(battery: Battery) -> list[Check]:
    """Gradients of every layer by itself, once for each plain regime."""
    recording, candidate, seed = battery.recording, battery.candidate, battery.case.seed
    checks: list[Check] = []
    for regime in recording.plain():
        battery.progress(f"gradients of layers: {regime.name}")
        seen = set()
        for layer in recording.forced(regime):
            if layer.path in seen or candidate.path(layer.path) is None:
                continue
            seen.add(layer.path)
            place = Place("gradients", layer.path, f"{regime.name}, layer", "float64", battery.position(layer.path))

            def compare(layer: Any = layer, place: Place = place) -> list[Check]:
                with of_reference():
                    left = recording.adapter("float64").call_gradients(layer.path, layer.args, layer.kwargs, seed)
                right = candidate.adapter("float64").call_gradients(*candidate.arguments(layer), seed)
                return _gradients(battery, place, left, right, strict=battery.case.adapt is None)

            checks += guarded(place, battery, compare)
    return checks


def whole_gradients(battery: Battery) -> list[Check]:
    """Gradients of the loss end to end, with and without a carried state."""
    recording, candidate, seed = battery.recording, battery.candidate, battery.case.seed
    checks: list[Check] = []
    for regime in recording.plain():
        battery.progress(f"gradients end to end: {regime.name}")
        place = Place("gradients", "", f"{regime.name}, end to end", "float64", battery.position(""))

        def whole(regime: Regime = regime, place: Place = place) -> list[Check]:
            with of_reference():
                left = battery.reference_gradients(regime)
            if not any(np.any(value) for value in (*left.parameters.values(), *left.inputs.values())):
                battery.note(f"gradients end to end, {regime.name}: all gradients of the reference are zero (no float output?) and prove nothing")
            right = candidate.adapter("float64").gradients(recording.inputs(regime), battery.states(regime), seed)
            found = _gradients(battery, place, left, right, strict=True)
            bound = battery.bounds.find("gradients", "", regime.name)
            apart = abs(left.loss - right.loss)
            allowed = bound.value * max(abs(left.loss), EPS["float64"])
            found.append(Check(place.tier, 2, "", "loss", place.regime, "float64", apart <= allowed, apart / max(abs(left.loss), EPS["float64"]),
                               bound.value, bound.reason, "relative difference", "", place.order))
            return found + (_detached(battery, place, left, right) if battery.case.states is not None and regime.carried else [])

        checks += guarded(place, battery, whole)
    return checks


def _named(battery: Battery, parameters: dict[str, np.ndarray], side: str) -> dict[str, np.ndarray]:
    ties = battery.case.ties
    if side == "candidate":
        return battery.candidate.map.gradients(parameters)
    return {ties.get(name, name): value for name, value in parameters.items()}


def _gradients(battery: Battery, place: Place, left: Gradients, right: Gradients, strict: bool) -> list[Check]:
    parameters = (_named(battery, left.parameters, "reference"), _named(battery, right.parameters, "candidate"))
    checks: list[Check] = []
    everything = [*left.parameters.values(), *left.inputs.values()]
    noise = NOISE.value * EPS["float64"] * float(np.sqrt(sum(float(np.sum(np.square(value))) for value in everything)))
    for kind, (expected, found) in (("parameter", parameters), ("input", (left.inputs, right.inputs))):
        missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
        if strict and (missing or extra):
            checks.append(failed(place, 1, f"{kind} gradients differ in names: missing {missing or 'none'}, unexpected {extra or 'none'}",
                                 quantity="leaves"))
        for name in (name for name in expected if name in found):
            where = name.rpartition(".")[0] if kind == "parameter" and "end to end" in place.regime else place.where
            checks.append(_gradient(battery, Place(place.tier, where, place.regime, "float64", battery.position(where)), name, expected[name],
                                    found[name], noise))
    return checks or [passed(place, 2, "nothing to differentiate", quantity="relative L2")]


def _gradient(battery: Battery, place: Place, name: str, expected: np.ndarray, found: np.ndarray, noise: float) -> Check:
    bound = battery.bounds.find("gradients", place.where, place.regime, name)
    try:
        distance = measure(expected, found)
    except MeasureError as error:
        return failed(place, 1, str(error), name)
    if distance.note:
        return failed(place, 1, distance.note, name, "finite values")
    held, reason = distance.relative_l2 <= bound.value, bound.reason
    if not held and distance.error_rms * np.sqrt(distance.count) <= noise:
        held, reason = True, NOISE.reason
    return Check(place.tier, 2, place.where, name, place.regime, "float64", held, distance.relative_l2, bound.value, reason,
                 "gradient, relative L2", "", place.order, distance)


def _detached(battery: Battery, place: Place, left: Gradients, right: Gradients) -> list[Check]:
    checks = []
    for side, gradients_of in (("reference", left), ("candidate", right)):
        for name, value in gradients_of.inputs.items():
            if not name.startswith("state"):
                continue
            largest = float(np.max(np.abs(value), initial=0.0))
            if battery.case.states.detached:
                checks.append(Check(place.tier, 5, "", name, place.regime, "float64", largest == 0.0, largest, 0.0,
                                    "the case declares that the state passed in is detached", f"largest gradient in the {side}", "", place.order))
    return checks


def optimiser(battery: Battery) -> list[Check]:
    """AdamW from the same weights on the same data: losses and every leaf after the last step."""
    case, trajectory = battery.case, battery.candidate.trajectory
    if case.trajectory is None or trajectory is None:
        raise Unsupported("the case names no trajectory")
    ahead.optimiser(battery)
    batches = battery.batches()
    battery.progress(f"optimiser: {len(batches)} steps of the reference")
    place = Place("optimiser", "", f"{len(batches)} steps", "float64", battery.position(""))
    try:
        with of_reference():
            left = battery.reference_training(batches)
    except ReferenceRaised as error:
        return [failed(place, 6, f"the reference raised {error}", quantity="a result")]

    def compare() -> list[Check]:
        battery.progress(f"optimiser: {len(batches)} steps of the candidate")
        right = battery.trained = battery.candidate.adapter("float64").train(batches, trajectory, case.seed)
        losses = [[float(loss) for loss in side.losses] for side in (right, left)]
        battery.series.append(Series(TRAINING, "", "loss", place.regime, "float64", *losses))
        checks = exact(place, {"loss": left.losses}, {"loss": right.losses}, battery.bounds, "optimiser", 6)
        arrays = battery.candidate.map.to_reference(right.arrays)
        for name, expected in left.arrays.items():
            if name in case.ties:
                continue
            where = name.rpartition(".")[0]
            at = Place("optimiser", where, place.regime, "float64", battery.position(where))
            checks += exact(at, {name: expected}, {name: arrays[name]}, battery.bounds, "optimiser", 6)
        return checks

    checks = _excused(battery, guarded(place, battery, compare), left, batches)
    still = [name for name, leaf in battery.recording.leaves.items()
             if leaf.trainable and np.array_equal(left.arrays[name], battery.recording.weights[name])]
    if still:
        checks.append(failed(place, 6, f"the reference did not train {', '.join(still)}: nothing is compared there", quantity="movement"))
    return checks


def _excused(battery: Battery, checks: list[Check], left: Trained, batches: list[dict[str, np.ndarray]]) -> list[Check]:
    """The checks again, those that fail allowed what a rounding of its first weights does to the reference, up to CEILING.

    Trajectories of deep models or high rates are chaotic: two runs of one program, a rounding apart at first, part as well.
    """
    def over(check: Check) -> bool:
        return not check.held and check.quantity == "relative L2"

    if not any(map(over, checks)) or not battery.recording.live:
        return checks
    battery.progress(f"optimiser: {len(batches)} steps of the reference, a rounding away")
    with of_reference():
        away = battery.reference_training_nearby(batches)
    found = []
    for index, check in enumerate(checks):
        if over(check):  # the losses are the first; a parameter may be called "loss", too
            own = measure(left.arrays[check.leaf], away.arrays[check.leaf]) if index else measure(left.losses, away.losses)
            allowed = AMPLIFIED.value * own.relative_l2
            if allowed > CEILING:
                check = replace(check, allowed=CEILING, held=False, reason=AMPLIFIED.reason,
                                detail=f"the reference itself, a rounding away at first, ends {own.relative_l2:.1e} away, so that this trajectory "
                                       "says little: take fewer steps or a lower rate")
            elif allowed > check.allowed:
                check = replace(check, allowed=allowed, held=check.value <= allowed, reason=AMPLIFIED.reason)
        found.append(check)
    return found


def effects(battery: Battery) -> list[Check]:
    """Inputs, states and weights are the same before and after a call, and a second call gives the same bits."""
    checks: list[Check] = []
    recording = battery.recording
    for regime in recording.plain():
        inputs = recording.inputs(regime)
        for side, adapter, states in (("reference", recording.adapter("float64"), recording.states(regime)),
                                      ("candidate", battery.candidate.adapter("float64"), battery.states(regime)))[not recording.live:]:
            before = digest((inputs, states))
            place = Place("effects", "", regime.name, "float64")

            def compare(adapter: Any = adapter, place: Place = place, side: str = side, inputs: Any = inputs, states: Any = states,
                        before: str = before, regime: Regime = regime) -> list[Check]:
                run = adapter.run(inputs, states)
                found = [failed(place, 7, f"{side}: {effect}; give new values back instead of writing to what was handed over",
                                quantity="side effects") for effect in run.effects]
                if digest((inputs, states)) != before:
                    found.append(failed(place, 7, f"{side}: the arrays that were handed over changed", quantity="side effects"))
                first = recording.run(regime) if side == "reference" else battery.free_run(regime)
                if digest(run.outputs) != digest(first.outputs):
                    found.append(failed(place, 7, f"{side}: a second call on the same inputs gave other bits: it is not deterministic (dropout left "
                                        "on?), so no other number says much", quantity="determinism"))
                return found or [passed(place, 7, f"{side}: nothing changed", quantity="side effects")]

            checks += guarded(place, battery, compare)
    return checks


def observability(battery: Battery) -> list[Check]:
    """Every floating leaf, moved by 1 %, changes an output or a gradient of the reference, and changes the candidate alike."""
    recording, candidate = battery.recording, battery.candidate
    if not recording.live:
        raise Unsupported("a golden file answers for the weights that it was made with only")
    if not any(value.dtype.kind == "f" for value in recording.weights.values()):
        raise Unsupported("the reference has no weight that could be moved")
    reference, other = recording.adapter("float64"), candidate.adapter("float64")
    regimes = [(recording.inputs(regime), recording.states(regime), battery.states(regime)) for regime in recording.plain()]
    base = [digest(recording.run(regime).outputs) for regime in recording.plain()]
    checks: list[Check] = []
    try:
        for name, leaf in recording.leaves.items():
            if name in recording.case.ties or recording.weights[name].dtype.kind != "f":
                continue
            battery.progress(f"observability: {name}")
            place = Place("observability", leaf.module, AS_IS, "float64", battery.position(leaf.module))
            changed = dict(recording.weights)
            changed[name] = moved(recording.weights[name], name, recording.case.seed)
            changed.update({tied: changed[owner] for tied, owner in recording.case.ties.items() if owner == name})
            reference.load(changed)
            outputs = [reference.run(inputs, states, tap=False).outputs for inputs, states, _ in regimes]
            seen = any(digest(output) != before for output, before in zip(outputs, base, strict=True))
            checks.append(_observed(battery, place, name, leaf, seen))

            def compare(changed: dict = changed, outputs: list = outputs, place: Place = place, name: str = name) -> list[Check]:
                other.load({**candidate.weights, **candidate.map.made_from(name, changed)})
                found = []
                for (inputs, _, states), expected in zip(regimes, outputs, strict=True):
                    found += exact(place, expected, other.run(inputs, states, tap=False).outputs, battery.bounds, "free", 8)
                return [check for check in found if not check.held]

            checks += guarded(place, battery, compare)
    finally:
        reference.load(recording.weights)
        other.load(candidate.weights)
    return checks


def _observed(battery: Battery, place: Place, name: str, leaf: Leaf, seen: bool) -> Check:
    declared = matching(battery.case.unobservable, name)
    if seen:
        if declared is not None:
            return failed(place, 8, f"{name} is declared unobservable ({declared}) but changes the outputs", name, "observability")
        return passed(place, 8, "changes the outputs", name, "observability")
    if declared is not None:
        battery.note(f"observability, {name}: changes nothing, {declared}")
        return passed(place, 8, declared, name, "observability")
    gradient = None
    if leaf.trainable:
        try:
            found = [battery.reference_gradients(regime).parameters.get(name) for regime in battery.recording.plain()]
            gradient = max((float(np.max(np.abs(value), initial=0.0)) for value in found if value is not None), default=None)
        except (Unsupported, Skip):
            gradient = None
    if gradient:
        return passed(place, 8, "changes a gradient", name, "observability")
    return failed(place, 8, f"{name} changes no output, state or gradient: it is untested; give inputs that reach it, or a reason in "
                  "unobservable={...}", name, "observability")
