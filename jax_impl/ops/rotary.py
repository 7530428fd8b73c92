"""Rotary positions: pairs of channels turned by an angle that grows with the position, so that a product of two vectors knows their distance.

    angle_ti = t base^(-2 i / d)        (x_i, x_{i + d/2}) turned by angle_ti,  i < d / 2

Source: Su et al., "RoFormer" (2021), channels paired in halves. Letters: B batch, L length, H heads, d head width.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array


def rotary_table(length: int, width: int, base: float) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines (L, d / 2) of positions 0 .. L - 1, float64: a float32 angle would be off by its position times a rounding."""
    angles = np.arange(length)[:, None] * base ** (-2.0 * np.arange(width // 2) / width)
    return np.cos(angles), np.sin(angles)


def rotate(x: Array, table: tuple[np.ndarray, np.ndarray]) -> Array:
    """Turn x (B, H, L, d) by the angles of a table of L positions. Shape is kept."""
    cos, sin = (jnp.asarray(part, x.dtype) for part in table)  # (L, d / 2)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
