"""Time several ways to compute one thing, in turns in one process, and say what a ratio of two of them is worth.

Machines change their pace from second to second, so that two figures from two moments tell little. Here every round runs each contender once,
in an order that turns round (A B C, C B A, ...), a ratio is taken inside each round, and its median and quartiles are reported.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Call = Callable[[], object]

ROUNDS = 15
FEWEST = 5  # rounds, however long they take
SAMPLE = 0.03  # seconds that one sample takes at least
BUDGET = 60.0  # seconds of all rounds of a case
LONG = 0.2  # seconds of a call beside which cold caches are nothing


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: of `samples` samples, each the mean of `calls` calls."""

    median: float
    lower_quartile: float
    upper_quartile: float
    shortest: float
    samples: tuple[float, ...]
    calls: int


@dataclass(frozen=True)
class Ratio:
    """How many times as long one contender takes as another; inside each round, over all rounds."""

    median: float
    lower_quartile: float
    upper_quartile: float


def take_turns(contenders: Mapping[str, Call], rounds: int = ROUNDS, budget: float = BUDGET) -> dict[str, Timing]:
    """Timings of all contenders. There are fewer rounds than `rounds`, but at least FEWEST, where they would take more than `budget` seconds."""
    calls = {name: calls_for(call) for name, call in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    started = time.perf_counter()
    for turn in range(rounds):
        if turn >= FEWEST and (time.perf_counter() - started) * (turn + 1) / turn > budget:
            break
        for name in list(contenders) if turn % 2 == 0 else reversed(list(contenders)):
            samples[name].append(sample(contenders[name], calls[name]))
    return {name: timing(values, calls[name]) for name, values in samples.items()}


def calls_for(call: Call) -> int:
    """How many calls make one sample. Calls once before it counts, so that what only a first call does is over."""
    call()
    started = time.perf_counter()
    call()
    return max(1, math.ceil(SAMPLE / max(time.perf_counter() - started, 1e-9)))


def sample(call: Call, calls: int) -> float:
    """Seconds per call. The first call finds its data in the caches for the others and does not count, unless it is a long one."""
    started = time.perf_counter()
    call()
    first = time.perf_counter() - started
    if first > LONG:
        return first
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - started) / calls


def timing(samples: list[float], calls: int) -> Timing:
    """Summary of at least two samples."""
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, lower, upper, min(samples), tuple(samples), calls)


def ratio(slow: Timing, fast: Timing) -> Ratio:
    """Seconds of `slow` over those of `fast`."""
    each = [a / b for a, b in zip(slow.samples, fast.samples, strict=True)]
    lower, median, upper = statistics.quantiles(each, n=4, method="inclusive")
    return Ratio(median, lower, upper)
