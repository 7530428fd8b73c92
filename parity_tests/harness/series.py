"""Numbers along an axis that a report draws: the error at every time step, the loss at every step of a training run.

Over time, an error is the RMS at one step over the RMS of the reference at all steps, so that a step at which the reference is zero does not
stand out. More than `POINTS` steps are kept as the largest value of so many neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import tree
from .case import Case

POINTS = 200
TIME, TRAINING = "time", "training"


@dataclass(frozen=True)
class Series:
    """One line of a report, first value at step 0, `stride` steps from one to the next.

    kind: "time" (error over time steps) or "training" (loss over optimiser steps). where, leaf: module path and output.
    candidate: the error, or the candidate's loss. reference: the loss; for an error in low precision the reference's own error, else empty.
    """

    kind: str
    where: str
    leaf: str
    regime: str
    dtype: str
    candidate: list[float]
    reference: list[float] = field(default_factory=list)
    stride: int = 1


def steps(case: Case, inputs: Mapping[str, np.ndarray]) -> tuple[int, int] | None:
    """The time axis of a model's outputs and its length, as the inputs have it; None for inputs without one.

    Without a state that says otherwise it is axis 1, of inputs that have one.
    """
    axis = 1 if case.states is None else case.states.axis
    names = case.along(inputs) or tuple(inputs)
    lengths = [inputs[name].shape[axis] for name in names if inputs[name].ndim > axis]
    return (axis, lengths[0]) if lengths and lengths[0] > 1 else None


def over_time(place: tuple[str, str, str], axis: tuple[int, int] | None, oracle: Any, candidate: Any, own: Any = None) -> list[Series]:
    """The error of every float output leaf that has the time axis and channels, at `place` = (module path, regime, dtype).

    `own` are the reference's outputs in that precision. Leaves that do not compare are left out: checks report them.
    """
    if axis is None:
        return []
    left, right = tree.named(oracle), tree.named(candidate)
    middle = {} if own is None else tree.named(own)
    found = []
    for name, value in left.items():
        expected = np.asarray(value)
        others = [np.asarray(side[name]) for side in (right, middle) if name in side]
        if expected.dtype.kind != "f" or expected.ndim < axis[0] + 2 or expected.shape[axis[0]] != axis[1]:
            continue
        if not others or name not in right or any(other.shape != expected.shape for other in others):
            continue
        errors, stride = zip(*(_error(expected, other, axis[0]) for other in others), strict=True)
        found.append(Series(TIME, place[0], name, place[1], place[2], errors[0], errors[1] if len(errors) > 1 else [], stride[0]))
    return found


def _error(expected: np.ndarray, found: np.ndarray, axis: int) -> tuple[list[float], int]:
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    others = tuple(place for place in range(expected.ndim) if place != axis)
    with np.errstate(all="ignore"):
        size = float(np.sqrt(np.mean(np.square(expected))))
        values = np.sqrt(np.mean(np.square(found - expected), axis=others)) / (size if size > 0.0 else 1.0)
    stride = max(1, math.ceil(len(values) / POINTS))
    return [float(f"{np.max(values[start:start + stride]):.4g}") for start in range(0, len(values), stride)], stride
