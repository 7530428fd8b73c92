"""Weight-map algebra: named arrays of the reference to named arrays of the candidate and back, bit for bit.

A `Rule` takes source leaves through operations to target leaves; every operation carries its inverse, so the same map converts both ways
and carries gradients back. Every source leaf is used once, every target leaf is set once, ties are declared; results are always copies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class ConversionError(ValueError):
    """Names, shapes or values that do not fit the map; the message lists every problem."""


class Operation(Protocol):
    """Takes a list of arrays to a list of arrays; `inverse` takes it back exactly."""

    def forward(self, arrays: list[np.ndarray]) -> list[np.ndarray]: ...

    def inverse(self, arrays: list[np.ndarray]) -> list[np.ndarray]: ...


@dataclass(frozen=True)
class Transpose:
    """Axes reordered: `axes` as in np.transpose."""

    axes: tuple[int, ...]

    def forward(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        return [self._apply(array, self.axes) for array in arrays]

    def inverse(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        return [self._apply(array, tuple(int(axis) for axis in np.argsort(self.axes))) for array in arrays]

    @staticmethod
    def _apply(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
        if array.ndim != len(axes):
            raise ConversionError(f"a transposition of {len(axes)} axes met shape {array.shape}")
        return np.transpose(array, axes)


@dataclass(frozen=True)
class Reshape:
    """Shape `source` to shape `target`, in C order."""

    source: tuple[int, ...]
    target: tuple[int, ...]

    def __post_init__(self) -> None:
        if math.prod(self.source) != math.prod(self.target):
            raise ConversionError(f"shape {self.source} cannot become {self.target}")

    def forward(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        return [self._apply(array, self.source, self.target) for array in arrays]

    def inverse(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        return [self._apply(array, self.target, self.source) for array in arrays]

    @staticmethod
    def _apply(array: np.ndarray, expected: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        if array.shape != tuple(expected):
            raise ConversionError(f"a reshape expected {tuple(expected)}, found {array.shape}")
        return array.reshape(shape)


@dataclass(frozen=True)
class HeadPermutation:
    """`heads` equal blocks along `axis`, reordered: block i of the target is block order[i] of the source."""

    order: tuple[int, ...]
    axis: int = 0

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(len(self.order))):
            raise ConversionError(f"a head permutation names each of 0..{len(self.order) - 1} once, found {self.order}")

    def forward(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        return [self._apply(array, list(self.order)) for array in arrays]

    def inverse(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        return [self._apply(array, [int(place) for place in np.argsort(self.order)]) for array in arrays]

    def _apply(self, array: np.ndarray, order: list[int]) -> np.ndarray:
        if not -array.ndim <= self.axis < array.ndim or array.shape[self.axis] % len(order):
            raise ConversionError(f"{len(order)} heads do not divide axis {self.axis} of shape {array.shape}")
        blocks = np.split(array, len(order), axis=self.axis)
        return np.concatenate([blocks[place] for place in order], axis=self.axis)


@dataclass(frozen=True)
class Split:
    """One array cut along `axis` into parts of the given sizes."""

    axis: int
    sizes: tuple[int, ...]

    def forward(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        if len(arrays) != 1:
            raise ConversionError(f"a split takes one array, found {len(arrays)}")
        if arrays[0].shape[self.axis] != sum(self.sizes):
            raise ConversionError(f"a split into {self.sizes} met axis {self.axis} of shape {arrays[0].shape}")
        return np.split(arrays[0], np.cumsum(self.sizes)[:-1], axis=self.axis)

    def inverse(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        found = tuple(array.shape[self.axis] for array in arrays)
        if found != tuple(self.sizes):
            raise ConversionError(f"parts of sizes {tuple(self.sizes)} along axis {self.axis} expected, found {found}")
        return [np.concatenate(arrays, axis=self.axis)]


@dataclass(frozen=True)
class Concat:
    """Several arrays joined along `axis`; their sizes make the way back possible."""

    axis: int
    sizes: tuple[int, ...]

    def forward(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        return Split(self.axis, self.sizes).inverse(arrays)

    def inverse(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        return Split(self.axis, self.sizes).forward(arrays)


class Constant:
    """A leaf that only one side has and that always holds the same value: made on that side, checked and left out on the way back.

    In a rule without sources it is a leaf of the candidate, in a rule without targets one of the reference.
    """

    def __init__(self, value: np.ndarray | float | int) -> None:
        self.value = np.asarray(value)

    def forward(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        return self._toggle(arrays)

    def inverse(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        return self._toggle(arrays)

    def _toggle(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        if not arrays:
            return [self.value]
        if len(arrays) != 1 or arrays[0].shape != self.value.shape or not np.array_equal(arrays[0], self.value):
            raise ConversionError(f"a constant of shape {self.value.shape} expected, found {[array.shape for array in arrays]} or other values")
        return []


@dataclass(frozen=True)
class Rule:
    """Source leaves through operations, in order, to target leaves. Without operations it is a plain rename of one leaf."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operations: tuple[Operation, ...] = ()

    def __post_init__(self) -> None:
        for field in ("sources", "targets", "operations"):
            value = getattr(self, field)
            object.__setattr__(self, field, (value,) if isinstance(value, str) else tuple(value))
        if not self.sources and not self.targets:
            raise ConversionError("a rule needs a source or a target")

    @property
    def constant(self) -> bool:
        """Whether one side of the rule is empty."""
        return not self.sources or not self.targets

    def forward(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Source arrays to target arrays."""
        for operation in self.operations:
            arrays = operation.forward(arrays)
        return self._counted(arrays, self.targets)

    def inverse(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Target arrays to source arrays."""
        for operation in reversed(self.operations):
            arrays = operation.inverse(arrays)
        return self._counted(arrays, self.sources)

    def _counted(self, arrays: list[np.ndarray], names: Sequence[str]) -> list[np.ndarray]:
        if len(arrays) != len(names):
            raise ConversionError(f"the rule for {', '.join(self.sources) or '(constant)'} gives {len(arrays)} arrays for {len(names)} names")
        return arrays


def copied(array: np.ndarray) -> np.ndarray:
    """A C-contiguous copy that shares no memory; a 0-d array stays one."""
    return np.array(array, order="C", copy=True)


@dataclass(frozen=True)
class WeightMap:
    """Rules and ties. `ties` maps a reference leaf to the reference leaf whose memory it shares; the candidate has it once."""

    rules: tuple[Rule, ...]
    ties: Mapping[str, str]

    def to_candidate(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays by reference name to arrays by candidate name. Raises ConversionError for every name missing, unused or untied."""
        self._names(arrays, [name for rule in self.rules for name in rule.sources] + list(self.ties), "reference")
        untied = [f"{tied} differs from {name}, to which it is tied" for tied, name in self.ties.items()
                  if not np.array_equal(arrays[tied], arrays[name], equal_nan=arrays[name].dtype.kind == "f")]
        if untied:
            raise ConversionError("; ".join(untied))
        return self._apply(arrays, "forward")

    def to_reference(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays by candidate name to arrays by reference name, tied leaves included."""
        self._names(arrays, [name for rule in self.rules for name in rule.targets], "candidate")
        result = self._apply(arrays, "inverse")
        return {**result, **{tied: copied(result[name]) for tied, name in self.ties.items()}}

    def gradients(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Gradients by candidate name to gradients by reference name, for those leaves that have one; tied leaves count once."""
        result = {}
        for rule in self.rules:
            if not rule.constant and all(name in arrays for name in rule.targets):
                result.update(zip(rule.sources, map(copied, rule.inverse([arrays[name] for name in rule.targets])), strict=True))
        return result

    def sources_of(self, target: str) -> tuple[str, ...]:
        """The reference leaves that a candidate leaf is made from."""
        return next((rule.sources for rule in self.rules if target in rule.targets), ())

    def made_from(self, source: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The candidate leaves that a reference leaf has a part in, from arrays by reference name."""
        return self._apply(arrays, "forward", [rule for rule in self.rules if source in rule.sources])

    def _apply(self, arrays: Mapping[str, np.ndarray], way: str, rules: Iterable[Rule] | None = None) -> dict[str, np.ndarray]:
        result: dict[str, np.ndarray] = {}
        for rule in self.rules if rules is None else rules:
            inputs, outputs = (rule.sources, rule.targets) if way == "forward" else (rule.targets, rule.sources)
            made = getattr(rule, way)([np.asarray(arrays[name]) for name in inputs])
            result.update(zip(outputs, map(copied, made), strict=True))
        return result

    @staticmethod
    def _names(arrays: Mapping[str, np.ndarray], expected: Sequence[str], side: str) -> None:
        missing = sorted(set(expected) - set(arrays))
        unused = sorted(set(arrays) - set(expected))
        if missing or unused:
            parts = [f"missing {', '.join(missing)}"] * bool(missing) + [f"unused {', '.join(unused)}"] * bool(unused)
            raise ConversionError(f"arrays by {side} name: {'; '.join(parts)}")


def unique_integers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Float64 arrays of those shapes in which no integer occurs twice, so that any misplacement shows as a value."""
    start, result = 1, {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        result[name] = np.arange(start, start + size, dtype=np.float64).reshape(shape)
        start += size
    return result
