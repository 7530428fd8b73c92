# What the kernels of the memory of WaveCore are made of. All of them go into their callers, and so into each clone.

from cython_ext.algebra cimport dot, real
from cython_ext.clones cimport inlined


cdef inline bint finite(const real* x, Py_ssize_t n) noexcept nogil:
    """Whether no entry of x is NaN or infinite: only those are not 0 when taken from themselves."""
    cdef Py_ssize_t i
    cdef bint spoilt = False
    # np.isfinite(x).all()
    for i in range(n):
        spoilt |= not x[i] - x[i] == 0
    return not spoilt


cdef inline Py_ssize_t smallest(const real* x, Py_ssize_t n) noexcept nogil:
    """x.argmin(): the first of equals, the first NaN where there is one."""
    cdef Py_ssize_t i, least = 0
    for i in range(1, n):
        if x[least] != x[least]:
            break
        if x[i] < x[least] or x[i] != x[i]:
            least = i
    return least


cdef inline inlined put(real* row, const real* new, real gate, real scale, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    # row = gate * (new / scale) + (1 - gate) * row
    for i in range(n):
        row[i] = gate * (new[i] / scale) + (1 - gate) * row[i]


cdef inline inlined shrink(real* x, real by, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    # x = by * x
    for i in range(n):
        x[i] = by * x[i]


cdef inline inlined scaled(const real* x, real by, Py_ssize_t n, real* out) noexcept nogil:
    cdef Py_ssize_t i
    # out = by * x
    for i in range(n):
        out[i] = by * x[i]


cdef inline Py_ssize_t least_salient(const real* memory, Py_ssize_t slots, Py_ssize_t width) noexcept nogil:
    """(memory**2).sum(-1).argmin(): the first of equals, the first NaN where there is one."""
    cdef Py_ssize_t i, row = 0
    cdef real norm, least = dot(memory, memory, width)
    for i in range(1, slots):
        norm = dot(memory + i * width, memory + i * width, width)
        if least == least and (norm < least or norm != norm):
            row, least = i, norm
    return row
