"""Files of named arrays: safetensors (one file, or shards with an index), `.npz`, and torch's `.pt`. Nothing is ever unpickled.

Files are written beside their place and renamed, so that an interrupted write leaves what was there.
"""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

INDEX = ".safetensors.index.json"
TORCH = (".pt", ".pth", ".bin")


class FormatError(ValueError):
    """A file of named arrays that cannot be read or written; the message is one line."""


def load(path: str | Path) -> dict[str, np.ndarray]:
    """Named arrays of a file, or of a directory that holds one set of safetensors. Raises FormatError with one line."""
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob(f"*{INDEX}")) or sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise FormatError(f"{path} holds {len(found)} safetensors files or indices, expected one")
        path = found[0]
    if not path.is_file():
        raise FormatError(f"{path} does not exist")
    try:
        return _reader(path)(path)
    except FormatError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        line = str(error).strip().splitlines()
        raise FormatError(f"{path} cannot be read as {path.suffix or 'named arrays'}: {line[0] if line else type(error).__name__}") from error


def _reader(path: Path) -> Callable[[Path], dict[str, np.ndarray]]:
    if path.name.endswith(INDEX):
        return _load_sharded
    if path.suffix == ".safetensors":
        return load_file
    if path.suffix == ".npz":
        return _load_npz
    if path.suffix in TORCH:
        from .adapters.torch_adapter import load_pt

        return load_pt
    raise FormatError(f"{path} has an unknown format, expected .safetensors, {INDEX}, .npz or {', '.join(TORCH)}")


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


def save(path: str | Path, arrays: Mapping[str, np.ndarray], *, compressed: bool = False) -> None:
    """Write named arrays in the format that the name ends in; `compressed` holds for `.npz`. Raises FormatError with one line."""
    path = Path(path)
    # safetensors writes the memory of an array as it lies, so a transposed view would be saved as another matrix
    clean = {name: np.array(value, order="C", copy=True) for name, value in arrays.items()}
    writers: dict[str, Callable[[Path], None]] = {
        ".safetensors": lambda place: save_file(clean, place, metadata={"format": "pt"}),
        ".npz": lambda place: _save_npz(place, clean, compressed),
        **{suffix: lambda place: _save_pt(place, clean) for suffix in TORCH},
    }
    if path.suffix not in writers:
        raise FormatError(f"{path} has an unknown format, expected one of {', '.join(writers)}")
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    except OSError as error:
        raise FormatError(f"{path} cannot be written: {error.strerror or error}") from error
    os.close(handle)
    try:
        writers[path.suffix](Path(temporary))
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise FormatError(f"{path} cannot be written: {error}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def _save_npz(path: Path, arrays: Mapping[str, np.ndarray], compressed: bool) -> None:
    with path.open("wb") as handle:
        (np.savez_compressed if compressed else np.savez)(handle, **arrays)


def _save_pt(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    from .adapters.torch_adapter import save_pt

    save_pt(path, arrays)
