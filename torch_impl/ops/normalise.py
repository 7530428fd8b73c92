"""Layer and RMS normalisation over the last axis, as every norm of the project uses them.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias        var: biased, in two passes

Source: Ba, Kiros and Hinton, "Layer Normalization" (2016). Letters: B batch, L length, H heads, P head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise the last axis of `x` to mean 0 and variance 1, then scale and shift where given. Shape is kept."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def head_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise each head of each token by itself, never over L, which would look into the future.

    x (B, L, H, P); weight, bias (H * P,). Returns (B, L, H * P), heads concatenated.
    """
    return torch.addcmul(bias, layer_norm(x, None, None, eps).flatten(-2), weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight along the last axis (Zhang and Sennrich, 2019). Shape is kept."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)
