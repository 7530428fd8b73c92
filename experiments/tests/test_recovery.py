"""The parts of recovery one by one: verdicts, events, the lock, the golden checkpoint, unfreezing."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import runtime
from conf.schema import RecoveryConfig, TrackerConfig, TrainConfig
from experiments import checkpoint, folder, train, unfreeze
from experiments.errors import RunError
from experiments.events import EVENTS, Events
from experiments.folder import plain
from experiments.lock import LOCK, RunLock, check_free
from experiments.recovery import Recovery
from experiments.steps.base import StepResult
from experiments.tests import tiny
from experiments.tests.faults import advance, build, held, same, settings
from experiments.trackers import Tracker


class Recorder(Tracker):
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Mapping[str, Any]]] = []

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self.seen.append((step, values))


def told(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / EVENTS).read_text().splitlines()]


def recovery(path: Path, record: Mapping[str, Any] | None = None, **fields: Any) -> Recovery:
    return Recovery(RecoveryConfig(**fields), Events(path, Console(quiet=True), Tracker()), record)


def result(loss: float, **fields: Any) -> StepResult:
    return StepResult({"loss": loss, "cross_entropy": loss}, 1.0, np.zeros(0), **fields)


def refused(tried: Collection[int]) -> tuple[int, Mapping[str, Any]]:
    raise AssertionError("nothing is wrong, and the run went back")


def test_noisy_and_falling_losses_are_healthy(tmp_path: Path) -> None:
    cured, rng = recovery(tmp_path), np.random.default_rng(0)
    for step in range(1, 400):
        cured.after(result(1.5 + 4 * math.exp(-step / 60) + 0.4 * rng.standard_normal()), step, refused)
        assert cured.good
    assert cured.factor == 1.0 and not (tmp_path / EVENTS).exists()


def test_explosion_is_judged_by_the_median_and_never_below_one_nat(tmp_path: Path) -> None:
    cured = recovery(tmp_path, minimum=3, window=5)
    assert cured.limit() is None
    for step, loss in enumerate((2.0, 2.0, 5.9, 2.0), start=1):
        cured.after(result(loss), step, refused)  # 5.9 is below 6, and does not move the median
    assert cured.limit() == 6.0
    went: list[list[int]] = []

    def back(tried: Collection[int]) -> tuple[int, Mapping[str, Any]]:
        went.append(sorted(tried))
        return 20 - 10 * len(tried), {"losses": [0.01, 0.01, 0.01]}

    cured.after(result(6.1), 5, back)
    assert cured.factor == 0.7 and not cured.good and cured.limit() == 3.0  # the losses of the state gone back to; at least one nat
    cured.after(result(2.9), 6, refused)
    cured.after(result(3.1), 7, back)
    assert went == [[], [20]]  # the one tried in vain is not tried again
    cured.after(result(0.01), 8, refused)
    cured.checkpointed()
    cured.after(result(9.0), 9, back)
    assert went[-1] == [] and cured.factor == pytest.approx(0.343)
    assert [(event["step"], event["back_to"]) for event in told(tmp_path)] == [(5, 20), (7, 10), (9, 20)]


def test_skips_halve_the_rate_and_three_in_a_row_go_back(tmp_path: Path) -> None:
    cured = recovery(tmp_path)
    skipped = result(math.nan, skipped="loss nan")
    for step in (1, 3, 5):  # a good step between two bad ones: nothing to go back for
        cured.after(skipped, step, refused)
        cured.after(result(2.0), step + 1, refused)
    assert cured.rates({"ssm": 8.0, "norm": 16.0}) == {"ssm": 1.0, "norm": 2.0}
    cured.after(skipped, 7, refused)
    cured.after(skipped, 8, refused)
    cured.after(skipped, 9, lambda tried: (0, {}))
    assert cured.factor == 0.5**6 * 0.7 and told(tmp_path)[-1]["message"].startswith("3 steps in a row were skipped: back to the initial state")
    with pytest.raises(RunError, match=r"gave up at step 1\d: .* after 2 x explosion, \d+ x nonfinite_loss; lower optimiser.rate"):
        for step in range(10, 20):
            cured.after(skipped, step, lambda tried: (0, {}))


def test_record_brings_back_every_verdict(tmp_path: Path) -> None:
    """A recovery made from another's record, through JSON, gives the same verdicts from there on."""
    first = recovery(tmp_path, minimum=2, patience=2)
    for step, loss in enumerate((0.1 + 0.2, 1 / 3, 2 / 7), start=1):
        first.after(result(loss), step, refused)
    first.after(result(math.nan, skipped="loss nan"), 4, refused)
    first.dying(["a"], 4)
    again = recovery(tmp_path, json.loads(json.dumps(first.record())), minimum=2, patience=2)
    assert again.record() == first.record() and again.limit() == first.limit() == 3.0
    assert again.injected(24) == ["a"] and again.injected(25) == []
    again.after(result(math.nan, skipped="loss nan"), 5, lambda tried: (0, {}))
    assert again.factor == 0.25 * 0.7


def test_guard_with_accumulation_and_permuted_rows() -> None:
    base = tiny.config("torch")
    sections = {"training": replace(base.training, accumulation=3), "data": replace(base.data, permute_rows=True)}
    plain_step, guarded = build("torch", **sections), build("torch", **sections)
    advance(plain_step, 1, 11)
    advance(guarded, 1, 11, guard=True)
    assert same(held(guarded), held(plain_step))


def test_event_is_a_line_in_file_terminal_and_tracker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Recorder()
    events = Events(tmp_path, Console(soft_wrap=True), tracker, {"explosion": 2})
    events.add(7, "explosion", "loss [nan]", loss=math.nan)
    (tmp_path / EVENTS).write_bytes((tmp_path / EVENTS).read_bytes() + b'{"step": 8, "ki')  # cut short by a kill
    events.add(9, "resumed", "went on", level="notice", counted=False)
    lines = (tmp_path / EVENTS).read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[2])["step"] == 9
    first = json.loads(lines[0])
    assert first["loss"] is None and first["message"] == "loss [nan]" and first["level"] == "warning"
    assert capsys.readouterr().out == "step 7: explosion: loss [nan]\nstep 9: resumed: went on\n"
    assert tracker.seen == [(7, {"event/explosion": 3.0}), (9, {"event/resumed": 1.0})] and events.counts == {"explosion": 3}


def test_full_disk_silences_the_files_and_never_stops_a_run(tmp_path: Path) -> None:
    tracker = Recorder()
    (tmp_path / EVENTS).mkdir()
    with pytest.warns(RuntimeWarning, match="could not be written to .*events.jsonl"):
        Events(tmp_path, Console(quiet=True), tracker).add(1, "explosion", "loss 9")
    with open("/dev/full", "a", encoding="utf-8") as full, pytest.warns(RuntimeWarning, match="written to /dev/full: No space left on device"):
        folder.log(full, tracker, 2, {"loss": 1.0})
    assert [step for step, _ in tracker.seen] == [1, 2]


def test_tracker_that_fails_is_a_line_of_the_log_and_the_run_goes_on(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def broken(**_: object) -> None:
        raise OSError("wandb-core is not there")

    monkeypatch.setattr(wandb, "init", broken)
    config = settings("torch", text, tracker=TrackerConfig())
    train.run(replace(config, training=replace(config.training, stop_at=2)), tmp_path)
    (line,) = told(tmp_path)
    assert (line["step"], line["kind"]) == (1, "warning") and "wandb-core is not there" in line["message"]


def test_lock(tmp_path: Path) -> None:
    check_free(tmp_path)
    with RunLock(tmp_path) as lock:
        assert lock.stale == "" and json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        for attempt in (lambda: RunLock(tmp_path).acquire(), lambda: check_free(tmp_path)):
            with pytest.raises(RunError, match=rf"is in use by process {os.getpid()} on "):
                attempt()
        with RunLock(tmp_path / "other"):
            pass
    assert not (tmp_path / LOCK).exists()
    (tmp_path / LOCK).write_text('{"pid": 1, "host": "elsewhere", "since": "then"}')
    check_free(tmp_path)
    with RunLock(tmp_path) as lock:
        assert lock.stale == "took over from process 1 on elsewhere since then, which ended without letting go"
    (tmp_path / LOCK).write_bytes(b"\xff{")
    with RunLock(tmp_path) as lock:
        assert "cannot be read" in lock.stale
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot lock"):
        RunLock(tmp_path / "file").acquire()


def test_lock_without_locks_of_the_system_goes_by_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with RunLock(tmp_path), pytest.raises(RunError, match=rf"in use by process {os.getpid()} on .*; delete run.lock there if it is gone"):
        RunLock(tmp_path).acquire()
    (tmp_path / LOCK).write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "then"}))
    with pytest.raises(RunError, match="process 1 on elsewhere"):
        check_free(tmp_path)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / LOCK).write_text(json.dumps({"pid": gone.pid, "host": platform.node(), "since": "then"}))
    with RunLock(tmp_path) as lock:
        assert f"process {gone.pid}" in lock.stale


def test_lock_on_a_deleted_file_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run lets go between opening and locking: the file that was opened is gone, and the new one is taken."""
    real, calls = os.open, [0]

    def opened(path: Any, *arguments: Any) -> int:
        handle = real(path, *arguments)
        if str(path).endswith(LOCK) and not calls[0]:
            calls[0] += 1
            os.unlink(path)
        return handle

    monkeypatch.setattr(os, "open", opened)
    with RunLock(tmp_path):
        assert (tmp_path / LOCK).exists()


def golden(run: Path, config: TrainConfig, step: int, bits: float) -> None:
    """What `Oversight.golden` does, with a model of its own for every step."""
    best = checkpoint.best(run, config)
    if best is None or bits < best[1]:
        model = runtime.build("grounded_mamba", config.model, backend="torch", dtype="float64", seed=step)
        description = {"step": step, "config": plain(config), "validation": bits}
        checkpoint.save(run, model, {}, {}, description, 1, folder=checkpoint.GOLDEN)


def test_golden_checkpoint_is_the_best_of_its_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny.config("torch")
    for step, bits in ((10, 3.0), (20, 2.0), (30, 2.5), (40, 2.0)):
        golden(tmp_path, config, step, bits)
    assert checkpoint.best(tmp_path, config) == (20, 2.0)
    golden(tmp_path, config, 15, 1.5)  # a resumed run, better earlier
    assert [path.name for path in (tmp_path / "golden").iterdir()] == ["step-00000015"]
    for step in range(50, 60):
        model = runtime.build("grounded_mamba", config.model, backend="torch", dtype="float64", seed=step)
        checkpoint.save(tmp_path, model, {}, {}, {"step": step, "config": plain(config)}, 2)
    assert checkpoint.best(tmp_path, config) == (15, 1.5)  # pruning the others leaves it
    assert checkpoint.best(tmp_path, replace(config, seed=4)) is None
    (tmp_path / "golden/step-00000015/training.safetensors").write_bytes(b"")
    assert checkpoint.best(tmp_path, config) is None


def test_good_states_are_the_newest_readable_and_untried(tmp_path: Path) -> None:
    config = tiny.config("torch")
    model = runtime.build("grounded_mamba", config.model, backend="torch", dtype="float64", seed=0)
    for step in range(1, 8):
        checkpoint.save(tmp_path, model, {}, {}, {"step": step, "config": {}, "good": step not in (4, 7)}, 9)
    found = [checkpoint.good(tmp_path, tried, 3) for tried in ((), (6,), (6, 5), (6, 5, 3))]
    assert [each.step if each else None for each in found] == [6, 5, 3, None]  # 2 is good, but not of the last three
    (tmp_path / "checkpoints/step-00000006/checkpoint.json").write_text("{")
    again = checkpoint.good(tmp_path, (), 3)
    assert again is not None and again.step == 5


def test_soft_reset_shakes_states_and_their_parameters() -> None:
    step = build("torch")
    advance(step, 1, 12)
    before, states = step.arrays(), step.carried()
    names = unfreeze.soft_reset(step, 12, 0.01)
    after = step.arrays()
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {name for name in names if np.std(before[name]) > 0} and "blocks.0.ssm.state_norm.weight" in moved
    assert not any("memory_keys" in name or "memory_count" in name for name in names) and "embedding.weight" not in moved
    for name, value in states.items():
        change = (step.carried()[name] - value) / value.std()
        assert 0.005 < change.std() < 0.015 and abs(change).max() < 0.05
    other = build("torch")
    advance(other, 1, 12)
    unfreeze.soft_reset(other, 12, 0.01)
    assert same(held(step), held(other))
    unfreeze.soft_reset(other, 13, 0.01)
    assert not same(held(step), held(other))
