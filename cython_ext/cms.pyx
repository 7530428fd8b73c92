"""The memory of WaveCore (CMS): levels of slots that are read by attention, lose a share every step and take one row.

    read     att = softmax(K q / sqrt(d_k))        content = att M
    write    M, K <- (1 - decay) M, (1 - decay) K;  where open, row i of both <- g new + (1 - g) old
             slot0: i = 0, always open             least_salient: i = argmin ||M_i||^2, open where g > threshold

`write` rewrites the whole memory, in place. `write_lazy` keeps M = scale M^ and K = scale K^, one scale for all samples, and the squared norms
of the rows of M^, and so changes one row alone; a scale below 2^-10 is folded into M^ and K^. A row that is not finite is never written.
Source: ContinuonBrain's CMS. Letters: B batch, n slots, d width of the level, d_k width of a key.
"""

import numpy as np

from cython.parallel cimport prange

from cython_ext.algebra cimport dot, real, root
from cython_ext.clones cimport cloned, inlined
from cython_ext.dense cimport combine, softmax

from cython_ext.checks_wavecore import FOLD, read_arguments, write_arguments
from cython_ext.threads import threads_for

cdef enum:
    FOLDS = 1024  # 1 / FOLD of checks_wavecore.py, as a constant of C

assert FOLD * FOLDS == 1


cdef inline bint finite(const real* x, Py_ssize_t n) noexcept nogil:
    """Whether no entry of x is NaN or infinite: only those are not 0 when taken from themselves."""
    cdef Py_ssize_t i
    cdef bint spoilt = False
    # np.isfinite(x).all()
    for i in range(n):
        spoilt |= not x[i] - x[i] == 0
    return not spoilt


cdef inline Py_ssize_t smallest(const real* x, Py_ssize_t n) noexcept nogil:
    """x.argmin(): the first of equals, the first NaN where there is one."""
    cdef Py_ssize_t i, least = 0
    for i in range(1, n):
        if x[least] != x[least]:
            break
        if x[i] < x[least] or x[i] != x[i]:
            least = i
    return least


cdef inlined put(real* row, const real* new, real gate, real scale, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    # row = gate * (new / scale) + (1 - gate) * row
    for i in range(n):
        row[i] = gate * (new[i] / scale) + (1 - gate) * row[i]


cdef inlined shrink(real* x, real by, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    # x = by * x
    for i in range(n):
        x[i] = by * x[i]


cdef cloned score_cloned(
    const real* query, const real* keys, Py_ssize_t width, real scale, real* scores, Py_ssize_t low, Py_ssize_t high,
) noexcept nogil:
    cdef Py_ssize_t i
    cdef real by = root(<real> width)
    # scores = scale * (keys @ query / np.sqrt(d_k))
    for i in range(low, high):
        scores[i] = scale * (dot(keys + i * width, query, width) / by)


cdef void score(
    const real* query, const real* keys, Py_ssize_t slots, Py_ssize_t width, real scale, real* scores, Py_ssize_t part, Py_ssize_t parts,
) noexcept nogil:
    score_cloned(query, keys, width, scale, scores, part * slots // parts, (part + 1) * slots // parts)


cdef cloned write_full_cloned(
    real* memory, real* keys, Py_ssize_t slots, Py_ssize_t width, Py_ssize_t key_width, const real* value, const real* key, real gate, real keep,
    int rule, real threshold, Py_ssize_t chosen, bint opened,
) noexcept nogil:
    cdef Py_ssize_t i, row = 0
    cdef real norm, least
    # memory = keep * memory; keys = keep * keys
    shrink(memory, keep, slots * width)
    shrink(keys, keep, slots * key_width)
    if chosen >= 0:
        row = chosen
    elif rule == LEAST_SALIENT:
        opened = gate > threshold
        # row = (memory**2).sum(-1).argmin()
        least = dot(memory, memory, width)
        for i in range(1, slots):
            norm = dot(memory + i * width, memory + i * width, width)
            if least == least and (norm < least or norm != norm):
                row, least = i, norm
    else:
        opened = True
    if opened and finite(value, width) and finite(key, key_width) and finite(&gate, 1):
        put(memory + row * width, value, gate, 1, width)
        put(keys + row * key_width, key, gate, 1, key_width)


cdef void write_full(
    real* memory, real* keys, Py_ssize_t slots, Py_ssize_t width, Py_ssize_t key_width, const real* value, const real* key, real gate, real keep,
    int rule, real threshold, Py_ssize_t chosen, bint opened,
) noexcept nogil:
    write_full_cloned(memory, keys, slots, width, key_width, value, key, gate, keep, rule, threshold, chosen, opened)


cdef cloned write_one_cloned(
    real* memory, real* keys, real* norms, Py_ssize_t slots, Py_ssize_t width, Py_ssize_t key_width, const real* value, const real* key, real gate,
    real scale, int rule, real threshold, Py_ssize_t chosen, bint opened,
) noexcept nogil:
    cdef Py_ssize_t i, row = 0
    if chosen >= 0:
        row = chosen
    elif rule == LEAST_SALIENT:
        row, opened = smallest(norms, slots), gate > threshold
    else:
        opened = True
    if opened and finite(value, width) and finite(key, key_width) and finite(&gate, 1):
        put(memory + row * width, value, gate, scale, width)
        put(keys + row * key_width, key, gate, scale, key_width)
    norms[row] = dot(memory + row * width, memory + row * width, width)
    if scale < <real> 1 / FOLDS:
        # memory = scale * memory; keys = scale * keys; norms = (memory**2).sum(-1)
        shrink(memory, scale, slots * width)
        shrink(keys, scale, slots * key_width)
        for i in range(slots):
            norms[i] = dot(memory + i * width, memory + i * width, width)


cdef void write_one(
    real* memory, real* keys, real* norms, Py_ssize_t slots, Py_ssize_t width, Py_ssize_t key_width, const real* value, const real* key, real gate,
    real scale, int rule, real threshold, Py_ssize_t chosen, bint opened,
) noexcept nogil:
    write_one_cloned(memory, keys, norms, slots, width, key_width, value, key, gate, scale, rule, threshold, chosen, opened)


cdef real next_scale(real scale, real keep) noexcept nogil:
    return 1 if keep * scale < <real> 1 / FOLDS else keep * scale


cdef read_rows(
    const real[:, ::1] query, const real[:, :, ::1] memory, const real[:, :, ::1] keys, real scale, real[:, ::1] attention, real[:, ::1] content,
    int threads,
):
    cdef Py_ssize_t b, i, slots = memory.shape[1], width = memory.shape[2], key_width = keys.shape[2]
    # attention = softmax(scale * (keys @ query) / np.sqrt(d_k)); content = scale * (attention @ memory)
    for b in prange(query.shape[0], nogil=True, schedule="static", num_threads=threads):
        score(&query[b, 0], &keys[b, 0, 0], slots, key_width, scale, &attention[b, 0], 0, 1)
        softmax(&attention[b, 0], slots)
        combine(&attention[b, 0], &memory[b, 0, 0], slots, width, width, &content[b, 0], 0, 1)
        for i in range(width):
            content[b, i] *= scale


def read(query, memory, keys, scale=None):
    """Attention over the slots, and the mean of their rows that it gives.

    query (B, d_k), memory (B, n, d), keys (B, n, d_k), all float32 or all float64, or all without B; scale () of their dtype, by which memory and
    keys are to be multiplied, or None for 1. Arrays that are read-only or not contiguous are accepted, the latter copied. Returns attention
    (B, n) and content (B, d), new arrays. Raises TypeError for another type or dtype, ValueError for another shape or an empty axis, by name.
    """
    query, memory, keys, scale, batched = read_arguments(query, memory, keys, scale)
    attention, content = np.empty(memory.shape[:2], query.dtype), np.empty((memory.shape[0], memory.shape[2]), query.dtype)
    arguments = (query, memory, keys, scale, attention, content, threads_for(query.shape[0], memory.size + keys.size))
    read_rows[float](*arguments) if query.dtype == np.float32 else read_rows[double](*arguments)
    return (attention, content) if batched else (attention[0], content[0])


cdef write_rows(
    real[:, :, ::1] memory, real[:, :, ::1] keys, real[:, ::1] norms, real scale, const real[:, ::1] value, const real[:, ::1] key,
    const real[:, ::1] gate, real keep, int rule, real threshold, const Py_ssize_t[::1] row, const Py_ssize_t[::1] opened, bint lazy, int threads,
):
    cdef Py_ssize_t b, slots = memory.shape[1], width = memory.shape[2], key_width = keys.shape[2]
    cdef real decayed = keep * scale
    # memory[b], keys[b], norms[b] = one step on
    for b in prange(memory.shape[0], nogil=True, schedule="static", num_threads=threads):
        if lazy:
            write_one(&memory[b, 0, 0], &keys[b, 0, 0], &norms[b, 0], slots, width, key_width, &value[b, 0], &key[b, 0], gate[b, 0], decayed,
                      rule, threshold, row[b], opened[b] != 0)
        else:
            write_full(&memory[b, 0, 0], &keys[b, 0, 0], slots, width, key_width, &value[b, 0], &key[b, 0], gate[b, 0], keep, rule, threshold,
                       row[b], opened[b] != 0)
    return next_scale(scale, keep)


def write(memory, keys, value, key, gate, decay, *, rule, threshold, chosen=None):
    """One step of a plain memory, in place.

    memory (B, n, d), keys (B, n, d_k), value (B, d), key (B, d_k), gate (B, 1), all float32 or all float64, or all without B; decay in (0, 1);
    rule "slot0" or "least_salient", with its threshold; chosen (row (B,) int64, open (B,) bool) replaces the choice of the rule. memory and
    keys must be contiguous and writeable; the other arrays may be read-only or not contiguous. Raises TypeError for another type or dtype,
    ValueError for another shape, an empty axis, a memory that cannot be changed in place, a decay, a rule or a row that is none, by name.
    """
    memory, keys, _, value, key, gate, keep, kind, row, opened = write_arguments(
        memory, keys, None, None, value, key, gate, decay, rule, threshold, chosen)
    arguments = (memory, keys, gate, 1.0, value, key, gate, keep, kind, threshold, row, opened, False, threads_for(len(row), 2 * memory.size))
    write_rows[float](*arguments) if memory.dtype == np.float32 else write_rows[double](*arguments)


def write_lazy(memory, keys, norms, scale, value, key, gate, decay, *, rule, threshold, chosen=None):
    """`write` for scale * memory and scale * keys, in place: memory and keys stay as they are but for one row.

    norms (B, n), the squared norms of the rows of `memory`, and scale (), for all of B, are changed in place too; the rest as `write` takes it.
    A scale below 2^-10 is folded into memory and keys. Raises as `write` does.
    """
    memory, keys, norms, value, key, gate, keep, kind, row, opened = write_arguments(
        memory, keys, norms, scale, value, key, gate, decay, rule, threshold, chosen)
    threads = threads_for(len(row), 2 * len(row) * memory.shape[2])
    arguments = (memory, keys, norms, scale.item(), value, key, gate, keep, kind, threshold, row, opened, True, threads)
    scale[...] = write_rows[float](*arguments) if memory.dtype == np.float32 else write_rows[double](*arguments)
