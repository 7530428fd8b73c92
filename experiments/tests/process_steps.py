"""Two steps of every language model but GroundedMamba, which `processes` trains, in one process or in a group: what they lead to, as files.

Float64, so that a group differs from one process by rounding of 1e-16 and by nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

import runtime
from conf.schema import DistributedConfig, TrainConfig
from experiments import distributed, schedule
from experiments.distributed.group import ALONE, Group
from experiments.steps import make
from experiments.tests import tiny

MADE = {"deltanet_lm": tiny.deltanet, "transformer": tiny.transformer, "gru": tiny.gru}
TORCH = (("deltanet_lm", "torch"), ("deltanet_lm", "torch_compiled"), ("transformer", "torch"), ("gru", "torch"))
JAX = tuple((model, "jax") for model in MADE)


def configuration(model: str, backend: str) -> TrainConfig:
    """Four lanes; two micro-batches in torch, where another one costs nothing."""
    config = MADE[model](backend)
    training = replace(config.training, batch_size=4, accumulation=1 if backend == "jax" else 2)
    return replace(config, model=replace(config.model, depth=1), training=training)


def trained(model: str, backend: str, group: Group = ALONE) -> dict[str, np.ndarray]:
    """Losses and gradient norms of two steps; the parameters, moments and carried states after them. The third lane's labels are ignored."""
    config = configuration(model, backend)
    built = runtime.build(config.architecture, config.model, backend=backend, dtype=config.backend.dtype, seed=config.seed)
    step, stream, found = make(built, config, group), tiny.stream(config), {}
    for number in (1, 2):
        batch = stream.batch(number - 1)
        batch.labels[2] = -100  # so that processes have different numbers of labels
        result = step.step(batch, schedule.rates(number, config.training.steps, config.optimiser))
        found |= {f"step {number}.{name}": np.array(value) for name, value in result.losses.items()}
        found[f"step {number}.norm"] = np.array(result.gradient_norm)
    return found | step.arrays() | step.optimiser_arrays() | {f"states.{name}": value for name, value in step.carried().items()}


def job(root: Path, name: str, models: tuple[tuple[str, str], ...], settings: DistributedConfig) -> Callable[[], int]:
    """All of `models` in turn, in one group."""

    def run() -> int:
        group = distributed.join(replace(configuration(*models[0]), distributed=settings))
        for model, backend in models:
            np.savez(root / f"{name}.{model}.{backend}.{group.rank}.npz", **trained(model, backend, group))
        distributed.close()
        return 0

    return run
