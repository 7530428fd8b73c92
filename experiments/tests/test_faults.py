"""Faults in a real short run: each is cured, named in the log, and costs no more than the steps since the last checkpoint."""

from __future__ import annotations

import json
import math
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime
from conf.schema import RecoveryConfig, TrackerConfig, UnfreezeConfig
from experiments import checkpoint, report, train, unfreeze
from experiments.errors import RunError
from experiments.lock import LOCK, RunLock
from experiments.steps.base import TrainStep
from experiments.steps.jax_step import JaxStep
from experiments.steps.torch_step import TorchStep
from experiments.tests.faults import STEPS, advance, build, events, held, inject, same, scale, settings, stop

KINDS = {"torch_compiled": TorchStep, "jax": JaxStep}


def losses(folder: Path) -> dict[int, float | None]:
    return {row["step"]: row["train/loss"] for row in report.read_metrics(folder / "metrics.jsonl") if "train/loss" in row}


def rates(folder: Path) -> dict[int, float]:
    return {row["step"]: row["rate/other"] for row in report.read_metrics(folder / "metrics.jsonl") if "rate/other" in row}


@pytest.fixture(scope="module")
def healthy(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("healthy")
    train.run(settings("torch_compiled", text), folder)
    return folder


def test_healthy_run_has_no_event(healthy: Path) -> None:
    assert events(healthy) == []
    summary = json.loads((healthy / "summary.json").read_text())
    assert summary["events"] == {} and summary["rate_factor"] == 1.0
    rows = report.read_metrics(healthy / "metrics.jsonl")
    assert {"pathology/score", "weights/least_share", "state/unhealthy"} <= rows[4].keys()
    assert not (healthy / LOCK).exists()


def test_nan_loss_at_step_30_is_skipped_at_half_the_rate(healthy: Path, text: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    inject(monkeypatch, TorchStep, nan_loss=30)
    kept: dict[str, Any] = {}

    def look(step: TrainStep) -> None:
        kept[str(len(kept))] = {**step.arrays(), **step.optimiser_arrays(), **step.carried(), "updates": np.array(step.steps_done)}

    inject(monkeypatch, TorchStep, before={30: look, 31: look})
    summary = train.run(settings("torch_compiled", text), tmp_path)
    (event,) = events(tmp_path)
    assert (event["step"], event["kind"], event["factor"]) == (30, "nonfinite_loss", 0.5) and event["losses"]["loss"] is None
    assert "step 30: nonfinite_loss: loss nan" in capsys.readouterr().out
    before, after = kept["0"], kept["1"]
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)
    expected, found = rates(healthy), rates(tmp_path)
    assert all(found[step] == expected[step] * (1.0 if step <= 30 else 0.5) for step in range(1, STEPS + 1))
    assert losses(tmp_path)[30] is None and losses(tmp_path)[29] == losses(healthy)[29]
    assert summary["events"] == {"nonfinite_loss": 1} and summary["rate_factor"] == 0.5
    assert math.isfinite(summary["validation_bits_per_byte"]) and summary["steps"] == STEPS
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and (newest.step, newest.updates) == (STEPS, STEPS - 1)


def test_nan_gradient_of_one_parameter_is_zeroed_counted_and_named(healthy: Path, text: Path, tmp_path: Path, monkeypatch) -> None:
    inject(monkeypatch, TorchStep, nan_gradient=30)
    summary = train.run(settings("torch_compiled", text), tmp_path)
    (event,) = events(tmp_path)
    assert (event["step"], event["kind"]) == (30, "nonfinite_gradient")
    assert event["parameters"] == {"blocks.0.ssm.B_proj.weight": 3} and "blocks.0.ssm.B_proj.weight (3)" in event["message"]
    monitored = next(row for row in report.read_metrics(tmp_path / "metrics.jsonl") if row["step"] == 30)
    assert monitored["gradient/blocks.0.ssm.B_proj.weight/nonfinite"] == 3 and monitored["gradient/embedding.weight/nonfinite"] == 0
    assert rates(tmp_path) == rates(healthy) and summary["events"] == {"nonfinite_gradient": 1}
    assert losses(tmp_path)[30] == losses(healthy)[30] and losses(tmp_path)[31] != losses(healthy)[31]


def test_explosion_goes_back_to_the_newest_good_state(healthy: Path, text: Path, tmp_path: Path, monkeypatch) -> None:
    kept: dict[str, np.ndarray] = {}
    inject(monkeypatch, TorchStep, before={30: scale("embedding.weight", 300.0), 31: lambda step: kept.update(step.arrays())})
    summary = train.run(settings("torch_compiled", text), tmp_path)
    (event,) = events(tmp_path)
    assert (event["step"], event["kind"], event["back_to"], event["factor"]) == (30, "explosion", 24, 0.7)
    good = checkpoint.good(healthy, (), 5)
    assert good is not None and good.step == 40
    saved = next(path for path in (tmp_path / "checkpoints").iterdir() if path.name == "step-00000024")
    arrays = checkpoint._read(saved).arrays
    assert all(np.array_equal(kept[name], arrays[name]) for name in arrays)
    assert rates(tmp_path)[31] == pytest.approx(0.7 * rates(healthy)[31], rel=1e-12)
    assert losses(tmp_path)[30] > 3 * losses(tmp_path)[29] and losses(tmp_path)[31] < 1.5 * losses(tmp_path)[29]
    assert summary["validation_bits_per_byte"] < 8


def test_parameters_that_stay_broken_are_left_behind_and_the_run_gives_up_in_a_line(text: Path, tmp_path: Path, monkeypatch) -> None:
    config = settings("torch_compiled", text)
    with monkeypatch.context() as patch:
        inject(patch, TorchStep, before={21: scale("embedding.weight", math.nan)})
        train.run(config, tmp_path / "cured")
    found = events(tmp_path / "cured")
    assert [event["step"] for event in found] == [21, 22, 23, 23]
    assert [event["kind"] for event in found] == ["nonfinite_loss"] * 3 + ["explosion"]
    assert found[-1]["back_to"] == 16 and found[-1]["factor"] == pytest.approx(0.5**3 * 0.7)
    with monkeypatch.context() as patch:
        inject(patch, TorchStep, before={20: scale("embedding.weight", math.nan), 21: stop})  # the validation after step 20 sees it first
        with pytest.raises(KeyboardInterrupt):
            train.run(config, tmp_path / "seen")
    assert [(event["step"], event["kind"]) for event in events(tmp_path / "seen")] == [(20, "nonfinite_loss"), (20, "explosion")]
    hopeless = replace(config, optimiser=replace(config.optimiser, rate=1e35, warmup=0))
    with pytest.raises(RunError, match=r"gave up at step \d+: the rate is down to .* nonfinite_loss; lower optimiser.rate"):
        train.run(hopeless, tmp_path / "hopeless")


def test_last_step_broken_is_not_what_is_saved(text: Path, tmp_path: Path, monkeypatch) -> None:
    inject(monkeypatch, TorchStep, before={STEPS: scale("embedding.weight", math.nan)})
    summary = train.run(settings("torch_compiled", text), tmp_path)
    assert events(tmp_path, "explosion")[0]["back_to"] == 32 and summary["validation_bits_per_byte"] < 8
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest.step == STEPS and all(np.isfinite(value).all() for value in newest.arrays.values())


@pytest.mark.parametrize("method", ["none", "soft_reset", "selective_reinit", "gradient_injection"])
def test_dying_weights_are_named_and_unfrozen(method: str, text: Path, tmp_path: Path, monkeypatch) -> None:
    name = "blocks.0.rwkv.value_proj.weight"
    kept: dict[str, np.ndarray] = {}
    inject(monkeypatch, TorchStep, before={28: scale(name, 1e-5), 36: lambda step: kept.update(step.arrays())})
    config = settings("torch_compiled", text)
    train.run(replace(config, recovery=RecoveryConfig(unfreeze=UnfreezeConfig(method=method, injection=1.0))), tmp_path)
    (event,) = events(tmp_path, "weights")
    assert (event["step"], event["name"]) == (30, name) and "dying" in event["message"]
    unfrozen = events(tmp_path, "unfreeze")
    if method == "none":
        assert not unfrozen
        return
    assert unfrozen[0]["step"] == 30 and unfrozen[0]["message"].startswith(method)
    if method == "soft_reset":
        assert "blocks.0.rwkv.memory_query.weight" in unfrozen[0]["names"] and name not in unfrozen[0]["names"]
    else:
        assert unfrozen[0]["names"] == [name]
    rms = float(np.sqrt((kept[name] ** 2).mean()))
    assert (rms > 0.1) == (method == "selective_reinit")  # +-1 / sqrt(12) at the start


@pytest.mark.parametrize("backend", KINDS)
def test_run_with_every_fault_resumes_bit_for_bit(backend: str, text: Path, tmp_path: Path, monkeypatch) -> None:
    """NaN loss, NaN gradient, explosion and dying weights; stopped after the first two and after all of them."""
    config = settings(backend, text, recovery=RecoveryConfig(minimum=5, unfreeze=UnfreezeConfig(method="gradient_injection")))
    faults = {25: scale("blocks.0.rwkv.value_proj.weight", 1e-5), 30: scale("embedding.weight", 300.0)}
    with monkeypatch.context() as patch:
        inject(patch, KINDS[backend], nan_loss=12, nan_gradient=20, before=faults)
        train.run(config, tmp_path / "whole")
    for at in (22, 35):
        with monkeypatch.context() as patch:
            inject(patch, KINDS[backend], nan_loss=12, nan_gradient=20, before={**faults, at: stop})
            with pytest.raises(KeyboardInterrupt):
                train.run(replace(config, resume="auto"), tmp_path / "parts")
    with monkeypatch.context() as patch:
        inject(patch, KINDS[backend], nan_loss=12, nan_gradient=20, before=faults)
        train.run(replace(config, resume="auto"), tmp_path / "parts")
    whole, parts = checkpoint.newest(tmp_path / "whole"), checkpoint.newest(tmp_path / "parts")
    assert whole is not None and parts is not None and whole.step == parts.step == STEPS
    for kind in ("arrays", "optimiser", "states", "monitors"):
        expected, found = getattr(whole, kind), getattr(parts, kind)
        assert expected.keys() == found.keys() and all(np.array_equal(expected[name], found[name]) for name in expected), kind
    for name in ("recovery", "monitors", "updates", "good"):
        assert whole.description[name] == parts.description[name], name
    counts = whole.description["recovery"]["events"]
    assert counts.items() >= {"nonfinite_loss": 1, "nonfinite_gradient": 1, "explosion": 1, "weights": 1, "unfreeze": 1}.items()
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert [event["step"] for event in events(tmp_path / "parts", "resumed")] == [16, 32]
    assert checkpoint.best(tmp_path / "whole", config) == checkpoint.best(tmp_path / "parts", config)


def test_full_disk_during_a_checkpoint_is_an_event_and_the_next_one_is_written(text: Path, tmp_path: Path, monkeypatch) -> None:
    """The system refuses to write more than 20 KB into a file while the checkpoint of step 16 is written; one has 60 KB."""
    save = checkpoint.save

    def full(run: Path, model: Any, optimiser: Any, states: Any, description: dict[str, Any], *rest: Any, **named: Any) -> Path:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if description["step"] == 16 else limits[0], limits[1]))
        try:
            return save(run, model, optimiser, states, description, *rest, **named)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)

    monkeypatch.setattr(checkpoint, "save", full)
    train.run(settings("torch_compiled", text), tmp_path)
    (event,) = events(tmp_path)
    assert (event["step"], event["kind"]) == (16, "checkpoint_failed") and "cannot write" in event["message"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [f"step-{step:08d}" for step in (8, 24, 32, 40)]


def test_last_checkpoint_that_cannot_be_written_is_an_error(text: Path, tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_arrays", full)
    with pytest.raises(RunError, match="No space left on device"):
        train.run(settings("torch_compiled", text), tmp_path)
    assert [event["kind"] for event in events(tmp_path)] == ["checkpoint_failed"] * 7  # four checkpoints and three golden ones
    assert list((tmp_path / "checkpoints").iterdir()) == list((tmp_path / "golden").iterdir()) == []


def test_second_run_on_a_folder_is_refused(text: Path, tmp_path: Path, capsys) -> None:
    with RunLock(tmp_path):
        with pytest.raises(RunError, match=r"run_dir: .* is in use by process \d+ on \S+ since .*; wait for it"):
            train.run(settings("torch_compiled", text), tmp_path)
        from experiments import cli

        assert cli.main(["train", f"run_dir={tmp_path}", f"data.path={text}"]) == 2
        assert "is in use by process" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_corrupted_newest_checkpoint_is_passed_over_and_said(healthy: Path, text: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    config = settings("torch_compiled", text)
    with monkeypatch.context() as patch:
        inject(patch, TorchStep, before={30: stop})
        with pytest.raises(KeyboardInterrupt):
            train.run(config, tmp_path)
    broken = tmp_path / "checkpoints" / "step-00000024"
    (broken / "training.safetensors").write_bytes(b"half")
    train.run(replace(config, resume="auto"), tmp_path)
    (event,) = events(tmp_path, "checkpoint_passed_over")
    assert event["step"] == 16 and str(broken) in event["message"] and "truncated or altered" in capsys.readouterr().err
    whole, parts = checkpoint.newest(healthy), checkpoint.newest(tmp_path)
    assert whole is not None and parts is not None and all(np.array_equal(whole.arrays[name], parts.arrays[name]) for name in whole.arrays)


def test_lock_left_by_a_killed_run_is_taken_over_and_said(text: Path, tmp_path: Path) -> None:
    program = f"import os, signal; from experiments.lock import RunLock; from pathlib import Path; RunLock(Path({str(tmp_path)!r})).acquire(); "
    done = subprocess.run([sys.executable, "-c", program + "os.kill(os.getpid(), signal.SIGKILL)"], check=False, timeout=60)
    assert done.returncode == -9 and (tmp_path / LOCK).exists()
    config = settings("torch_compiled", text)
    train.run(replace(config, training=replace(config.training, stop_at=1), tracker=TrackerConfig(name="none")), tmp_path)
    (event,) = events(tmp_path)
    assert event["kind"] == "lock" and "took over from process" in event["message"] and not (tmp_path / LOCK).exists()


def test_corrupt_text_file_stops_before_anything_is_trained(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for path in text.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "3.txt").write_bytes(b"The rain in Spain\x00\xff stays")
    with pytest.raises(RunError, match=r"data.path: .*3.txt is not UTF-8 text: byte 0xff at offset 18"):
        train.run(settings("torch_compiled", folder), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / LOCK).exists()


@pytest.mark.parametrize("backend", KINDS)
def test_guarded_step(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard changes no bit of a healthy step; going back and doing the steps again gives the same bits; what is not finite is held off."""
    plain_step, guarded = build(backend), build(backend)
    advance(plain_step, 1, 12)
    advance(guarded, 1, 5, guard=True)
    early = (guarded.arrays(), guarded.optimiser_arrays(), guarded.carried(), guarded.steps_done)
    advance(guarded, 6, 12, guard=True)
    late = held(guarded)
    assert same(late, held(plain_step)) and late["blocks.0.rwkv.writes"] == 1 and late["updates"] == 12
    guarded.restore(*early)
    advance(guarded, 6, 12, guard=True)
    assert same(held(guarded), late)

    accumulate = type(guarded)._accumulate

    def overflowing(self: TrainStep, *inputs: Any) -> Any:
        parts, after, aux = accumulate(self, *inputs)
        self._add({"embedding.weight": np.full_like(self._gradients()["embedding.weight"], 1e30)})
        return parts, after, aux

    def broken_state(self: TrainStep, *inputs: Any) -> Any:
        parts, after, aux = accumulate(self, *inputs)
        states = self._numpy(after)
        states[0]["wkv"] = np.full_like(states[0]["wkv"], np.inf)
        return parts, self._native(states), aux

    for fault, reason in ((overflowing, "gradient norm inf"), (broken_state, "a state that would be carried")):
        with monkeypatch.context() as patch:
            patch.setattr(type(guarded), "_accumulate", fault)
            (skipped,) = advance(guarded, 13, 13, guard=True)
        assert skipped.skipped == reason and same(held(guarded), late)
    advance(guarded, 13, 13, guard=True)
    advance(plain_step, 13, 13)
    assert same(held(guarded), held(plain_step))  # nothing of the skipped steps is left, the gradient neither

    def poisoned(self: TrainStep, *inputs: Any) -> Any:
        parts, after, aux = accumulate(self, *inputs)
        gradient = np.zeros_like(self._gradients()["blocks.0.ssm.A"])
        gradient[2, 1:3] = math.nan, math.inf
        self._add({"blocks.0.ssm.A": gradient})
        return parts, after, aux

    with monkeypatch.context() as patch:
        patch.setattr(type(guarded), "_accumulate", poisoned)
        (cleaned,) = advance(guarded, 14, 14, guard=True, details=True)
    assert cleaned.zeroed == {"blocks.0.ssm.A": 2} and not cleaned.skipped and math.isfinite(cleaned.gradient_norm)
    assert np.isnan(cleaned.gradients["blocks.0.ssm.A"]).sum() == 1 and all(np.isfinite(value).all() for value in held(guarded).values())
    (expected,) = advance(
        plain_step, 14, 14, inject=lambda gradients: {"blocks.0.ssm.A": -gradients["blocks.0.ssm.A"]}  # the same by subtraction
    )
    assert same(held(guarded), held(plain_step)) and expected.gradient_norm == cleaned.gradient_norm


@pytest.mark.parametrize("backend", KINDS)
def test_selective_reinit_and_injection(backend: str) -> None:
    step = build(backend)
    advance(step, 1, 3)
    before, names = held(step), ["blocks.0.ssm.A", "embedding.weight"]
    assert unfreeze.selective_reinit(step, names[::-1]) == names
    after, initial = held(step), runtime.init.init_arrays("grounded_mamba", step.config.model, step.config.seed)
    for name in (*names, "lm_head.weight"):
        np.testing.assert_array_equal(after[name], np.float32(initial["embedding.weight" if name == "lm_head.weight" else name]))
    assert all(not after[f"{label}.{name}"].any() for label in ("first", "second") for name in names)
    touched = {*names, "lm_head.weight", *(f"{label}.{name}" for label in ("first", "second") for name in names)}
    assert all(np.array_equal(before[name], after[name]) for name in before.keys() - touched)

    gradients = {name: np.zeros(step.arrays()[name].shape) for name in ("blocks.0.rwkv.key_proj.weight", "embedding.weight")}
    noise = unfreeze.gradient_injection(gradients, ["blocks.0.rwkv.key_proj.weight"], 0.001, 5, 17)
    assert noise.keys() == {"blocks.0.rwkv.key_proj.weight"} and 0.0007 < noise["blocks.0.rwkv.key_proj.weight"].std() < 0.0013
    (bare,) = advance(step, 4, 4, details=True)
    step.restore(*({name: value for name, value in after.items() if name in part} for part in (
        initial, {name for name in after if name.startswith(("first.", "second."))}, {"0.ssm", "0.wkv"})), 3)
    (found,) = advance(step, 4, 4, details=True, inject=lambda given: unfreeze.gradient_injection(given, list(noise), 0.001, 5, 17))
    for name, value in found.gradients.items():
        np.testing.assert_allclose(value, bare.gradients[name] + noise.get(name, 0.0), rtol=1e-5, atol=1e-9)
