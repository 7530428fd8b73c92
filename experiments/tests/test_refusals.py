"""Forty wrong overrides, as a new user would write them: each is one line that names the field and what may stand there, and status 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import cli, refusals

WRONG = {
    "letters swapped in a field": (["model.dmi=64"], "model.dmi: no such field; did you mean dim? expected one of vocab_size, dim,"),
    "letters swapped in a group": (["modle=gru_tiny"], "modle: no such field; did you mean model? expected one of architecture, seed,"),
    "field of another library": (["optimiser.ssm.lr=1"], "optimiser.ssm.lr: no such field; expected one of rate, weight_decay"),
    "field that is added": (["+training.epochs=3"], "training.epochs: unknown field; expected one of steps, stop_at,"),
    "choice misspelt": (["model=grounded_mamba_tny"], "no such choice of model; did you mean grounded_mamba_tiny? expected one of deltanet_lm_base,"),
    "backend by its device": (["backend=cuda"], "backend=cuda: no such choice of backend; expected one of jax, jax_compiled, torch, torch_compiled"),
    "data misspelt": (["data=txt"], "data=txt: no such choice of data; did you mean text? expected one of text, text_bpe"),
    "tracker that is not there": (["tracker=tensorboard"], "tracker=tensorboard: no such choice of tracker; expected one of none, wandb"),
    "experiment misspelt": (["experiment=smok"], "no such choice of experiment; did you mean smoke?"),
    "model of another command": (["model=wavecore_tiny"], "model must be a GroundedMambaConfig"),
    "word for an integer": (["training.steps=many"], "training.steps must be an integer, found many"),
    "fraction for an integer": (["training.steps=1.5"], "training.steps must be an integer, found 1.5"),
    "power of ten for an integer": (["training.steps=1e3"], "training.steps must be an integer, found 1e3"),
    "nothing for an integer": (["training.steps="], "training.steps must be an integer, found nothing"),
    "null for an integer": (["model.dim=null"], "model.dim must be an integer, found null"),
    "word for a number": (["optimiser.rate=fast"], "optimiser.rate must be a number, found fast"),
    "word for a truth": (["long_context=perhaps"], "long_context must be true or false, found perhaps"),
    "word for what may be null": (["training.stop_at=soon"], "training.stop_at must be an integer or null, found soon"),
    "number for a list": (["evaluation.lengths=1024"], "evaluation.lengths must be a list of integers, as in [1,2], found 1024"),
    "word in a list": (["evaluation.lengths=[a]"], "evaluation.lengths must be a list of integers, as in [1,2], found [a]"),
    "number for a section": (["training=5"], "training must be a section with fields of its own (steps, stop_at,"),
    "zero steps": (["training.steps=0"], "training.steps must be an integer of at least 1, found 0"),
    "negative seed": (["seed=-1"], "seed must be an integer of at least 0, found -1"),
    "rate that is no number": (["optimiser.rate=nan"], "optimiser.rate must lie in (0.0, inf), found nan"),
    "rate without end": (["optimiser.rate=inf"], "optimiser.rate must lie in (0.0, inf), found inf"),
    "share above its range": (["data.validation_fraction=0.9"], "data.validation_fraction must lie in (0.0, 0.5], found 0.9"),
    "precision of another library": (["backend.dtype=half"], "backend.dtype must be one of 'float32', 'float64'"),
    "unknown word": (["model.gate=soft"], "model.gate must be one of 'fixed', 'learned', found 'soft'"),
    "unknown part": (["data.parts=[topics,novels]"], "data.parts must name some of topics, docstrings, source, found ['topics', 'novels']"),
    "state of another model": (["loss.state_penalty=[S]"], "loss.state_penalty of grounded_mamba may name ssm, wkv, found ['S']"),
    "sizes that do not fit": (["model.dim=97"], "model.dim must be divisible by rwkv_heads, found dim=97"),
    "batch that is not divided": (["training.batch_size=8", "training.accumulation=3"], "training.accumulation must divide batch_size"),
    "kernels that a model has not": (["model=gru_tiny", "backend=jax_compiled"], "backend of 'gru' must be one of 'torch', 'jax'"),
    "two values for a field": (["seed=1", "training.steps=5", "seed=2"], "seed is given twice, as 1 and as 2"),
    "bounds that cross": (["monitors.state_low=20"], "monitors.state_low < state_high <= state_warn must hold"),
    "two overrides in one": (["model.dim=64 model.depth=2"], "model.dim: expected one KEY=VALUE in each argument"),
    "no value": (["training.steps"], "training.steps: expected KEY=VALUE, as in training.steps=300"),
    "flag": (["--steps=5"], "unrecognized arguments: --steps=5; fields are given as KEY=VALUE"),
    "brackets that do not close": (["evaluation.lengths=[1,2"], "evaluation.lengths: cannot read the value '[1,2'"),
    "field taken away": (["~training.steps"], "training.steps: a field cannot be taken away"),
    "folder given to Hydra": (["hydra.run.dir=here"], "hydra.run.dir: the folder of a run is run_dir; give run_dir=here"),
    "text that is not there": (["data.path=no/such/folder"], "data.path: no file or folder no/such/folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_override_is_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, message = WRONG[case]
    assert cli.main(["train", *overrides, f"output_dir={tmp_path / 'runs'}"]) == 2
    written = capsys.readouterr()
    (line,) = written.err.strip().splitlines()
    assert line.startswith("groundwave: ") and message in line and not written.out, written
    assert not (tmp_path / "runs").exists()


def test_resume_in_a_folder_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("not a run\n")
    overrides = ["resume=auto", f"run_dir={tmp_path / 'letters'}", "backend=torch"]
    assert cli.main(["train", *overrides]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "letters is no run's folder, it holds a.txt; expected a folder with checkpoints, or a new one" in line
    (tmp_path / "letters" / "config.yaml").write_text("")  # a run that was killed before its first checkpoint
    assert cli.prepare(overrides)[:2] == overrides[:2]


def test_right_overrides_pass() -> None:
    assert refusals.twice(["seed=1", "seed=1", "model.dim=2"]) is None and refusals.foreign(["hydra.verbose=true"]) is None
    assert refusals.malformed("evaluation.lengths=[1,2]") is None and refusals.malformed("~tracker") is None
    assert {"model", "backend", "data", "experiment"} <= set(refusals.groups())
