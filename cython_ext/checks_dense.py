"""Checks that the dense kernels and their NumPy twins share, so that they refuse the same input with the same words.

Letters: B batch, L length, D width, K kernel; I inputs, O outputs of a linear layer.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

from cython_ext.checks import DTYPES, _lengths, _plain, array
from cython_ext.packing import Packed, pack

ACTIVATIONS = ("none", "relu", "tanh", "sigmoid", "gelu", "softplus", "silu")  # in the order of `Activation` of dense.pxd


def dense_array(name: str, value: Any, ndim: int | None = None, letters: str = "..., D") -> np.ndarray:
    """`value` as an aligned C-contiguous array of float32 or float64 with no axis empty, copied only where it is not one.

    Raises TypeError for another type or dtype, ValueError for another number of axes than `ndim` (at least one where None).
    """
    _plain(name, value)
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32 or float64, found {value.dtype}")
    if value.ndim == 0 or 0 in value.shape or (ndim is not None and value.ndim != ndim):
        raise ValueError(f"{name} must have shape ({letters}) with no axis empty, found {value.shape}")
    axes = [str(axis) for axis in range(value.ndim)]
    return array(name, value, axes, dict(zip(axes, value.shape, strict=True)), value.dtype)


def flat_rows(x: np.ndarray) -> np.ndarray:
    """x (..., D) as (rows, D)."""
    return x.reshape(-1, x.shape[-1])


def widened(shape: tuple[int, ...], width: int) -> tuple[int, ...]:
    """`shape` with another last axis."""
    return (*shape[:-1], width)


def activation_kind(value: Any) -> int:
    """The number of an activation. Raises ValueError for an unknown one."""
    if value not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, found {value!r}")
    return ACTIVATIONS.index(value)


def linear_arguments(x: Any, weight: Any, bias: Any, activation: Any) -> tuple[np.ndarray, Packed, np.ndarray | None, int]:
    """The arguments of a linear layer, checked: x, the weight packed, the bias or None, and the number of the activation."""
    x = dense_array("x", x, letters="..., I")
    kind = activation_kind(activation)
    if not isinstance(weight, Packed):
        weight = pack(array("weight", weight, "OI", {"O": _rows("weight", weight), "I": x.shape[-1]}, x.dtype))
    elif weight.dtype != x.dtype:
        raise TypeError(f"weight must be packed for {x.dtype}, found one for {weight.dtype}")
    elif weight.inputs != x.shape[-1]:
        raise ValueError(f"weight must have I = {x.shape[-1]} inputs, found {weight.inputs}")
    return x, weight, None if bias is None else array("bias", bias, "O", {"O": weight.outputs}, x.dtype), kind


def _rows(name: str, value: Any) -> int:
    _plain(name, value)
    if value.ndim != 2 or value.shape[0] == 0:
        raise ValueError(f"{name} must have shape (O, I) with no axis empty, found {value.shape}")
    return value.shape[0]


def norm_arguments(x: Any, eps: Any, **vectors: Any) -> list[Any]:
    """x, then the vectors (D,), then eps as a float, checked."""
    x = dense_array("x", x)
    return [x, *(array(name, value, "D", {"D": x.shape[-1]}, x.dtype) for name, value in vectors.items()), _eps(eps)]


def mean_arguments(x: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """x and the number of valid tokens of every sample, as int64, checked."""
    x = dense_array("x", x, 3, "B, L, D")
    sizes = dict(zip("BLD", x.shape, strict=True))
    return x, np.full(sizes["B"], sizes["L"], np.int64) if mask is None else _lengths(mask, sizes)


def conv_arguments(x: Any, weight: Any, bias: Any, left: Any, activation: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int]:
    """x, the weight as taps (K, D), bias, left and the number of the activation, checked."""
    x = dense_array("x", x, 3, "B, L, D")
    _plain("weight", weight)
    kernel = weight.shape[-1] if weight.ndim == 3 else 0
    if kernel == 0:
        raise ValueError(f"weight must have shape (D, 1, K) with no axis empty, found {weight.shape}")
    sizes = {"D": x.shape[-1], "1": 1, "K": kernel}
    taps = np.ascontiguousarray(array("weight", weight, "D1K", sizes, x.dtype)[:, 0].T)
    bias = array("bias", bias, "D", sizes, x.dtype)
    if isinstance(left, (bool, np.bool_)) or not hasattr(left, "__index__"):
        raise TypeError(f"left must be an integer, found {left!r}")
    if not 0 <= operator.index(left) < kernel:
        raise ValueError(f"left must lie between 0 and K - 1 = {kernel - 1}, found {left!r}")
    return x, taps, bias, operator.index(left), activation_kind(activation)


def _eps(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)) or not 0.0 < value < math.inf:
        raise ValueError(f"eps must be a positive finite number, found {value!r}")
    return float(value)
