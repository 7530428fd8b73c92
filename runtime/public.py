"""Public checkpoints: from their names to ours and back, and the sizes read off the shapes.

GroundThink (`grounded_mamba`): a state dict of the public GroundedMamba. The names are ours; `lm_head.weight`, tied to the embedding, may be
missing, and wrappers may have left `module.` or `_orig_mod.` in front.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from conf.models import GroundedMambaConfig
from runtime.arrays import check, check_name

_WRAPPERS = re.compile(r"(module\.|_orig_mod\.)+")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


class _Public(NamedTuple):
    rename: Callable[[Mapping[str, Any]], dict[str, np.ndarray]]
    config: Callable[[Mapping[str, np.ndarray]], Any]
    export: Callable[[Mapping[str, Any]], dict[str, np.ndarray]]


def rename(model: str, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays of a public checkpoint under our names. Raises ValueError for names that the public code does not have, or lacks."""
    check_name(model)
    return _PUBLIC[model].rename(arrays)


def config(model: str, arrays: Mapping[str, Any]) -> Any:
    """The configuration under which `arrays`, in public names or ours, compute what the public code computes.

    Raises ValueError where the shapes contradict one another or the public code has no such model.
    """
    check_name(model)
    return _PUBLIC[model].config(arrays)


def export(model: str, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `rename`: our arrays under the public names, complete. Raises ValueError where the public code has no place for one."""
    check_name(model)
    return _PUBLIC[model].export(arrays)


def _unwrapped(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    plain: dict[str, np.ndarray] = {}
    for key, value in arrays.items():
        name = _WRAPPERS.sub("", key, count=1) if _WRAPPERS.match(key) else key
        if name in plain:
            raise ValueError(f"two arrays are named {name} once wrapper prefixes are taken off")
        plain[name] = np.asarray(value)
    return plain


def _groundthink_config(arrays: Mapping[str, Any]) -> GroundedMambaConfig:
    plain = _unwrapped(arrays)
    needed = {"embedding.weight": 2, "blocks.0.ssm.A": 2, "blocks.0.rwkv.time_decay": 2}
    wrong = [
        f"{name} ({'missing' if name not in plain else f'shape {plain[name].shape}'})"
        for name, axes in needed.items()
        if name not in plain or plain[name].ndim != axes
    ]
    if wrong:
        raise ValueError(f"no GroundThink state dict: expected matrices under {', '.join(needed)}, found {', '.join(wrong)}")
    vocab_size, dim = plain["embedding.weight"].shape
    heads, head_dim = plain["blocks.0.rwkv.time_decay"].shape
    if heads * head_dim != dim:
        raise ValueError(f"blocks.0.rwkv.time_decay is {(heads, head_dim)}, which does not multiply to the width {dim} of embedding.weight")
    depth = len({match[1] for match in map(_BLOCK.fullmatch, plain) if match})
    return GroundedMambaConfig.groundthink(
        vocab_size=vocab_size, dim=dim, depth=depth, ssm_dim=plain["blocks.0.ssm.A"].shape[0], rwkv_heads=heads
    )


def _groundthink_rename(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    plain = _unwrapped(arrays)
    dtype = "float64" if any(value.dtype == np.float64 for value in plain.values()) else "float32"
    return check("grounded_mamba", _groundthink_config(plain), plain, dtype)


_PUBLIC = {"grounded_mamba": _Public(_groundthink_rename, _groundthink_config, _groundthink_rename)}
