"""The memory of WaveCore (CMS): levels of slots that are read by attention, lose a share every step and take one row.

    read     att = softmax(K q / sqrt(d_k))        content = att M
    write    M, K <- (1 - decay) M, (1 - decay) K;  where open, row i of both <- g new + (1 - g) old
             slot0: i = 0, always open             least_salient: i = argmin ||M_i||^2, open where g > threshold

`write` rewrites the whole memory. `write_lazy` keeps M = scale M^ and K = scale K^, one scale per level, and the squared norms of the rows
of M^: decay is scale <- (1 - decay) scale, and a row is written as g new / scale + (1 - g) M^_i. Below 2^-10 the scale is folded into M^ and
K^; much later rows would be chosen wrongly, long before anything overflows.

Row and open or closed are constants to the gradient. A row that is not finite is never written, so that one bad reading does not stay.
Source: ContinuonBrain's CMS. Letters: B batch, n slots, d width of the level, d_k width of a key.
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
    scores = (keys @ query[:, :, None])[:, :, 0] / math.sqrt(query.shape[-1])  # (B, n)
    attention = jax.nn.softmax(scores if scale is None else scale * scores, -1)
    content = (attention[:, None] @ memory)[:, 0]  # (B, d)
    return attention, content if scale is None else scale * content


def choose(norms: Array, gate: Array, rule: str, threshold: float) -> Chosen:
    """The row to write and whether it is written, from squared norms (B, n) and gates (B, 1). On a tie the lowest row."""
    if rule == "slot0":
        return jnp.zeros(norms.shape[0], jnp.int32), jnp.ones(gate.shape[0], bool)
    return norms.argmin(-1), gate[:, 0] > threshold


def write(
    memory: Array, keys: Array, value: Array, key: Array, gate: Array, decay: float, *, rule: str, threshold: float, chosen: Chosen | None = None
) -> tuple[Array, Array]:
    """memory (B, n, d), keys (B, n, d_k), value (B, d), key (B, d_k), gate (B, 1). Returns memory and keys one step later.

    `chosen` replaces the choice of `rule`.
    """
    memory, keys = (1 - decay) * memory, (1 - decay) * keys
    row, is_open = choose(jnp.square(memory).sum(-1), gate, rule, threshold) if chosen is None else chosen
    is_open = is_open & _finite(value, key, gate)
    return _put(memory, row, is_open, gate, value)[0], _put(keys, row, is_open, gate, key)[0]


def write_lazy(
    memory: Array, keys: Array, norms: Array, scale: Array, value: Array, key: Array, gate: Array, decay: float, *,
    rule: str, threshold: float, chosen: Chosen | None = None,
) -> tuple[Array, Array, Array, Array]:
    """`write` for scale * memory and scale * keys: memory and keys stay as they are but for one row. norms (B, n) are those of `memory`."""
    scale = (1 - decay) * scale

    def fold(memory: Array, keys: Array, norms: Array, scale: Array) -> tuple[Array, ...]:
        return scale * memory, scale * keys, jax.lax.stop_gradient(jnp.square(scale * memory).sum(-1)), jnp.ones_like(scale)

    memory, keys, norms, scale = jax.lax.cond(scale < FOLD, fold, lambda *same: same, memory, keys, norms, scale)
    row, is_open = choose(norms, gate, rule, threshold) if chosen is None else chosen
    is_open = is_open & _finite(value, key, gate)
    memory, written = _put(memory, row, is_open, gate, value / scale)
    keys, _ = _put(keys, row, is_open, gate, key / scale)
    new_norm = jax.lax.stop_gradient(jnp.square(written).sum(-1))
    return memory, keys, norms.at[jnp.arange(len(row)), row].set(new_norm), scale


def _finite(*parts: Array) -> Array:
    """Whether all that a row is made of is finite: (B,)."""
    return jnp.stack([jnp.isfinite(part).all(-1) for part in parts]).all(0)


def _put(rows: Array, row: Array, is_open: Array, gate: Array, new: Array) -> tuple[Array, Array]:
    """rows (B, n, d) with row <- gate new + (1 - gate) old where open, and that row (B, d)."""
    index = jnp.arange(rows.shape[0]), row
    old = rows[index]
    written = jnp.where(is_open[:, None], gate * new + (1 - gate) * old, old)
    return rows.at[index].set(written), written
