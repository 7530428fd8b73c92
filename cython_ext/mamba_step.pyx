"""One token of one sequence through a whole GroundedMamba, in C from the embedding to the logits: nothing is allocated and no Python runs.

    decoder = Decoder(blocks, norm, head, sizes)             what `GroundedMambaEngine` folded and packed
    decoder.step(row, states, logits)                        row (D,) of the embedding; the states are moved on in place

Products are cut by shape alone and every head is computed by one thread: no result depends on the number of threads.
Letters: D width, N state, H heads, P head width, V vocabulary, M occupied slots, d width of a retrieval head.
"""

import threading

import numpy as np

from cython.parallel cimport parallel, prange, threadid
from libc.stdlib cimport calloc, free
from openmp cimport omp_get_num_threads

from cython_ext.algebra cimport real
from cython_ext.clones cimport cloned
from cython_ext.dense cimport NONE, SIGMOID, SOFTPLUS, Linear, combine, described, layer_norms, linear_layer, softmax
from cython_ext.wkv_parts cimport token

from cython_ext.threads import SERIAL_WORK, get_num_threads

cdef Py_ssize_t SERIAL = SERIAL_WORK

cdef struct Norm:
    const void* weight
    const void* bias

cdef struct Block:
    Norm ln_ssm, ln_rwkv, ln_out, state_norm, readout
    Linear step, update, receptance, key, value, query, gate, leave
    Linear* bank  # keys, then values, of every retrieval head; NULL without an occupied slot
    const void* turned  # transition.T
    const void* w
    const void* u
    const void* skip

cdef struct Room:  # where the parts of a step lie in the buffer, in entries
    Py_ssize_t x, a, b, r, k, v, y, joined, query, out, dt, update, mixed, scores, answer, g

cdef struct Model:
    Block* block
    Linear head
    Norm norm
    Room room
    Py_ssize_t depth, dim, n, heads, retrieval_heads
    double low, high, eps
    bint hard, gain, readout, learned
    int steps


cdef class Decoder:
    cdef Model model
    cdef object held, buffer, lock

    def __dealloc__(self):
        cdef Py_ssize_t i
        if self.model.block is not NULL:
            for i in range(self.model.depth):
                free(self.model.block[i].bank)
            free(self.model.block)

    def __init__(self, blocks, by, head, sizes):
        """`blocks`, the last norm `by` and `head` as `GroundedMambaEngine` holds them, `sizes` its `Sizes`; what they point to is kept."""
        cdef Model* e = &self.model
        cdef Py_ssize_t i, slots = 1
        if e.block is not NULL:
            raise ValueError("a Decoder is initialised once")
        e.depth, e.dim, e.n, e.heads, e.retrieval_heads = sizes.depth, sizes.dim, sizes.ssm_dim, sizes.rwkv_heads, sizes.retrieval_heads
        e.low, e.high, e.eps = sizes.dt_min, sizes.dt_max, sizes.norm_eps
        e.hard, e.gain = sizes.dt_clamp == "hard", sizes.time_first == "gain"
        e.readout, e.learned, e.steps = sizes.readout_norm, sizes.gate == "learned", blocks[0].steps
        self.held, self.lock = [blocks, by, head], threading.Lock()
        e.head, e.norm = described(head, None), affine(by)
        e.block = <Block*> calloc(e.depth, sizeof(Block))
        if e.block is NULL:
            raise MemoryError
        for i, block in enumerate(blocks):
            slots = max(slots, self.fill(&e.block[i], block))
        width = e.dim
        lengths = dict(
            x=width, a=width, b=width, r=width, k=width, v=width, y=width, joined=e.n + width, query=width, out=width, dt=2, update=e.n,
            mixed=e.n, scores=slots, answer=width, g=1)
        places, end = {}, 0
        for name, length in lengths.items():
            places[name] = end
            end += (length + 15) // 16 * 16
        e.room = places
        self.buffer = np.empty(end, by[0].dtype)

    cdef Py_ssize_t fill(self, Block* one, block) except -1:
        """Fill one struct in; returns the number of occupied slots, at least 1."""
        cdef Py_ssize_t h, heads = self.model.retrieval_heads
        turned = np.ascontiguousarray(block.transition.T)
        self.held.append(turned)
        one.ln_ssm, one.ln_rwkv, one.ln_out, one.state_norm = (
            affine(block.ln_ssm), affine(block.ln_rwkv), affine(block.ln_out), affine(block.state_norm))
        if self.model.readout:
            one.readout = affine(block.readout)
        one.step, one.update = described(block.step[0], block.step[1]), described(block.update, None)
        one.receptance, one.key, one.value = described(block.receptance, None), described(block.key, None), described(block.value, None)
        one.leave = described(block.leave, None)
        one.turned, one.w, one.u, one.skip = address(turned), address(block.w), address(block.u), address(block.skip)
        if self.model.learned:
            one.gate = described(block.gate[0], block.gate[1])
        if block.bank is None:
            return 1
        one.query = described(block.bank.query, None)
        one.bank = <Linear*> calloc(2 * heads, sizeof(Linear))
        if one.bank is NULL:
            raise MemoryError
        for h in range(heads):
            one.bank[h], one.bank[heads + h] = described(block.bank.keys[h], None), described(block.bank.values[h], None)
        return one.bank[0].outputs

    def step(self, row, states, logits):
        """row (D,), the states of one sequence, contiguous and writeable, logits (V,) to be written; all checked, of the dtype of the weights."""
        with self.lock:
            if logits.dtype == np.float32:
                run[float](&self.model, self.buffer, row, states, logits, get_num_threads())
            else:
                run[double](&self.model, self.buffer, row, states, logits, get_num_threads())


cdef const void* address(array):
    return <const void*> <size_t> array.__array_interface__["data"][0]


cdef Norm affine(pair):
    cdef Norm by
    by.weight, by.bias = address(pair[0]), address(pair[1])
    return by


cdef run(const Model* e, real[::1] buffer, const real[::1] row, states, real[::1] logits, int threads):
    cdef real* at = &buffer[0]
    cdef real[:, ::1] h
    cdef real[:, :, :, ::1] s
    cdef Py_ssize_t i, block
    # x = row; for block in blocks: x = block(x); logits = head(norm(x))
    for i in range(e.dim):
        at[e.room.x + i] = row[i]
    for block in range(e.depth):
        state = states[block]
        h, s = state["ssm"], state["wkv"]
        with nogil:
            through(e, &e.block[block], at, &h[0, 0], &s[0, 0, 0, 0], threads)
    with nogil:
        normed(&e.norm, at + e.room.x, e.dim, e.eps, at + e.room.a)
        product(&e.head, at + e.room.a, &logits[0], NONE, threads)


cdef void product(const Linear* layer, const real* x, real* y, int activation, int threads) noexcept nogil:
    if layer.inputs * layer.outputs < SERIAL or threads == 1:
        linear_layer(layer, 1, x, layer.inputs, y, layer.outputs, activation, <real*> NULL, 0, 1)
        return
    # y = activation(x @ W + b)
    with parallel(num_threads=threads):
        linear_layer(layer, 1, x, layer.inputs, y, layer.outputs, activation, <real*> NULL, threadid(), omp_get_num_threads())


cdef void normed(const Norm* by, const real* x, Py_ssize_t n, double eps, real* out) noexcept nogil:
    layer_norms(x, 1, n, <const real*> by.weight, <const real*> by.bias, <real> eps, NONE, out)


cdef cloned token_head(
    const real* r, const real* k, const real* v, const real* w, const real* u, real* state, real* y, Py_ssize_t n, bint gain,
) noexcept nogil:
    token(r, k, v, w, u, state, y, n, gain)


cdef inline real limited(real z, double low, double high) noexcept nogil:
    """Between low and high; NaN stays NaN."""
    if z < low:
        return <real> low
    return <real> high if z > high else z


cdef void scan(const Model* e, const Block* o, real* at, real* h, int threads) noexcept nogil:
    """joined[:N] = h = LN(h + dt_a * A h + dt_b * B a)."""
    cdef real* dt = at + e.room.dt
    cdef real* mixed = at + e.room.mixed
    cdef real* update = at + e.room.update
    cdef real scale = 1
    cdef Py_ssize_t i
    product(&o.step, at + e.room.a, dt, SOFTPLUS if e.hard else SIGMOID, threads)
    # dt = np.clip(dt, low, high) if hard else low + (high - low) * dt
    for i in range(e.steps):
        dt[i] = limited(dt[i], e.low, e.high) if e.hard else dt[i] * <real> (e.high - e.low) + <real> e.low
    if e.steps == 2:
        scale = dt[1] / <real> e.high
    product(&o.update, at + e.room.a, update, NONE, threads)
    combine(h, <const real*> o.turned, e.n, e.n, e.n, mixed, 0, 1)
    # mixed = h + dt_a * mixed + dt_b * update
    for i in range(e.n):
        mixed[i] = h[i] + dt[0] * mixed[i] + scale * update[i]
    normed(&o.state_norm, mixed, e.n, e.eps, h)
    for i in range(e.n):
        at[e.room.joined + i] = h[i]


cdef void remember(const Model* e, const Block* o, real* at, real* s, int threads) noexcept nogil:
    """joined[N:] = norm(WKV(r, k, v)) + what the bank answers."""
    cdef Py_ssize_t p = e.dim // e.heads, d, head, i
    cdef const real* b = at + e.room.b
    cdef const real* w = <const real*> o.w
    cdef const real* u = <const real*> o.u
    cdef const real* weight = <const real*> o.readout.weight
    cdef const real* bias = <const real*> o.readout.bias
    cdef real* r = at + e.room.r
    cdef real* k = at + e.room.k
    cdef real* v = at + e.room.v
    cdef real* y = at + e.room.y
    cdef real* read = at + e.room.joined + e.n
    cdef int several = threads if 3 * e.heads * p * p >= SERIAL else 1
    product(&o.receptance, b, r, SIGMOID, threads)
    product(&o.key, b, k, NONE, threads)
    product(&o.value, b, v, NONE, threads)
    # for head in range(H): y[head], s[head] = one token
    for head in prange(e.heads, schedule="static", num_threads=several):
        token_head(r + head * p, k + head * p, v + head * p, w + head * p, u + head * p, s + head * p * p, y + head * p, p, e.gain)
    # read = norm(y) if readout else y, head by head
    if e.readout:
        for head in range(e.heads):
            layer_norms(y + head * p, 1, p, weight + head * p, bias + head * p, <real> e.eps, NONE, read + head * p)
    else:
        for i in range(e.dim):
            read[i] = y[i]
    if o.bank is NULL:
        return
    d = e.dim // e.retrieval_heads
    product(&o.query, b, at + e.room.query, NONE, threads)
    # read[head] += softmax(query[head] @ keys[head].T) @ values[head]
    for head in range(e.retrieval_heads):
        product(&o.bank[head], at + e.room.query + head * d, at + e.room.scores, NONE, threads)
        softmax(at + e.room.scores, o.bank[head].outputs)
        product(&o.bank[e.retrieval_heads + head], at + e.room.scores, at + e.room.answer, NONE, threads)
        for i in range(d):
            read[head * d + i] += at[e.room.answer + i]


cdef void through(const Model* e, const Block* o, real* at, real* h, real* s, int threads) noexcept nogil:
    """x = x + LN_out([g h, (1 - g) readout] @ leave.T + g skip * a), the states in place."""
    cdef real* x = at + e.room.x
    cdef real* a = at + e.room.a
    cdef real* b = at + e.room.b
    cdef real* joined = at + e.room.joined
    cdef real* out = at + e.room.out
    cdef const real* skip = <const real*> o.skip
    cdef real g = 1
    cdef Py_ssize_t i
    normed(&o.ln_ssm, x, e.dim, e.eps, a)
    scan(e, o, at, h, threads)
    normed(&o.ln_rwkv, x, e.dim, e.eps, b)
    remember(e, o, at, s, threads)
    if e.learned:
        product(&o.gate, x, at + e.room.g, SIGMOID, threads)
        g = at[e.room.g]
        # joined = [g * h, (1 - g) * read]
        for i in range(e.n):
            joined[i] *= g
        for i in range(e.n, e.n + e.dim):
            joined[i] *= 1 - g
    product(&o.leave, joined, out, NONE, threads)
    # x = x + LN_out(g * skip * a + out)
    for i in range(e.dim):
        a[i] = g * (skip[i] * a[i]) + out[i]
    normed(&o.ln_out, a, e.dim, e.eps, b)
    for i in range(e.dim):
        x[i] += b[i]
