"""The hierarchical delta rule as XLA's custom call: what `delta_rule.hierarchical_forward` does around its two phases, without the GIL.

Operands: q, k, v (B, H, L, d); beta, decays and gates (B, H, L); the four weights of token_mlp and of chunk_mlp; bilinear; temp; the number
of valid tokens of every sample (B,) in the dtype of the others; S_fast, S_slow, not read where "fresh" is 1. Numbers besides: "chunk_size"
and "exact". Results: o, S_fast, S_slow; where no token of a sample is valid its output and its fresh states are zero.
Letters: B batch, H heads, L length, d head width, C chunk, m hidden width of a flux; head: one of B * H.
"""

# The functions of other modules are pointers here, which take no attribute of clones.
cdef extern from *:
    """
    #undef GROUNDWAVE_CLONES
    #define GROUNDWAVE_CLONES
    """

import numpy as np

from cython.parallel cimport prange, threadid
from libc.string cimport memcpy, memset

from cython_ext.blas_threads cimport enter, leave
from cython_ext.delta_rule cimport ROWS, across_chunks, inside_chunk
from cython_ext.views cimport adopt, view1, view2, view3, view4, whole1
from cython_ext.xla_abi cimport given, made, scratch, size, whole

from cython_ext.delta_rule import WINDOW_BYTES
from cython_ext.threads import SERIAL_WORK

cdef double[::1] owner = np.zeros(1)
adopt(owner)
cdef int64_t serial = SERIAL_WORK
cdef Py_ssize_t window_bytes = WINDOW_BYTES


cdef inline void fill_vectors(Frame* frame, int first, Py_ssize_t m, real* rows) noexcept nogil:
    """`delta_rule.vectors` of the flux whose weights are the operands from `first`."""
    # rows = [b0, w2[0], [b2, 0, 0, ..]]
    memset(rows, 0, 3 * m * sizeof(real))
    memcpy(rows, given(frame, first + 1, rows), m * sizeof(real))
    memcpy(rows + m, given(frame, first + 2, rows), m * sizeof(real))
    rows[2 * m] = given(frame, first + 3, rows)[0]


cdef void hierarchical(Frame* frame, Room* room, int64_t most, real* kind) noexcept nogil:
    cdef Py_ssize_t batch = size(frame, 0, 0), heads = size(frame, 0, 1), length = size(frame, 0, 2), d = size(frame, 0, 3), rows = batch * heads
    cdef Py_ssize_t m = size(frame, 8, 0), wide_m = size(frame, 12, 0), tokens = min(<Py_ssize_t> whole(frame, "chunk_size"), length)
    cdef Py_ssize_t chunks = (length + tokens - 1) // tokens, window = window_bytes // (rows * 2 * d * (tokens + d) * <Py_ssize_t> sizeof(real))
    cdef Py_ssize_t blocks = rows * chunks, short_rows = min(<Py_ssize_t> ROWS, tokens), first, part, block, head, i, j
    cdef bint fresh = whole(frame, "fresh"), exact = whole(frame, "exact")
    cdef int threads = 1 if rows * length * d * (3 * tokens + 4 * d) < serial else <int> min(most, <int64_t> blocks)
    window = max(<Py_ssize_t> 1, min(chunks, window))
    cdef real[:, :, ::1] q = view3(given(frame, 0, kind), rows, length, d), k = view3(given(frame, 1, kind), rows, length, d)
    cdef real[:, :, ::1] v = view3(given(frame, 2, kind), rows, length, d), o = view3(made(frame, 0, kind), rows, length, d)
    cdef real[:, ::1] beta = view2(given(frame, 3, kind), rows, length)
    cdef real[:, ::1] fast_decay = view2(given(frame, 4, kind), rows, length), slow_decay = view2(given(frame, 5, kind), rows, length)
    cdef real[:, ::1] fast_gate = view2(given(frame, 6, kind), rows, length), slow_gate = view2(given(frame, 7, kind), rows, length)
    cdef real[:, :, ::1] bilinear = view3(given(frame, 16, kind), heads, d, d)
    cdef real[::1] temp = view1(given(frame, 17, kind), heads)
    cdef real[:, ::1] token_in = view2(scratch(room, 2 * d * m, kind), 2 * d, m), token_out = view2(scratch(room, 3 * m, kind), 3, m)
    cdef real[:, ::1] chunk_in = view2(scratch(room, (2 * d + 1) * wide_m, kind), 2 * d + 1, wide_m)
    cdef real[:, ::1] chunk_out = view2(scratch(room, 3 * wide_m, kind), 3, wide_m)
    cdef Py_ssize_t[::1] lengths = whole1(<Py_ssize_t*> scratch(room, batch, <double*> NULL), batch)  # a double is as wide
    cdef real[:, :, ::1] queries = view3(scratch(room, threads * tokens * d, kind), threads, tokens, d)
    cdef real[:, :, ::1] keys = view3(scratch(room, threads * tokens * d, kind), threads, tokens, d)
    cdef real[:, :, :, ::1] turned = view4(scratch(room, threads * 2 * d * tokens, kind), threads, 2, d, tokens)
    cdef real[:, :, ::1] scaled = view3(scratch(room, threads * tokens * 2 * d, kind), threads, tokens, 2 * d)
    cdef real[:, :, ::1] moved = view3(scratch(room, threads * tokens * 2 * d, kind), threads, tokens, 2 * d)
    cdef real[:, :, ::1] wide = view3(scratch(room, threads * tokens * m, kind), threads, tokens, m)
    cdef real[:, :, ::1] square = view3(scratch(room, threads * tokens * tokens, kind), threads, tokens, tokens)
    cdef real[:, :, ::1] strip = view3(scratch(room, threads * tokens * short_rows, kind), threads, tokens, short_rows)
    cdef real[:, :, ::1] scores = view3(scratch(room, threads * short_rows * tokens, kind), threads, short_rows, tokens)
    cdef real[:, :, ::1] facts = view3(scratch(room, threads * 2 * max(2 * d + 1, wide_m), kind), threads, 2, max(2 * d + 1, wide_m))
    cdef real[:, :, ::1] unit = view3(scratch(room, threads * d * 2 * d, kind), threads, d, 2 * d)
    cdef real[:, :, ::1] recalled = view3(scratch(room, threads * tokens * 2 * d, kind), threads, tokens, 2 * d)
    cdef real[:, ::1] phi = view2(scratch(room, rows * window * tokens, kind), rows, window * tokens)
    cdef real[:, :, ::1] read = view3(scratch(room, rows * window * tokens * 2 * d, kind), rows, window * tokens, 2 * d)
    cdef real[:, :, :, ::1] written = view4(scratch(room, rows * window * d * 2 * d, kind), rows, window, d, 2 * d)
    cdef real[:, :, ::1] rates = view3(scratch(room, rows * window * 3, kind), rows, window, 3)
    cdef real[:, :, ::1] states = view3(scratch(room, rows * d * 2 * d, kind), rows, d, 2 * d)
    if room.failed:
        return
    for i in range(batch):
        lengths[i] = <Py_ssize_t> given(frame, 18, kind)[i]
    # token_in = np.concatenate([w0[:, d:], w0[:, :d]], axis=1).T; chunk_in = chunk_mlp[0].T
    for i in range(2 * d):
        for j in range(m):
            token_in[i, j] = given(frame, 8, kind)[j * 2 * d + (i + d) % (2 * d)]
    for i in range(2 * d + 1):
        for j in range(wide_m):
            chunk_in[i, j] = given(frame, 12, kind)[j * (2 * d + 1) + i]
    fill_vectors(frame, 8, m, &token_out[0, 0])
    fill_vectors(frame, 12, wide_m, &chunk_out[0, 0])
    # states = 0 if fresh else np.concatenate([S_fast, S_slow], axis=2)
    for i in range(rows * d):
        for j in range(d):
            (&states[0, 0, 0])[i * 2 * d + j] = 0 if fresh else given(frame, 19, kind)[i * d + j]
            (&states[0, 0, 0])[i * 2 * d + d + j] = 0 if fresh else given(frame, 20, kind)[i * d + j]
    enter()
    for i in range((chunks + window - 1) // window):
        first = i * window
        part = min(window, chunks - first)
        # for head, chunk in the window: phi, read, written, rates = steps 1 to 5
        for block in prange(rows * part, schedule="dynamic", num_threads=threads):
            inside_chunk(q, k, v, beta, fast_decay, slow_decay, token_in, token_out, chunk_in, chunk_out, bilinear, temp, lengths, queries, keys,
                         turned, scaled, moved, wide, square, strip, scores, facts, phi, read, written, rates, first, part, block, fresh, exact,
                         threadid())
        # for head in range(B * H): o, states = step 6
        for head in prange(rows, schedule="dynamic", num_threads=threads):
            across_chunks(fast_gate, slow_gate, lengths, phi, read, written, rates, states, unit, recalled, o, heads, tokens, first, part, head,
                          fresh, threadid())
    leave()
    for i in range(rows * d):
        memcpy(made(frame, 1, kind) + i * d, &states[0, 0, 0] + i * 2 * d, d * sizeof(real))
        memcpy(made(frame, 2, kind) + i * d, &states[0, 0, 0] + i * 2 * d + d, d * sizeof(real))
