"""Checkpoints survive what happens to files, and a run survives SIGKILL wherever it strikes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import runtime
from experiments import checkpoint
from experiments.errors import RunError
from experiments.folder import plain
from experiments.tests import tiny

STATES = {"0.ssm": np.arange(15.0).reshape(3, 5).T}  # not contiguous: safetensors would store other numbers


def written(run: Path, step: int, keep: int = 3) -> tuple[Path, dict[str, np.ndarray]]:
    settings = tiny.config("torch")
    model = runtime.build("grounded_mamba", settings.model, backend="torch", dtype="float64", seed=step)
    description = {"step": step, "config": {}, "data": {"sha256": ""}}
    return checkpoint.save(run, model, {"first.a": np.float64([step])}, STATES, description, keep), model.arrays()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path, arrays = written(tmp_path, 7)
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.path == path and found.step == 7
    arrays.pop("lm_head.weight")  # tied, written once
    assert found.arrays.keys() == arrays.keys() and all(np.array_equal(found.arrays[name], arrays[name]) for name in arrays)
    assert found.optimiser["first.a"] == 7
    np.testing.assert_array_equal(found.states["0.ssm"], STATES["0.ssm"])
    assert np.array_equal(runtime.load(path / "model", backend="torch").arrays()["blocks.0.ssm.A"], arrays["blocks.0.ssm.A"])


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 10):
        written(tmp_path, step, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000006", "step-00000010"]


@pytest.mark.parametrize("name", ["training.safetensors", "model/model.safetensors", "model/config.json", "checkpoint.json"])
def test_truncated_file_is_named_and_the_one_before_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    written(tmp_path, 2)
    path, _ = written(tmp_path, 4)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: len(content) // 2])
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and str(path) in lines[0] and Path(name).name in lines[0] and "truncated or altered" in lines[0]


def test_missing_file_and_altered_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = written(tmp_path, 3)
    content = bytearray((path / "training.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "training.safetensors").write_bytes(content)
    assert checkpoint.newest(tmp_path) is None
    (path / "training.safetensors").unlink()
    assert checkpoint.newest(tmp_path) is None
    first, second = capsys.readouterr().err.splitlines()
    assert "altered" in first and "training.safetensors is missing" in second


def test_broken_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    path, arrays = written(tmp_path, 3)
    (path / "model/model.safetensors").write_bytes(b"")
    written(tmp_path, 3)
    found = checkpoint.newest(tmp_path)
    assert found is not None and np.array_equal(found.arrays["embedding.weight"], arrays["embedding.weight"])


def test_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(RunError, match="cannot write"):
        written(tmp_path, 1)


def test_differences_of_configuration_name_the_field() -> None:
    settings = tiny.config("torch")
    saved = json.loads(json.dumps(plain(settings)))
    assert checkpoint.config_differences(saved, settings) == []
    free = replace(settings, run_dir="elsewhere", resume="auto", training=replace(settings.training, stop_at=3))
    assert checkpoint.config_differences(saved, free) == []
    other = replace(settings, model=replace(settings.model, dim=18), seed=4)
    assert checkpoint.config_differences(saved, other) == ["model.dim was 12, is 18", "seed was 0, is 4"]


# Trains in forked children, so that torch, and what a run imports by itself, is imported once. Each kill is a real SIGKILL that a child sends
# itself at the point asked for: before a step, or at one of the calls that make up the writing of a checkpoint.
DRIVER = r'''
import json, os, shutil, signal, sys
from dataclasses import replace
from pathlib import Path
import matplotlib.backends.backend_svg, numpy as np, torch
import cython_ext.selective_scan, cython_ext.wkv, experiments.steps.torch_step, runtime.torch_backend
from experiments import checkpoint, train
from experiments.steps.base import TrainStep
from experiments.tests import tiny
from conf.schema import CheckpointConfig, DataConfig, EvaluationConfig, TrackerConfig, TrainingConfig

torch.set_num_threads(1)
root = Path(sys.argv[1])
text = root / "text"
text.mkdir()
rng = np.random.default_rng(0)
for index in range(8):
    (text / f"{index}.txt").write_bytes(bytes(rng.integers(97, 123, 150 + 31 * index).astype(np.uint8)))
settings = tiny.config(
    sys.argv[2], "float32", data=DataConfig(path=str(text), validation_fraction=0.3), long_context=False,
    training=TrainingConfig(steps=11, batch_size=3, context=11, log_every=1, monitor_every=4), checkpoint=CheckpointConfig(every=2, keep=2),
    evaluation=EvaluationConfig(every=4, tokens=60, final_tokens=60, batch_size=2, sample_tokens=0), tracker=TrackerConfig(name="none"),
)
settings = replace(settings, model=replace(settings.model, memory_every=3))

def child(folder, resume, hook):
    pid = os.fork()
    if pid == 0:
        sys.stdout = open(os.devnull, "w")
        if hook is not None:
            owner, name, calls = hook
            original, count = getattr(owner, name), [0]
            def counted(*arguments, **named):
                count[0] += 1
                if count[0] == calls:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **named)
            setattr(owner, name, counted)
        try:
            train.run(replace(settings, resume=resume), folder)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

def final(folder):
    found = checkpoint.newest(folder)
    return found.step, {**found.arrays, **found.optimiser, **found.states}, (folder / "metrics.jsonl").read_text()

assert child(root / "whole", "none", None) == 0
step, expected, metrics = final(root / "whole")
losses = [json.loads(line).get("train/loss") for line in metrics.splitlines()]
report = {"step": step, "cases": []}
points = [(TrainStep, "step", 1), (TrainStep, "step", 8), (os, "fsync", 3), (os, "fsync", 12), (os, "rename", 2), (os, "rename", 3),
          (shutil, "rmtree", 1), (checkpoint, "write_arrays", 3)]
for number, hook in enumerate(points):
    folder = root / f"case{number}"
    killed = child(folder, "none", hook)
    before = checkpoint.newest(folder)
    resumed = child(folder, "auto", None)
    step, found, after = final(folder)
    same = found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in expected)
    again = [json.loads(line).get("train/loss") for line in after.splitlines()]
    left = [path.name for path in (folder / "checkpoints").iterdir() if not path.name.startswith("step-")]
    report["cases"].append({
        "at": f"{hook[1]} {hook[2]}", "killed": killed, "kept": before.step if before else 0, "resumed": resumed, "step": step, "same": same,
        "losses": again == losses, "left": left,
    })
print(json.dumps(report))
'''


def test_kill_anywhere_and_resume_bit_for_bit(tmp_path: Path) -> None:
    """torch: parameters, buffers, moments, carried states and the logged losses are those of the run that nobody killed."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path), "torch_compiled"], capture_output=True, text=True, timeout=300, check=False,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["step"] == 11
    for case in report["cases"]:
        assert (case["killed"], case["resumed"], case["step"], case["same"], case["losses"], case["left"]) == (-9, 0, 11, True, True, []), case
    kept = [case["kept"] for case in report["cases"]]
    assert kept[:2] == [0, 6] and max(kept) > 0  # killed before step 1: nothing; before step 8: the checkpoint of step 6
