"""`groundwave control`: whole runs of three steps in both frameworks, what they leave, and wrong input in one line each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import runtime
from experiments import cli
from experiments.control import pictures, run
from experiments.errors import RunError
from experiments.tests.test_trackers import inspect
from experiments.tests.undrawn import one_pixel

SMALL = [
    "model.d_s=11", "model.d_w=10", "model.d_p=7", "model.d_e=13", "model.d_k=3", "model.d_c=6", "model.cms_sizes=[5,7]", "model.cms_dims=[6,10]",
    "data.training=5", "data.validation=3", "training.steps=3", "training.batch_size=3", "training.context=7", "training.log_every=1",
    "optimiser.warmup=1", "evaluation.every=2", "evaluation.episodes=2", "evaluation.starts=3", "evaluation.warm_up=3", "evaluation.horizon=5",
    "evaluation.burn_in=0", "checkpoint.every=1", "checkpoint.keep=1",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run of each framework, from the same weights and data; that of torch with W&B and pictures."""
    root = tmp_path_factory.mktemp("control")
    more = {"torch": ["tracker=wandb", "tracker.mode=offline"], "jax": ["tracker=none", "evaluation.pictures=false", "evaluation.lyapunov_steps=0"]}
    for backend, chosen in more.items():
        arguments = ["control", *SMALL, f"backend={backend}", f"output_dir={root}", f"run_dir={root / backend}", *chosen]
        with pytest.MonkeyPatch.context() as patch:
            if backend == "jax":
                patch.setattr(Figure, "savefig", one_pixel)
            assert cli.main(arguments) == 0
    return {backend: root / backend for backend in more}


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / run.METRICS).read_text().splitlines()]


def test_a_run_leaves_what_it_says(runs: dict[str, Path]) -> None:
    folder = runs["torch"]
    expected = {
        "curve.png", "forecast.png", "states.png", "attention.png", "episode.png", "episode.gif", "metrics.jsonl", "summary.json", "config.yaml",
        "environment.json", "data.json", "model", "checkpoints", "wandb",
    }
    assert expected <= {path.name for path in folder.iterdir()}
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    with Image.open(folder / "episode.gif") as gif:
        assert gif.n_frames == 100  # every other of 200
    found = json.loads((folder / "summary.json").read_text())
    returns = found["returns"]
    assert returns["random"] < returns["expert"] < 0 and returns["episodes"] == 2
    way = (returns["policy"] - returns["random"]) / (returns["expert"] - returns["random"])
    assert abs(returns["fraction"] - way) < 1e-12
    assert found["before"].keys() < found["after"].keys() and {"lyapunov/episodes", "lyapunov/held"} <= found["after"].keys()


def test_both_frameworks_run_the_same_curve_from_the_same_weights(runs: dict[str, Path]) -> None:
    """Float32 over three steps from one start: 1e-4 is a hundred times its rounding, and another order of episodes moves losses by 1e-1."""
    ours, theirs = metrics(runs["torch"]), metrics(runs["jax"])
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [0, 1, 2, 3, 3]
    for mine, other in zip(ours, theirs, strict=True):
        for name in mine:
            if name.startswith(("train/", "validation/", "final/validation/", "rate")):
                np.testing.assert_allclose(mine[name], other[name], rtol=1e-4, err_msg=name)
    before = [json.loads((folder / "summary.json").read_text())["before"] for folder in runs.values()]
    assert before[0].keys() == before[1].keys()
    np.testing.assert_allclose(before[0]["return"], before[1]["return"], rtol=1e-3)  # a pendulum amplifies rounding over 200 steps: 5e-6 seen


def test_the_saved_core_loads_on_either_backend_and_proves_what_it_learned(runs: dict[str, Path]) -> None:
    folder = runs["torch"] / run.MODEL
    proof = json.loads((folder / "proof_of_learning.json").read_text())
    last, final = metrics(runs["torch"])[-2:]
    assert len(proof["curve"]) == 3 and abs(proof["curve"][-1] - last["train/loss"]) < 1e-5
    assert proof["loss_after"] == final["final/validation/loss"] and proof["seed"] == 0 and proof["data"]["training_episodes"] == 5
    manifest = json.loads((folder / "manifest.json").read_text())
    described = json.loads((folder / run.CONTROL).read_text())
    assert described["environment"] == "Pendulum-v1" and len(described["statistics"]["observation_mean"]) == 3
    for backend in ("torch", "jax"):
        core = runtime.load_core(folder, backend=backend)
        assert sum(array.size for array in core.arrays().values()) == manifest["model"]["param_count"]
        y, _, info = core.step(core.init_state(), *(np.ones(width, np.float32) for width in (3, 1, 1)))
        assert y.shape == (1,) and np.isfinite(info["next_obs"]).all()


def test_wandb_holds_the_numbers_and_the_pictures(runs: dict[str, Path]) -> None:
    (recorded,) = (runs["torch"] / "wandb").glob("offline-run-*")
    found = inspect(recorded, "--summary")
    for name in ("final/fraction", "final/forecast/ratio", "final/lyapunov/episodes", "states", "attention", "episode/strip", "returns"):
        assert f'"{name}' in found, name
    kept = {path.name.split("_")[0] for path in recorded.rglob("*.png")}
    assert {"states", "attention", "strip", "curve", "horizons"} <= kept, kept


WRONG = {
    "unknown key": (["loss.width=3"], "loss.width"),
    "impossible value": (["training.context=0"], "training.context must be an integer of at least 1"),
    "decays that increase": (["model.cms_decays=[0.1,0.2]"], "model.cms_decays must not increase"),
    "levels that do not match": (["model.cms_dims=[32]"], "model.cms_dims must have num_levels=2 entries"),
    "another model": (["model=grounded_mamba_tiny"], "is not a subclass of WaveCoreConfig"),
    "backend": (["backend.name=cython"], "backend.name must be one of 'torch', 'torch_compiled', 'jax'"),
    "no environment of that name": (["environment.name=Nowhere-v0"], "environment Nowhere-v0: "),
    "no expert": (["environment.name=Acrobot-v1", "model.output_type=discrete"], "has no scripted expert"),
    "discrete": (["environment.name=CartPole-v1"], "model.output_type must be 'discrete' for the actions of CartPole-v1"),
    "a head that is not there": (["model.heads=[action]"], "model.heads must be action, value, world_model"),
    "more lanes than episodes": (["data.training=7"], "training.batch_size must be at most data.training episodes"),
    "a horizon beyond the episode": (["evaluation.horizon=400"], "must fit into an episode of Pendulum-v1, 200 steps, found 410"),
    "an exponent of few steps": (["evaluation.lyapunov_steps=10"], "evaluation.lyapunov_steps must be 0 or at least 1000, found 10"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = WRONG[case]
    assert cli.main(["control", *arguments, f"output_dir={tmp_path}"]) == 2
    written = capsys.readouterr()
    lines = written.err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0] and not written.out and list(tmp_path.iterdir()) == [], written


def test_without_a_display_a_run_goes_on_without_pictures_of_the_episode(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_display(*arguments: object, **options: object) -> None:
        raise RunError("environment Pendulum-v1: no picture can be drawn: no display")

    monkeypatch.setattr(pictures, "open_environment", no_display)
    cache = runs["torch"].parent / "cache"
    arguments = [f"output_dir={tmp_path}", f"data.cache_dir={cache}", "tracker=none", "evaluation.lyapunov_steps=0"]
    assert cli.main(["control", *SMALL, *arguments]) == 0
    written = capsys.readouterr()
    assert written.err.count("\n") == 1 and "no pictures of the episode" in written.err and "no display" in written.err
    (folder,) = tmp_path.iterdir()
    assert (folder / "states.png").exists() and not (folder / "episode.gif").exists() and "episode.gif" not in written.out


def test_a_loss_that_is_not_finite_stops_the_run_with_advice(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = runs["torch"].parent / "cache"
    arguments = [*SMALL, f"output_dir={tmp_path}", f"data.cache_dir={cache}", "tracker=none", "backend=torch", "loss.states=1e39"]
    with pytest.raises(SystemExit, match="2"):
        cli.main(["control", *arguments])
    assert "training: not finite at step 1: loss inf" in capsys.readouterr().err


def test_a_folder_that_holds_a_model_is_not_written_into(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["control", *SMALL, "tracker=none", f"output_dir={runs['torch'].parent}", f"run_dir={runs['torch']}"])
    assert "already holds a model" in capsys.readouterr().err
