"""The WKV memory of RWKV with a decay per channel that does not depend on the input.

    "bonus" (RWKV-5/6):   y_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t        S_t = diag(w) S_{t-1} + k_t v_t^T
    "gain"  (GroundThink): y_t = S_t^T r_t                                 S_t = diag(w) S_{t-1} + diag(u) k_t v_t^T

Sources: Peng et al., "Eagle and Finch: RWKV with Matrix-Valued States" (2024), eqs. 18-19; GroundThink's RWKVGroundedMemory.
Letters: B batch, L length, H heads, P head width, C chunk. S is (B, H, P, P), key index first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

TIME_FIRSTS = ("bonus", "gain")


def wkv(
    r: Array, k: Array, v: Array, w: Array, u: Array, initial_state: Array | None = None, *,
    time_first: str = "bonus", impl: str = "recurrent", chunk_size: int = 32,
) -> tuple[Array, Array]:
    """Read and write the memory along L.

    r, k, v (B, L, H, P); decay w and u (H, P); initial_state (B, H, P, P) or None for zeros. Returns y (B, L, H, P) and the last
    state. Under "direct" decays w may be zero, negative or above one. `impl="compiled"` runs the Cython kernel. Raises ValueError for an
    unknown `time_first` or `impl`.
    """
    if time_first not in TIME_FIRSTS:
        raise ValueError(f"time_first must be 'bonus' or 'gain', found {time_first!r}")
    if impl not in ("recurrent", "chunked", "compiled"):
        raise ValueError(f"impl of wkv must be 'recurrent', 'chunked' or 'compiled', found {impl!r}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, found {chunk_size}")
    if impl == "compiled":
        from jax_impl.ops import compiled

        return compiled.wkv(r, k, v, w, u, initial_state, time_first=time_first, chunk_size=chunk_size)
    if initial_state is None:
        initial_state = jnp.zeros((r.shape[0], *r.shape[2:], r.shape[3]), r.dtype)
    if impl == "chunked" and r.shape[1] > 1:
        return wkv_chunked(r, k, v, w, u, initial_state, time_first, chunk_size)
    return wkv_recurrent(r, k, v, w, u, initial_state, time_first)


def wkv_recurrent(r: Array, k: Array, v: Array, w: Array, u: Array, state: Array, time_first: str) -> tuple[Array, Array]:
    """One token after another: the equations as they stand. Shapes as in `wkv`."""

    def step(state: Array, token: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        r_t, k_t, v_t = token  # (B, H, P)
        write = k_t[..., None] * v_t[..., None, :]  # (B, H, P, P)
        if time_first == "bonus":
            read = state + u[..., None] * write
            state = w[..., None] * state + write
        else:
            read = state = w[..., None] * state + u[..., None] * write
        return state, (read.mT @ r_t[..., None])[..., 0]  # (B, H, P)

    state, outputs = jax.lax.scan(step, state, tuple(x.swapaxes(0, 1) for x in (r, k, v)))
    return outputs.swapaxes(0, 1), state


def wkv_chunked(
    r: Array, k: Array, v: Array, w: Array, u: Array, state: Array, time_first: str, chunk_size: int
) -> tuple[Array, Array]:
    """The same function with matrix products: between chunks through the state, inside a chunk through scores. Shapes as in `wkv`.

    A token reads itself with the score sum_d u_d r_d k_d in both variants; for the past, "gain" is "bonus" with k scaled by u and
    the read one decay later, so one form serves both.
    """
    r, k, v = (x.swapaxes(1, 2) for x in (r, k, v))  # (B, H, L, P)
    own = (r * k * u[:, None]).sum(-1)  # (B, H, L)
    if time_first == "gain":
        r, k = r * w[:, None], k * u[:, None]
    length = r.shape[2]
    chunk = min(chunk_size, length)
    whole = length - length % chunk
    y, state = _read_chunks(*(x[:, :, :whole] for x in (r, k, v, own)), w, state, chunk)
    if whole < length:
        rest, state = _read_chunks(*(x[:, :, whole:] for x in (r, k, v, own)), w, state, length - whole)
        y = jnp.concatenate([y, rest], axis=2)
    return y.swapaxes(1, 2), state


def _read_chunks(r: Array, k: Array, v: Array, own: Array, w: Array, state: Array, chunk: int) -> tuple[Array, Array]:
    """y_t = S_{t-1}^T r_t + own_t v_t with S_t = diag(w) S_{t-1} + k_t v_t^T, for L a multiple of `chunk`.

    r, k, v (B, H, L, P); own (B, H, L). Returns y (B, H, L, P) and the last S. Only powers w^0 .. w^C are formed, never an inverse.
    """
    exponents = jnp.arange(chunk + 1)
    powers = w[:, None] ** exponents[:, None]  # (H, C + 1, P): integer powers, right for negative w too
    r, k, v, own = (x.reshape(*x.shape[:2], -1, chunk, *x.shape[3:]) for x in (r, k, v, own))  # (B, H, L / C, C, P), own (B, H, L / C, C)
    written = (k * powers[:, None, :chunk][:, :, ::-1]).mT @ v  # (B, H, L / C, P, P)

    def step(state: Array, one: Array) -> tuple[Array, Array]:
        return powers[:, chunk, :, None] * state + one, state

    state, starts = jax.lax.scan(step, state, jnp.moveaxis(written, 2, 0))
    y = _scores(r, k, own, powers) @ v + (r * powers[:, None, :chunk]) @ jnp.moveaxis(starts, 0, 2)
    return y.reshape(*y.shape[:2], -1, y.shape[-1]), state


def _scores(r: Array, k: Array, own: Array, powers: Array) -> Array:
    """What token t reads of token s in its chunk: sum_d r_td k_sd w_d^(t-s-1) for s < t, own_t for s = t, 0 beyond.

    Two neighbouring blocks become one: a late token t' of the second reads an early token s' of the first at the exponent
    t' + (half - 1 - s'), so each factor carries a power of its own and the corner is a matrix product.
    r, k (B, H, L / C, C, P); own (B, H, L / C, C); powers (H, C + 1, P). Returns (B, H, L / C, C, C).
    """
    chunk = r.shape[3]
    size = 1 << (chunk - 1).bit_length()  # doubling needs a power of two: zero rows are cut off again
    r, k = (jnp.pad(x, [(0, 0)] * 3 + [(0, size - chunk), (0, 0)]) for x in (r, k))
    scores = jnp.pad(own, [(0, 0)] * 3 + [(0, size - chunk)])[..., None, None]  # (B, H, L / C, blocks, half, half)
    half = 1
    while half < size:
        early, late = (x.reshape(*x.shape[:3], -1, 2, half, x.shape[-1]) for x in (k, r))  # (B, H, L / C, blocks / 2, 2, half, P)
        decay = powers[:, None, None, :half]
        corner = (late[..., 1, :, :] * decay) @ (early[..., 0, :, :] * decay[:, :, :, ::-1]).mT
        first, second = jnp.moveaxis(scores.reshape(*scores.shape[:3], -1, 2, half, half), 4, 0)
        scores = jnp.block([[first, jnp.zeros_like(first)], [corner, second]])
        half *= 2
    return scores[..., 0, :chunk, :chunk]
