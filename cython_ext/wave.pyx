"""The wave state of WaveCore as a selective state space of few states per channel, one step or many.

    h = exp(dt A) carry + dt b B u,  A = -softplus(a_raw)        y = sum_state(c C h) + D u

Channels do not meet, so each is computed alike whatever the number of threads; on the way back blocks of them are dealt to threads, and what the
samples share is added up inside a block.
Source: ContinuonBrain's HOPE core; Gu and Dao, "Mamba" (2023). Letters: B batch, L length, I channels, S states.
"""

import numpy as np

from cython.parallel cimport prange

from cython_ext.algebra cimport real
from cython_ext.clones cimport cloned, inlined
from cython_ext.functions cimport exponential, softplus

from cython_ext.checks_wavecore import wave_arguments, wave_back_arguments
from cython_ext.threads import threads_for

cdef enum:
    BLOCK = 64  # channels of a block on the way back


cdef inlined channels(
    const real* u, const real* carry, const real* dt, const real* b, const real* c, const real* a, const real* b_base, const real* c_base,
    const real* d, Py_ssize_t states, real* y, real* h, Py_ssize_t low, Py_ssize_t high,
) noexcept nogil:
    cdef Py_ssize_t i, j, s
    cdef real decay, total
    # h = np.exp(a * dt[:, None]) * carry + (dt * b * u)[:, None] * b_base; y = (c[:, None] * c_base * h).sum(-1) + d * u
    for i in range(low, high):
        total = 0
        for s in range(states):
            j = i * states + s
            exponential(a[j] * dt[i], &decay)
            h[j] = decay * carry[j] + dt[i] * b[i] * u[i] * b_base[j]
            total += c[i] * c_base[j] * h[j]
        y[i] = total + d[i] * u[i]


cdef cloned channels_cloned(
    const real* u, const real* carry, const real* dt, const real* b, const real* c, const real* a, const real* b_base, const real* c_base,
    const real* d, Py_ssize_t states, real* y, real* h, Py_ssize_t low, Py_ssize_t high,
) noexcept nogil:
    # a constant 1, the default, lets the compiler take many channels at once
    if states == 1:
        channels(u, carry, dt, b, c, a, b_base, c_base, d, 1, y, h, low, high)
    else:
        channels(u, carry, dt, b, c, a, b_base, c_base, d, states, y, h, low, high)


cdef void wave_channels(
    const real* u, const real* carry, const real* dt, const real* b, const real* c, const real* a, const real* b_base, const real* c_base,
    const real* d, Py_ssize_t states, real* y, real* h, Py_ssize_t low, Py_ssize_t high,
) noexcept nogil:
    channels_cloned(u, carry, dt, b, c, a, b_base, c_base, d, states, y, h, low, high)


cdef cloned rates(const real* a_raw, real* a, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    # a = -np.logaddexp(a_raw, 0)
    for i in range(n):
        softplus(a_raw[i], &a[i])
        a[i] = -a[i]


cdef scan(
    const real[:, :, ::1] u, const real[:, :, ::1] dt, const real[:, :, ::1] b, const real[:, :, ::1] c, const real[:, ::1] a_raw,
    const real[:, ::1] b_base, const real[:, ::1] c_base, const real[::1] d, real[:, ::1] a, real[:, :, ::1] y, real[:, :, ::1] h, int threads,
):
    cdef Py_ssize_t row, t, inner = u.shape[2], states = a_raw.shape[1]
    rates(&a_raw[0, 0], &a[0, 0], inner * states)
    # for row, t: y[row, t], h[row] = step(u[row, t], h[row], dt[row, t], b[row, t], c[row, t])
    for row in prange(u.shape[0], nogil=True, schedule="static", num_threads=threads):
        for t in range(u.shape[1]):
            wave_channels(&u[row, t, 0], &h[row, 0, 0], &dt[row, t, 0], &b[row, t, 0], &c[row, t, 0], &a[0, 0], &b_base[0, 0], &c_base[0, 0],
                          &d[0], states, &y[row, t, 0], &h[row, 0, 0], 0, inner)


def wave_scan(u, carry, dt, b, c, a_raw, b_base, c_base, d):
    """The wave over a sequence.

    u, dt, b, c (B, L, I), carry (B, I, S), a_raw, b_base, c_base (I, S), d (I,), all float32 or all float64; arrays that are read-only or not
    contiguous are accepted, the latter copied. Returns y (B, L, I) and the last h (B, I, S), new arrays. Raises TypeError for another type or
    dtype, ValueError for another shape or an empty axis, by name.
    """
    return scanned(*wave_arguments("BLI", u, carry, dt, b, c, a_raw, b_base, c_base, d))


def scanned(u, carry, dt, b, c, a_raw, b_base, c_base, d):
    y, h, a = np.empty(u.shape, u.dtype), carry.copy(), np.empty(a_raw.shape, u.dtype)
    arguments = (u, dt, b, c, a_raw, b_base, c_base, d, a, y, h, threads_for(u.shape[0], 8 * u.size * a_raw.shape[1]))
    scan[float](*arguments) if u.dtype == np.float32 else scan[double](*arguments)
    return y, h


def wave_step(u, carry, dt, b, c, a_raw, b_base, c_base, d):
    """The wave over one step: `wave_scan` for L = 1 without that axis.

    u, dt, b, c (B, I), the rest as there. Returns y (B, I) and h (B, I, S), new arrays. Raises as `wave_scan` does.
    """
    u, carry, dt, b, c, a_raw, b_base, c_base, d = wave_arguments("BI", u, carry, dt, b, c, a_raw, b_base, c_base, d)
    y, h = scanned(u[:, None], carry, dt[:, None], b[:, None], c[:, None], a_raw, b_base, c_base, d)
    return y[:, 0], h


cdef inlined step_back(
    const real* grad_y, const real* u, const real* dt, const real* b, const real* c, const real* a, const real* b_base, const real* c_base,
    const real* d, Py_ssize_t states, const real* before, const real* h, real* pull, real* grad_u, real* grad_dt, real* grad_b, real* grad_c,
    double* total_a, double* total_b, double* total_c, double* total_d, Py_ssize_t low, Py_ssize_t high,
) noexcept nogil:
    cdef Py_ssize_t i, j, s
    cdef real decay, grad, of_dt, of_c, of_drive
    # grad = pull + (grad_y * c)[:, None] * c_base; total_a += grad * dt[:, None] * decay * before; total_b += grad * (dt * b * u)[:, None]
    # total_c += (grad_y * c)[:, None] * h; total_d += grad_y * u; drive = (grad * b_base).sum(-1); grad_c = grad_y * (c_base * h).sum(-1)
    # grad_dt = (grad * a * decay * before).sum(-1) + drive * b * u; grad_u = grad_y * d + drive * dt * b; grad_b = drive * dt * u
    # pull = grad * decay
    for i in range(low, high):
        of_dt = of_c = of_drive = 0
        for s in range(states):
            j = i * states + s
            exponential(a[j] * dt[i], &decay)
            grad = pull[j] + grad_y[i] * c[i] * c_base[j]
            total_a[j] += grad * dt[i] * decay * before[j]
            total_b[j] += grad * dt[i] * b[i] * u[i]
            total_c[j] += grad_y[i] * c[i] * h[j]
            of_dt += grad * a[j] * decay * before[j]
            of_c += c_base[j] * h[j]
            of_drive += grad * b_base[j]
            pull[j] = grad * decay
        total_d[i] += grad_y[i] * u[i]
        grad_dt[i] = of_dt + of_drive * b[i] * u[i]
        grad_u[i] = grad_y[i] * d[i] + of_drive * dt[i] * b[i]
        grad_b[i] = of_drive * dt[i] * u[i]
        grad_c[i] = grad_y[i] * of_c


cdef cloned step_back_cloned(
    const real* grad_y, const real* u, const real* dt, const real* b, const real* c, const real* a, const real* b_base, const real* c_base,
    const real* d, Py_ssize_t states, const real* before, const real* h, real* pull, real* grad_u, real* grad_dt, real* grad_b, real* grad_c,
    double* total_a, double* total_b, double* total_c, double* total_d, Py_ssize_t low, Py_ssize_t high,
) noexcept nogil:
    if states == 1:
        step_back(grad_y, u, dt, b, c, a, b_base, c_base, d, 1, before, h, pull, grad_u, grad_dt, grad_b, grad_c, total_a, total_b, total_c,
                  total_d, low, high)
    else:
        step_back(grad_y, u, dt, b, c, a, b_base, c_base, d, states, before, h, pull, grad_u, grad_dt, grad_b, grad_c, total_a, total_b, total_c,
                  total_d, low, high)


cdef scan_back(
    const real[:, :, ::1] grad_y, const real[:, :, ::1] u, const real[:, :, ::1] carry, const real[:, :, ::1] dt, const real[:, :, ::1] b,
    const real[:, :, ::1] c, const real[:, ::1] a_raw, const real[:, ::1] b_base, const real[:, ::1] c_base, const real[::1] d, real[:, ::1] a,
    real[:, :, ::1] h, real[:, :, ::1] pull, real[:, :, ::1] grad_u, real[:, :, ::1] grad_dt, real[:, :, ::1] grad_b,
    real[:, :, ::1] grad_c, double[:, ::1] total_a, double[:, ::1] total_b, double[:, ::1] total_c, double[::1] total_d, int threads,
):
    cdef Py_ssize_t block, low, high, row, i, t, inner = u.shape[2], length = u.shape[1], states = a_raw.shape[1]
    rates(&a_raw[0, 0], &a[0, 0], inner * states)
    # for row: h = the states of row one after another, carry first; then from the last t to the first: pull[row] = step_back(pull[row])
    for block in prange((inner + BLOCK - 1) // BLOCK, nogil=True, schedule="static", num_threads=threads):
        low, high = block * BLOCK, min((block + 1) * BLOCK, inner)
        for row in range(u.shape[0]):
            for i in range(low * states, high * states):
                (&h[0, 0, 0])[i] = (&carry[row, 0, 0])[i]
            for t in range(length):
                wave_channels(&u[row, t, 0], &h[t, 0, 0], &dt[row, t, 0], &b[row, t, 0], &c[row, t, 0], &a[0, 0], &b_base[0, 0], &c_base[0, 0],
                              &d[0], states, &grad_u[row, t, 0], &h[t + 1, 0, 0], low, high)
            for t in range(length - 1, -1, -1):
                step_back_cloned(
                    &grad_y[row, t, 0], &u[row, t, 0], &dt[row, t, 0], &b[row, t, 0], &c[row, t, 0], &a[0, 0], &b_base[0, 0], &c_base[0, 0], &d[0],
                    states, &h[t, 0, 0], &h[t + 1, 0, 0], &pull[row, 0, 0], &grad_u[row, t, 0], &grad_dt[row, t, 0], &grad_b[row, t, 0],
                    &grad_c[row, t, 0], &total_a[0, 0], &total_b[0, 0], &total_c[0, 0], &total_d[0], low, high)


def wave_scan_backward(grad_y, grad_h, u, carry, dt, b, c, a_raw, b_base, c_base, d):
    """The gradients of every argument of `wave_scan`, given those of y and of the last h that it returned.

    grad_y (B, L, I), grad_h (B, I, S); the rest as `wave_scan` took it, and what it computed on the way is computed again. Returns a tuple of new
    arrays in the order (u, carry, dt, b, c, a_raw, b_base, c_base, d), each of the argument's shape and dtype. Sums over B and L are taken in
    float64. Raises as `wave_scan` does.
    """
    return scanned_back(*wave_back_arguments("BLI", grad_y, grad_h, u, carry, dt, b, c, a_raw, b_base, c_base, d))


def scanned_back(grad_y, grad_h, u, carry, dt, b, c, a_raw, b_base, c_base, d):
    inner, states = a_raw.shape
    a, h, pull = np.empty_like(a_raw), np.empty((u.shape[1] + 1, inner, states), u.dtype), grad_h.copy()
    sequences, totals = [np.empty_like(u) for _ in range(4)], [np.zeros(part.shape) for part in (a_raw, b_base, c_base, d)]
    arguments = (grad_y, u, carry, dt, b, c, a_raw, b_base, c_base, d, a, h, pull, *sequences, *totals,
                 threads_for(-(-inner // BLOCK), 30 * u.size * states))
    scan_back[float](*arguments) if u.dtype == np.float32 else scan_back[double](*arguments)
    totals[0] *= np.expm1(a.astype(np.float64))  # -sigmoid(a_raw)
    return sequences[0], pull, *sequences[1:], *(total.astype(u.dtype) for total in totals)


def wave_step_backward(grad_y, grad_h, u, carry, dt, b, c, a_raw, b_base, c_base, d):
    """The gradients of every argument of `wave_step`: `wave_scan_backward` for L = 1 without that axis.

    grad_y, u, dt, b, c (B, I), the rest as there. Raises as `wave_scan` does.
    """
    grad_y, grad_h, u, carry, dt, b, c, a_raw, b_base, c_base, d = wave_back_arguments(
        "BI", grad_y, grad_h, u, carry, dt, b, c, a_raw, b_base, c_base, d)
    grad_u, grad_carry, grad_dt, grad_b, grad_c, *shared = scanned_back(
        grad_y[:, None], grad_h, u[:, None], carry, dt[:, None], b[:, None], c[:, None], a_raw, b_base, c_base, d)
    return grad_u[:, 0], grad_carry, grad_dt[:, 0], grad_b[:, 0], grad_c[:, 0], *shared
