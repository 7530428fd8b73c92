"""The memory of WaveCore (CMS): levels of slots that are read by attention, lose a share every step and take one row.

    read     att = softmax(K q / sqrt(d_k))        content = att M
    write    M, K <- (1 - decay) M, (1 - decay) K;  where open, row i of both <- g new + (1 - g) old
             slot0: i = 0, always open             least_salient: i = argmin ||M_i||^2, open where g > threshold

`write` rewrites the whole memory, in place. `write_lazy` keeps M = scale M^ and K = scale K^, one scale for all samples, and the squared norms
of the rows of M^, and so changes one row alone; a scale below 2^-10 is folded into M^ and K^. A row that is not finite is never written.
To the gradient of a write the row, open or closed, the norms and the scale are constants, and a closed row gives none to value, key and gate.
Source: ContinuonBrain's CMS. Letters: B batch, n slots, d width of the level, d_k width of a key.
"""

import numpy as np

from cython.parallel cimport prange

from cython_ext.algebra cimport dot, real, root
from cython_ext.clones cimport cloned, inlined
from cython_ext.cms_parts cimport finite, least_salient, put, scaled, shrink, smallest
from cython_ext.dense cimport combine, softmax

from cython_ext.checks_wavecore import FOLD, read_arguments, read_back_arguments, write_arguments, write_back_arguments
from cython_ext.threads import threads_for

cdef enum:
    FOLDS = 1024  # 1 / FOLD of checks_wavecore.py, as a constant of C

assert FOLD * FOLDS == 1


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
    cdef Py_ssize_t row = 0
    # memory = keep * memory; keys = keep * keys
    shrink(memory, keep, slots * width)
    shrink(keys, keep, slots * key_width)
    if chosen >= 0:
        row = chosen
    elif rule == LEAST_SALIENT:
        row, opened = least_salient(memory, slots, width), gate > threshold
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


cdef cloned read_back(
    const real* grad_attention, const real* grad_content, const real* query, const real* memory, const real* keys, Py_ssize_t slots,
    Py_ssize_t width, Py_ssize_t key_width, real scale, const real* attention, real* raw, real* grad_memory, real* grad_keys, double* grad_scale,
) noexcept nogil:
    cdef Py_ssize_t i
    cdef real by = root(<real> key_width), mean = 0, pull, answer
    cdef double total = 0
    # raw = keys @ query / np.sqrt(d_k); answers = memory @ grad_content; grad_memory = scale * np.outer(attention, grad_content)
    # pull = attention * (grad_attention + scale * answers - attention @ (grad_attention + scale * answers))
    # grad_scale = attention @ answers + pull @ raw; raw = scale * pull / np.sqrt(d_k); grad_keys = np.outer(raw, query)
    for i in range(slots):
        answer = dot(memory + i * width, grad_content, width)
        total += attention[i] * answer
        raw[i] = grad_attention[i] + scale * answer
        mean += attention[i] * raw[i]
        scaled(grad_content, attention[i] * scale, width, grad_memory + i * width)
    for i in range(slots):
        pull = attention[i] * (raw[i] - mean)
        total += pull * (dot(keys + i * key_width, query, key_width) / by)
        raw[i] = scale * pull / by
        scaled(query, raw[i], key_width, grad_keys + i * key_width)
    grad_scale[0] = total


cdef read_back_rows(
    const real[:, ::1] grad_attention, const real[:, ::1] grad_content, const real[:, ::1] query, const real[:, :, ::1] memory,
    const real[:, :, ::1] keys, real scale, real[:, ::1] attention, real[:, ::1] raw, real[:, ::1] grad_query, real[:, :, ::1] grad_memory,
    real[:, :, ::1] grad_keys, double[::1] grad_scale, int threads,
):
    cdef Py_ssize_t b, slots = memory.shape[1], width = memory.shape[2], key_width = keys.shape[2]
    # attention, raw, grad_query, grad_memory, grad_keys, grad_scale = read_back of every sample; grad_query = raw @ keys
    for b in prange(query.shape[0], nogil=True, schedule="static", num_threads=threads):
        score(&query[b, 0], &keys[b, 0, 0], slots, key_width, scale, &attention[b, 0], 0, 1)
        softmax(&attention[b, 0], slots)
        read_back(&grad_attention[b, 0], &grad_content[b, 0], &query[b, 0], &memory[b, 0, 0], &keys[b, 0, 0], slots, width, key_width, scale,
                  &attention[b, 0], &raw[b, 0], &grad_memory[b, 0, 0], &grad_keys[b, 0, 0], &grad_scale[b])
        combine(&raw[b, 0], &keys[b, 0, 0], slots, key_width, key_width, &grad_query[b, 0], 0, 1)


def read_backward(grad_attention, grad_content, query, memory, keys, scale=None):
    """The gradients of every array argument of `read`, given those of the attention and of the content that it returned.

    grad_attention (B, n), grad_content (B, d); the rest as `read` took it, and what it computed on the way is computed again. Returns a tuple in
    the order (query, memory, keys, scale), each of the argument's shape and dtype; None for a scale that was None. The sum of a scale's gradient
    is taken in float64. Raises as `read` does.
    """
    grad_attention, grad_content, query, memory, keys, factor, batched = read_back_arguments(grad_attention, grad_content, query, memory, keys, scale)
    attention, raw, totals = np.empty_like(grad_attention), np.empty_like(grad_attention), np.empty(len(query))
    gradients = [np.empty_like(query), np.empty_like(memory), np.empty_like(keys)]
    arguments = (grad_attention, grad_content, query, memory, keys, factor, attention, raw, *gradients, totals,
                 threads_for(len(query), 2 * (memory.size + keys.size)))
    read_back_rows[float](*arguments) if query.dtype == np.float32 else read_back_rows[double](*arguments)
    grad_scale = None if scale is None else np.array(totals.sum(), query.dtype)
    return (*(gradients if batched else [part[0] for part in gradients]), grad_scale)


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
    memory, keys, _, value, key, gate, keep, kind, threshold, row, opened = write_arguments(
        memory, keys, None, None, value, key, gate, decay, rule, threshold, chosen)
    arguments = (memory, keys, gate, 1.0, value, key, gate, keep, kind, threshold, row, opened, False, threads_for(len(row), 2 * memory.size))
    write_rows[float](*arguments) if memory.dtype == np.float32 else write_rows[double](*arguments)


def write_lazy(memory, keys, norms, scale, value, key, gate, decay, *, rule, threshold, chosen=None):
    """`write` for scale * memory and scale * keys, in place: memory and keys stay as they are but for one row.

    norms (B, n), the squared norms of the rows of `memory`, and scale (), for all of B, are changed in place too; the rest as `write` takes it.
    A scale below 2^-10 is folded into memory and keys. Raises as `write` does.
    """
    memory, keys, norms, value, key, gate, keep, kind, threshold, row, opened = write_arguments(
        memory, keys, norms, scale, value, key, gate, decay, rule, threshold, chosen)
    threads = threads_for(len(row), 2 * len(row) * memory.shape[2])
    arguments = (memory, keys, norms, scale.item(), value, key, gate, keep, kind, threshold, row, opened, True, threads)
    scale[...] = write_rows[float](*arguments) if memory.dtype == np.float32 else write_rows[double](*arguments)


cdef inlined row_back(
    const real* grad, const real* rows, Py_ssize_t slots, Py_ssize_t width, const real* new, real gate, real keep, real scale, real fold,
    Py_ssize_t row, bint opened, real* grad_rows, real* grad_new, real* grad_gate,
) noexcept nogil:
    cdef Py_ssize_t i
    cdef const real* old = rows + row * width
    cdef real* pull = grad_rows + row * width
    # grad_rows = keep * fold * grad; where open: pull = fold * grad[row]; grad_new = gate * pull / scale; grad_rows[row] = keep * (1 - gate) * pull
    # grad_gate += pull @ (new / scale - keep * rows[row])
    scaled(grad, keep * fold, slots * width, grad_rows)
    if opened:
        scaled(grad + row * width, fold, width, pull)
        for i in range(width):
            grad_new[i] = new[i] / scale - keep * old[i]
        grad_gate[0] += dot(pull, grad_new, width)
        for i in range(width):
            grad_new[i] = gate * pull[i] / scale
        shrink(pull, keep * (1 - gate), width)
    else:
        for i in range(width):
            grad_new[i] = 0


cdef cloned write_back(
    const real* grad_memory, const real* grad_keys, const real* memory, const real* keys, const real* norms, Py_ssize_t slots, Py_ssize_t width,
    Py_ssize_t key_width, const real* value, const real* key, real gate, real keep, real scale, real fold, bint lazy, int rule, real threshold,
    Py_ssize_t chosen, bint opened, real* to_memory, real* to_keys, real* to_value, real* to_key, real* to_gate,
) noexcept nogil:
    cdef Py_ssize_t row = 0
    if chosen >= 0:
        row = chosen
    elif rule == LEAST_SALIENT:
        opened = gate > threshold
        if lazy:
            row = smallest(norms, slots)
        else:
            # row = ((keep * memory)**2).sum(-1).argmin(), in the room of the gradient
            scaled(memory, keep, slots * width, to_memory)
            row = least_salient(to_memory, slots, width)
    else:
        opened = True
    opened = opened and finite(value, width) and finite(key, key_width) and finite(&gate, 1)
    to_gate[0] = 0
    row_back(grad_memory, memory, slots, width, value, gate, keep, scale, fold, row, opened, to_memory, to_value, to_gate)
    row_back(grad_keys, keys, slots, key_width, key, gate, keep, scale, fold, row, opened, to_keys, to_key, to_gate)


cdef write_back_rows(
    const real[:, :, ::1] grad_memory, const real[:, :, ::1] grad_keys, const real[:, :, ::1] memory, const real[:, :, ::1] keys,
    const real[:, ::1] norms, real scale, const real[:, ::1] value, const real[:, ::1] key, const real[:, ::1] gate, real keep, int rule,
    real threshold, const Py_ssize_t[::1] row, const Py_ssize_t[::1] opened, bint lazy, real[:, :, ::1] to_memory, real[:, :, ::1] to_keys,
    real[:, ::1] to_value, real[:, ::1] to_key, real[:, ::1] to_gate, int threads,
):
    cdef Py_ssize_t b, slots = memory.shape[1], width = memory.shape[2], key_width = keys.shape[2]
    cdef real decayed = keep * scale if lazy else 1, kept = 1 if lazy else keep, fold = decayed if decayed < <real> 1 / FOLDS else 1
    # to_memory[b], to_keys[b], to_value[b], to_key[b], to_gate[b] = one step back
    for b in prange(memory.shape[0], nogil=True, schedule="static", num_threads=threads):
        write_back(&grad_memory[b, 0, 0], &grad_keys[b, 0, 0], &memory[b, 0, 0], &keys[b, 0, 0], &norms[b, 0], slots, width,
                   key_width, &value[b, 0], &key[b, 0], gate[b, 0], kept, decayed, fold, lazy, rule, threshold, row[b], opened[b] != 0,
                   &to_memory[b, 0, 0], &to_keys[b, 0, 0], &to_value[b, 0], &to_key[b, 0], &to_gate[b, 0])


def write_backward(grad_memory, grad_keys, memory, keys, value, key, gate, decay, *, rule, threshold, chosen=None):
    """The gradients of `write`, given those of the memory and the keys that it left.

    grad_memory (B, n, d), grad_keys (B, n, d_k); memory and keys as they were before the write, the rest as `write` took it; nothing is changed
    in place, and arrays that are read-only or not contiguous are accepted, the latter copied. Returns a tuple of new arrays in the order
    (memory, keys, value, key, gate), each of the argument's shape and dtype. Raises as `write` does, but for what concerns writing in place.
    """
    return gone_back(grad_memory, grad_keys, memory, keys, None, None, value, key, gate, decay, rule, threshold, chosen)


def write_lazy_backward(grad_memory, grad_keys, memory, keys, norms, scale, value, key, gate, decay, *, rule, threshold, chosen=None):
    """The gradients of `write_lazy`, given those of the memory and the keys that it left.

    norms (B, n) and scale () as they were before the write too; the rest, what is returned and what is raised as in `write_backward`.
    """
    return gone_back(grad_memory, grad_keys, memory, keys, norms, scale, value, key, gate, decay, rule, threshold, chosen)


def gone_back(*given):
    (grad_memory, grad_keys, memory, keys, norms, scale, value, key, gate, keep, kind, threshold, row, opened), batched = write_back_arguments(*given)
    lazy, gradients = norms is not None, [np.empty_like(part) for part in (memory, keys, value, key, gate)]
    arguments = (grad_memory, grad_keys, memory, keys, norms if lazy else gate, scale, value, key, gate, keep, kind, threshold, row, opened, lazy,
                 *gradients, threads_for(len(row), memory.size + keys.size))
    write_back_rows[float](*arguments) if memory.dtype == np.float32 else write_back_rows[double](*arguments)
    return tuple(gradients) if batched else tuple(part[0] for part in gradients)
