"""Short depthwise convolution along L, as DeltaNet puts before its heads.

    y_t = bias + sum_j weight_j * x_{t + j - left}        left = K - 1 (causal) or K // 2 (same); zeros outside

Source: Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (2024), section 4.
Letters: B batch, L length, D width, K kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def short_conv(x: Tensor, weight: Tensor, bias: Tensor, left: int) -> Tensor:
    """x (B, L, D), weight (D, 1, K), bias (D,). Output t sees x from t - left to t - left + K - 1. Returns (B, L, D)."""
    length, kernel = x.shape[1], weight.shape[-1]
    return _slide(F.pad(x, (0, 0, left, kernel - 1 - left)), weight, bias, length)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """The causal form of a stream: `past` (B, K - 1, D) holds the inputs before x (B, L, D). Returns y (B, L, D) and the next `past`."""
    joined = torch.cat([past, x], dim=1)
    return _slide(joined, weight, bias, x.shape[1]), joined[:, x.shape[1] :]


def _slide(x: Tensor, weight: Tensor, bias: Tensor, length: int) -> Tensor:
    """A few shifted products: several times faster on a CPU than a grouped convolution."""
    y = bias
    for j, tap in enumerate(weight[:, 0].unbind(-1)):
        y = torch.addcmul(y, x[:, j : j + length], tap)
    return y
