"""Faults put into a real short run, by the number of the step that they strike; and single steps of the same model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime
from conf.schema import CheckpointConfig, DataConfig, EvaluationConfig, TrackerConfig, TrainConfig, TrainingConfig
from experiments import schedule
from experiments.oversight import Oversight
from experiments.steps import TrainStep, make
from experiments.steps.base import StepResult
from experiments.tests import tiny

STEPS = 40


def settings(backend: str, text: Path, **sections: Any) -> TrainConfig:
    """Forty steps of a tiny model: a checkpoint every 8 steps, monitors every 5, a validation every 10."""
    base = tiny.config(
        backend, "float32", data=DataConfig(path=str(text), validation_fraction=0.3), long_context=False,
        training=TrainingConfig(steps=STEPS, batch_size=3, context=11, log_every=1, monitor_every=5), checkpoint=CheckpointConfig(every=8),
        evaluation=EvaluationConfig(every=10, tokens=44, final_tokens=44, batch_size=2, sample_tokens=0), tracker=TrackerConfig(name="none"),
    )
    return replace(base, **{"model": replace(base.model, depth=1), **sections})


def inject(monkeypatch: pytest.MonkeyPatch, kind: type[TrainStep], **faults: Any) -> None:
    """Make steps go wrong. Each fault is a step number, or a function of the step object at a number:

    nan_loss, nan_gradient: number; before: {number: function of the TrainStep, called before that step}.
    """
    original, accumulate = Oversight.step, kind._accumulate
    current = [0]

    def step(self: Oversight, batch: Any, rates: Any, number: int, *, details: bool) -> Any:
        current[0] = number
        action: Callable[[TrainStep], None] | None = faults.get("before", {}).get(number)
        if action is not None:
            action(self._state.step)
        return original(self, batch, rates, number, details=details)

    def poisoned(self: TrainStep, ids: np.ndarray, labels: np.ndarray, states: Any) -> Any:
        parts, after, aux = accumulate(self, ids, labels, states)
        if current[0] == faults.get("nan_loss"):
            self._add({name: np.full_like(value, np.nan) for name, value in self._gradients().items()})
            parts = {**parts, "loss": np.nan, "cross_entropy": np.nan}
        if current[0] == faults.get("nan_gradient"):
            name = "blocks.0.ssm.B_proj.weight"
            value = np.zeros_like(self._gradients()[name])
            value[0, :3] = np.nan, np.inf, -np.inf
            self._add({name: value})
        return parts, after, aux

    monkeypatch.setattr(Oversight, "step", step)
    monkeypatch.setattr(kind, "_accumulate", poisoned)


def scale(name: str, factor: float) -> Callable[[TrainStep], None]:
    """Multiply a parameter, behind the optimiser's back."""

    def action(step: TrainStep) -> None:
        arrays = step.arrays()
        arrays[name] = arrays[name] * np.float32(factor)
        if name == "embedding.weight":
            arrays["lm_head.weight"] = arrays[name]
        step.load_arrays(arrays)

    return action


def stop(step: TrainStep) -> None:
    """As ^C does."""
    raise KeyboardInterrupt


def events(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    """Events of a run, of these kinds if any are given."""
    path = folder / "events.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if not kinds or line["kind"] in kinds]


def build(backend: str, **sections: Any) -> TrainStep:
    settings = tiny.config(backend, "float32", **sections)
    settings = replace(settings, model=replace(settings.model, depth=1))
    model = runtime.build(settings.architecture, settings.model, backend=backend, dtype="float32", seed=settings.seed)
    return make(model, settings)


def advance(step: TrainStep, first: int, last: int, **options: Any) -> list[StepResult]:
    stream, settings = tiny.stream(step.config), step.config
    rates = [schedule.rates(number, settings.training.steps, settings.optimiser) for number in range(first, last + 1)]
    return [step.step(stream.batch(number - 1), rate, **options) for number, rate in enumerate(rates, start=first)]


def held(step: TrainStep) -> dict[str, np.ndarray]:
    return {**step.arrays(), **step.optimiser_arrays(), **step.carried(), "updates": np.array(step.steps_done)}


def same(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)
