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

from cython.parallel cimport parallel, prange, threadid
from openmp cimport omp_get_num_threads

from cython_ext.algebra cimport real
from cython_ext.clones cimport cloned
from cython_ext.dense cimport (
    GELU, GELU_TWICE, HALF, NONE, SIGMOID, SILU, WIDTH, Linear, activate, described, l2norms, layer_norms, linear_layer, mean_rows, rms_norms,
)

from cython_ext import delta_rule
from cython_ext.checks_lam import checked_ids, checked_lengths, checked_weights
from cython_ext.packing import pack, together
from cython_ext.threads import one_blas_thread, threads_for


# What is multiplied at once -> the arrays of a layer that it is made of, one below another.
PRODUCTS = {
    "qkv": ("delta.q_proj", "delta.k_proj", "delta.v_proj"),
    "gates": tuple(f"delta.{name}_proj" for name in ("g", "b", "fast_decay", "slow_decay", "fast_gate", "slow_gate")),
    "out": ("delta.o_proj",),
    "ffn_in": ("ffn_in",),
    "ffn_out": ("ffn_out",),
}


class LamOutput(NamedTuple):
    """last_hidden_state (B, L, D), zero at padded positions; embedding (B, D), unit rows; hidden_states, depth + 1 of (B, L, D), or None."""

    last_hidden_state: np.ndarray
    embedding: np.ndarray
    hidden_states: tuple | None


cdef class Layer:
    """The weight (O, I) and the bias of a product, packed; `packed` and `bias` hold what the struct points to."""

    cdef Linear linear
    cdef readonly object packed, bias

    def __init__(self, packed, bias):
        self.packed, self.bias, self.linear = packed, bias, described(packed, bias)


cdef product(
    const real[:, ::1] x, Layer layer, int activation, int repeats, real[:, ::1] y, Py_ssize_t column, real[:, ::1] scratch, int threads,
):
    cdef int again, once = GELU_TWICE if activation == GELU and repeats > 1 else activation
    cdef Py_ssize_t row
    # y[:, column : column + outputs] = activation(x @ weight.T + bias)
    with nogil, parallel(num_threads=threads):
        linear_layer(&layer.linear, x.shape[0], &x[0, 0], x.shape[1], &y[0, column], y.shape[1], once, &scratch[threadid(), 0], threadid(),
                     omp_get_num_threads())
    # y = activation(y), as often as is left
    for again in range(2 if once == GELU_TWICE else 1, repeats):
        for row in prange(y.shape[0], nogil=True, schedule="static", num_threads=threads):
            activate(&y[row, column], layer.linear.outputs, activation)


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


class LamEngine:
    """A sentence encoder from its flat weights, under torch's names; the arrays are copied.

    Sizes not given are read off the arrays. `dtype` "float32" or "float64" is that of weights, arithmetic and results. `weights`
    "bfloat16", with float32 alone, stores those of the products in half the bytes; None: as `dtype`. Buffers are kept from call to call and
    grow with the largest batch; calls from several threads come one after another.
    Raises ValueError for arrays that are missing or do not fit and for other weights, TypeError for sizes that are no integers.
    """

    def __init__(self, arrays, *, heads, depth, chunk_size=64, transform="lam", max_length=32768, gelu_repeats=2, norm_eps=1e-12, rms_eps=1e-6,
                 dtype="float32", weights=None):
        held = checked_weights(arrays, heads, depth, dtype)
        allowed = (dtype, "bfloat16") if dtype == "float32" else (dtype,)
        if weights is not None and weights not in allowed:
            raise ValueError(f"weights must be {' or '.join(map(repr, allowed))}, found {weights!r}")
        self.dtype, self.dim, self.heads = np.dtype(dtype), held["word_embeddings.weight"].shape[1], heads
        self.chunk_size, self.transform, self.max_length, self.repeats = chunk_size, transform, max_length, gelu_repeats
        self.norm_eps, self.rms_eps = norm_eps, rms_eps
        self._word, self._position = held["word_embeddings.weight"], held["position_embeddings.weight"]
        self._type = held["token_type_embeddings.weight"][0]
        self._norm = held["embedding_norm.weight"], held["embedding_norm.bias"]
        self._products = {f"blocks.{index}.{product}": {f"blocks.{index}.{name}.weight": held[f"blocks.{index}.{name}.weight"].shape[0]
                                                        for name in names} for index in range(depth) for product, names in PRODUCTS.items()}
        packed = together({name: pack(np.concatenate([held[part] for part in parts]), weights) for name, parts in self._products.items()})
        self._layers = [self._layer(held, packed, f"blocks.{index}.") for index in range(depth)]
        if weights != "bfloat16":
            held = {name: value for name, value in held.items() if not any(name in parts for parts in self._products.values())}
        self._held, self._packed, self._names = held, packed, tuple(arrays)
        self._buffers, self._lock = {}, threading.Lock()

    def _layer(self, held, packed, prefix):
        """The arrays of a layer in the order and shape of the loops."""
        def of(name):
            return held[f"{prefix}{name}"]

        rates = np.zeros(self.dim + 5 * self.heads, self.dtype)
        for place, name in ((1, "fast_decay"), (2, "slow_decay")):
            start = self.dim + place * self.heads
            rates[start : start + self.heads] = of(f"delta.{name}_proj.bias") + of(f"delta.{name}_bias")
        convs = [f"delta.{name}_conv1d" for name in "qkv"]
        fluxes = [tuple(of(f"delta.rule.{flux}.{name}") for name in ("hidden.weight", "hidden.bias", "out.weight", "out.bias"))
                  for flux in ("token_flux", "chunk_flux")]
        biases = {"qkv": None, "gates": rates, "out": None, "ffn_in": of("ffn_in.bias"), "ffn_out": of("ffn_out.bias")}
        return {
            **{name: Layer(packed[prefix + name], bias) for name, bias in biases.items()},
            "taps": np.ascontiguousarray(np.concatenate([of(f"{name}.weight")[:, 0] for name in convs]).T),
            "conv_bias": np.concatenate([of(f"{name}.bias") for name in convs]),
            "rule": (*fluxes, of("delta.rule.W_bilinear"), of("delta.rule.temp")),
            "o_norm": of("delta.o_norm.weight"),
            "norm_delta": (of("norm_delta.weight"), of("norm_delta.bias")),
            "norm_ffn": (of("norm_ffn.weight"), of("norm_ffn.bias")),
        }

    def arrays(self):
        """Copies of all arrays, flat, under torch's names, as `dtype`; what is stored in bfloat16 was kept besides as it was given."""
        found = {name: value.copy() for name, value in self._held.items()}
        for prefix, names in self._products.items():
            matrix, first = self._packed[prefix].matrix(), 0
            for name, rows in names.items():
                found.setdefault(name, matrix[first : first + rows].copy())
                first += rows
        return {name: found[name] for name in self._names}

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
            self._product(x, layer["qkv"], mixed)
            self._product(x, layer["gates"], mixed, 3 * dim, SIGMOID)
            arguments = (mixed, sentence, place, lengths, layer["taps"], layer["conv_bias"], row, qkv, rates, threads)
            to_heads[float](*arguments) if self.dtype == np.float32 else to_heads[double](*arguments)
            o, _ = delta_rule.hierarchical_forward(*qkv, *rates, *layer["rule"], mask, None, self.chunk_size, self.transform)
            arguments = (o, mixed, sentence, place, layer["o_norm"], self.rms_eps, gated, threads)
            from_heads[float](*arguments) if self.dtype == np.float32 else from_heads[double](*arguments)
            self._product(gated, layer["out"], y)
            self._normed(x, y, layer["norm_delta"])
            wide = self._buffer("wide", tokens, layer["ffn_in"].bias.size)
            self._product(x, layer["ffn_in"], wide, 0, GELU, self.repeats)
            self._product(wide, layer["ffn_out"], y)
            self._normed(x, y, layer["norm_ffn"])
            if hidden is not None:
                hidden.append(padded())
        embedding = np.empty((batch, dim), self.dtype)
        unit_means[float](x, starts, lengths, embedding) if self.dtype == np.float32 else unit_means[double](x, starts, lengths, embedding)
        return LamOutput(padded(), embedding, None if hidden is None else tuple(hidden))

    def _product(self, x, layer, y, column=0, activation=NONE, repeats=1):
        """y[:, column : column + O] = x @ weight.T + bias through the activation, `repeats` times."""
        outputs, inputs = layer.packed.outputs, layer.packed.inputs
        threads = threads_for(x.shape[0] * outputs, x.shape[0] * outputs * inputs)
        scratch = self._buffer("scratch", threads, inputs * WIDTH if layer.packed.storage == HALF else 1)  # of use without AVX2 alone
        arguments = (x, layer, activation, repeats, y, column, scratch, threads)
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
