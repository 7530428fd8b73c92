"""States carried between calls, and the checks of what a caller hands in.

A language model's is a list over blocks of {"ssm": (B, N), "wkv": (B, H, P, P)}; WaveCore's is a `CoreState`. Either is all that the model
remembers, whatever the length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from conf.models import SizedWaveCoreConfig

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


class CoreState(NamedTuple):
    """WaveCore between two steps. Level l of the memory is scales[l] * memories[l] and scales[l] * keys[l]; `norms` are those of `memories`."""

    s: Tensor  # (B, d_s)
    w: Tensor  # (B, d_w)
    p: Tensor  # (B, d_p)
    memories: tuple[Tensor, ...]  # (B, n, d) of every level
    keys: tuple[Tensor, ...]  # (B, n, d_k)
    norms: tuple[Tensor, ...]  # (B, n), squared
    scales: tuple[Tensor, ...]  # ()


def check_core(
    config: SizedWaveCoreConfig, inputs: tuple[Tensor, ...], held: CoreState | tuple, dtype: torch.dtype, *, time: bool = False
) -> None:
    """Hold what WaveCore is given to its configuration.

    `inputs`: x_obs, a_prev, r_t, with T in front where `time` is set. `held`: a `CoreState`, or s, w, p, memories and keys. Raises ValueError,
    naming the argument, for a wrong number of levels, shape, batch or dtype, and for values that are not finite (a state's memory left out).
    """
    lazy = isinstance(held, CoreState)
    named = dict(zip(("x_obs", "a_prev", "r_t"), inputs, strict=True))
    owner = "state.{}" if lazy else "{}_prev"
    states = {owner.format(name): value for name, value in zip("swp", held[:3], strict=True)}
    widths = (config.obs_dim, config.action_dim, 1, config.d_s, config.d_w, config.d_p)
    shapes: dict[str, tuple[int, ...]] = {name: (width,) for name, width in zip([*named, *states], widths, strict=True)}
    slots = list(zip(config.cms_sizes, config.cms_dims, strict=True))
    kinds = {"memories": slots, "keys": [(size, config.d_k) for size, _ in slots]}
    memory = {}
    if lazy:
        kinds |= {"norms": [(size,) for size, _ in slots], "scales": [()] * len(slots)}
    for kind, levels in zip(kinds, held[3:], strict=True):
        name = f"state.{kind}" if lazy else f"cms_{kind}"
        if not isinstance(levels, (list, tuple)) or len(levels) != config.num_levels:
            found = f"{len(levels)} levels" if isinstance(levels, (list, tuple)) else type(levels).__name__
            raise ValueError(f"{name} must be a tuple of {config.num_levels} levels, found {found}")
        memory |= {f"{name}[{level}]": value for level, value in enumerate(levels)}
        shapes |= {f"{name}[{level}]": shape for level, shape in enumerate(kinds[kind])}
    first = inputs[0].shape[1:] if time else inputs[0].shape
    if len(first) not in (1, 2) or 0 in first or first[-1] != config.obs_dim:
        steps = "T, " if time else ""
        raise ValueError(
            f"x_obs must have shape ({steps}batch, {config.obs_dim}) or ({steps}{config.obs_dim},), none of them 0, found {tuple(inputs[0].shape)}")
    rows = tuple(first[:-1])
    for name, value in (named | states | memory).items():
        found = tuple(value.shape[1:] if time and name in named else value.shape)
        expected = shapes[name] if name.startswith("state.scales") else (*rows, *shapes[name])
        if found != expected:
            raise ValueError(f"{name} must have shape {expected} with x_obs {tuple(first)}, found {found}")
        if value.dtype != dtype:
            raise ValueError(f"{name} must have dtype {dtype}, as the weights have, found {value.dtype}")
        looked_at = name in named or name in states or not lazy
        if looked_at and not torch.compiler.is_compiling() and not value.isfinite().all():
            raise ValueError(f"{name} {tuple(value.shape)} must be finite, found NaN or infinity")


def check_time(*inputs: Tensor) -> None:
    """Raise ValueError unless x_obs, a_prev and r_t have the same number of steps, at least one."""
    steps = [x.shape[0] if x.ndim else 0 for x in inputs]
    if len(set(steps)) != 1 or steps[0] == 0:
        raise ValueError(f"x_obs, a_prev and r_t must have the same number of steps, at least 1, along their first axis, found {steps}")
