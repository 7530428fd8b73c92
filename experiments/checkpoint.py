"""Checkpoints of a run: written whole under another name, then renamed, so that a kill at any moment leaves the last good one.

    RUN/checkpoints/step-00000200/model/                  what `runtime.save` writes: `runtime.load` reads it, on any backend
    RUN/checkpoints/step-00000200/training.safetensors    optimiser.{first,second}.NAME, states.LAYER.KIND, monitors.NAME
    RUN/checkpoints/step-00000200/checkpoint.json         step, position in the data, configuration, environment, recovery, sha256 of the rest
    RUN/golden/step-00000150/                             the same, of the best validation so far

`checkpoint.json` is written last, and a folder is read only if everything that it lists is there unaltered.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import runtime
from conf.schema import TrainConfig
from experiments.errors import RunError
from runtime.checkpoint import load_arrays, save_arrays
from runtime.files import digest, flush, write_arrays

FOLDER = "checkpoints"
GOLDEN = "golden"
_PREFIX = "step-"
_WRITING = ".writing-"
_DESCRIPTION = "checkpoint.json"
_TRAINING = "training.safetensors"
# Fields that do not change what is computed: a run may be resumed with others.
_FREE = {
    "run_dir", "output_dir", "resume", "long_context", "evaluation", "checkpoint", "tracker", "comparison", "data.cache_dir", "backend.threads",
    "training.stop_at", "training.log_every", "training.monitor_every", "training.early_stopping", "monitors", "rate_finder", "sweep",
    "debug.target", "debug.profile_steps", "debug.profile_after", "debug.operators", "distributed",
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back."""

    path: Path
    arrays: dict[str, np.ndarray]  # parameters and buffers, torch names
    optimiser: dict[str, np.ndarray]
    states: dict[str, np.ndarray]
    monitors: dict[str, np.ndarray]
    description: dict[str, Any]

    @property
    def step(self) -> int:
        """Number of steps done, those that were skipped included."""
        return int(self.description["step"])

    @property
    def updates(self) -> int:
        """Number of optimiser steps that led to these parameters."""
        return int(self.description.get("updates", self.step))


def save(
    run: Path, model: Any, optimiser: Mapping[str, np.ndarray], states: Mapping[str, np.ndarray], description: dict[str, Any], keep: int,
    *, monitors: Mapping[str, np.ndarray] | None = None, folder: str = FOLDER, arrays: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write a checkpoint of `description["step"]` into `folder` of the run and drop all but the newest `keep`. Returns its own folder.

    `arrays`: the model's, where it does not hold all of them itself. In another folder than the checkpoints' own all others are dropped,
    whatever their step. Raises RunError if it cannot be written; what was written of it is gone then, so that a full disk gets its room back.
    """
    root = run / folder
    target = root / f"{_PREFIX}{description['step']:08d}"
    temporary = root / f"{_WRITING}{target.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(f"{_WRITING}*"):
            shutil.rmtree(left)
        if target.exists():
            if _problem(target) is None:
                return target
            shutil.rmtree(target)
        temporary.mkdir()
        save_arrays(model.name, model.config, model.arrays() if arrays is None else arrays, temporary / "model", dtype=model.dtype)
        kinds = {"optimiser": optimiser, "states": states, "monitors": monitors or {}}
        write_arrays(temporary / _TRAINING, {f"{kind}.{name}": value for kind, arrays in kinds.items() for name, value in arrays.items()})
        flush(temporary / _TRAINING)
        files = {path.relative_to(temporary).as_posix(): digest(path) for path in sorted(temporary.rglob("*")) if path.is_file()}
        (temporary / _DESCRIPTION).write_text(json.dumps({**description, "files": files}, indent=1) + "\n", encoding="utf-8")
        flush(temporary / _DESCRIPTION)
        flush(temporary / "model")
        flush(temporary)
        os.rename(temporary, target)
        flush(root)
        for old in _folders(root)[keep:] if folder == FOLDER else [other for other in _folders(root) if other != target]:
            _discard(old)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(f"checkpoint: cannot write {target}: {error.strerror or error}") from error
    return target


def newest(run: Path, passed: list[str] | None = None) -> Checkpoint | None:
    """The newest checkpoint that can be read; one line on stderr, and in `passed`, for each newer one that cannot."""
    for folder in _folders(run / FOLDER):
        problem = _problem(folder)
        if problem is None:
            try:
                return _read(folder)
            except (OSError, ValueError) as error:
                problem = str(error)
        line = f"checkpoint {folder} is passed over: {problem}"
        print(f"groundwave: {line}", file=sys.stderr)
        if passed is not None:
            passed.append(line)
    return None


def good(run: Path, tried: Collection[int], most: int) -> Checkpoint | None:
    """The newest readable one of the last `most` checkpoints of a good state, but for those of the steps `tried`."""
    found = 0
    for folder in _folders(run / FOLDER):
        try:
            described = _description(folder)
            if not described.get("good"):
                continue
            found += 1
            if found > most:
                return None
            if described["step"] not in tried and _problem(folder) is None:
                return _read(folder)
        except (OSError, ValueError):
            continue
    return None


def best(run: Path, config: TrainConfig) -> tuple[int, float] | None:
    """Step and validation, bits per byte, of the golden checkpoint; None where there is none that can be read, of this configuration."""
    readable = map(_description, [folder for folder in _folders(run / GOLDEN) if _problem(folder) is None])
    found = [(float(each["validation"]), int(each["step"])) for each in readable if not config_differences(each.get("config", {}), config)]
    return min(found)[::-1] if found else None


def newest_run(output: Path, config: TrainConfig) -> Path | None:
    """The run folder below `output` with a checkpoint of this configuration that was written last."""
    found = []
    for folder in output.glob(f"*/{FOLDER}"):
        for checkpoint in _folders(folder)[:1]:
            try:
                description = _description(checkpoint)
            except (OSError, ValueError):
                continue
            if not config_differences(description.get("config", {}), config):
                found.append((checkpoint.stat().st_mtime, folder.parent))
    return max(found)[1] if found else None


def check_run(folder: Path) -> None:
    """Raise RunError unless a run can go on or begin in `folder`: one that holds something else was not meant."""
    if not folder.is_dir():
        return
    held = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if held and not {FOLDER, GOLDEN, "config.yaml", "run.lock"} & set(held):
        raise RunError(f"run_dir: {folder} is no run's folder, it holds {', '.join(held[:3])}; expected a folder with {FOLDER}, or a new one")


def config_differences(before: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """One line for every field that changes what is computed and differs from the configuration of a checkpoint."""
    now = _fields(json.loads(json.dumps(dataclasses.asdict(config))))  # through JSON: tuples are lists there
    then = _fields(before)
    return [f"{name} was {then.get(name)!r}, is {now.get(name)!r}" for name in sorted(now.keys() | then.keys()) if now.get(name) != then.get(name)]


def _fields(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in tree.items():
        full = f"{path}{name}"
        if full not in _FREE:
            fields |= _fields(value, f"{full}.") if isinstance(value, Mapping) else {full: value}
    return fields


def _folders(root: Path) -> list[Path]:
    """Checkpoint folders, the newest first."""
    return sorted((path for path in root.glob(f"{_PREFIX}*") if path.is_dir()), key=lambda path: path.name, reverse=True)


def _description(folder: Path) -> dict[str, Any]:
    described = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
    if not isinstance(described, dict) or not isinstance(described.get("step"), int) or not isinstance(described.get("files"), dict):
        raise ValueError(f"{_DESCRIPTION} must hold an object with step and files")
    return described


def _problem(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        described = _description(folder)
        for name, expected in described["files"].items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if digest(folder / name) != expected:
                return f"{name} is truncated or altered (its sha256 is not the one recorded)"
    except OSError as error:
        return f"{_DESCRIPTION}: {error.strerror or error}"
    except ValueError as error:
        return f"{_DESCRIPTION} is truncated or altered ({error})"
    return None


def _read(folder: Path) -> Checkpoint:
    _, _, arrays, _ = load_arrays(folder / "model")
    training = runtime.read_arrays(folder / _TRAINING)
    parts: dict[str, dict[str, np.ndarray]] = {"optimiser": {}, "states": {}, "monitors": {}}
    for name, value in training.items():
        kind, _, rest = name.partition(".")
        parts[kind][rest] = value
    return Checkpoint(folder, arrays, parts["optimiser"], parts["states"], parts["monitors"], _description(folder))


def _discard(folder: Path) -> None:
    """Delete a checkpoint; a kill in the middle leaves a name that nobody reads."""
    gone = folder.with_name(f"{_WRITING}old-{folder.name}")
    os.rename(folder, gone)
    shutil.rmtree(gone)
