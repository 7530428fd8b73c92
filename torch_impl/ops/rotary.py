"""Rotary positions: pairs of channels turned by an angle that grows with the position, so that a product of two vectors knows their distance.

    angle_ti = t base^(-2 i / d)        (x_i, x_{i + d/2}) turned by angle_ti,  i < d / 2

Source: Su et al., "RoFormer" (2021), channels paired in halves. Letters: B batch, L length, H heads, d head width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def rotary_table(length: int, width: int, base: float) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines (L, d / 2) of positions 0 .. L - 1, float64: a float32 angle would be off by its position times a rounding."""
    angles = np.arange(length)[:, None] * base ** (-2.0 * np.arange(width // 2) / width)
    return np.cos(angles), np.sin(angles)


def rotate(x: Tensor, table: tuple[np.ndarray, np.ndarray]) -> Tensor:
    """Turn x (B, H, L, d) by the angles of a table of L positions. Shape is kept."""
    cos, sin = (torch.from_numpy(part).to(x) for part in table)  # (L, d / 2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
