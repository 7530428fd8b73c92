"""The delta rule, plain and hierarchical.

    plain:         S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T        o_t = S_t^T q_t
    in a chunk:    N = -strict_lower(diag(beta) K K^T)    T = (I - N)^-1    U = T diag(beta) V    W = T diag(beta) K
                   U' = U - W S    O = Q S + lower(Q K^T) U'    S <- S + K^T U'
    hierarchical:  a fast and a slow state, read normalised and updated once per chunk: `hierarchical_delta_rule`

Sources: Schlag, Irie and Schmidhuber, "Linear Transformers Are Secretly Fast Weight Programmers" (2021); Yang et al., "Parallelizing
Linear Transformers with the Delta Rule over Sequence Length" (2024), section 3; LAM's hierarchical DeltaNet.
Letters: B batch, H heads, L length, d head width, C chunk, n chunks, m hidden width of a flux. S is (B, H, d, d), key index first.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

IMPLS = ("recurrent", "chunked")
TRANSFORMS = ("lam", "exact")
EPS = 1e-8  # beside the Frobenius norm of a state
Pair = tuple[Array, Array]
MLP = tuple[Array, Array, Array, Array]


def delta_rule(
    q: Array, k: Array, v: Array, beta: Array, initial_state: Array | None = None, *,
    chunk_size: int = 64, transform: str = "exact", impl: str = "chunked",
) -> tuple[Array, Array]:
    """The plain rule. q, k, v (B, H, L, d); beta (B, H, L); initial_state (B, H, d, d) or None for zeros.

    Returns o (B, H, L, d) and the last state. "exact" is the recurrence whatever the chunk; "lam" is what LAM computes in place of the
    inverse, and exists in chunks only. Raises ValueError for an unknown `transform` or `impl`, or a `chunk_size` below 1.
    """
    _check(chunk_size, transform, impl)
    if impl == "recurrent" and transform != "exact":
        raise ValueError(f"the recurrent form has transform 'exact', found {transform!r}")
    state = jnp.zeros((*q.shape[:2], q.shape[3], q.shape[3]), q.dtype) if initial_state is None else initial_state
    if impl == "recurrent" or (transform == "exact" and q.shape[2] == 1):
        return _recurrent(q, k, v, beta, state)
    k_b, v = beta[..., None] * k, beta[..., None] * v
    part = _inside(*(_chunks(x, chunk_size) for x in (q, k, k_b, v)), transform)

    def step(state: Array, one: Pair) -> tuple[Array, Array]:
        write, erase = one
        return state + write - erase @ state, state

    state, starts = jax.lax.scan(step, state, (jnp.moveaxis(part.write, 2, 0), jnp.moveaxis(part.erase, 2, 0)))
    return _joined(part.own + part.through @ jnp.moveaxis(starts, 0, 2), q.shape[2]), state


def _recurrent(q: Array, k: Array, v: Array, beta: Array, state: Array) -> tuple[Array, Array]:
    """One token after another: the equation as it stands."""

    def step(state: Array, token: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        q_t, k_t, v_t, beta_t = (x[..., None] for x in token)  # (B, H, d, 1), beta (B, H, 1)
        error = v_t - state.mT @ k_t
        state = state + beta_t[..., None] * k_t * error.mT
        return state, (state.mT @ q_t)[..., 0]

    state, o = jax.lax.scan(step, state, tuple(jnp.moveaxis(x, 2, 0) for x in (q, k, v, beta)))
    return jnp.moveaxis(o, 0, 2), state


def hierarchical_delta_rule(
    q: Array, k: Array, v: Array, beta: Array, fast_decay: Array, slow_decay: Array, fast_gate: Array, slow_gate: Array,
    token_mlp: MLP, chunk_mlp: MLP, bilinear: Array, temp: Array, mask: Array | None = None, initial_state: Pair | None = None, *,
    chunk_size: int = 64, transform: str = "lam", impl: str = "chunked",
) -> tuple[Array, Pair]:
    """The hierarchical rule: a fast and a slow memory, decayed, read, written, mixed and normalised once per chunk.

    q, k, v (B, H, L, d), not yet normalised; beta, decays and gates (B, H, L) in (0, 1); token_mlp: weights (m, 2d), (m,), (1, m), (1,);
    chunk_mlp the same with 2d + 1 inputs; bilinear (H, d, d); temp (H,); mask (B, L), true for valid tokens, padding on the right;
    initial_state (S_fast, S_slow), each (B, H, d, d). Returns o (B, H, L, d), zero at padded positions, and the last states.
    Chunks are counted from the first token, the last may be shorter; every mean over a chunk is over its valid tokens, and a chunk
    without any leaves the states as they are. Raises ValueError as `delta_rule`.
    """
    _check(chunk_size, transform, impl)
    valid = jnp.ones_like(q[:, :1, :, 0]) if mask is None else mask[:, None].astype(q.dtype)  # (B, 1, L)
    if mask is not None:
        q, k, v = (jnp.where(mask[:, None, :, None], x, 0.0) for x in (q, k, v))
    q, k = l2norm(q), l2norm(k)
    k_b, v = beta[..., None] * k, beta[..., None] * v
    phi = flux(jnp.concatenate([k_b, v], axis=-1), token_mlp)[..., 0]  # (B, H, L)
    alpha = 0.5 + 0.3 * phi
    zeros = jnp.zeros((*q.shape[:2], q.shape[3], q.shape[3]), q.dtype)
    states = (zeros, zeros) if initial_state is None else initial_state
    form = _one_chunk_after_another if impl == "recurrent" else _all_chunks
    return form(
        q, k, k_b, v, fast_decay, slow_decay, alpha * fast_gate, (1 - alpha) * slow_gate, chunk_mlp, bilinear, temp, valid, states,
        chunk_size, transform,
    )


def _one_chunk_after_another(q, k, k_b, v, fast_decay, slow_decay, fast_gate, slow_gate, chunk_mlp, bilinear, temp, valid, states, size, transform):
    """Chunk after chunk, as the equations stand. Gates carry their share of alpha; the rest as in `hierarchical_delta_rule`."""
    fast, slow = states
    outputs = []
    for start in range(0, q.shape[2], size):
        cut = slice(start, start + size)
        q_c, k_c, count = q[:, :, cut], k[:, :, cut], valid[:, :, cut].sum(-1)  # (B, H, C, d), (B, 1)
        u, w, scores = _transformed(q_c, k_c, k_b[:, :, cut], v[:, :, cut], transform)
        psi = _chunk_flux(k_c, u, count, chunk_mlp, bilinear, temp)[..., None, None]  # (B, H, 1, 1)
        kept_fast = _mean(fast_decay[:, :, cut] * valid[:, :, cut], count)[..., None, None] * (1 - 0.10 * psi) * fast
        kept_slow = _mean(slow_decay[:, :, cut] * valid[:, :, cut], count)[..., None, None] * (1 - 0.05 * psi) * slow
        read_fast, read_slow = normalised(kept_fast), normalised(kept_slow)
        u_fast, u_slow = u - w @ read_fast, u - w @ read_slow
        o_fast = fast_gate[:, :, cut, None] * (q_c @ read_fast + scores @ u_fast)
        o_slow = slow_gate[:, :, cut, None] * (q_c @ read_slow + scores @ u_slow)
        outputs.append(o_fast + o_slow)
        new = _mixed(kept_fast + k_c.mT @ u_fast, kept_slow + k_c.mT @ u_slow, psi)
        fast, slow = (jnp.where(count[..., None, None] > 0, one, old) for one, old in zip(new, (fast, slow), strict=True))
    return jnp.concatenate(outputs, axis=2), (fast, slow)


def _all_chunks(q, k, k_b, v, fast_decay, slow_decay, fast_gate, slow_gate, chunk_mlp, bilinear, temp, valid, states, size, transform):
    """The same with the work inside the chunks done for all of them at once: only (d, d) products are left to the loop.

    W R enters o and S linearly, so Aq U_x = Aq U - (Aq W) R_x and K^T U_x = K^T U - (K^T W) R_x.
    """
    q_c, k_c, k_b, v, valid, fast_decay, slow_decay = (_chunks(x, size) for x in (q, k, k_b, v, valid, fast_decay, slow_decay))
    count = valid.sum(-1)  # (B, 1, n)
    part = _inside(q_c, k_c, k_b, v, transform)
    psi = _chunk_flux(k_c, part.u, count, chunk_mlp, bilinear[:, None], temp[:, None])  # (B, H, n)
    keep = jnp.stack([_mean(fast_decay * valid, count) * (1 - 0.10 * psi), _mean(slow_decay * valid, count) * (1 - 0.05 * psi)], axis=3)

    def step(states: Array, one: tuple[Array, ...]) -> tuple[Array, Array]:
        write, erase, psi, keep, count = one
        kept = keep[..., None, None] * states  # (B, H, 2, d, d)
        read = normalised(kept)
        kept = kept + write[:, :, None] - erase[:, :, None] @ read
        new = _mixed(kept[:, :, 0], kept[:, :, 1], psi[..., None, None])
        return jnp.where(count[..., None, None, None] > 0, jnp.stack(new, axis=2), states), read

    along = tuple(jnp.moveaxis(x, 2, 0) for x in (part.write, part.erase, psi, keep, count))
    states, reads = jax.lax.scan(step, jnp.stack(states, axis=2), along)  # reads (n, B, H, 2, d, d)
    gates = [_chunks(gate, size)[..., None] for gate in (fast_gate, slow_gate)]
    fast_o, slow_o = (part.own + part.through @ jnp.moveaxis(reads[:, :, :, x], 0, 2) for x in range(2))
    return _joined(gates[0] * fast_o + gates[1] * slow_o, q.shape[2]), (states[:, :, 0], states[:, :, 1])


class Inside(NamedTuple):
    """What chunks contribute whatever the state: u, own = Aq U, through = Q - Aq W, each (..., C, d); write = K^T U, erase = K^T W (..., d, d)."""

    u: Array
    own: Array
    through: Array
    write: Array
    erase: Array


def _inside(q: Array, k: Array, k_b: Array, v: Array, transform: str) -> Inside:
    u, w, scores = _transformed(q, k, k_b, v, transform)
    return Inside(u, scores @ u, q - scores @ w, k.mT @ u, k.mT @ w)


def _transformed(q: Array, k: Array, k_b: Array, v: Array, transform: str) -> tuple[Array, Array, Array]:
    """U, W (..., C, d) and Aq (..., C, C) of chunks q, k, beta k, beta v (..., C, d)."""
    n = -jnp.tril(k_b @ k.mT, -1)
    both = jnp.concatenate([v, k_b], axis=-1)
    if transform == "exact":
        both = _unit_inverse(n) @ both
    else:
        both = both + (n + jnp.tril(n @ n.mT, -1)) @ both
    u, w = jnp.split(both, 2, axis=-1)
    return u, w, jnp.tril(q @ k.mT)


def _unit_inverse(n: Array) -> Array:
    """(I - N)^-1 of a strictly lower N (..., C, C): two neighbouring diagonal blocks with inverses A and D have the corner D N_21 A between.

    In the place of `jax.lax.linalg.triangular_solve`, which calls LAPACK from XLA's own threads: on two cores it never came back when
    several ran at once (jax 0.10.2). On the same, busy cores it took 54 ms where these products took 1.5 (32 chunks of 64, d 128, float32);
    alone on one core the two are closer.
    """
    chunk = n.shape[-1]
    size = 1 << (chunk - 1).bit_length()  # doubling needs a power of two: zero rows have the inverse of the identity
    n = jnp.pad(n, [(0, 0)] * (n.ndim - 2) + [(0, size - chunk)] * 2)
    inverse = jnp.ones((*n.shape[:-2], size, 1, 1), n.dtype)  # (..., blocks, half, half)
    half = 1
    while half < size:
        pairs = size // half // 2
        blocks = n.reshape(*n.shape[:-2], pairs, 2, half, pairs, 2, half)[..., :, 1, :, :, 0, :]
        corner = jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)  # (..., pairs, half, half)
        first, second = jnp.moveaxis(inverse.reshape(*inverse.shape[:-3], pairs, 2, half, half), -3, 0)
        inverse = jnp.block([[first, jnp.zeros_like(first)], [second @ corner @ first, second]])
        half *= 2
    return inverse[..., 0, :chunk, :chunk]


def _chunk_flux(k: Array, u: Array, count: Array, mlp: MLP, bilinear: Array, temp: Array) -> Array:
    """psi (...) of chunks k, u (..., C, d), which are zero beyond their `count` valid tokens. bilinear (H, ..., d, d), temp (H, ...)."""
    s = ((k @ bilinear) * u).sum(-1).sum(-1) / temp
    means = [_mean(k.mT, count[..., None]), _mean(u.mT, count[..., None]), (s / jnp.maximum(count, 1))[..., None]]
    return flux(jnp.concatenate(means, axis=-1), mlp)[..., 0]


def _mean(x: Array, count: Array) -> Array:
    """Mean along the last axis of `x`, of which `count` entries are valid and the others zero."""
    return x.sum(-1) / jnp.maximum(count, 1)


def _mixed(fast: Array, slow: Array, psi: Array) -> Pair:
    """Each timescale learns from the other, then both are normalised. States (B, H, d, d), psi (B, H, 1, 1)."""
    c = 0.05 + 0.1 * psi.mean(1, keepdims=True)  # over the heads of one sample
    return normalised(fast + c * psi * slow), normalised(slow + c * (1 - psi) * fast)


def flux(x: Array, mlp: MLP) -> Array:
    """clamp(sigmoid(MLP(x)), 0.01, 0.99): x (..., i) -> (..., 1)."""
    w0, b0, w2, b2 = mlp
    return jnp.clip(jax.nn.sigmoid(jax.nn.silu(x @ w0.T + b0) @ w2.T + b2), 0.01, 0.99)


def l2norm(x: Array) -> Array:
    """x / max(|x|, 1e-12) along the last axis; a zero row stays zero and has gradient zero."""
    return jnp.where((x != 0).any(-1, keepdims=True), x / jnp.maximum(_root((x * x).sum(-1, keepdims=True)), 1e-12), 0.0)


def normalised(state: Array) -> Array:
    """S / (|S|_F + 1e-8) over the last two axes; the norm's gradient at S = 0 is zero."""
    return state / (_root((state * state).sum((-2, -1), keepdims=True)) + EPS)


def _root(square: Array) -> Array:
    """Square root with gradient zero at zero, where the root's own is infinite."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def _chunks(x: Array, size: int) -> Array:
    """(B, H, L, ...) -> (B, H, n, C, ...). Zeros fill the last chunk: they write nothing and no mean counts them.

    The ragged chunk as a piece of its own would spare their arithmetic and nearly double the program, whose compilation costs more.
    """
    length = x.shape[2]
    size = min(size, length)
    x = jnp.pad(x, [(0, -length % size if axis == 2 else 0) for axis in range(x.ndim)])
    return x.reshape(*x.shape[:2], -1, size, *x.shape[3:])


def _joined(x: Array, length: int) -> Array:
    """Chunks end to end: (B, H, n, C, d) -> (B, H, L, d)."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])[:, :, :length]


def _check(chunk_size: int, transform: str, impl: str) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, found {chunk_size}")
    for name, value, choices in (("transform", transform, TRANSFORMS), ("impl of the delta rule", impl, IMPLS)):
        if value not in choices:
            raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, found {value!r}")
