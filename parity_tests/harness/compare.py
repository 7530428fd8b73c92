"""From two trees of outputs to checks: every leaf of every call, with what was measured, what was allowed, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import tree
from .bounds import Bound, Bounds
from .measure import Measure, MeasureError, measure
from .regimes import PLANTED

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
# what is smaller may be zero: below the least normal number XLA's programs take it for that, in float16 below the least of all
NORMAL = {"float32": 2.0**-126, "float16": 2.0**-24, "bfloat16": 2.0**-126}
RULES = {
    1: "shapes, dtypes and leaves", 2: "meaning (float64)", 3: "rounding (float32)", 4: "rounding (half precision)", 5: "splits and states",
    6: "optimiser", 7: "side effects", 8: "observability", 9: "conversion", 10: "cosine",
}


@dataclass(frozen=True)
class Check:
    """One thing that was checked. `where` is a module path, `leaf` an output or parameter, `rule` the number in the verdict."""

    tier: str
    rule: int
    where: str
    leaf: str
    regime: str
    dtype: str
    held: bool
    value: float
    allowed: float
    reason: str
    quantity: str = "relative L2"
    detail: str = ""
    order: int = 0
    measure: Measure | None = None
    own_error: float | None = None


@dataclass(frozen=True)
class Place:
    """Where a comparison stands: tier, module path, position in run order, regime, precision."""

    tier: str
    where: str
    regime: str
    dtype: str
    order: int = 0


def failed(place: Place, rule: int, detail: str, leaf: str = "", quantity: str = "agreement") -> Check:
    """A check that did not hold for a reason that is no number."""
    return Check(place.tier, rule, place.where, leaf, place.regime, place.dtype, False, math.inf, 0.0, RULES[rule], quantity, detail, place.order)


def passed(place: Place, rule: int, detail: str, leaf: str = "", quantity: str = "agreement") -> Check:
    """A check that held and has no number."""
    return Check(place.tier, rule, place.where, leaf, place.regime, place.dtype, True, 0.0, 0.0, RULES[rule], quantity, detail, place.order)


def _arrays(value: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in tree.named(value).items()}


def _wrong_names(place: Place, reference: Mapping, candidate: Mapping) -> list[Check]:
    try:
        tree.same_names(reference, candidate)
    except tree.TreeError as error:
        return [failed(place, 1, str(error), quantity="leaves")]
    return []


def exact(place: Place, reference: Any, candidate: Any, bounds: Bounds, on: str, rule: int = 2) -> list[Check]:
    """Compare two float64 trees: relative L2 and slope of every leaf, integers as integers, cosine at least its bound."""
    left, right = _arrays(reference), _arrays(candidate)
    checks = _wrong_names(place, left, right)
    if checks:
        return checks
    for name, expected in left.items():
        try:
            # Python scalars have no dtype of their own; half precision is carried in float32 arrays on both sides
            found = measure(expected, right[name], check_dtype=expected.dtype.kind == "f" or place.dtype == "float64")
        except MeasureError as error:
            checks.append(failed(place, 1, str(error), name))
            continue
        checks += _exact_leaf(place, name, expected, found, bounds, on, rule)
    return checks


def _exact_leaf(place: Place, name: str, expected: np.ndarray, found: Measure, bounds: Bounds, on: str, rule: int) -> list[Check]:
    if expected.dtype.kind in "biu":
        detail = "" if found.mismatched == 0 else f"{found.mismatched} of {found.count} differ"
        return [Check(place.tier, rule, place.where, name, place.regime, place.dtype, found.mismatched == 0, float(found.mismatched), 0.0,
                      "discrete values are compared as they are", "values that differ", detail, place.order, found)]
    bound = bounds.find(on, place.where, place.regime, name)
    if not math.isfinite(found.relative_l2) and found.note:
        return [failed(place, 1, found.note, name, "finite values")]
    checks = [Check(place.tier, rule, place.where, name, place.regime, place.dtype, found.relative_l2 <= bound.value, found.relative_l2,
                    bound.value, bound.reason, "relative L2", found.note, place.order, found)]
    slope = bounds.find("slope", place.where, place.regime, name)
    if on in ("forced", "free") and not abs(found.slope - 1.0) <= slope.value:
        checks.append(Check(place.tier, rule, place.where, name, place.regime, place.dtype, False, abs(found.slope - 1.0), slope.value,
                            slope.reason, "slope - 1", f"slope {found.slope:.12g}", place.order, found))
    return checks + _cosine(place, name, found, bounds)


def _cosine(place: Place, name: str, found: Measure, bounds: Bounds) -> list[Check]:
    bound = bounds.find("cosine", place.where, place.regime, name)
    # a NaN that was put into the inputs has to come out at the same places, which rule 1 checks, and leaves no cosine
    planted = PLANTED in place.regime and math.isnan(found.cosine) and math.isfinite(found.relative_l2)
    if found.cosine >= bound.value or planted:
        return []
    detail = found.note if math.isnan(found.cosine) else ""
    return [Check(place.tier, 10, place.where, name, place.regime, place.dtype, False, found.cosine, bound.value, bound.reason, "cosine", detail,
                  place.order, found)]


def rounded(
    place: Place, oracle: Any, own: Any, candidate: Any, bounds: Bounds, neighbours: Callable[[], list[tuple[Any, Any]]] | None = None,
    excused: Callable[[str], None] | None = None,
) -> list[Check]:
    """Compare a candidate in low precision against the float64 oracle, with the reference's own error in that precision as the measure.

    Allowed: max(factor x own error, floor x eps x RMS of the oracle, the least normal number), all as RMS. Discrete leaves are compared where the
    reference's own choice does not depend on the precision (the margin is large enough), and are not compared elsewhere. Values that leave the
    range of the precision in the reference itself are left out, and the check says how many: nothing measures the candidate there.
    `neighbours` gives further pairs (oracle, own) on inputs a few roundings away. They are asked for where the error is too large: a reference
    that happens to hit its few values nearly exactly is no measure, and the median of its errors around there is; rows that are rounding around
    there are left out.
    `excused` is called with the name of a leaf of which the reference has no finite value; without it, such a leaf is a failure.
    """
    left, middle, right = _arrays(oracle), _arrays(own), _arrays(candidate)
    checks = _wrong_names(place, left, right)
    if checks:
        return checks
    rule, on = (3, "float32") if place.dtype == "float32" else (4, "half")
    around: list[tuple[Any, ...]] | None = None
    for name, expected in left.items():
        lost = _lost(expected, middle[name], right[name])
        try:
            found = measure(*(_wide(value, lost, expected) for value in (expected, right[name])), check_dtype=False)
            reference = measure(*(_wide(value, lost, expected) for value in (expected, middle[name])), check_dtype=False)
            if middle[name].dtype.kind == "f" and middle[name].dtype != right[name].dtype:
                raise MeasureError(f"dtype {right[name].dtype}, expected {middle[name].dtype}")
        except MeasureError as error:
            checks.append(failed(place, 1, str(error), name))
            continue
        if expected.dtype.kind in "biu":
            if reference.mismatched == 0:
                checks.append(Check(place.tier, rule, place.where, name, place.regime, place.dtype, found.mismatched == 0, float(found.mismatched),
                                    0.0, "the reference makes the same choice in both precisions", "values that differ", "", place.order, found))
            continue
        if not np.isfinite(middle[name]).any():
            if excused is not None:
                excused(name)
                continue
            checks.append(failed(place, 1, f"the reference itself gives no finite value in {place.dtype}: nothing can be compared; leave out the "
                                 "regime or the precision", name, "finite values"))
            continue
        if not math.isfinite(found.relative_l2) and found.note:
            checks.append(failed(place, 1, found.note, name, "finite values"))
            continue
        check = _band(place, name, found, reference.error_rms, bounds, rule, on, int(lost.sum()))
        if not check.held and neighbours is not None:
            around = [tuple(map(_arrays, pair)) for pair in neighbours()] if around is None else around
            if around:
                wides = [_wide(value, lost, expected) for value in (expected, right[name], middle[name])]
                errors = np.stack([_wide(low[name], lost, expected) - _wide(wide[name], lost, expected) for wide, low in around])
                rows = _well_posed(errors, found.reference_rms, place.dtype)
                found, reference = (measure(wides[0][rows], value[rows], check_dtype=False) for value in wides[1:])
                typical = float(np.median([np.sqrt(np.mean(np.square(error[rows]))) for error in errors]))
                own_error = max(reference.error_rms, typical) if math.isfinite(typical) else reference.error_rms
                check = _band(place, name, found, own_error, bounds, rule, on, int(lost.sum()))
        checks.append(check)
        checks += _cosine(place, name, found, bounds) if found.reference_rms > NORMAL[place.dtype] and reference.cosine >= 0.999 else []
    return checks


def _lost(oracle: np.ndarray, own: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Where the oracle is finite and the reference's own result in low precision is not."""
    if not oracle.shape == own.shape == candidate.shape or not oracle.dtype.kind == own.dtype.kind == "f":
        return np.zeros(oracle.shape, bool)
    return np.isfinite(oracle) & ~np.isfinite(own)


def _wide(value: np.ndarray, lost: np.ndarray, oracle: np.ndarray) -> np.ndarray:
    """Floats in float64 with zero in the places that count for none of the three sides; anything else as it is."""
    if oracle.dtype.kind != "f" or value.dtype.kind != "f":
        return value
    wide = value.astype(np.float64)
    return np.where(lost, 0.0, wide) if lost.any() else wide


def _well_posed(errors: np.ndarray, rms: float, dtype: str) -> np.ndarray:
    """The rows (of the last axis) of a leaf of which the reference computes half of the digits at least on neighbouring inputs, whose errors are
    given (K, ...). Where it does not (a norm over equal values, with an epsilon of 1e-12) neither side computes anything but rounding.

    All rows where none is left, or where there are no rows.
    """
    everything = np.ones(errors.shape[1:-1], bool)
    if errors.ndim < 3:
        return everything
    kept = np.median(np.sqrt(np.mean(np.square(errors), -1)), 0) <= math.sqrt(EPS[dtype]) * rms
    return kept if kept.any() else everything


def _band(place: Place, name: str, found: Measure, own: float, bounds: Bounds, rule: int, on: str, lost: int = 0) -> Check:
    factor, floor = (bounds.find(quantity, place.where, place.regime, name) for quantity in (on, "floor"))
    allowed = max(factor.value * own, floor.value * EPS[place.dtype] * found.reference_rms, NORMAL[place.dtype])
    scale = found.reference_rms if found.reference_rms > 0.0 else 1.0
    held = found.error_rms <= allowed
    reason = f"{factor.value:g} x the reference's own error: {factor.reason}"
    if lost:
        reason += f"; {lost} of {found.count} values are not finite in the reference's own {place.dtype} and are left out"
    return Check(place.tier, rule, place.where, name, place.regime, place.dtype, held, found.error_rms / scale, allowed / scale,
                 reason, f"{place.dtype} error", "", place.order, found, own / scale)


def bound_check(place: Place, name: str, value: float, bound: Bound, rule: int, quantity: str) -> Check:
    """A single number against a bound."""
    return Check(place.tier, rule, place.where, name, place.regime, place.dtype, value <= bound.value, value, bound.value, bound.reason, quantity,
                 "", place.order)
