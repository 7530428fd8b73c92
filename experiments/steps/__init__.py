"""One training step behind one interface, for both frameworks."""

from __future__ import annotations

from typing import Any

from conf.schema import TrainConfig
from experiments.distributed.group import ALONE, Group
from experiments.steps.base import StepResult, TrainStep

__all__ = ["StepResult", "TrainStep", "make"]


def make(model: Any, config: TrainConfig, group: Group = ALONE) -> TrainStep:
    """The step for a model that `runtime.build` made; imports only that backend's framework."""
    if config.backend.name in ("jax", "jax_compiled"):
        from experiments.steps.jax_step import JaxStep

        return JaxStep(model, config, group)
    from experiments.steps.torch_step import TorchStep

    return TorchStep(model, config, group)
