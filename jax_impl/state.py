"""States carried between calls, and the checks of what a caller hands in.

A state is a list over blocks of {"ssm": (B, N), "wkv": (B, H, P, P)}: all that the model remembers, whatever the length.
Values can be checked only outside `jit`; shapes are checked everywhere.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

State = dict[str, Array]


def check_token_ids(input_ids: Array, vocab_size: int) -> None:
    """Raise ValueError unless `input_ids` is a non-empty integer (B, L) with values in [0, vocab_size)."""
    if not jnp.issubdtype(input_ids.dtype, jnp.integer):
        raise ValueError(f"input_ids must be integers, found {input_ids.dtype}")
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must have shape (batch, length), neither of them 0, found {tuple(input_ids.shape)}")
    if isinstance(input_ids, jax.core.Tracer):
        return
    ids = np.asarray(input_ids)  # jnp operations would be staged out when a constant is closed over inside `jit`
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"input_ids {tuple(input_ids.shape)} must lie in [0, {vocab_size}), found {low if low < 0 else high}")


def check_states(states: list[State], expected: list[dict[str, tuple[int, ...]]], dtype: jnp.dtype) -> None:
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
            if not isinstance(value, jax.core.Tracer) and np.isnan(np.asarray(value)).any():
                raise ValueError(f"states[{i}][{name!r}] {shape} must be finite, found NaN")


def check_mask(mask: Array, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `mask` has `shape` (B, L) and every row is some valid tokens and then only padding."""
    if tuple(mask.shape) != shape:
        raise ValueError(f"attention_mask must have the shape of input_ids, {shape}, found {tuple(mask.shape)}")
    if isinstance(mask, jax.core.Tracer):
        return
    valid = np.asarray(mask) != 0
    if not valid.any(1).all():
        raise ValueError(f"attention_mask: row {int((~valid.any(1)).argmax())} has no valid token")
    if (valid[:, 1:] & ~valid[:, :-1]).any():
        row = int((valid[:, 1:] & ~valid[:, :-1]).any(1).argmax())
        raise ValueError(f"attention_mask: row {row} has padding before a valid token; padding must be on the right, without holes")
