# What an engine calls of the memory of WaveCore: C functions on the pointers of one sample, which allocate nothing.

from cython_ext.algebra cimport real

cdef enum Rule:
    SLOT0, LEAST_SALIENT

# scores (n,) = scale * (keys (n, d_k) @ query / sqrt(d_k)): the rows of this part
cdef void score(const real* query, const real* keys, Py_ssize_t slots, Py_ssize_t width, real scale, real* scores, Py_ssize_t part,
                Py_ssize_t parts) noexcept nogil

# memory (n, d) and keys (n, d_k) one step on, keep = 1 - decay; `chosen` >= 0 replaces the row of the rule, and `opened` whether it is written
cdef void write_full(
    real* memory, real* keys, Py_ssize_t slots, Py_ssize_t width, Py_ssize_t key_width, const real* value, const real* key, real gate, real keep,
    int rule, real threshold, Py_ssize_t chosen, bint opened,
) noexcept nogil

# the same for scale * memory and scale * keys; `scale` is that of this step, decayed already, and becomes 1 where it is below FOLD
cdef void write_one(
    real* memory, real* keys, real* norms, Py_ssize_t slots, Py_ssize_t width, Py_ssize_t key_width, const real* value, const real* key, real gate,
    real scale, int rule, real threshold, Py_ssize_t chosen, bint opened,
) noexcept nogil

# the scale after a step: decayed, and 1 where that is below FOLD
cdef real next_scale(real scale, real keep) noexcept nogil
