# One batch row of the selective scan, forward and backward, for callers without the GIL. The shapes are in selective_scan.pyx.

from libc.string cimport memset

from cython_ext.algebra cimport real
from cython_ext.clones cimport cloned

cdef enum:
    GROUP = 4  # rows of a matrix added at a time: a shorter chain of dependent additions

cdef cloned forward_row(
    const real[:, :, ::1] update, const real[:, ::1] dt_a, const real[:, ::1] dt_b, bint scaled, const real[:, ::1] transposed,
    const real[::1] weight, const real[::1] bias, const real[:, ::1] start, real[:, :, ::1] states, real eps, Py_ssize_t row,
) noexcept nogil

cdef cloned backward_row(
    const real[:, :, ::1] grad_states, const real[:, :, ::1] update, const real[:, ::1] dt_a, const real[:, ::1] dt_b, bint scaled,
    const real[:, ::1] transition, const real[:, ::1] transposed, const real[::1] weight, const real[:, ::1] start,
    const real[:, :, ::1] states, real eps, real[:, :, ::1] grad_update, real[:, ::1] grad_dt_a, real[:, ::1] grad_dt_b,
    real[:, ::1] grad_start, double[:, :, ::1] grad_transition, double[:, ::1] grad_weight, double[:, ::1] grad_bias, Py_ssize_t row,
) noexcept nogil


cdef inline Py_ssize_t padded_rows(Py_ssize_t n) noexcept nogil:
    return (n + GROUP - 1) // GROUP * GROUP


cdef inline void fill_padded(const real* matrix, Py_ssize_t n, bint turned, real* rows) noexcept nogil:
    """`padded` of `matrix` (n, n) or of its transpose."""
    cdef Py_ssize_t i, j
    # rows[:n] = matrix.T if turned else matrix; rows[n:] = 0
    for i in range(n):
        for j in range(n):
            rows[i * n + j] = matrix[j * n + i] if turned else matrix[i * n + j]
    memset(rows + n * n, 0, (padded_rows(n) - n) * n * sizeof(real))
