"""Early stopping: what ends a run and what does not, that it is said, and that a resumed run ends where the uninterrupted one does."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from conf.debug_schema import DebugConfig, EarlyStoppingConfig
from conf.schema import TrainConfig
from experiments import checkpoint, train
from experiments.ending import Ending
from experiments.errors import RunError
from experiments.events import Events
from experiments.steps.base import StepResult
from experiments.steps.torch_step import TorchStep
from experiments.tests import tiny
from experiments.tests.faults import STEPS, events, inject, settings, stop
from experiments.trackers import Tracker


def ending(path: Path, patience: int | None, min_delta: float = 0.0, record: Any = None, start: int = 0) -> Ending:
    base = tiny.config()
    training = replace(base.training, early_stopping=EarlyStoppingConfig(patience=patience, min_delta=min_delta))
    return Ending(replace(base, training=training), Events(path, Console(quiet=True), Tracker()), start, record)


def test_validations_that_improve_end_nothing(tmp_path: Path) -> None:
    falling = ending(tmp_path, 2)
    for step, bits in enumerate((3.0, 2.9, 2.95, 2.8, 2.85, 2.79), start=1):
        falling.validated(step, bits)
        assert falling.last == 50 and not falling.early
    assert not list(tmp_path.iterdir())
    never = ending(tmp_path, None)
    for step in range(1, 9):
        never.validated(step, 3.0)
    assert never.last == 50 and not list(tmp_path.iterdir())


def test_run_ends_after_patience_validations_without_enough_of_an_improvement(tmp_path: Path) -> None:
    flat = ending(tmp_path, 3, min_delta=0.1)
    for step, bits in ((10, 3.0), (20, 2.95), (30, math.nan), (40, 2.91)):
        flat.validated(step, bits)
        assert flat.last == 50
    flat.validated(45, 2.9)  # exactly min_delta below is not below it by more
    assert flat.last == 45 and flat.early
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert (event["step"], event["kind"], event["level"], event["best"], event["best_at"]) == (45, "early_stopping", "notice", 3.0, 10)


def test_record_brings_back_the_count_and_the_end(tmp_path: Path) -> None:
    first = ending(tmp_path, 3)
    for step, bits in ((1, 2.0), (2, 2.1), (3, 2.2)):
        first.validated(step, bits)
    record = json.loads(json.dumps(first.record()))
    again = ending(tmp_path, 3, record=record, start=3)
    assert again.record() == first.record() and again.last == 50
    again.validated(4, 2.0)
    assert again.last == 4
    ended = json.loads(json.dumps(again.record()))
    assert ending(tmp_path, 3, record=ended, start=4).last == 4  # it stays ended
    assert ending(tmp_path, 4, record=ended, start=4).last == 50  # with more patience it goes on
    assert ending(tmp_path, None, record=ended, start=4).last == 50


def test_overfitting_ends_at_the_target_or_fails(tmp_path: Path) -> None:
    config = replace(tiny.config(), debug=DebugConfig(overfit_batch=True, target=0.2))
    learning = Ending(config, Events(tmp_path, Console(quiet=True), Tracker()), 0)
    for step, loss in ((1, 4.0), (2, 0.2)):
        learning.stepped(step, StepResult({"cross_entropy": loss}, 1.0, np.zeros(0)))
    with pytest.raises(RunError, match=r"debug.overfit_batch: .* is 0.2 nats per token after 50 steps, expected below debug.target=0.2"):
        learning.check()
    learning.stepped(3, StepResult({"cross_entropy": math.nan}, 1.0, np.zeros(0), skipped="loss nan"))
    learning.stepped(4, StepResult({"cross_entropy": 0.19}, 1.0, np.zeros(0)))
    learning.check()
    assert learning.last == 4


def stopping(backend: str, text: Path, patience: int | None) -> TrainConfig:
    """A rate so small that nothing improves by a hundredth of a bit."""
    config = settings(backend, text)
    early = EarlyStoppingConfig(patience=patience, min_delta=0.01)
    return replace(config, optimiser=replace(config.optimiser, rate=1e-6), training=replace(config.training, early_stopping=early))


def test_stopped_run_says_so_and_resumes_bit_for_bit(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Validations at 10, 20 and 30, the first of which is the best: with a patience of 2 the run ends at 30 of 40 steps."""
    config = stopping("torch_compiled", text, 2)
    summary = train.run(config, tmp_path / "whole")
    (event,) = events(tmp_path / "whole")
    assert (event["step"], event["kind"], event["best_at"]) == (30, "early_stopping", 10)
    assert "step 30: early_stopping: the last 2 validations were not 0.01 bits per byte below the best" in capsys.readouterr().out
    assert summary["steps"] == 30 and summary["stopped_early"] and summary["events"] == {"early_stopping": 1}
    for at in (22, 25):
        with monkeypatch.context() as patch:
            inject(patch, TorchStep, before={at: stop})
            with pytest.raises(KeyboardInterrupt):
                train.run(replace(config, resume="auto"), tmp_path / "parts")
    train.run(replace(config, resume="auto"), tmp_path / "parts")
    again = train.run(replace(config, resume="auto"), tmp_path / "parts")  # nothing is left to do
    assert again["steps"] == 30 and again["stopped_early"] and again["validation_bits_per_byte"] == summary["validation_bits_per_byte"]
    whole, parts = checkpoint.newest(tmp_path / "whole"), checkpoint.newest(tmp_path / "parts")
    assert whole is not None and parts is not None and whole.step == parts.step == 30
    for kind in ("arrays", "optimiser", "states"):
        expected, found = getattr(whole, kind), getattr(parts, kind)
        assert expected.keys() == found.keys() and all(np.array_equal(expected[name], found[name]) for name in expected), kind
    assert whole.description["ending"] == parts.description["ending"]
    longer = train.run(replace(stopping("torch_compiled", text, None), resume="auto"), tmp_path / "parts")
    assert longer["steps"] == STEPS and not longer["stopped_early"]
