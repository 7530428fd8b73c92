"""One step of the wave state of WaveCore, as a selective state space or as a modulated linear map, and the clip of its states.

    selective   h = exp(dt A) carry + dt (b B) u,  A = -softplus(a_raw)        y = sum_state(c C h) + D u
    linear      (diag(0.9 tanh(A_diag)) + A_U A_V^T) * tanh(modulation)[:, None] w

Source: ContinuonBrain's HOPE core; Gu and Dao, "Mamba" (2023). Letters: B batch, or none, D width of w, S state, I = D / S inner width.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def softplus(x: Array) -> Array:
    """log(1 + exp(x))."""
    return jnp.logaddexp(x, 0.0)


def selective_step(
    u: Array, carry: Array, dt: Array, b: Array, c: Array, a_raw: Array, b_base: Array, c_base: Array, d: Array
) -> tuple[Array, Array]:
    """u, dt, b, c (B, I), carry (B, I, S), a_raw, b_base, c_base (I, S), d (I,). Returns y (B, I) and h (B, I, S)."""
    h = jnp.exp(-softplus(a_raw) * dt[..., None]) * carry + (dt * b * u)[..., None] * b_base
    return (c[..., None] * c_base * h).sum(-1) + d * u, h


def linear_step(w: Array, a_diag: Array, a_u: Array, a_v: Array, modulation: Array) -> Array:
    """w, modulation (B, D), a_diag (D,), a_u, a_v (D, R). Returns (B, D)."""
    return jnp.tanh(modulation) * (0.9 * jnp.tanh(a_diag) * w + (w @ a_v) @ a_u.mT)


def saturate(x: Array, limit: float) -> Array:
    """x clipped to +-limit, with gradient 1 up to and at the limit (`jnp.clip` has 1/2 at it); x itself for limit 0."""
    return jnp.where(x > limit, limit, jnp.where(x < -limit, -limit, x)) if limit else x
