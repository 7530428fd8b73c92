"""Learning rate by step: warm-up, then cosine down to a floor.

    factor(s) = s / warmup                                            s < warmup
                max(floor, (1 + cos(pi (s - warmup) / (steps - warmup))) / 2)
"""

from __future__ import annotations

import math

from conf.schema import OptimiserConfig
from experiments.steps.groups import GROUPS


def factor(step: int, steps: int, warmup: int, floor: float) -> float:
    """Factor on the base rate at `step` = 1, 2, ..., `steps` (the first update already moves)."""
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return max(floor, (1 + math.cos(math.pi * min(progress, 1.0))) / 2)


def rates(step: int, steps: int, config: OptimiserConfig) -> dict[str, float]:
    """Learning rate of every group at `step`."""
    base = config.rate * factor(step, steps, config.warmup, config.floor)
    return {group: base * getattr(config, group).rate for group in GROUPS}
