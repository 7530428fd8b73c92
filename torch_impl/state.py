"""States carried between calls, and the checks of what a caller hands in.

A state is a list over blocks of {"ssm": (B, N), "wkv": (B, H, P, P)}: all that the model remembers, whatever the length.
"""

from __future__ import annotations

import torch
from torch import Tensor

State = dict[str, Tensor]


def check_token_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless `input_ids` is a non-empty (B, L) of int64 or int32 with values in [0, vocab_size)."""
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids must be int64 or int32, found {input_ids.dtype}")
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must have shape (batch, length), neither of them 0, found {tuple(input_ids.shape)}")
    if torch.compiler.is_compiling():
        return
    low, high = (int(end) for end in torch.aminmax(input_ids))
    if low < 0 or high >= vocab_size:
        raise ValueError(f"input_ids {tuple(input_ids.shape)} must lie in [0, {vocab_size}), found {low if low < 0 else high}")


def check_states(states: list[State], expected: list[dict[str, tuple[int, ...]]], dtype: torch.dtype) -> None:
    """Raise ValueError unless `states` has the shapes of `expected` and the given dtype, and holds no NaN."""
    if not isinstance(states, (list, tuple)) or len(states) != len(expected):
        found = f"{len(states)} entries" if isinstance(states, (list, tuple)) else type(states).__name__
        raise ValueError(f"states must be a list with one entry per block, {len(expected)} in all, found {found}")
    for i, (state, shapes) in enumerate(zip(states, expected, strict=True)):
        if not isinstance(state, dict) or set(state) != set(shapes):
            found = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"states[{i}] must be a dict with the keys {sorted(shapes)}, found {found}")
        for name, shape in shapes.items():
            value = state[name]
            if tuple(value.shape) != shape:
                raise ValueError(f"states[{i}][{name!r}] must have shape {shape}, found {tuple(value.shape)}")
            if value.dtype != dtype:
                raise ValueError(f"states[{i}][{name!r}] must have dtype {dtype}, found {value.dtype}")
            if not torch.compiler.is_compiling() and torch.isnan(value).any():
                raise ValueError(f"states[{i}][{name!r}] {shape} must be finite, found NaN")


def check_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `mask` has `shape` (B, L) and every row is some valid tokens and then only padding."""
    if tuple(mask.shape) != shape:
        raise ValueError(f"attention_mask must have the shape of input_ids, {shape}, found {tuple(mask.shape)}")
    if torch.compiler.is_compiling():
        return
    valid = mask != 0
    if not valid.any(1).all():
        raise ValueError(f"attention_mask: row {int((~valid.any(1)).nonzero()[0])} has no valid token")
    if (valid[:, 1:] & ~valid[:, :-1]).any():
        row = int((valid[:, 1:] & ~valid[:, :-1]).any(1).nonzero()[0])
        raise ValueError(f"attention_mask: row {row} has padding before a valid token; padding must be on the right, without holes")
