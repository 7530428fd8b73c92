# What an engine calls of the dense kernels: C functions on pointers, compiled once per processor kind in dense.pyx, which allocate nothing.
#
# Every thread of a parallel region calls `linear_layer` with its own `part` of `parts`; which thread computes a block changes none of its bits.
# A product of several rows may call BLAS, which the caller keeps to one thread. `x` and `y` are rows `step` entries apart.

from libc.stdint cimport uint32_t

from cython_ext.algebra cimport real

cdef enum Activation:
    NONE, RELU, TANH, SIGMOID, GELU, SOFTPLUS, SILU, GELU_TWICE

cdef enum Storage:
    WIDE  # (blocks, inputs, WIDTH) of the type of x, outputs filled up with zeros to whole blocks
    HALF  # the same in bfloat16, two columns in a word: low half column k, high half column k + 32 of each block; with float32 alone
    TURNED  # (outputs, inputs): for few outputs

cdef struct Linear:
    const void* weight
    const void* bias  # (outputs,) of the type of x, or NULL
    Py_ssize_t inputs, outputs
    int storage

cdef enum:
    WIDTH = 64  # columns of a block, in float32; half of it in float64
    FEW = 16  # fewer outputs than these are stored TURNED

# y = activation(x @ W + b), x (rows, inputs), y (rows, outputs); scratch: inputs * WIDTH entries of this thread, for HALF and several rows
cdef void linear_layer(
    const Linear* layer, Py_ssize_t rows, const real* x, Py_ssize_t step_x, real* y, Py_ssize_t step_y, int activation, real* scratch,
    Py_ssize_t part, Py_ssize_t parts,
) noexcept nogil

# out = x @ matrix for x (n,), matrix (n, columns), step entries from row to row: the columns of this part
cdef void combine(const real* x, const real* matrix, Py_ssize_t n, Py_ssize_t columns, Py_ssize_t step, real* out, Py_ssize_t part,
                  Py_ssize_t parts) noexcept nogil

# x = activation(x), n entries
cdef void activate(real* x, Py_ssize_t n, int activation) noexcept nogil

# out = activation((x - mean) / sqrt(var + eps) * weight + bias) for each of the rows; out may be x, weight and bias NULL
cdef void layer_norms(const real* x, Py_ssize_t rows, Py_ssize_t n, const real* weight, const real* bias, real eps, int activation,
                      real* out) noexcept nogil

# out = x / sqrt(mean(x^2) + eps) * weight for each of the rows
cdef void rms_norms(const real* x, Py_ssize_t rows, Py_ssize_t n, const real* weight, real eps, real* out) noexcept nogil

# x = exp(x - max) / sum, n entries
cdef void softmax(real* x, Py_ssize_t n) noexcept nogil

# out = x / max(|x|, 1e-12) for each of the rows
cdef void l2norms(const real* x, Py_ssize_t rows, Py_ssize_t n, real* out) noexcept nogil

# out (D,) = mean of the first `length` rows of x (L, D)
cdef void mean_rows(const real* x, Py_ssize_t length, Py_ssize_t width, real* out) noexcept nogil

# out (L, D): out[t] = activation(bias + sum_j taps[j] * x[t + j - left]), zeros outside; taps (K, D)
cdef void convolve(const real* x, const real* taps, const real* bias, Py_ssize_t length, Py_ssize_t width, Py_ssize_t kernel, Py_ssize_t left,
                   int activation, real* out) noexcept nogil

# packing.Packed and a bias or None as the struct; both must outlive it
cdef Linear described(object packed, object bias)
