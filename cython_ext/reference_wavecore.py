"""The functions of `cython_ext.cms` and `cython_ext.wave` again, in plain NumPy; `cython_ext.reference` is their door.

Letters: B batch, n slots, d width of a level, d_k width of a key; L length, I channels and S states of a wave.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy import ndarray

from cython_ext.checks_wavecore import (
    FOLD,
    RULES,
    read_arguments,
    read_back_arguments,
    wave_arguments,
    wave_back_arguments,
    write_arguments,
    write_back_arguments,
)


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
    def read_backward(grad_attention, grad_content, query, memory, keys, scale=None):
        """The gradients of every array argument of `read`, given those of the attention and of the content that it returned.

        grad_attention (B, n), grad_content (B, d); the rest as `read` took it, and what it computed on the way is computed again. Returns a tuple in
        the order (query, memory, keys, scale), each of the argument's shape and dtype; None for a scale that was None. The sum of a scale's gradient
        is taken in float64. Raises as `read` does.
        """
        grad_attention, grad_content, query, memory, keys, factor, batched = read_back_arguments(
            grad_attention, grad_content, query, memory, keys, scale)
        factor, root = query.dtype.type(factor), query.dtype.type(math.sqrt(query.shape[-1]))
        attention, _ = cms.read(query, memory, keys, np.asarray(factor))
        answers, raw = _times(memory, grad_content), _times(keys, query) / root
        pull = grad_attention + factor * answers
        pull = attention * (pull - (attention * pull).sum(-1, keepdims=True))
        scores = factor * pull / root
        gradients = ((scores[:, None] @ keys)[:, 0], (attention * factor)[..., None] * grad_content[:, None], scores[..., None] * query[:, None])
        total = (attention * answers + pull * raw).sum(dtype=np.float64)
        grad_scale = None if scale is None else np.array(total, query.dtype)
        return (*(gradients if batched else [part[0] for part in gradients]), grad_scale)

    @staticmethod
    def write(memory, keys, value, key, gate, decay, *, rule, threshold, chosen=None):
        """One step of a plain memory, in place.

        memory (B, n, d), keys (B, n, d_k), value (B, d), key (B, d_k), gate (B, 1), all float32 or all float64, or all without B; decay in (0, 1);
        rule "slot0" or "least_salient", with its threshold; chosen (row (B,) int64, open (B,) bool) replaces the choice of the rule. memory and
        keys must be contiguous and writeable; the other arrays may be read-only or not contiguous. Raises TypeError for another type or dtype,
        ValueError for another shape, an empty axis, a memory that cannot be changed in place, a decay, a rule or a row that is none, by name.
        """
        memory, keys, _, value, key, gate, keep, kind, threshold, row, opened = write_arguments(
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
        memory, keys, norms, value, key, gate, keep, kind, threshold, row, opened = write_arguments(
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

    @staticmethod
    def write_backward(grad_memory, grad_keys, memory, keys, value, key, gate, decay, *, rule, threshold, chosen=None):
        """The gradients of `write`, given those of the memory and the keys that it left.

        grad_memory (B, n, d), grad_keys (B, n, d_k); memory and keys as they were before the write, the rest as `write` took it; nothing is changed
        in place, and arrays that are read-only or not contiguous are accepted, the latter copied. Returns a tuple of new arrays in the order
        (memory, keys, value, key, gate), each of the argument's shape and dtype. Raises as `write` does, but for what concerns writing in place.
        """
        return _gone_back(grad_memory, grad_keys, memory, keys, None, None, value, key, gate, decay, rule, threshold, chosen)

    @staticmethod
    def write_lazy_backward(grad_memory, grad_keys, memory, keys, norms, scale, value, key, gate, decay, *, rule, threshold, chosen=None):
        """The gradients of `write_lazy`, given those of the memory and the keys that it left.

        norms (B, n) and scale () as they were before the write too; the rest, what is returned and what is raised as in `write_backward`.
        """
        return _gone_back(grad_memory, grad_keys, memory, keys, norms, scale, value, key, gate, decay, rule, threshold, chosen)


def _times(matrix: ndarray, vector: ndarray) -> ndarray:
    """matrix (B, n, d) times vector (B, d): (B, n)."""
    return (matrix @ vector[..., None])[..., 0]


def _gone_back(*given: Any) -> tuple[ndarray, ...]:
    """The way back through a write, plain where norms and scale are None; arguments in the order of `write_lazy_backward`."""
    found, batched = write_back_arguments(*given)
    grad_memory, grad_keys, memory, keys, norms, scale, value, key, gate, keep, kind, threshold, row, opened = found
    keep, scale = memory.dtype.type(keep), memory.dtype.type(scale)
    if norms is None:
        norms, factor, decayed, fold = ((keep * memory) ** 2).sum(-1), keep, memory.dtype.type(1), memory.dtype.type(1)
    else:
        factor, decayed = memory.dtype.type(1), keep * scale
        fold = decayed if decayed < FOLD else factor
    row, is_open = _choose(norms, gate, kind, threshold, row, opened)
    is_open = is_open & _finite(value, key, gate)
    index, gate = (np.flatnonzero(is_open), row[is_open]), gate[is_open]
    grad_gate, to_rows, to_new = np.zeros((len(row), 1), memory.dtype), [], []
    for grad, rows, new in ((grad_memory, memory, value), (grad_keys, keys, key)):
        pull = fold * grad[index]
        to_rows.append((factor * fold) * grad)
        to_rows[-1][index] = factor * (1 - gate) * pull
        to_new.append(np.zeros_like(new))
        to_new[-1][is_open] = gate * pull / decayed
        grad_gate[is_open] += (pull * (new[is_open] / decayed - factor * rows[index])).sum(-1, keepdims=True)
    gradients = *to_rows, *to_new, grad_gate
    return gradients if batched else tuple(part[0] for part in gradients)


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

    @staticmethod
    def wave_scan_backward(grad_y, grad_h, u, carry, dt, b, c, a_raw, b_base, c_base, d):
        """The gradients of every argument of `wave_scan`, given those of y and of the last h that it returned.

        grad_y (B, L, I), grad_h (B, I, S); the rest as `wave_scan` took it, and what it computed on the way is computed again. Returns a tuple of new
        arrays in the order (u, carry, dt, b, c, a_raw, b_base, c_base, d), each of the argument's shape and dtype. Sums over B and L are taken in
        float64. Raises as `wave_scan` does.
        """
        grad_y, grad_h, u, carry, dt, b, c, a_raw, b_base, c_base, d = wave_back_arguments(
            "BLI", grad_y, grad_h, u, carry, dt, b, c, a_raw, b_base, c_base, d)
        a, h = -np.logaddexp(a_raw, a_raw.dtype.type(0)), [carry]
        for t in range(u.shape[1]):
            h.append(np.exp(a * dt[:, t, :, None]) * h[t] + (dt[:, t] * b[:, t] * u[:, t])[..., None] * b_base)
        pull, sequences = grad_h.copy(), [np.empty_like(u) for _ in range(4)]
        totals = [np.zeros(part.shape) for part in (a_raw, b_base, c_base, d)]
        for t in reversed(range(u.shape[1])):
            grad_read, decay = (grad_y[:, t] * c[:, t])[..., None], np.exp(a * dt[:, t, :, None])
            pull += grad_read * c_base
            drive = (pull * b_base).sum(-1)
            sequences[0][:, t] = grad_y[:, t] * d + drive * dt[:, t] * b[:, t]
            sequences[1][:, t] = (pull * a * decay * h[t]).sum(-1) + drive * b[:, t] * u[:, t]
            sequences[2][:, t] = drive * dt[:, t] * u[:, t]
            sequences[3][:, t] = grad_y[:, t] * (c_base * h[t + 1]).sum(-1)
            driven = (dt[:, t] * b[:, t] * u[:, t])[..., None]
            parts = pull * dt[:, t, :, None] * decay * h[t], pull * driven, grad_read * h[t + 1], grad_y[:, t] * u[:, t]
            for total, part in zip(totals, parts, strict=True):
                total += part.sum(0, dtype=np.float64)
            pull *= decay
        totals[0] *= np.expm1(a.astype(np.float64))  # -sigmoid(a_raw)
        return sequences[0], pull, *sequences[1:], *(total.astype(u.dtype) for total in totals)

    @staticmethod
    def wave_step_backward(grad_y, grad_h, u, carry, dt, b, c, a_raw, b_base, c_base, d):
        """The gradients of every argument of `wave_step`: `wave_scan_backward` for L = 1 without that axis.

        grad_y, u, dt, b, c (B, I), the rest as there. Raises as `wave_scan` does.
        """
        grad_y, grad_h, u, carry, dt, b, c, a_raw, b_base, c_base, d = wave_back_arguments(
            "BI", grad_y, grad_h, u, carry, dt, b, c, a_raw, b_base, c_base, d)
        grad_u, grad_carry, grad_dt, grad_b, grad_c, *shared = wave.wave_scan_backward(
            grad_y[:, None], grad_h, u[:, None], carry, dt[:, None], b[:, None], c[:, None], a_raw, b_base, c_base, d)
        return grad_u[:, 0], grad_carry, grad_dt[:, 0], grad_b[:, 0], grad_c[:, 0], *shared
