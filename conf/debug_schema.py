"""Schemas of `train.yaml` for short runs that look for something: early stopping, debugging, learning rate, sweep. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from conf.models import between, choice, whole

SAMPLERS = ("tpe", "random")


@dataclass(frozen=True)
class EarlyStoppingConfig:
    """Ends a run after `patience` validations in a row that were not `min_delta` bits per byte below the best; None: never."""

    patience: int | None = None
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        if self.patience is not None:
            whole(self, patience=1)
        between(self, "min_delta", 0.0, math.inf, ends="[)")


@dataclass(frozen=True)
class DebugConfig:
    """`overfit_batch`: train on the first batch alone until its cross-entropy, nats per token, is below `target`; else the run fails.

    `profile_steps`: how many steps are profiled, after `profile_after` others; 0: none.
    """

    overfit_batch: bool = False
    target: float = 0.05
    profile_steps: int = 0
    profile_after: int = 3
    operators: int = 15  # rows of the profiler's table

    def __post_init__(self) -> None:
        between(self, "target", 0.0, math.inf)
        whole(self, profile_steps=0, profile_after=0, operators=1)


@dataclass(frozen=True)
class RateFinderConfig:
    """A learning-rate finder in the place of training: `steps` rates from `low` to `high`, each a constant factor above the one before.

    It ends where the loss, smoothed by `smoothing`, has risen again by the share `divergence` of what it had fallen.
    """

    enabled: bool = False
    low: float = 1e-5
    high: float = 10.0
    steps: int = 100
    smoothing: float = 0.8
    divergence: float = 0.5

    def __post_init__(self) -> None:
        between(self, "low", 0.0, math.inf)
        between(self, "high", 0.0, math.inf)
        between(self, "smoothing", 0.0, 1.0, ends="[)")
        between(self, "divergence", 0.0, math.inf)
        whole(self, steps=10)
        if not self.low < self.high:
            raise ValueError(f"low must be below high, found low={self.low} and high={self.high}")


@dataclass(frozen=True)
class SweepConfig:
    """A search by optuna, `groundwave sweep`: `trials` runs, the first `startup` of them drawn at random."""

    trials: int = 20
    sampler: str = "tpe"
    startup: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        choice(self, "sampler", SAMPLERS)
        whole(self, trials=1, startup=1, seed=0)
