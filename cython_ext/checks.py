"""Checks that a kernel and its NumPy twin share, so that they refuse the same input with the same words.

Letters: B batch, L length, N state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
MAX_STATE = 256  # the kernels keep a state in buffers of this size on the stack


def array(name: str, value: Any, letters: str, sizes: Mapping[str, int], dtype: np.dtype) -> np.ndarray:
    """`value` as an aligned C-contiguous array, copied only where it is not one; read-only and strided arrays are accepted.

    `letters` spells the axes, "BL" say, and `sizes` gives the size of each letter. Raises TypeError for what is not an array or
    has another dtype than `dtype`, ValueError for another shape.
    """
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a NumPy array without a mask, found {type(value).__name__}")
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, found {value.dtype}")
    shape = tuple(sizes[letter] for letter in letters)
    if value.shape != shape:
        raise ValueError(f"{name} must have shape ({', '.join(letters)}) = {shape}, found {value.shape}")
    if value.flags.c_contiguous and value.flags.aligned:
        return value
    return np.array(value, order="C", subok=False)


def scan_arguments(
    update: Any, dt_a: Any, dt_b: Any, transition: Any, weight: Any, bias: Any, initial_state: Any, eps: Any, **states: Any
) -> tuple[list[np.ndarray | None], float]:
    """The array arguments of a selective scan, checked, in this order, then those in `states`, each (B, L, N); and eps as a float.

    None passes for dt_b and initial_state. Raises TypeError and ValueError that name the argument, what was found and what was expected.
    """
    if not isinstance(update, np.ndarray):
        raise TypeError(f"update must be a NumPy array without a mask, found {type(update).__name__}")
    if update.dtype not in DTYPES:
        raise TypeError(f"update must be float32 or float64, found {update.dtype}")
    if update.ndim != 3 or 0 in update.shape:
        raise ValueError(f"update must have shape (B, L, N) with no axis empty, found {update.shape}")
    sizes = dict(zip("BLN", update.shape, strict=True))
    if sizes["N"] > MAX_STATE:
        raise ValueError(f"update must have N of at most {MAX_STATE}, found shape {update.shape}")
    if isinstance(eps, bool) or not isinstance(eps, (int, float, np.floating)) or not 0.0 < eps < math.inf:
        raise ValueError(f"eps must be a positive finite number, found {eps!r}")

    def take(name: str, value: Any, letters: str, *, optional: bool = False) -> np.ndarray | None:
        return None if optional and value is None else array(name, value, letters, sizes, update.dtype)

    return [
        take("update", update, "BLN"), take("dt_a", dt_a, "BL"), take("dt_b", dt_b, "BL", optional=True), take("transition", transition, "NN"),
        take("weight", weight, "N"), take("bias", bias, "N"), take("initial_state", initial_state, "BN", optional=True),
        *(take(name, value, "BLN") for name, value in states.items()),
    ], float(eps)
