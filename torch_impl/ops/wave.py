"""One step of the wave state of WaveCore, as a selective state space or as a modulated linear map, and the clip of its states.

    selective   h = exp(dt A) carry + dt (b B) u,  A = -softplus(a_raw)        y = sum_state(c C h) + D u
    linear      (diag(0.9 tanh(A_diag)) + A_U A_V^T) * tanh(modulation)[:, None] w

Source: ContinuonBrain's HOPE core; Gu and Dao, "Mamba" (2023). Letters: B batch, or none, D width of w, S state, I = D / S inner width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); torch's own gives x itself above 20, which is 2e-9 off."""
    return torch.logaddexp(x, torch.zeros_like(x))


def selective_step(
    u: Tensor, carry: Tensor, dt: Tensor, b: Tensor, c: Tensor, a_raw: Tensor, b_base: Tensor, c_base: Tensor, d: Tensor
) -> tuple[Tensor, Tensor]:
    """u, dt, b, c (B, I), carry (B, I, S), a_raw, b_base, c_base (I, S), d (I,). Returns y (B, I) and h (B, I, S)."""
    h = torch.exp(-softplus(a_raw) * dt[..., None]) * carry + (dt * b * u)[..., None] * b_base
    return (c[..., None] * c_base * h).sum(-1) + d * u, h


def linear_step(w: Tensor, a_diag: Tensor, a_u: Tensor, a_v: Tensor, modulation: Tensor) -> Tensor:
    """w, modulation (B, D), a_diag (D,), a_u, a_v (D, R). Returns (B, D)."""
    return torch.tanh(modulation) * (0.9 * torch.tanh(a_diag) * w + (w @ a_v) @ a_u.mT)


def saturate(x: Tensor, limit: float) -> Tensor:
    """x clipped to +-limit, with gradient 1 up to and at the limit; x itself for limit 0."""
    return x.clamp(-limit, limit) if limit else x
