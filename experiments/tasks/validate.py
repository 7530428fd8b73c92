"""Validation that says what a language model does with its states, and not only how well it predicts.

    perplexity   of held-out text streamed in lanes, and bits per byte
    retention    nats per token on the second half of a window, with the states of the first half and from zero states
    coherence    cosine of a state with itself a chunk later, and with that of another lane there: a state that holds something of its text
                 is nearer to its own past than to other text
    reasoning    induction and recall against chance
    drift        of a long stream with carried states (`experiments.monitors.drift`)

Text is read in chunks of the training's context, as validation reads it. Errors are standard errors of means over windows.
Letters: B lanes, S columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from conf.schema import MonitorsConfig
from experiments.data.tokens import Tokenizer
from experiments.errors import RunError
from experiments.evaluation import Validation
from experiments.evaluation import validate as stream
from experiments.monitors.drift import Drift, measure_drift
from experiments.steps.base import TrainStep
from experiments.tasks import reasoning

HALF = 256  # tokens of half a window, at most, if that is a chunk; memories of the default model have half-lives of up to 103
MOST = 16  # windows


@dataclass(frozen=True)
class Mean:
    """Mean over windows and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        given = np.asarray(values, dtype=np.float64)
        error = float(given.std(ddof=1) / math.sqrt(len(given))) if len(given) > 1 else math.nan
        return cls(float(given.mean()), error)

    @property
    def positive(self) -> bool:
        """Whether it lies more than three errors above zero."""
        return self.value - 3 * self.error > 0

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.4f}"


@dataclass(frozen=True)
class Retention:
    """Nats per token on second halves: with the states of the first, from zero states, and what the states save."""

    carried: float
    fresh: float
    gain: Mean
    half: int  # tokens
    windows: int


@dataclass(frozen=True)
class Coherence:
    """Cosine of the states of a kind with themselves a chunk later, with those of another lane, and the difference."""

    own: float
    other: float
    gap: Mean


@dataclass(frozen=True)
class Report:
    """All of it; `drift` is None for a stream with fewer than two chunks, `coherence` is empty for a single lane."""

    perplexity: Validation
    retention: Retention | None
    coherence: dict[str, Coherence]
    reasoning: dict[str, reasoning.Score]
    drift: Drift | None
    drift_findings: tuple[str, ...]

    def statistics(self) -> dict[str, float]:
        """Flat, ready to be logged."""
        values = {"validate/bits_per_byte": self.perplexity.bits_per_byte, "validate/perplexity": self.perplexity.perplexity}
        if self.retention is not None:
            kept = self.retention
            values |= {
                "validate/retention_carried_nats": kept.carried, "validate/retention_fresh_nats": kept.fresh,
                "validate/retention_gain_nats": kept.gain.value, "validate/retention_gain_error": kept.gain.error,
            }
        for kind, found in self.coherence.items():
            values |= {f"validate/coherence_{kind}_own": found.own, f"validate/coherence_{kind}_other": found.other}
        for name, score in self.reasoning.items():
            values |= {f"validate/{name}_accuracy": score.accuracy, f"validate/{name}_error": score.error, f"validate/{name}_chance": score.chance}
        if self.drift is not None:
            values |= {f"validate/{name.replace('/', '_')}": value for name, value in self.drift.statistics().items()}
        return values

    def rows(self) -> list[tuple[str, str, str]]:
        """What was measured, the figures, and what they say."""
        whole = self.perplexity
        rows = [("held-out text", f"{whole.bits_per_byte:.4f} bits per byte, perplexity {whole.perplexity:.4f} over {whole.tokens:,} tokens", "")]
        if self.retention is not None:
            kept = self.retention
            says = "its states save" if kept.gain.positive else "its states save nothing that can be told from noise"
            figures = f"{kept.carried:.4f} nats with the states of {kept.half} tokens before, {kept.fresh:.4f} without: {kept.gain}"
            rows.append(("context retention", figures, says))
        for kind, found in self.coherence.items():
            says = "holds something of its text" if found.gap.positive else "is not nearer to its own text than to other text"
            rows.append((f"coherence of {kind}", f"{found.own:.4f} with itself, {found.other:.4f} with another text: {found.gap}", says))
        for name, score in self.reasoning.items():
            says = "above chance" if score.above_chance else "chance"
            rows.append((name, f"{100 * score.accuracy:.2f} ± {100 * score.error:.2f} %, chance {100 * score.chance:.2f} %", says))
        if self.drift is not None:
            figures = f"carried states cost {self.drift.excess:.4f} nats per token, norm x {self.drift.ratio:.3f} over {len(self.drift.norms)} chunks"
            rows.append(("drift", figures, "; ".join(self.drift_findings) or "none"))
        return rows

    @property
    def finite(self) -> bool:
        """Whether every number is; those of a stream or lane that is too short are not there."""
        return all(math.isfinite(value) for name, value in self.statistics().items() if not name.endswith("_error"))


def cosine(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray], kind: str, shift: int) -> np.ndarray:
    """(B,) cosine of a state of `kind` with that of the row `shift` further of another time; NaN where one of them is zero."""
    one = np.asarray(first[kind], dtype=np.float64).reshape(len(first[kind]), -1)
    two = np.roll(np.asarray(second[kind], dtype=np.float64).reshape(one.shape), -shift, axis=0)
    scale = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
    return np.where(scale > 0, (one * two).sum(1) / np.where(scale > 0, scale, 1.0), np.nan)


def windows(step: TrainStep, lanes: np.ndarray, chunk: int, pieces: int | None = None) -> tuple[Retention | None, dict[str, Coherence]]:
    """Retention and coherence over windows of the lanes (B, S + 1), either half `pieces` chunks; None and nothing where a lane has no window."""
    pieces = pieces or max(1, HALF // chunk)
    half = pieces * chunk
    count = min((lanes.shape[1] - 1) // (2 * half), MOST)
    nats: list[tuple[float, float]] = []
    nearness: dict[str, list[tuple[float, float]]] = {}
    for window in range(count):
        columns = lanes[:, 2 * half * window : 2 * half * (window + 1) + 1]
        parts = [_part(columns, low, low + chunk) for low in range(0, 2 * half, chunk)]
        read, states, looks = [], None, []
        for number, part in enumerate(parts):
            if number in (pieces - 1, pieces):
                value, states, seen = step.observe(*part, states)
                looks.append(seen["states"])
            else:
                value, states = step.evaluate(*part, states)
            read.append(value)
            if not math.isfinite(value):
                return Retention(math.nan, math.nan, Mean(math.nan, math.nan), half, len(nats)), {}  # such states would be refused
        states, unread = None, 0.0
        for part in parts[pieces:]:
            value, states = step.evaluate(*part, states)
            unread += value
        size = len(lanes) * half
        nats.append((sum(read[pieces:]) / size, unread / size))
        for kind, pair in _nearness(*looks).items():
            nearness.setdefault(kind, []).append(pair)
    if not nats:
        return None, {}
    saved = [fresh - carried for carried, fresh in nats]
    kept = Retention(float(np.mean([pair[0] for pair in nats])), float(np.mean([pair[1] for pair in nats])), Mean.of(saved), half, len(nats))
    coherence = {
        kind: Coherence(float(np.mean([own for own, _ in pairs])), float(np.mean([other for _, other in pairs])), Mean.of([a - b for a, b in pairs]))
        for kind, pairs in nearness.items()
    }
    return kept, coherence


def _part(columns: np.ndarray, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels of positions `low` to `high`."""
    return np.ascontiguousarray(columns[:, low:high]), np.ascontiguousarray(columns[:, low + 1 : high + 1])


def _nearness(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Mean over layers and lanes of the cosine with the own and with another lane's later state, by kind; nothing for a single lane."""
    found: dict[str, tuple[float, float]] = {}
    for kind in sorted({name for layer in before for name in layer}):
        held = [(one, two) for one, two in zip(before, after, strict=True) if kind in one and np.asarray(one[kind]).dtype.kind == "f"]
        if not held or len(held[0][0][kind]) < 2 or held[0][0][kind].shape != held[0][1][kind].shape:
            continue
        own, other = (np.concatenate([cosine(one, two, kind, shift) for one, two in held]) for shift in (0, 1))
        if not np.isnan(own).all():
            found[kind] = float(np.nanmean(own)), float(np.nanmean(other))
    return found


def run(
    step: TrainStep, lanes: np.ndarray, held_out: np.ndarray, tokenizer: Tokenizer, chunk: int, puzzles: int, monitors: MonitorsConfig,
    *, seed: int = 0, measured: Validation | None = None,
) -> Report:
    """Everything, on lanes (B, S + 1) and the stream `held_out` (n,). `measured`: the perplexity of these lanes, if it is known already."""
    if step.model.config.vocab_size < 258:
        raise RunError(f"model: reasoning is asked in bytes, which {step.model.config.vocab_size} tokens do not hold")
    whole = measured or stream(step, lanes, tokenizer, chunk)
    kept, coherence = windows(step, lanes, chunk)
    scores = {name: reasoning.score(step.model, make(puzzles, [seed, 2])) for name, make in reasoning.TASKS.items()}
    drift = measure_drift(step, held_out, monitors.drift_tokens, monitors.drift_chunk)
    found = tuple(finding.message for finding in drift.findings(monitors)) if drift else ()
    return Report(whole, kept, coherence, scores, drift, found)
