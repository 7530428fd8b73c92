"""Long context: held-out text streamed through a trained model in chunks, its states handed on.

For each length: perplexity with carried states and with states reset at every chunk, over the same stretches of text; tokens per second;
RMS and lag-256 autocorrelation of the SSM state, largest entry of the matrix state (WKV's, the delta rule's, a window's keys and values, or a
GRU's vector), greatest norm of any state, peak memory. A healthy model does not get worse with length, is better than one that forgets at
every chunk, its SSM state keeps moving, and neither the matrix state nor the process grows. Whether it is so is in `verdicts`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from conf.schema import MonitorsConfig
from experiments.errors import RunError
from experiments.monitors.health import state_health, worst_norm
from experiments.monitors.memory import peak_bytes, reset_peak
from experiments.monitors.statistics import STATE_LAG
from experiments.steps.base import TrainStep

LAG = 4 * STATE_LAG
MATRICES = ("wkv", "S", "k", "v", "h")
RISE, BETTER, GROWTH = 1.05, 0.98, 2.0  # perplexity by length, against reset states, megabytes of the engine
STILL = 0.999  # lag-256 autocorrelation of an SSM state that has stopped


@dataclass(frozen=True)
class Row:
    """One length. `autocorrelation` is the greatest over layers, NaN for a stream no longer than the lag; `matrix_largest` over all chunks.

    `ssm_rms` and `autocorrelation` are NaN for a model without a selective state space. The three perplexities are over `streams` stretches
    of text, everything else over the first. `unhealthy`: chunks after which `experiments.monitors.health` warns of a state.
    """

    tokens: int
    perplexity: float
    second_half_perplexity: float
    tokens_per_second: float
    ssm_rms: float
    autocorrelation: float
    matrix_largest: float
    peak_megabytes: float
    reset_perplexity: float = math.nan
    largest_norm: float = math.nan
    unhealthy: int = 0
    streams: int = 1

    @classmethod
    def columns(cls) -> list[str]:
        """Names of the fields, in order."""
        return list(cls.__dataclass_fields__)

    def values(self) -> list[float]:
        """The fields, in order."""
        return list(asdict(self).values())


@dataclass(frozen=True)
class Verdict:
    """Whether something holds, and the figures that say so."""

    name: str
    held: bool
    text: str


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
    halves, states, squares, count, largest, norms, unhealthy, config = [0.0, 0.0], None, 0.0, 0, 0.0, [0.0], 0, MonitorsConfig()
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
        norms.append(worst_norm(seen["states"]))
        unhealthy += any(finding.level != "notice" for finding in state_health(seen["states"], config))
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
        largest_norm=max(norms) if all(map(math.isfinite, norms)) else math.nan,
        unhealthy=unhealthy,
    )


def perplexities(step: TrainStep, stream: np.ndarray, lengths: Sequence[int], chunk: int, streams: int) -> tuple[dict[int, tuple[float, ...]], int]:
    """By length: perplexity with carried states, of that its second half, and with states reset every `chunk` tokens; and over how many streams.

    The streams are as many stretches of the longest length as `stream` has, side by side, at most `streams`; a length is the beginning of each.
    """
    longest = max(lengths)
    rows = max(1, min(streams, (len(stream) - 1) // longest))
    lanes = stream[np.arange(rows)[:, None] * longest + np.arange(longest + 1)].astype(np.int64)
    cuts = sorted({*range(0, longest, chunk), *lengths})
    pieces: list[tuple[int, int, float, float]] = []
    carried = fresh = None
    for start, end in itertools.pairwise(cuts):
        ids, labels = np.ascontiguousarray(lanes[:, start:end]), np.ascontiguousarray(lanes[:, start + 1 : end + 1])
        first, carried = step.evaluate(ids, labels, carried)
        if start == 0:
            second, fresh = first, carried
        else:
            second, fresh = step.evaluate(ids, labels, None if start % chunk == 0 else fresh)
        pieces.append((start, end, first, second))
        if not math.isfinite(first + second):
            return {length: (math.nan,) * 3 for length in lengths}, rows  # states that are not finite would be refused
    found = {}
    for length in lengths:
        inside = [piece for piece in pieces if piece[1] <= length]
        later = [piece for piece in inside if piece[0] >= length // 2]
        count = rows * sum(end - start for start, end, _, _ in later)
        found[length] = (
            math.exp(sum(piece[2] for piece in inside) / (rows * length)),
            math.exp(sum(piece[2] for piece in later) / count) if count else math.nan,
            math.exp(sum(piece[3] for piece in inside) / (rows * length)),
        )
    return found, rows


def run(step: TrainStep, stream: np.ndarray, lengths: Sequence[int], chunk: int, streams: int = 1) -> list[Row]:
    """One row for each length that the held-out text has, after one chunk that is not measured (compilation, first allocations)."""
    fit = fitting(stream, lengths)
    measure(step, stream, min(chunk, min(fit)), chunk)
    rows = [measure(step, stream, length, chunk) for length in fit]
    found, count = perplexities(step, stream, fit, chunk, streams)
    names = ("perplexity", "second_half_perplexity", "reset_perplexity")
    return [replace(row, streams=count, **dict(zip(names, found[row.tokens], strict=True))) for row in rows]


def verdicts(rows: Sequence[Row], chunk: int, memory: Mapping[int, float] | None = None) -> list[Verdict]:
    """What must hold of a trained model, from the length nearest a quarter of the longest to the longest. `memory`: megabytes by length.

    Nothing is said about perplexity where there is one length alone, or about reset states where the longest is one chunk.
    """
    last = rows[-1]
    base = max((row for row in rows if 4 * row.tokens <= last.tokens), key=lambda row: row.tokens, default=rows[0])
    found = []
    if base is not last:
        ratio, reset = last.perplexity / base.perplexity, last.reset_perplexity / base.reset_perplexity
        text = f"{base.perplexity:.4f} at {base.tokens} tokens, {last.perplexity:.4f} at {last.tokens}: x {ratio:.4f}, at most {RISE:g} is allowed; "
        found.append(Verdict("perplexity does not rise", ratio <= RISE, text + f"with reset states the same text gives x {reset:.4f}"))
    if last.tokens > chunk:
        ratio = last.perplexity / last.reset_perplexity
        text = f"{last.perplexity:.4f} carried, {last.reset_perplexity:.4f} reset every {chunk} tokens: x {ratio:.4f}, at most {BETTER:g} is allowed"
        found.append(Verdict("context is used", ratio <= BETTER, text))
    norms = f"greatest norm {max(row.largest_norm for row in rows):.4g}, {sum(row.unhealthy for row in rows)} chunks with a warning"
    moving = not any(row.autocorrelation > STILL for row in rows)
    healthy = all(row.unhealthy == 0 and math.isfinite(row.largest_norm) for row in rows) and moving
    if not math.isnan(last.autocorrelation):
        norms += f", autocorrelation at lag {LAG} {last.autocorrelation:.4f}, above {STILL:g} a state has stopped"
    found.append(Verdict("states are healthy", healthy, norms))
    if memory is not None and base.tokens in memory and last.tokens in memory and base is not last:
        grown = memory[last.tokens] - memory[base.tokens]
        text = f"{memory[base.tokens]:.2f} MB above the loaded model for {base.tokens} tokens, {memory[last.tokens]:.2f} MB for {last.tokens}"
        found.append(Verdict("memory is flat", grown <= GROWTH, f"{text}: {grown:+.2f} MB, at most {GROWTH:g} is allowed"))
    return found


def fitting(stream: np.ndarray, lengths: Sequence[int]) -> list[int]:
    """The lengths that `stream` has, in rising order. Raises RunError where it has none of them."""
    found = sorted({length for length in lengths if length < len(stream)})
    if not found:
        raise RunError(f"evaluation.lengths: the held-out text has {len(stream)} tokens, the shortest length is {min(lengths)}")
    return found
