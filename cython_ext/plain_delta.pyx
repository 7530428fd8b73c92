"""The plain delta rule, forward and backward, exact. `cython_ext.delta_rule` hands both on as its `forward` and `backward`.

    S_t = S_{t-1} + k_t u_t^T        u_t = beta_t e_t        e_t = v_t - S_{t-1}^T k_t        o_t = S_t^T q_t

A chunk of C tokens at a time, S at its start (E, U, O are the rows e_t, u_t, o_t; the triangular solve gives the recurrence's own e_t):

    N = strict_lower(K K^T)     P = lower(Q K^T)     E = V - K S - N U     U = diag(beta) E     O = Q S + P U     S <- S + K^T U

and backward, from the last chunk to the first, with G the gradient of U and H = diag(beta) G that of E:

    G = P^T dO + K dS - N^T H          dbeta = rowsum(G E)          dV = H          X = lower(dO U^T)          Y = strict_lower(H U^T)
    dQ = dO S^T + X K     dK = X^T Q - Y^T K - Y K + U dS^T - H S^T     dS <- dS + Q^T dO - K^T H

Triangles are taken STRIP rows at a time: BLAS does what lies beside the diagonal blocks, and a loop does these row after row, so that no
output reads a later token, be it NaN. A head is the work of one thread and BLAS keeps to one, so no result depends on their number.
Source: Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (2024), section 3.
Letters: B batch, H heads, L length, d head width, C chunk; head: one of B * H.
"""

import numpy as np

from cython.parallel cimport prange, threadid

from cython_ext.algebra cimport dot, multiply
from cython_ext.clones cimport inlined

from cython_ext.checks import plain_arguments
from cython_ext.threads import one_blas_thread, threads_for

cdef enum:
    WIDE = 32  # columns that the loops over the rows of a strip keep in registers


def chunk_tokens(d):
    """Tokens in a chunk, by the head width."""
    return tokens_of(d)


cdef inlined strip_forward(
    const real* square, const real* scores, Py_ssize_t size, const real* beta, real* e, real* u, real* o, Py_ssize_t d, Py_ssize_t rows,
    Py_ssize_t width, bint reads,
) noexcept nogil:
    """The diagonal block of a strip, `width` columns of it: what lies left of the block has been taken off e and added to o."""
    cdef real error[WIDE]
    cdef real value[WIDE]
    cdef Py_ssize_t t, s, i
    cdef real by, weight
    for t in range(rows):
        for i in range(width):
            error[i] = e[t * d + i]
        if reads:
            for i in range(width):
                value[i] = o[t * d + i]
        # e[t] -= square[t, :t] @ u[:t]; o[t] += scores[t, :t] @ u[:t]
        for s in range(t):
            by, weight = square[t * size + s], scores[t * size + s] if reads else 0
            for i in range(width):
                error[i] -= by * u[s * d + i]
            if reads:
                for i in range(width):
                    value[i] += weight * u[s * d + i]
        by, weight = beta[t], scores[t * size + t] if reads else 0
        # u[t] = beta[t] * e[t]; o[t] += scores[t, t] * u[t]
        for i in range(width):
            e[t * d + i] = error[i]
            u[t * d + i] = by * error[i]
        if reads:
            for i in range(width):
                o[t * d + i] = value[i] + weight * (by * error[i])


cdef inlined chunk_forward(
    const real* q, const real* k, const real* v, const real* beta, real* square, real* scores, Py_ssize_t size, real* e, real* u, real* o,
    real* state, Py_ssize_t n, Py_ssize_t d, bint reads,
) noexcept nogil:
    """n tokens: e, u and, where it `reads`, o; state becomes the one after them."""
    cdef Py_ssize_t strip, low, rows, i
    # e = v - k @ state; o = q @ state
    for i in range(n * d):
        e[i] = v[i]
    multiply(False, False, n, d, d, -1, k, d, state, d, 1, e, d)
    if reads:
        multiply(False, False, n, d, d, 1, q, d, state, d, 0, o, d)
    for strip in range((n + STRIP - 1) // STRIP):
        low = strip * STRIP
        rows = min(<Py_ssize_t> STRIP, n - low)
        # square = (k @ k.T)[low:high, :high]; e[low:high] -= square[:, :low] @ u[:low]; scores and o the same way
        multiply(False, True, rows, low + rows, d, 1, k + low * d, d, k, d, 0, square, size)
        if low:
            multiply(False, False, rows, d, low, -1, square, size, u, d, 1, e + low * d, d)
        if reads:
            multiply(False, True, rows, low + rows, d, 1, q + low * d, d, k, d, 0, scores, size)
            if low:
                multiply(False, False, rows, d, low, 1, scores, size, u, d, 1, o + low * d, d)
        for i in range(d // WIDE):
            strip_forward(square + low, scores + low, size, beta + low, e + low * d + i * WIDE, u + low * d + i * WIDE, o + low * d + i * WIDE, d,
                          rows, WIDE, reads)
        i = d // WIDE * WIDE
        if i < d:
            strip_forward(square + low, scores + low, size, beta + low, e + low * d + i, u + low * d + i, o + low * d + i, d, rows, d - i, reads)
    # state += k.T @ u
    multiply(True, False, d, d, n, 1, k, d, u, d, 1, state, d)


cdef cloned forward_head(
    const real[:, :, ::1] q, const real[:, :, ::1] k, const real[:, :, ::1] v, const real[:, ::1] beta, real[:, :, ::1] strips,
    real[:, :, ::1] e, real[:, :, ::1] u, real[:, :, ::1] o, real[:, :, ::1] states, Py_ssize_t head, int thread,
) noexcept nogil:
    cdef Py_ssize_t length = q.shape[1], d = q.shape[2], size = e.shape[1], chunk, start
    for chunk in range((length + size - 1) // size):
        start = chunk * size
        chunk_forward(&q[head, start, 0], &k[head, start, 0], &v[head, start, 0], &beta[head, start], &strips[thread, 0, 0],
                      &strips[thread, STRIP, 0], size, &e[thread, 0, 0], &u[thread, 0, 0], &o[head, start, 0], &states[head, 0, 0],
                      min(size, length - start), d, True)


cdef forward_heads(
    const real[:, :, ::1] q, const real[:, :, ::1] k, const real[:, :, ::1] v, const real[:, ::1] beta, real[:, :, ::1] strips,
    real[:, :, ::1] e, real[:, :, ::1] u, real[:, :, ::1] o, real[:, :, ::1] states, int threads,
):
    cdef Py_ssize_t head
    # for head in range(B * H): o[head], states[head] = the rule on q[head], k[head], v[head], beta[head], from states[head]
    for head in prange(q.shape[0], nogil=True, schedule="dynamic", num_threads=threads):
        forward_head(q, k, v, beta, strips, e, u, o, states, head, threadid())


cdef inlined strip_backward(
    const real* square, const real* scores, Py_ssize_t size, const real* beta, const real* grad_o, real* g, real* h, Py_ssize_t d,
    Py_ssize_t rows, Py_ssize_t width,
) noexcept nogil:
    """The diagonal block of a strip from its last row up: what lies below the block has been added to g."""
    cdef real pull[WIDE]
    cdef Py_ssize_t t, s, i
    cdef real by, weight
    for t in range(rows - 1, -1, -1):
        weight = scores[t * size + t]
        for i in range(width):
            pull[i] = g[t * d + i] + weight * grad_o[t * d + i]
        # g[t] += scores[t:, t] @ grad_o[t:] - square[t + 1:, t] @ h[t + 1:]
        for s in range(t + 1, rows):
            by, weight = square[s * size + t], scores[s * size + t]
            for i in range(width):
                pull[i] += weight * grad_o[s * d + i] - by * h[s * d + i]
        by = beta[t]
        # h[t] = beta[t] * g[t]
        for i in range(width):
            g[t * d + i] = pull[i]
            h[t * d + i] = by * pull[i]


cdef inlined chunk_backward(
    const real* grad_o, const real* q, const real* k, const real* beta, const real* e, const real* state, real* square, real* scores,
    Py_ssize_t size, real* u, real* g, real* grad_state, real* grad_q, real* grad_k, real* grad_v, real* grad_beta,
    Py_ssize_t n, Py_ssize_t d,
) noexcept nogil:
    """The gradients of n tokens; `state` is the one before them, `grad_state` becomes the gradient of S. h is grad_v."""
    cdef Py_ssize_t strip, low, high, rows, t, i
    # u = beta[:, None] * e; g = k @ grad_state
    for t in range(n):
        for i in range(d):
            u[t * d + i] = beta[t] * e[t * d + i]
    multiply(False, False, n, d, d, 1, k, d, grad_state, d, 0, g, d)
    for strip in range((n + STRIP - 1) // STRIP - 1, -1, -1):
        low = strip * STRIP
        high = min(low + STRIP, n)
        rows = high - low
        # square = (k @ k.T)[low:, low:high]; scores = (q @ k.T)[low:, low:high]
        # g[low:high] += scores[high:].T @ grad_o[high:] - square[high:].T @ h[high:]
        multiply(False, True, n - low, rows, d, 1, k + low * d, d, k + low * d, d, 0, square, STRIP)
        multiply(False, True, n - low, rows, d, 1, q + low * d, d, k + low * d, d, 0, scores, STRIP)
        if high < n:
            multiply(True, False, rows, d, n - high, -1, square + rows * STRIP, STRIP, grad_v + high * d, d, 1, g + low * d, d)
            multiply(True, False, rows, d, n - high, 1, scores + rows * STRIP, STRIP, grad_o + high * d, d, 1, g + low * d, d)
        for i in range(d // WIDE):
            strip_backward(square, scores, STRIP, beta + low, grad_o + low * d + i * WIDE, g + low * d + i * WIDE, grad_v + low * d + i * WIDE, d,
                           rows, WIDE)
        i = d // WIDE * WIDE
        if i < d:
            strip_backward(square, scores, STRIP, beta + low, grad_o + low * d + i, g + low * d + i, grad_v + low * d + i, d, rows, d - i)
    # grad_beta = (g * e).sum(1)
    for t in range(n):
        grad_beta[t] = dot(g + t * d, e + t * d, d)
    # grad_q = grad_o @ state.T; grad_k = u @ grad_state.T - h @ state.T
    multiply(False, True, n, d, d, 1, grad_o, d, state, d, 0, grad_q, d)
    multiply(False, True, n, d, d, 1, u, d, grad_state, d, 0, grad_k, d)
    multiply(False, True, n, d, d, -1, grad_v, d, state, d, 1, grad_k, d)
    for strip in range((n + STRIP - 1) // STRIP):
        low = strip * STRIP
        high = min(low + STRIP, n)
        rows = high - low
        # scores = lower(grad_o @ u.T)[low:high, :high]; square = strict_lower(h @ u.T)[low:high, :high]
        multiply(False, True, rows, high, d, 1, grad_o + low * d, d, u, d, 0, scores, size)
        multiply(False, True, rows, high, d, 1, grad_v + low * d, d, u, d, 0, square, size)
        for t in range(rows):
            square[t * size + low + t] = 0
            for i in range(low + t + 1, high):
                scores[t * size + i] = square[t * size + i] = 0
        # grad_q[low:high] += scores @ k[:high]; grad_k[:high] += scores.T @ q[low:high]
        multiply(False, False, rows, d, high, 1, scores, size, k, d, 1, grad_q + low * d, d)
        multiply(True, False, high, d, rows, 1, scores, size, q + low * d, d, 1, grad_k, d)
        # grad_k[low:high] -= square @ k[:high]; grad_k[:high] -= square.T @ k[low:high]
        multiply(False, False, rows, d, high, -1, square, size, k, d, 1, grad_k + low * d, d)
        multiply(True, False, high, d, rows, -1, square, size, k + low * d, d, 1, grad_k, d)
    # grad_state += q.T @ grad_o - k.T @ h
    multiply(True, False, d, d, n, 1, q, d, grad_o, d, 1, grad_state, d)
    multiply(True, False, d, d, n, -1, k, d, grad_v, d, 1, grad_state, d)


cdef cloned backward_head(
    const real[:, :, ::1] grad_o, const real[:, :, ::1] q, const real[:, :, ::1] k, const real[:, :, ::1] v, const real[:, ::1] beta,
    const real[:, :, ::1] initial, real[:, :, ::1] strips, real[:, :, ::1] u, real[:, :, ::1] g, real[:, :, ::1] state,
    real[:, :, ::1] e, real[:, :, :, ::1] starts, real[:, :, ::1] grad_state, real[:, :, ::1] grad_q,
    real[:, :, ::1] grad_k, real[:, :, ::1] grad_v, real[:, ::1] grad_beta, Py_ssize_t head, int thread,
) noexcept nogil:
    cdef Py_ssize_t length = q.shape[1], d = q.shape[2], size = u.shape[1], chunks = (length + size - 1) // size, chunk, start, i, j
    cdef real* square = &strips[thread, 0, 0]
    cdef real* scores = square + STRIP * size
    # state = initial[head]
    for i in range(d):
        for j in range(d):
            state[thread, i, j] = initial[head, i, j]
    for chunk in range(chunks):
        start = chunk * size
        for i in range(d):
            for j in range(d):
                starts[thread, chunk, i, j] = state[thread, i, j]
        chunk_forward(&q[head, start, 0], &k[head, start, 0], &v[head, start, 0], &beta[head, start], square, scores, size, &e[thread, start, 0],
                      &u[thread, 0, 0], &g[thread, 0, 0], &state[thread, 0, 0], min(size, length - start), d, False)
    for chunk in range(chunks - 1, -1, -1):
        start = chunk * size
        chunk_backward(&grad_o[head, start, 0], &q[head, start, 0], &k[head, start, 0], &beta[head, start], &e[thread, start, 0],
                       &starts[thread, chunk, 0, 0], square, scores, size, &u[thread, 0, 0], &g[thread, 0, 0],
                       &grad_state[head, 0, 0], &grad_q[head, start, 0], &grad_k[head, start, 0], &grad_v[head, start, 0], &grad_beta[head, start],
                       min(size, length - start), d)


cdef backward_heads(
    const real[:, :, ::1] grad_o, const real[:, :, ::1] q, const real[:, :, ::1] k, const real[:, :, ::1] v, const real[:, ::1] beta,
    const real[:, :, ::1] initial, real[:, :, ::1] strips, real[:, :, ::1] u, real[:, :, ::1] g, real[:, :, ::1] state,
    real[:, :, ::1] e, real[:, :, :, ::1] starts, real[:, :, ::1] grad_state, real[:, :, ::1] grad_q,
    real[:, :, ::1] grad_k, real[:, :, ::1] grad_v, real[:, ::1] grad_beta, int threads,
):
    cdef Py_ssize_t head
    # for head in range(B * H): every gradient of the rule on q[head], k[head], v[head], beta[head], from initial[head]
    for head in prange(q.shape[0], nogil=True, schedule="dynamic", num_threads=threads):
        backward_head(grad_o, q, k, v, beta, initial, strips, u, g, state, e, starts, grad_state, grad_q, grad_k, grad_v, grad_beta,
                      head, threadid())


def forward(q, k, v, beta, initial_state=None):
    """The plain delta rule: S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T, o_t = S_t^T q_t.

    q, k, v (B, H, L, d), taken as they are; beta (B, H, L); initial_state (B, H, d, d), key index first, or None for zeros. All float32 or
    all float64; arrays that are read-only or not contiguous are accepted, the latter copied. Returns o (B, H, L, d) and the last state
    (B, H, d, d), new arrays.
    Raises TypeError for another type or dtype, ValueError for another shape or an empty axis, by name.
    """
    arrays, initial_state = plain_arguments(q, k, v, beta, initial_state)
    batch, heads, length, d = q.shape
    rows, size, dtype = batch * heads, min(chunk_tokens(d), length), q.dtype
    q, k, v, beta = (x.reshape(rows, *x.shape[2:]) for x in arrays)
    threads = threads_for(rows, rows * length * d * (3 * d + 2 * size))
    o, states = np.empty_like(q), np.zeros((rows, d, d), dtype)
    if initial_state is not None:
        states[:] = initial_state.reshape(rows, d, d)
    strips, e, u = np.empty((threads, 2 * STRIP, size), dtype), np.empty((threads, size, d), dtype), np.empty((threads, size, d), dtype)
    with one_blas_thread():
        if dtype == np.float32:
            forward_heads[float](q, k, v, beta, strips, e, u, o, states, threads)
        else:
            forward_heads[double](q, k, v, beta, strips, e, u, o, states, threads)
    return o.reshape(batch, heads, length, d), states.reshape(batch, heads, d, d)


def backward(grad_o, grad_state, q, k, v, beta, initial_state=None):
    """The gradients of every array argument of `forward`, given those of the outputs and of the last state that it returned.

    grad_o (B, H, L, d), grad_state (B, H, d, d); the rest as `forward` took it. What it computed on the way is computed again. Returns a
    tuple in the order (q, k, v, beta, initial_state), each of the argument's shape and dtype; None where the argument was None. Raises as
    `forward` does.
    """
    arrays, initial_state = plain_arguments(q, k, v, beta, initial_state, grad_o=grad_o, grad_state=grad_state)
    batch, heads, length, d = q.shape
    rows, size, dtype = batch * heads, min(chunk_tokens(d), length), q.dtype
    q, k, v, beta, grad_o, grad_state = (x.reshape(rows, *x.shape[2:]) for x in arrays)
    initial = np.zeros((rows, d, d), dtype) if initial_state is None else initial_state.reshape(rows, d, d)
    threads = threads_for(rows, rows * length * d * (8 * d + 6 * size))

    def new(*shape):
        return np.empty((threads, *shape), dtype)

    buffers = (new(2 * STRIP, size), new(size, d), new(size, d), new(d, d), new(length, d), new(-(-length // size), d, d))
    gradients = (grad_state.copy(), *(np.empty_like(x) for x in (q, k, v, beta)))
    with one_blas_thread():
        if dtype == np.float32:
            backward_heads[float](grad_o, q, k, v, beta, initial, *buffers, *gradients, threads)
        else:
            backward_heads[double](grad_o, q, k, v, beta, initial, *buffers, *gradients, threads)
    first, grad_q, grad_k, grad_v, grad_beta = (x.reshape(batch, heads, *x.shape[1:]) for x in gradients)
    return grad_q, grad_k, grad_v, grad_beta, None if initial_state is None else first
