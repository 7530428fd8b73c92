"""How stable WaveCore runs: its largest Lyapunov exponent along a rollout, and the share of its units that sit at the limit.

    tangent <- J_t tangent / |tangent|        exponent = mean over t of log |J_t tangent|        J_t = d(s, w, p)_{t+1} / d(s, w, p)_t

Source: Benettin et al., "Lyapunov characteristic exponents for smooth dynamical systems" (1980). Letters: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_impl.state import CoreState, check_core, check_time
from torch_impl.wavecore import WaveCore

LEAST_STEPS = 1000
Varied = tuple[Tensor, ...]
Step = Callable[[Varied, Any, Any], tuple[Varied, Any]]


def lyapunov_exponent(model: WaveCore, state: CoreState, inputs: tuple[Tensor, Tensor, Tensor], burn_in: int = 500) -> Tensor:
    """Largest exponent of the map of (s, w, p) along the rollout from `state`, in nats per step: (B,), or () without a batch axis.

    `inputs` is x_obs (T, B, obs), a_prev (T, B, action) and r_t (T, B, 1). The first `burn_in` steps turn the tangent and are not averaged.
    The memory is read and written along the rollout but is no part of the map: what a disturbance writes into it does not come back. The
    exponent is -inf where every disturbance ends at the limit of the states. Raises ValueError for fewer than 1,000 steps after the burn-in, for
    a step whose inputs are all zero, since LayerNorm at the zero vector has slope 1 / sqrt(eps), for states that overflow, and as `model.step`.
    """
    check_time(*inputs)
    check_core(model.config, inputs, state, model.core.U_p.dtype, time=True)
    check_rollout([x.numpy(force=True) for x in inputs], burn_in)
    with torch.no_grad():
        encoded = model.encoder(*inputs)

    def step(varied: Varied, memory: Any, now: tuple[Tensor, Tensor]) -> tuple[Varied, Any]:
        e, r = now
        memories, keys, _, scales = memory
        _, context, _ = model.cms_read(varied[0], e, memories, keys, scales)
        varied = model.core(*varied, e, context)
        with torch.no_grad():
            return varied, model.cms_write(varied[0], e, r, *memory)

    exponent = benettin(step, tuple(state[:3]), tuple(state[3:]), list(zip(encoded, inputs[2], strict=True)), burn_in)
    if not (exponent < torch.inf).all():
        raise ValueError(f"the states must stay finite along the rollout, found an exponent of {exponent.tolist()}")
    return exponent


def saturated_fraction(model: WaveCore, held: CoreState | Mapping[str, Any]) -> dict[str, float]:
    """Share of the units of "s", "w" and "p" that sit at the limit, over all rows, and all steps where `held` is the info of a rollout."""
    names = ("fast_state", "wave_state", "particle_state")
    states = held[:3] if isinstance(held, CoreState) else [held[name] for name in names]
    limit = model.config.state_saturation_limit or float("inf")
    return {name: (state.detach().abs() >= limit).double().mean().item() for name, state in zip("swp", states, strict=True)}


def benettin(step: Step, varied: Varied, held: Any, inputs: Iterable[Any], burn_in: int) -> Tensor:
    """Largest exponent (B,) of the map varied -> step(varied, held, now)[0], whose leaves are (B, width), or () for (width,) leaves.

    `held` is what else goes from step to step, a constant to the derivative; `inputs` has `now` of every step. A tangent that becomes zero
    gives -inf.
    """
    tangent = scaled(start(varied), growth(start(varied)))
    total, steps = torch.zeros_like(growth(tangent)), 0
    for t, now in enumerate(inputs):
        varied, held, tangent = push(step, varied, held, now, tangent)
        grown = growth(tangent)
        tangent = scaled(tangent, grown)
        if t >= burn_in:
            total, steps = total + grown.log(), steps + 1
    return total / steps


def push(step: Step, varied: Varied, held: Any, now: Any, tangent: Varied) -> tuple[Varied, Any, Varied]:
    """One step, and its Jacobian times `tangent`.

    As the derivative by u of J^T u, which is linear in u: with weights that have no tangent torch's forward mode is three times slower.
    """
    with torch.enable_grad():
        before = tuple(x.detach().requires_grad_() for x in varied)
        after, held = step(before, held, now)
        u = tuple(torch.zeros_like(x, requires_grad=True) for x in after)
        back = torch.autograd.grad(after, before, u, create_graph=True, materialize_grads=True)
    pushed = torch.autograd.grad(back, u, tangent, materialize_grads=True)
    return tuple(x.detach() for x in after), held, pushed


def start(varied: Varied) -> Varied:
    """A tangent without a preferred direction, the same every time and in both frameworks."""
    rng = np.random.default_rng(0)
    return tuple(torch.from_numpy(rng.normal(size=x.shape)).to(x) for x in varied)


def growth(tangent: Varied) -> Tensor:
    """Norm of every row, over all leaves: (B,)."""
    return sum(x.square().sum(-1) for x in tangent).sqrt()


def scaled(tangent: Varied, norm: Tensor) -> Varied:
    """`tangent` with every row divided by its norm (B,), zeros left zero."""
    safe = torch.where(norm > 0, norm, 1.0)
    return tuple(x / safe[..., None] for x in tangent)


def check_rollout(inputs: list[np.ndarray], burn_in: int) -> None:
    """Raise ValueError for a burn-in that leaves fewer than 1,000 steps, and for a step whose inputs (T, ..., width) are all zero."""
    steps = len(inputs[0])
    if isinstance(burn_in, bool) or not isinstance(burn_in, int) or burn_in < 0:
        raise ValueError(f"burn_in must be a number of steps, at least 0, found {burn_in!r}")
    if steps - burn_in < LEAST_STEPS:
        raise ValueError(f"an exponent needs at least {LEAST_STEPS} steps after the burn-in, found {steps} steps with burn_in={burn_in}")
    zero = ~np.concatenate(inputs, -1).any(-1)  # (T, B) or (T,)
    if zero.any():
        step, *row = np.argwhere(zero)[0]
        raise ValueError(f"inputs must not be zero, found x_obs, a_prev and r_t all zero at step {step}" + "".join(f" of row {i}" for i in row))
