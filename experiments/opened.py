"""A trained language model as its run left it: configuration, held-out text and weights, for whatever measures it afterwards.

`open_model` takes the folder of a run (its newest readable checkpoint), of its golden checkpoint, of one checkpoint, or of a model that
`runtime.save` wrote by itself, which is measured as the default configuration would be.
"""

from __future__ import annotations

import dataclasses
import json
import typing
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import runtime
from conf.schema import MODELS, LossConfig, TrainConfig
from experiments import checkpoint
from experiments.data import batches, corpus, tokens
from experiments.errors import RunError
from experiments.folder import whole_file
from experiments.report import finite
from experiments.steps import TrainStep, make
from runtime.build import check_backend

EVALUATIONS = "evaluation"  # folder of a run that holds what was measured of it afterwards


@dataclass
class Opened:
    """`config` has the backend that was asked for; `run` is None for a model that no run left."""

    config: TrainConfig
    run: Path | None
    model: Path
    tokenizer: tokens.Tokenizer
    held_out: np.ndarray  # (n,) tokens

    def load(self, backend: str | None = None) -> Any:
        """The model on a backend, that of the configuration unless given. Raises RunError."""
        name = backend or self.config.backend.name
        try:
            return runtime.load(self.model, backend=name, dtype=self.config.backend.dtype)
        except (OSError, ValueError, ImportError) as error:
            raise RunError(f"model: {' '.join(str(error).split())}") from error

    def step(self) -> TrainStep:
        """The model behind the interface of training, whose `evaluate` and `observe` measure it."""
        return make(self.load(), self.config)


def check(path: str, backend: str | None) -> None:
    """Raise RunError unless `path` is the folder of a model and `backend` one that it has."""
    _, model, config = _located(path)
    _backend(config, backend)
    if not model.is_dir():
        raise RunError(f"model: no folder {model}")


def open_model(path: str, backend: str | None = None, text: str | None = None) -> Opened:
    """The model at `path` with its held-out text, or with that of `text` (a file or folder) in its place. Raises RunError."""
    run, model, config = _located(path)
    config = _backend(config, backend)
    if text is not None:
        if config.data.tokenizer != "bytes":
            raise RunError(f"path: the tokens of this model are of the text that it was trained on ({config.data.tokenizer}); leave path out")
        config = replace(config, data=replace(config.data, path=text))
    read = corpus.load(config.data)
    tokenizer = tokens.tokenizer(config.data, read)
    held_out = batches.held_out(batches.encode(read.validation, tokenizer))
    return Opened(config, run, model, tokenizer, held_out)


def group(path: str) -> str | None:
    """The tracker's group of the run that `path` is of: its own, or that of its sweep. Raises RunError."""
    run, _, config = _located(path)
    sweep = run is not None and (run.parent / "multirun.yaml").is_file()
    return config.tracker.group or (run.parent.name if run is not None and sweep else None)


def _backend(config: TrainConfig, backend: str | None) -> TrainConfig:
    name = backend or config.backend.name
    try:
        check_backend(config.architecture, name)
    except (ValueError, ImportError) as error:
        raise RunError(f"backend: {error}") from error
    return config if name == "cython" else replace(config, backend=replace(config.backend, name=name))


def _located(path: str) -> tuple[Path | None, Path, TrainConfig]:
    """The run, the folder of the model and the run's configuration."""
    folder = Path(path)
    if not folder.is_dir():
        raise RunError(f"model: no folder {folder}; expected that of a run, of one of its checkpoints or of a saved language model")
    if (folder / checkpoint.FOLDER).is_dir():
        found = checkpoint.newest(folder)
        if found is None:
            raise RunError(f"model: {folder} holds no checkpoint that can be read")
        return folder, found.path / "model", configuration(found.description["config"])
    steps = sorted(folder.glob("step-*/checkpoint.json"))
    holder = steps[-1].parent if steps else folder.parent if (folder.parent / "checkpoint.json").is_file() and folder.name == "model" else folder
    if (holder / "checkpoint.json").is_file():
        try:
            description = json.loads((holder / "checkpoint.json").read_text(encoding="utf-8"))
            return holder.parent.parent, holder / "model", configuration(description["config"])
        except (OSError, ValueError, KeyError) as error:
            raise RunError(f"model: {holder / 'checkpoint.json'} cannot be read: {error}") from error
    if not (folder / "config.json").is_file():
        raise RunError(f"model: {folder} holds neither {checkpoint.FOLDER}/, checkpoint.json nor config.json, so it is no run, checkpoint or model")
    return None, folder, _alone(folder)


def _alone(folder: Path) -> TrainConfig:
    """The default configuration around a model that no run left."""
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name, fields, dtype = saved["model"], saved["config"], saved["dtype"]
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"model: {folder / 'config.json'} cannot be read: {error}") from error
    if name not in MODELS:
        raise RunError(f"model: {folder} holds a {name}; expected one of {', '.join(MODELS)}")
    default = TrainConfig()
    model = MODELS[name](**fields)
    return replace(
        default, architecture=name, model=model, loss=LossConfig(state_penalty=[]), backend=replace(default.backend, name="torch", dtype=dtype),
        data=replace(default.data, path=None),
    )


def configuration(fields: Mapping[str, Any]) -> TrainConfig:
    """A configuration from the plain one of a checkpoint; fields that it lacks have their defaults, those that are gone are left out."""
    try:
        architecture = fields["architecture"]
        model = _object(MODELS[architecture], fields["model"])
        return typing.cast(TrainConfig, _object(TrainConfig, {**fields, "model": model, "resume": "none", "run_dir": None}))
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"model: the configuration of its run cannot be read: {error}") from error


def _object(kind: Any, fields: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(kind)
    given = {field.name: fields[field.name] for field in dataclasses.fields(kind) if field.name in fields}
    sections = {name for name, value in given.items() if dataclasses.is_dataclass(hints[name]) and isinstance(value, Mapping)}
    return kind(**{name: _object(hints[name], value) if name in sections else value for name, value in given.items()})


def keep(run: Path | None, task: str, values: dict[str, Any]) -> None:
    """Leave the numbers of a task in the run's own folder; one that cannot be written into is warned of."""
    if run is None:
        return
    try:
        whole_file(run / EVALUATIONS / f"{task}.json", json.dumps(finite(values), indent=1) + "\n")
    except RunError as error:
        warnings.warn(f"the run's own folder does not get the numbers of {task}: {error}", RuntimeWarning, stacklevel=2)
