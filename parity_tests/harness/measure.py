"""How far two arrays are apart: numbers that NaN, zero and broadcasting cannot fool.

    relative L2   |candidate - reference| / |reference|           both zero 0, only the reference zero inf
    slope         <reference, candidate> / <reference, reference> least squares; both zero 1
    cosine        <a, b> / (|a| |b|)                              both zero 1, one zero 0, anything not finite NaN (which fails)
    SNR           20 log10(|reference| / |error|) dB
    ulp           distance counted in representable numbers of the wider of the two dtypes

The arithmetic is float64 on values scaled by the largest one, so that neither overflow nor underflow can hide an error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


class MeasureError(ValueError):
    """The two arrays cannot be compared: different shapes or dtypes, or nothing in them."""


@dataclass(frozen=True)
class Measure:
    """Distance of a candidate array from a reference array; indices are those of the arrays."""

    count: int
    relative_l2: float
    slope: float
    cosine: float
    worst_cosine: float
    max_abs: float
    max_abs_at: tuple[int, ...]
    max_ulp: float
    snr_db: float
    error_rms: float
    reference_rms: float
    worst_row: tuple[int, ...] | None
    worst_channel: int | None
    worst_step: int | None
    mismatched: int
    note: str = ""


def _pair(reference: Any, candidate: Any, check_dtype: bool) -> tuple[np.ndarray, np.ndarray]:
    left, right = np.asarray(reference), np.asarray(candidate)
    for side, array in (("reference", left), ("candidate", right)):
        if array.dtype.kind not in "fiubc":
            raise MeasureError(f"{side} holds {array.dtype}, expected numbers")
    if left.shape != right.shape:
        raise MeasureError(f"shape {right.shape}, expected {left.shape}")
    if check_dtype and left.dtype != right.dtype:
        raise MeasureError(f"dtype {right.dtype}, expected {left.dtype}")
    if left.dtype.kind != right.dtype.kind and not {left.dtype.kind, right.dtype.kind} <= {"i", "u"}:
        raise MeasureError(f"dtype {right.dtype}, expected {left.dtype}")
    if left.size == 0:
        raise MeasureError(f"nothing to compare: the arrays of shape {left.shape} are empty")
    if left.dtype.kind == "c":
        left, right = (np.stack([array.real, array.imag], axis=-1) for array in (left, right))
    return left, right


def _norm(array: np.ndarray) -> float:
    largest = float(np.max(np.abs(array), initial=0.0))
    return largest * float(np.linalg.norm((array / largest).ravel())) if largest > 0.0 else 0.0


def relative_l2(reference: np.ndarray, candidate: np.ndarray) -> float:
    """|candidate - reference| / |reference| over equal shapes; inf when only the reference is zero or NaN and Inf are elsewhere."""
    return measure(reference, candidate, check_dtype=False).relative_l2


def cosine(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Cosine of the flattened arrays: 1 when both are zero, 0 when one is, NaN when any value is not finite."""
    left, right = _pair(reference, candidate, check_dtype=False)
    left, right = left.astype(np.float64).ravel(), right.astype(np.float64).ravel()
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return math.nan
    scale_left, scale_right = np.max(np.abs(left)), np.max(np.abs(right))
    if scale_left == 0.0 or scale_right == 0.0:
        return 1.0 if scale_left == scale_right else 0.0
    left, right = left / scale_left, right / scale_right
    return float(left @ right / (np.linalg.norm(left) * np.linalg.norm(right)))


def max_ulp(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Largest number of representable values between two arrays of one floating dtype, over the places where both are finite."""
    dtype = np.result_type(reference, candidate)
    if dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
        return math.nan
    signed = np.dtype(f"i{dtype.itemsize}")
    finite = np.asarray(np.isfinite(reference) & np.isfinite(candidate))
    if not finite.any():
        return 0.0
    sign, size = [], []
    for array in (reference, candidate):
        bits = np.asarray(array, dtype)[finite].view(signed)
        sign.append(bits < 0)
        size.append((bits & np.iinfo(signed).max).astype(np.uint64))
    apart = np.where(size[0] > size[1], size[0] - size[1], size[1] - size[0])
    # a step over zero counts the numbers on both sides of it, and the two zeros once
    return float(np.max(np.where(sign[0] == sign[1], apart, size[0] + size[1])))


def _worst(error: np.ndarray, reference: np.ndarray) -> tuple[tuple[int, ...] | None, int | None, int | None, float]:
    """Row (all axes but the last), channel (last axis), time step (axis 1 of three or more) where the error is largest."""
    if error.ndim == 0 or not np.any(error):
        return None, None, None, 1.0
    squared = np.square(error / np.max(np.abs(error)))
    channel = int(np.argmax(squared.reshape(-1, error.shape[-1]).sum(0)))
    row = np.unravel_index(int(np.argmax(squared.sum(-1))), error.shape[:-1]) if error.ndim > 1 else None
    step = int(np.argmax(squared.sum(tuple(axis for axis in range(error.ndim) if axis != 1)))) if error.ndim > 2 else None
    return None if row is None else tuple(int(index) for index in row), channel, step, _lowest_cosine(reference, reference + error)


def _lowest_cosine(reference: np.ndarray, candidate: np.ndarray) -> float:
    """The least cosine over rows of the last axis, with the same meaning of zeros as `cosine`; values are finite."""
    left, right = (array.reshape(-1, array.shape[-1]) for array in (reference, candidate))
    scales = [np.max(np.abs(rows), axis=1, keepdims=True) for rows in (left, right)]
    zeros = [scale[:, 0] == 0.0 for scale in scales]
    left, right = (rows / np.where(scale == 0.0, 1.0, scale) for rows, scale in zip((left, right), scales, strict=True))
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    found = np.einsum("rc,rc->r", left, right) / np.where(norms == 0.0, 1.0, norms)
    return float(np.min(np.where(zeros[0] | zeros[1], np.where(zeros[0] & zeros[1], 1.0, 0.0), found)))


def measure(reference: Any, candidate: Any, *, check_dtype: bool = True) -> Measure:
    """Measure a candidate array against a reference array of the same shape.

    NaN and Inf must stand at the same places (with the same sign); the distances are then those of the finite values. Integers and
    booleans are counted as well: `mismatched` is the number of places where the two differ.
    Raises MeasureError for different shapes, different dtypes (kinds only without `check_dtype`), or empty arrays.
    """
    original = _pair(reference, candidate, check_dtype)
    left, right = (array.astype(np.float64) for array in original)
    mismatched = int(np.sum(~((original[0] == original[1]) | (np.isnan(left) & np.isnan(right)))))
    finite = np.isfinite(left) & np.isfinite(right)
    elsewhere = ~finite & ~((left == right) | (np.isnan(left) & np.isnan(right)))
    if elsewhere.any():
        place = tuple(int(index) for index in np.argwhere(elsewhere)[0])
        note = f"{int(elsewhere.sum())} of {left.size} values are not finite at the same places, first at {list(place)}: " \
               f"{right[place]}, expected {left[place]}"
        return Measure(left.size, math.inf, math.nan, math.nan, math.nan, math.inf, place, math.inf, -math.inf, math.inf,
                       math.nan, None, None, None, mismatched, note)
    left, right = np.where(finite, left, 0.0), np.where(finite, right, 0.0)
    # the norm of values near the end of float64's range would overflow; a power of two changes no digit of a ratio
    factor = 2.0**-40 if max(np.max(np.abs(left)), np.max(np.abs(right))) > 1e290 else 1.0
    left, right = left * factor, right * factor
    error = right - left
    size, distance = _norm(left), _norm(error)
    if size > 0.0:
        relative = distance / size
    else:
        relative = 0.0 if distance == 0.0 else math.inf
    row, channel, step, lowest = _worst(error, left)
    place = tuple(int(index) for index in np.unravel_index(int(np.argmax(np.abs(error))), error.shape))
    largest = float(np.max(np.abs(left)))
    unit = left / largest if largest > 0.0 else left
    slope = 1.0 if distance == 0.0 else (1.0 + float(np.vdot(unit, error / largest) / np.vdot(unit, unit)) if size > 0.0 else math.inf)
    everywhere = bool(finite.all())
    snr = math.inf if distance == 0.0 else (20.0 * math.log10(size / distance) if size > 0.0 else -math.inf)
    return Measure(
        count=left.size, relative_l2=relative, slope=slope, cosine=cosine(left, right) if everywhere else math.nan,
        worst_cosine=lowest if everywhere else math.nan, max_abs=float(np.max(np.abs(error))) / factor, max_abs_at=place,
        max_ulp=max_ulp(*original), snr_db=snr, error_rms=distance / math.sqrt(left.size) / factor,
        reference_rms=size / math.sqrt(left.size) / factor,
        worst_row=row, worst_channel=channel, worst_step=step, mismatched=mismatched,
        note="" if everywhere else f"{int((~finite).sum())} of {left.size} values are not finite, at the same places in both" if finite.any()
        else f"none of {left.size} values is finite, in both: nothing can be compared",
    )
