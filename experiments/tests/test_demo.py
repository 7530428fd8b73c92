"""The demo: its three runs differ in what they should and in nothing else, and its verdict can be bad."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from experiments import cli, demo


def test_plan_changes_backend_order_and_length_only(tmp_path: Path) -> None:
    runs = {name: cli.validate(cli.composed(overrides)) for name, overrides in demo.plan(tmp_path / "d", 90, ["seed=3"]).items()}
    assert {name: (run.backend.name, run.data.permute_rows, run.training.last_step) for name, run in runs.items()} == {
        "torch": ("torch_compiled", False, 2000), "jax": ("jax", False, 90), "torch-permuted": ("torch_compiled", True, 90),
    }
    for run in runs.values():
        assert (run.model, run.optimiser, run.training.steps, run.seed) == (runs["torch"].model, runs["torch"].optimiser, 2000, 3)
        assert run.run_dir and Path(run.run_dir).parent == tmp_path / "d"


@pytest.mark.parametrize(
    ("shift", "model", "status", "message"),
    [(1e-5, 2.0, 0, "below the trigram's"), (1e-1, 2.0, 1, "below the trigram's"), (1e-5, 3.0, 1, "NOT below the trigram's")],
)
def test_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shift: float, model: float, status: int, message: str
) -> None:
    """The runs are replaced by what they would leave behind."""

    def leave(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        config = cli.validate(cli.composed(command[3:]))
        folder = Path(config.run_dir or "")
        folder.mkdir(parents=True)
        offset = shift if config.backend.name == "jax" else 1e-5 * config.data.permute_rows
        lines = [json.dumps({"step": step, "train/loss": 3.0 - 0.01 * step + offset}) for step in range(1, 30)]
        (folder / "metrics.jsonl").write_text("\n".join(lines))
        (folder / "summary.json").write_text(json.dumps({"validation_bits_per_byte": model, "trigram_bits_per_byte": 2.5}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(demo.subprocess, "run", leave)
    assert demo.main(["--output", str(tmp_path / "demo")]) == status
    assert message in capsys.readouterr().out and (tmp_path / "demo" / "compare.svg").exists()


def test_failing_run_ends_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo.subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 2))
    assert demo.main(["--output", str(tmp_path / "demo")]) == 2
    (tmp_path / "file").write_text("")
    assert demo.main(["--output", str(tmp_path / "file" / "demo")]) == 2
    assert "cannot write into the output folder" in capsys.readouterr().err
