"""Accumulation: a batch that goes through in groups trains as it does in one piece, whatever is ignored in which group.

In JAX with blocks that are computed again, which spares a test of their numbers a compilation.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from conf.schema import LossConfig, TrainConfig
from experiments import schedule
from experiments.data.batches import Batch
from experiments.steps import TrainStep
from experiments.steps.base import StepResult
from experiments.tests import tiny
from experiments.tests.test_steps import build, difference

STEPS = 5


def settings(backend: str, accumulation: int, architecture: str = "grounded_mamba") -> TrainConfig:
    """With every part of the loss; without a bank, which takes the rows of the last group."""
    base = tiny.gru(backend) if architecture == "gru" else tiny.config(backend, model=replace(tiny.config().model, memory_size=0, depth=1))
    return replace(base, training=replace(base.training, batch_size=6, accumulation=accumulation, remat=backend == "jax"))


def train(config: TrainConfig) -> tuple[TrainStep, list[StepResult]]:
    """Labels are ignored in two of three groups: all of one, some of another."""
    step, stream, results = build(config), tiny.stream(config), []
    for number in range(STEPS):
        batch = stream.batch(number)
        labels = batch.labels.copy()
        labels[:2, 1:], labels[4, :5] = -100, -100
        rates = schedule.rates(number + 1, config.training.steps, config.optimiser)
        results.append(step.step(Batch(batch.ids, labels, batch.fresh), rates, details=number == 0))
    return step, results


@pytest.mark.parametrize(("backend", "architecture"), [("torch", "grounded_mamba"), ("torch_compiled", "grounded_mamba"), ("jax", "gru")])
def test_groups_train_as_the_whole_batch(backend: str, architecture: str) -> None:
    """The whole batch is always torch's, which spares a compilation: other tests hold the two frameworks to each other."""
    whole, expected_results = train(settings("torch", 1, architecture))
    step, results = train(settings(backend, 3, architecture))
    for found, expected in zip(results, expected_results, strict=True):
        assert found.losses == pytest.approx(expected.losses, rel=1e-12) and expected.losses["state_penalty"] > 0.01
    assert max(difference(results[0].gradients, expected_results[0].gradients).values()) < 1e-12
    # 1e-11: Adam divides by the size of a gradient, so that small ones keep their relative rounding
    assert max(difference(step.arrays() | step.carried(), whole.arrays() | whole.carried()).values()) < 1e-11


def test_mean_of_means_would_be_noticed() -> None:
    """What each group would say by itself, averaged, is another loss and another penalty."""
    config = settings("torch", 1)
    batch = tiny.stream(config).batch(0)
    labels = batch.labels.copy()
    labels[:2, 1:], labels[4, :5] = -100, -100
    alone = replace(config, training=replace(config.training, batch_size=2))
    losses = [
        build(alone).step(Batch(batch.ids[rows], labels[rows], True), schedule.rates(1, 50, config.optimiser)).losses
        for rows in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    whole = train(config)[1][0]
    for name in ("cross_entropy", "state_penalty"):
        assert abs(np.mean([each[name] for each in losses]) / whole.losses[name] - 1) > 1e-6


def test_no_pass_before_the_others_without_a_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(settings("torch", 2), loss=LossConfig(state_weight=0.0))
    step, stream = build(config), tiny.stream(config)
    monkeypatch.setattr(type(step), "evaluate", None)
    assert step.step(stream.batch(0), schedule.rates(1, 50, config.optimiser)).losses["state_penalty"] == 0.0
