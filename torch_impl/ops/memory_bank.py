"""A bank of M slots, each the slow average of the rows that it attracted, read by multi-head attention.

    write:  slot = (1 - alpha) slot + alpha row,  count += 1
    read:   softmax(q K^T / sqrt(D / heads)) V  over the occupied slots,  K, V = slot / (1 - (1 - alpha)^count)

Source: GroundThink's grounded memory, with the de-biasing of Adam (Kingma and Ba, 2015). Letters: B batch, L length, D width,
M slots, R rows of one write. Occupied slots are always a prefix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STRIDE = 7919  # a prime: successive writes look at other positions of the sequence


def debias(slots: Tensor, count: Tensor, alpha: float) -> Tensor:
    """Divide each slot (M, D) by the weight that it has gathered; empty slots (count 0) are zero."""
    gathered = -torch.expm1(count.to(slots.dtype) * math.log1p(-alpha))  # (M,)
    occupied = count > 0
    return torch.where(occupied[:, None], slots / torch.where(occupied, gathered, 1.0)[:, None], 0.0)


def read(query: Tensor, keys: Tensor, values: Tensor, count: Tensor, *, alpha: float, heads: int) -> Tensor:
    """Attend from every token to the occupied slots; at least one must be occupied.

    query (B, L, D); keys, values (M, D); count (M,). Returns (B, L, D).
    """
    query = query.unflatten(-1, (heads, -1))  # (B, L, heads, D / heads)
    keys, values = (debias(x, count, alpha).unflatten(-1, (heads, -1)) for x in (keys, values))
    scores = torch.einsum("blhd,mhd->bhlm", query, keys) / math.sqrt(query.shape[-1])
    weights = scores.masked_fill(count == 0, -math.inf).softmax(-1)
    return torch.einsum("bhlm,mhd->blhd", weights, values).flatten(-2)


def row_positions(tokens: int, rows: int, writes: Tensor) -> Tensor:
    """Positions (R,) in the flattened sequence of `tokens` that write number `writes` takes: (floor(i T / R) + 7919 writes) mod T."""
    spread = torch.arange(rows, device=writes.device) * tokens // rows
    return (spread + STRIDE * writes) % tokens


def write(keys: Tensor, values: Tensor, count: Tensor, row_keys: Tensor, row_values: Tensor, *, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Apply rows in order: to empty slots while there are some, then to the slot with the most similar key before this write.

    keys, values (M, D); count (M,); row_keys, row_values (R, D) with R <= M. Returns the new keys, values and count.
    """
    keys, values, count = keys.clone(), values.clone(), count.clone()
    occupied = int((count > 0).sum())
    nearest = nearest_slots(row_keys, debias(keys, count, alpha), count)
    for i in range(row_keys.shape[0]):
        slot = occupied + i if occupied + i < keys.shape[0] else int(nearest[i])
        keys[slot] = (1 - alpha) * keys[slot] + alpha * row_keys[i]
        values[slot] = (1 - alpha) * values[slot] + alpha * row_values[i]
        count[slot] += 1
    return keys, values, count


def nearest_slots(row_keys: Tensor, slot_keys: Tensor, count: Tensor) -> Tensor:
    """Index (R,) of the occupied slot with the largest cosine to each row, the lowest index on a tie.

    Equal tokens write parallel keys, so exact ties are common and rounding must not decide them: cosines within D eps of the
    largest, the most that a sum of D products can be off, are a tie.
    """
    cosine = torch.nn.functional.normalize(row_keys, dim=-1, eps=1e-30) @ torch.nn.functional.normalize(slot_keys, dim=-1, eps=1e-30).mT
    cosine = cosine.masked_fill(count == 0, -math.inf)  # (R, M)
    tie = cosine >= cosine.amax(-1, keepdim=True) - row_keys.shape[-1] * torch.finfo(cosine.dtype).eps
    return tie.int().argmax(-1)
