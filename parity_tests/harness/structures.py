"""Trees of arguments and outputs as JSON beside named arrays: the containers are kept, an array is named by where it was first seen."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np


class StructureError(ValueError):
    """A tree that holds something other than containers, arrays and plain values, or a structure that is none."""


class Arrays:
    """Named arrays, each written once. `take` gives the structure of a tree and keeps its arrays, `give` makes the tree again."""

    def __init__(self, held: Mapping[str, np.ndarray] | None = None) -> None:
        self.held: dict[str, np.ndarray] = dict(held or {})
        self._names: dict[bytes, str] = {}

    def put(self, name: str, value: np.ndarray) -> str:
        """Keep an array under a name, unless the same is held; the name under which it is held."""
        value = np.asarray(value)
        if value.dtype.kind not in "fiubc":
            raise StructureError(f"an array of {value.dtype} cannot be written")
        key = hashlib.sha256(f"{value.shape} {value.dtype} ".encode() + np.ascontiguousarray(value).tobytes()).digest()
        if key not in self._names:
            self._names[key] = name
            self.held[name] = np.array(value, order="C", copy=True)
        return self._names[key]

    def take(self, prefix: str, value: Any) -> Any:
        """The structure of a tree; its arrays are kept under `prefix` and the dotted path to them. Raises StructureError."""
        kind = type(value).__name__
        if isinstance(value, (np.ndarray, np.generic)):
            return {"array": self.put(prefix, value)}
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"value": value}

        def each(items: Any) -> list:
            return [[key, self.take(_below(prefix, key), item)] for key, item in items]

        if isinstance(value, Mapping):
            if not all(isinstance(key, (str, int)) and not isinstance(key, bool) for key in value):
                raise StructureError(f"a {kind} with keys that are no names")
            return {"dict": each(value.items())}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return {"namedtuple": each(zip(value._fields, value, strict=True)), "name": kind}
        if isinstance(value, (list, tuple)):
            return {"list" if isinstance(value, list) else "tuple": each(enumerate(value))}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {"dataclass": each((field.name, getattr(value, field.name)) for field in dataclasses.fields(value)), "name": kind}
        raise StructureError(f"it holds a {type(value).__module__}.{kind}")

    def give(self, structure: Any) -> Any:
        """The tree of a structure; named tuples and dataclasses are made anew, with the same fields. Raises StructureError."""
        if not isinstance(structure, dict) or not structure:
            raise StructureError(f"no structure: {structure!r}")
        kind, content = next(iter(structure.items()))
        if kind == "value":
            return content
        if kind == "array":
            if content not in self.held:
                raise StructureError(f"the array {content!r} is not there")
            return self.held[content]
        values = {key: self.give(item) for key, item in content}
        if kind == "dict":
            return values
        if kind == "list":
            return list(values.values())
        if kind == "tuple":
            return tuple(values.values())
        if kind == "namedtuple":
            return _class(structure["name"], tuple(values), True)(**values)
        if kind == "dataclass":
            return _class(structure["name"], tuple(values), False)(**values)
        raise StructureError(f"a structure of kind {kind!r}")


def _below(prefix: str, key: Any) -> str:
    head, _, last = prefix.rpartition("/")
    plain = last in ("args", "kwargs", "outputs", "inputs", "states", "parameters", "arrays")
    return f"{prefix}/{key}" if plain else f"{head}/{last}.{key}"


@functools.cache
def _class(name: str, fields: tuple[str, ...], plain: bool) -> Any:
    """One class for all that have a name and fields in common, as JAX expects of what goes into a program and comes out of it."""
    return collections.namedtuple(name, fields) if plain else dataclasses.make_dataclass(name, fields)
