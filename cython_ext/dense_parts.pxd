# What the blocks of the dense kernels are made of: one row times a block of columns, activations, a sum. All of them go into their callers,
# and so into each clone. The layouts of weights are in dense.pxd.

from libc.stdint cimport uint32_t

from cython_ext.algebra cimport LANES, folded, real
from cython_ext.clones cimport inlined
from cython_ext.dense cimport GELU, HALF, RELU, SIGMOID, SILU, SOFTPLUS, TANH, WIDTH, Linear
from cython_ext.functions cimport Word, exponential, gaussian_unit, hyperbolic_tangent, logistic, softplus


cdef inline real total(const real* x, Py_ssize_t n) noexcept nogil:
    """x.sum() in a fixed order."""
    cdef real lane[LANES]
    cdef Py_ssize_t i, k
    # lane = x.reshape(-1, LANES).sum(0), x filled up with zeros
    for k in range(LANES):
        lane[k] = 0
    for i in range(n // LANES):
        for k in range(LANES):
            lane[k] += x[i * LANES + k]
    for k in range(n % LANES):
        lane[k] += x[n // LANES * LANES + k]
    return folded(lane)


cdef inline Py_ssize_t width_of(real* kind) noexcept nogil:
    if real is float:
        return WIDTH
    else:
        return WIDTH // 2


cdef inline inlined accumulate(const real* x, Py_ssize_t n, const real* matrix, Py_ssize_t step, Py_ssize_t width, real* lane) noexcept nogil:
    cdef Py_ssize_t i, k
    # lane[:width] = x @ matrix[:, :width]
    for k in range(width):
        lane[k] = 0
    for i in range(n):
        for k in range(width):
            lane[k] += x[i] * matrix[i * step + k]


cdef inline inlined accumulate_half(const float* x, Py_ssize_t n, const uint32_t* matrix, float* lane) noexcept nogil:
    cdef Py_ssize_t i, k
    cdef Word word
    # lane = x @ matrix, the low half of a word being a column and the high half the one WIDTH // 2 on
    for k in range(WIDTH):
        lane[k] = 0
    for i in range(n):
        for k in range(WIDTH // 2):
            word.bits = matrix[i * (WIDTH // 2) + k] << 16
            lane[k] += x[i] * word.value
        for k in range(WIDTH // 2):
            word.bits = matrix[i * (WIDTH // 2) + k] & 0xffff0000u
            lane[WIDTH // 2 + k] += x[i] * word.value


cdef inline inlined widen(const uint32_t* matrix, Py_ssize_t n, float* out) noexcept nogil:
    cdef Py_ssize_t i, k
    cdef Word word
    # out (n, WIDTH) = the block of bfloat16 as float32
    for i in range(n):
        for k in range(WIDTH // 2):
            word.bits = matrix[i * (WIDTH // 2) + k] << 16
            out[i * WIDTH + k] = word.value
            word.bits = matrix[i * (WIDTH // 2) + k] & 0xffff0000u
            out[i * WIDTH + WIDTH // 2 + k] = word.value


cdef inline inlined activated(real* y, Py_ssize_t n, int activation) noexcept nogil:
    cdef Py_ssize_t i
    cdef real e
    if activation == RELU:
        # y = np.where(y < 0, 0, y)
        for i in range(n):
            y[i] = 0 if y[i] < 0 else y[i]
    elif activation == TANH:
        # y = np.tanh(y)
        for i in range(n):
            hyperbolic_tangent(y[i], &y[i])
    elif activation == SIGMOID:
        # y = 1 / (1 + np.exp(-y))
        for i in range(n):
            logistic(y[i], &y[i])
    elif activation == GELU:
        # y = y * (1 + erf(y / np.sqrt(2))) / 2
        for i in range(n):
            gaussian_unit(y[i], &y[i])
    elif activation == SOFTPLUS:
        # y = np.logaddexp(y, 0)
        for i in range(n):
            softplus(y[i], &y[i])
    elif activation == SILU:
        # y = y / (1 + np.exp(-y))
        for i in range(n):
            logistic(y[i], &e)
            y[i] *= e


cdef inline inlined finish(real* y, const real* bias, Py_ssize_t column, Py_ssize_t n, int activation) noexcept nogil:
    cdef Py_ssize_t i
    # y = activation(y + bias[column : column + n])
    if bias is not NULL:
        for i in range(n):
            y[i] += bias[column + i]
    activated(y, n, activation)


cdef inline inlined one_row(const Linear* layer, Py_ssize_t column, const real* x, real* y, Py_ssize_t n, int activation) noexcept nogil:
    """y = activation(x @ W + b) for the n outputs of the block that begins at `column`."""
    cdef real lane[WIDTH]
    cdef Py_ssize_t k
    if real is float:
        if layer.storage == HALF:
            accumulate_half(x, layer.inputs, <const uint32_t*> layer.weight + column // 2 * layer.inputs, lane)
        else:
            accumulate(x, layer.inputs, <const real*> layer.weight + column * layer.inputs, WIDTH, WIDTH, lane)
    else:
        accumulate(x, layer.inputs, <const real*> layer.weight + column * layer.inputs, WIDTH // 2, WIDTH // 2, lane)
    for k in range(n):
        y[k] = lane[k]
    finish(y, <const real*> layer.bias, column, n, activation)
