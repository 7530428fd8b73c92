"""All tiers of a case, each run when it is first asked for, and the result that reports are made from."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import ahead, diagnose, lint, lint_source, locate, provenance, tiers, tiers_more, tree, voting
from .adapters.base import Call, Gradients, Run, Trained, Unsupported
from .bounds import Bounds
from .candidate import Candidate
from .case import Case
from .compare import Check, Place, failed
from .convert import ConversionError
from .explain import Diagnosis
from .policy import Policy, applied, described
from .recording import Recording
from .regimes import AS_IS, Regime
from .series import Series

TIERS: Mapping[str, Callable[[Battery], list[Check]]] = {
    "conversion": tiers.conversion,
    "coverage": tiers.coverage,
    "forced": tiers.forced,
    "free": tiers.free,
    "voting": voting.voting,
    "rounding": tiers.rounding,
    "gradients": tiers_more.gradients,
    "splits": tiers.splits,
    "optimiser": tiers_more.optimiser,
    "effects": tiers_more.effects,
    "observability": tiers_more.observability,
}


@dataclass
class TierResult:
    """Checks of one tier; `skipped` says why there are none."""

    name: str
    checks: list[Check]
    seconds: float
    skipped: str = ""
    sentence: str = ""
    diagnosis: Diagnosis | None = None

    @property
    def held(self) -> bool:
        """Whether every check held. A tier that does not apply holds; the report names it."""
        return all(check.held for check in self.checks)


@dataclass
class Result:
    """What a battery found: tiers, notes, lint, policy, the order in which modules run, and how far inputs agreed in free runs.

    `meta` says where it comes from (`provenance`), `series` is what a report draws along an axis.
    """

    case: str
    tiers: list[TierResult]
    notes: list[str]
    lint: list[str]
    policy: dict
    order: dict[str, int]
    input_errors: dict[str, float]
    leaves: int
    sentence: str = ""
    diagnosis: Diagnosis | None = None
    meta: dict = field(default_factory=dict)
    series: list[Series] = field(default_factory=list)

    @property
    def checks(self) -> list[Check]:
        """Every check of every tier."""
        return [check for tier in self.tiers for check in tier.checks]

    @property
    def held(self) -> bool:
        """Whether everything held and anything was checked at all."""
        return bool(self.checks) and all(tier.held for tier in self.tiers)


class Battery:
    """The tiers of a case over one recording of its reference. Raises CaseError for a case that cannot be run."""

    def __init__(self, case: Case, *, policy: Policy | None = None, recording: Recording | None = None, candidate: Candidate | None = None,
                 progress: Callable[[str], None] | None = None) -> None:
        self.case, self.policy, self.bounds = case, policy or Policy(), Bounds(case.bounds)
        self.progress = progress or (lambda _: None)
        self.notes: list[str] = []
        self.input_errors: dict[str, float] = {}
        self.broken: list[Check] = []
        self.series: list[Series] = []
        self.trained: Trained | None = None
        self.diagnosed: str | None = None
        self._tiers: dict[str, TierResult] = {}
        self._runs: dict[tuple[str, str], Run] = {}
        self.kinds: set[str] = set()
        self.recording = recording or Recording(case)
        if self.recording.live:
            self.kinds.add(self.recording.kind)
        self.candidate = candidate
        if candidate is None:
            try:
                self.candidate = Candidate(case, self.recording)
            except ConversionError as error:
                place = Place("conversion", "", AS_IS, "float64")
                self.broken.append(failed(place, 9, str(error), quantity="a weight map"))
        if self.candidate is not None:
            self.kinds.add(self.candidate.kind)
        with applied(self.policy, self.kinds):
            self.order = self.recording.order()

    def release(self) -> None:
        """Give back what the candidate compiled; results stay."""
        if self.candidate is not None:
            self.candidate.release()

    def tier(self, name: str) -> TierResult:
        """The result of one tier, run on first use. Raises KeyError for an unknown name."""
        if name not in self._tiers:
            start = time.perf_counter()
            skipped, checks = "", []
            if self.candidate is None and name == "conversion":
                checks = self.broken
            elif self.candidate is None:
                skipped = "the weights could not be converted"
            else:
                try:
                    with applied(self.policy, self.kinds):
                        checks = TIERS[name](self)
                    if not checks:
                        checks = [failed(Place(name, "", AS_IS, "float64"), 1, "nothing was compared")]
                except Unsupported as reason:
                    skipped = str(reason)
            if not all(check.held for check in checks) and self.candidate is not None:
                self._agreement()
            found = self._diagnosis(name, checks)
            result = TierResult(name, checks, time.perf_counter() - start, skipped, diagnosis=found)
            result.sentence = locate.sentence(result.checks, self.input_errors, found)
            self._tiers[name] = result
        return self._tiers[name]

    def run(self, names: Sequence[str] | None = None, *, stop: bool = False) -> Result:
        """All tiers, or those named, in order; with `stop` no further than the first that does not hold."""
        unknown = [name for name in names or () if name not in TIERS]
        if unknown:
            raise ValueError(f"unknown tier {unknown[0]!r}, expected {', '.join(TIERS)}")
        done = []
        wanted = [name for name in TIERS if not names or name in names or (self.broken and name == "conversion")]
        for name, after in zip(wanted, [*wanted[1:], None], strict=True):
            if after is not None and not stop:
                with applied(self.policy, self.kinds):
                    ahead.begin(self, [tier for tier in (name, after) if tier not in self._tiers])
            done.append(self.tier(name))
            if stop and not done[-1].held:
                break
        for (regime, path), error in self.recording.refused.items():
            self.note(f"forced, {regime}: the reference refuses {path}: {error}")
        for path, argument in self.recording.written.items():
            self.note(f"{path or 'the model'}: the reference writes to its argument {argument}, so whatever reads that later sees it changed")
        found = lint.sizes(self.case.sizes)
        if self.candidate is not None:
            with applied(self.policy, self.kinds):
                modules = self.recording.adapter("float64").modules(), self.candidate.adapter("float64").modules()
                found += lint.defaults(*modules, self.candidate.path) + lint_source.defaults(*(side.values() for side in modules))
        checks = [check for tier in done for check in tier.checks]
        first = locate.first(checks)
        looks = None if first is None else self._tiers[first.tier].diagnosis
        words = locate.sentence(checks, self.input_errors, looks) if checks else "nothing was compared: no tier that was asked for applies"
        return Result(self.case.name, done, list(self.notes), found, described(self.policy, self.kinds, self.case.jit), dict(self.order),
                      dict(self.input_errors), len(self.recording.leaves), words, looks,
                      meta=provenance.described(self.case), series=list(self.series))

    def done(self) -> tuple[str, ...]:
        """Names of the tiers that have run."""
        return tuple(self._tiers)

    def note(self, text: str) -> None:
        """Something the reader of a report has to know; said once."""
        if text not in self.notes:
            self.notes.append(text)

    def position(self, path: str) -> int:
        """Position of a module in run order; modules that do not run come last."""
        if path in self.order:
            return self.order[path]
        inside = [place for other, place in self.order.items() if path and path.startswith(f"{other}.") and other]
        return max(inside, default=len(self.order))

    def runs(self) -> bool:
        """Whether the candidate runs at all on the plain inputs."""
        with contextlib.suppress(Exception):
            self.free_run(self.recording.plain()[0])
            return True
        return False

    def free_run(self, regime: Regime, dtype: str = "float64") -> Run:
        """The candidate end to end under a regime."""
        key = (regime.name, dtype)
        if key not in self._runs:
            args, kwargs = self._free_arguments(regime, dtype)
            self._runs[key] = self.candidate.adapter(dtype).run(*args, **kwargs)
        return self._runs[key]

    def states(self, regime: Regime, dtype: str = "float64") -> Any:
        """The state handed to the candidate under a regime: the reference's, in the containers of the candidate's own."""
        given = self.recording.within(dtype).states(regime)
        if given is not None:
            with contextlib.suppress(Exception):  # a candidate that cannot run is reported where it runs
                return tree.like(self.recording.state_of(self.free_run(self.recording.plain()[0]).outputs), given)
        return given

    def start_free(self, dtype: str = "float64") -> None:
        """Begin to compile the candidate end to end for every regime that has not run."""
        for regime in self.recording.regimes:
            if (regime.name, dtype) not in self._runs:
                self.candidate.start(dtype, "run", lambda regime=regime: self._free_arguments(regime, dtype))

    def _free_arguments(self, regime: Regime, dtype: str) -> tuple[tuple, dict]:
        # the plain run in low precision is compiled as in use, since optimisation decides its rounding
        quick = dtype == "float64" or regime.name != AS_IS
        return (self.recording.within(dtype).inputs(regime), self.states(regime, dtype)), {"tap": dtype == "float64", "quick": quick}

    def matched(self, reference: Run, candidate: Run) -> Iterator[tuple[Call, Call]]:
        """Calls of both runs that belong together: the same module, called equally often."""
        calls: dict[str, list[Call]] = {}
        for call in candidate.calls:
            calls.setdefault(call.path, []).append(call)
        counts: dict[str, int] = {}
        for call in reference.calls:
            counts[call.path] = counts.get(call.path, 0) + 1
        for call in reference.calls:
            path = self.candidate.path(call.path)
            if path is None:
                continue
            others = calls.get(path, [])
            if len(others) == counts[call.path]:
                yield call, others[call.index]
            elif call.index == 0 and path not in candidate.untapped:  # of those the note on coverage tells
                times = f"{counts[call.path]} calls in the reference, {len(others)} in the candidate"
                self.note(f"free, {call.path}: {times}, compared by force only")

    def agree(self, reference: Call, candidate: Call) -> None:
        """Keep how far the inputs of a module agree between the two free runs; the worst one counts."""
        args = (reference.args, reference.kwargs)
        if self.case.adapt is not None:
            args = self.case.adapt(reference.path, reference.args, reference.kwargs)
        error = tiers.input_error(tuple(args), (candidate.args, candidate.kwargs))
        if not math.isnan(error):
            self.input_errors[reference.path] = max(error, self.input_errors.get(reference.path, 0.0))

    def reference_gradients(self, regime: Regime) -> Gradients:
        """Gradients of the reference end to end, computed once for all candidates."""
        return self._once(("gradients", regime.name), lambda: self.recording.adapter("float64").gradients(
            self.recording.inputs(regime), self.recording.states(regime), self.case.seed))

    def reference_training(self, batches: Sequence[Mapping[str, np.ndarray]]) -> Trained:
        """The optimiser run of the reference, computed once for all candidates."""
        return self._once("training", lambda: self.recording.adapter("float64").train(batches, self.case.trajectory, self.case.seed))

    def reference_training_nearby(self, batches: Sequence[Mapping[str, np.ndarray]]) -> Trained:
        """The same run of the reference from weights each of which is a rounding away, up or down by chance."""
        recording, rng = self.recording, np.random.default_rng(self.case.seed)
        moved = {name: np.nextafter(value, rng.choice((-np.inf, np.inf), value.shape)) if value.dtype.kind == "f" else value
                 for name, value in recording.weights.items()}

        def train() -> Trained:
            adapter = recording.adapter("float64")
            adapter.load(moved)
            try:
                return adapter.train(batches, self.case.trajectory, self.case.seed)
            finally:
                adapter.load(recording.weights)

        return self._once("training nearby", train)

    def batches(self) -> list[dict[str, np.ndarray]]:
        """The inputs of every step of the optimiser run."""
        case = self.case
        return [self.recording.grid(case.draw(case.seed + 101 + step, batch=case.trajectory.batch, length=case.trajectory.length))
                for step in range(case.trajectory.steps)]

    def _diagnosis(self, name: str, checks: list[Check]) -> Diagnosis | None:
        """What the first divergence of the first tier that fails looks like; later tiers see the same bug through more layers."""
        first = locate.first(checks)
        if first is None or self.diagnosed not in (None, name):
            return None
        self.progress(f"diagnosis of {first.where or 'the whole model'}")
        try:
            with applied(self.policy, self.kinds):
                found = diagnose.diagnose(self, first)
        except Exception as error:  # the verdict stands without it
            self.note(f"{name}: no diagnosis, {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
            return None
        if found is not None:
            self.diagnosed = name
        return found

    def _agreement(self) -> None:
        """How far inputs agree in the plain free run, which a sentence about a layer says; nothing when the candidate cannot run."""
        with contextlib.suppress(Exception), applied(self.policy, self.kinds):
            regime = self.recording.plain()[0]
            for call, other in self.matched(self.recording.run(regime), self.free_run(regime)):
                self.agree(call, other)

    def _once(self, key: Any, compute: Callable[[], Any]) -> Any:
        held = self.recording.shared
        if key not in held:
            held[key] = compute()
        return held[key]


def run_case(case: Case, *, tiers: Sequence[str] | None = None, policy: Policy | None = None,
             progress: Callable[[str], None] | None = None) -> Result:
    """Run a case: all tiers, or those named. `progress` is called with a line for every step."""
    return Battery(case, policy=policy, progress=progress).run(tiers)
