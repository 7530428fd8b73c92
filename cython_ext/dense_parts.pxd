# What the blocks of the dense kernels are made of: rows times a block of columns, activations, norms, sums. All of them go into their callers,
# and so into each clone. The layouts of weights are in dense.pxd.

from libc.stdint cimport uint32_t

from cython_ext.algebra cimport LANES, dot, folded, real, root
from cython_ext.clones cimport inlined
from cython_ext.dense cimport GELU, GELU_TWICE, HALF, RELU, SIGMOID, SILU, SOFTPLUS, TANH, WIDTH, Linear
from cython_ext.functions cimport Word, exponential, gaussian_unit, hyperbolic_tangent, logistic, softplus

cdef extern from "tiles.h":
    const int TILE_ROWS, TILE_NONE
    int tile_best() noexcept nogil
    int tile_kind() noexcept nogil
    void tile_choose(int kind) noexcept nogil
    int tile_rows(size_t apart) noexcept nogil
    int tile_float(int half, int rows, Py_ssize_t columns, Py_ssize_t inner, const float* a, Py_ssize_t step, const void* block,
                   float* out) noexcept nogil
    int tile_double(int rows, Py_ssize_t columns, Py_ssize_t inner, const double* a, Py_ssize_t step, const void* block, double* out) noexcept nogil


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
            y[i] = <real> 0 if y[i] < 0 else y[i]
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
    elif activation == GELU_TWICE:
        # y = gelu(gelu(y))
        for i in range(n):
            gaussian_unit(y[i], &y[i])
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


cdef inline inlined finish_tile(
    real* tile, const real* bias, Py_ssize_t column, Py_ssize_t rows, Py_ssize_t n, Py_ssize_t width, int activation, real* y, Py_ssize_t step,
) noexcept nogil:
    """y = activation(tile + bias), n columns of each of the rows; a whole tile of `width` columns goes through the activation at once."""
    cdef Py_ssize_t row, i
    if bias is not NULL:
        # tile = tile + bias
        for row in range(rows):
            for i in range(n):
                tile[row * width + i] += bias[column + i]
    # tile = activation(tile)
    if n == width:
        activated(tile, rows * width, activation)
    else:
        for row in range(rows):
            activated(tile + row * width, n, activation)
    # y = tile[:, :n]
    for row in range(rows):
        for i in range(n):
            y[row * step + i] = tile[row * width + i]


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


cdef inline inlined several_rows(
    const Linear* layer, const void* matrix, Py_ssize_t column, Py_ssize_t n, Py_ssize_t rows, const real* x, Py_ssize_t step_x, real* y,
    Py_ssize_t step_y, int activation,
) noexcept nogil:
    """y = activation(x @ W + b) of some rows for the n outputs of the block `matrix` that begins at `column`."""
    cdef real tile[TILE_ROWS * WIDTH]
    cdef Py_ssize_t inputs = layer.inputs, groups = (rows - 1) // tile_rows(step_x * sizeof(real)) + 1, group, row, some
    for group in range(groups):
        row, some = group * rows // groups, (group + 1) * rows // groups - group * rows // groups
        # tile = x[row : row + some] @ W; y[row : row + some] = activation(tile + b)
        if real is float:
            tile_float(layer.storage == HALF, some, n, inputs, x + row * step_x, step_x, matrix, tile)
        else:
            tile_double(some, n, inputs, x + row * step_x, step_x, matrix, tile)
        finish_tile(tile, <const real*> layer.bias, column, some, n, width_of(y), activation, y + row * step_y + column, step_y)


cdef inline inlined convolved(
    const real* x, const real* taps, const real* bias, Py_ssize_t length, Py_ssize_t width, Py_ssize_t kernel, Py_ssize_t left, int activation,
    real* out,
) noexcept nogil:
    cdef Py_ssize_t t, j, i, source
    # out[t] = activation(bias + sum(taps[j] * x[t + j - left] for j in range(kernel)))
    for t in range(length):
        for i in range(width):
            out[t * width + i] = bias[i]
        for j in range(kernel):
            source = t + j - left
            if 0 <= source < length:
                for i in range(width):
                    out[t * width + i] += taps[j * width + i] * x[source * width + i]
        activated(out + t * width, width, activation)


cdef inline inlined layer_normed(
    const real* x, Py_ssize_t n, const real* weight, const real* bias, real eps, int activation, real* out,
) noexcept nogil:
    cdef Py_ssize_t i
    cdef real mean = total(x, n) / n, scale
    # out = x - x.mean(); out = out / np.sqrt((out**2).mean() + eps) * weight + bias
    for i in range(n):
        out[i] = x[i] - mean
    scale = 1 / root(dot(out, out, n) / n + eps)
    if weight is NULL:
        for i in range(n):
            out[i] *= scale
    else:
        for i in range(n):
            out[i] = out[i] * scale * weight[i]
    finish(out, bias, 0, n, activation)


cdef inline inlined softmaxed(real* x, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef real most = x[0], by
    # x = np.exp(x - x.max()); x = x / x.sum()
    for i in range(1, n):
        most = x[i] if x[i] > most else most
    for i in range(n):
        exponential(x[i] - most, &x[i])
    by = total(x, n)
    for i in range(n):
        x[i] /= by


cdef inline inlined averaged(const real* x, Py_ssize_t length, Py_ssize_t width, real* out) noexcept nogil:
    cdef Py_ssize_t t, i
    # out = x[:length].sum(0) / length
    for i in range(width):
        out[i] = x[i]
    for t in range(1, length):
        for i in range(width):
            out[i] += x[t * width + i]
    for i in range(width):
        out[i] /= length
