"""Checks that the kernels of WaveCore and their NumPy twins share, so that they refuse the same input with the same words.

Letters: B batch, n slots, d width of a level, d_k width of a key; L length, I channels and S states of a wave.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cython_ext.checks import DTYPES, _plain, array
from cython_ext.checks_dense import dense_array

FOLD = 2.0**-10  # a scale below this is folded into the memory
RULES = ("slot0", "least_salient")  # in the order of `Rule` of cms.pxd


def read_arguments(query: Any, memory: Any, keys: Any, scale: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, bool]:
    """query, memory and keys with a batch axis, the scale as a float, and whether there was a batch axis."""
    memory, sizes, batch = _memory(memory, keys)
    named = (("query", query, ["d_k"]), ("keys", keys, ["n", "d_k"]))
    query, keys = (_fitting(name, value, [*batch, *axes], sizes, memory.dtype) for name, value, axes in named)
    scale = 1.0 if scale is None else array("scale", scale, "", {}, memory.dtype).item()
    if batch:
        return query, memory, keys, scale, True
    return query[None], memory[None], keys[None], scale, False


def write_arguments(
    memory: Any, keys: Any, norms: Any, scale: Any, value: Any, key: Any, gate: Any, decay: Any, rule: Any, threshold: Any, chosen: Any
) -> tuple[Any, ...]:
    """The arguments of a write with a batch axis: arrays, 1 - decay, the number of the rule, its threshold, and rows (-1: by the rule) and
    open, as int64.

    memory, keys, norms and scale are those that were given, or views of them.
    """
    _, sizes, batch = _memory(memory, keys)  # not the copy that this makes of an array which is not contiguous
    sizes["1"], dtype = 1, memory.dtype
    held = [("memory", memory, [*batch, "n", "d"]), ("keys", keys, [*batch, "n", "d_k"])]
    if scale is not None:
        held += [("norms", norms, [*batch, "n"]), ("scale", scale, [])]
    for name, given, axes in held:
        _fitting(name, given, axes, sizes, dtype)
        _in_place(name, given)
    named = (("value", value, "d"), ("key", key, "d_k"), ("gate", gate, "1"))
    # copies: they may be rows of the memory itself
    new = [np.array(_fitting(name, given, [*batch, axis], sizes, dtype), order="C") for name, given, axis in named]
    options = _options(decay, rule, threshold, chosen, batch, sizes)
    arrays = [memory, keys, norms, *new]
    if not batch:
        arrays = [None if part is None else part[None] for part in arrays]
    return *arrays, *options


def read_back_arguments(
    grad_attention: Any, grad_content: Any, query: Any, memory: Any, keys: Any, scale: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, float, bool]:
    """The gradients with a batch axis, then what `read_arguments` gives."""
    query, memory, keys, scale, batched = read_arguments(query, memory, keys, scale)
    batch, sizes = ["B"] if batched else [], dict(zip(("B", "n", "d"), memory.shape, strict=True))
    named = (("grad_attention", grad_attention, "n"), ("grad_content", grad_content, "d"))
    gradients = [_fitting(name, value, [*batch, axis], sizes, memory.dtype) for name, value, axis in named]
    return *(gradients if batched else [value[None] for value in gradients]), query, memory, keys, scale, batched


def write_back_arguments(
    grad_memory: Any, grad_keys: Any, memory: Any, keys: Any, norms: Any, scale: Any, value: Any, key: Any, gate: Any, decay: Any, rule: Any,
    threshold: Any, chosen: Any,
) -> tuple[tuple[Any, ...], bool]:
    """The arguments of the way back through a write, as `write_arguments` gives them: both gradients, memory, keys, norms, the scale as a float (1
    where it is None), value and so on; and whether there was a batch axis."""
    memory, sizes, batch = _memory(memory, keys)
    sizes["1"] = 1
    given = {
        "grad_memory": (grad_memory, "n", "d"), "grad_keys": (grad_keys, "n", "d_k"), "keys": (keys, "n", "d_k"), "norms": (norms, "n"),
        "value": (value, "d"), "key": (key, "d_k"), "gate": (gate, "1"),
    }
    if scale is None:
        del given["norms"]
    found = {name: _fitting(name, part, [*batch, *axes], sizes, memory.dtype) for name, (part, *axes) in given.items()}
    factor = 1.0 if scale is None else array("scale", scale, "", {}, memory.dtype).item()
    options = _options(decay, rule, threshold, chosen, batch, sizes)
    found = {name: part if batch else part[None] for name, part in ({"memory": memory} | found).items()}
    front = [found.get(name) for name in ("grad_memory", "grad_keys", "memory", "keys", "norms")]
    return (*front, factor, *(found[name] for name in ("value", "key", "gate")), *options), bool(batch)


def _options(decay: Any, rule: Any, threshold: Any, chosen: Any, batch: list[str], sizes: dict[str, int]) -> tuple[Any, ...]:
    """1 - decay, the number of the rule, its threshold, and rows and open as `_chosen` gives them."""
    for name, number, low, high in (("decay", decay, 0.0, 1.0), ("threshold", threshold, -1.0, 2.0)):
        if isinstance(number, bool) or not isinstance(number, (int, float, np.floating)) or not low < number < high:
            raise ValueError(f"{name} must lie in ({low:g}, {high:g}), found {number!r}")
    if rule not in RULES:
        raise ValueError(f"rule must be {' or '.join(map(repr, RULES))}, found {rule!r}")
    return 1.0 - float(decay), RULES.index(rule), threshold, *_chosen(chosen, batch, sizes)


def _memory(memory: Any, keys: Any) -> tuple[np.ndarray, dict[str, int], list[str]]:
    """memory, the sizes B, n, d and d_k, and its batch axis where it has one."""
    _plain("memory", memory)
    batch = ["B"] if memory.ndim != 2 else []
    if type(memory) is not np.ndarray or memory.dtype not in DTYPES or 0 in memory.shape or not memory.flags.carray or memory.ndim != 2 + len(batch):
        memory = dense_array("memory", memory, 2 + len(batch), "B, n, d")
    _plain("keys", keys)
    if keys.ndim != memory.ndim or keys.shape[-1] == 0:
        raise ValueError(f"keys must have shape ({', '.join([*batch, 'n', 'd_k'])}) with no axis empty, found {keys.shape}")
    return memory, dict(zip([*batch, "n", "d", "d_k"], [*memory.shape, keys.shape[-1]], strict=True)), batch


def _fitting(name: str, value: Any, letters: Sequence[str], sizes: dict[str, int], dtype: np.dtype) -> np.ndarray:
    """`array`, by a short way for what needs nothing: a write is a microsecond or two of work."""
    ready = type(value) is np.ndarray and value.dtype == dtype and value.shape == tuple([sizes[letter] for letter in letters])
    return value if ready and value.flags.carray else array(name, value, letters, sizes, dtype)


def _in_place(name: str, value: np.ndarray) -> None:
    if not value.flags.carray:
        raise ValueError(f"{name} is changed in place and must be C-contiguous, aligned and writeable, found one that is not")


def _chosen(chosen: Any, batch: list[str], sizes: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    rows = sizes["B"] if batch else 1
    if chosen is None:
        return np.full(rows, -1, np.int64), np.zeros(rows, np.int64)
    if not isinstance(chosen, (tuple, list)) or len(chosen) != 2:
        raise TypeError(f"chosen must be a pair (row, open) or None, found {type(chosen).__name__}")
    row = array("row of chosen", np.asarray(chosen[0]), batch, sizes, np.dtype(np.int64)).reshape(rows)
    opened = array("open of chosen", np.asarray(chosen[1]), batch, sizes, np.dtype(bool)).reshape(rows).astype(np.int64)
    if not ((row >= 0) & (row < sizes["n"])).all():
        raise ValueError(f"row of chosen must lie in [0, {sizes['n']}), found {row.tolist()}")
    return row, opened


def wave_arguments(letters: str, u: Any, carry: Any, dt: Any, b: Any, c: Any, a_raw: Any, b_base: Any, c_base: Any, d: Any) -> list[np.ndarray]:
    """The arguments of a wave, checked, in this order; `letters` spells the axes of u."""
    u = dense_array("u", u, len(letters), ", ".join(letters))
    sizes = dict(zip(letters, u.shape, strict=True))
    _plain("a_raw", a_raw)
    if a_raw.ndim != 2 or a_raw.shape[1] == 0:
        raise ValueError(f"a_raw must have shape (I, S) with no axis empty, found {a_raw.shape}")
    sizes["S"] = a_raw.shape[1]
    axes = {"carry": "BIS", "dt": letters, "b": letters, "c": letters, "a_raw": "IS", "b_base": "IS", "c_base": "IS", "d": "I"}
    given = zip(axes.items(), (carry, dt, b, c, a_raw, b_base, c_base, d), strict=True)
    return [u, *(_fitting(name, value, spelled, sizes, u.dtype) for (name, spelled), value in given)]


def wave_back_arguments(letters: str, grad_y: Any, grad_h: Any, u: Any, *rest: Any) -> list[np.ndarray]:
    """The gradients of y and of the last h, then what `wave_arguments` gives."""
    u, carry, *rest = wave_arguments(letters, u, *rest)
    sizes = dict(zip(letters, u.shape, strict=True)) | {"S": carry.shape[2]}
    return [_fitting("grad_y", grad_y, letters, sizes, u.dtype), _fitting("grad_h", grad_h, "BIS", sizes, u.dtype), u, carry, *rest]
