"""How stable WaveCore runs: its largest Lyapunov exponent along a rollout, and the share of its units that sit at the limit.

    tangent <- J_t tangent / |tangent|        exponent = mean over t of log |J_t tangent|        J_t = d(s, w, p)_{t+1} / d(s, w, p)_t

Source: Benettin et al., "Lyapunov characteristic exponents for smooth dynamical systems" (1980). Letters: B batch, T time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_impl.functional import Variables, WaveCoreModel
from jax_impl.state import CoreState, check_core, check_time

LEAST_STEPS = 1000
Varied = tuple[Array, ...]
Step = Callable[[Varied, Any, Any], tuple[Varied, Any]]


def lyapunov_exponent(
    model: WaveCoreModel, variables: Variables, state: CoreState, inputs: tuple[Array, Array, Array], burn_in: int = 500
) -> Array:
    """Largest exponent of the map of (s, w, p) along the rollout from `state`, in nats per step: (B,), or () without a batch axis.

    `inputs` is x_obs (T, B, obs), a_prev (T, B, action) and r_t (T, B, 1). The first `burn_in` steps turn the tangent and are not averaged.
    The memory is read and written along the rollout but is no part of the map: what a disturbance writes into it does not come back. The
    exponent is -inf where every disturbance ends at the limit of the states. Raises ValueError for fewer than 1,000 steps after the burn-in, for
    a step whose inputs are all zero, since LayerNorm at the zero vector has slope 1 / sqrt(eps), for states that overflow, and as `model.step`.
    Not for use inside `jit`; it is compiled once for every length.
    """
    check_time(*inputs)
    check_core(model.config, inputs, state, model.dtype, time=True)
    check_rollout([np.asarray(x) for x in inputs], burn_in)
    exponent = _along(model, variables, state, inputs, burn_in)
    if not (exponent < jnp.inf).all():
        raise ValueError(f"the states must stay finite along the rollout, found an exponent of {exponent.tolist()}")
    return exponent


@functools.partial(jax.jit, static_argnums=0)
def _along(model: WaveCoreModel, variables: Variables, state: CoreState, inputs: tuple[Array, ...], burn_in: Array) -> Array:
    core = model.merge(variables)

    def step(varied: Varied, memory: Any, now: tuple[Array, Array]) -> tuple[Varied, Any]:
        e, r = now
        memories, keys, _, scales = memory
        _, context, _ = core.cms_read(varied[0], e, memories, keys, scales)
        varied = core.core(*varied, e, context)
        return varied, core.cms_write(varied[0], e, r, *memory)

    return benettin(step, tuple(state[:3]), tuple(state[3:]), (core.encoder(*inputs), inputs[2]), burn_in)


def saturated_fraction(model: WaveCoreModel, held: CoreState | Mapping[str, Any]) -> dict[str, float]:
    """Share of the units of "s", "w" and "p" that sit at the limit, over all rows, and all steps where `held` is the info of a rollout."""
    names = ("fast_state", "wave_state", "particle_state")
    states = held[:3] if isinstance(held, CoreState) else [held[name] for name in names]
    limit = model.config.state_saturation_limit or float("inf")
    return {name: float((np.abs(np.asarray(state)) >= limit).mean()) for name, state in zip("swp", states, strict=True)}


def benettin(step: Step, varied: Varied, held: Any, inputs: Any, burn_in: int | Array) -> Array:
    """Largest exponent (B,) of the map varied -> step(varied, held, now)[0], whose leaves are (B, width), or () for (width,) leaves.

    `held` is what else goes from step to step, a constant to the derivative; `inputs` has `now` of every step, stacked. A tangent that becomes
    zero gives -inf.
    """
    def advance(carry: tuple[Any, ...], item: tuple[Any, Array]) -> tuple[tuple[Any, ...], None]:
        varied, held, tangent, total = carry
        now, counted = item
        varied, tangent, held = jax.jvp(lambda *varied: step(varied, held, now), varied, tangent, has_aux=True)
        grown = growth(tangent)
        return (varied, held, scaled(tangent, grown), jnp.where(counted, total + jnp.log(grown), total)), None

    tangent = scaled(start(varied), growth(start(varied)))
    counted = jnp.arange(len(jax.tree.leaves(inputs)[0])) >= burn_in
    (*_, total), _ = jax.lax.scan(advance, (varied, held, tangent, jnp.zeros_like(growth(tangent))), (inputs, counted))
    return total / counted.sum()


def start(varied: Varied) -> Varied:
    """A tangent without a preferred direction, the same every time and in both frameworks."""
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in varied)


def growth(tangent: Varied) -> Array:
    """Norm of every row, over all leaves: (B,)."""
    return jnp.sqrt(sum(jnp.square(x).sum(-1) for x in tangent))


def scaled(tangent: Varied, norm: Array) -> Varied:
    """`tangent` with every row divided by its norm (B,), zeros left zero."""
    safe = jnp.where(norm > 0, norm, 1.0)
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
