"""Long context: held-out text streamed through a trained model in chunks, its states handed on.

For each length: perplexity, tokens per second, RMS and lag-256 autocorrelation of the SSM state, largest entry of the matrix state (WKV's,
the delta rule's, a window's keys and values, or a GRU's vector), peak memory. A healthy model does not get worse with length, its SSM state
keeps moving, and neither the matrix state nor the process grows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from experiments.errors import RunError
from experiments.monitors.memory import peak_bytes, reset_peak
from experiments.monitors.statistics import STATE_LAG
from experiments.steps.base import TrainStep

LAG = 4 * STATE_LAG
MATRICES = ("wkv", "S", "k", "v", "h")


@dataclass(frozen=True)
class Row:
    """One length. `autocorrelation` is the greatest over layers, NaN for a stream no longer than the lag; `matrix_largest` over all chunks.

    `ssm_rms` and `autocorrelation` are NaN for a model without a selective state space.
    """

    tokens: int
    perplexity: float
    second_half_perplexity: float
    tokens_per_second: float
    ssm_rms: float
    autocorrelation: float
    matrix_largest: float
    peak_megabytes: float

    @classmethod
    def columns(cls) -> list[str]:
        """Names of the fields, in order."""
        return list(cls.__dataclass_fields__)

    def values(self) -> list[float]:
        """The fields, in order."""
        return list(asdict(self).values())


class LaggedProducts:
    """Running sums of <h_t, h_{t+lag}> over a stream that comes in chunks; keeps `lag` states and no more."""

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self._last: np.ndarray | None = None
        self._sums = np.zeros(3)

    def add(self, states: np.ndarray) -> None:
        """The next states (B, T, N)."""
        states = states.astype(np.float64)
        joined = states if self._last is None else np.concatenate([self._last, states], axis=1)
        new = min(states.shape[1], joined.shape[1] - self.lag)
        if new > 0:
            later, earlier = joined[:, -new:], joined[:, -new - self.lag : -self.lag]
            self._sums += [(later * earlier).sum(), (later * later).sum(), (earlier * earlier).sum()]
        self._last = joined[:, -self.lag :].copy()

    def value(self) -> float:
        """The autocorrelation of `experiments.monitors.statistics`; NaN for a stream no longer than the lag."""
        product, later, earlier = self._sums
        return float(product / math.sqrt(later * earlier)) if later * earlier > 0 else math.nan


def measure(step: TrainStep, stream: np.ndarray, length: int, chunk: int) -> Row:
    """Stream the first `length` predictions of `stream` (n,) through the model. Raises RunError for a stream that is too short."""
    if len(stream) <= length:
        raise RunError(f"evaluation.lengths: {length} tokens were asked for, the held-out text has {len(stream)}")
    reset_peak()
    halves, states, squares, count, largest = [0.0, 0.0], None, 0.0, 0, 0.0
    products: list[LaggedProducts] = []
    started = time.perf_counter()
    for start in range(0, length, chunk):
        window = stream[None, start : min(start + chunk, length) + 1].astype(np.int64)
        nats, states, seen = step.observe(np.ascontiguousarray(window[:, :-1]), np.ascontiguousarray(window[:, 1:]), states)
        halves[int(start >= length // 2)] += nats
        products = products or [LaggedProducts(LAG) for _ in seen["ssm_states"]]
        for running, trajectory in zip(products, seen["ssm_states"], strict=True):
            running.add(trajectory)
            squares, count = squares + float((trajectory.astype(np.float64) ** 2).sum()), count + trajectory.size
        largest = max([largest, *(float(np.abs(state[kind]).max()) for state in seen["states"] for kind in MATRICES if kind in state)])
    seconds = time.perf_counter() - started
    second = length - min(-(-(length // 2) // chunk) * chunk, length)
    return Row(
        tokens=length,
        perplexity=math.exp(sum(halves) / length),
        second_half_perplexity=math.exp(halves[1] / second) if second else math.nan,
        tokens_per_second=length / seconds,
        ssm_rms=math.sqrt(squares / count) if count else math.nan,
        autocorrelation=max((running.value() for running in products), default=math.nan),
        matrix_largest=largest,
        peak_megabytes=peak_bytes() / 2**20,
    )


def run(step: TrainStep, stream: np.ndarray, lengths: Sequence[int], chunk: int) -> list[Row]:
    """One row for each length that the held-out text has, after one chunk that is not measured (compilation, first allocations)."""
    fit = fitting(stream, lengths)
    measure(step, stream, min(chunk, min(fit)), chunk)
    return [measure(step, stream, length, chunk) for length in fit]


def fitting(stream: np.ndarray, lengths: Sequence[int]) -> list[int]:
    """The lengths that `stream` has, in rising order. Raises RunError where it has none of them."""
    found = sorted({length for length in lengths if length < len(stream)})
    if not found:
        raise RunError(f"evaluation.lengths: the held-out text has {len(stream)} tokens, the shortest length is {min(lengths)}")
    return found
