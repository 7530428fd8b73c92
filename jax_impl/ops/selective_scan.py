"""The selective state space of GroundedMamba: a first-order Taylor step, normalised after every update.

    A-hat = A * s / max(sigma_max(A), s)                          s = max_singular
    pre_t = h_{t-1} + dt_a_t * A-hat h_{t-1} + dt_b_t * u_t
    h_t   = LayerNorm(pre_t)

The normalisation makes the recurrence nonlinear, so no parallel scan exists: it is a loop over L by nature.
Source: GroundThink's StableStateSSM. Letters: B batch, L length, N state.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jax_impl.ops.normalise import layer_norm


def spectral_bound(matrix: Array, max_singular: float) -> Array:
    """Scale `matrix` (N, N) down until its largest singular value is at most `max_singular`; smaller ones pass unchanged.

    The singular vectors are constants of the gradient, which makes d sigma / dA = u v^T exactly: finite for the zero matrix
    and for repeated singular values, where differentiating the decomposition itself is not.
    """
    left, _, right = jnp.linalg.svd(jax.lax.stop_gradient(matrix))
    left, right = jax.lax.stop_gradient((left, right))
    sigma = left[:, 0] @ matrix @ right[0]
    return matrix * (max_singular / jnp.where(sigma > max_singular, sigma, max_singular))


def selective_scan(
    update: Array, dt_a: Array, dt_b: Array | None, transition: Array, weight: Array, bias: Array,
    initial_state: Array | None = None, *, eps: float = 1e-5, impl: str = "recurrent",
) -> tuple[Array, Array]:
    """Run the normalised recurrence over L.

    update (B, L, N); dt_a (B, L); dt_b (B, L) or None for 1; transition (N, N); weight, bias (N,) of the LayerNorm;
    initial_state (B, N) or None for zeros. Returns the states of all tokens (B, L, N) and the last one (B, N).
    One `lax.scan`, compiled once whatever L is; `impl="compiled"` runs the Cython kernel. Raises ValueError for another `impl`.
    """
    if impl == "compiled":
        from jax_impl.ops import compiled

        return compiled.selective_scan(update, dt_a, dt_b, transition, weight, bias, initial_state, eps=eps)
    if impl != "recurrent":
        raise ValueError(f"impl of selective_scan must be 'recurrent' or 'compiled', found {impl!r}")
    state = jnp.zeros_like(update[:, 0]) if initial_state is None else initial_state  # (B, N)
    driven = update if dt_b is None else dt_b[..., None] * update  # (B, L, N)

    def step(state: Array, token: tuple[Array, Array]) -> tuple[Array, Array]:
        dt, drive = token  # (B,), (B, N)
        pre = state + dt[:, None] * (state @ transition.mT) + drive
        state = layer_norm(pre, weight, bias, eps)
        return state, state

    state, states = jax.lax.scan(step, state, (dt_a.swapaxes(0, 1), driven.swapaxes(0, 1)))
    return states.swapaxes(0, 1), state
