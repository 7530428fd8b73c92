"""Sweeps: optuna's trials, stopped and gone on with; Hydra's jobs side by side and through submitit; what a SLURM cluster would be asked for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

import conf
from experiments import checkpoint, cli, launched, sweep, train
from experiments.compose import register
from experiments.errors import RunError
from experiments.steps.torch_step import TorchStep

TREE = Path(conf.__file__).parent.parent
WITH_OPTUNA = "optuna is not installed (groundwave[sweep])"
SHORT = ["experiment=smoke", "data.validation_fraction=0.3", "tracker=none", "long_context=false", "evaluation.sample_tokens=0"]
SPACE = ["optimiser.rate=tag(log,interval(1e-4,1e-1))", "model.dim=12,18"]


def plugin(name: str) -> Any:
    return pytest.importorskip(f"hydra_plugins.{name}", reason=f"{name} is not installed (groundwave[sweep])")


def searched(folder: Path, text: Path, *more: str) -> list[str]:
    return [*SPACE, *SHORT, f"data.path={text}", f"run_dir={folder}", "sweep.startup=1", "sweep.trials=3", *more]


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / sweep.SWEEP).read_text())


def test_stopped_sweep_goes_on_and_tries_what_an_uninterrupted_one_tries(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three trials in one go; three stopped by kill -9 in the middle of the second, after its checkpoint of step 2."""
    pytest.importorskip("optuna", reason=WITH_OPTUNA)
    assert cli.main(["sweep", *searched(tmp_path / "whole", text)]) == 0
    program = (
        "import os, signal, sys; from experiments import cli; from experiments.steps.torch_step import TorchStep; step, seen = TorchStep.step, []\n"
        "def struck(self, *inputs, **named):\n"
        "    seen.append(1)\n"
        "    if len(seen) == 6: os.kill(os.getpid(), signal.SIGKILL)\n"  # three steps of the first trial, two of the second
        "    return step(self, *inputs, **named)\n"
        "TorchStep.step = struck; sys.exit(cli.main(sys.argv[1:]))"
    )
    arguments = searched(tmp_path / "parts", text)
    done = subprocess.run([sys.executable, "-c", program, "sweep", *arguments], cwd=TREE, check=False, timeout=120, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [trial["state"] for trial in record(tmp_path / "parts")["trials"]] == ["complete"]
    first = checkpoint.newest(tmp_path / "parts" / "trial-0001")
    assert first is not None and first.step == 2
    (tmp_path / "parts" / f"{sweep.JOURNAL}.lock").touch()  # as a process leaves it that is killed while it writes
    calls: list[int] = []
    original = TorchStep.step
    monkeypatch.setattr(TorchStep, "step", lambda self, *inputs, **named: calls.append(1) or original(self, *inputs, **named))
    capsys.readouterr()
    assert cli.main(["sweep", *arguments]) == 0
    assert len(calls) == 1 + 3  # the last step of the second trial, and the third
    whole, parts = record(tmp_path / "whole"), record(tmp_path / "parts")
    assert parts == whole and [trial["state"] for trial in whole["trials"]] == ["complete"] * 3
    assert whole["best"]["value"] == min(trial["value"] for trial in whole["trials"]) < 9
    rates = [trial["params"]["optimiser.rate"] for trial in whole["trials"]]
    assert len(set(rates)) == 3 and all(1e-4 <= rate <= 1e-1 for rate in rates)
    assert {trial["params"]["model.dim"] for trial in whole["trials"]} <= {"12", "18"}
    saved = json.loads(json.dumps((tmp_path / "parts" / "trial-0002" / "config.yaml").read_text()))
    assert f"rate: {rates[2]}" in saved and "best run is" in capsys.readouterr().out
    calls.clear()
    assert cli.main(["sweep", *searched(tmp_path / "parts", text)]) == 0 and not calls  # nothing is missing
    assert cli.main(["sweep", *searched(tmp_path / "parts", text, "seed=3")]) == 2
    assert "holds a sweep with fixed" in capsys.readouterr().err


def test_trial_that_fails_ends_no_sweep(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna", reason=WITH_OPTUNA)
    groups: list[str | None] = []

    def run(config: Any, folder: Path, *, group: str | None = None) -> dict[str, float]:
        groups.append(group)
        if len(groups) == 1:
            raise RunError("training: gave up at step 3")
        return {"validation_bits_per_byte": float("nan") if len(groups) == 2 else 2.5}

    monkeypatch.setattr(train, "run", run)
    assert cli.main(["sweep", *searched(tmp_path / "a", text, "sweep.sampler=random")]) == 0
    assert [trial["state"] for trial in record(tmp_path / "a")["trials"]] == ["fail", "fail", "complete"] and set(groups) == {"a"}
    groups.clear()
    monkeypatch.setattr(train, "run", lambda *_, **__: {"validation_bits_per_byte": float("inf")})
    assert cli.main(["sweep", *searched(tmp_path / "b", text)]) == 1 and record(tmp_path / "b")["best"] is None


@pytest.mark.parametrize(("overrides", "message"), [
    (["training.steps=3"], "sweep: no field has several values"),
    (["optimiser.rate=interval(2,1)"], "optimiser.rate: interval(2.0,1.0) must grow"),
    (["optimiser.rate=tag(log,interval(0.0,1.0))"], "must grow, from above zero for its logarithm"),
    (["model.width=1,2"], "model.width"),
    (["model.dim=97,98"], "model.dim must be divisible by rwkv_heads, found dim=97"),
    (["model.dim=12,18", "sweep.trials=0"], "sweep.trials must be an integer of at least 1"),
    (["model=glob(*)"], "model: must be a,b,c or choice, range or interval"),
])
def test_impossible_sweep_is_one_line(overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna", reason=WITH_OPTUNA)
    assert cli.main(["sweep", *overrides, f"output_dir={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not list(tmp_path.iterdir())


def test_values_become_distributions() -> None:
    distributions = pytest.importorskip("optuna", reason=WITH_OPTUNA).distributions
    space, fixed = sweep.searched([
        "a=int(interval(1,8))", "b=interval(0.5,2)", "c=tag(log,interval(1e-3,1))", "d=choice(x,y)", "e=range(1,4)", "f=3", "g=true,false",
    ])
    assert fixed == ["f=3"] and space == {
        "a": distributions.IntDistribution(1, 8), "b": distributions.FloatDistribution(0.5, 2.0),
        "c": distributions.FloatDistribution(1e-3, 1.0, log=True), "d": distributions.CategoricalDistribution(["x", "y"]),
        "e": distributions.CategoricalDistribution(["1", "2", "3"]), "g": distributions.CategoricalDistribution(["True", "False"]),
    }


def test_joblib_runs_jobs_side_by_side_and_the_worst_status_counts(text: Path, tmp_path: Path) -> None:
    """Two jobs of three steps in two processes, one of which fails."""
    plugin("hydra_joblib_launcher")
    common = [*SHORT, "backend=torch", f"data.path={text}", "launcher=joblib", "hydra.launcher.n_jobs=2"]
    try:
        assert cli.main(["train", "-m", *common, f"run_dir={tmp_path}", "recovery.enabled=false", "optimiser.rate=1e-3,1e30"]) == 2
    finally:
        pytest.importorskip("joblib").externals.loky.get_reusable_executor().shutdown(wait=True)
    found = [json.loads(path.read_text()) for path in sorted(tmp_path.glob(f"*/{launched.STATUS}"))]
    assert [each["status"] for each in found] == [0, 2] and len({os.getpid(), *(each["pid"] for each in found)}) == 3
    assert [path.parent.name[0] for path in tmp_path.glob("*/summary.json")] == ["0"]


def test_submitit_runs_a_job_in_a_process_of_its_own(text: Path, tmp_path: Path) -> None:
    plugin("hydra_submitit_launcher")
    assert cli.main(["train", "-m", *SHORT, "backend=torch", f"data.path={text}", "launcher=submitit", f"run_dir={tmp_path}", "seed=4"]) == 0
    (status,) = tmp_path.glob(f"*-seed4/{launched.STATUS}")
    assert json.loads(status.read_text())["pid"] != os.getpid() and list(tmp_path.glob(".submitit/*/*_result.pkl"))


def test_slurm_is_asked_for_what_is_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script that submitit would hand to sbatch, on a machine that has none."""
    plugin("hydra_submitit_launcher")
    submitit = pytest.importorskip("submitit")
    GlobalHydra.instance().clear()
    register()
    chosen = ["run_dir=runs/a", "launcher=slurm", "hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=2", "hydra.launcher.timeout_min=90"]
    with initialize_config_module(config_module="conf", version_base="1.3"):
        composed = compose("train", overrides=[*chosen, "hydra.launcher.setup=['module load python']"], return_hydra_config=True)
    launcher = composed.hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher") and launcher.max_num_timeout == 8
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    executor = submitit.AutoExecutor(folder=tmp_path, cluster="slurm", slurm_max_num_timeout=launcher.max_num_timeout)
    base = {"timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "name", "stderr_to_stdout"}
    others = ("_target_", "submitit_folder", "max_num_timeout", "additional_parameters")
    asked = {key: list(value) if key == "setup" else value for key, value in launcher.items() if key not in others and value is not None}
    executor.update_parameters(**{key if key in base else f"slurm_{key}": value for key, value in asked.items()})
    lines = executor._executor._make_submission_file_text("python -m job", "uid").splitlines()
    for expected in (
        "#SBATCH --partition=gpu", "#SBATCH --gpus-per-node=2", "#SBATCH --time=90", "#SBATCH --job-name=groundwave", "#SBATCH --cpus-per-task=4",
        "#SBATCH --mem=16GB", "#SBATCH --nodes=1", "#SBATCH --ntasks-per-node=1", "#SBATCH --signal=USR2@120", "module load python",
    ):
        assert expected in lines, (expected, lines)
    assert any(line.startswith("srun ") and line.endswith("python -m job") for line in lines)


def test_job_that_slurm_runs_again_goes_on(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*SHORT, f"data.path={text}", f"run_dir={tmp_path}"]
    assert cli.main(["train", *given, "training.stop_at=2"]) == 0
    with pytest.raises(SystemExit):
        cli.main(["train", *given])
    assert "already holds checkpoints" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert cli.main(["train", *given]) == 0
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest.step == 3


def test_jobs_that_left_no_status_are_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, status in (("0-a", 0), ("1-b", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / launched.STATUS).write_text(json.dumps({"status": status}))
    assert sorted(launched.Expected(tmp_path, 2).statuses()) == [0, 2] and not capsys.readouterr().err
    assert sorted(launched.Expected(tmp_path, 4).statuses()) == [0, 1, 1, 2]
    assert f"2 of 4 jobs below {tmp_path} ended without a word" in capsys.readouterr().err
    found = launched.expected(["-m", "seed=1,2,3", f"run_dir='{tmp_path}'"])
    assert found == launched.Expected(tmp_path, 3) and not list(tmp_path.glob("*/status.json"))
    assert launched.expected(["seed=1", f"run_dir='{tmp_path}'"]) is None
