"""Nested arguments and outputs of any framework, seen as named leaves.

A tree is a dict, list, tuple, NamedTuple, dataclass or None around leaves (arrays and Python scalars). Containers of different kinds with
the same names are the same tree: a NamedTuple with fields `ssm` and `wkv` equals a dict with those keys, a list equals a tuple. A leaf is
named by the dotted path to it (`1.0.ssm`); the name of a tree that is a single leaf is the empty string.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

SCALARS = (bool, int, float, complex, str, bytes)


class TreeError(ValueError):
    """Two trees that do not have the same leaves, or a tree whose names are ambiguous."""


def children(tree: Any) -> list[tuple[str, Any]] | None:
    """Named children of a container in its own order; None for a leaf."""
    if isinstance(tree, Mapping):
        return [(str(key), value) for key, value in tree.items()]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return list(zip(tree._fields, tree, strict=True))
    if isinstance(tree, (list, tuple)):
        return [(str(index), value) for index, value in enumerate(tree)]
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type) and not hasattr(tree, "shape"):
        return [(field.name, getattr(tree, field.name)) for field in dataclasses.fields(tree)]
    return None


def _walk(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if tree is None:
        return
    inner = children(tree)
    if inner is None:
        yield prefix, tree
        return
    for name, value in inner:
        yield from _walk(value, f"{prefix}.{name}" if prefix else name)


def named(tree: Any) -> dict[str, Any]:
    """Leaves by dotted name, None left out. Raises TreeError when two leaves have one name."""
    leaves: dict[str, Any] = {}
    for name, leaf in _walk(tree, ""):
        if name in leaves:
            raise TreeError(f"two leaves are named {name!r}")
        leaves[name] = leaf
    return leaves


def listed(tree: Any) -> list[tuple[str, Any]]:
    """Names and leaves in order, None left out; two leaves may have one name."""
    return list(_walk(tree, ""))


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same tree with `function` applied to every leaf; a Mapping becomes a dict."""
    return map_named(lambda _, leaf: function(leaf), tree)


def map_named(function: Callable[[str, Any], Any], tree: Any, prefix: str = "") -> Any:
    """The same tree with `function(name, leaf)` applied to every leaf; a Mapping becomes a dict."""
    if tree is None:
        return None
    inner = children(tree)
    if inner is None:
        return function(prefix, tree)
    values = [map_named(function, value, f"{prefix}.{name}" if prefix else name) for name, value in inner]
    if isinstance(tree, Mapping):
        return dict(zip(tree, values, strict=True))
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*values)
    if isinstance(tree, (list, tuple)):
        return values if isinstance(tree, list) else tuple(values)
    return dataclasses.replace(tree, **{name: value for (name, _), value in zip(inner, values, strict=True)})


def like(template: Any, tree: Any) -> Any:
    """The leaves of `tree` in the containers of `template`; `tree` itself when the two do not have the same leaves."""
    leaves = named(tree)
    return map_named(lambda name, _: leaves[name], template) if set(leaves) == set(named(template)) else tree


def signature(tree: Any) -> tuple:
    """Hashable description: containers, names, and of each leaf its shape and dtype or, for a Python scalar, its value."""
    if tree is None:
        return ("none",)
    inner = children(tree)
    if inner is None:
        if isinstance(tree, SCALARS):
            return ("static", type(tree).__name__, tree)
        return ("array", tuple(tree.shape), str(tree.dtype))
    return (type(tree).__name__, tuple((name, signature(value)) for name, value in inner))


@dataclasses.dataclass(frozen=True)
class Slot:
    """Stands for the `index`-th array in a packed tree."""

    index: int


def pack(tree: Any, dynamic: Callable[[Any], bool]) -> tuple[list[Any], Any]:
    """Separate a tree into the leaves for which `dynamic` holds and the rest of it, with a Slot in the place of each."""
    arrays: list[Any] = []

    def take(leaf: Any) -> Any:
        if not dynamic(leaf):
            return leaf
        arrays.append(leaf)
        return Slot(len(arrays) - 1)

    return arrays, map_leaves(take, tree)


def unpack(arrays: list[Any], structure: Any) -> Any:
    """Inverse of `pack`; Slot is a dataclass, so it is looked for before containers are opened."""
    if isinstance(structure, Slot):
        return arrays[structure.index]
    if structure is None:
        return None
    inner = children(structure)
    if inner is None:
        return structure
    values = [unpack(arrays, value) for _, value in inner]
    if isinstance(structure, Mapping):
        return dict(zip(structure, values, strict=True))
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        return type(structure)(*values)
    if isinstance(structure, (list, tuple)):
        return values if isinstance(structure, list) else tuple(values)
    return dataclasses.replace(structure, **{name: value for (name, _), value in zip(inner, values, strict=True)})


def same_names(reference: Mapping[str, Any], candidate: Mapping[str, Any]) -> None:
    """Raise TreeError, naming the leaves, unless both have the same leaf names and at least one."""
    missing = [name for name in reference if name not in candidate]
    extra = [name for name in candidate if name not in reference]
    if missing or extra:
        parts = [f"{len(reference)} leaves in the reference, {len(candidate)} in the candidate"]
        parts += [f"missing {', '.join(repr(name) for name in missing)}"] if missing else []
        parts += [f"unexpected {', '.join(repr(name) for name in extra)}"] if extra else []
        raise TreeError("; ".join(parts))
    if not reference:
        raise TreeError("nothing to compare: neither side has a leaf")


def is_float(leaf: Any) -> bool:
    """Whether a leaf is an array of floating-point numbers (bfloat16 included), whatever its framework."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and str(dtype).removeprefix("torch.") in ("float64", "float32", "float16", "bfloat16")


def to_grid(array: np.ndarray, dtype: str) -> np.ndarray:
    """The same float64 array with every value rounded to one that `dtype` can hold (float64 returns a copy)."""
    array = np.asarray(array, np.float64)
    if dtype == "float64":
        return array.copy()
    if dtype == "float32":
        return array.astype(np.float32).astype(np.float64)
    if dtype == "float16":
        return array.astype(np.float16).astype(np.float64)
    if dtype == "bfloat16":
        bits = array.astype(np.float32).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
        return rounded.view(np.float32).astype(np.float64)
    raise ValueError(f"dtype must be float64, float32, float16 or bfloat16, found {dtype!r}")
