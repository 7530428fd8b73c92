"""The functions of `cython_ext.dense` again, in plain NumPy; `cython_ext.reference` is their door.

Letters: B batch, L length, D width, K kernel; I inputs, O outputs of a linear layer.
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray
from scipy.special import erf

from cython_ext.checks_dense import conv_arguments, dense_array, linear_arguments, mean_arguments, norm_arguments


def _sigmoid(x: ndarray) -> ndarray:
    with np.errstate(over="ignore"):  # exp(-x) may be infinite, and 1 / (1 + inf) is the 0 that it should be
        return 1 / (1 + np.exp(-x))


def _gelu(x: ndarray) -> ndarray:
    return x * x.dtype.type(0.5) * (1 + erf(x * x.dtype.type(0.5**0.5)))


# In the order of checks_dense.ACTIVATIONS.
_ACTIVATE = (
    lambda x: x, lambda x: np.where(x < 0, x.dtype.type(0), x), np.tanh, _sigmoid, _gelu, lambda x: np.logaddexp(x, x.dtype.type(0)),
    lambda x: x * _sigmoid(x),
)


class dense:
    """Twin of `cython_ext.dense`; the equations stand there."""

    @staticmethod
    def linear(x, weight, bias=None, activation="none"):
        """activation(x @ weight.T + bias) along the last axis.

        x (..., I); weight (O, I) or what `packing.pack` made of it, which saves a copy at every call; bias (O,) or None; activation "none",
        "relu", "tanh", "sigmoid", "gelu" (exact), "softplus" or "silu". All float32 or all float64; arrays that are read-only or not contiguous
        are accepted, the latter copied. Returns (..., O), a new array. Raises TypeError for another type or dtype, ValueError for another shape,
        an empty axis or an unknown activation, by name.
        """
        x, packed, bias, kind = linear_arguments(x, weight, bias, activation)
        y = x @ packed.matrix().T
        return _ACTIVATE[kind](y if bias is None else y + bias)

    @staticmethod
    def layer_norm(x, weight, bias, eps=1e-6):
        """(x - mean) / sqrt(var + eps) * weight + bias along the last axis, the biased variance taken in a second pass.

        x (..., D), weight and bias (D,), all float32 or all float64; arrays that are read-only or not contiguous are accepted, the latter copied.
        Returns a new array of the shape of x. Raises TypeError for another type or dtype, ValueError for another shape, an empty axis or an eps
        that is not positive, by name.
        """
        x, weight, bias, eps = norm_arguments(x, eps, weight=weight, bias=bias)
        x = x - x.mean(axis=-1, keepdims=True)
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + x.dtype.type(eps)) * weight + bias

    @staticmethod
    def rms_norm(x, weight, eps=1e-6):
        """x / sqrt(mean(x^2) + eps) * weight along the last axis.

        x (..., D), weight (D,), all float32 or all float64; arrays that are read-only or not contiguous are accepted, the latter copied. Returns a
        new array of the shape of x. Raises as `layer_norm` does.
        """
        x, weight, eps = norm_arguments(x, eps, weight=weight)
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + x.dtype.type(eps)) * weight

    @staticmethod
    def gelu(x):
        """The exact gelu, x * (1 + erf(x / sqrt(2))) / 2, of every entry.

        x of any shape without an empty axis, float32 or float64, read-only or not contiguous too. Returns a new array. Raises TypeError for
        another type or dtype, ValueError for an empty axis.
        """
        return _gelu(dense_array("x", x))

    @staticmethod
    def l2norm(x):
        """x / max(|x|, 1e-12) along the last axis.

        x (..., D) float32 or float64, read-only or not contiguous too. Returns a new array. Raises TypeError for another type or dtype,
        ValueError for an empty axis.
        """
        x = dense_array("x", x)
        return x / np.maximum(np.sqrt((x * x).sum(axis=-1, keepdims=True)), x.dtype.type(1e-12))

    @staticmethod
    def masked_mean(x, mask=None):
        """The mean over the valid tokens of every sample.

        x (B, L, D) float32 or float64; mask (B, L) bool, true for valid tokens, padding on the right, or None. Arrays that are read-only or not
        contiguous are accepted, the latter copied. Returns (B, D), a new array. Raises TypeError for another type or dtype, ValueError for another
        shape, an empty axis, a mask with a hole or an empty row, by name.
        """
        x, lengths = mean_arguments(x, mask)
        return np.stack([sample[:length].mean(axis=0) for sample, length in zip(x, lengths, strict=True)])

    @staticmethod
    def depthwise_conv(x, weight, bias, left, activation="none"):
        """y_t = activation(bias + sum_j weight_j x_{t + j - left}), zeros outside, every channel by itself.

        x (B, L, D), weight (D, 1, K) as torch keeps it, bias (D,), all float32 or all float64; left between 0 and K - 1: K - 1 is causal, K // 2
        keeps the middle; activation as in `linear`. Arrays that are read-only or not contiguous are accepted, the latter copied. Returns (B, L, D),
        a new array. Raises TypeError for another type or dtype, ValueError for another shape, an empty axis or a left or an activation that is
        none, by name.
        """
        x, taps, bias, left, kind = conv_arguments(x, weight, bias, left, activation)
        length, kernel = x.shape[1], len(taps)
        padded = np.pad(x, ((0, 0), (left, kernel - 1 - left), (0, 0)))
        y = np.tile(bias, (x.shape[0], length, 1))
        for j, tap in enumerate(taps):
            y += tap * padded[:, j : j + length]
        return _ACTIVATE[kind](y)
