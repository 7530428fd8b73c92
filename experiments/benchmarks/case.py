"""One row of the benchmark: contenders that compute one thing, what bounds them, what they have to reach, and what was found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from experiments.benchmarks.gate import Check, demand
from experiments.benchmarks.measure import BUDGET, ROUNDS, Call, Ratio, Timing, ratio, take_turns

BOUND, PRODUCTS, STREAM = "bound", "bound: products", "bound: bytes"
PEERS_LEFT_OUT = (ImportError, RuntimeError, OSError)  # what a peer that is not there or cannot be made raises


@dataclass(frozen=True)
class Target:
    """The seconds of `slow` over those of `fast` are at least `least`, or at most `most`; of a bound, the share of it that `fast` reaches."""

    text: str
    slow: str
    fast: str
    least: float | None = None
    most: float | None = None

    @property
    def of_bound(self) -> bool:
        return self.slow == BOUND

    def holds(self, found: float) -> bool:
        return (self.least is None or found >= self.least) and (self.most is None or found <= self.most)


@dataclass
class Case:
    """What to time. `operations` and `bytes` are those of one call, for the roofline; `left_out` says which peers are not here, and why."""

    name: str
    title: str
    contenders: dict[str, Call]
    bounds: dict[str, Call]
    targets: list[Target]
    checks: list[Check]
    operations: float = 0.0
    bytes: float = 0.0
    left_out: dict[str, str] = field(default_factory=dict)
    rounds: int = ROUNDS
    budget: float = BUDGET

    def peer(self, name: str, make: Callable[[], Call]) -> None:
        """Add a contender that may be absent; what keeps it out is said in the result, not hidden."""
        try:
            call = make()
            call()
        except PEERS_LEFT_OUT as error:
            self.left_out[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
        else:
            self.contenders[name] = call


@dataclass(frozen=True)
class Met:
    """A target and what was measured: a ratio, or for a target of the bound the share of it that was reached."""

    target: Target
    found: Ratio
    held: bool


@dataclass(frozen=True)
class Result:
    """A case measured. `shares`: the share of its bound that every contender reaches, none without a bound."""

    name: str
    title: str
    timings: dict[str, Timing]
    bound: str | None
    shares: dict[str, Ratio]
    targets: list[Met]
    checks: list[Check]
    operations: float
    bytes: float
    left_out: dict[str, str]
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def measure(case: Case) -> Result:
    """Time a case. Raises `gate.GateError` where one of its checks does not hold: then there is no figure."""
    demand(case.name, case.checks)
    timings = take_turns({**case.contenders, **case.bounds}, case.rounds, case.budget)
    bound = max(case.bounds, key=lambda name: timings[name].median) if case.bounds else None
    shares = {name: ratio(timings[bound], timings[name]) for name in case.contenders} if bound else {}
    met = []
    for target in case.targets:
        if target.fast not in timings or (not target.of_bound and target.slow not in timings):
            continue  # of a peer that was left out
        found = shares[target.fast] if target.of_bound else ratio(timings[target.slow], timings[target.fast])
        met.append(Met(target, found, target.holds(found.median)))
    return Result(case.name, case.title, timings, bound, shares, met, case.checks, case.operations, case.bytes, case.left_out)
