"""LAM whole, without a framework: a padded batch of token ids in, embeddings and hidden states out.

    x = LN(word[ids] + token_type[0] + position)
    for each layer:   x = LN(x + W_o (RMSNorm_d(rule(silu(conv(W x)))) * sigmoid(W_g x)));   x = LN(x + W_out gelu(gelu(W_in x)))
    embedding = l2norm(mean of x over the tokens)

Tokens that are only padding are left out: all layers work on the valid tokens of a batch, one after another, as rows of one matrix. Blocks of
work are cut by shape alone and BLAS keeps to one thread, so that no result depends on the number of threads.
Letters: B batch, L length, D width, H heads, d head width, N valid tokens, K kernel; I inputs, O outputs of a product.
"""

import threading
from typing import NamedTuple

import numpy as np

from cython.parallel cimport prange, threadid

from cython_ext.algebra cimport multiply, real
from cython_ext.clones cimport cloned
from cython_ext.dense cimport GELU, NONE, SIGMOID, SILU, activate, l2norms, layer_norms, mean_rows, rms_norms

from cython_ext import delta_rule
from cython_ext.checks_lam import checked_ids, checked_lengths, checked_weights
from cython_ext.threads import one_blas_thread, threads_for

cdef enum:
    TILE = 256  # rows of a product that one thread computes at a time, at most
    BLOCK = 128  # columns of it, which lie together: few rows are multiplied up to 2.5 times as fast as by columns of the whole matrix
    ROWS = 16  # tokens that one thread takes at a time elsewhere


class LamOutput(NamedTuple):
    """last_hidden_state (B, L, D), zero at padded positions; embedding (B, D), unit rows; hidden_states, depth + 1 of (B, L, D), or None."""

    last_hidden_state: np.ndarray
    embedding: np.ndarray
    hidden_states: tuple | None


cdef Py_ssize_t evenly(Py_ssize_t n) noexcept nogil:
    """The size of the tiles that cut n rows into as few equal ones of at most TILE as there can be, a multiple of 16."""
    cdef Py_ssize_t blocks = (n + TILE - 1) // TILE, size = (n + blocks - 1) // blocks
    return (size + 15) // 16 * 16


cdef cloned add_bias(real* y, Py_ssize_t rows, Py_ssize_t n, Py_ssize_t step, const real* bias) noexcept nogil:
    cdef Py_ssize_t row, i
    # y = y + bias
    for row in range(rows):
        for i in range(n):
            y[row * step + i] += bias[i]


cdef void product_block(
    const real[:, ::1] x, const real[:, :, ::1] blocks, const real[::1] bias, Py_ssize_t plain, int activation, int repeats, real[:, ::1] y,
    Py_ssize_t row, Py_ssize_t rows, Py_ssize_t column, Py_ssize_t columns,
) noexcept nogil:
    cdef Py_ssize_t first = max(plain, column), t
    cdef int again
    # y[rows, columns] = x[rows] @ matrix[:, columns] + bias[columns], the activation applied from column `plain` on
    multiply(False, False, rows, columns, x.shape[1], <real> 1, &x[row, 0], x.shape[1], &blocks[column // BLOCK, 0, 0], BLOCK, <real> 0,
             &y[row, column], y.shape[1])
    add_bias(&y[row, column], rows, columns, y.shape[1], &bias[column])
    if activation != NONE and first < column + columns:
        for t in range(row, row + rows):
            for again in range(repeats):
                activate(&y[t, first], column + columns - first, activation)


cdef product(
    const real[:, ::1] x, const real[:, :, ::1] blocks, const real[::1] bias, Py_ssize_t plain, int activation, int repeats, real[:, ::1] y,
    int threads,
):
    cdef Py_ssize_t tall = evenly(y.shape[0]), down = (y.shape[0] + tall - 1) // tall, job, row, column
    # y = x @ matrix + bias; y[:, plain:] = activation(y[:, plain:])
    for job in prange(blocks.shape[0] * down, nogil=True, schedule="dynamic", num_threads=threads):
        row, column = job % down * tall, job // down * BLOCK
        product_block(x, blocks, bias, plain, activation, repeats, y, row, min(tall, y.shape[0] - row), column, min(BLOCK, y.shape[1] - column))


cdef cloned add_row(real* x, const real* y, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    # x = x + y
    for i in range(n):
        x[i] += y[i]


cdef add_and_norm(real[:, ::1] x, const real[:, ::1] y, const real[::1] weight, const real[::1] bias, real eps, int threads):
    cdef Py_ssize_t t, n = x.shape[1]
    # x = layer_norm(x + y, weight, bias, eps)
    for t in prange(x.shape[0], nogil=True, schedule="static", num_threads=threads):
        add_row(&x[t, 0], &y[t, 0], n)
        layer_norms(&x[t, 0], 1, n, &weight[0], &bias[0], eps, NONE, &x[t, 0])


cdef cloned convolve_token(
    const real* x, Py_ssize_t step, Py_ssize_t t, Py_ssize_t length, const real* taps, const real* bias, Py_ssize_t kernel, Py_ssize_t n, real* out,
) noexcept nogil:
    cdef Py_ssize_t i, j, source
    # out = bias + sum(taps[j] * x[t + j - kernel // 2] for j in range(kernel)), zeros outside the sentence; x begins with it
    for i in range(n):
        out[i] = bias[i]
    for j in range(kernel):
        source = t + j - kernel // 2
        if 0 <= source < length:
            for i in range(n):
                out[i] += taps[j * n + i] * x[source * step + i]


cdef to_heads(
    const real[:, ::1] mixed, const Py_ssize_t[::1] sentence, const Py_ssize_t[::1] place, const Py_ssize_t[::1] lengths,
    const real[:, ::1] taps, const real[::1] bias, real[:, ::1] row, real[:, :, :, :, ::1] heads, real[:, :, :, ::1] rates, int threads,
):
    """mixed (N, 4D + 5H) to queries, keys and values (3, B, H, L, d) and the five numbers of a token and head (5, B, H, L)."""
    cdef Py_ssize_t n = heads.shape[2], d = heads.shape[4], width = n * d, i, b, t, part, h, k, thread
    # heads = silu(convolution of mixed[:, :3 * D]); rates = mixed[:, 4 * D:]; each at its place
    for i in prange(mixed.shape[0], nogil=True, schedule="static", num_threads=threads):
        thread, b, t = threadid(), sentence[i], place[i]
        convolve_token(&mixed[i - t, 0], mixed.shape[1], t, lengths[b], &taps[0, 0], &bias[0], taps.shape[0], 3 * width, &row[thread, 0])
        activate(&row[thread, 0], 3 * width, SILU)
        for part in range(3):
            for h in range(n):
                for k in range(d):
                    heads[part, b, h, t, k] = row[thread, part * width + h * d + k]
        for part in range(5):
            for h in range(n):
                rates[part, b, h, t] = mixed[i, 4 * width + part * n + h]


cdef cloned multiply_row(real* x, const real* y, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    # x = x * y
    for i in range(n):
        x[i] *= y[i]


cdef from_heads(
    const real[:, :, :, ::1] o, const real[:, ::1] mixed, const Py_ssize_t[::1] sentence, const Py_ssize_t[::1] place, const real[::1] weight,
    real eps, real[:, ::1] out, int threads,
):
    cdef Py_ssize_t n = o.shape[1], d = o.shape[3], i, h
    # out = rms_norm(o, weight, eps) * mixed[:, 3 * D : 4 * D]
    for i in prange(out.shape[0], nogil=True, schedule="static", num_threads=threads):
        for h in range(n):
            rms_norms(&o[sentence[i], h, place[i], 0], 1, d, &weight[0], eps, &out[i, h * d])
        multiply_row(&out[i, 0], &mixed[i, 3 * n * d], n * d)


cdef unit_means(const real[:, ::1] x, const Py_ssize_t[::1] starts, const Py_ssize_t[::1] lengths, real[:, ::1] out):
    cdef Py_ssize_t b
    # out[b] = l2norm(x[starts[b] : starts[b] + lengths[b]].mean(0))
    with nogil:
        for b in range(out.shape[0]):
            mean_rows(&x[starts[b], 0], lengths[b], x.shape[1], &out[b, 0])
        l2norms(&out[0, 0], out.shape[0], out.shape[1], &out[0, 0])


def blocks(weight):
    """A weight (O, I) as (blocks, I, BLOCK), transposed, the outputs filled up with zeros to whole blocks."""
    outputs, inputs = weight.shape
    rows = np.zeros((-(-outputs // BLOCK) * BLOCK, inputs), weight.dtype)
    rows[:outputs] = weight
    return np.ascontiguousarray(rows.reshape(-1, BLOCK, inputs).transpose(0, 2, 1))


class LamEngine:
    """A sentence encoder from its flat weights, under torch's names; the arrays are copied.

    Sizes not given are read off the arrays. `dtype` "float32" or "float64" is that of weights, arithmetic and results. Buffers are kept from
    call to call and grow with the largest batch; calls from several threads come one after another.
    Raises ValueError for arrays that are missing or do not fit, TypeError for sizes that are no integers.
    """

    def __init__(self, arrays, *, heads, depth, chunk_size=64, transform="lam", max_length=32768, gelu_repeats=2, norm_eps=1e-12, rms_eps=1e-6,
                 dtype="float32"):
        held = checked_weights(arrays, heads, depth, dtype)
        self.dtype, self.dim, self.heads = np.dtype(dtype), held["word_embeddings.weight"].shape[1], heads
        self.chunk_size, self.transform, self.max_length, self.repeats = chunk_size, transform, max_length, gelu_repeats
        self.norm_eps, self.rms_eps = norm_eps, rms_eps
        self._word, self._position = held["word_embeddings.weight"], held["position_embeddings.weight"]
        self._type = held["token_type_embeddings.weight"][0]
        self._norm = held["embedding_norm.weight"], held["embedding_norm.bias"]
        self._layers = [self._layer(held, f"blocks.{index}.") for index in range(depth)]
        self._buffers, self._lock = {}, threading.Lock()

    def _layer(self, held, prefix):
        """The arrays of a layer in the order and shape of the loops: products in `blocks`, all that reads x in one of them."""
        def of(name):
            return held[f"{prefix}{name}"]

        def turned(*names):
            return blocks(np.concatenate([of(f"{name}.weight") for name in names]))

        mixing = ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "fast_decay_proj", "slow_decay_proj", "fast_gate_proj", "slow_gate_proj")
        bias = np.zeros(4 * self.dim + 5 * self.heads, self.dtype)
        for place, name in ((1, "fast_decay"), (2, "slow_decay")):
            start = 4 * self.dim + place * self.heads
            bias[start : start + self.heads] = of(f"delta.{name}_proj.bias") + of(f"delta.{name}_bias")
        convs = [f"delta.{name}_conv1d" for name in "qkv"]
        fluxes = [tuple(of(f"delta.rule.{flux}.{name}") for name in ("hidden.weight", "hidden.bias", "out.weight", "out.bias"))
                  for flux in ("token_flux", "chunk_flux")]
        return {
            "mix": (turned(*(f"delta.{name}" for name in mixing)), bias),
            "taps": np.ascontiguousarray(np.concatenate([of(f"{name}.weight")[:, 0] for name in convs]).T),
            "conv_bias": np.concatenate([of(f"{name}.bias") for name in convs]),
            "rule": (*fluxes, of("delta.rule.W_bilinear"), of("delta.rule.temp")),
            "o_norm": of("delta.o_norm.weight"),
            "out": (turned("delta.o_proj"), np.zeros(self.dim, self.dtype)),
            "norm_delta": (of("norm_delta.weight"), of("norm_delta.bias")),
            "ffn_in": (turned("ffn_in"), of("ffn_in.bias")),
            "ffn_out": (turned("ffn_out"), of("ffn_out.bias")),
            "norm_ffn": (of("norm_ffn.weight"), of("norm_ffn.bias")),
        }

    def __call__(self, input_ids, attention_mask=None, output_hidden_states=False):
        """input_ids (B, L) in [0, V), L at most `max_length`; attention_mask (B, L), nonzero for valid tokens, or None for all.

        Returns a LamOutput of new arrays. Raises ValueError for ids out of range, empty or too long input, and a mask of another shape, with
        a hole, with padding on the left or with a row without valid tokens.
        """
        ids = checked_ids(input_ids, self._word.shape[0], self.max_length)
        lengths = checked_lengths(attention_mask, ids.shape)
        with self._lock, one_blas_thread():
            return self._forward(ids, lengths, output_hidden_states)

    def _forward(self, ids, lengths, output_hidden_states):
        batch, length = ids.shape
        valid = np.arange(length) < lengths[:, None]
        sentence, place = (np.ascontiguousarray(index, np.intp) for index in np.nonzero(valid))
        starts, mask = np.cumsum(lengths) - lengths, None if valid.all() else valid
        tokens, dim, heads = len(place), self.dim, self.heads
        x, y = self._buffer("x", tokens, dim), self._buffer("y", tokens, dim)
        np.take(self._word, ids[valid], axis=0, out=x, mode="clip")
        y[...] = self._positions(place, lengths[sentence])
        y += self._type
        self._normed(x, y, self._norm)

        def padded():
            if mask is None:
                return x.reshape(batch, length, dim).copy()
            whole = np.zeros((batch, length, dim), self.dtype)
            whole[valid] = x
            return whole

        hidden = [padded()] if output_hidden_states else None
        mixed = self._buffer("mixed", tokens, 4 * dim + 5 * heads)
        qkv, rates = self._buffer("qkv", 3, batch, heads, length, dim // heads), self._buffer("rates", 5, batch, heads, length)
        if mask is not None:  # what stands at padded positions is not read, but not to be left to chance either
            qkv[...], rates[...] = 0, 0
        gated = self._buffer("gated", tokens, dim)
        threads = threads_for(tokens, 16 * tokens * dim)
        row = self._buffer("row", threads, 3 * dim)
        for layer in self._layers:
            self._product(x, layer["mix"], mixed, SIGMOID, 3 * dim)
            arguments = (mixed, sentence, place, lengths, layer["taps"], layer["conv_bias"], row, qkv, rates, threads)
            to_heads[float](*arguments) if self.dtype == np.float32 else to_heads[double](*arguments)
            o, _ = delta_rule.hierarchical_forward(*qkv, *rates, *layer["rule"], mask, None, self.chunk_size, self.transform)
            arguments = (o, mixed, sentence, place, layer["o_norm"], self.rms_eps, gated, threads)
            from_heads[float](*arguments) if self.dtype == np.float32 else from_heads[double](*arguments)
            self._product(gated, layer["out"], y)
            self._normed(x, y, layer["norm_delta"])
            wide = self._buffer("wide", tokens, layer["ffn_in"][1].size)
            self._product(x, layer["ffn_in"], wide, GELU, 0, self.repeats)
            self._product(wide, layer["ffn_out"], y)
            self._normed(x, y, layer["norm_ffn"])
            if hidden is not None:
                hidden.append(padded())
        embedding = np.empty((batch, dim), self.dtype)
        unit_means[float](x, starts, lengths, embedding) if self.dtype == np.float32 else unit_means[double](x, starts, lengths, embedding)
        return LamOutput(padded(), embedding, None if hidden is None else tuple(hidden))

    def _product(self, x, layer, y, activation=NONE, plain=0, repeats=1):
        """y = x @ W + b, its columns from `plain` on through the activation, `repeats` times."""
        threads = threads_for(y.size, y.size * x.shape[1])
        arguments = (x, *layer, plain, activation, repeats, y, threads)
        product[float](*arguments) if self.dtype == np.float32 else product[double](*arguments)

    def _normed(self, x, y, norm):
        """x = LN(x + y)."""
        arguments = (x, y, *norm, self.norm_eps, threads_for(x.shape[0], 4 * x.size))
        add_and_norm[float](*arguments) if self.dtype == np.float32 else add_and_norm[double](*arguments)

    def _positions(self, place, lengths):
        """Position embeddings (N, D) of tokens at `place` in sentences of `lengths`: a long sentence has the table stretched over it."""
        last = self._position.shape[0] - 1
        if lengths.max() <= last + 1:
            return self._position[place]
        stretched, spans = lengths > last + 1, np.maximum(lengths - 1, 1)
        low = np.where(stretched, place * last // spans, place)
        share = (np.where(stretched, place * last % spans, 0) / spans).astype(self.dtype)[:, None]
        below, above = self._position[low], self._position[np.minimum(low + 1, last)]
        return below + share * (above - below)

    def _buffer(self, name, *shape):
        """An array of `shape`, whatever it holds, in memory kept from call to call."""
        size = int(np.prod(shape))
        if name not in self._buffers or self._buffers[name].size < size:
            self._buffers[name] = np.empty(size, self.dtype)
        return self._buffers[name][:size].reshape(shape)
