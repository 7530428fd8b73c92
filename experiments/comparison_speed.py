"""Speed of the compared models, measured at the end of a comparison and in turns, so that whatever else the machine does falls on all alike.

The runs themselves are hours apart, and say little of it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import runtime
from conf.schema import TrainConfig
from experiments import schedule
from experiments.benchmarks.measure import take_turns
from experiments.data.batches import Batch
from experiments.data.tokens import END
from experiments.steps import make

TRAINING, GENERATION = "training_tokens_per_second", "generated_tokens_per_second"


def settings(config: TrainConfig) -> dict[str, Any]:
    """What decides about the numbers beside the models."""
    training = config.training
    return {"batch_size": training.batch_size, "context": training.context, "generated_tokens": config.comparison.generated_tokens,
            "dtype": config.backend.dtype, "threads": config.backend.threads}


def speeds(models: Mapping[str, tuple[Path, TrainConfig]]) -> dict[str, dict[str, float]]:
    """For each label tokens per second of a training step and of generation (one stream, its states handed on): medians over rounds in which
    each model has its turn. `models`: the saved model and the configuration of its run."""
    training, generation, tokens = {}, {}, {}
    for label, (path, config) in models.items():
        training[label] = _training(_load(path, config), config)
        generation[label] = functools.partial(_load(path, config).generate, np.array([[END]]), config.comparison.generated_tokens)
        tokens[label] = {TRAINING: config.training.batch_size * config.training.context, GENERATION: config.comparison.generated_tokens}
    timings = {TRAINING: take_turns(training), GENERATION: take_turns(generation)}
    return {label: {name: tokens[label][name] / timings[name][label].median for name in timings} for label in models}


def _load(path: Path, config: TrainConfig) -> Any:
    return runtime.load(path, backend=config.backend.name, dtype=config.backend.dtype)


def _training(model: Any, config: TrainConfig) -> functools.partial:
    """One optimiser step on text that no model knows, at the rate that the run ended with."""
    ids = np.random.default_rng(0).integers(0, 256, (config.training.batch_size, config.training.context + 1))
    batch = Batch(np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:]), False)
    return functools.partial(make(model, config).step, batch, schedule.rates(config.training.steps, config.training.steps, config.optimiser))
