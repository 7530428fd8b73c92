"""The hierarchical delta rule by its compiled kernel: the part of the door `compiled` that it takes, and what GROUNDWAVE_KERNELS says is said there.

The kernel is forward only: where a gradient is taken the JAX form runs, forward too, and "compiled" refuses. JAX's form is the chunked one.
Letters: B batch, H heads, L length, d head width, m hidden width of a flux.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_impl.ops import delta_rule as form
from jax_impl.ops.compiled import _by_platform, _call, _leading, _runs_compiled
from jax_impl.ops.delta_rule import MLP, Pair

NAMES = ("k", "v", "beta", "fast_decay", "slow_decay", "fast_gate", "slow_gate")


def hierarchical_delta_rule(
    q: Array, k: Array, v: Array, beta: Array, fast_decay: Array, slow_decay: Array, fast_gate: Array, slow_gate: Array,
    token_mlp: MLP, chunk_mlp: MLP, bilinear: Array, temp: Array, mask: Array | None = None, initial_state: Pair | None = None, *,
    chunk_size: int = 64, transform: str = "lam",
) -> tuple[Array, Pair]:
    """The rule of `jax_impl.ops.delta_rule`, forward only, by the compiled kernel where GROUNDWAVE_KERNELS allows it.

    q, k, v (B, H, L, d), not yet normalised; beta, decays and gates (B, H, L) in (0, 1); token_mlp: weights (m, 2d), (m,), (1, m), (1,);
    chunk_mlp the same with 2d + 1 inputs; bilinear (H, d, d); temp (H,); mask (B, L), true for valid tokens, padding on the right (its
    number of true entries is what the kernel goes by); initial_state (S_fast, S_slow), each (B, H, d, d).
    Returns o (B, H, L, d), zero at padded positions, and the last states.
    Raises ValueError for a wrong shape, an empty axis, a `chunk_size` below 1, an unknown transform or GROUNDWAVE_KERNELS; RuntimeError when
    it says "compiled" and the kernel cannot run, as where a gradient is taken.
    """
    B, H, L, d = _leading("q", q, "B, H, L, d")
    for name, array in zip(NAMES, (k, v, beta, fast_decay, slow_decay, fast_gate, slow_gate), strict=True):
        _shape(name, array, q.shape if name in ("k", "v") else (B, H, L))
    for name, mlp, width in (("token_mlp", token_mlp, 2 * d), ("chunk_mlp", chunk_mlp, 2 * d + 1)):
        m = mlp[0].shape[0]
        for part, array, shape in zip(("w0", "b0", "w2", "b2"), mlp, ((m, width), (m,), (1, m), (1,)), strict=True):
            _shape(f"{part} of {name}", array, shape)
    _shape("bilinear", bilinear, (H, d, d))
    _shape("temp", temp, (H,))
    for name, state in zip(("S_fast", "S_slow"), initial_state or (), strict=bool(initial_state)):
        _shape(f"{name} of initial_state", state, (B, H, d, d))
    if mask is not None:
        _shape("mask", mask, (B, L))
    form._check(chunk_size, transform, "chunked")
    weights = (q, k, v, beta, fast_decay, slow_decay, fast_gate, slow_gate, *token_mlp, *chunk_mlp, bilinear, temp)
    mode = _runs_compiled("hierarchical_delta_rule", (*weights, *(initial_state or ())), None)
    # as numbers: a transform of JAX wants a gradient, if only zero, for what it is given
    valid = None if mask is None else mask.astype(q.dtype)
    if mode is None:
        return _form(chunk_size, transform)(weights, valid, initial_state)
    return _rule(mode, chunk_size, transform, weights, valid, initial_state)


def _shape(name: str, array: Array, shape: tuple[int, ...]) -> None:
    if array.shape != shape or 0 in shape:
        raise ValueError(f"{name} must have shape {tuple(shape)} with no axis empty, found {tuple(array.shape)}")


def _form(chunk_size: int, transform: str) -> Any:
    def run(weights: tuple[Array, ...], valid: Array | None, states: Pair | None) -> tuple[Array, Pair]:
        mask = None if valid is None else valid != 0
        return form.hierarchical_delta_rule(
            *weights[:8], weights[8:12], weights[12:16], *weights[16:], mask, states, chunk_size=chunk_size, transform=transform)

    return run


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _rule(mode: str, chunk_size: int, transform: str, weights: tuple[Array, ...], valid: Array | None, states: Pair | None) -> tuple[Array, Pair]:
    def kernel(weights: tuple[Array, ...], valid: Array | None, states: Pair | None) -> tuple[Array, Pair]:
        batch, heads, length, d = weights[0].shape
        counts = jnp.full(batch, length, weights[0].dtype) if valid is None else valid.sum(1)
        given = (counts, counts) if states is None else states  # what stands for absent states is not read
        shapes = [weights[0].shape, *[(batch, heads, d, d)] * 2]
        o, fast, slow = _call(
            "hierarchical_delta_rule", [*weights, counts, *given], shapes, chunk_size=min(chunk_size, length), exact=transform == "exact",
            fresh=states is None)
        return o, (fast, slow)

    return _by_platform(mode, kernel, _form(chunk_size, transform), weights, valid, states)


def _forward(mode: str, chunk_size: int, transform: str, *arguments: Any) -> tuple[tuple[Array, Pair], Any]:
    if mode == "compiled":
        raise RuntimeError("GROUNDWAVE_KERNELS=compiled, but the kernel hierarchical_delta_rule has no gradient and one is taken")
    return jax.vjp(_form(chunk_size, transform), *arguments)


def _backward(mode: str, chunk_size: int, transform: str, pull: Any, cotangents: Any) -> Any:
    return pull(cotangents)


_rule.defvjp(_forward, _backward)
