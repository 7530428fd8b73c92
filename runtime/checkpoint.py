"""Models on disk: `config.json` and `model.safetensors`, written by one backend and read by any.

    directory/config.json                      model, configuration, dtype, parameter count, files with sizes and sha256
    directory/model.safetensors                flat, torch's names; or, above 2 GB:
    directory/model-00001-of-00003.safetensors ... and model.safetensors.index.json
    directory/tokenizer.json                   where a tokenizer belongs to the model
    directory/manifest.json                    of a WaveCore; its proof_of_learning.json is `runtime.core`'s

A tied array is written once, under its first name. How a set is replaced whole: `runtime.files`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from runtime import files
from runtime.arrays import DTYPES, NAMES, check, check_name, check_shapes, layout, parameter_count
from runtime.build import build
from runtime.manifest import MANIFEST, check_count, check_fields, manifest_text, read_manifest

FORMAT = 1
WEIGHTS = "model.safetensors"
INDEX = WEIGHTS + ".index.json"
SHARD_BYTES = 2_000_000_000
_STORED = {"F32": "float32", "F64": "float64", "I64": "int64"}


def save(model: Any, directory: str | os.PathLike[str]) -> None:
    """Write a model made by `build` or `load`; what the directory held before stays valid until all of it is replaced.

    Raises OSError where the directory cannot be written.
    """
    save_arrays(model.name, model.config, model.arrays(), directory, dtype=model.dtype)


def save_arrays(
    name: str,
    config: Any,
    arrays: Mapping[str, np.ndarray],
    directory: str | os.PathLike[str],
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    texts: Mapping[str, str] | None = None,
) -> None:
    """`save` for a flat dict of arrays; floats are stored as `dtype`, files hold at most `shard_bytes` of arrays each.

    `texts`: further files of the set, name -> content. Raises ValueError for arrays that do not fit, ImportError where sharding is needed
    and huggingface_hub is missing.
    """
    checked = check(name, config, arrays, dtype)
    stored = {key: checked[key] for key, entry in layout(name, config).items() if entry.role != "tied"}
    shards, index = _split(stored, shard_bytes)
    writers: dict[str, Callable[[Path], None]] = {
        shard: partial(files.write_arrays, arrays={key: stored[key] for key in keys}) for shard, keys in shards.items()
    }
    if index is not None:
        writers[INDEX] = partial(_write_text, text=json.dumps(index, indent=2) + "\n")
    texts = ({MANIFEST: manifest_text(config)} if name == "wavecore" else {}) | dict(texts or {})
    writers |= {file: partial(_write_text, text=text) for file, text in texts.items()}
    description = {
        "format": FORMAT,
        "model": name,
        "config": dataclasses.asdict(config),
        "dtype": dtype,
        "parameters": parameter_count(name, config),
    }
    files.write_set(Path(directory), description, writers)


def load(directory: str | os.PathLike[str], backend: str = "torch", dtype: str | None = None) -> Any:
    """The model that `save` wrote, on any backend; `dtype` as stored unless given.

    Raises FileNotFoundError for a directory or file that is not there; ValueError, naming the file, for one that is truncated, altered or
    of other sizes than its configuration; ImportError for a backend that is not installed.
    """
    name, config, arrays, stored = load_arrays(directory)
    return build(name, config, backend=backend, arrays=arrays, dtype=stored if dtype is None else dtype)


def load_arrays(directory: str | os.PathLike[str]) -> tuple[str, Any, dict[str, np.ndarray], str]:
    """(model name, configuration, arrays, dtype) of a saved model; everything is checked before an array is read. Raises as `load`."""
    return load_set(directory)[:4]


def load_set(directory: str | os.PathLike[str]) -> tuple[str, Any, dict[str, np.ndarray], str, dict[str, Path]]:
    """`load_arrays`, and the path of every file of the set."""
    directory = Path(directory)
    description, paths = files.find_set(directory)
    name, config, dtype, count = _read_description(directory / files.CONFIG, description)
    if name == "wavecore":  # before the sha256, so that a manifest that lies is told so, and not only that it was altered
        _check_manifest(directory, paths, config)
    files.verify_set(directory, description, paths)
    headers = {path: files.header(path) for file, path in paths.items() if file.endswith(".safetensors")}
    # Before the layout of every block is laid out: a depth that the file cannot have.
    tensors = sum(map(len, headers.values()))
    depth = getattr(config, "depth", 0)
    if depth > tensors:
        raise ValueError(f"{directory / files.CONFIG} says depth={depth}, but the files hold {tensors} arrays")
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for path, entries in headers.items():
        twice = found.keys() & entries.keys()
        if twice:
            raise ValueError(f"{path} holds {sorted(twice)[0]}, which another file of {directory} holds too")
        found |= {key: (shape, _kind(stored, dtype)) for key, (shape, stored) in entries.items()}
    check_shapes(name, config, found, what=f"the arrays in {directory}")
    _check_count(directory, name, config, found, count)
    arrays: dict[str, np.ndarray] = {}
    for path in headers:
        with safe_open(path, framework="numpy") as file:
            arrays |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return name, config, arrays, dtype, paths


def _read_description(path: Path, description: Mapping[str, Any]) -> tuple[str, Any, str, int]:
    expected = {"format": int, "model": str, "config": dict, "dtype": str, "parameters": int}
    wrong = [key for key, kind in expected.items() if not isinstance(description.get(key), kind)]
    if wrong:
        raise ValueError(f"{path} must hold {', '.join(expected)}; missing or of the wrong type: {', '.join(wrong)}")
    if description["format"] != FORMAT:
        raise ValueError(f"{path} has format {description['format']}, this version reads format {FORMAT}")
    if description["dtype"] not in DTYPES:
        raise ValueError(f"{path}: dtype must be 'float32' or 'float64', found {description['dtype']!r}")
    try:
        check_name(description["model"])
        kind = NAMES[description["model"]]
        fields = {field.name for field in dataclasses.fields(kind)}
        if fields != description["config"].keys():
            missing, unknown = sorted(fields - description["config"].keys()), sorted(description["config"].keys() - fields)
            raise ValueError(f"config has missing fields {missing} and unknown fields {unknown}")
        config = kind(**description["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return description["model"], config, description["dtype"], description["parameters"]


def _check_manifest(directory: Path, paths: Mapping[str, Path], config: Any) -> None:
    path = paths.get(MANIFEST, directory / MANIFEST)
    manifest = read_manifest(path)
    check_count(path, manifest, parameter_count("wavecore", config))
    check_fields(path, manifest.get("config", {}), directory / files.CONFIG, dataclasses.asdict(config))


def _kind(stored: str, dtype: str) -> str:
    """Kind of a stored dtype for `check_shapes`; a float of another width than config.json says keeps its spelling and is refused."""
    spelled = _STORED.get(stored, stored)
    return {dtype: "float", "int64": "int"}.get(spelled, spelled)


def _check_count(directory: Path, name: str, config: Any, found: Mapping[str, Any], count: int) -> None:
    entries = layout(name, config)
    held = sum(math.prod(shape) for key, (shape, _) in found.items() if entries[key].role == "parameter")
    if held != count:
        raise ValueError(f"{directory / files.CONFIG} says {count} parameters, the files hold {held}")


def _split(arrays: Mapping[str, np.ndarray], shard_bytes: int) -> tuple[dict[str, list[str]], dict[str, Any] | None]:
    """File name -> names of its arrays, and the index where there is more than one file."""
    if sum(value.nbytes for value in arrays.values()) <= shard_bytes:
        return {WEIGHTS: list(arrays)}, None
    try:
        from huggingface_hub import split_state_dict_into_shards_factory
    except ImportError as error:
        raise ImportError(f"a model of more than {shard_bytes} bytes is written in shards, which needs: pip install huggingface_hub") from error
    split = split_state_dict_into_shards_factory(
        dict(arrays), get_storage_size=lambda value: value.nbytes, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    # The split begins with an empty shard when the very first array is larger than the limit.
    shards = {shard: keys for shard, keys in split.filename_to_tensors.items() if keys}
    if len(shards) == 1:
        return {WEIGHTS: list(arrays)}, None
    return shards, {"metadata": split.metadata, "weight_map": split.tensor_to_filename}


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
