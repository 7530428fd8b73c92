"""The functions of `cython_ext.cms` and `cython_ext.wave` again, in plain NumPy; `cython_ext.reference` is their door.

Letters: B batch, n slots, d width of a level, d_k width of a key; L length, I channels and S states of a wave.
"""

from __future__ import annotations

import math

import numpy as np
from numpy import ndarray

from cython_ext.checks_wavecore import FOLD, RULES, read_arguments, wave_arguments, write_arguments


def _put(rows: ndarray, row: ndarray, is_open: ndarray, gate: ndarray, new: ndarray) -> None:
    """rows (B, n, d)[row] <- gate new + (1 - gate) old where open."""
    index = np.flatnonzero(is_open), row[is_open]
    rows[index] = gate[is_open] * new[is_open] + (1 - gate[is_open]) * rows[index]


def _choose(norms: ndarray, gate: ndarray, kind: int, threshold: float, row: ndarray, opened: ndarray) -> tuple[ndarray, ndarray]:
    if row[0] >= 0:
        return row, opened > 0
    if RULES[kind] == "slot0":
        return np.zeros_like(row), np.ones(row.shape, bool)
    return norms.argmin(-1), gate[:, 0] > gate.dtype.type(threshold)


def _finite(*parts: ndarray) -> ndarray:
    return np.stack([np.isfinite(part).all(-1) for part in parts]).all(0)


class cms:
    """Twin of `cython_ext.cms`; the equations stand there."""

    @staticmethod
    def read(query, memory, keys, scale=None):
        """Attention over the slots, and the mean of their rows that it gives.

        query (B, d_k), memory (B, n, d), keys (B, n, d_k), all float32 or all float64, or all without B; scale () of their dtype, by which memory and
        keys are to be multiplied, or None for 1. Arrays that are read-only or not contiguous are accepted, the latter copied. Returns attention
        (B, n) and content (B, d), new arrays. Raises TypeError for another type or dtype, ValueError for another shape or an empty axis, by name.
        """
        query, memory, keys, scale, batched = read_arguments(query, memory, keys, scale)
        scale = query.dtype.type(scale)
        scores = scale * ((keys @ query[..., None])[..., 0] / query.dtype.type(math.sqrt(query.shape[-1])))
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        attention = weights / weights.sum(axis=-1, keepdims=True)
        content = scale * (attention[:, None] @ memory)[:, 0]
        return (attention, content) if batched else (attention[0], content[0])

    @staticmethod
    def write(memory, keys, value, key, gate, decay, *, rule, threshold, chosen=None):
        """One step of a plain memory, in place.

        memory (B, n, d), keys (B, n, d_k), value (B, d), key (B, d_k), gate (B, 1), all float32 or all float64, or all without B; decay in (0, 1);
        rule "slot0" or "least_salient", with its threshold; chosen (row (B,) int64, open (B,) bool) replaces the choice of the rule. memory and
        keys must be contiguous and writeable; the other arrays may be read-only or not contiguous. Raises TypeError for another type or dtype,
        ValueError for another shape, an empty axis, a memory that cannot be changed in place, a decay, a rule or a row that is none, by name.
        """
        memory, keys, _, value, key, gate, keep, kind, row, opened = write_arguments(
            memory, keys, None, None, value, key, gate, decay, rule, threshold, chosen)
        memory *= memory.dtype.type(keep)
        keys *= memory.dtype.type(keep)
        row, is_open = _choose((memory * memory).sum(-1), gate, kind, threshold, row, opened)
        is_open = is_open & _finite(value, key, gate)
        _put(memory, row, is_open, gate, value)
        _put(keys, row, is_open, gate, key)

    @staticmethod
    def write_lazy(memory, keys, norms, scale, value, key, gate, decay, *, rule, threshold, chosen=None):
        """`write` for scale * memory and scale * keys, in place: memory and keys stay as they are but for one row.

        norms (B, n), the squared norms of the rows of `memory`, and scale (), for all of B, are changed in place too; the rest as `write` takes it.
        A scale below 2^-10 is folded into memory and keys. Raises as `write` does.
        """
        memory, keys, norms, value, key, gate, keep, kind, row, opened = write_arguments(
            memory, keys, norms, scale, value, key, gate, decay, rule, threshold, chosen)
        scale *= scale.dtype.type(keep)
        row, is_open = _choose(norms, gate, kind, threshold, row, opened)
        is_open = is_open & _finite(value, key, gate)
        _put(memory, row, is_open, gate, value / scale)
        _put(keys, row, is_open, gate, key / scale)
        index = np.arange(len(row)), row
        norms[index] = (memory[index] ** 2).sum(-1)
        if scale < FOLD:
            memory *= scale
            keys *= scale
            norms[...] = (memory * memory).sum(-1)
            scale[...] = 1


class wave:
    """Twin of `cython_ext.wave`; the equations stand there."""

    @staticmethod
    def wave_scan(u, carry, dt, b, c, a_raw, b_base, c_base, d):
        """The wave over a sequence.

        u, dt, b, c (B, L, I), carry (B, I, S), a_raw, b_base, c_base (I, S), d (I,), all float32 or all float64; arrays that are read-only or not
        contiguous are accepted, the latter copied. Returns y (B, L, I) and the last h (B, I, S), new arrays. Raises TypeError for another type or
        dtype, ValueError for another shape or an empty axis, by name.
        """
        u, carry, dt, b, c, a_raw, b_base, c_base, d = wave_arguments("BLI", u, carry, dt, b, c, a_raw, b_base, c_base, d)
        y, h, a = np.empty_like(u), carry, -np.logaddexp(a_raw, a_raw.dtype.type(0))
        for t in range(u.shape[1]):
            h = np.exp(a * dt[:, t, :, None]) * h + (dt[:, t] * b[:, t] * u[:, t])[..., None] * b_base
            y[:, t] = (c[:, t, :, None] * c_base * h).sum(-1) + d * u[:, t]
        return y, h

    @staticmethod
    def wave_step(u, carry, dt, b, c, a_raw, b_base, c_base, d):
        """The wave over one step: `wave_scan` for L = 1 without that axis.

        u, dt, b, c (B, I), the rest as there. Returns y (B, I) and h (B, I, S), new arrays. Raises as `wave_scan` does.
        """
        u, carry, dt, b, c, a_raw, b_base, c_base, d = wave_arguments("BI", u, carry, dt, b, c, a_raw, b_base, c_base, d)
        y, h = wave.wave_scan(u[:, None], carry, dt[:, None], b[:, None], c[:, None], a_raw, b_base, c_base, d)
        return y[:, 0], h
