"""Files of named arrays. Nothing is ever unpickled.

    NAME.safetensors                    one file
    NAME.safetensors.index.json         shards beside their index, or a folder that holds either
    NAME.npz                            NumPy's archive
    NAME.pt, NAME.pth, NAME.bin         torch's state dict, tensors only
    NAME.msgpack                        Flax's nested dict, {"a": {"b": array}} for the name a.b
    NAME.orbax, or any folder of it     an Orbax checkpoint of such a dict, or one step of a CheckpointManager

Files are written beside their place and renamed, so that an interrupted write leaves what was there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

INDEX = ".safetensors.index.json"
TORCH = (".pt", ".pth", ".bin")
NESTED = (".msgpack", ".orbax")  # Flax's own, which have a place for a collection of variables
SHARD_SIZE = "5GB"
READABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, AttributeError, ImportError, zipfile.BadZipFile)


class FormatError(ValueError):
    """A file of named arrays that cannot be read or written; the message is one line."""


def load(path: str | Path) -> dict[str, np.ndarray]:
    """Named arrays of a file, or of a folder that holds one set of safetensors or an Orbax checkpoint. Raises FormatError with one line."""
    path = Path(path)
    if path.is_dir() and not _is_orbax(path):
        found = sorted(path.glob(f"*{INDEX}")) or sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise FormatError(f"{path} holds {len(found)} safetensors files or indices and no Orbax checkpoint, expected one")
        path = found[0]
    if not path.exists():
        raise FormatError(f"{path} does not exist")
    try:
        return _reader(path)(path)
    except FormatError:
        raise
    except READABLE as error:
        line = str(error).strip().splitlines()
        raise FormatError(f"{path} cannot be read as {path.suffix or 'named arrays'}: {line[0] if line else type(error).__name__}") from error


def _is_orbax(path: Path) -> bool:
    return any((path / part / "_METADATA").is_file() for part in (".", "default"))


def _reader(path: Path) -> Callable[[Path], dict[str, np.ndarray]]:
    if path.is_dir():
        return _from_jax("load_orbax", path)
    if path.name.endswith(INDEX):
        return _load_sharded
    if path.suffix == ".safetensors":
        return load_file
    if path.suffix == ".npz":
        return _load_npz
    if path.suffix in TORCH:
        from .adapters.torch_adapter import load_pt

        return load_pt
    if path.suffix == ".msgpack":
        return _from_jax("load_msgpack", path)
    raise FormatError(f"{path} has an unknown format, expected .safetensors, {INDEX}, .npz, {', '.join(TORCH)}, .msgpack or an Orbax folder")


def _from_jax(name: str, path: Path) -> Callable:
    try:
        from .adapters import jax_files
    except ImportError as error:
        raise FormatError(f"{path} needs Flax to be read or written: {error}; it comes with pip install 'groundwave[jax]'") from error
    return getattr(jax_files, name)


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _load_sharded(path: Path) -> dict[str, np.ndarray]:
    table = json.loads(path.read_text())["weight_map"]
    arrays: dict[str, np.ndarray] = {}
    for shard in sorted(set(table.values())):
        if Path(shard).name != shard:
            raise FormatError(f"{path} names the shard {shard!r}, expected a file beside it")
        held = load_file(path.parent / shard)
        expected = {name for name, place in table.items() if place == shard}
        if set(held) != expected:
            raise FormatError(f"{path.parent / shard} holds other arrays than its index says: {sorted(set(held) ^ expected)[:5]}")
        arrays.update(held)
    return arrays


def save(path: str | Path, arrays: Mapping[str, np.ndarray], *, compressed: bool = False, shard_size: str | int = SHARD_SIZE) -> None:
    """Write named arrays in the format that the name ends in. Raises FormatError with one line.

    `compressed` holds for `.npz`. `shard_size`, bytes or "5GB", is the most that a shard holds beside its index, unless one array is larger.
    """
    path = Path(path)
    # safetensors writes the memory of an array as it lies, so a transposed view would be saved as another matrix
    clean = {name: np.array(value, order="C", copy=True) for name, value in arrays.items()}
    writers: dict[str, Callable[[Path], None]] = {
        ".safetensors": lambda place: save_file(clean, place, metadata={"format": "pt"}),
        ".npz": lambda place: _save_npz(place, clean, compressed),
        **{suffix: lambda place: _save_pt(place, clean) for suffix in TORCH},
        ".msgpack": lambda place: _from_jax("save_msgpack", path)(place, clean),
    }
    try:
        if path.name.endswith(INDEX):
            _save_sharded(path, clean, shard_size)
        elif path.suffix == ".orbax":
            if path.exists():
                raise FormatError(f"{path} exists; an Orbax checkpoint is a folder, which is not written over: remove it or give another name")
            if not path.parent.is_dir():
                raise FormatError(f"{path} cannot be written: the folder {path.parent} does not exist")
            _from_jax("save_orbax", path)(path, clean)
        elif path.suffix in writers:
            with replacing(path) as temporary:
                writers[path.suffix](temporary)
        else:
            raise FormatError(f"{path} has an unknown format, expected one of {', '.join([*writers, INDEX, '.orbax'])}")
    except FormatError:
        raise
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        text = getattr(error, "strerror", None) or str(error)
        raise FormatError(f"{path} cannot be written: {text.splitlines()[0] if text else type(error).__name__}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path`, of the same ending, that takes its place when the context ends well and is removed when it does not."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8. Raises OSError."""
    if path.is_dir():
        raise IsADirectoryError(21, "Is a directory")
    if path.exists() and not path.is_file():  # /dev/stdout and its like cannot be replaced
        path.write_text(text, encoding="utf-8")
        return
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _save_npz(path: Path, arrays: Mapping[str, np.ndarray], compressed: bool) -> None:
    with path.open("wb") as handle:
        (np.savez_compressed if compressed else np.savez)(handle, **arrays)


def _save_pt(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    from .adapters.torch_adapter import save_pt

    save_pt(path, arrays)


def _save_sharded(path: Path, arrays: Mapping[str, np.ndarray], shard_size: str | int) -> None:
    """Shards and their index, as huggingface_hub cuts and names them; all are made elsewhere, and the index is the last to take its place."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise FormatError(f"{path} needs huggingface_hub to be cut into shards; write {path.name.removesuffix(INDEX)}.safetensors, or install it")
    from huggingface_hub import split_state_dict_into_shards_factory as split

    stem = path.name.removesuffix(INDEX)
    parts = split(dict(arrays), get_storage_size=lambda value: value.nbytes, max_shard_size=shard_size,
                  filename_pattern=f"{stem}{{suffix}}.safetensors")
    table = parts.tensor_to_filename or dict.fromkeys(arrays, f"{stem}.safetensors")
    index = {"metadata": {"total_size": sum(value.nbytes for value in arrays.values())}, "weight_map": table}
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{stem}."))
    try:
        for shard, names in parts.filename_to_tensors.items():
            save_file({name: arrays[name] for name in names}, folder / shard, metadata={"format": "pt"})
        (folder / path.name).write_text(json.dumps(index, indent=2) + "\n")
        for name in [*parts.filename_to_tensors, path.name]:
            os.replace(folder / name, path.parent / name)
    finally:
        shutil.rmtree(folder)
