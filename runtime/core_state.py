"""The state of a WaveCore as a flat dict of arrays, so that a run can be saved in the middle and go on to the same bits.

    s, w, p, memories.l, keys.l, norms.l, scales.l         level l of the memory is scales.l * memories.l and scales.l * keys.l

The memory stays lazy: a plain one, scaled and taken back, would round. Letters: B batch, n slots and d width of a level.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from conf.models import SizedWaveCoreConfig
from runtime.arrays import dtype_kind, shorten

STATES = ("s", "w", "p")
LEVELS = ("memories", "keys", "norms", "scales")


def shapes(config: SizedWaveCoreConfig, batch: int | None) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every array of a state of `batch` rows, or without a batch axis; a scale, which all rows share, is ()."""
    rows, levels = () if batch is None else (batch,), range(config.num_levels)
    widths = {"s": config.d_s, "w": config.d_w, "p": config.d_p}
    sizes = list(zip(config.cms_sizes, config.cms_dims, strict=True))
    return {
        **{name: (*rows, width) for name, width in widths.items()},
        **{f"memories.{level}": (*rows, *sizes[level]) for level in levels},
        **{f"keys.{level}": (*rows, sizes[level][0], config.d_k) for level in levels},
        **{f"norms.{level}": (*rows, sizes[level][0]) for level in levels},
        **{f"scales.{level}": () for level in levels},
    }


def parts(state: Any) -> tuple[Any, ...]:
    """The seven parts of a `CoreState`, of either framework or of NumPy arrays. Raises TypeError for anything else."""
    if getattr(state, "_fields", None) != STATES + LEVELS:
        raise TypeError(f"state must be a CoreState, as init_state, state, step, rollout and load_state give it, found {type(state).__name__}")
    return tuple(state)


def levels(name: str, value: Any) -> tuple[Any, ...]:
    """A tuple with one entry per level. Raises ValueError, naming the argument, for what is neither list nor tuple."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} must be a tuple with one array per level, found {type(value).__name__}")
    return tuple(value)


def flatten(held: tuple[Any, ...]) -> dict[str, Any]:
    """Name -> leaf, of the seven parts of a state, or of s, w, p, memories and keys."""
    kinds = zip(LEVELS, held[3:], strict=False)
    return dict(zip(STATES, held[:3], strict=True)) | {f"{kind}.{level}": leaf for kind, leaves in kinds for level, leaf in enumerate(leaves)}


def nest(config: SizedWaveCoreConfig, arrays: Mapping[str, Any]) -> tuple[Any, ...]:
    """The seven parts of a state from its flat dict; the inverse of `flatten`."""
    memory = (tuple(arrays[f"{kind}.{level}"] for level in range(config.num_levels)) for kind in LEVELS)
    return (*(arrays[name] for name in STATES), *memory)


def check_state(config: SizedWaveCoreConfig, arrays: Mapping[str, Any], dtype: str, plain: bool = False) -> dict[str, np.ndarray]:
    """C-contiguous copies of a state's arrays, in order; with `plain`, of one that has no norms and scales.

    Raises ValueError, one for all that is wrong: missing, unused and misshapen names (so a wrong number of levels, or rows that differ from
    those of s), another dtype than `dtype`, values that are not finite, norms below 0 and scales outside (0, 1].
    """
    given = {key: np.asarray(value) for key, value in arrays.items()}
    first = given.get("s")
    batch = first.shape[0] if first is not None and first.ndim == 2 else None
    expected = {name: shape for name, shape in shapes(config, batch).items() if not (plain and name.startswith(LEVELS[2:]))}
    missing, unused = [name for name in expected if name not in given], [name for name in given if name not in expected]
    misshapen, kinds, values = [], [], []
    for name, shape in expected.items():
        value = given.get(name)
        if value is None:
            continue
        if value.shape != shape:
            misshapen.append(f"{name} is {value.shape}, expected {shape}")
        elif value.dtype != dtype:
            kinds.append(f"{name} is {value.dtype if dtype_kind(value.dtype) == 'float' else dtype_kind(value.dtype)}, expected {dtype}")
        elif not np.isfinite(value).all():
            values.append(f"{name} holds NaN or infinity")
        elif name.startswith("norms.") and (value < 0).any():
            values.append(f"{name} has a squared norm of {value.min()}, expected none below 0")
        elif name.startswith("scales.") and not 0 < value <= 1:
            values.append(f"{name} is {value}, expected a scale in (0, 1]")
    labelled = (("missing", missing), ("unused", unused), ("wrong shape", misshapen), ("wrong dtype", kinds), ("wrong values", values))
    problems = [f"{label}: {shorten(items)}" for label, items in labelled if items]
    if problems:
        raise ValueError(f"arrays do not fit a state of this wavecore with {config.num_levels} levels: " + "; ".join(problems))
    return {name: np.array(given[name], order="C") for name in expected}
