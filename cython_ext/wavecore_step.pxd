# One step of WaveCore as C: what the engine fills in, and the call. Pointers are to float or double, as `single` says.

from cython_ext.dense cimport Linear

cdef struct Norm:
    const void* weight
    const void* bias

cdef struct Level:
    Linear project, gate
    Py_ssize_t slots, width, memory, keys, norms, scale, value, key  # the last but two: entries from the beginning of the state; of `fresh`
    void* attention
    void* content
    double keep

cdef struct Core:
    Py_ssize_t batch, levels, d_s, d_w, d_p, d_e, d_k, d_c, inner, states, joined, fresh, decoded, obs_dim, output_dim
    Py_ssize_t s, w, p, private_step
    int rule, selective, continuous, action_head, value_head, world_head
    double threshold, limit, dt_scale, dt_min
    Level* level
    Linear obs_in, obs_out, action, reward, join_in, join_out, query_in, query_out, mixing, z_proj, particle_in, particle_out, gate, u_p, u_w
    Linear wave_in, wave_gate, dt_proj, b_proj, c_proj, wave_out, modulation, b_net, a_u, a_v, new, hidden_in, hidden_out, action_out, value_out
    Linear world_out
    Norm obs_norm, join_norm, norm, query_norm, particle_norm, hidden_norm
    const void* a
    const void* b_base
    const void* c_base
    const void* d
    const void* diagonal
    void* state  # the arrays of `state_shapes`, one after another
    void* private  # private_step entries for every thread
    void* x_obs
    void* a_prev
    void* r_t
    void* hidden
    void* joined_row
    void* encoded
    void* sec  # s, e and c side by side; the rest alike
    void* zc
    void* pc
    void* ser
    void* sc
    void* query
    void* answers
    void* mix
    void* gated
    void* channels
    void* carry
    void* wave
    void* particle
    void* from_p
    void* from_w
    void* modulated
    void* low
    void* lifted
    void* fresh_row
    void* open
    void* decoded_row
    void* y
    void* value
    void* next_obs


# One step from the inputs in their buffers; y, the other heads and the state are in theirs afterwards
cdef void run(const Core* e, bint single, int threads) noexcept nogil
