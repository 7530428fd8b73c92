"""Checks that a kernel and its NumPy twin share, so that they refuse the same input with the same words.

Letters: B batch, L length, N state; of the delta rule H heads, d head width, m hidden width of a flux.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
MAX_STATE = 256  # the kernels keep a state in buffers of this size on the stack
TRANSFORMS = ("lam", "exact")


def array(name: str, value: Any, letters: Sequence[str], sizes: Mapping[str, int], dtype: np.dtype) -> np.ndarray:
    """`value` as an aligned C-contiguous array, copied only where it is not one; read-only and strided arrays are accepted.

    `letters` spells the axes, "BL" or ("m", "2d") say, and `sizes` gives the size of each. Raises TypeError for what is not an array
    or has another dtype than `dtype`, ValueError for another shape.
    """
    _plain(name, value)
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, found {value.dtype}")
    shape = tuple(sizes[letter] for letter in letters)
    if value.shape != shape:
        raise ValueError(f"{name} must have shape ({', '.join(letters)}) = {shape}, found {value.shape}")
    if value.flags.c_contiguous and value.flags.aligned:
        return value
    return np.array(value, order="C", subok=False)


def token_ids(value: Any, vocab_size: int) -> np.ndarray:
    """`value` as int64 (B, L), copied only where it is not that. Raises ValueError for another dtype or shape, an empty axis, ids out of range."""
    ids = np.asarray(value)
    if ids.dtype.kind not in "iu":
        raise ValueError(f"input_ids must be integers, found {ids.dtype}")
    if ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(f"input_ids must have shape (batch, length), neither of them 0, found {ids.shape}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"input_ids {ids.shape} must lie in [0, {vocab_size}), found {low if low < 0 else high}")
    return ids.astype(np.int64, copy=False)


def _plain(name: str, value: Any) -> None:
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a NumPy array without a mask, found {type(value).__name__}")


def scan_arguments(
    update: Any, dt_a: Any, dt_b: Any, transition: Any, weight: Any, bias: Any, initial_state: Any, eps: Any, **states: Any
) -> tuple[list[np.ndarray | None], float]:
    """The array arguments of a selective scan, checked, in this order, then those in `states`, each (B, L, N); and eps as a float.

    None passes for dt_b and initial_state. Raises TypeError and ValueError that name the argument, what was found and what was expected.
    """
    _plain("update", update)
    if update.dtype not in DTYPES:
        raise TypeError(f"update must be float32 or float64, found {update.dtype}")
    if update.ndim != 3 or 0 in update.shape:
        raise ValueError(f"update must have shape (B, L, N) with no axis empty, found {update.shape}")
    sizes = dict(zip("BLN", update.shape, strict=True))
    if sizes["N"] > MAX_STATE:
        raise ValueError(f"update must have N of at most {MAX_STATE}, found shape {update.shape}")
    if isinstance(eps, bool) or not isinstance(eps, (int, float, np.floating)) or not 0.0 < eps < math.inf:
        raise ValueError(f"eps must be a positive finite number, found {eps!r}")

    def take(name: str, value: Any, letters: str, *, optional: bool = False) -> np.ndarray | None:
        return None if optional and value is None else array(name, value, letters, sizes, update.dtype)

    return [
        take("update", update, "BLN"), take("dt_a", dt_a, "BL"), take("dt_b", dt_b, "BL", optional=True), take("transition", transition, "NN"),
        take("weight", weight, "N"), take("bias", bias, "N"), take("initial_state", initial_state, "BN", optional=True),
        *(take(name, value, "BLN") for name, value in states.items()),
    ], float(eps)


def plain_arguments(
    q: Any, k: Any, v: Any, beta: Any, initial_state: Any, **gradients: Any
) -> tuple[list[np.ndarray], np.ndarray | None]:
    """The arguments of a plain delta rule, checked: q, k, v, beta, then those in `gradients`, grad_o and grad_state; and the state or None.

    Raises TypeError and ValueError that name the argument, what was found and what was expected.
    """
    sizes, dtype = _heads(q)
    axes = {"beta": "BHL", "grad_state": "BHdd"}
    named = {"q": q, "k": k, "v": v, "beta": beta, **gradients}
    arrays = [array(name, value, axes.get(name, "BHLd"), sizes, dtype) for name, value in named.items()]
    return arrays, None if initial_state is None else array("initial_state", initial_state, "BHdd", sizes, dtype)


def hierarchical_arguments(
    heads: Mapping[str, Any], token_mlp: Any, chunk_mlp: Any, bilinear: Any, temp: Any, mask: Any, initial_state: Any, chunk_size: Any, transform: Any
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray], np.ndarray, np.ndarray, np.ndarray, list[np.ndarray] | None, int]:
    """The arguments of a hierarchical delta rule, checked.

    `heads` holds q, k and v (B, H, L, d), then beta, decays and gates (B, H, L), by name. Returns those arrays, token_mlp, chunk_mlp,
    bilinear, temp, the number of valid tokens of every sample (B,) as int64, the states or None, and the chunk size, cut to L.
    Raises TypeError and ValueError that name the argument, what was found and what was expected.
    """
    sizes, dtype = _heads(heads["q"])
    d = sizes["d"]
    if transform not in TRANSFORMS:
        raise ValueError(f"transform must be {' or '.join(map(repr, TRANSFORMS))}, found {transform!r}")
    arrays = [array(name, value, "BHLd" if name in ("q", "k", "v") else "BHL", sizes, dtype) for name, value in heads.items()]
    token = _flux("token_mlp", token_mlp, "2d", 2 * d, dtype)
    chunk = _flux("chunk_mlp", chunk_mlp, "2d + 1", 2 * d + 1, dtype)
    bilinear, temp = array("bilinear", bilinear, "Hdd", sizes, dtype), array("temp", temp, "H", sizes, dtype)
    if initial_state is not None:
        if not isinstance(initial_state, (tuple, list)) or len(initial_state) != 2:
            raise TypeError(f"initial_state must be a pair (S_fast, S_slow) or None, found {_described(initial_state)}")
        named = zip(("S_fast", "S_slow"), initial_state, strict=True)
        initial_state = [array(f"{name} of initial_state", value, "BHdd", sizes, dtype) for name, value in named]
    lengths = np.full(sizes["B"], sizes["L"], np.int64) if mask is None else _lengths(mask, sizes)
    return arrays, token, chunk, bilinear, temp, lengths, initial_state, min(_chunk_size(chunk_size), sizes["L"])


def _heads(q: Any) -> tuple[dict[str, int], np.dtype]:
    """The sizes that q (B, H, L, d) gives to B, H, L and d, and its dtype."""
    _plain("q", q)
    if q.dtype not in DTYPES:
        raise TypeError(f"q must be float32 or float64, found {q.dtype}")
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"q must have shape (B, H, L, d) with no axis empty, found {q.shape}")
    return dict(zip("BHLd", q.shape, strict=True)), q.dtype


def _described(value: Any) -> str:
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, (tuple, list)) else type(value).__name__


def _chunk_size(value: Any) -> int:
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise TypeError(f"chunk_size must be an integer of at least 1, found {value!r}")
    if operator.index(value) < 1:
        raise ValueError(f"chunk_size must be at least 1, found {value!r}")
    return operator.index(value)


def _flux(name: str, mlp: Any, width: str, size: int, dtype: np.dtype) -> list[np.ndarray]:
    """The weights (m, width), (m,), (1, m) and (1,) of a flux; m is what the first of them says."""
    if not isinstance(mlp, (tuple, list)) or len(mlp) != 4:
        raise TypeError(f"{name} must be a tuple of four arrays (w0, b0, w2, b2), found {_described(mlp)}")
    first = mlp[0]
    _plain(f"w0 of {name}", first)
    if first.ndim != 2 or first.shape[0] == 0:
        raise ValueError(f"w0 of {name} must have shape (m, {width}) with m of at least 1 and {width} = {size}, found {first.shape}")
    sizes = {"m": first.shape[0], "1": 1, width: size}
    named = zip(("w0", "b0", "w2", "b2"), mlp, (("m", width), ("m",), ("1", "m"), ("1",)), strict=True)
    return [array(f"{part} of {name}", value, axes, sizes, dtype) for part, value, axes in named]


def _lengths(mask: Any, sizes: Mapping[str, int]) -> np.ndarray:
    """Valid tokens of every row of a mask (B, L) with padding on the right."""
    mask = array("mask", mask, "BL", sizes, np.dtype(bool))
    lengths = mask.sum(axis=1, dtype=np.int64)
    for row in np.flatnonzero((lengths == 0) | (mask[:, 1:] & ~mask[:, :-1]).any(axis=1)):
        if lengths[row] == 0:
            raise ValueError(f"mask must leave a valid token in every row, found none in row {row}")
        raise ValueError(f"mask must pad on the right only, found a hole in row {row} at token {mask[row].argmin()}")
    return lengths
