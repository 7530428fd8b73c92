"""The wave state of WaveCore as a selective state space of few states per channel, one step or many.

    h = exp(dt A) carry + dt b B u,  A = -softplus(a_raw)        y = sum_state(c C h) + D u

Channels do not meet, so each is computed alike whatever the number of threads.
Source: ContinuonBrain's HOPE core; Gu and Dao, "Mamba" (2023). Letters: B batch, L length, I channels, S states.
"""

import numpy as np

from cython.parallel cimport prange

from cython_ext.algebra cimport real
from cython_ext.clones cimport cloned, inlined
from cython_ext.functions cimport exponential, softplus

from cython_ext.checks_wavecore import wave_arguments
from cython_ext.threads import threads_for


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
    u, carry, dt, b, c, a_raw, b_base, c_base, d = wave_arguments("BLI", u, carry, dt, b, c, a_raw, b_base, c_base, d)
    y, h, a = np.empty(u.shape, u.dtype), carry.copy(), np.empty(a_raw.shape, u.dtype)
    arguments = (u, dt, b, c, a_raw, b_base, c_base, d, a, y, h, threads_for(u.shape[0], 8 * u.size * a_raw.shape[1]))
    scan[float](*arguments) if u.dtype == np.float32 else scan[double](*arguments)
    return y, h


def wave_step(u, carry, dt, b, c, a_raw, b_base, c_base, d):
    """The wave over one step: `wave_scan` for L = 1 without that axis.

    u, dt, b, c (B, I), the rest as there. Returns y (B, I) and h (B, I, S), new arrays. Raises as `wave_scan` does.
    """
    u, carry, dt, b, c, a_raw, b_base, c_base, d = wave_arguments("BI", u, carry, dt, b, c, a_raw, b_base, c_base, d)
    y, h = wave_scan(u[:, None], carry, dt[:, None], b[:, None], c[:, None], a_raw, b_base, c_base, d)
    return y[:, 0], h
