"""Three or more implementations of one thing: those that agree outvote the one that does not, and the verdict names it.

`Case.also` names further implementations beside the reference and the candidate: a factory of a module or an `Engine`, or a pair
(factory, call) with `call(module, inputs, states) -> outputs` of its own. They get the reference's weights by name and by kind of layer. An
implementation that computes in a lower precision than float64 is measured by that precision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from . import mapping, tree
from .adapters import opened_from
from .adapters.base import Adapter, Unsupported
from .case import CaseError
from .compare import EPS, Check, Place, failed, passed
from .convert import ConversionError
from .locate import number
from .measure import MeasureError, relative_l2
from .tiers import applicable

if TYPE_CHECKING:
    from .battery import Battery

LOWER = 256.0  # eps of the coarser precision in which two implementations that compute in it may differ: sums through a whole model
LOWER_REASON = "an implementation that computes in lower precision is measured by it: 256 eps of that precision, sums through a whole model"


@dataclass(frozen=True)
class Vote:
    """How implementations fall into camps. `camps` hold names, largest first; `apart` the distance of every two."""

    camps: tuple[tuple[str, ...], ...]
    apart: Mapping[tuple[str, str], float]

    @property
    def majority(self) -> tuple[str, ...]:
        """The largest camp when it is larger than every other and more than one; otherwise nobody."""
        first = self.camps[0]
        return first if len(first) > 1 and (len(self.camps) == 1 or len(self.camps[1]) < len(first)) else ()

    def distance(self, name: str) -> float:
        """Distance of one implementation from the nearest of the majority that is not itself."""
        return min((self.apart[name, other] for other in self.majority if other != name), default=0.0)


def leaves(outputs: Any) -> dict[str, np.ndarray]:
    """The arrays of a tree of outputs by name."""
    return {name: np.asarray(leaf) for name, leaf in tree.named(outputs).items()}


def apart(one: Mapping[str, np.ndarray], two: Mapping[str, np.ndarray]) -> float:
    """The largest relative L2 of two sets of leaves; integers differ or do not; infinite when the leaves are not the same."""
    if set(one) != set(two) or not one:
        return float("inf")
    worst = 0.0
    for name, left in one.items():
        right = two[name]
        try:
            if left.dtype.kind in "biu" and right.dtype.kind in "biu":
                worst = max(worst, 0.0 if np.array_equal(left, right) else float("inf"))
            else:
                worst = max(worst, relative_l2(left, right))
        except MeasureError:
            return float("inf")
    return worst


def precision(outputs: Mapping[str, np.ndarray]) -> str:
    """The coarsest floating dtype among leaves; float64 when there is none."""
    return max((str(value.dtype) for value in outputs.values() if str(value.dtype) in EPS), key=EPS.__getitem__, default="float64")


def tally(ballots: Mapping[str, Mapping[str, np.ndarray]], allowed: float) -> Vote:
    """Camps of implementations that agree with each other, pairwise or through a third."""
    names = list(ballots)
    distances, near = {}, {name: {name} for name in names}
    for one in names:
        for two in names:
            if one == two:
                continue
            distances[one, two] = apart(ballots[one], ballots[two]) if (two, one) not in distances else distances[two, one]
            coarse = max(EPS[precision(ballots[one])], EPS[precision(ballots[two])])
            if distances[one, two] <= (allowed if coarse == EPS["float64"] else max(allowed, LOWER * coarse)):
                near[one].add(two)
    camps: list[set[str]] = []
    for name in names:
        reached, wave = {name}, {name}
        while wave:
            wave = set().union(*(near[other] for other in wave)) - reached
            reached |= wave
        if reached not in camps:
            camps.append(reached)
    ordered = sorted((tuple(name for name in names if name in camp) for camp in camps), key=len, reverse=True)
    return Vote(tuple(ordered), distances)


def listed(names: Sequence[str]) -> str:
    """"a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def spoken(vote: Vote) -> str:
    """The vote in one sentence."""
    count = sum(map(len, vote.camps))
    if not vote.majority:
        return f"no two of {count} implementations agree" if len(vote.camps[0]) == 1 else \
            f"{count} implementations are split: " + " against ".join(listed(camp) for camp in vote.camps)
    agreed = max((vote.apart[one, two] for one in vote.majority for two in vote.majority if one != two), default=0.0)
    odd = [name for camp in vote.camps[1:] for name in camp]
    if not odd:
        return f"{count} implementations agree to {number(agreed)}"
    which = f"the odd one out of {count} is {odd[0]}" if len(odd) == 1 else f"the odd ones out of {count} are {listed(odd)}"
    parts = "parts" if len(odd) == 1 else "part"
    return f"{which}: {listed(vote.majority)} agree to {number(agreed)}, {listed(odd)} {parts} by {number(min(map(vote.distance, odd)))}"


def voters(battery: Battery) -> dict[str, Adapter]:
    """The further implementations of a case with the reference's weights in them. Raises CaseError for one that cannot have them."""
    case, recording = battery.case, battery.recording
    made: dict[str, Adapter] = {}
    for name, entry in case.also.items():
        factory, call = entry if isinstance(entry, tuple) else (entry, None)
        adapter = opened_from(factory, case, 0, "float64", f"implementation {name!r}")
        if call is None and case.call is not None and adapter.kind != "callable":
            call = case.call[0 if adapter.kind == recording.kind else 1]
        adapter.case = replace(case, call=None if call is None else (call, call))
        held = adapter.leaves()
        rules = [rule for rule in case.weights if all(target in held for target in rule.targets)] if adapter.kind == battery.candidate.kind else []
        names = {} if adapter.kind in ("callable", recording.kind) else case.names
        try:
            adapter.load(mapping.build(recording.leaves, held, names=names, rules=rules, ties=case.ties).to_candidate(recording.weights))
        except ConversionError as error:
            raise CaseError(f"implementation {name!r} of case {case.name!r} cannot have the reference's weights: {error}") from error
        made[name] = adapter
    return made


def voting(battery: Battery) -> list[Check]:
    """Whole runs of all implementations in float64: each agrees with the majority, or is named."""
    case = battery.case
    if not case.also:
        raise Unsupported("the case names no further implementation")
    others, checks = voters(battery), []
    labels = {"reference": f"the reference ({battery.recording.kind})", "candidate": f"the candidate ({battery.candidate.kind})"}
    for regime, reference in applicable(battery, "voting", battery.recording.run):
        place = Place("voting", "", regime.name, "float64", battery.position(""))
        inputs, states = battery.recording.inputs(regime), battery.recording.states(regime)
        ballots = {labels["reference"]: leaves(reference.outputs)}
        runs = {labels["candidate"]: lambda regime=regime: battery.free_run(regime).outputs}
        runs |= {name: lambda adapter=adapter, given=inputs, held=states: adapter.run(given, held, tap=False).outputs
                 for name, adapter in others.items()}
        for name, run in runs.items():
            try:
                ballots[name] = leaves(run())
            except Exception as error:
                ballots[name] = {}
                checks.append(failed(place, 1, f"{name} raised {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}",
                                     quantity="a result"))
        bound = battery.bounds.find("free", "", regime.name)
        vote = tally(ballots, bound.value)
        if len(vote.camps) == 1:
            checks.append(passed(place, 2, spoken(vote), quantity="votes"))
        elif not vote.majority:
            checks.append(failed(place, 2, spoken(vote), quantity="votes"))
        else:
            odd = [name for camp in vote.camps[1:] for name in camp]
            checks += [Check("voting", 2, "", name, regime.name, "float64", False, vote.distance(name), bound.value,
                             LOWER_REASON if precision(ballots[name]) != "float64" else bound.reason, "votes", spoken(vote), place.order)
                       for name in odd]
    return checks
