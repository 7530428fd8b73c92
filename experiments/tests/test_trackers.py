"""W&B offline: what a run logs is there to be read with `wandb leet`, in the run's own folder, and a resumed run goes on under its id."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from conf.schema import TrackerConfig
from experiments import cli, trackers, train


def inspect(folder: Path, *options: str) -> str:
    """What `wandb leet inspect --json` prints of an offline run."""
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(folder)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_offline_run_can_be_read_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    before = {name: value for name, value in os.environ.items() if name.startswith("WANDB")}
    text = tmp_path / "text"
    text.mkdir()
    for index in range(9):
        (text / f"{index}.txt").write_text(f"The rain in Spain, number {index}, stays mainly in the plain.\n" * (5 + index))
    overrides = ["experiment=smoke", f"data.path={text}", "data.validation_fraction=0.3", "backend=torch_compiled", "tracker=wandb"]
    config = cli.validate(cli.composed(overrides))
    run = tmp_path / "run"
    train.run(replace(config, training=replace(config.training, stop_at=2)), run, group="sweep-7")
    train.run(replace(config, resume="auto"), run, group="sweep-7")
    first, second = sorted(run.glob("wandb/offline-run-*"))
    assert first.name.split("-")[3] == second.name.split("-")[3]  # offline-run-TIME-ID, and -1 behind it where both began in one second
    assert {name: value for name, value in os.environ.items() if name.startswith("WANDB")} == before
    assert not (Path.cwd() / "wandb").exists()

    records = [json.loads(line) for line in inspect(second).splitlines()]
    everything = json.dumps(records)
    for name in (
        "train/loss", "train/cross_entropy", "train/state_penalty", "train/smoothness", "rate/ssm", "gradient/norm", "gradient/blocks.0.ssm.A/std",
        "state/0/ssm/norm", "state/1/wkv/largest", "gate/1", "time/tokens_per_second", "memory/peak_bytes", "final/bits_per_byte",
        "final/trigram_bits_per_byte", "long_context/table", "long_context/plot", "train/curve", "sample", "validate/table", "report", "rate/norm",
        "data/held_out_tokens", "pathology/score", "weights/least_share", "final/perplexity",
    ):
        assert name in everything or name in inspect(first), name
    for text_found in ("sweep-7", "grounded_mamba", "torch_compiled", "data_sha256", "checkpoint"):
        assert text_found in everything, text_found
    summary = json.loads(inspect(second, "--summary"))
    assert "validation_bits_per_byte" in json.dumps(summary)
    # Staged under names of W&B's own, below the run's folder: the last checkpoint of both parts of the run, four files each.
    assert len(list(run.glob("wandb/data/artifacts/staging/*"))) >= 8


def test_no_tracker_does_nothing(tmp_path: Path) -> None:
    tracker = trackers.make(TrackerConfig(name="none"), tmp_path, settings={}, name="a", group=None, tags=[], run_id=None)
    tracker.log({"a": 1}, 1)
    tracker.finish()
    assert tracker.run_id is None and list(tmp_path.iterdir()) == []


def test_failure_in_the_middle_warns_once(tmp_path: Path) -> None:
    tracker = trackers.make(TrackerConfig(mode="disabled"), tmp_path, settings={}, name="a", group=None, tags=[], run_id=None)
    tracker.log({"a": 1.0}, 1)
    with pytest.warns(RuntimeWarning, match="left out from here on") as seen:
        tracker.image("picture", tmp_path / "missing.png", 2)
        tracker.image("picture", tmp_path / "missing.png", 3)
        tracker.artifact("checkpoint", tmp_path / "missing", "checkpoint", {})
    tracker.finish()
    assert len(seen) == 1
