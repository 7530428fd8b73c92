"""Drift over a long stream: 4,096 held-out tokens in chunks of 512, once with states handed on and once with states reset at every chunk.

    excess   mean cross-entropy, nats per token, with carried states minus that with fresh ones, over the second half of the chunks
    ratio    largest norm of a carried state after the last chunk, relative to after the first

The text is the same both times, so a chunk that is hard in itself does not count. A model that uses its states has an excess below zero;
one whose states drift off what it was trained on does worse with them than without. Bounds are those of `conf.schema.MonitorsConfig`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from conf.schema import MonitorsConfig
from experiments.monitors.findings import Finding
from experiments.monitors.health import worst_norm
from experiments.steps.base import TrainStep

KIND = "drift"


@dataclass(frozen=True)
class Drift:
    """Per chunk: cross-entropy in nats per token with carried and with fresh states, and the largest norm of a carried state."""

    carried: list[float]
    fresh: list[float]
    norms: list[float]

    @property
    def excess(self) -> float:
        """Nats per token that carried states cost over the second half."""
        half = len(self.carried) // 2
        return float(np.mean(self.carried[half:]) - np.mean(self.fresh[half:]))

    @property
    def ratio(self) -> float:
        """Growth of the largest norm from the first chunk to the last."""
        first, last = self.norms[0], self.norms[-1]
        return last / first if first > 0 else (1.0 if last == 0 else math.inf)

    def statistics(self) -> dict[str, float]:
        """Flat, ready to be logged."""
        return {"drift/excess_nats": self.excess, "drift/norm_ratio": self.ratio}

    def findings(self, config: MonitorsConfig) -> list[Finding]:
        """One finding for each bound that is passed; a number that is not finite passes it."""
        found = []
        if not self.excess <= config.drift_nats:
            message = f"drift: carried states cost {self.excess:.3f} nats per token over fresh ones, at most {config.drift_nats:g} is allowed"
            found.append(Finding(KIND, "loss", "warning", message))
        if not self.ratio <= config.drift_ratio:
            message = f"drift: the largest state norm grew {self.ratio:.3g} times over {len(self.norms)} chunks, allowed is {config.drift_ratio:g}"
            found.append(Finding(KIND, "norm", "warning", message))
        return found


def measure_drift(step: TrainStep, stream: np.ndarray, tokens: int, chunk: int) -> Drift | None:
    """Stream the first `tokens` predictions of `stream` (n,), in whole chunks; None for a stream with fewer than two chunks."""
    chunks = min(tokens, len(stream) - 1) // chunk
    if chunks < 2:
        return None
    carried, fresh, norms, states = [], [], [], None
    for start in range(0, chunks * chunk, chunk):
        window = stream[None, start : start + chunk + 1].astype(np.int64)
        ids, labels = np.ascontiguousarray(window[:, :-1]), np.ascontiguousarray(window[:, 1:])
        nats, states, seen = step.observe(ids, labels, states)
        carried.append(nats / chunk)
        norms.append(worst_norm(seen["states"]))
        if not (math.isfinite(nats) and math.isfinite(norms[-1])):
            return Drift([*carried, math.nan], [*fresh, math.nan, math.nan], norms)  # states that are not finite would be refused
        fresh.append(nats / chunk if start == 0 else step.evaluate(ids, labels, None)[0] / chunk)
    return Drift(carried, fresh, norms)
