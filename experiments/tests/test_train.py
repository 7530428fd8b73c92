"""Whole runs in three steps: every experiment, every backend, what they leave behind, and what stops them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import runtime
from conf.schema import EvaluationConfig, OptimiserConfig, TrackerConfig, TrainConfig
from experiments import cli, report, train
from experiments.errors import RunError
from experiments.tests.test_cli import GROUPS


def smoke(text: Path, *overrides: str) -> TrainConfig:
    base = ["experiment=smoke", f"data.path={text}", "data.validation_fraction=0.3", "tracker=none", "backend=torch_compiled"]
    return cli.validate(cli.composed([*base, *overrides]))


SHORT = [
    "model.dim=12", "model.depth=1", "training.steps=3", "training.batch_size=3", "training.context=17", "evaluation.tokens=210",
    "evaluation.final_tokens=310", "evaluation.batch_size=3", "evaluation.sample_tokens=3", "evaluation.lengths=[30]", "evaluation.chunk=30",
    "evaluation.puzzles=4",
]
MAMBA = ["model.ssm_dim=5", "model.rwkv_heads=3"]
BANK = [*MAMBA, "model.memory_size=7", "model.memory_writes=3", "model.retrieval_heads=2"]


@pytest.mark.parametrize("name", GROUPS["experiment"])
def test_every_experiment_runs_three_steps(name: str, text: Path, tmp_path: Path) -> None:
    sizes = SHORT + {"groundthink": MAMBA, "deltanet_lm": ["model.heads=3", "model.ffn_dim=11"]}.get(name, BANK)
    overrides = [f"experiment={name}", f"data.path={text}", "data.validation_fraction=0.3", "tracker=none", *sizes]
    summary = train.run(cli.validate(cli.composed(overrides)), tmp_path)
    assert summary["steps"] == 3 and 5 < summary["validation_bits_per_byte"] < 9  # log2(258) is 8.01 for a model that knows nothing
    assert ("long_context" in summary) == (name != "prefix")


@pytest.mark.parametrize("backend", ["torch_compiled", "jax"])
@pytest.mark.usefixtures("drawn")
def test_run_leaves_everything_behind(backend: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fewer = ["evaluation.puzzles=0"] if backend == "jax" else []  # what XLA compiles for the puzzles' shapes takes longer than the rest
    summary = train.run(smoke(text, f"backend={backend}", "model.depth=1", *fewer), tmp_path)
    output = capsys.readouterr().out
    rows = report.read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 3] and all(np.isfinite(row["train/loss"]) for row in rows[:3])
    assert {"validation/bits_per_byte", "gradient/blocks.0.ssm.A/std", "state/0/wkv/largest", "gate/0", "rate/ssm"} <= rows[1].keys()
    parts = rows[0]["train/cross_entropy"] + rows[0]["train/state_penalty"] + rows[0]["train/smoothness"]
    assert rows[0]["train/loss"] == pytest.approx(parts, rel=1e-6)  # float32
    assert rows[3]["final/trigram_bits_per_byte"] == summary["trigram_bits_per_byte"]
    left = ("config.yaml", "environment.json", "data.json", "summary.json", "sample.txt", "curve.svg", "curve.png", "long_context.svg", "report.html")
    for name in left:
        assert (tmp_path / name).stat().st_size > 0, name
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert {"python", "processor", "threads", "numpy"} <= environment.keys()
    assert json.loads((tmp_path / "data.json").read_text())["files"]["validation"]
    model = runtime.load(tmp_path / "checkpoints" / "step-00000003" / "model", backend="torch")
    logits, _ = model(np.array([[84, 104, 101]]))
    assert np.isfinite(logits).all()
    assert f"{summary['validation_bits_per_byte']:.4f}" in output and f"{summary['trigram_bits_per_byte']:.4f}" in output
    assert "How to look at this" in output and "Long context" in output


def test_pairs_give_bits_per_byte(text: Path, tmp_path: Path) -> None:
    """The loss of a token is spread over its bytes: an untrained model over 300 tokens says less than 8 bits about each byte."""
    overrides = ["data.tokenizer=bpe", "data.vocab_size=300", f"data.cache_dir={tmp_path}/cache", "long_context=false"]
    summary = train.run(smoke(text, *overrides, "evaluation.tokens=60", "evaluation.final_tokens=60"), tmp_path / "run")
    nats = np.log(summary["validation_perplexity"]) * 60
    assert summary["validation_bytes"] > 120  # tokens of this text are words
    assert summary["validation_bits_per_byte"] == pytest.approx(nats / np.log(2) / summary["validation_bytes"])


def test_finished_run_is_not_trained_again(text: Path, tmp_path: Path) -> None:
    config = smoke(text, "long_context=false")
    first = train.run(config, tmp_path)
    with pytest.raises(RunError, match="already holds checkpoints; add resume=auto"):
        train.run(config, tmp_path)
    again = train.run(replace(config, resume="auto"), tmp_path)
    assert again["validation_bits_per_byte"] == first["validation_bits_per_byte"]


def test_resume_refuses_another_model_and_another_text(text: Path, tmp_path: Path) -> None:
    config = smoke(text, "long_context=false", "evaluation.sample_tokens=0")
    train.run(config, tmp_path / "run")
    with pytest.raises(RunError, match=r"of another configuration: model\.dim was 12, is 18"):
        train.run(replace(config, resume="auto", model=replace(config.model, dim=18)), tmp_path / "run")
    saved = (text / "0.txt").read_text()
    (text / "0.txt").write_text(saved + "One line more.\n")
    try:
        with pytest.raises(RunError, match="the text is not the one"):
            train.run(replace(config, resume="auto"), tmp_path / "run")
    finally:
        (text / "0.txt").write_text(saved)


def test_resume_auto_finds_the_newest_run_of_the_configuration(text: Path, tmp_path: Path) -> None:
    overrides = ["experiment=smoke", "tracker=none", "long_context=false", "data.validation_fraction=0.3"]
    arguments = [*overrides, f"data.path={text}", f"output_dir={tmp_path}"]
    assert cli.main(["train", *arguments]) == 0
    (folder,) = tmp_path.glob("*-grounded_mamba-torch_compiled-seed0")
    again = cli.prepare([*arguments, "resume=auto"])
    assert again[-1] == f"run_dir='{folder}'"
    assert str(folder) not in cli.prepare([*arguments, "resume=auto", "seed=1"])[-1]
    saved = (folder / "config.yaml").read_text()
    assert "vocab_size: 258" in saved and "${" not in saved and (folder / ".hydra" / "overrides.yaml").exists()


def test_loss_that_is_not_finite_stops_with_a_line(text: Path, tmp_path: Path) -> None:
    config = replace(smoke(text, "recovery.enabled=false"), optimiser=OptimiserConfig(rate=1e30, warmup=0))
    with pytest.raises(RunError, match=r"not finite at step [23]: .*lower optimiser.rate"):
        train.run(config, tmp_path)


def test_long_context_needs_text(text: Path, tmp_path: Path) -> None:
    config = replace(smoke(text), evaluation=EvaluationConfig(lengths=[10**6], sample_tokens=0, batch_size=3))
    with pytest.raises(RunError, match="the shortest length is 1000000"):
        train.run(config, tmp_path)


def test_failing_tracker_warns_once_and_never_stops(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    import wandb

    def broken(**_: object) -> None:
        raise OSError("wandb-core is not there")

    monkeypatch.setattr(wandb, "init", broken)
    config = replace(smoke(text, "long_context=false"), tracker=TrackerConfig())
    assert train.run(config, tmp_path)["steps"] == 3
    warned = [line for line in capsys.readouterr().err.splitlines() if "W&B failed" in line]
    assert len(warned) == 1 and "wandb-core is not there" in warned[0]
