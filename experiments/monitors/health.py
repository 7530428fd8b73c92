"""Health of recurrent states by the norm along their last axis: healthy from 0.1 to 10, a warning above 100, an error for NaN or infinity.

A norm outside the healthy range is a notice: under a LayerNorm it is about sqrt(N) whatever the weights do, and a bounded memory that has
just begun is small. Bounds are those of `conf.schema.MonitorsConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from conf.schema import MonitorsConfig
from experiments.monitors.findings import Finding

KIND = "state"


def state_health(states: Sequence[Mapping[str, np.ndarray]], config: MonitorsConfig) -> list[Finding]:
    """One finding for every state (per layer and kind) that is not healthy."""
    found = []
    for layer, state in enumerate(states):
        for kind, value in state.items():
            value = np.asarray(value, dtype=np.float64)
            name, wrong = f"{layer}/{kind}", int(value.size - np.isfinite(value).sum())
            if wrong:
                found.append(Finding(KIND, name, "error", f"state {name}: {wrong} of {value.size} entries are NaN or infinite"))
                continue
            norm = float(np.linalg.norm(value, axis=-1).mean())
            if norm > config.state_warn:
                found.append(Finding(KIND, name, "warning", f"state {name}: norm {norm:.4g} is above {config.state_warn:g}"))
            elif not config.state_low <= norm <= config.state_high:
                range_ = f"{config.state_low:g} to {config.state_high:g}"
                found.append(Finding(KIND, name, "notice", f"state {name}: norm {norm:.4g} is outside of {range_}"))
    return found


def worst_norm(states: Sequence[Mapping[str, np.ndarray]]) -> float:
    """The greatest mean norm along the last axis of any state; NaN where one is not finite."""
    norms = [float(np.linalg.norm(np.asarray(value, dtype=np.float64), axis=-1).mean()) for state in states for value in state.values()]
    return max(norms, default=0.0) if all(map(math.isfinite, norms)) else math.nan
