"""Files of arrays: reading `.safetensors`, `.npz` and `.pt` without unpickling, and writing a set of files that a kill cannot mix.

A saved set is `config.json` and the files that it lists with their sizes and sha256. New files are first written whole under names that
hold their sha256; replacing `config.json` is the one step that makes them the saved ones; then they are renamed into place. Whoever
reads looks for the pending name first, so at every moment the directory holds the old set complete or the new one complete.
Files that no `config.json` lists are never touched, but for pending ones that an interrupted write left.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

CONFIG = "config.json"
_PENDING = re.compile(r"\.[A-Za-z0-9][A-Za-z0-9._-]*\.(writing|[0-9a-f]{64}\.pending)")
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_OURS = re.compile(r"model.*\.(safetensors|index\.json)|(manifest|proof_of_learning)\.json")
_PREFERRED = ("model_state_dict", "state_dict", "model")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """One safetensors file. `format: pt` so that torch's readers accept it; contiguous, or safetensors writes other numbers.

    Raises OSError where the file cannot be written.
    """
    try:
        save_file({key: np.ascontiguousarray(value).reshape(np.shape(value)) for key, value in arrays.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:  # its own type even for a full disk
        raise OSError(f"cannot write {path}: {error}") from error


def header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype as safetensors spells it) of a safetensors file; no array is read. ValueError, naming it, for a broken file."""
    try:
        with safe_open(path, framework="numpy") as file:
            return {key: (tuple(file.get_slice(key).get_shape()), file.get_slice(key).get_dtype()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Flat dict of arrays of a `.safetensors`, `.npz`, `.pt`, `.pth` or `.bin` file. Nothing is unpickled but by torch's weights_only reader.

    A torch file may hold the state dict itself or have it under "model_state_dict", "state_dict" or "model"; bfloat16 becomes float32.
    Raises ValueError, naming the file, for one that is broken, holds anything but arrays, or has another ending.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if path.suffix == ".safetensors":
        header(path)
        with safe_open(path, framework="numpy") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if path.suffix == ".npz":
        try:
            with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as file:
                return {key: file[key] for key in file.files}
        except (ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{path} is truncated or holds more than plain arrays: {error}") from error
    if path.suffix in (".pt", ".pth", ".bin"):
        return _read_torch(path)
    raise ValueError(f"{path} must end in .safetensors, .npz, .pt, .pth or .bin")


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"reading {path} needs PyTorch: pip install 'groundwave[torch]'") from error
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is truncated or holds more than tensors: {reason}") from error
    if isinstance(held, Mapping):
        held = next((held[key] for key in _PREFERRED if isinstance(held.get(key), Mapping)), held)
    if not isinstance(held, Mapping) or not held:
        raise ValueError(f"{path} must hold a state dict, found {type(held).__name__}")
    others = [str(key) for key, value in held.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(f"{path} must hold a state dict of tensors, found other things under {', '.join(others[:8])}")
    return {str(key): (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy() for key, value in held.items()}


def digest(path: Path) -> str:
    """sha256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_set(directory: Path, description: Mapping[str, Any], writers: Mapping[str, Callable[[Path], None]]) -> None:
    """Write files and the `config.json` that commits them; `writers`: file name -> function that writes it at the path given.

    `description` becomes `config.json` with the entry "files" (name -> bytes, sha256) added. Raises OSError where it cannot write,
    FileExistsError where there is a `config.json` that was not written here.
    """
    directory.mkdir(parents=True, exist_ok=True)
    replaced = _listed(directory)
    settle(directory)
    files = {}
    for name, writer in writers.items():
        temporary = directory / f".{name}.writing"
        writer(temporary)
        flush(temporary)
        files[name] = {"bytes": temporary.stat().st_size, "sha256": digest(temporary)}
        os.replace(temporary, pending_path(directory, name, files[name]["sha256"]))
    temporary = directory / f".{CONFIG}.writing"
    temporary.write_text(json.dumps({**description, "files": files}, indent=2) + "\n", encoding="utf-8")
    flush(temporary)
    flush(directory)
    os.replace(temporary, directory / CONFIG)
    flush(directory)
    settle(directory)
    for name in filter(_OURS.fullmatch, replaced.keys() - files.keys()):
        (directory / name).unlink(missing_ok=True)


def read_set(directory: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """`config.json` of a directory and the path of each file that it lists, sizes and sha256 verified.

    Raises FileNotFoundError where there is no `config.json` or a listed file is gone, ValueError, naming the file, for one that was altered.
    """
    description, paths = find_set(directory)
    verify_set(directory, description, paths)
    return description, paths


def find_set(directory: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """`read_set` without the look at sizes and sha256, which `verify_set` takes."""
    if not (directory / CONFIG).is_file():
        raise FileNotFoundError(f"{directory} holds no {CONFIG}, so it is no saved model")
    description = read_json(directory / CONFIG)
    paths = {}
    for name, facts in _files(directory, description).items():
        path = pending_path(directory, name, facts["sha256"])
        paths[name] = path if path.is_file() else directory / name
        if not paths[name].is_file():
            raise FileNotFoundError(f"{directory / CONFIG} lists {name}, which is not there")
    return description, paths


def verify_set(directory: Path, description: Mapping[str, Any], paths: Mapping[str, Path]) -> None:
    """Hold what `find_set` found to `config.json`. Raises ValueError, naming the file, for one of another size or sha256."""
    for name, facts in _files(directory, description).items():
        path = paths[name]
        size = path.stat().st_size
        if size != facts["bytes"]:
            word = "truncated" if size < facts["bytes"] else "altered"
            raise ValueError(f"{path} is {word}: it has {size} bytes, {CONFIG} says {facts['bytes']}")
        if digest(path) != facts["sha256"]:
            raise ValueError(f"{path} is altered: its sha256 is not the one in {CONFIG}")


def is_saved_set(directory: Path) -> bool:
    """Whether `config.json` is one that `runtime.save` wrote: only those list the files of their set."""
    config = directory / CONFIG
    return config.is_file() and {"model", "files"} <= read_json(config).keys()


def pending_path(directory: Path, name: str, sha256: str) -> Path:
    """Where a file waits between being written and being renamed to `name`."""
    return directory / f".{name}.{sha256}.pending"


def settle(directory: Path) -> None:
    """Finish or clear away what an interrupted `write_set` left."""
    for name, facts in _listed(directory).items():
        waiting = pending_path(directory, name, facts["sha256"])
        if waiting.is_file():
            os.replace(waiting, directory / name)
    for path in directory.iterdir():
        if _PENDING.fullmatch(path.name) and path.is_file():
            path.unlink()
    flush(directory)


def _listed(directory: Path) -> dict[str, dict[str, Any]]:
    """The files that the directory's `config.json` lists, none where there is none; FileExistsError where it is somebody else's."""
    if not (directory / CONFIG).is_file():
        return {}
    try:
        return _files(directory, read_json(directory / CONFIG))
    except ValueError as error:
        raise FileExistsError(f"will not replace {directory / CONFIG}, which is not that of a saved model: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file. ValueError, naming it, for anything else."""
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(description, dict):
        raise ValueError(f"{path} must hold one JSON object, found {type(description).__name__}")
    return description


def _files(directory: Path, description: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    files = description.get("files")
    sound = isinstance(files, dict) and all(
        _SAFE_NAME.fullmatch(name) and isinstance(facts, dict) and isinstance(facts.get("bytes"), int) and isinstance(facts.get("sha256"), str)
        and re.fullmatch("[0-9a-f]{64}", facts["sha256"])
        for name, facts in files.items()
    )
    if not sound:
        raise ValueError(f'{directory / CONFIG} must list its files as "files": {{name: {{"bytes": n, "sha256": hexadecimal}}}}')
    return files


def flush(path: Path) -> None:
    """Force a file or a directory's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
