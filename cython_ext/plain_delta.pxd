# One head of the plain delta rule, forward and backward, for callers without the GIL. The shapes are in plain_delta.pyx.

from cython_ext.algebra cimport real
from cython_ext.clones cimport cloned

cdef enum:
    STRIP = 16  # rows of a triangle taken at a time

cdef inline Py_ssize_t tokens_of(Py_ssize_t d) noexcept nogil:
    """Tokens in a chunk: the fewer, the less there is in the triangles, but products with a wide state want more rows."""
    return STRIP * min(<Py_ssize_t> 4, (d + 63) // 64)

cdef cloned forward_head(
    const real[:, :, ::1] q, const real[:, :, ::1] k, const real[:, :, ::1] v, const real[:, ::1] beta, real[:, :, ::1] strips,
    real[:, :, ::1] e, real[:, :, ::1] u, real[:, :, ::1] o, real[:, :, ::1] states, Py_ssize_t head, int thread,
) noexcept nogil

cdef cloned backward_head(
    const real[:, :, ::1] grad_o, const real[:, :, ::1] q, const real[:, :, ::1] k, const real[:, :, ::1] v, const real[:, ::1] beta,
    const real[:, :, ::1] initial, real[:, :, ::1] strips, real[:, :, ::1] u, real[:, :, ::1] g, real[:, :, ::1] state,
    real[:, :, ::1] e, real[:, :, :, ::1] starts, real[:, :, ::1] grad_state, real[:, :, ::1] grad_q,
    real[:, :, ::1] grad_k, real[:, :, ::1] grad_v, real[:, ::1] grad_beta, Py_ssize_t head, int thread,
) noexcept nogil
