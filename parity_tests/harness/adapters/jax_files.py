"""Files of Flax's own: a nested dict as msgpack (`flax.serialization`) and Orbax checkpoints, read and written as flat named arrays."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import serialization
from flax.traverse_util import unflatten_dict

from .. import tree


def nested(arrays: Mapping[str, np.ndarray]) -> dict:
    """`a.b.c` -> array as {"a": {"b": {"c": array}}}. Raises ValueError for a name that is the beginning of another."""
    for name in arrays:
        inside = next((other for other in arrays if other.startswith(f"{name}.")), None)
        if inside is not None:
            raise ValueError(f"{name!r} is an array and holds {inside!r}, which a nested dict cannot say")
    return unflatten_dict({tuple(name.split(".")): value for name, value in arrays.items()})


def flat(content: Any) -> dict[str, np.ndarray]:
    """The arrays of a tree by dotted name; half precision becomes float32, which holds its values exactly.

    The `value` that NNX puts between a variable's name and its array is left out. Raises ValueError for a leaf that is no array or number.
    """
    found = {name: _array(name, leaf) for name, leaf in tree.named(content).items()}
    if found and all(name.endswith(".value") for name in found):
        found = {name.removesuffix(".value"): value for name, value in found.items()}
    return found


def _array(name: str, leaf: Any) -> np.ndarray:
    value = np.array(leaf, copy=True)
    if value.dtype.name in ("bfloat16", "float16"):
        value = value.astype(np.float32)
    if value.dtype.kind not in "fiubc":
        raise ValueError(f"{name!r} is a {type(leaf).__name__}, expected an array")
    return value


def load_msgpack(path: Path) -> dict[str, np.ndarray]:
    """The nested dict of a msgpack file, flat. Raises ValueError for a file that holds none."""
    try:
        content = serialization.msgpack_restore(path.read_bytes())
    except (OSError, MemoryError):
        raise
    except Exception as error:  # msgpack has a class of its own for every way to be no file of it
        raise ValueError(f"it is no msgpack of a nested dict ({type(error).__name__})") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}, expected a nested dict")
    return flat(content)


def save_msgpack(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write named arrays as the msgpack of a nested dict, which `flax.serialization.msgpack_restore` reads."""
    path.write_bytes(serialization.msgpack_serialize(nested(arrays)))


@contextmanager
def _quiet() -> Iterator[Any]:
    """orbax.checkpoint, without what it logs about files that it can read."""
    import orbax.checkpoint as orbax

    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield orbax
    finally:
        logger.setLevel(level)


def load_orbax(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an Orbax checkpoint, or of one step of a CheckpointManager, flat. Raises ValueError when there are none."""
    path = path / "default" if (path / "default" / "_METADATA").is_file() else path
    with _quiet() as orbax, orbax.PyTreeCheckpointer() as checkpointer:
        held = checkpointer.metadata(path.absolute()).item_metadata
        if held is None:
            raise ValueError("it holds no tree of arrays")
        ways = jax.tree.map(lambda _: orbax.RestoreArgs(restore_type=np.ndarray), held.tree)
        return flat(checkpointer.restore(path.absolute(), args=orbax.args.PyTreeRestore(restore_args=ways)))


def save_orbax(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write named arrays as an Orbax checkpoint of a nested dict; Orbax makes the folder under another name and renames it."""
    with _quiet() as orbax, orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), nested(arrays))
