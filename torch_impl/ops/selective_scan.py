"""The selective state space of GroundedMamba: a first-order Taylor step, normalised after every update.

    A-hat = A * s / max(sigma_max(A), s)                          s = max_singular
    pre_t = h_{t-1} + dt_a_t * A-hat h_{t-1} + dt_b_t * u_t
    h_t   = LayerNorm(pre_t)

The normalisation makes the recurrence nonlinear, so no parallel scan exists: it is a loop over L by nature.
Source: GroundThink's StableStateSSM. Letters: B batch, L length, N state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_impl.ops.normalise import layer_norm


def spectral_bound(matrix: Tensor, max_singular: float) -> Tensor:
    """Scale `matrix` (N, N) down until its largest singular value is at most `max_singular`; smaller ones pass unchanged.

    The singular vectors are constants of the gradient, which makes d sigma / dA = u v^T exactly: finite for the zero matrix
    and for repeated singular values, where differentiating the decomposition itself is not.
    """
    left, _, right = torch.linalg.svd(matrix.detach())
    sigma = left[:, 0] @ matrix @ right[0]
    return matrix * (max_singular / torch.where(sigma > max_singular, sigma, max_singular))


def selective_scan(
    update: Tensor, dt_a: Tensor, dt_b: Tensor | None, transition: Tensor, weight: Tensor, bias: Tensor,
    initial_state: Tensor | None = None, *, eps: float = 1e-5, impl: str = "recurrent",
) -> tuple[Tensor, Tensor]:
    """Run the normalised recurrence over L.

    update (B, L, N); dt_a (B, L); dt_b (B, L) or None for 1; transition (N, N); weight, bias (N,) of the LayerNorm;
    initial_state (B, N) or None for zeros. Returns the states of all tokens (B, L, N) and the last one (B, N).
    `impl="compiled"` runs the Cython kernel. Raises ValueError for another `impl`.
    """
    if impl == "compiled":
        from torch_impl.ops import compiled

        return compiled.selective_scan(update, dt_a, dt_b, transition, weight, bias, initial_state, eps=eps)
    if impl != "recurrent":
        raise ValueError(f"impl of selective_scan must be 'recurrent' or 'compiled', found {impl!r}")
    state = update.new_zeros(update.shape[0], update.shape[2]) if initial_state is None else initial_state  # (B, N)
    driven = update if dt_b is None else dt_b[..., None] * update  # (B, L, N)
    states = []
    for t in range(update.shape[1]):
        pre = state + dt_a[:, t, None] * (state @ transition.mT) + driven[:, t]
        state = layer_norm(pre, weight, bias, eps)
        states.append(state)
    return torch.stack(states, dim=1), state
