"""Which leaf of one model is which of another, told by what each leaf does there and not by its name.

Every leaf of a class (equal sizes of axes, in any order) gets the same values on both sides, so both models compute the same function
whichever leaf is whose. The gradient of each leaf then belongs to its place in the model: it is its fingerprint. Buffers, and models without
gradients, have the change of the outputs when the leaf alone moves.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, permutations
from typing import Any

import numpy as np

from . import mapping, tree
from .adapters.base import Adapter, Leaf, Unsupported
from .convert import ConversionError, Operation, Reshape, Transpose
from .locate import number
from .measure import MeasureError, relative_l2

SAME = 1e-7  # relative L2 up to which two fingerprints are the same: float64 gradients of a clean port agree to 1e-10
ORDERS = 24  # of the leaves that the other side keeps joined
DRAWS = ((0, 1.0), (1, 0.5), (2, 0.2))  # seed and size of the equal weights: large ones may multiply rounding, or meet a tie, in a long recurrence

Key = tuple[int, ...]


@dataclass
class Unit:
    """A leaf, or siblings that the other side keeps joined along `axis`. `shape` is that of the joined array."""

    leaves: tuple[Leaf, ...]
    shape: Key
    axis: int = 0
    mark: np.ndarray | None = None
    moved: bool = False

    @property
    def name(self) -> str:
        """Names of the leaves."""
        return " + ".join(leaf.name for leaf in self.leaves)

    @property
    def sizes(self) -> Key:
        """Sizes of the leaves along the axis on which they are joined."""
        return tuple(leaf.shape[self.axis] for leaf in self.leaves)

    @property
    def floating(self) -> bool:
        """Whether the leaf holds floats, which can move."""
        return self.leaves[0].dtype.startswith(("float", "bfloat"))

    def joined(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """The arrays of the leaves as one; None when one is missing."""
        parts = [arrays.get(leaf.name) for leaf in self.leaves]
        return None if any(part is None for part in parts) else np.concatenate(parts, axis=self.axis) if len(parts) > 1 else parts[0]


Pair = tuple[list[Unit], list[Unit]]  # the units of one class, of the reference and of the candidate


def key(shape: Sequence[int]) -> Key:
    """What leaves of one class have in common: the sizes of their axes, without order and without ones."""
    return tuple(sorted(count for count in shape if count != 1))


def base(sizes: Key, seed: int, scale: float = 1.0) -> np.ndarray:
    """The values of a class: the same whichever axes of equal size are exchanged. `scale` is for those of two or more axes."""
    rng = np.random.default_rng([seed, zlib.crc32(repr(sizes).encode())])
    values = rng.uniform(0.3, 0.9, sizes) if len(sizes) < 2 else rng.normal(0.0, scale / math.sqrt(max(sizes)), sizes)
    orders = [order for order in permutations(range(len(sizes))) if all(sizes[place] == sizes[axis] for axis, place in enumerate(order))]
    return sum(np.transpose(values, order) for order in orders) / math.sqrt(len(orders))


def placed(values: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The values of a class, whose axes are sorted by size, in the shape of one of its leaves."""
    if values.ndim < 2:
        return values.reshape(shape)
    order = np.argsort(np.argsort([count for count in shape if count != 1], kind="stable"), kind="stable")
    return np.transpose(values, order).reshape(shape)


def filled(pair: Pair, unit: Unit, seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    """The values of a unit's leaves. Where the class has joined units, a single leaf holds what those hold together."""
    many = next((item for item in (*pair[0], *pair[1]) if len(item.leaves) > 1), None)
    if len(unit.leaves) > 1:
        return {leaf.name: placed(base(key(leaf.shape), seed, scale), leaf.shape) for leaf in unit.leaves}
    leaf = unit.leaves[0]
    if many is None:
        return {leaf.name: placed(base(key(unit.shape), seed, scale), leaf.shape)}
    whole = np.concatenate([placed(base(key(part.shape), seed, scale), part.shape) for part in many.leaves], axis=many.axis)
    inner = whole.reshape([count for count in whole.shape if count != 1])
    return {leaf.name: placed(np.transpose(inner, np.argsort(inner.shape, kind="stable")), leaf.shape)}


def flat(outputs: Any) -> np.ndarray:
    """The float leaves of a tree of outputs as one array, by name: the order of a dict is not the same in both frameworks."""
    parts = [np.asarray(leaf, np.float64).ravel() for _, leaf in sorted(tree.named(outputs).items()) if np.asarray(leaf).dtype.kind == "f"]
    return np.concatenate(parts) if parts else np.zeros(0)


def mark(sides: Sequence[Adapter], pairs: Sequence[Pair], ties: Mapping[str, str], inputs: Mapping[str, np.ndarray],
         weights: Sequence[Mapping[str, np.ndarray]], seed: int) -> None:
    """Give every unit its fingerprint. Raises ConversionError when the two models differ although all weights are equal."""
    least = math.inf
    for draw, scale in DRAWS:
        values = _equal(pairs, ties, weights, seed + draw, scale)
        for side, adapter in enumerate(sides):
            adapter.load(values[side])
        outputs = [flat(adapter.run(inputs, None, tap=False).outputs) for adapter in sides]
        distance = apart(*outputs)
        least = min(least, distance)
        if distance <= SAME:
            break
    else:
        raise ConversionError(f"no map can be verified: with equal weights in all leaves of one shape the outputs of the two models differ by "
                              f"{number(least)} (relative L2), so they compute different functions or pair leaves of different shapes")
    try:
        found = [dict(adapter.gradients(inputs, None, seed).parameters) for adapter in sides]
    except Unsupported:
        found = [{}, {}]
    found[0] = {ties.get(name, name): value for name, value in found[0].items()}
    for pair in pairs:
        units = [unit for units in pair for unit in units]
        gradients = all(unit.joined(found[side]) is not None for side in (0, 1) for unit in pair[side])
        for side in (0, 1):
            for unit in pair[side]:
                if gradients:
                    unit.mark = unit.joined(found[side])
                elif len(units) > 2 and unit.floating:
                    by = filled(pair, unit, seed + len(DRAWS))
                    unit.mark = _moved(sides[side], values[side], by, ties if side == 0 else {}, inputs) - outputs[side]
                    unit.moved = True


def _equal(pairs: Sequence[Pair], ties: Mapping[str, str], weights: Sequence[Mapping[str, np.ndarray]], seed: int,
           scale: float) -> list[dict[str, np.ndarray]]:
    """Weights of both sides with equal values in all leaves of a class; integers are those of the reference's first leaf of the class."""
    values = [{name: np.array(value) for name, value in held.items()} for held in weights]
    for pair in pairs:
        for side, units in enumerate(pair):
            for unit in units:
                name = unit.leaves[0].name
                held = np.asarray(weights[0][pair[0][0].leaves[0].name])
                if unit.floating:
                    values[side].update(filled(pair, unit, seed, scale))
                elif held.size == values[side][name].size:
                    values[side][name] = held.reshape(values[side][name].shape).astype(values[side][name].dtype)
    values[0].update({tied: values[0][name] for tied, name in ties.items()})
    return values


def _moved(adapter: Adapter, values: Mapping[str, np.ndarray], by: Mapping[str, np.ndarray], ties: Mapping[str, str], inputs: Mapping) -> np.ndarray:
    """The outputs when some leaves alone move."""
    changed = {**values, **{name: values[name] + 0.1 * value for name, value in by.items()}}
    changed.update({tied: changed[name] for tied, name in ties.items()})
    adapter.load(changed)
    try:
        return flat(adapter.run(inputs, None, tap=False).outputs)
    finally:
        adapter.load(values)


def shape_of(unit: Unit) -> Key:
    """The shape of a leaf, or of joined ones."""
    return unit.leaves[0].shape if len(unit.leaves) == 1 else unit.shape


def ways(unit: Unit, other: Unit) -> Iterator[tuple[Operation, ...]]:
    """Operations from the array of one unit to that of another: what the kind of layer says, nothing, then every order of axes that fits."""
    source, target = shape_of(unit), shape_of(other)
    leaf = unit.leaves[0]
    usual = mapping.KINDS.get((leaf.layer, leaf.attribute), ("", ()))[1]
    inner = tuple(count for count in source if count != 1)
    options = [usual, (), *(((Transpose(order),) for order in permutations(range(len(source)))) if 1 < len(source) < 5 else ())]
    if len(source) != len(target) and len(inner) < 5:
        for order in permutations(range(len(inner))):
            middle = tuple(inner[place] for place in order)
            steps = (Reshape(source, inner), Transpose(order), Reshape(middle, target)) if key(source) == key(target) else ()
            options.append(tuple(step for step in steps if not (isinstance(step, Reshape) and step.source == step.target)
                                 and not (isinstance(step, Transpose) and step.axes == tuple(range(len(inner))))))
    seen = []
    for way in options:
        made = applied(way, np.empty(source))
        if made is not None and made.shape == target and way not in seen:
            seen.append(way)
            yield way
    if not seen and math.prod(source) == math.prod(target):
        yield (Reshape(source, target),)


def applied(way: Sequence[Operation], array: np.ndarray) -> np.ndarray | None:
    """One array through operations; None when one of them refuses it."""
    made = [array]
    try:
        for operation in way:
            made = operation.forward(made)
    except (ConversionError, ValueError):
        return None
    return made[0]


def apart(one: np.ndarray, two: np.ndarray) -> float:
    """Relative L2; 0 when both are zero, infinite when they cannot be compared."""
    try:
        return 0.0 if not np.any(one) and not np.any(two) else relative_l2(one, two)
    except MeasureError:
        return math.inf


def distance(unit: Unit, other: Unit) -> tuple[float, tuple[Operation, ...], tuple[int, ...]]:
    """How far two fingerprints are apart, under which operations, and in which order of the joined leaves. Units without one are equal."""
    count = max(len(unit.leaves), len(other.leaves))
    best = (math.inf, next(ways(unit, other), ()), tuple(range(count)))
    if unit.mark is None or other.mark is None:
        return (0.0, *best[1:])
    if unit.moved:
        return (apart(unit.mark, other.mark), *best[1:])
    for order in islice(permutations(range(count)), ORDERS):
        one, two = (reordered(item, order) if len(item.leaves) > 1 else item.mark for item in (unit, other))
        for way in ways(unit, other):
            made = applied(way, one)
            found = math.inf if made is None else apart(made, two)
            if found < best[0]:
                best = (found, way, order)
            if found <= SAME:
                return best
    return best


def reordered(unit: Unit, order: Sequence[int]) -> np.ndarray:
    """The fingerprint of joined leaves with the leaves in another order."""
    parts = np.split(unit.mark, np.cumsum(unit.sizes)[:-1], axis=unit.axis)
    return np.concatenate([parts[place] for place in order], axis=unit.axis)
