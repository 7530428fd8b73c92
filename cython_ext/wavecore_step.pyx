"""One step of WaveCore over buffers that the engine allocates once.

The equations are those of `torch_impl/wavecore.py`, with the memory kept lazily as in `cms.pyx`. All threads walk through the same phases and
meet at a barrier after each; a phase is cut into blocks by shape alone, so that no result depends on the number of threads.
Letters: B batch, n slots and d width of a level, d_* the widths of WaveCore.
"""

from cython.parallel cimport parallel, threadid
from libc.string cimport memcpy
from openmp cimport omp_get_num_threads

from cython_ext.algebra cimport real
from cython_ext.clones cimport cloned, inlined
from cython_ext.cms cimport next_scale, score, write_one
from cython_ext.dense cimport NONE, RELU, SIGMOID, SOFTPLUS, TANH, Linear, combine, layer_norms, linear_layer, softmax
from cython_ext.wave cimport wave_channels

cdef extern from *:
    """
    static inline void groundwave_barrier(void) {
        _Pragma("omp barrier")
    }
    """
    void groundwave_barrier() noexcept nogil

cdef enum:
    LN_EPS = 1000000  # 1 / eps of every LayerNorm

cdef inline void meet(Py_ssize_t parts) noexcept nogil:
    if parts > 1:
        groundwave_barrier()


cdef const real* normed(const Core* e, const Norm* norm, real* x, Py_ssize_t n, Py_ssize_t part, Py_ssize_t parts) noexcept nogil:
    """relu(LN(x)) of x (B, n). One row is quicker computed by every thread for itself than waited for."""
    cdef real* own = <real*> e.private + part * e.private_step
    cdef Py_ssize_t low = part * e.batch // parts, high = (part + 1) * e.batch // parts
    if e.batch == 1:
        layer_norms(x, 1, n, <const real*> norm.weight, <const real*> norm.bias, <real> 1 / LN_EPS, RELU, own)
        return own
    layer_norms(x + low * n, high - low, n, <const real*> norm.weight, <const real*> norm.bias, <real> 1 / LN_EPS, RELU, x + low * n)
    meet(parts)
    return x


cdef inlined apply(
    const Core* e, const Linear* layer, const void* x, Py_ssize_t step_x, void* y, Py_ssize_t step_y, int activation, real* kind, Py_ssize_t part,
    Py_ssize_t parts,
) noexcept nogil:
    """This part of y = activation(layer(x)); `kind` says of which type the pointers are."""
    linear_layer(layer, e.batch, <const real*> x, step_x, <real*> y, step_y, activation, <real*> e.private + part * e.private_step, part, parts)


cdef inlined encode(const Core* e, real* kind, Py_ssize_t part, Py_ssize_t parts) noexcept nogil:
    """e, into its places beside s."""
    cdef Py_ssize_t b, width = e.d_e, step = e.d_s + e.d_e + e.d_c
    cdef real* joined = <real*> e.joined_row
    cdef real* state = <real*> e.state
    apply(e, &e.obs_in, e.x_obs, e.obs_dim, e.hidden, 2 * width, NONE, kind, part, parts)
    apply(e, &e.action, e.a_prev, e.action.inputs, joined + width, e.joined, RELU, kind, part, parts)
    apply(e, &e.reward, e.r_t, 1, joined + width + width // 2, e.joined, RELU, kind, part, parts)
    for b in range(part * e.batch // parts, (part + 1) * e.batch // parts):
        memcpy(<real*> e.sec + b * step, state + e.s + b * e.d_s, e.d_s * sizeof(real))
        memcpy(<real*> e.pc + b * (e.d_p + e.d_c), state + e.p + b * e.d_p, e.d_p * sizeof(real))
    meet(parts)
    apply(e, &e.obs_out, normed(e, &e.obs_norm, <real*> e.hidden, 2 * width, part, parts), 2 * width, joined, e.joined, NONE, kind, part, parts)
    meet(parts)
    apply(e, &e.join_in, joined, e.joined, e.hidden, 2 * width, NONE, kind, part, parts)
    meet(parts)
    apply(e, &e.join_out, normed(e, &e.join_norm, <real*> e.hidden, 2 * width, part, parts), 2 * width, e.encoded, width, NONE, kind, part, parts)
    meet(parts)
    for b in range(part * e.batch // parts, (part + 1) * e.batch // parts):
        layer_norms(<real*> e.encoded + b * width, 1, width, <const real*> e.norm.weight, <const real*> e.norm.bias, <real> 1 / LN_EPS, NONE,
                    <real*> e.sec + b * step + e.d_s)
        memcpy(<real*> e.ser + b * (e.d_s + width + 1) + e.d_s, <real*> e.sec + b * step + e.d_s, width * sizeof(real))
        (<real*> e.ser)[b * (e.d_s + width + 1) + e.d_s + width] = (<real*> e.r_t)[b]
    meet(parts)


cdef cloned scale_cloned(real* x, real by, Py_ssize_t low, Py_ssize_t high) noexcept nogil:
    cdef Py_ssize_t i
    # x = by * x
    for i in range(low, high):
        x[i] = by * x[i]


cdef cloned mix_cloned(const real* answers, const real* mix, Py_ssize_t levels, Py_ssize_t width, real* out) noexcept nogil:
    cdef Py_ssize_t level, i
    # out = mix @ answers.reshape(levels, width)
    for i in range(width):
        out[i] = mix[0] * answers[i]
    for level in range(1, levels):
        for i in range(width):
            out[i] += mix[level] * answers[level * width + i]


cdef inlined recall(const Core* e, real* kind, Py_ssize_t part, Py_ssize_t parts) noexcept nogil:
    """The query, the attention of every level and the context, into its places; and z, which needs nothing of these."""
    cdef Py_ssize_t b, l, job, step = e.d_s + e.d_e + e.d_c, width = e.d_s + e.d_e, low, high
    cdef const Level* level
    cdef real* state = <real*> e.state
    cdef real* context
    apply(e, &e.query_in, e.sec, step, e.hidden, width, NONE, kind, part, parts)
    apply(e, &e.z_proj, <real*> e.sec + e.d_s, step, e.zc, e.d_p + e.d_c, NONE, kind, part, parts)
    meet(parts)
    apply(e, &e.query_out, normed(e, &e.query_norm, <real*> e.hidden, width, part, parts), width, e.query, e.d_k, NONE, kind, part, parts)
    meet(parts)
    for l in range(e.levels):
        level = &e.level[l]
        for b in range(e.batch):
            score(<real*> e.query + b * e.d_k, state + level.keys + b * level.slots * e.d_k, level.slots, e.d_k, state[level.scale],
                  <real*> level.attention + b * level.slots, part, parts)
    meet(parts)
    for job in range(part * e.levels * e.batch // parts, (part + 1) * e.levels * e.batch // parts):
        level = &e.level[job % e.levels]
        softmax(<real*> level.attention + job // e.levels * level.slots, level.slots)
    meet(parts)
    for l in range(e.levels):
        level = &e.level[l]
        for b in range(e.batch):
            combine(<real*> level.attention + b * level.slots, state + level.memory + b * level.slots * level.width, level.slots, level.width,
                    level.width, <real*> level.content + b * level.width, part, parts)
    meet(parts)
    for l in range(e.levels):
        level = &e.level[l]
        # U (scale content) as scale (U content): the layer sees every content once, whatever the threads
        apply(e, &level.project, level.content, level.width, <real*> e.answers + l * e.d_c, e.levels * e.d_c, NONE, kind, part, parts)
    meet(parts)
    for b in range(part * e.batch // parts, (part + 1) * e.batch // parts):
        for l in range(e.levels):
            scale_cloned(<real*> e.answers + (b * e.levels + l) * e.d_c, state[e.level[l].scale], 0, e.d_c)
        linear_layer(&e.mixing, 1, <real*> e.answers + b * e.levels * e.d_c, e.levels * e.d_c, <real*> e.mix + b * e.levels, e.levels, NONE,
                     <real*> e.private + part * e.private_step, 0, 1)
        softmax(<real*> e.mix + b * e.levels, e.levels)
        context = <real*> e.sec + b * step + width
        mix_cloned(<real*> e.answers + b * e.levels * e.d_c, <real*> e.mix + b * e.levels, e.levels, e.d_c, context)
        memcpy(<real*> e.zc + b * (e.d_p + e.d_c) + e.d_p, context, e.d_c * sizeof(real))
        memcpy(<real*> e.pc + b * (e.d_p + e.d_c) + e.d_p, context, e.d_c * sizeof(real))
        memcpy(<real*> e.sc + b * (e.d_s + e.d_c) + e.d_s, context, e.d_c * sizeof(real))
    meet(parts)


cdef cloned dt_cloned(real* dt, real scale, real least, Py_ssize_t low, Py_ssize_t high) noexcept nogil:
    cdef Py_ssize_t i
    # dt = dt * scale + least
    for i in range(low, high):
        dt[i] = dt[i] * scale + least


cdef cloned times_cloned(real* x, const real* y, Py_ssize_t low, Py_ssize_t high) noexcept nogil:
    cdef Py_ssize_t i
    # x = x * y
    for i in range(low, high):
        x[i] *= y[i]


cdef cloned plus_cloned(const real* x, real* y, Py_ssize_t low, Py_ssize_t high) noexcept nogil:
    cdef Py_ssize_t i
    # y = x + y
    for i in range(low, high):
        y[i] = x[i] + y[i]


cdef cloned halves_cloned(const real* x, real* y, Py_ssize_t low, Py_ssize_t high) noexcept nogil:
    cdef Py_ssize_t i
    # y = 0.5 * x + 0.5 * y
    for i in range(low, high):
        y[i] = <real> 0.5 * x[i] + <real> 0.5 * y[i]


cdef cloned linear_wave_cloned(
    const real* modulation, const real* diagonal, const real* w, const real* lifted, real* wave, Py_ssize_t low, Py_ssize_t high,
) noexcept nogil:
    cdef Py_ssize_t i
    # wave = modulation * (diagonal * w + lifted) + wave
    for i in range(low, high):
        wave[i] = modulation[i] * (diagonal[i] * w[i] + lifted[i]) + wave[i]


cdef cloned clip_cloned(const real* x, real* out, real limit, Py_ssize_t low, Py_ssize_t high) noexcept nogil:
    cdef Py_ssize_t i
    # out = np.clip(x, -limit, limit) if limit else x
    for i in range(low, high):
        out[i] = x[i] if limit == 0 else (limit if x[i] > limit else (-limit if x[i] < -limit else x[i]))


cdef cloned fast_cloned(
    const real* s, const real* g, const real* from_p, const real* from_w, real* out, Py_ssize_t low, Py_ssize_t high,
) noexcept nogil:
    cdef Py_ssize_t i
    # out = s + g * from_p + (1 - g) * from_w
    for i in range(low, high):
        out[i] = s[i] + g[i] * from_p[i] + (1 - g[i]) * from_w[i]


cdef inlined move(const Core* e, real* kind, Py_ssize_t part, Py_ssize_t parts) noexcept nogil:
    """The next s, w and p, into the state and beside e and c."""
    cdef Py_ssize_t b, low, high, size = e.batch * e.inner, step = e.d_s + e.d_e + e.d_c, width = e.d_p + e.d_c
    cdef real* state = <real*> e.state
    cdef real* u = <real*> e.channels
    cdef real* dt = u + size
    cdef real* y = u + 4 * size
    cdef real* own
    apply(e, &e.gate, e.sec, step, e.gated, e.d_s, SIGMOID, kind, part, parts)
    apply(e, &e.particle_in, e.pc, width, e.hidden, width, NONE, kind, part, parts)
    if e.selective:
        apply(e, &e.wave_in, e.zc, width, u, e.inner, NONE, kind, part, parts)
        apply(e, &e.wave_gate, e.zc, width, u + 5 * size, e.inner, SIGMOID, kind, part, parts)
    else:
        apply(e, &e.modulation, <real*> e.zc + e.d_p, width, e.modulated, e.d_w, TANH, kind, part, parts)
        apply(e, &e.b_net, e.zc, width, e.wave, e.d_w, NONE, kind, part, parts)
        apply(e, &e.a_v, state + e.w, e.d_w, e.low, e.a_v.outputs, NONE, kind, part, parts)
    meet(parts)
    if e.selective:
        apply(e, &e.dt_proj, u, e.inner, dt, e.inner, SOFTPLUS, kind, part, parts)
        apply(e, &e.b_proj, u, e.inner, u + 2 * size, e.inner, NONE, kind, part, parts)
        apply(e, &e.c_proj, u, e.inner, u + 3 * size, e.inner, NONE, kind, part, parts)
    else:
        apply(e, &e.a_u, e.low, e.a_u.inputs, e.lifted, e.d_w, NONE, kind, part, parts)
    apply(e, &e.particle_out, normed(e, &e.particle_norm, <real*> e.hidden, width, part, parts), width, e.particle, e.d_p, NONE, kind, part, parts)
    meet(parts)
    low, high = part * e.inner // parts, (part + 1) * e.inner // parts
    for b in range(e.batch):
        plus_cloned(state + e.p + b * e.d_p, <real*> e.particle + b * e.d_p, part * e.d_p // parts, (part + 1) * e.d_p // parts)
        if e.selective:
            own = u + b * e.inner
            dt_cloned(own + size, <real> e.dt_scale, <real> e.dt_min, low, high)
            wave_channels(own, state + e.w + b * e.d_w, own + size, own + 2 * size, own + 3 * size, <const real*> e.a, <const real*> e.b_base,
                          <const real*> e.c_base, <const real*> e.d, e.states, own + 4 * size, <real*> e.carry + b * e.d_w, low, high)
            times_cloned(own + 4 * size, own + 5 * size, low, high)
        else:
            linear_wave_cloned(<real*> e.modulated + b * e.d_w, <const real*> e.diagonal, state + e.w + b * e.d_w, <real*> e.lifted + b * e.d_w,
                               <real*> e.wave + b * e.d_w, part * e.d_w // parts, (part + 1) * e.d_w // parts)
    meet(parts)
    apply(e, &e.u_p, e.particle, e.d_p, e.from_p, e.d_s, NONE, kind, part, parts)
    if e.selective:
        apply(e, &e.wave_out, y, e.inner, e.wave, e.d_w, NONE, kind, part, parts)
        meet(parts)
        halves_cloned(<real*> e.carry, <real*> e.wave, part * e.batch * e.d_w // parts, (part + 1) * e.batch * e.d_w // parts)
        meet(parts)
    apply(e, &e.u_w, e.wave, e.d_w, e.from_w, e.d_s, NONE, kind, part, parts)
    meet(parts)
    low, high = part * e.d_s // parts, (part + 1) * e.d_s // parts
    for b in range(e.batch):
        own = state + e.s + b * e.d_s
        fast_cloned(<real*> e.sec + b * step, <real*> e.gated + b * e.d_s, <real*> e.from_p + b * e.d_s, <real*> e.from_w + b * e.d_s, own, low, high)
        clip_cloned(own, own, <real> e.limit, low, high)
        memcpy(<real*> e.ser + b * (e.d_s + e.d_e + 1) + low, own + low, (high - low) * sizeof(real))
        memcpy(<real*> e.sc + b * (e.d_s + e.d_c) + low, own + low, (high - low) * sizeof(real))
    clip_cloned(<real*> e.wave, state + e.w, <real> e.limit, part * e.batch * e.d_w // parts, (part + 1) * e.batch * e.d_w // parts)
    clip_cloned(<real*> e.particle, state + e.p, <real> e.limit, part * e.batch * e.d_p // parts, (part + 1) * e.batch * e.d_p // parts)
    meet(parts)


cdef inlined remember_and_decode(const Core* e, real* kind, Py_ssize_t part, Py_ssize_t parts) noexcept nogil:
    """One row of every level, and the heads."""
    cdef Py_ssize_t b, l, job, width = e.d_s + e.d_c, step = e.d_s + e.d_e + 1
    cdef const Level* level
    cdef real* state = <real*> e.state
    cdef real* fresh
    apply(e, &e.new, e.ser, step, e.fresh_row, e.fresh, NONE, kind, part, parts)
    apply(e, &e.hidden_in, e.sc, width, e.hidden, width, NONE, kind, part, parts)
    for l in range(e.levels):
        apply(e, &e.level[l].gate, e.ser, step, <real*> e.open + l, e.levels, SIGMOID, kind, part, parts)
    meet(parts)
    apply(e, &e.hidden_out, normed(e, &e.hidden_norm, <real*> e.hidden, width, part, parts), width, e.decoded_row, e.decoded, RELU, kind, part, parts)
    for job in range(part * e.levels * e.batch // parts, (part + 1) * e.levels * e.batch // parts):
        b, level = job // e.levels, &e.level[job % e.levels]
        fresh = <real*> e.fresh_row + b * e.fresh
        write_one(state + level.memory + b * level.slots * level.width, state + level.keys + b * level.slots * e.d_k,
                  state + level.norms + b * level.slots, level.slots, level.width, e.d_k, fresh + level.value, fresh + level.key,
                  (<real*> e.open)[job], <real> level.keep * state[level.scale], e.rule, <real> e.threshold, -1, False)
    meet(parts)
    if e.action_head:
        apply(e, &e.action_out, e.decoded_row, e.decoded, e.y, e.output_dim, TANH if e.continuous else NONE, kind, part, parts)
    if e.value_head:
        apply(e, &e.value_out, e.decoded_row, e.decoded, e.value, 1, NONE, kind, part, parts)
    if e.world_head:
        apply(e, &e.world_out, e.decoded_row, e.decoded, e.next_obs, e.obs_dim, NONE, kind, part, parts)
    if part == 0:
        for l in range(e.levels):
            state[e.level[l].scale] = next_scale(state[e.level[l].scale], <real> e.level[l].keep)


cdef void advance(const Core* e, real* kind, Py_ssize_t part, Py_ssize_t parts) noexcept nogil:
    encode(e, kind, part, parts)
    recall(e, kind, part, parts)
    move(e, kind, part, parts)
    remember_and_decode(e, kind, part, parts)


cdef void run(const Core* e, bint single, int threads) noexcept nogil:
    with parallel(num_threads=threads):
        if single:
            advance(e, <float*> NULL, threadid(), omp_get_num_threads())
        else:
            advance(e, <double*> NULL, threadid(), omp_get_num_threads())
