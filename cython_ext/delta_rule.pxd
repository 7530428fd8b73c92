# The two phases of the hierarchical delta rule, one chunk or one head at a time, for callers without the GIL. The shapes are in delta_rule.pyx.

from cython_ext.algebra cimport real
from cython_ext.clones cimport cloned

cdef enum:
    ROWS = 16  # rows of a triangular product taken at a time: what lies above the diagonal beyond them is not computed

cdef cloned inside_chunk(
    const real[:, :, ::1] q, const real[:, :, ::1] k, const real[:, :, ::1] v, const real[:, ::1] beta, const real[:, ::1] fast_decay,
    const real[:, ::1] slow_decay, const real[:, ::1] token_in, const real[:, ::1] token_out, const real[:, ::1] chunk_in,
    const real[:, ::1] chunk_out, const real[:, :, ::1] bilinear, const real[::1] temp, const Py_ssize_t[::1] lengths,
    real[:, :, ::1] queries, real[:, :, ::1] keys, real[:, :, :, ::1] turned, real[:, :, ::1] scaled, real[:, :, ::1] moved,
    real[:, :, ::1] wide, real[:, :, ::1] square, real[:, :, ::1] strip, real[:, :, ::1] scores, real[:, :, ::1] facts, real[:, ::1] phi,
    real[:, :, ::1] read, real[:, :, :, ::1] written, real[:, :, ::1] rates, Py_ssize_t first, Py_ssize_t chunks, Py_ssize_t block,
    bint fresh, bint exact, int thread,
) noexcept nogil

cdef cloned across_chunks(
    const real[:, ::1] fast_gate, const real[:, ::1] slow_gate, const Py_ssize_t[::1] lengths, real[:, ::1] phi, real[:, :, ::1] read,
    real[:, :, :, ::1] written, real[:, :, ::1] rates, real[:, :, ::1] states, real[:, :, ::1] unit, real[:, :, ::1] recalled,
    real[:, :, ::1] o, Py_ssize_t heads, Py_ssize_t size, Py_ssize_t first, Py_ssize_t chunks, Py_ssize_t head, bint fresh, int thread,
) noexcept nogil
