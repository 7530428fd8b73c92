"""What a difference looks like, told from the arrays alone: the reference's output, the candidate's, and what the call was given.

Every symptom predicts what the candidate would have computed if a known bug were the only one. How much of the difference the prediction
leaves unexplained decides: a prediction that leaves more than a thousandth of it is not spoken of.

The axes of an array are named by the sizes of the case, which are all different; without them (batch, time, ..., channel) is assumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from . import tree

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
EXACT, REPAIR, PATTERN, FITTED, PART, PLACE, HINT = range(7)  # how particular a finding is; the lowest is spoken


@dataclass(frozen=True)
class Finding:
    """One explanation. `family` is the kind of bug, `phrase` what a report says, `left` the share of the difference that it leaves."""

    family: str
    phrase: str
    left: float
    rank: int


@dataclass(frozen=True)
class Axes:
    """How the axes of an array are called: by their size, else by their place. `time` and `batch` are sizes, None where unknown."""

    sizes: Mapping[int, str]
    time: int | None = None
    batch: int | None = None

    def role(self, shape: Sequence[int], axis: int) -> str:
        """"batch", "time", "channel", "head", or the name that the case gives the size."""
        count = shape[axis]
        if count in (self.batch, self.time):
            return "batch" if count == self.batch else "time"
        named = self.sizes.get(count, "")
        if "head" in named and "dim" not in named:
            return "head"
        if axis == 0 and len(shape) > 1 and self.batch is None:
            return "batch"
        return "time" if self.time is None and not self.sizes and axis == 1 and len(shape) > 2 else "channel"


def size(array: np.ndarray) -> float:
    """Euclidean norm that does not overflow."""
    largest = float(np.max(np.abs(array), initial=0.0))
    return largest * float(np.linalg.norm((array / largest).ravel())) if 0.0 < largest < math.inf else largest


def left(expected: np.ndarray, found: np.ndarray, predicted: np.ndarray) -> float:
    """|found - predicted| / |found - expected|: 0 when the prediction is the candidate's output, 1 when it is no better than the reference."""
    if predicted.shape != found.shape:
        return math.inf
    whole, rest = size(found - expected), size(found - predicted)
    return rest / whole if whole > 0.0 else math.inf


def explains(share: float, difference: float, dtype: str = "float64") -> bool:
    """Whether a share that is left is small enough. `difference` is the relative L2 that was to be explained, whose last digits are rounding."""
    rounding = 512.0 * EPS[dtype] / difference if difference > 0.0 else 0.0
    return share <= max(1e-3, min(0.05, rounding))


def symptoms(expected: np.ndarray, found: np.ndarray, axes: Axes, *, given: Mapping[str, np.ndarray] | None = None, dtype: str = "float64",
             place: int | None = None) -> list[Finding]:
    """Every explanation of one leaf, most particular first. `given` are the float arguments of the call, `place` is the leaf's number.

    Empty when the two arrays are equal or have different shapes.
    """
    if expected.shape != found.shape or expected.size == 0:
        return []
    expected, found = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    if not np.isfinite(found).all() or not np.isfinite(expected).all():
        return _not_finite(expected, found)
    whole = size(found - expected)
    if whole == 0.0:
        return []
    relative = whole / size(expected) if np.any(expected) else math.inf
    made: list[Finding] = []
    for make in (_grids, _copies, _constants, _averages, _permutations, _shifts, _scales, _dropped, _places):
        made += make(expected, found, axes, given or {}, dtype, place or 0)
    kept = [item for item in made if explains(item.left, relative, dtype)]
    if not kept:
        kept = [*_growth(expected, found, axes), *_precision(expected, found, relative, dtype)]
    return sorted(kept, key=lambda item: (item.rank, item.left))


def _not_finite(expected: np.ndarray, found: np.ndarray) -> list[Finding]:
    lost = ~np.isfinite(expected) & np.isfinite(found)
    if lost.any():
        values = np.unique(found[lost])
        what = f"{values[0]:g}" if len(values) == 1 else "numbers"
        return [Finding("NaN replaced", f"values that are not finite replaced by {what}", 0.0, EXACT)]
    fresh = np.isfinite(expected) & ~np.isfinite(found)
    if fresh.any():
        return [Finding("NaN made", f"{int(fresh.sum())} of {found.size} values became NaN or infinite", 0.0, EXACT)]
    return []


def _grids(expected: np.ndarray, found: np.ndarray, axes: Axes, given: Mapping, dtype: str, place: int) -> Iterator[Finding]:
    """Values that lie where a coarser precision has them."""
    for name in ("bfloat16", "float16", "float32"):
        if EPS[name] <= EPS[dtype] or max(np.max(np.abs(found)), np.max(np.abs(expected))) > 6e4:
            continue
        on_grid = np.array_equal(tree.to_grid(found, name), found)
        near = size(found - expected) <= EPS[name] * size(expected)  # cut off as well as rounded
        if on_grid and near and not np.array_equal(tree.to_grid(expected, name), expected):
            yield Finding("low precision", f"a silent cast to {name}", 0.0, EXACT)
            return


def _copies(expected: np.ndarray, found: np.ndarray, axes: Axes, given: Mapping, dtype: str, place: int) -> Iterator[Finding]:
    """An output that is what the call was given, or zero."""
    for name, value in given.items():
        if value.shape == found.shape and np.array_equal(value, found):
            yield Finding("state stale", f"the output is {name} as it was given: a stale state", 0.0, EXACT)
    if not np.any(found):
        what = "zeros: a state that is not updated, or an output that is not written" if place else "zeros where the reference has none"
        yield Finding("state stale" if place else "zero", what, 0.0, EXACT)


def _constants(expected: np.ndarray, found: np.ndarray, axes: Axes, given: Mapping, dtype: str, place: int) -> Iterator[Finding]:
    difference = found - expected
    if expected.size > 2:
        value = float(difference.mean())
        yield Finding("constant offset", f"a constant offset of {value:.3g}", left(expected, found, expected + value), PATTERN)
    if expected.ndim > 1 and expected.size // expected.shape[-1] > 2:
        shift = difference.reshape(-1, expected.shape[-1]).mean(0)
        phrase = "a constant offset per channel: a bias missing, or another one"
        yield Finding("missing bias", phrase, left(expected, found, expected + shift), PATTERN)


def _averages(expected: np.ndarray, found: np.ndarray, axes: Axes, given: Mapping, dtype: str, place: int) -> Iterator[Finding]:
    for axis in range(expected.ndim):
        if expected.shape[axis] < 2:
            continue
        role = axes.role(expected.shape, axis)
        predicted = np.broadcast_to(expected.mean(axis, keepdims=True), expected.shape)
        family = "averaged over the batch" if role == "batch" else f"averaged over {role}"
        yield Finding(family, family.replace("over batch", "over the batch"), left(expected, found, predicted), PATTERN)


def _permutations(expected: np.ndarray, found: np.ndarray, axes: Axes, given: Mapping, dtype: str, place: int) -> Iterator[Finding]:
    if expected.ndim > 1 and expected.shape[-1] == expected.shape[-2]:
        yield Finding("transposed", "the last two axes exchanged", left(expected, found, np.swapaxes(expected, -1, -2)), PATTERN)
    for axis in range(expected.ndim):
        count = expected.shape[axis]
        if not 2 <= count <= 8192 or expected.size // count < 2:
            continue
        rows = [np.moveaxis(array, axis, 0).reshape(count, -1) for array in (expected, found)]
        weights = np.random.default_rng(0).standard_normal(rows[0].shape[1])
        keys = [array @ weights for array in rows]
        order = np.empty(count, np.int64)
        order[np.argsort(keys[1], kind="stable")] = np.argsort(keys[0], kind="stable")
        if np.array_equal(order, np.arange(count)):
            continue
        rest = left(expected, found, np.take(expected, order, axis=axis))
        role = axes.role(expected.shape, axis)
        if role == "time":
            reverse = np.array_equal(order, np.arange(count)[::-1])
            names = ("reversed time", "time reversed") if reverse else ("permuted time", "time steps in another order")
            yield Finding(*names, rest, FITTED)
            continue
        block = block_of(order)
        family = "permuted rows" if role == "batch" else ("permuted heads" if block > 1 or role == "head" else "permuted channels")
        moved = [int(index) for index in np.flatnonzero(order != np.arange(count)) // block]
        named = ", ".join(map(str, dict.fromkeys(moved))) if len(set(moved)) < 7 else f"{len(set(moved))} of them"
        yield Finding(family, f"{family.removeprefix('permuted ')} in another order ({named})", rest, FITTED)


def block_of(order: np.ndarray) -> int:
    """The largest block size such that a permutation moves whole blocks; 1 for one that does not."""
    count = len(order)
    for block in sorted((n for n in range(2, count // 2 + 1) if count % n == 0), reverse=True):
        heads = order.reshape(-1, block)
        if np.array_equal(heads, heads[:, :1] + np.arange(block)) and not np.any(heads[:, 0] % block):
            return block
    return 1


def _shifts(expected: np.ndarray, found: np.ndarray, axes: Axes, given: Mapping, dtype: str, place: int) -> Iterator[Finding]:
    """Equal but for a few steps along time; what entered at the border is left out of the comparison."""
    for axis in range(expected.ndim):
        count = expected.shape[axis]
        if axes.role(expected.shape, axis) != "time" or count < 4:
            continue
        for by in (1, -1, 2, -2, 3, -3):
            if 2 * abs(by) >= count - 1:
                continue
            inner = np.arange(3 + abs(by), count - 3 - abs(by)) if count > 12 + 2 * abs(by) else np.arange(abs(by), count - abs(by))
            there, here, moved = (np.take(array, place, axis=axis) for array, place in ((expected, inner), (found, inner), (expected, inner - by)))
            steps = "one" if abs(by) == 1 else str(abs(by))
            way = "late" if by > 0 else "early"
            yield Finding("shift in time", f"shifted in time, {steps} step{'s' * (abs(by) > 1)} {way}", left(there, here, moved), PATTERN)


def _scales(expected: np.ndarray, found: np.ndarray, axes: Axes, given: Mapping, dtype: str, place: int) -> Iterator[Finding]:
    if not np.any(expected) or expected.size < 3:
        return
    slope = float(np.vdot(expected, found) / np.vdot(expected, expected))
    rest = left(expected, found, slope * expected)
    ratio = next((count for count in sorted(set(expected.shape)) if count > 1 and any(
        math.isclose(slope * slope, value, rel_tol=1e-9) for value in ((count - 1) / count, count / (count - 1)))), None)
    if ratio is not None:
        yield Finding("ddof", f"a spread over n - 1 for one over n (n = {ratio})", rest, PATTERN)
    yield Finding("uniform slope", "the sign" if math.isclose(slope, -1.0) else f"a uniform factor of {slope:.6g}", rest, PATTERN)
    if expected.ndim > 1 and expected.size // expected.shape[-1] > 2 and expected.shape[-1] > 1:
        left_rows, right_rows = (array.reshape(-1, expected.shape[-1]) for array in (expected, found))
        square = np.square(left_rows).sum(0)
        factors = np.where(square > 0.0, (left_rows * right_rows).sum(0) / np.where(square > 0.0, square, 1.0), 0.0)
        if 2 * np.sum(np.abs(factors - 1.0) > 1e-9 * np.max(np.abs(factors))) > len(factors):
            phrase = "a factor per channel: a scale missing, or another one"
            yield Finding("slope per channel", phrase, left(expected, found, expected * factors), PART)


def _dropped(expected: np.ndarray, found: np.ndarray, axes: Axes, given: Mapping, dtype: str, place: int) -> Iterator[Finding]:
    """Some values zero and all others larger by one factor."""
    zero = (found == 0.0) & (expected != 0.0)
    kept = expected[~zero]
    if expected.size < 20 or not zero.any() or not np.any(kept):
        return
    factor = float(np.vdot(kept, found[~zero]) / np.vdot(kept, kept))
    if factor > 1.0 + 1e-9:
        phrase = f"dropout left on: {zero.mean():.0%} of the values are zero, the others x {factor:.4g}"
        yield Finding("dropout", phrase, left(expected, found, np.where(zero, 0.0, factor * expected)), FITTED)


def _places(expected: np.ndarray, found: np.ndarray, axes: Axes, given: Mapping, dtype: str, place: int) -> Iterator[Finding]:
    """A difference that stands in one part of the array only."""
    wrong = np.abs(found - expected)
    wrong = wrong > 1e-6 * np.max(wrong)
    predicted = np.where(wrong, found, expected)
    rest = left(expected, found, predicted)
    for axis in range(expected.ndim):
        count = expected.shape[axis]
        indices = np.flatnonzero(wrong.any(tuple(other for other in range(expected.ndim) if other != axis)))
        if count < 3 or len(indices) == count:
            continue
        role = axes.role(expected.shape, axis)
        first, last = int(indices[0]), int(indices[-1])
        together = last - first + 1 == len(indices)
        if role == "time":
            if len(indices) == 1 and first == count - 1:
                yield Finding("last token", "only the last token is wrong", rest, PLACE)
            elif together and last == count - 1 and len(indices) <= count // 2:
                phrase = f"only the last {len(indices)} of {count} steps are wrong: a last chunk, or a state that goes wrong late"
                yield Finding("last chunk", phrase, rest, PLACE)
            elif together and first == 0 and len(indices) <= count // 2:
                yield Finding("first steps", f"only the first {len(indices)} of {count} steps are wrong: a border, or the initial state", rest, PLACE)
            elif together and last == count - 1:
                yield Finding("state", f"right up to step {first - 1} and wrong from there on: a state", rest, HINT)
        elif len(indices) == 1:
            name = {"batch": "row", "head": "head"}.get(role, "channel")
            yield Finding(f"one {name}", f"only {name} {first} of {count} is wrong", rest, PLACE)
        elif role == "channel" and together and count % len(indices) == 0 and first % len(indices) == 0:
            yield Finding("one head", f"only channels {first} to {last} of {count} are wrong: head {first // len(indices)}", rest, PLACE)
        elif len(indices) <= count // 3:
            yield Finding(f"few {role}s", f"only {len(indices)} of {count} along {role} are wrong, first {first}", rest, HINT)


def _growth(expected: np.ndarray, found: np.ndarray, axes: Axes) -> Iterator[Finding]:
    for axis in range(expected.ndim):
        count = expected.shape[axis]
        if axes.role(expected.shape, axis) != "time" or count < 4:
            continue
        other = tuple(place for place in range(expected.ndim) if place != axis)
        errors = np.sqrt(np.square(found - expected).mean(other))
        thirds = [float(part.mean()) for part in np.array_split(errors, 3)]
        if thirds[0] * 2.0 < thirds[1] < thirds[2] and errors[0] < errors[-1] and np.mean(np.diff(errors) > 0.0) > 0.6:
            phrase = f"an error that grows with t, {errors[0]:.1e} at the first step, {errors[-1]:.1e} at the last: a state"
            yield Finding("growth with t", phrase, 1.0, HINT)


def _precision(expected: np.ndarray, found: np.ndarray, relative: float, dtype: str) -> Iterator[Finding]:
    """An error of the size of a coarser precision that is noise: in every row alike, and in no direction."""
    if expected.ndim < 2 or expected.size // expected.shape[-1] < 4:
        return
    left_rows, error = (array.reshape(-1, expected.shape[-1]) for array in (expected, found - expected))
    square = np.square(left_rows).mean(-1)
    rows = np.sqrt(np.square(error).mean(-1) / np.where(square > 0.0, square, 1.0))
    slope = float(np.vdot(expected, found - expected) / np.vdot(expected, expected)) if np.any(expected) else 1.0
    if not 0.0 < np.max(rows) < 8.0 * np.min(rows) or abs(slope) > 0.3 * relative:
        return
    for name in ("float32", "float16", "bfloat16"):
        if EPS[name] > EPS[dtype] and EPS[name] / 16.0 <= relative <= 2.0 * EPS[name]:
            yield Finding("low precision", f"an error of the size of {name} rounding: a silent cast inside", 1.0, HINT)
            return


def one_pass_variance(expected: np.ndarray, found: np.ndarray, x: np.ndarray, *, weight: np.ndarray | None, bias: np.ndarray | None,
                      dtype: str) -> Finding | None:
    """Whether a norm of rows of `x` differs as E[x^2] - E[x]^2 does: every row by a factor of its own, of the size that cancels there."""
    if x.shape != expected.shape or x.ndim < 2 or not np.isfinite(found).all():
        return None
    scale = np.ones(x.shape[-1]) if weight is None else np.where(weight == 0.0, 1.0, weight)
    normal = (expected - (0.0 if bias is None else bias)) / scale
    error = (found - expected) / scale
    square = np.square(normal).sum(-1, keepdims=True)
    slopes = (error * normal).sum(-1, keepdims=True) / np.where(square > 0.0, square, 1.0)
    mean, spread = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    cancelled = EPS[dtype] * np.square(mean) / np.where(spread > 0.0, spread, np.inf)
    rest = size(error - slopes * normal) / max(size(error), np.finfo(float).tiny)
    typical, bound = float(np.sqrt(np.mean(np.square(slopes)))), float(np.sqrt(np.mean(np.square(cancelled))))
    offset = float(np.median(np.square(mean) / np.where(spread > 0.0, spread, np.inf)))
    if rest < 0.5 and offset > 16.0 and 1e-3 * bound <= typical <= 16.0 * bound:
        return Finding("one-pass variance", "variance computed in one pass", 0.0, EXACT)
    return None
