"""Layer and RMS normalisation over the last axis, as every norm of the project uses them.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias        var: biased, in two passes

Source: Ba, Kiros and Hinton, "Layer Normalization" (2016). Letters: B batch, L length, H heads, P head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def layer_norm(x: Array, weight: Array | None, bias: Array | None, eps: float) -> Array:
    """Normalise the last axis of `x` to mean 0 and variance 1, then scale and shift where given. Shape is kept."""
    centred = x - x.mean(-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def head_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """Normalise each head of each token by itself, never over L, which would look into the future.

    x (B, L, H, P); weight, bias (H * P,). Returns (B, L, H * P), heads concatenated.
    """
    return bias + layer_norm(x, None, None, eps).reshape(*x.shape[:-2], -1) * weight


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight along the last axis (Zhang and Sennrich, 2019). Shape is kept."""
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps) * weight
