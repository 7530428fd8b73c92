# What the passes of the WKV memory are made of: one token, and a chunk's reads and writes, before and in its products. The equations are in
# wkv.pyx. Letters: B batch, L length, H heads, P head width, C chunk.

from cython_ext.algebra cimport LANES, folded, multiply, real
from cython_ext.clones cimport inlined

cdef enum:
    ROWS = 8  # tokens of a block inside a chunk


cdef inline real score(const real* x, const real* y, const real* z, Py_ssize_t n) noexcept nogil:
    """sum(x * y * z), added up in a fixed order."""
    cdef real lane[LANES]
    cdef Py_ssize_t i, k
    # lane = (x[:n] * y[:n] * z[:n]).reshape(-1, LANES).sum(0), filled up with zeros
    for k in range(LANES):
        lane[k] = 0
    for i in range(n // LANES):
        for k in range(LANES):
            lane[k] += x[i * LANES + k] * y[i * LANES + k] * z[i * LANES + k]
    for k in range(n % LANES):
        lane[k] += x[n // LANES * LANES + k] * y[n // LANES * LANES + k] * z[n // LANES * LANES + k]
    return folded(lane)


cdef inline inlined add_scaled(real* out, real scale, const real* x, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    # out += scale * x
    for i in range(n):
        out[i] += scale * x[i]


cdef inline inlined set_product(real* out, const real* x, const real* y, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    # out = x * y
    for i in range(n):
        out[i] = x[i] * y[i]


cdef inline inlined add_product(real* out, const real* x, const real* y, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    # out += x * y
    for i in range(n):
        out[i] += x[i] * y[i]


cdef inline inlined add_scaled_product(real* out, real scale, const real* x, const real* y, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    # out += scale * x * y
    for i in range(n):
        out[i] += scale * x[i] * y[i]


cdef inline inlined token(
    const real* r, const real* k, const real* v, const real* w, const real* u, real* state, real* y, Py_ssize_t n, bint gain
) noexcept nogil:
    """One token of one head, the state in place."""
    cdef Py_ssize_t i, j
    cdef real decay, write, read, own = 0
    for j in range(n):
        y[j] = 0
    if gain:
        # state = w[:, None] * state + (u * k)[:, None] * v; y = r @ state
        for i in range(n):
            decay, write, read = w[i], u[i] * k[i], r[i]
            for j in range(n):
                state[i * n + j] = decay * state[i * n + j] + write * v[j]
                y[j] += read * state[i * n + j]
        return
    # y = r @ state + (r * u * k).sum() * v; state = w[:, None] * state + k[:, None] * v
    for i in range(n):
        decay, write, read = w[i], k[i], r[i]
        own += read * (u[i] * write)
        for j in range(n):
            y[j] += read * state[i * n + j]
            state[i * n + j] = decay * state[i * n + j] + write * v[j]
    add_scaled(y, own, v, n)


cdef inline inlined take_keys(
    const real[:, :, :, ::1] k, const real[:, ::1] u, real[:, :, ::1] keys, Py_ssize_t sample, Py_ssize_t h, Py_ssize_t first, Py_ssize_t n,
    bint gain, int thread,
) noexcept nogil:
    """keys[thread] = what the n tokens from `first` write: k, or u * k."""
    cdef Py_ssize_t t, i
    for t in range(n):
        # keys[t] = u * k[first + t] if gain else k[first + t]
        if gain:
            set_product(&keys[thread, t, 0], &u[h, 0], &k[sample, first + t, h, 0], u.shape[1])
        else:
            for i in range(u.shape[1]):
                keys[thread, t, i] = k[sample, first + t, h, i]


cdef inline inlined fade(
    real[:, :, ::1] keys, const real[:, :, ::1] powers, real[:, :, ::1] early, Py_ssize_t h, Py_ssize_t n, int thread
) noexcept nogil:
    """early[thread] = what is left of the first n keys when token n reads."""
    cdef Py_ssize_t t
    for t in range(n):
        # early[t] = keys[t] * w ** (n - 1 - t)
        set_product(&early[thread, t, 0], &keys[thread, t, 0], &powers[h, n - 1 - t, 0], keys.shape[2])


cdef inline inlined wane(
    const real[:, :, :, ::1] r, const real[:, :, ::1] powers, real[:, :, ::1] late, Py_ssize_t sample, Py_ssize_t h, Py_ssize_t first,
    Py_ssize_t n, Py_ssize_t delay, int thread,
) noexcept nogil:
    """late[thread] = how the n tokens from `first` read what was there when the first of them came."""
    cdef Py_ssize_t t
    for t in range(n):
        # late[t] = r[first + t] * w ** (t + delay)
        set_product(&late[thread, t, 0], &r[sample, first + t, h, 0], &powers[h, t + delay, 0], r.shape[3])


cdef inline inlined read_chunk(
    const real[:, :, :, ::1] r, const real[:, :, :, ::1] k, const real[:, :, :, ::1] v, const real[:, ::1] u, const real[:, :, ::1] powers,
    real[:, :, ::1] keys, real[:, :, ::1] early, real[:, :, ::1] late, real[:, :, ::1] scores, real[:, :, :, ::1] y, Py_ssize_t sample,
    Py_ssize_t h, Py_ssize_t first, Py_ssize_t n, Py_ssize_t delay, int thread,
) noexcept nogil:
    """y += what the n tokens from `first` read of each other and of themselves."""
    cdef Py_ssize_t p = r.shape[3], size = keys.shape[1], step = r.shape[2] * p, block, low, high, t, s
    for block in range((n + ROWS - 1) // ROWS):
        low, high = block * ROWS, min(block * ROWS + ROWS, n)
        if low:
            # scores = late @ early.T; y[low:high] += scores @ v[:low]
            fade(keys, powers, early, h, low, thread)
            wane(r, powers, late, sample, h, first + low, high - low, delay, thread)
            multiply(False, True, high - low, low, p, 1, &late[thread, 0, 0], p, &early[thread, 0, 0], p, 0, &scores[thread, 0, 0], size)
            multiply(False, False, high - low, p, low, 1, &scores[thread, 0, 0], size, &v[sample, first, h, 0], step, 1,
                     &y[sample, first + low, h, 0], step)
        for t in range(low, high):
            # y[t] += sum(score(r[t], keys[s], w ** (t - s - 1 + delay)) * v[s] for s in range(low, t)) + (r * u * k)[t].sum() * v[t]
            for s in range(low, t):
                add_scaled(&y[sample, first + t, h, 0],
                           score(&r[sample, first + t, h, 0], &keys[thread, s, 0], &powers[h, t - s - 1 + delay, 0], p),
                           &v[sample, first + s, h, 0], p)
            add_scaled(&y[sample, first + t, h, 0], score(&r[sample, first + t, h, 0], &k[sample, first + t, h, 0], &u[h, 0], p),
                       &v[sample, first + t, h, 0], p)
