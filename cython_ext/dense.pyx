"""The dense parts of the three models: linear layers with their activations, norms, a depthwise convolution, a masked mean.

    linear   y = activation(x @ weight.T + bias)           layer_norm   (x - mean) / sqrt(var + eps) * weight + bias
    rms_norm x / sqrt(mean(x^2) + eps) * weight             l2norm       x / max(|x|, 1e-12)

One row is multiplied by a matrix in blocks of columns, each read once from top to bottom, so that memory bandwidth is all that it waits for;
several rows are multiplied by a block in registers (tiles.h) or, on a processor without AVX2, through BLAS on one thread. Blocks are cut by
shape alone: no result depends on the number of threads. Letters: B batch, L length, D width, K kernel; I inputs, O outputs of a linear layer.
"""

from contextlib import nullcontext

import numpy as np

from cython.parallel cimport parallel, prange, threadid
from libc.stdint cimport uint32_t
from openmp cimport omp_get_num_threads

from cython_ext.algebra cimport dot, inverse_norm, multiply, real, root
from cython_ext.clones cimport cloned, inlined
from cython_ext.dense_parts cimport (
    TILE_NONE, accumulate, activated, averaged, convolved, finish, layer_normed, one_row, several_rows, softmaxed, tile_best, tile_choose, tile_kind,
    widen, width_of,
)

from cython_ext.checks_dense import conv_arguments, dense_array, flat_rows, linear_arguments, mean_arguments, norm_arguments, widened
from cython_ext.threads import one_blas_thread, threads_for

cdef enum:
    SINGLE = 2  # one row is multiplied here: BLAS would copy the matrix first
    TILE = 256  # rows of a block
    ENTRIES = 4096  # of a block of an array that is taken entry by entry


cdef cloned block_of_rows(
    const Linear* layer, Py_ssize_t column, Py_ssize_t n, Py_ssize_t rows, const real* x, Py_ssize_t step_x, real* y, Py_ssize_t step_y,
    int activation, real* scratch,
) noexcept nogil:
    """The n outputs of the block that begins at `column`, of some rows."""
    cdef Py_ssize_t row, inputs = layer.inputs, k
    cdef const real* bias = <const real*> layer.bias
    cdef const void* matrix
    if layer.storage == TURNED:
        # y = activation(x @ W.T + b)
        for row in range(rows):
            for k in range(n):
                y[row * step_y + column + k] = dot(x + row * step_x, <const real*> layer.weight + (column + k) * inputs, inputs)
            finish(y + row * step_y + column, bias, column, n, activation)
        return
    if rows < SINGLE:
        for row in range(rows):
            one_row(layer, column, x + row * step_x, y + row * step_y + column, n, activation)
        return
    matrix = <const void*> (<const char*> layer.weight + column * inputs * (2 if layer.storage == HALF else sizeof(real)))
    if tile_kind() != TILE_NONE:
        several_rows(layer, matrix, column, n, rows, x, step_x, y, step_y, activation)
        return
    if real is float:
        if layer.storage == HALF:
            widen(<const uint32_t*> matrix, inputs, scratch)
            matrix = scratch
    # y = activation(x @ W + b)
    multiply(False, False, rows, n, inputs, <real> 1, x, step_x, <const real*> matrix, width_of(y), <real> 0, y + column, step_y)
    for row in range(rows):
        finish(y + row * step_y + column, bias, column, n, activation)


cdef void linear_layer(
    const Linear* layer, Py_ssize_t rows, const real* x, Py_ssize_t step_x, real* y, Py_ssize_t step_y, int activation, real* scratch,
    Py_ssize_t part, Py_ssize_t parts,
) noexcept nogil:
    cdef Py_ssize_t width = width_of(y), tile = rows if rows < TILE else TILE, across, down, job, column, row
    across, down = (layer.outputs + width - 1) // width, (rows + tile - 1) // tile
    # blocks of `width` outputs by `tile` rows; neighbours in memory go to one thread
    for job in range(part * across * down // parts, (part + 1) * across * down // parts):
        column, row = job // down * width, job % down * tile
        block_of_rows(layer, column, min(width, layer.outputs - column), min(tile, rows - row), x + row * step_x, step_x, y + row * step_y,
                      step_y, activation, scratch)


cdef cloned combine_block(const real* x, const real* matrix, Py_ssize_t n, Py_ssize_t width, Py_ssize_t step, real* out) noexcept nogil:
    cdef real lane[WIDTH]
    cdef Py_ssize_t k
    # out = x @ matrix
    if width == WIDTH:
        accumulate(x, n, matrix, step, WIDTH, lane)
    elif width == WIDTH // 2:
        accumulate(x, n, matrix, step, WIDTH // 2, lane)
    else:
        accumulate(x, n, matrix, step, width, lane)
    for k in range(width):
        out[k] = lane[k]


cdef void combine(
    const real* x, const real* matrix, Py_ssize_t n, Py_ssize_t columns, Py_ssize_t step, real* out, Py_ssize_t part, Py_ssize_t parts,
) noexcept nogil:
    cdef Py_ssize_t width = width_of(out), blocks = (columns + width - 1) // width, job
    for job in range(part * blocks // parts, (part + 1) * blocks // parts):
        combine_block(x, matrix + job * width, n, min(width, columns - job * width), step, out + job * width)


cdef cloned activate_cloned(real* x, Py_ssize_t n, int activation) noexcept nogil:
    activated(x, n, activation)


cdef void activate(real* x, Py_ssize_t n, int activation) noexcept nogil:
    activate_cloned(x, n, activation)


cdef cloned layer_norm_row(const real* x, Py_ssize_t n, const real* weight, const real* bias, real eps, int activation, real* out) noexcept nogil:
    layer_normed(x, n, weight, bias, eps, activation, out)


cdef void layer_norms(
    const real* x, Py_ssize_t rows, Py_ssize_t n, const real* weight, const real* bias, real eps, int activation, real* out,
) noexcept nogil:
    cdef Py_ssize_t row
    for row in range(rows):
        layer_norm_row(x + row * n, n, weight, bias, eps, activation, out + row * n)


cdef cloned rms_norm_row(const real* x, Py_ssize_t n, const real* weight, real eps, real* out) noexcept nogil:
    cdef Py_ssize_t i
    cdef real scale = 1 / root(dot(x, x, n) / n + eps)
    # out = x / np.sqrt((x**2).mean() + eps) * weight
    for i in range(n):
        out[i] = x[i] * scale * weight[i]


cdef void rms_norms(const real* x, Py_ssize_t rows, Py_ssize_t n, const real* weight, real eps, real* out) noexcept nogil:
    cdef Py_ssize_t row
    for row in range(rows):
        rms_norm_row(x + row * n, n, weight, eps, out + row * n)


cdef cloned softmax_row(real* x, Py_ssize_t n) noexcept nogil:
    softmaxed(x, n)


cdef void softmax(real* x, Py_ssize_t n) noexcept nogil:
    softmax_row(x, n)


cdef cloned l2norm_row(const real* x, Py_ssize_t n, real* out) noexcept nogil:
    cdef Py_ssize_t i
    cdef real by = inverse_norm(x, n)
    # out = x / max(|x|, 1e-12)
    for i in range(n):
        out[i] = x[i] * by


cdef void l2norms(const real* x, Py_ssize_t rows, Py_ssize_t n, real* out) noexcept nogil:
    cdef Py_ssize_t row
    for row in range(rows):
        l2norm_row(x + row * n, n, out + row * n)


cdef cloned mean_rows_cloned(const real* x, Py_ssize_t length, Py_ssize_t width, real* out) noexcept nogil:
    averaged(x, length, width, out)


cdef void mean_rows(const real* x, Py_ssize_t length, Py_ssize_t width, real* out) noexcept nogil:
    mean_rows_cloned(x, length, width, out)


cdef cloned convolve_cloned(
    const real* x, const real* taps, const real* bias, Py_ssize_t length, Py_ssize_t width, Py_ssize_t kernel, Py_ssize_t left, int activation,
    real* out,
) noexcept nogil:
    convolved(x, taps, bias, length, width, kernel, left, activation, out)


cdef void convolve(
    const real* x, const real* taps, const real* bias, Py_ssize_t length, Py_ssize_t width, Py_ssize_t kernel, Py_ssize_t left, int activation,
    real* out,
) noexcept nogil:
    convolve_cloned(x, taps, bias, length, width, kernel, left, activation, out)


cdef Linear described(object packed, object bias):
    """A Packed and its bias, or None, as the struct; both must outlive it."""
    cdef Linear layer
    layer.weight = <const void*> <size_t> packed.weight.__array_interface__["data"][0]
    layer.bias = <const void*> <size_t> (0 if bias is None else bias.__array_interface__["data"][0])
    layer.inputs, layer.outputs, layer.storage = packed.inputs, packed.outputs, packed.storage
    return layer


def instructions(name=None):
    """What multiplies several rows: "avx512", "avx2" or, where the processor has neither, "blas".

    `name` sets it, for this process, to one that the processor has: for tests and measurements. The first two give the same bits. Raises
    ValueError for another name.
    """
    kinds = ("blas", "avx2", "avx512")[: tile_best() + 1]
    if name is not None:
        if name not in kinds:
            raise ValueError(f"instructions must be one of {', '.join(map(repr, kinds))} on this processor, found {name!r}")
        tile_choose(kinds.index(name))
    return kinds[tile_kind()]


cdef linear_rows(const real[:, ::1] x, Linear layer, int activation, real[:, ::1] y, real[:, ::1] scratch, int threads):
    # y = activation(x @ weight.T + bias)
    with nogil, parallel(num_threads=threads):
        linear_layer(&layer, x.shape[0], &x[0, 0], x.shape[1], &y[0, 0], y.shape[1], activation, &scratch[threadid(), 0], threadid(),
                     omp_get_num_threads())


def linear(x, weight, bias=None, activation="none"):
    """activation(x @ weight.T + bias) along the last axis.

    x (..., I); weight (O, I) or what `packing.pack` made of it, which saves a copy at every call; bias (O,) or None; activation "none",
    "relu", "tanh", "sigmoid", "gelu" (exact), "softplus" or "silu". All float32 or all float64; arrays that are read-only or not contiguous
    are accepted, the latter copied. Returns (..., O), a new array. Raises TypeError for another type or dtype, ValueError for another shape,
    an empty axis or an unknown activation, by name.
    """
    x, packed, bias, kind = linear_arguments(x, weight, bias, activation)
    rows = flat_rows(x)
    y = np.empty((rows.shape[0], packed.outputs), x.dtype)
    threads = threads_for(rows.shape[0] * packed.outputs, rows.shape[0] * packed.outputs * packed.inputs)
    scratch = np.empty((threads, packed.inputs * WIDTH if packed.storage == HALF and rows.shape[0] >= SINGLE else 1), x.dtype)
    with one_blas_thread() if rows.shape[0] >= SINGLE else nullcontext():
        if x.dtype == np.float32:
            linear_rows[float](rows, described(packed, bias), kind, y, scratch, threads)
        else:
            linear_rows[double](rows, described(packed, bias), kind, y, scratch, threads)
    return y.reshape(widened(x.shape, packed.outputs))


cdef norm_rows(const real[:, ::1] x, const real[::1] weight, const real[::1] bias, real eps, bint layer, real[:, ::1] out, int threads):
    cdef Py_ssize_t row, n = x.shape[1]
    # out[row] = norm(x[row])
    for row in prange(x.shape[0], nogil=True, schedule="static", num_threads=threads):
        if layer:
            layer_norms(&x[row, 0], 1, n, &weight[0], &bias[0], eps, NONE, &out[row, 0])
        else:
            rms_norms(&x[row, 0], 1, n, &weight[0], eps, &out[row, 0])


def layer_norm(x, weight, bias, eps=1e-6):
    """(x - mean) / sqrt(var + eps) * weight + bias along the last axis, the biased variance taken in a second pass.

    x (..., D), weight and bias (D,), all float32 or all float64; arrays that are read-only or not contiguous are accepted, the latter copied.
    Returns a new array of the shape of x. Raises TypeError for another type or dtype, ValueError for another shape, an empty axis or an eps
    that is not positive, by name.
    """
    x, weight, bias, eps = norm_arguments(x, eps, weight=weight, bias=bias)
    rows, out = flat_rows(x), np.empty(x.shape, x.dtype)
    arguments = (rows, weight, bias, eps, True, out.reshape(rows.shape), threads_for(rows.shape[0], 4 * x.size))
    norm_rows[float](*arguments) if x.dtype == np.float32 else norm_rows[double](*arguments)
    return out


def rms_norm(x, weight, eps=1e-6):
    """x / sqrt(mean(x^2) + eps) * weight along the last axis.

    x (..., D), weight (D,), all float32 or all float64; arrays that are read-only or not contiguous are accepted, the latter copied. Returns a
    new array of the shape of x. Raises as `layer_norm` does.
    """
    x, weight, eps = norm_arguments(x, eps, weight=weight)
    rows, out = flat_rows(x), np.empty(x.shape, x.dtype)
    arguments = (rows, weight, weight, eps, False, out.reshape(rows.shape), threads_for(rows.shape[0], 3 * x.size))
    norm_rows[float](*arguments) if x.dtype == np.float32 else norm_rows[double](*arguments)
    return out


cdef gelu_rows(real[::1] x, int threads):
    cdef Py_ssize_t block, blocks = (x.shape[0] + ENTRIES - 1) // ENTRIES
    # x = x * (1 + erf(x / np.sqrt(2))) / 2
    for block in prange(blocks, nogil=True, schedule="static", num_threads=threads):
        activate(&x[block * ENTRIES], min(ENTRIES, x.shape[0] - block * ENTRIES), GELU)


def gelu(x):
    """The exact gelu, x * (1 + erf(x / sqrt(2))) / 2, of every entry.

    x of any shape without an empty axis, float32 or float64, read-only or not contiguous too. Returns a new array. Raises TypeError for
    another type or dtype, ValueError for an empty axis.
    """
    out = np.array(dense_array("x", x), order="C")
    if x.dtype == np.float32:
        gelu_rows[float](out.reshape(-1), threads_for(-(-out.size // ENTRIES), 16 * out.size))
    else:
        gelu_rows[double](out.reshape(-1), threads_for(-(-out.size // ENTRIES), 16 * out.size))
    return out


cdef unit_rows(const real[:, ::1] x, real[:, ::1] out):
    with nogil:
        l2norms(&x[0, 0], x.shape[0], x.shape[1], &out[0, 0])


def l2norm(x):
    """x / max(|x|, 1e-12) along the last axis.

    x (..., D) float32 or float64, read-only or not contiguous too. Returns a new array. Raises TypeError for another type or dtype,
    ValueError for an empty axis.
    """
    x = dense_array("x", x)
    rows, out = flat_rows(x), np.empty(x.shape, x.dtype)
    unit_rows[float](rows, out.reshape(rows.shape)) if x.dtype == np.float32 else unit_rows[double](rows, out.reshape(rows.shape))
    return out


cdef mean_of_rows(const real[:, :, ::1] x, const Py_ssize_t[::1] lengths, real[:, ::1] out):
    cdef Py_ssize_t b
    # out[b] = x[b, :lengths[b]].mean(0)
    with nogil:
        for b in range(x.shape[0]):
            mean_rows(&x[b, 0, 0], lengths[b], x.shape[2], &out[b, 0])


def masked_mean(x, mask=None):
    """The mean over the valid tokens of every sample.

    x (B, L, D) float32 or float64; mask (B, L) bool, true for valid tokens, padding on the right, or None. Arrays that are read-only or not
    contiguous are accepted, the latter copied. Returns (B, D), a new array. Raises TypeError for another type or dtype, ValueError for another
    shape, an empty axis, a mask with a hole or an empty row, by name.
    """
    x, lengths = mean_arguments(x, mask)
    out = np.empty((x.shape[0], x.shape[2]), x.dtype)
    mean_of_rows[float](x, lengths, out) if x.dtype == np.float32 else mean_of_rows[double](x, lengths, out)
    return out


cdef convolve_rows(
    const real[:, :, ::1] x, const real[:, ::1] taps, const real[::1] bias, Py_ssize_t left, int activation, real[:, :, ::1] out, int threads,
):
    cdef Py_ssize_t b
    # out[b] = convolution of x[b]
    for b in prange(x.shape[0], nogil=True, schedule="static", num_threads=threads):
        convolve(&x[b, 0, 0], &taps[0, 0], &bias[0], x.shape[1], x.shape[2], taps.shape[0], left, activation, &out[b, 0, 0])


def depthwise_conv(x, weight, bias, left, activation="none"):
    """y_t = activation(bias + sum_j weight_j x_{t + j - left}), zeros outside, every channel by itself.

    x (B, L, D), weight (D, 1, K) as torch keeps it, bias (D,), all float32 or all float64; left between 0 and K - 1: K - 1 is causal, K // 2
    keeps the middle; activation as in `linear`. Arrays that are read-only or not contiguous are accepted, the latter copied. Returns (B, L, D),
    a new array. Raises TypeError for another type or dtype, ValueError for another shape, an empty axis or a left or an activation that is
    none, by name.
    """
    x, taps, bias, left, kind = conv_arguments(x, weight, bias, left, activation)
    out = np.empty(x.shape, x.dtype)
    arguments = (x, taps, bias, left, kind, out, threads_for(x.shape[0], x.size * taps.shape[0]))
    convolve_rows[float](*arguments) if x.dtype == np.float32 else convolve_rows[double](*arguments)
    return out
