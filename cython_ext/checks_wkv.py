"""The checks that the WKV kernel and its NumPy twin share. Letters: B batch, L length, H heads, P head width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cython_ext.checks import DTYPES, _plain, array

TIME_FIRSTS = ("bonus", "gain")


def wkv_arguments(
    r: Any, k: Any, v: Any, w: Any, u: Any, initial_state: Any, time_first: Any, **gradients: Any
) -> tuple[list[np.ndarray | None], bool]:
    """The array arguments of a WKV memory, checked, in this order, then grad_y and grad_state where given; and whether time_first is "gain".

    None passes for initial_state and grad_state. Raises TypeError and ValueError that name the argument, what was found and what was expected.
    """
    sizes = _leading("r", r, "BLHP")
    gain = _is_gain(time_first)
    axes = {"w": "HP", "u": "HP", "initial_state": "BHPP", "grad_state": "BHPP"}
    named = {"r": r, "k": k, "v": v, "w": w, "u": u, "initial_state": initial_state, **gradients}
    return [
        None if value is None and name in ("initial_state", "grad_state") else array(name, value, axes.get(name, "BLHP"), sizes, r.dtype)
        for name, value in named.items()
    ], gain


def wkv_step_arguments(
    r: Any, k: Any, v: Any, w: Any, u: Any, state: Any, time_first: Any, out: Any
) -> tuple[list[np.ndarray | None], bool]:
    """The array arguments of one step of a WKV memory, checked, in this order; and whether time_first is "gain".

    None passes for `out`. Raises as `wkv_arguments` does, and ValueError where `state` or `out` cannot be written in place.
    """
    sizes = _leading("r", r, "BHP")
    gain = _is_gain(time_first)
    named = zip(("r", "k", "v", "w", "u"), (r, k, v, w, u), ("BHP", "BHP", "BHP", "HP", "HP"), strict=True)
    return [
        *(array(name, value, axes, sizes, r.dtype) for name, value, axes in named), written("state", state, "BHPP", sizes, r.dtype),
        None if out is None else written("out", out, "BHP", sizes, r.dtype),
    ], gain


def written(name: str, value: Any, letters: Sequence[str], sizes: Mapping[str, int], dtype: np.dtype) -> np.ndarray:
    """`value`, checked as `array` does, to be written in place. Raises ValueError where it is not contiguous, aligned and writeable."""
    if array(name, value, letters, sizes, dtype) is not value or not value.flags.writeable:
        raise ValueError(f"{name} is overwritten and must be C-contiguous, aligned and writeable, found an array that is not")
    return value


def _leading(name: str, value: Any, letters: str) -> dict[str, int]:
    """The sizes that the first argument gives to `letters`."""
    _plain(name, value)
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32 or float64, found {value.dtype}")
    if value.ndim != len(letters) or 0 in value.shape:
        raise ValueError(f"{name} must have shape ({', '.join(letters)}) with no axis empty, found {value.shape}")
    return dict(zip(letters, value.shape, strict=True))


def _is_gain(time_first: Any) -> bool:
    if time_first not in TIME_FIRSTS:
        raise ValueError(f"time_first must be {' or '.join(map(repr, TIME_FIRSTS))}, found {time_first!r}")
    return time_first == "gain"
