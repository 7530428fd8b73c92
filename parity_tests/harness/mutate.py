"""Proof that the harness can fail: one porting bug at a time is put into a healthy candidate, and has to be noticed and located."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from . import locate, tree
from .battery import TIERS, Battery
from .candidate import Candidate
from .case import Case, CaseError, Trajectory
from .compare import RULES
from .explain import Diagnosis
from .measure import MeasureError, cosine
from .policy import Policy, applied
from .recording import Recording

OUTSIDE = ("optimiser", "effects")  # tiers whose failures belong to no module


@dataclass(frozen=True)
class Injector:
    """One porting bug.

    name: what it is. where: the module path (of the reference) at which it has to be located, or the tier for what is in no module.
    weights: `f(weights, fresh) -> weights`, candidate arrays by candidate name and those the candidate was made with.
    patches: changes to modules (`adapters.nnx_trace.Patch`). trajectory: changes the candidate's optimiser run.
    context: `f() -> context manager` that patches something of the candidate's code while it runs; nothing compiled before is used then,
        unless `reuse` says that no model code is touched (an optimiser). families: those that `diagnose` may name, none when not known.
    unseen: written before anything was tuned on it; reported apart.
    """

    name: str
    where: str
    weights: Callable[[dict[str, np.ndarray], Mapping[str, np.ndarray]], dict[str, np.ndarray]] | None = None
    patches: tuple = ()
    trajectory: Callable[[Trajectory], Trajectory] | None = None
    context: Callable[[], AbstractContextManager] | None = None
    reuse: bool = False
    families: tuple[str, ...] = ()
    unseen: bool = False


@dataclass(frozen=True)
class Mutation:
    """What became of one injected bug. `tier` is the one that noticed, the last of `tiers` that ran, and `rules` are those broken there.

    `cosine_alone`: whether cosine >= 0.99 by itself would have noticed. `families` are those that are right for it.
    """

    name: str
    expected: str
    located: str
    detected: bool
    tier: str
    rules: tuple[str, ...]
    cosine: float
    cosine_alone: bool
    sentence: str
    failures: int = 0
    tiers: tuple[str, ...] = field(default_factory=tuple)
    diagnosis: Diagnosis | None = None
    unseen: bool = False
    families: tuple[str, ...] = ()

    @property
    def held(self) -> bool:
        """Whether the bug was noticed at the place where it was put."""
        return self.detected and self.located == self.expected

    @property
    def named(self) -> bool | None:
        """Whether the diagnosis names a right family first; None when none is known."""
        return (self.diagnosis is not None and self.diagnosis.family in self.families) if self.families else None


def unseen(*injectors: Injector) -> tuple[Injector, ...]:
    """The same bugs, marked as not seen while the harness was tuned."""
    return tuple(replace(injector, unseen=True) for injector in injectors)


def run_mutations(case: Case, injectors: Sequence[Injector] | None = None, *, policy: Policy | None = None, healthy: bool = True,
                  battery: Battery | None = None, progress: Callable[[str], None] | None = None) -> list[Mutation]:
    """Inject each bug by itself (`case.injectors` when None) and run the tiers in order until one does not hold.

    `battery` of the case, where one has run: what it recorded and compiled is used again.

    Raises CaseError when there is nothing to inject or two injectors have one name, and where a detection would mean nothing: when the
    candidate raises with a bug, or (with `healthy`) when it does not hold without any.
    """
    chosen = tuple(case.injectors if injectors is None else injectors)
    names = [injector.name for injector in chosen]
    if not chosen or len(set(names)) != len(names):
        raise CaseError(f"mutations of case {case.name!r} need injectors with names of their own, found {names}")
    recording = Recording(case) if battery is None else battery.recording
    candidate = Candidate(case, recording) if battery is None else battery.candidate
    if candidate is None:
        raise CaseError(f"case {case.name!r} has no candidate to put a bug into: its weights could not be converted")
    if healthy:
        result = (battery or Battery(case, policy=policy, recording=recording, candidate=candidate, progress=progress)).run()
        if not result.held:
            raise CaseError(f"case {case.name!r} does not hold without a mutation: {result.sentence}")
    found = []
    for injector in chosen:
        if progress:
            progress(f"mutation: {injector.name}")
        found.append(_one(case, recording, candidate, injector, policy or Policy()))
    return found


def _one(case: Case, recording: Recording, healthy: Candidate, injector: Injector, policy: Policy) -> Mutation:
    weights = {name: value.copy() for name, value in healthy.weights.items()}
    if injector.weights is not None:
        weights = injector.weights(weights, healthy.fresh)
        if all(np.array_equal(weights[name], value) for name, value in healthy.weights.items()):
            raise CaseError(f"injector {injector.name!r} changes no weight")
    trajectory = injector.trajectory(case.trajectory) if injector.trajectory and case.trajectory else case.trajectory
    context, salt = (injector.context(), None if injector.reuse else object()) if injector.context else (contextlib.nullcontext(), None)
    with context:
        twin = healthy.mutated(weights, injector.patches, trajectory, salt)
        battery = Battery(case, policy=policy, recording=recording, candidate=twin)
        done = []
        for name in TIERS:
            done.append(battery.tier(name))
            if not done[-1].held:
                break
        similarity = _cosine_alone(battery)
    checks = [check for tier in done for check in tier.checks]
    wrong = locate.first(checks)
    rules = tuple(f"{rule} {RULES[rule]}" for rule in sorted({check.rule for check in checks if not check.held}))
    located = "" if wrong is None else (wrong.tier if wrong.tier in OUTSIDE else locate.place(checks))
    if wrong is not None and wrong.quantity == "a result":
        raise CaseError(f"injector {injector.name!r} of case {case.name!r} computes nothing wrong, it raises: {wrong.detail}")
    looks = None if wrong is None else battery.tier(wrong.tier).diagnosis
    return Mutation(injector.name, injector.where, located, wrong is not None, wrong.tier if wrong else "", rules, similarity,
                    not similarity >= 0.99, locate.sentence(checks, battery.input_errors, looks), sum(not check.held for check in checks),
                    tuple(tier.name for tier in done), looks, injector.unseen, injector.families)


def _cosine_alone(battery: Battery) -> float:
    """The least cosine of any output leaf of any layer by itself or of the model end to end, on the plain inputs; NaN when one cannot run."""
    regime = battery.recording.plain()[0]
    pairs: list[tuple[Any, Any]] = []
    with applied(battery.policy, battery.kinds):
        try:
            for layer in battery.recording.forced(regime):
                if battery.candidate.path(layer.path) is not None:
                    pairs.append((layer.outputs, battery.candidate.call(layer, "float64")))
            pairs.append((battery.recording.run(regime).outputs, battery.free_run(regime).outputs))
            return min(_least(left, right) for left, right in pairs)
        except Exception:  # a candidate that cannot be run is noticed by every rule
            return math.nan


def _least(reference: Any, candidate: Any) -> float:
    left, right = tree.named(reference), tree.named(candidate)
    found = [1.0]
    for name, value in left.items():
        if np.asarray(value).dtype.kind == "f":
            try:
                found.append(cosine(np.asarray(value), np.asarray(right[name])))
            except (MeasureError, KeyError):
                return math.nan
    return math.nan if any(math.isnan(value) for value in found) else min(found)
