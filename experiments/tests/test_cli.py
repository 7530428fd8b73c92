"""The command line: every shipped YAML composes and builds, and whatever is wrong is one line with exit status 2."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import conf
import runtime
from conf import schema
from conf.baselines import GruConfig, TransformerConfig
from conf.control_schema import ControlConfig
from conf.models import WaveCoreConfig
from experiments import cli

TREE = Path(conf.__file__).parent
GROUPS = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in TREE.iterdir() if folder.is_dir() and list(folder.glob("*.yaml"))
}
CHOICES = [f"{group}={name}" for group, names in sorted(GROUPS.items()) for name in names if not name.startswith("wavecore")]
PLUGINS = {
    "launcher=joblib": "hydra_joblib_launcher", "launcher=slurm": "hydra_submitit_launcher", "launcher=submitit": "hydra_submitit_launcher",
}
CORES = [name for name in GROUPS["model"] if name.startswith("wavecore")]


def test_tree_is_found() -> None:
    assert set(GROUPS) == {"model", "backend", "data", "tracker", "launcher", "distributed", "experiment", "debug"}
    assert GROUPS["backend"] == ["jax", "jax_compiled", "torch", "torch_compiled"] and "smoke" in GROUPS["experiment"]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_yaml_composes_validates_and_builds(choice: str) -> None:
    if choice in PLUGINS:
        pytest.importorskip(f"hydra_plugins.{PLUGINS[choice]}", reason=f"{PLUGINS[choice]} is not installed (groundwave[sweep])")
    backends = [] if choice.startswith("backend=") else ["backend=jax" if choice == "distributed=jax" else "backend=torch"]
    # The largest model is built with few slots: what is tested is the YAML, and its fields are all the same type.
    bank = ["model.memory_size=5"] if "grounded_mamba" in choice else []
    small = ["model.dim=16", "model.depth=1", *bank] if choice.startswith("model=") else []
    config = cli.validate(cli.composed([choice, *backends, *small]))
    assert isinstance(config, schema.TrainConfig) and isinstance(config.model, schema.MODELS[config.architecture])
    model = runtime.build(config.architecture, config.model, backend=config.backend.name, dtype=config.backend.dtype)
    assert model.arrays()["embedding.weight"].shape == (config.model.vocab_size, config.model.dim)


@pytest.mark.parametrize("name", CORES)
def test_every_core_composes_validates_and_is_the_preset_that_it_names(name: str) -> None:
    model = cli.validate(cli.composed([f"model={name}"], "control"), "control").model
    preset = {"wavecore_tiny": WaveCoreConfig.development, "wavecore_small": WaveCoreConfig.pi5_optimized, "wavecore_base": WaveCoreConfig}[name]
    assert model == preset(heads=("action", "value", "world_model"), gradient_clip=1.0)


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_baselines_are_the_presets_that_they_name(size: str) -> None:
    for name, kind in (("transformer", TransformerConfig), ("gru", GruConfig)):
        assert cli.validate(cli.composed([f"model={name}_{size}", "backend=torch"])).model == kind.preset(size, vocab_size=258)


def test_control_yaml_and_schema_say_the_same_defaults() -> None:
    composed, default = cli.validate(cli.composed([], "control"), "control"), ControlConfig()
    for section in ("environment", "model", "backend", "data", "optimiser", "loss", "training", "evaluation", "checkpoint"):
        assert getattr(composed, section) == getattr(default, section), section


def test_yaml_and_schema_say_the_same_defaults() -> None:
    """Except where the YAML chooses a model and a place: nothing is trained with a number that the schema does not show."""
    composed, default = cli.validate(cli.composed([])), schema.TrainConfig()
    sections = ("backend", "data", "optimiser", "loss", "training", "evaluation", "checkpoint")
    for section in (*sections, "comparison", "debug", "rate_finder", "sweep", "distributed"):
        assert getattr(composed, section) == getattr(default, section), section


def test_every_field_of_the_schema_can_be_set() -> None:
    config = cli.validate(cli.composed(["model.gate=learned", "model.dt_bias=[0.5]", "optimiser.ssm.rate=0.25", "training.stop_at=5"]))
    assert (config.model.gate, config.model.dt_bias, config.optimiser.ssm.rate, config.training.last_step) == ("learned", (0.5,), 0.25, 5)


def test_tracker_mode_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert cli.validate(cli.composed([])).tracker.mode == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert cli.validate(cli.composed([])).tracker.mode == "disabled"


WRONG = {
    "unknown key": (["model.width=3"], "model.width: no such field; expected one of vocab_size, dim, depth,"),
    "unknown added key": (["+model.width=3"], "model.width: unknown field"),
    "unknown section": (["+models.dim=3"], "models: unknown field"),
    "wrong type": (["model.dim=wide"], "model.dim must be an integer, found wide"),
    "wrong type in a section": (["optimiser.ssm.rate=fast"], "optimiser.ssm.rate must be a number, found fast"),
    "impossible sizes": (["model.dim=97"], "model.dim must be divisible by rwkv_heads, found dim=97"),
    "impossible value in a section": (["optimiser.ssm.rate=-1"], "optimiser.ssm.rate must lie in"),
    "impossible pair": (["training.accumulation=5"], "training.accumulation must divide batch_size"),
    "sections that do not fit": (["data=text_bpe", "model.vocab_size=300"], "model.vocab_size must be at least data.vocab_size"),
    "unknown choice": (["backend=tensorflow"], "backend=tensorflow: no such choice of backend; expected one of jax, jax_compiled, torch,"),
    "unknown experiment": (["experiment=none_such"], "experiment=none_such: no such choice of experiment; expected one of compare,"),
    "no value": (["model.dim"], "model.dim: expected KEY=VALUE"),
    "broken override": (["=3"], "=3: expected KEY=VALUE"),
    "model without a schema": (["architecture=other"], "architecture must be one of"),
    "sweep without -m": (["seed=0,1"], "add -m"),
    "one bad job of a sweep": (["-m", "model.dim=96,97"], "found dim=97"),
    "unknown flag": (["--fast"], "unrecognized arguments: --fast"),
    "config path": (["--config-name=other"], "not supported"),
    "missing data": (["data.path=/nowhere/at/all"], "data.path: no file or folder /nowhere/at/all"),
    "backend that trains nothing": (["model=deltanet_lm_tiny", "backend.name=cython"], "backend.name must be one of 'torch', 'torch_compiled'"),
    "backend without kernels to run": (["model=gru_tiny", "backend=torch_compiled"], "backend of 'gru' must be one of 'torch', 'jax'"),
    "comparison with an unknown model": (["comparison.models=[lstm_tiny]"], "comparison.models: lstm_tiny: "),
    "comparison with a field that is not the model's": (['comparison.models=["gru_tiny seed=3"]'], "only fields of the model may stand behind"),
    "comparison with a field of another model": (['comparison.models=["gru_tiny model.heads=3"]'], "comparison.models: gru_tiny model.heads=3: "),
    "distribution of another framework": (["distributed=ddp", "backend=jax"], "'ddp' needs backend.name 'torch' or 'torch_compiled', found 'jax'"),
    "mesh without jax": (["distributed=jax", "backend=torch"], "distributed.name='jax' needs backend.name 'jax', found 'torch'"),
    "distribution without its processes": (["distributed=fsdp2"], "the environment lacks RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; start with"),
    "comparison in several processes": (["experiment=compare", "distributed=ddp"], "comparison.models are compared in one process"),
    "bad config printed": (["--cfg", "job", "model.dim=97"], "found dim=97"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = WRONG[case]
    assert cli.main(["train", *arguments, f"output_dir={tmp_path}"]) == 2
    written = capsys.readouterr()
    lines = written.err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0] and "Traceback" not in written.err and not written.out, written
    assert list(tmp_path.iterdir()) == []


def test_unwritable_output_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for setting in (f"output_dir={tmp_path}/file/runs", f"run_dir={tmp_path}/file/run"):
        assert cli.main(["train", setting]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "cannot write into the output folder" in line and f"{tmp_path}/file" in line


def test_unknown_command_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dance"]) == 2 and "unknown command 'dance'" in capsys.readouterr().err
    assert cli.main([]) == 0 and "groundwave train" in capsys.readouterr().out


def test_sweep_is_expanded_as_hydra_does() -> None:
    expected = [[f"seed={seed}", f"backend={name}", "model.dim=12"] for seed, name in itertools.product((0, 1), ("torch", "jax"))]
    assert cli.jobs(["seed=0,1", "backend=torch,jax", "model.dim=12"]) == expected


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "experiments.train", *arguments], capture_output=True, text=True, timeout=300, check=False, cwd=TREE.parent
    )


def test_sweep_runs_each_job_in_its_folder(tmp_path: Path, text: Path) -> None:
    done = run([
        "-m", "seed=0,1", "backend=torch,torch_compiled", "experiment=smoke", f"data.path={text}", "data.validation_fraction=0.3",
        f"run_dir={tmp_path}/sweep", "tracker=none", "long_context=false", "evaluation.sample_tokens=0",
    ])
    assert done.returncode == 0, done.stderr
    summaries = sorted(tmp_path.glob("sweep/*/summary.json"))
    assert len(summaries) == 4
    found = {path.parent.name: json.loads(path.read_text())["validation_bits_per_byte"] for path in summaries}
    by_seed = {seed: [bits for name, bits in found.items() if name.endswith(f"seed{seed}")] for seed in (0, 1)}
    # The backends share weights and data, so only float32 rounding parts them; another seed is another model.
    assert all(max(bits) - min(bits) < 1e-4 for bits in by_seed.values()) and abs(by_seed[0][0] - by_seed[1][0]) > 1e-4
    for path in summaries:
        saved = OmegaConf.load(path.parent / "config.yaml")
        assert path.parent.name.endswith(f"-{saved.backend.name}-seed{saved.seed}") and saved.model.vocab_size == 258
