"""The memory of WaveCore (CMS): levels of slots that are read by attention, lose a share every step and take one row.

    read     att = softmax(K q / sqrt(d_k))        content = att M
    write    M, K <- (1 - decay) M, (1 - decay) K;  where open, row i of both <- g new + (1 - g) old
             slot0: i = 0, always open             least_salient: i = argmin ||M_i||^2, open where g > threshold

`write` rewrites the whole memory. `write_lazy` keeps M = scale M^ and K = scale K^, one scale per level, and the squared norms of the rows
of M^: decay is scale <- (1 - decay) scale, and a row is written as g new / scale + (1 - g) M^_i. A scale below 2^-10 is then folded into M^
and K^; much later rows would be chosen wrongly, long before anything overflows.

Row, open or closed, norms and scale are constants to the gradient. A row that is not finite is never written, so that one bad reading does not stay.
Source: ContinuonBrain's CMS. Letters: B batch, an axis that all of the arrays have or none, n slots, d width of the level, d_k width of a key.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

FOLD = 2.0**-10
Chosen = tuple[Array, Array]  # row (B,) int, open (B,) bool


def read(query: Array, memory: Array, keys: Array, scale: Array | None = None) -> tuple[Array, Array]:
    """query (B, d_k), memory (B, n, d), keys (B, n, d_k), scale () or None for 1. Returns attention (B, n) and content (B, d)."""
    scores = (keys @ query[..., None])[..., 0] / math.sqrt(query.shape[-1])  # (B, n)
    attention = jax.nn.softmax(scores if scale is None else scale * scores, -1)
    content = (attention[..., None, :] @ memory)[..., 0, :]  # (B, d)
    return attention, content if scale is None else scale * content


def choose(norms: Array, gate: Array, rule: str, threshold: float) -> Chosen:
    """The row to write and whether it is written, from squared norms (B, n) and gates (B, 1). On a tie the lowest row."""
    if rule == "slot0":
        return jnp.zeros(gate.shape[:-1], jnp.int32), jnp.ones(gate.shape[:-1], bool)
    return norms.argmin(-1), gate[..., 0] > threshold


def write(
    memory: Array, keys: Array, value: Array, key: Array, gate: Array, decay: float, *, rule: str, threshold: float, chosen: Chosen | None = None
) -> tuple[Array, Array]:
    """memory (B, n, d), keys (B, n, d_k), value (B, d), key (B, d_k), gate (B, 1). Returns memory and keys one step later.

    `chosen` replaces the choice of `rule`.
    """
    memory, keys = (1 - decay) * memory, (1 - decay) * keys
    row, is_open = choose(jnp.square(memory).sum(-1), gate, rule, threshold) if chosen is None else chosen
    is_open = is_open & _finite(value, key, gate)
    return _put(memory, row, is_open, gate, value), _put(keys, row, is_open, gate, key)


def write_lazy(
    memory: Array, keys: Array, norms: Array, scale: Array, value: Array, key: Array, gate: Array, decay: float, *,
    rule: str, threshold: float, chosen: Chosen | None = None,
) -> tuple[Array, Array, Array, Array]:
    """`write` for scale * memory and scale * keys: memory and keys stay as they are but for one row. norms (B, n) are those of `memory`."""
    scale = (1 - decay) * jax.lax.stop_gradient(scale)
    row, is_open = choose(norms, gate, rule, threshold) if chosen is None else chosen
    is_open = is_open & _finite(value, key, gate)
    memory = _put(memory, row, is_open, gate, value / scale)
    keys = _put(keys, row, is_open, gate, key / scale)
    index = _at(row)
    written = jax.lax.stop_gradient(memory[index])  # read again: a second use of the old row would make XLA copy the memory
    memory, keys, norms, scale = _fold(memory, keys, norms.at[index].set(jnp.square(written).sum(-1)), scale)
    return memory, keys, *jax.lax.stop_gradient((norms, scale))


@jax.custom_jvp
def _fold(memory: Array, keys: Array, norms: Array, scale: Array) -> tuple[Array, ...]:
    """Scale folded into memory, keys and norms where it is below FOLD.

    As a loop of one step or none, which XLA does in place; `cond` copies the memory, folded or not.
    """
    def fold(held: tuple[Array, ...]) -> tuple[Array, ...]:
        memory, keys, _, scale = held
        return scale * memory, scale * keys, jnp.square(scale * memory).sum(-1), jnp.ones_like(scale)

    return jax.lax.while_loop(lambda held: held[3] < FOLD, fold, (memory, keys, norms, scale))


@_fold.defjvp
def _fold_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    scale = primals[3]
    factor = jnp.where(scale < FOLD, scale, 1.0)
    return _fold(*primals), (factor * tangents[0], factor * tangents[1], jnp.zeros_like(primals[2]), jnp.zeros_like(scale))


def _finite(*parts: Array) -> Array:
    """Whether all that a row is made of is finite: (B,)."""
    return jnp.stack([jnp.isfinite(part).all(-1) for part in parts]).all(0)


def _at(row: Array) -> tuple[Array, ...]:
    """Index of the rows `row` (B,) in an array (B, n, ...)."""
    return (jnp.arange(len(row)), row) if row.ndim else (row,)


def _put(rows: Array, row: Array, is_open: Array, gate: Array, new: Array) -> Array:
    """rows (B, n, d) with row <- gate new + (1 - gate) old where open."""
    index = _at(row)
    old = rows[index]
    given = is_open[..., None]
    gate, new = jnp.where(given, gate, 0), jnp.where(given, new, 0)  # what is not written may be NaN, which zero times a gradient is too
    return rows.at[index].set(jnp.where(given, gate * new + (1 - gate) * old, old))
