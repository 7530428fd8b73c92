"""The WKV memory of RWKV with a decay per channel that does not depend on the input, forward, backward and one step.

    "bonus" (RWKV-5/6):   y_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t        S_t = diag(w) S_{t-1} + k_t v_t^T
    "gain"  (GroundThink): y_t = S_t^T r_t                                 S_t = diag(w) S_{t-1} + diag(u) k_t v_t^T

A token reads itself with the score sum_d u_d r_d k_d in both; for the past, "gain" is "bonus" with k scaled by u and the read one decay
later (`late`). A few tokens are taken one after another, as the equations stand. More of them are cut into chunks, one chunk after another:
the state is read and written by matrix products, and so are the scores of a block of ROWS tokens for the tokens before it in the chunk,
    score_ts = sum_d (r_td w_d^(t-low)) (k_sd w_d^(low-1-s))          s < low <= t
where both exponents count from the block's first token `low`, so that only powers w^0 .. w^C are formed, never an inverse; inside a block
each score is summed by itself. A decay's gradient is taken through the table of powers, so it needs no inverse either. No score of a later
token is computed, so that NaN does not reach the past.

One head of one sample is computed by one thread, with BLAS on one thread; the sums over samples are added in order afterwards, so that no
result depends on the number of threads.
Sources: Peng et al., "Eagle and Finch: RWKV with Matrix-Valued States" (2024), eqs. 18-19; GroundThink's RWKVGroundedMemory.
Letters: B batch, L length, H heads, P head width, C chunk. S is (B, H, P, P), key index first; head: one of B * H.
"""

import numpy as np

from cython.parallel cimport prange, threadid

from cython_ext.algebra cimport multiply
from cython_ext.clones cimport inlined
from cython_ext.wkv_parts cimport (
    ROWS, add_product, add_scaled, add_scaled_product, fade, read_chunk, score, set_product, take_keys, token, wane,
)

from cython_ext.checks_wkv import wkv_arguments, wkv_step_arguments
from cython_ext.threads import one_blas_thread, threads_for

CHUNK = CHUNK_TOKENS
SHORT = SHORT_TOKENS


cdef cloned recurrent_head(
    const real[:, :, :, ::1] r, const real[:, :, :, ::1] k, const real[:, :, :, ::1] v, const real[:, ::1] w, const real[:, ::1] u,
    real[:, :, ::1] states, real[:, :, :, ::1] y, Py_ssize_t head, bint gain,
) noexcept nogil:
    cdef Py_ssize_t heads = r.shape[2], sample = head // heads, h = head % heads, t
    for t in range(r.shape[1]):
        token(&r[sample, t, h, 0], &k[sample, t, h, 0], &v[sample, t, h, 0], &w[h, 0], &u[h, 0], &states[head, 0, 0], &y[sample, t, h, 0],
              r.shape[3], gain)


cdef cloned chunked_head(
    const real[:, :, :, ::1] r, const real[:, :, :, ::1] k, const real[:, :, :, ::1] v, const real[:, ::1] u, const real[:, :, ::1] powers,
    real[:, :, ::1] states, real[:, :, ::1] keys, real[:, :, ::1] early, real[:, :, ::1] late, real[:, :, ::1] scores, real[:, :, :, ::1] y,
    Py_ssize_t head, bint fresh, bint gain, int thread,
) noexcept nogil:
    cdef Py_ssize_t heads = r.shape[2], p = r.shape[3], size = keys.shape[1], step = heads * p, delay = 1 if gain else 0
    cdef Py_ssize_t sample = head // heads, h = head % heads, slot, first, n, i, j
    for slot in range((r.shape[1] + size - 1) // size):
        first, n = slot * size, min(size, r.shape[1] - slot * size)
        take_keys(k, u, keys, sample, h, first, n, gain, thread)
        # y = late @ state
        if fresh and first == 0:
            for i in range(n):
                for j in range(p):
                    y[sample, i, h, j] = 0
        else:
            wane(r, powers, late, sample, h, first, n, delay, thread)
            multiply(False, False, n, p, p, 1, &late[thread, 0, 0], p, &states[head, 0, 0], p, 0, &y[sample, first, h, 0], step)
        read_chunk(r, k, v, u, powers, keys, early, late, scores, y, sample, h, first, n, delay, thread)
        # state = (w**n)[:, None] * state + early.T @ v
        fade(keys, powers, early, h, n, thread)
        for i in range(p):
            for j in range(p):
                states[head, i, j] *= powers[h, n, i]
        multiply(True, False, p, p, n, 1, &early[thread, 0, 0], p, &v[sample, first, h, 0], step, 1, &states[head, 0, 0], p)


cdef recurrent(
    const real[:, :, :, ::1] r, const real[:, :, :, ::1] k, const real[:, :, :, ::1] v, const real[:, ::1] w, const real[:, ::1] u,
    real[:, :, ::1] states, real[:, :, :, ::1] y, bint gain, int threads,
):
    cdef Py_ssize_t head
    # for head in range(B * H): y, states = one token after another
    for head in prange(states.shape[0], nogil=True, schedule="static", num_threads=threads):
        recurrent_head(r, k, v, w, u, states, y, head, gain)


cdef chunked(
    const real[:, :, :, ::1] r, const real[:, :, :, ::1] k, const real[:, :, :, ::1] v, const real[:, ::1] u, const real[:, :, ::1] powers,
    real[:, :, ::1] states, real[:, :, ::1] keys, real[:, :, ::1] early, real[:, :, ::1] late, real[:, :, ::1] scores, real[:, :, :, ::1] y,
    bint fresh, bint gain, int threads,
):
    cdef Py_ssize_t head
    # for head in range(B * H): y, states = one chunk after another
    for head in prange(states.shape[0], nogil=True, schedule="dynamic", num_threads=threads):
        chunked_head(r, k, v, u, powers, states, keys, early, late, scores, y, head, fresh, gain, threadid())


cdef inlined back_inside(
    const real[:, :, :, ::1] grad_y, const real[:, :, :, ::1] r, const real[:, :, :, ::1] k, const real[:, :, :, ::1] v, const real[:, ::1] u,
    const real[:, :, ::1] powers, real[:, :, ::1] keys, real[:, :, ::1] early, real[:, :, ::1] late, real[:, :, ::1] scores,
    real[:, :, ::1] matches, real[:, :, ::1] pulled, real[:, :, ::1] grad_keys, real[:, :, ::1] grad_powers, real[:, ::1] grad_bonus,
    real[:, :, :, ::1] grad_r, real[:, :, :, ::1] grad_k, real[:, :, :, ::1] grad_v, Py_ssize_t sample, Py_ssize_t h, Py_ssize_t first,
    Py_ssize_t n, Py_ssize_t delay, int thread,
) noexcept nogil:
    """The way back through `read_chunk`: adds to grad_r, grad_v, grad_keys, grad_powers and grad_bonus; sets grad_k to its own token's part."""
    cdef Py_ssize_t p = r.shape[3], size = keys.shape[1], step = r.shape[2] * p, block, low, high, t, s, e, i
    cdef real match, own
    cdef const real* read
    cdef const real* write
    for block in range((n + ROWS - 1) // ROWS):
        low, high = block * ROWS, min(block * ROWS + ROWS, n)
        # matches = grad_y[low:high] @ v[:high].T, the gradient of the scores
        multiply(False, True, high - low, high, p, 1, &grad_y[sample, first + low, h, 0], step, &v[sample, first, h, 0], step, 0,
                 &matches[thread, 0, 0], size)
        if low:
            fade(keys, powers, early, h, low, thread)
            wane(r, powers, late, sample, h, first + low, high - low, delay, thread)
            # scores = late @ early.T; grad_v[:low] += scores.T @ grad_y[low:high]
            multiply(False, True, high - low, low, p, 1, &late[thread, 0, 0], p, &early[thread, 0, 0], p, 0, &scores[thread, 0, 0], size)
            multiply(True, False, low, p, high - low, 1, &scores[thread, 0, 0], size, &grad_y[sample, first + low, h, 0], step, 1,
                     &grad_v[sample, first, h, 0], step)
            # pulled = matches[:, :low] @ early; grad_r[low:high] += powers * pulled; grad_powers += r * pulled
            multiply(False, False, high - low, p, low, 1, &matches[thread, 0, 0], size, &early[thread, 0, 0], p, 0, &pulled[thread, 0, 0], p)
            for t in range(high - low):
                add_product(&grad_r[sample, first + low + t, h, 0], &powers[h, t + delay, 0], &pulled[thread, t, 0], p)
                add_product(&grad_powers[thread, t + delay, 0], &r[sample, first + low + t, h, 0], &pulled[thread, t, 0], p)
            # pulled = matches[:, :low].T @ late; grad_keys[:low] += powers * pulled; grad_powers += keys * pulled
            multiply(True, False, low, p, high - low, 1, &matches[thread, 0, 0], size, &late[thread, 0, 0], p, 0, &pulled[thread, 0, 0], p)
            for s in range(low):
                add_product(&grad_keys[thread, s, 0], &powers[h, low - 1 - s, 0], &pulled[thread, s, 0], p)
                add_product(&grad_powers[thread, low - 1 - s, 0], &keys[thread, s, 0], &pulled[thread, s, 0], p)
        for t in range(low, high):
            read = &r[sample, first + t, h, 0]
            for s in range(low, t):
                match, e = matches[thread, t - low, s], t - s - 1 + delay
                write = &keys[thread, s, 0]
                add_scaled(&grad_v[sample, first + s, h, 0], score(read, write, &powers[h, e, 0], p), &grad_y[sample, first + t, h, 0], p)
                # grad_r[t] += match * w**e * keys[s]; grad_keys[s] += match * w**e * r[t]; grad_powers[e] += match * r[t] * keys[s]
                add_scaled_product(&grad_r[sample, first + t, h, 0], match, &powers[h, e, 0], write, p)
                add_scaled_product(&grad_keys[thread, s, 0], match, &powers[h, e, 0], read, p)
                add_scaled_product(&grad_powers[thread, e, 0], match, read, write, p)
            match = matches[thread, t - low, t]
            write = &k[sample, first + t, h, 0]
            own = score(read, write, &u[h, 0], p)
            add_scaled(&grad_v[sample, first + t, h, 0], own, &grad_y[sample, first + t, h, 0], p)
            # grad_r[t] += match * u * k[t]; grad_bonus += match * r[t] * k[t]; grad_k[t] = match * u * r[t]
            add_scaled_product(&grad_r[sample, first + t, h, 0], match, &u[h, 0], write, p)
            add_scaled_product(&grad_bonus[thread, 0], match, read, write, p)
            for i in range(p):
                grad_k[sample, first + t, h, i] = match * u[h, i] * read[i]


cdef inlined store_starts(
    const real[:, :, :, ::1] k, const real[:, :, :, ::1] v, const real[:, ::1] u, const real[:, :, ::1] powers, const real[:, :, ::1] initial,
    real[:, :, ::1] keys, real[:, :, ::1] early, real[:, :, :, ::1] starts, Py_ssize_t head, bint fresh, bint gain, int thread,
) noexcept nogil:
    """starts[thread] = the state before every chunk of one head, transposed: it is multiplied from the right."""
    cdef Py_ssize_t heads = k.shape[2], p = k.shape[3], size = keys.shape[1], sample = head // heads, h = head % heads, slot, i, j
    # starts[0] = initial.T
    for i in range(p):
        for j in range(p):
            starts[thread, 0, i, j] = 0 if fresh else initial[head, j, i]
    for slot in range(starts.shape[1] - 1):
        take_keys(k, u, keys, sample, h, slot * size, size, gain, thread)
        fade(keys, powers, early, h, size, thread)
        # starts[slot + 1] = starts[slot] * w**size + v.T @ early
        for i in range(p):
            set_product(&starts[thread, slot + 1, i, 0], &starts[thread, slot, i, 0], &powers[h, size, 0], p)
        multiply(True, False, p, p, size, 1, &v[sample, slot * size, h, 0], heads * p, &early[thread, 0, 0], p, 1,
                 &starts[thread, slot + 1, 0, 0], p)


cdef cloned backward_head(
    const real[:, :, :, ::1] grad_y, const real[:, :, ::1] grad_state, const real[:, :, :, ::1] r, const real[:, :, :, ::1] k,
    const real[:, :, :, ::1] v, const real[:, ::1] u, const real[:, :, ::1] powers, const real[:, :, ::1] initial, real[:, :, ::1] keys,
    real[:, :, ::1] early, real[:, :, ::1] late, real[:, :, ::1] scores, real[:, :, ::1] matches, real[:, :, ::1] pulled,
    real[:, :, :, ::1] starts, real[:, :, ::1] carry, real[:, :, ::1] grad_keys, real[:, :, ::1] grad_powers, real[:, ::1] grad_bonus,
    real[:, :, :, ::1] grad_r, real[:, :, :, ::1] grad_k, real[:, :, :, ::1] grad_v, double[:, ::1] grad_w, double[:, ::1] grad_u,
    real[:, :, ::1] grad_initial, Py_ssize_t head, bint fresh, bint gain, int thread,
) noexcept nogil:
    cdef Py_ssize_t heads = r.shape[2], p = r.shape[3], size = keys.shape[1], step = heads * p, delay = 1 if gain else 0
    cdef Py_ssize_t sample = head // heads, h = head % heads, slot, first, n, t, i, j
    store_starts(k, v, u, powers, initial, keys, early, starts, head, fresh, gain, thread)
    # carry = grad_state.T; grad_powers, grad_w, grad_u = zeros
    for i in range(p):
        for j in range(p):
            carry[thread, i, j] = grad_state[head, j, i]
        grad_w[head, i] = grad_u[head, i] = 0
    for t in range(size + 1):
        for i in range(p):
            grad_powers[thread, t, i] = 0
    for slot in range(starts.shape[1] - 1, -1, -1):
        first, n = slot * size, min(size, r.shape[1] - slot * size)
        take_keys(k, u, keys, sample, h, first, n, gain, thread)
        # pulled = grad_y @ start.T; grad_r = w**t * pulled; grad_powers[t] += r * pulled
        multiply(False, False, n, p, p, 1, &grad_y[sample, first, h, 0], step, &starts[thread, slot, 0, 0], p, 0, &pulled[thread, 0, 0], p)
        for t in range(n):
            set_product(&grad_r[sample, first + t, h, 0], &powers[h, t + delay, 0], &pulled[thread, t, 0], p)
            add_product(&grad_powers[thread, t + delay, 0], &r[sample, first + t, h, 0], &pulled[thread, t, 0], p)
        # pulled = v @ carry; grad_keys = w**(n-1-t) * pulled; grad_powers[n-1-t] += keys * pulled
        multiply(False, False, n, p, p, 1, &v[sample, first, h, 0], step, &carry[thread, 0, 0], p, 0, &pulled[thread, 0, 0], p)
        for t in range(n):
            set_product(&grad_keys[thread, t, 0], &powers[h, n - 1 - t, 0], &pulled[thread, t, 0], p)
            add_product(&grad_powers[thread, n - 1 - t, 0], &keys[thread, t, 0], &pulled[thread, t, 0], p)
        # grad_v = early @ carry.T
        fade(keys, powers, early, h, n, thread)
        multiply(False, True, n, p, p, 1, &early[thread, 0, 0], p, &carry[thread, 0, 0], p, 0, &grad_v[sample, first, h, 0], step)
        # grad_powers[n] += (carry * start).sum(0); carry = carry * w**n + grad_y.T @ late
        for i in range(p):
            for j in range(p):
                grad_powers[thread, n, j] += carry[thread, i, j] * starts[thread, slot, i, j]
                carry[thread, i, j] *= powers[h, n, j]
        wane(r, powers, late, sample, h, first, n, delay, thread)
        multiply(True, False, p, p, n, 1, &grad_y[sample, first, h, 0], step, &late[thread, 0, 0], p, 1, &carry[thread, 0, 0], p)
        for i in range(p):
            grad_bonus[thread, i] = 0
        back_inside(grad_y, r, k, v, u, powers, keys, early, late, scores, matches, pulled, grad_keys, grad_powers, grad_bonus, grad_r, grad_k,
                    grad_v, sample, h, first, n, delay, thread)
        # grad_k += u * grad_keys if gain else grad_keys; grad_u += grad_bonus + (grad_keys * k).sum(0) if gain else grad_bonus
        for t in range(n):
            if gain:
                add_product(&grad_k[sample, first + t, h, 0], &u[h, 0], &grad_keys[thread, t, 0], p)
                add_product(&grad_bonus[thread, 0], &k[sample, first + t, h, 0], &grad_keys[thread, t, 0], p)
            else:
                for i in range(p):
                    grad_k[sample, first + t, h, i] += grad_keys[thread, t, i]
        for i in range(p):
            grad_u[head, i] += grad_bonus[thread, i]
    # grad_w = sum(e * w**(e-1) * grad_powers[e] for e in range(1, size + 1)); grad_initial = carry.T
    for t in range(1, size + 1):
        for i in range(p):
            grad_w[head, i] += <double> t * powers[h, t - 1, i] * grad_powers[thread, t, i]
    for i in range(p):
        for j in range(p):
            grad_initial[head, i, j] = carry[thread, j, i]


cdef backward_heads(
    const real[:, :, :, ::1] grad_y, const real[:, :, ::1] grad_state, const real[:, :, :, ::1] r, const real[:, :, :, ::1] k,
    const real[:, :, :, ::1] v, const real[:, ::1] u, const real[:, :, ::1] powers, const real[:, :, ::1] initial, real[:, :, ::1] keys,
    real[:, :, ::1] early, real[:, :, ::1] late, real[:, :, ::1] scores, real[:, :, ::1] matches, real[:, :, ::1] pulled,
    real[:, :, :, ::1] starts, real[:, :, ::1] carry, real[:, :, ::1] grad_keys, real[:, :, ::1] grad_powers, real[:, ::1] grad_bonus,
    real[:, :, :, ::1] grad_r, real[:, :, :, ::1] grad_k, real[:, :, :, ::1] grad_v, double[:, ::1] grad_w, double[:, ::1] grad_u,
    real[:, :, ::1] grad_initial, bint fresh, bint gain, int threads,
):
    cdef Py_ssize_t head
    # for head in range(B * H): every gradient, one chunk after another from the last to the first
    for head in prange(grad_initial.shape[0], nogil=True, schedule="dynamic", num_threads=threads):
        backward_head(grad_y, grad_state, r, k, v, u, powers, initial, keys, early, late, scores, matches, pulled, starts, carry, grad_keys,
                      grad_powers, grad_bonus, grad_r, grad_k, grad_v, grad_w, grad_u, grad_initial, head, fresh, gain, threadid())


cdef void fill_powers(const real[:, ::1] w, double[::1] power, real[:, :, ::1] powers) noexcept nogil:
    """powers (H, C + 1, P) = w^0 .. w^C, by multiplication in float64: right for zero and for negative w too."""
    cdef Py_ssize_t h, e, i
    for h in range(w.shape[0]):
        for i in range(w.shape[1]):
            power[i] = 1
        # powers[h] = w[h] ** np.arange(size + 1)[:, None]
        for e in range(powers.shape[1]):
            for i in range(w.shape[1]):
                powers[h, e, i] = <real> power[i]
                power[i] *= w[h, i]


def powers_of(w, size):
    """w^0 .. w^size (H, size + 1, P)."""
    powers, power = np.empty((w.shape[0], size + 1, w.shape[1]), w.dtype), np.empty(w.shape[1])
    if w.dtype == np.float32:
        fill_powers[float](w, power, powers)
    else:
        fill_powers[double](w, power, powers)
    return powers


def forward(r, k, v, w, u, initial_state=None, time_first="bonus"):
    """Read and write the memory along L.

    r, k, v (B, L, H, P); decay w, of any sign and size, and u (H, P); initial_state (B, H, P, P), key index first, or None for zeros;
    time_first "bonus" or "gain". All float32 or all float64; arrays that are read-only or not contiguous are accepted, the latter copied.
    Returns y (B, L, H, P) and the last state (B, H, P, P), new arrays.
    Raises TypeError for another type or dtype, ValueError for another shape, an empty axis or an unknown time_first, by name.
    """
    (r, k, v, w, u, initial_state), gain = wkv_arguments(r, k, v, w, u, initial_state, time_first)
    batch, length, heads, p = r.shape
    rows, dtype = batch * heads, r.dtype
    y, states = np.empty(r.shape, dtype), np.zeros((rows, p, p), dtype)
    fresh = initial_state is None
    if not fresh:
        states[:] = initial_state.reshape(rows, p, p)
    threads = threads_for(rows, 3 * rows * length * p * p)
    if length <= SHORT:
        if dtype == np.float32:
            recurrent[float](r, k, v, w, u, states, y, gain, threads)
        else:
            recurrent[double](r, k, v, w, u, states, y, gain, threads)
        return y, states.reshape(batch, heads, p, p)
    size = min(CHUNK, length)
    keys, early, late, scores = (np.empty((threads, n, m), dtype) for n, m in ((size, p), (size, p), (size, p), (ROWS, size)))
    with one_blas_thread():
        if dtype == np.float32:
            chunked[float](r, k, v, u, powers_of(w, size), states, keys, early, late, scores, y, fresh, gain, threads)
        else:
            chunked[double](r, k, v, u, powers_of(w, size), states, keys, early, late, scores, y, fresh, gain, threads)
    return y, states.reshape(batch, heads, p, p)


def backward(grad_y, grad_state, r, k, v, w, u, initial_state=None, time_first="bonus"):
    """The gradients of every array argument of `forward`, given those of y and of the last state that it returned.

    grad_y (B, L, H, P); grad_state (B, H, P, P) or None for zeros; the rest as `forward` took it. Returns a tuple in the order
    (r, k, v, w, u, initial_state), each of the argument's shape and dtype; None where initial_state was None. Sums over B are taken in
    float64, and so is what chunks add to the gradient of u. Raises as `forward` does.
    """
    arrays, gain = wkv_arguments(r, k, v, w, u, initial_state, time_first, grad_y=grad_y, grad_state=grad_state)
    r, k, v, w, u, initial_state, grad_y, grad_state = arrays
    batch, length, heads, p = r.shape
    rows, dtype, size = batch * heads, r.dtype, min(CHUNK, length)
    threads = threads_for(rows, 8 * rows * length * p * p)
    fresh = initial_state is None
    initial, grad_state = (
        np.zeros((1, p, p) if unused else (rows, p, p), dtype) if array is None else array.reshape(rows, p, p)
        for array, unused in ((initial_state, True), (grad_state, False)))

    def new(*shape):
        return np.empty(shape, dtype)

    keys, early, late, pulled, grad_keys = (new(threads, size, p) for _ in range(5))
    scores, matches, carry = new(threads, ROWS, size), new(threads, ROWS, size), new(threads, p, p)
    starts, grad_powers, grad_bonus = new(threads, -(-length // size), p, p), new(threads, size + 1, p), new(threads, p)
    grad_r, grad_k, grad_v, grad_initial = new(*r.shape), new(*r.shape), new(*r.shape), new(rows, p, p)
    grad_w, grad_u = np.empty((rows, p)), np.empty((rows, p))
    arguments = (
        grad_y, grad_state, r, k, v, u, powers_of(w, size), initial, keys, early, late, scores, matches, pulled, starts, carry, grad_keys,
        grad_powers, grad_bonus, grad_r, grad_k, grad_v, grad_w, grad_u, grad_initial, fresh, gain, threads)
    with one_blas_thread():
        if dtype == np.float32:
            backward_heads[float](*arguments)
        else:
            backward_heads[double](*arguments)
    grad_w, grad_u = (total.reshape(batch, heads, p).sum(0).astype(dtype) for total in (grad_w, grad_u))
    return grad_r, grad_k, grad_v, grad_w, grad_u, None if fresh else grad_initial.reshape(batch, heads, p, p)


def step(r, k, v, w, u, state, time_first="bonus", out=None):
    """One token; the state is overwritten with the one after it.

    r, k, v (B, H, P); w, u (H, P); state (B, H, P, P), contiguous and writeable; time_first "bonus" or "gain"; out (B, H, P) for the result,
    contiguous and writeable, or None for a new array. Returns y (B, H, P). Allocates no array when `out` is given and the rest is contiguous.
    Raises TypeError for another type or dtype, ValueError for another shape, an empty axis, an unknown time_first, or a state or out that
    cannot be written in place, by name.
    """
    (r, k, v, w, u, state, out), gain = wkv_step_arguments(r, k, v, w, u, state, time_first, out)
    batch, heads, p = r.shape
    y = np.empty(r.shape, r.dtype) if out is None else out
    threads = threads_for(batch * heads, 3 * batch * heads * p * p)
    r, k, v, across = r[:, None], k[:, None], v[:, None], y[:, None]
    if r.dtype == np.float32:
        recurrent[float](r, k, v, w, u, state.reshape(-1, p, p), across, gain, threads)
    else:
        recurrent[double](r, k, v, w, u, state.reshape(-1, p, p), across, gain, threads)
    return y
