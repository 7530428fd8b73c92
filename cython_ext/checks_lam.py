"""Checks of what LamEngine is given, in the words of the torch module. Letters: B batch, L length, D width, H heads, V vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cython_ext.checks import token_ids

_LINEAR = ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj")
_PER_HEAD = ("b_proj", "fast_decay_proj", "slow_decay_proj", "fast_gate_proj", "slow_gate_proj")


def shapes(dim: int, heads: int, depth: int, vocab_size: int, positions: int, ffn_dim: int, kernel: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every array of a LAM."""
    width, hidden = dim // heads, max(dim // heads // 2, 1)
    delta: dict[str, tuple[int, ...]] = {f"{name}.weight": (dim, dim) for name in _LINEAR}
    delta |= {f"{name}.weight": (heads, dim) for name in _PER_HEAD}
    for name in ("fast_decay", "slow_decay"):
        delta |= {f"{name}_proj.bias": (heads,), f"{name}_bias": (heads,)}
    for name in "qkv":
        delta |= {f"{name}_conv1d.weight": (dim, 1, kernel), f"{name}_conv1d.bias": (dim,)}
    for name, inputs in (("token_flux", 2 * width), ("chunk_flux", 2 * width + 1)):
        delta |= {f"rule.{name}.hidden.weight": (hidden, inputs), f"rule.{name}.hidden.bias": (hidden,)}
        delta |= {f"rule.{name}.out.weight": (1, hidden), f"rule.{name}.out.bias": (1,)}
    delta |= {"rule.W_bilinear": (heads, width, width), "rule.temp": (heads,), "o_norm.weight": (width,), "o_norm.gate": (width,)}
    block = {f"delta.{name}": shape for name, shape in delta.items()}
    block |= {"ffn_in.weight": (ffn_dim, dim), "ffn_in.bias": (ffn_dim,), "ffn_out.weight": (dim, ffn_dim), "ffn_out.bias": (dim,)}
    block |= {f"{name}.{kind}": (dim,) for name in ("norm_delta", "norm_ffn") for kind in ("weight", "bias")}
    tables = {"word": vocab_size, "position": positions, "token_type": 2}
    every: dict[str, tuple[int, ...]] = {f"{name}_embeddings.weight": (rows, dim) for name, rows in tables.items()}
    every |= {"embedding_norm.weight": (dim,), "embedding_norm.bias": (dim,)}
    return every | {f"blocks.{index}.{name}": shape for index in range(depth) for name, shape in block.items()}


def checked_weights(arrays: Mapping[str, Any], heads: Any, depth: Any, dtype: Any) -> dict[str, np.ndarray]:
    """Contiguous copies of the arrays of a LAM, as `dtype`.

    Raises TypeError for `heads` or `depth` that are no integers, ValueError for one below 1, for a width that `heads` does not divide, for
    another dtype and, in one line, for arrays that are missing, unused or misshapen.
    """
    for name, value in (("heads", heads), ("depth", depth)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name} must be an integer of at least 1, found {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, found {value!r}")
    if dtype not in ("float32", "float64"):
        raise ValueError(f"dtype must be 'float32' or 'float64', found {dtype!r}")
    given = {name: np.asarray(value) for name, value in arrays.items()}
    axes = (("word_embeddings.weight", 2), ("position_embeddings.weight", 2), ("blocks.0.ffn_in.weight", 2), ("blocks.0.delta.q_conv1d.weight", 3))
    for name, ndim in axes:  # what the sizes are read off
        if name not in given or given[name].ndim != ndim or 0 in given[name].shape:
            raise ValueError(f"arrays[{name!r}] must have {ndim} axes, none of them empty, found {given[name].shape if name in given else 'none'}")
    (vocab_size, dim), positions, ffn_dim, kernel = (given[name].shape if name == axes[0][0] else given[name].shape[-1 if ndim == 3 else 0]
                                                     for name, ndim in axes)
    if dim % heads:
        raise ValueError(f"heads must divide the width {dim}, found {heads}")
    expected = shapes(dim, heads, depth, vocab_size, positions, ffn_dim, kernel)
    problems = [f"missing {name}" for name in expected if name not in given] + [f"unused {name}" for name in given if name not in expected]
    problems += [f"{name} must have shape {shape}, found {given[name].shape}" for name, shape in expected.items()
                 if name in given and given[name].shape != shape]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"arrays do not fit a LAM: {'; '.join(problems[:8])}{more}")
    return {name: np.array(given[name], dtype=dtype, order="C") for name in expected}


def checked_ids(input_ids: Any, vocab_size: int, max_length: int) -> np.ndarray:
    """`input_ids` as int64 (B, L). Raises ValueError for another dtype, shape or length and for ids out of range."""
    ids = token_ids(input_ids, vocab_size)
    if ids.shape[1] > max_length:
        raise ValueError(f"input_ids may have at most max_length={max_length} tokens, found {ids.shape[1]}")
    return ids


def checked_lengths(mask: Any, shape: tuple[int, int]) -> np.ndarray:
    """Valid tokens (B,) of every row. Raises ValueError for a mask of another shape, with a hole, or with a row without valid tokens."""
    if mask is None:
        return np.full(shape[0], shape[1], np.intp)
    valid = np.asarray(mask) != 0
    if valid.shape != shape:
        raise ValueError(f"attention_mask must have the shape of input_ids, {shape}, found {valid.shape}")
    lengths = valid.sum(axis=1, dtype=np.intp)
    if not lengths.all():
        raise ValueError(f"attention_mask: row {int(lengths.argmin())} has no valid token")
    holes = (valid[:, 1:] & ~valid[:, :-1]).any(axis=1)
    if holes.any():
        raise ValueError(f"attention_mask: row {int(holes.argmax())} has padding before a valid token; padding must be on the right, without holes")
    return lengths
