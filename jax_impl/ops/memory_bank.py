"""A bank of M slots, each the slow average of the rows that it attracted, read by multi-head attention.

    write:  slot = (1 - alpha) slot + alpha row,  count += 1
    read:   softmax(q K^T / sqrt(D / heads)) V  over the occupied slots,  K, V = slot / (1 - (1 - alpha)^count)

Source: GroundThink's grounded memory, with the de-biasing of Adam (Kingma and Ba, 2015). Letters: B batch, L length, D width,
M slots, R rows of one write. Occupied slots are always a prefix.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

STRIDE = 7919  # a prime: successive writes look at other positions of the sequence


def debias(slots: Array, count: Array, alpha: float) -> Array:
    """Divide each slot (M, D) by the weight that it has gathered; empty slots (count 0) are zero."""
    gathered = -jnp.expm1(count.astype(slots.dtype) * math.log1p(-alpha))  # (M,)
    occupied = count > 0
    return jnp.where(occupied[:, None], slots / jnp.where(occupied, gathered, 1.0)[:, None], 0.0)


def read(query: Array, keys: Array, values: Array, count: Array, *, alpha: float, heads: int) -> Array:
    """Attend from every token to the occupied slots; at least one must be occupied.

    query (B, L, D); keys, values (M, D); count (M,). Returns (B, L, D).
    """
    query = query.reshape(*query.shape[:-1], heads, -1)  # (B, L, heads, D / heads)
    keys, values = (debias(x, count, alpha).reshape(x.shape[0], heads, -1) for x in (keys, values))
    scores = jnp.einsum("blhd,mhd->bhlm", query, keys) / math.sqrt(query.shape[-1])
    weights = jax.nn.softmax(jnp.where(count == 0, -jnp.inf, scores), axis=-1)
    return jnp.einsum("bhlm,mhd->blhd", weights, values).reshape(*query.shape[:2], -1)


def row_positions(tokens: int, rows: int, writes: Array) -> Array:
    """Positions (R,) in the flattened sequence of `tokens` that write number `writes` takes: (floor(i T / R) + 7919 writes) mod T.

    Every factor is split so that 32-bit integers, all that JAX has without x64, hold the products: exact for T below 2^22.
    """
    i = jnp.arange(rows)
    spread = i * (tokens // rows) + i * (tokens % rows) // rows
    high, low = jnp.divmod(writes % tokens, 256)
    offset = ((STRIDE * high) % tokens * 256 + STRIDE * low) % tokens
    return (spread + offset) % tokens


def write(keys: Array, values: Array, count: Array, row_keys: Array, row_values: Array, *, alpha: float) -> tuple[Array, Array, Array]:
    """Apply rows in order: to empty slots while there are some, then to the slot with the most similar key before this write.

    keys, values (M, D); count (M,); row_keys, row_values (R, D) with R <= M. Returns the new keys, values and count.
    """
    occupied = (count > 0).sum()
    nearest = nearest_slots(row_keys, debias(keys, count, alpha), count)

    def apply(i: Array, bank: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        keys, values, count = bank
        slot = jnp.where(occupied + i < keys.shape[0], occupied + i, nearest[i])
        keys = keys.at[slot].set((1 - alpha) * keys[slot] + alpha * row_keys[i])
        values = values.at[slot].set((1 - alpha) * values[slot] + alpha * row_values[i])
        return keys, values, count.at[slot].add(1)

    return jax.lax.fori_loop(0, row_keys.shape[0], apply, (keys, values, count))


def nearest_slots(row_keys: Array, slot_keys: Array, count: Array) -> Array:
    """Index (R,) of the occupied slot with the largest cosine to each row, the lowest index on a tie.

    Equal tokens write parallel keys, so exact ties are common and rounding must not decide them: cosines within D eps of the
    largest, the most that a sum of D products can be off, are a tie.
    """

    def normalise(x: Array) -> Array:
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)

    cosine = jnp.where(count == 0, -jnp.inf, normalise(row_keys) @ normalise(slot_keys).mT)  # (R, M)
    tie = cosine >= cosine.max(-1, keepdims=True) - row_keys.shape[-1] * jnp.finfo(cosine.dtype).eps
    return jnp.argmax(tie, axis=-1)
