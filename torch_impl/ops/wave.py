"""The wave state of WaveCore as a selective state space, one step or many, or as a modulated linear map, and the clip of its states.

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
    u: Tensor, carry: Tensor, dt: Tensor, b: Tensor, c: Tensor, a_raw: Tensor, b_base: Tensor, c_base: Tensor, d: Tensor, *,
    impl: str = "recurrent",
) -> tuple[Tensor, Tensor]:
    """u, dt, b, c (B, I), carry (B, I, S), a_raw, b_base, c_base (I, S), d (I,). Returns y (B, I) and h (B, I, S).

    `impl="compiled"` runs the Cython kernel. Raises ValueError for another `impl`.
    """
    if impl == "compiled":
        from torch_impl.ops import compiled_wave

        return compiled_wave.selective_step(u, carry, dt, b, c, a_raw, b_base, c_base, d)
    if impl != "recurrent":
        raise ValueError(f"impl of selective_step must be 'recurrent' or 'compiled', found {impl!r}")
    h = torch.exp(-softplus(a_raw) * dt[..., None]) * carry + (dt * b * u)[..., None] * b_base
    return (c[..., None] * c_base * h).sum(-1) + d * u, h


def selective_scan(
    u: Tensor, carry: Tensor, dt: Tensor, b: Tensor, c: Tensor, a_raw: Tensor, b_base: Tensor, c_base: Tensor, d: Tensor
) -> tuple[Tensor, Tensor]:
    """`selective_step` for every token: u, dt, b, c (B, L, I), the rest as there. Returns y (B, L, I) and the last h (B, I, S)."""
    outputs = []
    for parts in zip(*(x.unbind(-2) for x in (u, dt, b, c)), strict=True):
        y, carry = selective_step(parts[0], carry, *parts[1:], a_raw, b_base, c_base, d)
        outputs.append(y)
    return torch.stack(outputs, dim=-2), carry


def linear_step(w: Tensor, a_diag: Tensor, a_u: Tensor, a_v: Tensor, modulation: Tensor) -> Tensor:
    """w, modulation (B, D), a_diag (D,), a_u, a_v (D, R). Returns (B, D)."""
    return torch.tanh(modulation) * (0.9 * torch.tanh(a_diag) * w + (w @ a_v) @ a_u.mT)


def saturate(x: Tensor, limit: float) -> Tensor:
    """x clipped to +-limit, with gradient 1 up to and at the limit; x itself for limit 0."""
    return x.clamp(-limit, limit) if limit else x
