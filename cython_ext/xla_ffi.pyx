"""The kernels as XLA FFI custom calls for JAX on a CPU: what XLA calls, and the capsules by which JAX registers it.

A handler reads XLA's buffers and writes its results in place, row by row or head by head with the same C functions as the NumPy call of the
kernel, cut in the same way, so that both give the same bits. It never takes the GIL: XLA calls it from threads of its own, while Python may
be busy or at its end; and it computes in the default floating-point environment, where XLA's threads take what is below the normal range for
zero. OpenMP shares the work among the threads that `set_num_threads` allows, else those of `handlers`' time.

Operands and results come in the order of the NumPy functions, with another operand of the same dtype in the place of one that is None and
an attribute that says so. `jax_impl.ops.compiled` has checked their shapes; here only their number and dtype are.
Letters: B batch, L length, N state, H heads, P or d head width, C chunk.
"""

# The functions of other modules are pointers here, which take no attribute of clones.
cdef extern from *:
    """
    #undef GROUNDWAVE_CLONES
    #define GROUNDWAVE_CLONES
    #include <fenv.h>
    #define GROUNDWAVE_COUNT(counter) __atomic_add_fetch(&(counter), 1, __ATOMIC_RELAXED)
    """
    void count "GROUNDWAVE_COUNT"(long long counter) nogil
    ctypedef struct fenv_t:
        pass
    const fenv_t* FE_DFL_ENV
    int fegetenv(fenv_t* environment) nogil
    int fesetenv(const fenv_t* environment) nogil

import numpy as np

from cpython.pycapsule cimport PyCapsule_New
from cython.parallel cimport prange, threadid
from libc.stdint cimport int64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from cython_ext cimport plain_delta, selective_scan, wkv
from cython_ext.algebra cimport real
from cython_ext.blas_threads cimport enter, leave
from cython_ext.views cimport adopt, view1, view2, view3, view4
from cython_ext.wkv_parts cimport ROWS
from cython_ext.xla_abi cimport (
    EXECUTE, EXHAUSTED, FLOAT32, FLOAT64, INVALID, Error, Frame, Handler, Room, add_rows, answered, given, made, number, refusal, scratch, size, whole,
)
from cython_ext.xla_hierarchical cimport hierarchical

from cython_ext import threads as limits

NAMES = ("selective_scan", "selective_scan_backward", "wkv", "wkv_backward", "delta_rule", "delta_rule_backward", "hierarchical_delta_rule")

cdef enum:
    SCAN, SCAN_BACK, WKV, WKV_BACK, DELTA, DELTA_BACK, HIERARCHICAL, KERNELS  # NAMES, and how many

cdef double[::1] owner = np.zeros(1)
adopt(owner)
cdef int64_t[::1] chosen = limits._chosen
cdef int64_t* chosen_threads = &chosen[0]
cdef int64_t default_threads = 1, serial = limits.SERIAL_WORK
cdef int64_t[KERNELS] calls
cdef int[KERNELS] operands, results
operands[:] = [7, 9, 6, 8, 5, 7, 21]
results[:] = [1, 7, 2, 6, 2, 5, 3]


cdef inline int64_t allowed() noexcept nogil:
    """`threads.get_num_threads`, the default as it was when the handlers were registered."""
    return chosen_threads[0] if chosen_threads[0] else default_threads


cdef inline int threads_for(Py_ssize_t rows, Py_ssize_t work) noexcept nogil:
    """`threads.threads_for`."""
    return 1 if work < serial else <int> min(allowed(), <int64_t> rows)


cdef void scan(Frame* frame, Room* room, real* kind) noexcept nogil:
    """update, dt_a, dt_b, transition, weight, bias, initial_state; "scaled" is 0 where dt_b is None. To states."""
    cdef Py_ssize_t batch = size(frame, 0, 0), length = size(frame, 0, 1), n = size(frame, 0, 2), full = selective_scan.padded_rows(n), row
    cdef int threads = threads_for(batch, batch * length * n * n)
    cdef bint scaled = whole(frame, "scaled")
    cdef real eps = <real> number(frame, "eps")
    cdef real* turned = scratch(room, full * n, kind)
    if room.failed:
        return
    selective_scan.fill_padded(given(frame, 3, kind), n, True, turned)
    cdef real[:, :, ::1] update = view3(given(frame, 0, kind), batch, length, n), states = view3(made(frame, 0, kind), batch, length, n)
    cdef real[:, ::1] dt_a = view2(given(frame, 1, kind), batch, length), dt_b = view2(given(frame, 2, kind), batch, length)
    cdef real[:, ::1] transposed = view2(turned, full, n), start = view2(given(frame, 6, kind), batch, n)
    cdef real[::1] weight = view1(given(frame, 4, kind), n), bias = view1(given(frame, 5, kind), n)
    # for row in range(B): states[row] = scan(update[row], dt_a[row], dt_b[row], start[row])
    for row in prange(batch, schedule="static", num_threads=threads):
        selective_scan.forward_row(update, dt_a, dt_b, scaled, transposed, weight, bias, start, states, eps, row)


cdef void scan_back(Frame* frame, Room* room, real* kind) noexcept nogil:
    """grad_states, the operands of `scan`, states. To the gradient of every operand of `scan`; zeros for dt_b where it is None."""
    cdef Py_ssize_t batch = size(frame, 0, 0), length = size(frame, 0, 1), n = size(frame, 0, 2), full = selective_scan.padded_rows(n), row
    cdef int threads = threads_for(batch, 3 * batch * length * n * n)
    cdef bint scaled = whole(frame, "scaled")
    cdef real eps = <real> number(frame, "eps")
    cdef real* straight = scratch(room, full * n, kind)
    cdef real* turned = scratch(room, full * n, kind)
    cdef double* sums = scratch(room, batch * n * (n + 2), <double*> NULL)
    if room.failed:
        return
    selective_scan.fill_padded(given(frame, 4, kind), n, False, straight)
    selective_scan.fill_padded(given(frame, 4, kind), n, True, turned)
    memset(sums, 0, batch * n * (n + 2) * sizeof(double))
    cdef double* sums_weight = sums + batch * n * n
    cdef double* sums_bias = sums_weight + batch * n
    cdef real[:, :, ::1] grad_states = view3(given(frame, 0, kind), batch, length, n), update = view3(given(frame, 1, kind), batch, length, n)
    cdef real[:, ::1] dt_a = view2(given(frame, 2, kind), batch, length), dt_b = view2(given(frame, 3, kind), batch, length)
    cdef real[:, ::1] transition = view2(straight, full, n), transposed = view2(turned, full, n), start = view2(given(frame, 7, kind), batch, n)
    cdef real[::1] weight = view1(given(frame, 5, kind), n)
    cdef real[:, :, ::1] states = view3(given(frame, 8, kind), batch, length, n), grad_update = view3(made(frame, 0, kind), batch, length, n)
    cdef real[:, ::1] grad_dt_a = view2(made(frame, 1, kind), batch, length), grad_dt_b = view2(made(frame, 2, kind), batch, length)
    cdef real[:, ::1] grad_start = view2(made(frame, 6, kind), batch, n)
    cdef double[:, :, ::1] grad_transition = view3(sums, batch, n, n)
    cdef double[:, ::1] grad_weight = view2(sums_weight, batch, n), grad_bias = view2(sums_bias, batch, n)
    if not scaled:
        memset(made(frame, 2, kind), 0, batch * length * sizeof(real))
    # for row in range(B): every gradient of scan(update[row], dt_a[row], dt_b[row], start[row])
    for row in prange(batch, schedule="static", num_threads=threads):
        selective_scan.backward_row(grad_states, update, dt_a, dt_b, scaled, transition, transposed, weight, start, states, eps, grad_update,
                                    grad_dt_a, grad_dt_b, grad_start, grad_transition, grad_weight, grad_bias, row)
    add_rows(sums, batch, n * n, made(frame, 3, kind))
    add_rows(sums_weight, batch, n, made(frame, 4, kind))
    add_rows(sums_bias, batch, n, made(frame, 5, kind))


cdef void memory(Frame* frame, Room* room, real* kind) noexcept nogil:
    """r, k, v, w, u, initial_state; "fresh" is 1 where that is None, "gain" is the time_first. To y and the last state."""
    cdef Py_ssize_t batch = size(frame, 0, 0), length = size(frame, 0, 1), heads = size(frame, 0, 2), p = size(frame, 0, 3), head
    cdef Py_ssize_t rows = batch * heads, tokens = min(<Py_ssize_t> wkv.CHUNK_TOKENS, length)
    cdef int threads = threads_for(rows, 3 * rows * length * p * p)
    cdef bint fresh = whole(frame, "fresh"), gain = whole(frame, "gain")
    cdef real[:, :, :, ::1] r = view4(given(frame, 0, kind), batch, length, heads, p), k = view4(given(frame, 1, kind), batch, length, heads, p)
    cdef real[:, :, :, ::1] v = view4(given(frame, 2, kind), batch, length, heads, p), y = view4(made(frame, 0, kind), batch, length, heads, p)
    cdef real[:, ::1] w = view2(given(frame, 3, kind), heads, p), u = view2(given(frame, 4, kind), heads, p)
    cdef real[:, :, ::1] states = view3(made(frame, 1, kind), rows, p, p)
    if fresh:
        memset(made(frame, 1, kind), 0, rows * p * p * sizeof(real))
    else:
        memcpy(made(frame, 1, kind), given(frame, 5, kind), rows * p * p * sizeof(real))
    if length <= wkv.SHORT_TOKENS:
        # for head in range(B * H): y, states = one token after another
        for head in prange(rows, schedule="static", num_threads=threads):
            wkv.recurrent_head(r, k, v, w, u, states, y, head, gain)
        return
    cdef real[:, :, ::1] powers = view3(scratch(room, heads * (tokens + 1) * p, kind), heads, tokens + 1, p)
    cdef real[:, :, ::1] keys = view3(scratch(room, threads * tokens * p, kind), threads, tokens, p)
    cdef real[:, :, ::1] early = view3(scratch(room, threads * tokens * p, kind), threads, tokens, p)
    cdef real[:, :, ::1] late = view3(scratch(room, threads * tokens * p, kind), threads, tokens, p)
    cdef real[:, :, ::1] scores = view3(scratch(room, threads * ROWS * tokens, kind), threads, ROWS, tokens)
    cdef double[::1] power = view1(scratch(room, p, <double*> NULL), p)
    if room.failed:
        return
    wkv.fill_powers(w, power, powers)
    enter()
    # for head in range(B * H): y, states = one chunk after another
    for head in prange(rows, schedule="dynamic", num_threads=threads):
        wkv.chunked_head(r, k, v, u, powers, states, keys, early, late, scores, y, head, fresh, gain, threadid())
    leave()


cdef void memory_back(Frame* frame, Room* room, real* kind) noexcept nogil:
    """grad_y, grad_state, the operands of `memory`. To the gradient of every operand of `memory`; of what the state would be where it is None."""
    cdef Py_ssize_t batch = size(frame, 0, 0), length = size(frame, 0, 1), heads = size(frame, 0, 2), p = size(frame, 0, 3), head
    cdef Py_ssize_t rows = batch * heads, tokens = min(<Py_ssize_t> wkv.CHUNK_TOKENS, length), chunks = (length + tokens - 1) // tokens
    cdef int threads = threads_for(rows, 8 * rows * length * p * p)
    cdef bint fresh = whole(frame, "fresh"), gain = whole(frame, "gain")
    cdef real[:, :, :, ::1] grad_y = view4(given(frame, 0, kind), batch, length, heads, p)
    cdef real[:, :, ::1] grad_state = view3(given(frame, 1, kind), rows, p, p)
    cdef real[:, :, :, ::1] r = view4(given(frame, 2, kind), batch, length, heads, p), k = view4(given(frame, 3, kind), batch, length, heads, p)
    cdef real[:, :, :, ::1] v = view4(given(frame, 4, kind), batch, length, heads, p)
    cdef real[:, ::1] w = view2(given(frame, 5, kind), heads, p), u = view2(given(frame, 6, kind), heads, p)
    cdef real[:, :, ::1] initial = view3(given(frame, 7, kind), rows, p, p)  # not read where it is fresh
    cdef real[:, :, :, ::1] grad_r = view4(made(frame, 0, kind), batch, length, heads, p)
    cdef real[:, :, :, ::1] grad_k = view4(made(frame, 1, kind), batch, length, heads, p)
    cdef real[:, :, :, ::1] grad_v = view4(made(frame, 2, kind), batch, length, heads, p)
    cdef real[:, :, ::1] grad_initial = view3(made(frame, 5, kind), rows, p, p)
    cdef real[:, :, ::1] powers = view3(scratch(room, heads * (tokens + 1) * p, kind), heads, tokens + 1, p)
    cdef real[:, :, ::1] keys = view3(scratch(room, threads * tokens * p, kind), threads, tokens, p)
    cdef real[:, :, ::1] early = view3(scratch(room, threads * tokens * p, kind), threads, tokens, p)
    cdef real[:, :, ::1] late = view3(scratch(room, threads * tokens * p, kind), threads, tokens, p)
    cdef real[:, :, ::1] pulled = view3(scratch(room, threads * tokens * p, kind), threads, tokens, p)
    cdef real[:, :, ::1] grad_keys = view3(scratch(room, threads * tokens * p, kind), threads, tokens, p)
    cdef real[:, :, ::1] scores = view3(scratch(room, threads * ROWS * tokens, kind), threads, ROWS, tokens)
    cdef real[:, :, ::1] matches = view3(scratch(room, threads * ROWS * tokens, kind), threads, ROWS, tokens)
    cdef real[:, :, ::1] carry = view3(scratch(room, threads * p * p, kind), threads, p, p)
    cdef real[:, :, :, ::1] starts = view4(scratch(room, threads * chunks * p * p, kind), threads, chunks, p, p)
    cdef real[:, :, ::1] grad_powers = view3(scratch(room, threads * (tokens + 1) * p, kind), threads, tokens + 1, p)
    cdef real[:, ::1] grad_bonus = view2(scratch(room, threads * p, kind), threads, p)
    cdef double* sums = scratch(room, (2 * rows + 1) * p, <double*> NULL)
    if room.failed:
        return
    cdef double[:, ::1] grad_w = view2(sums, rows, p), grad_u = view2(sums + rows * p, rows, p)
    cdef double[::1] power = view1(sums + 2 * rows * p, p)
    wkv.fill_powers(w, power, powers)
    enter()
    # for head in range(B * H): every gradient, one chunk after another from the last to the first
    for head in prange(rows, schedule="dynamic", num_threads=threads):
        wkv.backward_head(grad_y, grad_state, r, k, v, u, powers, initial, keys, early, late, scores, matches, pulled, starts, carry, grad_keys,
                          grad_powers, grad_bonus, grad_r, grad_k, grad_v, grad_w, grad_u, grad_initial, head, fresh, gain, threadid())
    leave()
    add_rows(sums, batch, heads * p, made(frame, 3, kind))
    add_rows(sums + rows * p, batch, heads * p, made(frame, 4, kind))


cdef void delta(Frame* frame, Room* room, real* kind) noexcept nogil:
    """q, k, v, beta, initial_state. To o and the last state."""
    cdef Py_ssize_t rows = size(frame, 0, 0) * size(frame, 0, 1), length = size(frame, 0, 2), d = size(frame, 0, 3), head
    cdef Py_ssize_t tokens = min(plain_delta.tokens_of(d), length)
    cdef int threads = threads_for(rows, rows * length * d * (3 * d + 2 * tokens))
    cdef real[:, :, ::1] q = view3(given(frame, 0, kind), rows, length, d), k = view3(given(frame, 1, kind), rows, length, d)
    cdef real[:, :, ::1] v = view3(given(frame, 2, kind), rows, length, d), o = view3(made(frame, 0, kind), rows, length, d)
    cdef real[:, ::1] beta = view2(given(frame, 3, kind), rows, length)
    cdef real[:, :, ::1] states = view3(made(frame, 1, kind), rows, d, d)
    cdef real[:, :, ::1] strips = view3(scratch(room, threads * 2 * plain_delta.STRIP * tokens, kind), threads, 2 * plain_delta.STRIP, tokens)
    cdef real[:, :, ::1] e = view3(scratch(room, threads * tokens * d, kind), threads, tokens, d)
    cdef real[:, :, ::1] u = view3(scratch(room, threads * tokens * d, kind), threads, tokens, d)
    if room.failed:
        return
    memcpy(made(frame, 1, kind), given(frame, 4, kind), rows * d * d * sizeof(real))
    enter()
    # for head in range(B * H): o[head], states[head] = the rule on q[head], k[head], v[head], beta[head], from states[head]
    for head in prange(rows, schedule="dynamic", num_threads=threads):
        plain_delta.forward_head(q, k, v, beta, strips, e, u, o, states, head, threadid())
    leave()


cdef void delta_back(Frame* frame, Room* room, real* kind) noexcept nogil:
    """grad_o, grad_state, the operands of `delta`. To the gradient of every operand of `delta`."""
    cdef Py_ssize_t rows = size(frame, 0, 0) * size(frame, 0, 1), length = size(frame, 0, 2), d = size(frame, 0, 3), head
    cdef Py_ssize_t tokens = min(plain_delta.tokens_of(d), length), chunks = (length + tokens - 1) // tokens
    cdef int threads = threads_for(rows, rows * length * d * (8 * d + 6 * tokens))
    cdef real[:, :, ::1] grad_o = view3(given(frame, 0, kind), rows, length, d), grad_state = view3(made(frame, 4, kind), rows, d, d)
    cdef real[:, :, ::1] q = view3(given(frame, 2, kind), rows, length, d), k = view3(given(frame, 3, kind), rows, length, d)
    cdef real[:, :, ::1] v = view3(given(frame, 4, kind), rows, length, d), initial = view3(given(frame, 6, kind), rows, d, d)
    cdef real[:, ::1] beta = view2(given(frame, 5, kind), rows, length), grad_beta = view2(made(frame, 3, kind), rows, length)
    cdef real[:, :, ::1] grad_q = view3(made(frame, 0, kind), rows, length, d), grad_k = view3(made(frame, 1, kind), rows, length, d)
    cdef real[:, :, ::1] grad_v = view3(made(frame, 2, kind), rows, length, d)
    cdef real[:, :, ::1] strips = view3(scratch(room, threads * 2 * plain_delta.STRIP * tokens, kind), threads, 2 * plain_delta.STRIP, tokens)
    cdef real[:, :, ::1] u = view3(scratch(room, threads * tokens * d, kind), threads, tokens, d)
    cdef real[:, :, ::1] g = view3(scratch(room, threads * tokens * d, kind), threads, tokens, d)
    cdef real[:, :, ::1] state = view3(scratch(room, threads * d * d, kind), threads, d, d)
    cdef real[:, :, ::1] e = view3(scratch(room, threads * length * d, kind), threads, length, d)
    cdef real[:, :, :, ::1] starts = view4(scratch(room, threads * chunks * d * d, kind), threads, chunks, d, d)
    if room.failed:
        return
    memcpy(made(frame, 4, kind), given(frame, 1, kind), rows * d * d * sizeof(real))
    enter()
    # for head in range(B * H): every gradient of the rule on q[head], k[head], v[head], beta[head], from initial[head]
    for head in prange(rows, schedule="dynamic", num_threads=threads):
        plain_delta.backward_head(grad_o, q, k, v, beta, initial, strips, u, g, state, e, starts, grad_state, grad_q, grad_k, grad_v, grad_beta,
                                  head, threadid())
    leave()


cdef void run(Frame* frame, Room* room, int kernel, real* kind) noexcept nogil:
    if kernel == SCAN:
        scan(frame, room, kind)
    elif kernel == SCAN_BACK:
        scan_back(frame, room, kind)
    elif kernel == WKV:
        memory(frame, room, kind)
    elif kernel == WKV_BACK:
        memory_back(frame, room, kind)
    elif kernel == DELTA:
        delta(frame, room, kind)
    elif kernel == DELTA_BACK:
        delta_back(frame, room, kind)
    else:
        hierarchical(frame, room, allowed(), kind)


cdef Error* serve(Frame* frame, int kernel) noexcept nogil:
    cdef Room room
    cdef fenv_t environment
    cdef int i, kind
    if answered(frame) or frame.stage != EXECUTE:
        return NULL
    if frame.arguments.count != operands[kernel] or frame.results.count != results[kernel]:
        return refusal(frame, INVALID, "a compiled kernel was called with another number of operands or results than it has")
    kind = frame.arguments.items[0].kind
    for i in range(operands[kernel]):
        if frame.arguments.items[i].kind != kind or (kind != FLOAT32 and kind != FLOAT64):
            return refusal(frame, INVALID, "the operands of a compiled kernel must be all float32 or all float64")
    room.count, room.failed = 0, False
    fegetenv(&environment)
    fesetenv(FE_DFL_ENV)
    if kind == FLOAT32:
        run(frame, &room, kernel, <float*> NULL)
    else:
        run(frame, &room, kernel, <double*> NULL)
    fesetenv(&environment)
    for i in range(room.count):
        free(room.held[i])
    if room.failed:
        return refusal(frame, EXHAUSTED, "there is no memory for the buffers of a compiled kernel")
    count(calls[kernel])
    return NULL


# A handler is not told its name: every kernel has one of its own, in the order of NAMES.
cdef Error* serve_scan(Frame* frame) noexcept nogil:
    return serve(frame, SCAN)


cdef Error* serve_scan_back(Frame* frame) noexcept nogil:
    return serve(frame, SCAN_BACK)


cdef Error* serve_wkv(Frame* frame) noexcept nogil:
    return serve(frame, WKV)


cdef Error* serve_wkv_back(Frame* frame) noexcept nogil:
    return serve(frame, WKV_BACK)


cdef Error* serve_delta(Frame* frame) noexcept nogil:
    return serve(frame, DELTA)


cdef Error* serve_delta_back(Frame* frame) noexcept nogil:
    return serve(frame, DELTA_BACK)


cdef Error* serve_hierarchical(Frame* frame) noexcept nogil:
    return serve(frame, HIERARCHICAL)


def handlers():
    """Name of every kernel -> capsule of its handler, for `jax.ffi.register_ffi_target(target, capsule, platform="cpu")`.

    Raises RuntimeError where products go through a BLAS that cannot be kept to one thread without Python.
    """
    global default_threads
    cdef Handler[KERNELS] table
    others = limits.find_blas()
    if others:
        found = ", ".join(library.filepath for library in others)
        raise RuntimeError(f"the kernels for JAX need every BLAS to be OpenBLAS with threads of its own, found {found}")
    default_threads = limits.default_num_threads()
    table[:] = [serve_scan, serve_scan_back, serve_wkv, serve_wkv_back, serve_delta, serve_delta_back, serve_hierarchical]
    return {name: PyCapsule_New(<void*> table[kernel], NULL, NULL) for kernel, name in enumerate(NAMES)}


def kernel_calls():
    """Name of every kernel -> how many of its custom calls have come to their end in this process."""
    return {name: calls[kernel] for kernel, name in enumerate(NAMES)}
