# One head of the WKV memory, forward and backward, for callers without the GIL. The shapes are in wkv.pyx.

from cython_ext.algebra cimport real
from cython_ext.clones cimport cloned

cdef enum:
    CHUNK_TOKENS = 32  # tokens; at P = 128 the products of a chunk are of the size that OpenBLAS multiplies without packing
    SHORT_TOKENS = 2  # tokens up to which one after another is quicker

cdef cloned recurrent_head(
    const real[:, :, :, ::1] r, const real[:, :, :, ::1] k, const real[:, :, :, ::1] v, const real[:, ::1] w, const real[:, ::1] u,
    real[:, :, ::1] states, real[:, :, :, ::1] y, Py_ssize_t head, bint gain,
) noexcept nogil

cdef cloned chunked_head(
    const real[:, :, :, ::1] r, const real[:, :, :, ::1] k, const real[:, :, :, ::1] v, const real[:, ::1] u, const real[:, :, ::1] powers,
    real[:, :, ::1] states, real[:, :, ::1] keys, real[:, :, ::1] early, real[:, :, ::1] late, real[:, :, ::1] scores, real[:, :, :, ::1] y,
    Py_ssize_t head, bint fresh, bint gain, int thread,
) noexcept nogil

cdef cloned backward_head(
    const real[:, :, :, ::1] grad_y, const real[:, :, ::1] grad_state, const real[:, :, :, ::1] r, const real[:, :, :, ::1] k,
    const real[:, :, :, ::1] v, const real[:, ::1] u, const real[:, :, ::1] powers, const real[:, :, ::1] initial, real[:, :, ::1] keys,
    real[:, :, ::1] early, real[:, :, ::1] late, real[:, :, ::1] scores, real[:, :, ::1] matches, real[:, :, ::1] pulled,
    real[:, :, :, ::1] starts, real[:, :, ::1] carry, real[:, :, ::1] grad_keys, real[:, :, ::1] grad_powers, real[:, ::1] grad_bonus,
    real[:, :, :, ::1] grad_r, real[:, :, :, ::1] grad_k, real[:, :, :, ::1] grad_v, double[:, ::1] grad_w, double[:, ::1] grad_u,
    real[:, :, ::1] grad_initial, Py_ssize_t head, bint fresh, bint gain, int thread,
) noexcept nogil

cdef void fill_powers(const real[:, ::1] w, double[::1] power, real[:, :, ::1] powers) noexcept nogil
