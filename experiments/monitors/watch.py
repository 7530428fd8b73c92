"""All monitors of a training run behind one object: numbers to log, findings that are news, and what a checkpoint must hold of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from conf.schema import MonitorsConfig
from experiments.monitors import drift, health, leak, pathology, weights
from experiments.monitors.findings import Finding, Standing
from experiments.monitors.statistics import gradient_statistics, state_statistics
from experiments.steps.base import StepResult, TrainStep


class Watch:
    """Monitors of gradients, states, weights, memory and drift."""

    def __init__(self, config: MonitorsConfig, record: Mapping[str, Any] | None = None, arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """`record` and `arrays` of a checkpoint, if the run goes on from one."""
        record = record or {}
        self.config = config
        self._pathology = pathology.Pathology(config, arrays, record.get("turns"))
        self._weights = weights.DyingWeights(config, record.get("weights"))
        self._leak = leak.LeakMonitor(config.leak_megabytes)
        self._standing = Standing(record.get("standing", ()))

    def look(self, result: StepResult, step: TrainStep) -> tuple[dict[str, float], list[Finding]]:
        """What a step with details shows."""
        values = gradient_statistics(result.gradients) | state_statistics(result.states, result.ssm_states)
        if not self.config.enabled:
            return values, []
        seen = self._pathology.look(result.gradients)
        states = health.state_health(result.states, self.config)
        dying = self._weights.look(step.arrays(), result.gradients)
        found = [*states, *self._pathology.findings(seen), *dying, *self._leak.look()]
        values |= seen.statistics() | self._weights.statistics() | {"state/unhealthy": float(len(states))}
        return values, self._standing.news((health.KIND, pathology.KIND, weights.KIND, leak.KIND), found)

    def drift(self, step: TrainStep, stream: np.ndarray) -> tuple[dict[str, float], list[Finding]]:
        """What a stream of held-out text (n,) shows; nothing where it is too short."""
        measured = drift.measure_drift(step, stream, self.config.drift_tokens, self.config.drift_chunk) if self.config.enabled else None
        if measured is None:
            return {}, []
        return measured.statistics(), self._standing.news((drift.KIND,), measured.findings(self.config))

    def record(self) -> dict[str, Any]:
        """What a checkpoint's description holds."""
        return {"weights": self._weights.record(), "turns": self._pathology.record(), "standing": self._standing.record()}

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that a checkpoint holds."""
        return self._pathology.arrays()
