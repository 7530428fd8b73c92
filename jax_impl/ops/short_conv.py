"""Short depthwise convolution along L, as DeltaNet puts before its heads.

    y_t = bias + sum_j weight_j * x_{t + j - left}        left = K - 1 (causal) or K // 2 (same); zeros outside

Source: Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (2024), section 4.
Letters: B batch, L length, D width, K kernel.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def short_conv(x: Array, weight: Array, bias: Array, left: int) -> Array:
    """x (B, L, D), weight (D, 1, K), bias (D,). Output t sees x from t - left to t - left + K - 1. Returns (B, L, D)."""
    length, kernel = x.shape[1], weight.shape[-1]
    return _slide(jnp.pad(x, ((0, 0), (left, kernel - 1 - left), (0, 0))), weight, bias, length)


def causal_conv(x: Array, weight: Array, bias: Array, past: Array) -> tuple[Array, Array]:
    """The causal form of a stream: `past` (B, K - 1, D) holds the inputs before x (B, L, D). Returns y (B, L, D) and the next `past`."""
    joined = jnp.concatenate([past, x], axis=1)
    return _slide(joined, weight, bias, x.shape[1]), joined[:, x.shape[1] :]


def _slide(x: Array, weight: Array, bias: Array, length: int) -> Array:
    """A few shifted products, which XLA fuses into one pass: a grouped convolution is many times slower on a CPU."""
    y = bias
    for j in range(weight.shape[-1]):
        y = y + x[:, j : j + length] * weight[:, 0, j]
    return y
