"""The memory of WaveCore (CMS): levels of slots that are read by attention, lose a share every step and take one row.

    read     att = softmax(K q / sqrt(d_k))        content = att M
    write    M, K <- (1 - decay) M, (1 - decay) K;  where open, row i of both <- g new + (1 - g) old
             slot0: i = 0, always open             least_salient: i = argmin ||M_i||^2, open where g > threshold

`write` rewrites the whole memory. `write_lazy` keeps M = scale M^ and K = scale K^, one scale per level, and the squared norms of the rows
of M^: decay is scale <- (1 - decay) scale, and a row is written as g new / scale + (1 - g) M^_i. A scale below 2^-10 is then folded into M^
and K^; much later rows would be chosen wrongly, long before anything overflows.

Row, open or closed, norms and scale are constants to the gradient. A row that is not finite is never written, so that one bad reading does not stay.
Source: ContinuonBrain's CMS. Letters: B batch, an axis that all of the tensors have or none, n slots, d width of the level, d_k width of a key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FOLD = 2.0**-10
Chosen = tuple[Tensor, Tensor]  # row (B,) int64, open (B,) bool
Levels = tuple[Tensor, ...]


def read(query: Tensor, memory: Tensor, keys: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """query (B, d_k), memory (B, n, d), keys (B, n, d_k), scale () or None for 1. Returns attention (B, n) and content (B, d)."""
    scores = (keys @ query[..., None])[..., 0] / math.sqrt(query.shape[-1])  # (B, n)
    attention = torch.softmax(scores if scale is None else scale * scores, -1)
    content = (attention[..., None, :] @ memory)[..., 0, :]  # (B, d)
    return attention, content if scale is None else scale * content


def choose(norms: Tensor, gate: Tensor, rule: str, threshold: float) -> Chosen:
    """The row to write and whether it is written, from squared norms (B, n) and gates (B, 1). On a tie the lowest row."""
    if rule == "slot0":
        return torch.zeros_like(gate[..., 0], dtype=torch.int64), torch.ones_like(gate[..., 0], dtype=torch.bool)
    return norms.argmin(-1), gate[..., 0] > threshold


def write(
    memory: Tensor, keys: Tensor, value: Tensor, key: Tensor, gate: Tensor, decay: float, *, rule: str, threshold: float, chosen: Chosen | None = None
) -> tuple[Tensor, Tensor]:
    """memory (B, n, d), keys (B, n, d_k), value (B, d), key (B, d_k), gate (B, 1). Returns memory and keys one step later.

    `chosen` replaces the choice of `rule`.
    """
    memory, keys = (1 - decay) * memory, (1 - decay) * keys
    row, is_open = choose(memory.detach().square().sum(-1), gate, rule, threshold) if chosen is None else chosen
    is_open = is_open & _finite(value, key, gate)
    return _put(memory, row, is_open, gate, value)[0], _put(keys, row, is_open, gate, key)[0]


def write_lazy(
    memory: Tensor, keys: Tensor, norms: Tensor, scale: Tensor, value: Tensor, key: Tensor, gate: Tensor, decay: float, *,
    rule: str, threshold: float, chosen: Chosen | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`write` for scale * memory and scale * keys: memory and keys stay as they are but for one row. norms (B, n) are those of `memory`."""
    scale = (1 - decay) * scale.detach()
    row, is_open = choose(norms, gate, rule, threshold) if chosen is None else chosen
    is_open = is_open & _finite(value, key, gate)
    memory, written = _put(memory, row, is_open, gate, value / scale)
    keys, _ = _put(keys, row, is_open, gate, key / scale)
    norms = norms.detach().scatter(-1, row[..., None], written.detach().square().sum(-1, keepdim=True))
    if scale < FOLD:
        memory, keys, norms, scale = scale * memory, scale * keys, (scale * memory.detach()).square().sum(-1), torch.ones_like(scale)
    return memory, keys, norms, scale


def read_levels(
    query: Tensor, memories: Levels, keys: Levels, scales: Levels | None = None, *, impl: str = "recurrent"
) -> tuple[Levels, Levels]:
    """`read` of every level: attention (B, n) and content (B, d) of each. `impl="compiled"` runs the Cython kernel; ValueError for another."""
    _check(impl)
    if impl == "compiled":
        from torch_impl.ops import compiled_cms

        return compiled_cms.read_levels(query, memories, keys, scales)
    pairs = [read(query, *level) for level in zip(memories, keys, scales or [None] * len(memories), strict=True)]
    attention, contents = zip(*pairs, strict=True)
    return attention, contents


def write_levels(
    memories: Levels, keys: Levels, norms: Levels | None, scales: Levels | None, values: Levels, new_keys: Levels, gates: Levels,
    decays: Sequence[float], *, rule: str, threshold: float, chosen: Sequence[Chosen] | None = None, impl: str = "recurrent",
) -> tuple[Levels, ...]:
    """`write`, or where norms and scales are given `write_lazy`, of every level.

    Returns memories and keys, and norms and scales where they are given, of every level. `impl` as in `read_levels`.
    """
    _check(impl)
    if impl == "compiled":
        from torch_impl.ops import compiled_cms

        return compiled_cms.write_levels(
            memories, keys, norms, scales, values, new_keys, gates, decays, rule=rule, threshold=threshold, chosen=chosen)
    held = (memories, keys) if norms is None or scales is None else (memories, keys, norms, scales)
    function, choices = write if len(held) == 2 else write_lazy, chosen or [None] * len(memories)
    written = [
        function(*level, rule=rule, threshold=threshold, chosen=choice)
        for *level, choice in zip(*held, values, new_keys, gates, decays, choices, strict=True)
    ]
    return tuple(zip(*written, strict=True))


def _check(impl: str) -> None:
    if impl not in ("recurrent", "compiled"):
        raise ValueError(f"impl of the memory must be 'recurrent' or 'compiled', found {impl!r}")


def _finite(*parts: Tensor) -> Tensor:
    """Whether all that a row is made of is finite: (B,)."""
    return torch.stack([part.isfinite().all(-1) for part in parts]).all(0)


def _put(rows: Tensor, row: Tensor, is_open: Tensor, gate: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """rows (B, n, d) with row <- gate new + (1 - gate) old where open, and that row (B, d)."""
    index = row[..., None, None].expand(*row.shape, 1, rows.shape[-1])
    old = rows.gather(-2, index)[..., 0, :]
    given = is_open[..., None]
    gate, new = torch.where(given, gate, 0), torch.where(given, new, 0)  # what is not written may be NaN, which zero times a gradient is too
    written = torch.where(given, gate * new + (1 - gate) * old, old)
    return rows.scatter(-2, index, written[..., None, :]), written
