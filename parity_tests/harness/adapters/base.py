"""What every adapter offers, in NumPy: leaves, modules, a tapped run, one layer by itself, gradients, and a training run."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .. import tree
from ..case import CaseError, Trajectory


@dataclass(frozen=True)
class Leaf:
    """A parameter or buffer. `layer` is the kind of the module that owns it, `shared` the leaf whose memory it shares."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    layer: str
    shared: str | None = None

    @property
    def module(self) -> str:
        """Dotted path of the module that owns the leaf."""
        return self.name.rpartition(".")[0]

    @property
    def attribute(self) -> str:
        """Name of the leaf inside its module."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Node:
    """A module: its path, its kind of layer, the settings the lint looks at, and its class, whose source the lint reads."""

    path: str
    layer: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    cls: type | None = None


@dataclass
class Call:
    """One call of a module: arguments as they were before the call, outputs after it, all in NumPy."""

    path: str
    index: int
    args: tuple
    kwargs: dict
    outputs: Any


@dataclass
class Run:
    """Outputs of the model, calls of its modules in the order in which they ended, and what the run changed that it must not change.

    `untapped` are modules whose calls could not be recorded; `written` says which argument a module wrote to.
    """

    outputs: Any
    calls: list[Call]
    effects: list[str] = field(default_factory=list)
    untapped: frozenset[str] = frozenset()
    written: dict[str, str] = field(default_factory=dict)


@dataclass
class Gradients:
    """Loss and gradients: `parameters` by leaf name; `inputs` by `input.NAME`, `state.NAME` or `args.NAME`."""

    loss: float
    parameters: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]


@dataclass
class Trained:
    """Loss of every step and all leaves after the last."""

    losses: np.ndarray
    arrays: dict[str, np.ndarray]


class Unsupported(NotImplementedError):
    """The adapter cannot do this (a plain function has no gradients); the battery reports the tier as not run."""


class Adapter(Protocol):
    """A model in one precision. Arrays given are NumPy; floats are cast to that precision; arrays returned are copies."""

    kind: str
    dtype: str

    def leaves(self) -> dict[str, Leaf]: ...

    def modules(self) -> dict[str, Node]: ...

    def load(self, arrays: Mapping[str, np.ndarray]) -> None: ...

    def arrays(self) -> dict[str, np.ndarray]: ...

    def run(self, inputs: Mapping[str, np.ndarray], states: Any = None, *, tap: bool = True, quick: bool = True) -> Run: ...

    def call(self, path: str, args: tuple, kwargs: dict) -> Any: ...

    def gradients(self, inputs: Mapping[str, np.ndarray], states: Any, seed: int) -> Gradients: ...

    def call_gradients(self, path: str, args: tuple, kwargs: dict, seed: int) -> Gradients: ...

    def train(self, batches: Sequence[Mapping[str, np.ndarray]], trajectory: Trajectory, seed: int) -> Trained: ...


def cotangent(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The fixed random direction onto which an output leaf is projected for gradients; the same for both sides."""
    values = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape)
    return np.asarray(values / np.sqrt(max(1, values.size)))


def target(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """What the default loss draws an output leaf towards: 1/2 mean (output - target)^2, summed over leaves.

    Bounded below, so that a training run goes somewhere and does not multiply rounding without end, as a linear loss does.
    """
    return np.asarray(np.random.default_rng([seed, zlib.crc32(name.encode()), 2]).standard_normal(shape))


def digest(value: Any) -> str:
    """Hash of the names, shapes, dtypes and bytes of a tree of NumPy arrays and scalars."""
    state = hashlib.sha256()
    for name, leaf in tree.named(value).items():
        if isinstance(leaf, np.ndarray):
            state.update(f"{name} {leaf.shape} {leaf.dtype}".encode())
            state.update(np.ascontiguousarray(leaf).tobytes())
        else:
            state.update(f"{name} {leaf!r}".encode())
    return state.hexdigest()


def within(limit: int, held: int, path: str, value: Any) -> int:
    """Bytes held when the arrays of `value`, which a call of `path` was given or gave, are kept as well. Raises CaseError above the limit."""
    held += sum(math.prod(leaf.shape) * leaf.dtype.itemsize for _, leaf in tree.listed(value) if hasattr(leaf, "dtype"))
    if held > limit:
        raise CaseError(f"what the modules of one run take and give is more than tap_limit, {limit:,} bytes (reached at "
                        f"{path or 'the model'}): make the inputs smaller, or give the case a higher tap_limit")
    return held


def joined(*parts: str) -> str:
    """Dotted path of the parts that are not empty."""
    return ".".join(part for part in parts if part)


def check_names(given: Mapping[str, np.ndarray], expected: Mapping[str, Leaf]) -> None:
    """Raise ValueError unless the arrays are exactly the leaves, by name and shape."""
    missing, extra = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    if missing or extra:
        raise ValueError(f"weights do not fit the model: missing {missing or 'none'}, unexpected {extra or 'none'}")
    for name, leaf in expected.items():
        if tuple(np.shape(given[name])) != leaf.shape:
            raise ValueError(f"weight {name} has shape {tuple(np.shape(given[name]))}, expected {leaf.shape}")
