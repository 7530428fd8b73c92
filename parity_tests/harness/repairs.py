"""Repairs that are tried by running the reference again: with another weight, other arguments, another setting, another function.

Each trial computes what the reference would give if it had the bug. The one that gives the candidate's output names the bug. Weights and
arguments are changed through the adapter and work for every kind of reference; settings and functions need one that offers `variations`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from . import tree
from .adapters.base import Leaf
from .leaves import NORMS
from .symptoms import PART, REPAIR

LAYER_LEAVES = ("weight", "kernel", "bias", "scale", "embedding")
MAX_LIMITS = 8  # of an index that is clamped
MAX_PAIRS = 16  # heads or channels of a bare parameter up to which every exchange of two is tried


@dataclass(frozen=True)
class Trial:
    """One repair: `compute(value)` gives the outputs of the reference with the bug. `value` is a number to be fitted, None where there is none."""

    family: str
    phrase: str
    compute: Callable[[float], Any]
    rank: int = REPAIR
    value: float | None = None


@dataclass(frozen=True)
class Subject:
    """What trials are made on: an adapter of the reference, the module's path and leaves, its arguments, and how it is called."""

    adapter: Any
    path: str
    leaves: Mapping[str, Leaf]
    weights: Mapping[str, np.ndarray]
    ties: Mapping[str, str]
    fresh: Mapping[str, np.ndarray]
    args: tuple
    kwargs: dict
    call: Callable[[tuple, dict], Any]
    time: int | None = None
    batch: int | None = None
    right: frozenset[str] = frozenset()  # modules inside that are right on their own inputs

    def clear(self, name: str) -> bool:
        """Whether a leaf belongs to a part of the module that is right by itself."""
        return any(name.startswith(f"{path}.") for path in self.right)

    def short(self, name: str) -> str:
        """A leaf's name below the module."""
        return name.removeprefix(f"{self.path}.") if self.path else name


def weights(subject: Subject, inside: bool = False) -> Iterator[Trial]:
    """Every leaf of the module missing, left at initialisation, transposed, flipped, off by one, negated, coarse, exchanged, permuted.

    Leaves of parts that are right by themselves only with `inside`: the module may use them past the part that owns them.
    """
    own = {name: leaf for name, leaf in subject.leaves.items()
           if (not subject.path or name.startswith(f"{subject.path}.")) and name not in subject.ties and subject.weights[name].dtype.kind == "f"
           and subject.clear(name) is inside}
    for name, leaf in own.items():
        # a weight too large for float16 becomes infinite there, which is what a cast to it would do
        for family, phrase, value in _changed(subject.short(name), leaf, subject.weights[name], subject.fresh.get(name)):
            if not np.array_equal(value, subject.weights[name]):
                # sigmoid(-x) is 1 - sigmoid(x), which is the better word for it
                yield Trial(family, phrase, _loaded(subject, {name: value}), PART if family == "sign" else REPAIR)
    for (one, left), (two, right) in combinations(own.items(), 2):
        if left.shape == right.shape and left.shape and _alike(left, right):
            changes = {one: subject.weights[two], two: subject.weights[one]}
            yield Trial("swapped leaves", f"{subject.short(one)} and {subject.short(two)} exchanged", _loaded(subject, changes))
    others = {} if inside else {name: leaf for name, leaf in subject.leaves.items() if name not in own and name not in subject.ties}
    for one, left in own.items():
        same = [two for two, right in others.items() if left.shape == right.shape and left.shape and _alike(left, right)
                and not np.array_equal(subject.weights[one], subject.weights[two])]
        for two in same[:MAX_PAIRS]:
            yield Trial("swapped leaves", f"{subject.short(one)} holds {two}", _loaded(subject, {one: subject.weights[two]}))
    for name, leaf in own.items():
        for family, phrase, value in _permuted(subject.short(name), leaf, subject.weights[name]):
            yield Trial(family, phrase, _loaded(subject, {name: value}))


def _alike(one: Leaf, other: Leaf) -> bool:
    """Whether two leaves of one shape may be taken for each other: the same part of layers of one kind, or two bare parameters."""
    bare = one.attribute not in LAYER_LEAVES and other.attribute not in LAYER_LEAVES
    return (one.layer, one.attribute) == (other.layer, other.attribute) or (bare and one.layer == other.layer)


def _changed(name: str, leaf: Leaf, value: np.ndarray, fresh: np.ndarray | None) -> Iterator[tuple[str, str, np.ndarray]]:
    if leaf.attribute.startswith("bias"):
        yield "missing bias", f"missing bias ({name})", np.zeros_like(value)
    if leaf.attribute in ("weight", "scale", "gamma") and value.ndim == 1:
        yield "(1 + w) for w", f"(1 + w) for w in {name}", 1.0 + value
        yield "(1 + w) for w", f"w for (1 + w) in {name}", value - 1.0
        if leaf.layer in NORMS:
            yield "scale missing", f"missing scale ({name})", np.ones_like(value)
    if fresh is not None and fresh.shape == value.shape:
        yield "initialisation", f"{name} left at its initial value", np.asarray(fresh, np.float64)
    yield "leaf unused", f"{name} not used", np.zeros_like(value)
    for one, two in combinations(range(value.ndim), 2):
        if value.shape[one] == value.shape[two] > 1:
            yield "transposed kernel", f"kernel not transposed ({name})", np.swapaxes(value, one, two)
    if value.ndim >= 3 or (leaf.layer.startswith("conv") and value.ndim):
        yield "flipped convolution", f"kernel flipped ({name})", value[..., ::-1]
        for by in (1, -1):
            yield "shift in time", f"taps of {name} shifted by one", np.roll(value, by, -1)
            yield "shift in time", f"taps of {name} shifted by one, the last one lost", _slid(value, value.shape[-1], by, value.ndim - 1)
    if leaf.layer.startswith("embedding") and value.ndim == 2 and len(value) > 2:
        for by in (1, -1):
            yield "shift in time", f"rows of {name} shifted by one", np.roll(value, by, 0)
    yield "sign", f"{name} with the other sign", -value
    for dtype in ("bfloat16", "float16", "float32"):
        with np.errstate(over="ignore"):
            coarse = tree.to_grid(value, dtype)
        yield "low precision", f"{name} cast to {dtype}", coarse


def _permuted(name: str, leaf: Leaf, value: np.ndarray) -> Iterator[tuple[str, str, np.ndarray]]:
    """Blocks of the first axis exchanged: every two of them for a bare parameter, neighbours for the kernel of a layer."""
    count = value.shape[0] if value.ndim else 0
    bare = leaf.attribute not in LAYER_LEAVES
    for blocks in range(2, min(count, MAX_PAIRS) + 1):
        if count % blocks:
            continue
        heads = np.split(value, blocks)
        pairs = combinations(range(blocks), 2) if bare else zip(range(blocks), range(1, blocks), strict=False)
        for one, two in pairs:
            order = list(range(blocks))
            order[one], order[two] = two, one
            what = "heads" if blocks < count or value.ndim > 1 else "channels"
            yield f"permuted {what}", f"{what} {one} and {two} of {blocks} exchanged in {name}", np.concatenate([heads[place] for place in order])
        if blocks > 2:
            yield "permuted heads", f"{blocks} heads in reversed order in {name}", np.concatenate(heads[::-1])


def _loaded(subject: Subject, changes: Mapping[str, np.ndarray]) -> Callable[[float], Any]:
    def compute(_: float) -> Any:
        changed = {**subject.weights, **changes}
        changed.update({tied: changed[owner] for tied, owner in subject.ties.items()})
        subject.adapter.load(changed)
        try:
            return subject.call(subject.args, subject.kwargs)
        finally:
            subject.adapter.load(subject.weights)

    return compute


def arguments(subject: Subject) -> Iterator[Trial]:
    """Arguments read as zeros, coarse, averaged over the batch, exchanged, shifted in time, without the last step; masks ignored."""
    def given(changes: Mapping[int, Any]) -> Callable[[float], Any]:
        return lambda _: subject.call(tuple(changes.get(place, value) for place, value in enumerate(subject.args)), subject.kwargs)

    floats = {place: value for place, value in enumerate(subject.args) if any(_floating(leaf) for leaf in tree.named(value).values())}
    for place, value in floats.items():
        if len(floats) > 1 or place:
            zeros = _mapped(np.zeros_like, value)
            yield Trial("state dropped", f"argument {place} read as zeros: a state or an input dropped", given({place: zeros}))
    for place, value in enumerate(subject.args):
        if isinstance(value, np.ndarray) and value.dtype.kind == "b":
            yield Trial("condition", f"argument {place}, a mask, ignored", given({place: np.ones_like(value)}))
    if subject.time is not None and subject.time > 1:
        def before(leaf: Any) -> Any:
            axes = [axis for axis in range(np.ndim(leaf)) if isinstance(leaf, np.ndarray) and leaf.shape[axis] == subject.time]
            return np.take(leaf, np.arange(subject.time - 1), axis=axes[0]) if axes else leaf

        cut = tree.map_leaves(before, (subject.args, subject.kwargs))
        yield Trial("state early", "the state from before the last step", lambda _: subject.call(*cut))
    for place, value in enumerate(subject.args):
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size > 1:
            for limit in np.unique(value)[-MAX_LIMITS - 1:-1][::-1]:
                yield Trial("index clamped", f"argument {place}, an index, clamped at {limit}", given({place: np.minimum(value, limit)}))
        if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
            for one, two in combinations([item for item, leaf in enumerate(value) if _floating(leaf)], 2):
                if value[one].shape == value[two].shape:
                    order = list(value)
                    order[one], order[two] = order[two], order[one]
                    yield Trial("swapped arguments", f"{one} and {two} of argument {place} exchanged", given({place: type(value)(order)}))
    for place, value in floats.items():
        def scaled(factor: float, place: int = place, value: Any = value) -> Any:
            return given({place: _mapped(lambda leaf: factor * leaf, value)})(0.0)

        for factor in (2.0, 0.5):  # far from 1 in what is not linear, where a search does not arrive
            yield Trial("scaled argument", f"argument {place} times {factor:g}", lambda _, factor=factor, scaled=scaled: scaled(factor), PART)
        yield Trial("scaled argument", f"argument {place} times {{value:.6g}}", scaled, PART, 1.0)
    for one, two in combinations(floats, 2):
        if _shapes(floats[one]) == _shapes(floats[two]):
            yield Trial("swapped arguments", f"arguments {one} and {two} exchanged", given({one: floats[two], two: floats[one]}))
    for place, value in floats.items():
        if subject.batch is not None and subject.batch > 1 and all(shape[:1] == (subject.batch,) for shape in _shapes(value)):
            mean = _mapped(lambda leaf: np.broadcast_to(leaf.mean(0, keepdims=True), leaf.shape).copy(), value)
            yield Trial("averaged over the batch", f"argument {place} averaged over the batch", given({place: mean}))
        for dtype in ("bfloat16", "float16", "float32"):
            with np.errstate(over="ignore"):
                coarse = _mapped(lambda leaf, dtype=dtype: tree.to_grid(leaf, dtype), value)
            yield Trial("low precision", f"argument {place} cast to {dtype}", given({place: coarse}))
        for by in (1, -1):
            moved = _mapped(lambda leaf, by=by: _slid(leaf, subject.time, by), value)
            yield Trial("shift in time", f"argument {place} shifted in time, one step {'late' if by > 0 else 'early'}", given({place: moved}))


def _floating(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) and leaf.dtype.kind == "f"


def _mapped(function: Callable[[np.ndarray], np.ndarray], value: Any) -> Any:
    return tree.map_leaves(lambda leaf: function(leaf) if _floating(leaf) else leaf, value)


def _shapes(value: Any) -> list[tuple[int, ...]]:
    return [np.shape(leaf) for leaf in tree.named(value).values()]


def _slid(leaf: np.ndarray, time: int | None, by: int, axis: int | None = None) -> np.ndarray:
    axis = next((place for place, count in enumerate(leaf.shape) if count == time), None) if axis is None else axis
    if axis is None:
        return leaf
    moved = np.roll(leaf, by, axis)
    border = [slice(None)] * leaf.ndim
    border[axis] = slice(0, 1) if by > 0 else slice(-1, None)
    moved[tuple(border)] = 0.0
    return moved


def variations(subject: Subject, kind: str) -> Iterator[Trial]:
    """Other settings of the module ("settings"), other functions inside it ("functions"), other values that those read ("values").

    For adapters that can vary what they hold.
    """
    if not hasattr(subject.adapter, "variations"):
        return
    made = subject.adapter.variations(subject.path, subject.right)
    again = lambda: subject.call(subject.args, subject.kwargs)  # noqa: E731
    kinds = {"settings": made.settings, "functions": lambda: made.functions(again, subject.batch), "values": lambda: made.values(again)}
    for item in kinds[kind]():
        def compute(value: float, item: Any = item) -> Any:
            with item.change(value):
                return again()

        yield Trial(item.family, item.phrase, compute, REPAIR if item.particular else PART, item.value)


def fitted(trial: Trial, found: Callable[[Any], np.ndarray | None], wanted: np.ndarray, steps: int = 6) -> tuple[float, np.ndarray] | None:
    """The number with which a trial comes nearest, by secants, and what it then gives; None when it does not move towards `wanted`."""
    value = float(trial.value or 0.0)
    step = 1e-3 * max(abs(value), 1e-3)
    here = found(trial.compute(value))
    start = best = math.inf if here is None else float(np.linalg.norm(wanted - here))
    for _ in range(steps if math.isfinite(start) else 0):
        there = found(trial.compute(value + step))
        slope = np.zeros(1) if there is None else (there - here) / step
        square = float(slope @ slope)
        if not 0.0 < square < math.inf:
            break
        other = value + float(slope @ (wanted - here)) / square
        made = found(trial.compute(other))
        rest = math.inf if made is None else float(np.linalg.norm(wanted - made))
        if not rest < 0.5 * best:  # another direction, or the last digits
            break
        step, value, here, best = 1e-3 * abs(other - value), other, made, rest
        if best <= 1e-9 * start:
            break
    return (value, here) if best < start else None
