# What an engine calls of the wave state of WaveCore: a C function on pointers, which allocates nothing.

from cython_ext.algebra cimport real

# The channels from low to high of one sample: h = exp(a dt) carry + dt b u b_base, y = (c c_base h).sum(-1) + d u; a = -softplus(a_raw).
# u, dt, b, c, d, y (I,); carry, a, b_base, c_base, h (I, S); h may be carry
cdef void wave_channels(
    const real* u, const real* carry, const real* dt, const real* b, const real* c, const real* a, const real* b_base, const real* c_base,
    const real* d, Py_ssize_t states, real* y, real* h, Py_ssize_t low, Py_ssize_t high,
) noexcept nogil
