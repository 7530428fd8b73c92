"""WaveCore: a recurrent core that reads and writes a memory of several levels (CMS) while three states advance.

    e       = encoder(x_obs, a_prev, r_t)                       q, c = CMS read(s, e)
    w~      = wave(w, [z; c]),  z = W_z e                       p~ = p + W_2 relu(LN(W_1 [p; c]))
    s~      = s + g U_p p~ + (1 - g) U_w w~,  g = sigmoid(W_g [s; e; c])
    s, w, p = clip(s~), clip(w~), clip(p~);  CMS write(s, e, r);  heads of the decoder on [s; c]

Calling it takes and gives the memory as it is. `step` and `rollout` carry a `CoreState`, in which the decay of the memory is lazy.
Source: ContinuonBrain's CoreModel. Letters: B batch, T time, n slots of a level, d width of a level, d_* as in `WaveCoreConfig`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from conf.models import WaveCoreConfig
from jax_impl.layers import layer_norm
from jax_impl.ops import cms
from jax_impl.ops.wave import linear_step, saturate, selective_step, softplus
from jax_impl.state import CoreState, check_core, check_time

LN_EPS = 1e-6
Levels = tuple[Array, ...]
Info = dict[str, Any]


class Encoder(nnx.Module):
    """Observation, previous action and reward as one vector."""

    def __init__(self, config: WaveCoreConfig, obs_dim: int, action_dim: int, *, rngs: nnx.Rngs) -> None:
        width = config.d_e
        self.obs_in = dense(obs_dim, 2 * width, rngs=rngs)
        self.obs_norm = layer_norm(2 * width, LN_EPS, rngs=rngs)
        self.obs_out = dense(2 * width, width, rngs=rngs)
        self.action = dense(action_dim, width // 2, rngs=rngs)
        self.reward = dense(1, width // 4, rngs=rngs)
        self.join_in = dense(width + width // 2 + width // 4, 2 * width, rngs=rngs)
        self.join_norm = layer_norm(2 * width, LN_EPS, rngs=rngs)
        self.join_out = dense(2 * width, width, rngs=rngs)
        self.norm = layer_norm(width, LN_EPS, rngs=rngs)

    def __call__(self, x_obs: Array, a_prev: Array, r_t: Array) -> Array:
        """x_obs (..., obs), a_prev (..., action), r_t (..., 1). Returns e (..., d_e)."""
        o = self.obs_out(jax.nn.relu(self.obs_norm(self.obs_in(x_obs))))
        a, r = jax.nn.relu(self.action(a_prev)), jax.nn.relu(self.reward(r_t))
        return self.norm(self.join_out(jax.nn.relu(self.join_norm(self.join_in(jnp.concatenate([o, a, r], -1))))))


class CMSRead(nnx.Module):
    """Attention over the slots of every level, and a mixture of what the levels answer."""

    def __init__(self, config: WaveCoreConfig, *, rngs: nnx.Rngs) -> None:
        width = config.d_s + config.d_e
        self.query_in = dense(width, width, rngs=rngs)
        self.query_norm = layer_norm(width, LN_EPS, rngs=rngs)
        self.query_out = dense(width, config.d_k, rngs=rngs)
        self.level_proj = nnx.List(dense(size, config.d_c, bias=False, rngs=rngs) for size in config.cms_dims)
        self.mixing = dense(config.num_levels * config.d_c, config.num_levels, rngs=rngs)

    def __call__(self, s: Array, e: Array, memories: Levels, keys: Levels, scales: Levels | None = None) -> tuple[Array, Array, Levels]:
        """s (B, d_s), e (B, d_e), per level (B, n, d), (B, n, d_k), and () where the memory is lazy. Returns query, context, attention."""
        query = self.query_out(jax.nn.relu(self.query_norm(self.query_in(jnp.concatenate([s, e], -1)))))  # (B, d_k)
        attention, answers = [], []
        for level, project in enumerate(self.level_proj):
            weights, content = cms.read(query, memories[level], keys[level], None if scales is None else scales[level])
            attention.append(weights)
            answers.append(project(content))  # (B, d_c)
        mix = jax.nn.softmax(self.mixing(jnp.concatenate(answers, -1)), -1)  # (B, levels)
        context = (mix[..., None] * jnp.stack(answers, -2)).sum(-2)  # (B, d_c)
        return query, context, tuple(attention)


class SelectiveSSM(nnx.Module):
    """A selective state space of one step, whose carry is the wave state."""

    def __init__(self, config: WaveCoreConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, state = config.d_w // config.mamba_state_dim, config.mamba_state_dim
        self.a_raw, self.B_base, self.C_base = (normal(0.02, width, state, rngs=rngs) for _ in range(3))
        self.D = nnx.Param(jnp.zeros(width, jnp.float32))
        self.dt_proj, self.b_proj, self.c_proj = (dense(width, width, rngs=rngs) for _ in range(3))

    def __call__(self, u: Array, carry: Array) -> tuple[Array, Array]:
        """u (B, d_i), carry (B, d_i, state). Returns y (B, d_i) and the next carry."""
        dt = softplus(self.dt_proj(u)) * self.config.mamba_dt_scale + self.config.mamba_dt_min
        return selective_step(u, carry, dt, self.b_proj(u), self.c_proj(u), self.a_raw[...], self.B_base[...], self.C_base[...], self.D[...])


class MambaWave(nnx.Module):
    """The wave state as a gated selective state space."""

    def __init__(self, config: WaveCoreConfig, *, rngs: nnx.Rngs) -> None:
        inner = config.d_w // config.mamba_state_dim
        self.wave_in = dense(config.d_p + config.d_c, inner, rngs=rngs)
        self.gate_proj = dense(config.d_p + config.d_c, inner, rngs=rngs)
        self.wave_out = dense(inner, config.d_w, rngs=rngs)
        self.ssm = SelectiveSSM(config, rngs=rngs)
        self.state_dim = config.mamba_state_dim

    def __call__(self, w: Array, z: Array, c: Array) -> Array:
        """w (B, d_w), z (B, d_p), c (B, d_c). Returns the next w (B, d_w), not clipped."""
        zc = jnp.concatenate([z, c], -1)
        y, h = self.ssm(self.wave_in(zc), w.reshape(*w.shape[:-1], -1, self.state_dim))  # (B, d_i), (B, d_i, state)
        return 0.5 * h.reshape(w.shape) + 0.5 * self.wave_out(y * jax.nn.sigmoid(self.gate_proj(zc)))


class LinearWave(nnx.Module):
    """The wave state as a linear map, diagonal plus low rank, whose rows the context modulates."""

    def __init__(self, config: WaveCoreConfig, *, rngs: nnx.Rngs) -> None:
        width = config.d_w
        self.A_diag = nnx.Param(jnp.zeros(width, jnp.float32))
        self.A_U, self.A_V = (normal(0.01, width, width // 4, rngs=rngs) for _ in range(2))
        self.A_modulation = dense(config.d_c, width, rngs=rngs)
        self.B_net = dense(config.d_c + config.d_p, width, rngs=rngs)

    def __call__(self, w: Array, z: Array, c: Array) -> Array:
        """w (B, d_w), z (B, d_p), c (B, d_c). Returns the next w (B, d_w), not clipped."""
        return linear_step(w, self.A_diag[...], self.A_U[...], self.A_V[...], self.A_modulation(c)) + self.B_net(jnp.concatenate([c, z], -1))


class HopeCore(nnx.Module):
    """The three states, one step on."""

    def __init__(self, config: WaveCoreConfig, *, rngs: nnx.Rngs) -> None:
        self.limit = config.state_saturation_limit
        xavier = nnx.initializers.xavier_uniform()
        self.U_p, self.U_w = (nnx.Param(xavier(rngs.params(), (config.d_s, width), jnp.float32)) for width in (config.d_p, config.d_w))
        self.z_proj = dense(config.d_e, config.d_p, rngs=rngs)
        self.particle_in = dense(config.d_p + config.d_c, config.d_p + config.d_c, rngs=rngs)
        self.particle_norm = layer_norm(config.d_p + config.d_c, LN_EPS, rngs=rngs)
        self.particle_out = dense(config.d_p + config.d_c, config.d_p, rngs=rngs)
        self.gate = dense(config.d_s + config.d_e + config.d_c, config.d_s, rngs=rngs)
        self.wave = (MambaWave if config.use_mamba_wave else LinearWave)(config, rngs=rngs)

    def __call__(self, s: Array, w: Array, p: Array, e: Array, c: Array) -> tuple[Array, Array, Array]:
        """s (B, d_s), w (B, d_w), p (B, d_p), e (B, d_e), c (B, d_c). Returns the next s, w and p, clipped."""
        w = self.wave(w, self.z_proj(e), c)
        p = p + self.particle_out(jax.nn.relu(self.particle_norm(self.particle_in(jnp.concatenate([p, c], -1)))))
        g = jax.nn.sigmoid(self.gate(jnp.concatenate([s, e, c], -1)))
        from_p, from_w = (jnp.einsum("...i,oi->...o", x, u[...]) for x, u in ((p, self.U_p), (w, self.U_w)))  # `@ .mT` transposes in memory first
        s = s + g * from_p + (1 - g) * from_w
        return saturate(s, self.limit), saturate(w, self.limit), saturate(p, self.limit)


class CMSWrite(nnx.Module):
    """Decay of every level, and one row of each."""

    def __init__(self, config: WaveCoreConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width = config.d_s + config.d_e
        self.value = nnx.List(dense(width, size, rngs=rngs) for size in config.cms_dims)
        self.key = nnx.List(dense(width, config.d_k, rngs=rngs) for _ in config.cms_dims)
        self.gate = nnx.List(dense(width + 1, 1, rngs=rngs) for _ in config.cms_dims)

    def __call__(
        self, s: Array, e: Array, r: Array, memories: Levels, keys: Levels, norms: Levels | None = None, scales: Levels | None = None
    ) -> tuple[Levels, ...]:
        """s (B, d_s), e (B, d_e), r (B, 1) and the memory. Returns memories and keys, and norms and scales where they are given."""
        se = jnp.concatenate([s, e], -1)
        ser = jnp.concatenate([se, r], -1)
        written = []
        for level, decay in enumerate(self.config.cms_decays):
            new = self.value[level](se), self.key[level](se), jax.nn.sigmoid(self.gate[level](ser))
            rule = {"rule": self.config.cms_write, "threshold": self.config.salience_threshold}
            if norms is None or scales is None:
                written.append(cms.write(memories[level], keys[level], *new, decay, **rule))
            else:
                written.append(cms.write_lazy(memories[level], keys[level], norms[level], scales[level], *new, decay, **rule))
        return tuple(zip(*written, strict=True))


class Decoder(nnx.Module):
    """The heads: action, value of the state, next observation."""

    def __init__(self, config: WaveCoreConfig, obs_dim: int, output_dim: int, *, rngs: nnx.Rngs) -> None:
        width = config.d_s + config.d_c
        self.continuous = config.output_type == "continuous"
        self.hidden_in = dense(width, width, rngs=rngs)
        self.hidden_norm = layer_norm(width, LN_EPS, rngs=rngs)
        self.hidden_out = dense(width, width // 2, rngs=rngs)
        self.action = dense(width // 2, output_dim, rngs=rngs) if "action" in config.heads else None
        self.value = dense(width // 2, 1, rngs=rngs) if "value" in config.heads else None
        self.world_model = dense(width // 2, obs_dim, rngs=rngs) if "world_model" in config.heads else None

    def __call__(self, s: Array, c: Array) -> tuple[Array | None, Info]:
        """s (..., d_s), c (..., d_c). Returns y (..., output), None without the action head, and the other heads by name."""
        h = jax.nn.relu(self.hidden_out(jax.nn.relu(self.hidden_norm(self.hidden_in(jnp.concatenate([s, c], -1))))))
        y = None if self.action is None else self.action(h)
        heads = {} if self.value is None else {"value": self.value(h)}
        if self.world_model is not None:
            heads["next_obs"] = self.world_model(h)
        return jnp.tanh(y) if self.continuous and y is not None else y, heads


class WaveCore(nnx.Module):
    """The whole core. Every method takes a batch axis on all of its tensors, or on none.

    Raises ValueError, naming the argument, for wrong widths, levels that do not match, a batch that differs between arguments, another
    dtype than the weights', and values that are not finite.
    """

    def __init__(self, config: WaveCoreConfig, obs_dim: int, action_dim: int, output_dim: int, *, rngs: nnx.Rngs) -> None:
        self.config = config.sized(obs_dim, action_dim, output_dim)
        self.encoder = Encoder(config, obs_dim, action_dim, rngs=rngs)
        self.cms_read = CMSRead(config, rngs=rngs)
        self.core = HopeCore(config, rngs=rngs)
        self.cms_write = CMSWrite(config, rngs=rngs)
        self.decoder = Decoder(config, obs_dim, output_dim, rngs=rngs)

    def __call__(
        self, x_obs: Array, a_prev: Array, r_t: Array, s_prev: Array, w_prev: Array, p_prev: Array, cms_memories: Levels, cms_keys: Levels
    ) -> tuple[Array | None, Info]:
        """One step on a plain memory.

        x_obs (B, obs), a_prev (B, action), r_t (B, 1), s_prev (B, d_s), w_prev (B, d_w), p_prev (B, d_p), and per level (B, n, d), (B, n, d_k).
        Returns y (B, output), None without the action head, and info: query, context, attention_weights, fast_state, wave_state,
        particle_state, cms_memories, cms_keys, and value (B, 1) and next_obs (B, obs) where those heads are on.
        """
        inputs, held = (x_obs, a_prev, r_t), (s_prev, w_prev, p_prev, tuple(cms_memories), tuple(cms_keys))
        check_core(self.config, inputs, held, self.core.U_p.dtype)
        s, w, p, memories, keys = held
        e = self.encoder(*inputs)
        query, context, attention = self.cms_read(s, e, memories, keys)
        s, w, p = self.core(s, w, p, e, context)
        memories, keys = self.cms_write(s, e, inputs[2], memories, keys)
        y, heads = self.decoder(s, context)
        return y, _info(query, context, attention, s, w, p) | {"cms_memories": memories, "cms_keys": keys} | heads

    def step(self, state: CoreState, x_obs: Array, a_prev: Array, r_t: Array) -> tuple[Array | None, CoreState, Info]:
        """One step from `state` on x_obs (B, obs), a_prev (B, action), r_t (B, 1). Returns y, the next state, and info without the memory."""
        check_core(self.config, (x_obs, a_prev, r_t), state, self.core.U_p.dtype)
        state, info = self._advance(state, self.encoder(x_obs, a_prev, r_t), r_t)
        y, heads = self.decoder(state.s, info["context"])
        return y, state, info | heads

    def rollout(self, state: CoreState, x_obs: Array, a_prev: Array, r_t: Array) -> tuple[Array | None, CoreState, Info]:
        """T steps from `state`: x_obs (T, B, obs), a_prev (T, B, action), r_t (T, B, 1). Returns as `step`, y and info with T in front.

        Encoder and decoder see all steps at once: only the states need one after another.
        """
        check_time(x_obs, a_prev, r_t)
        check_core(self.config, (x_obs, a_prev, r_t), state, self.core.U_p.dtype, time=True)
        state, info = jax.lax.scan(lambda state, now: self._advance(state, *now), state, (self.encoder(x_obs, a_prev, r_t), r_t))
        y, heads = self.decoder(info["fast_state"], info["context"])
        return y, state, info | heads

    def _advance(self, state: CoreState, e: Array, r: Array) -> tuple[CoreState, Info]:
        """The recurrent part of a step."""
        query, context, attention = self.cms_read(state.s, e, state.memories, state.keys, state.scales)
        s, w, p = self.core(state.s, state.w, state.p, e, context)
        memory = self.cms_write(s, e, r, state.memories, state.keys, state.norms, state.scales)
        return CoreState(s, w, p, *memory), _info(query, context, attention, s, w, p)

    def init_state(self, batch: int | None = None) -> CoreState:
        """Zeros: the state before the first step, for `batch` rows or without a batch axis."""
        config, dtype, rows = self.config, self.core.U_p.dtype, () if batch is None else (batch,)
        levels = tuple(zip(config.cms_sizes, config.cms_dims, strict=True))

        def zeros(*shape: int) -> Array:
            return jnp.zeros((*rows, *shape), dtype)

        return self.state(
            zeros(config.d_s), zeros(config.d_w), zeros(config.d_p),
            tuple(zeros(*level) for level in levels), tuple(zeros(size, config.d_k) for size, _ in levels),
        )

    def state(self, s: Array, w: Array, p: Array, cms_memories: Levels, cms_keys: Levels) -> CoreState:
        """The lazy state that holds given states and a plain memory."""
        norms = tuple(jax.lax.stop_gradient(jnp.square(memory).sum(-1)) for memory in cms_memories)
        return CoreState(s, w, p, tuple(cms_memories), tuple(cms_keys), norms, tuple(jnp.ones((), s.dtype) for _ in cms_memories))

    def memories(self, state: CoreState) -> tuple[Levels, Levels]:
        """The plain memories (B, n, d) and keys (B, n, d_k) of every level of a lazy state."""
        pairs = [(scale * memory, scale * key) for scale, memory, key in zip(state.scales, state.memories, state.keys, strict=True)]
        memories, keys = zip(*pairs, strict=True)
        return memories, keys


def dense(inputs: int, outputs: int, bias: bool = True, *, rngs: nnx.Rngs) -> nnx.Linear:
    """Linear layer with LeCun-normal weights, cut at two standard deviations, and zero bias."""
    return nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=nnx.initializers.lecun_normal(), rngs=rngs)


def normal(std: float, *shape: int, rngs: nnx.Rngs) -> nnx.Param:
    """Parameter with normal values of the given standard deviation."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


def _info(query: Array, context: Array, attention: Levels, s: Array, w: Array, p: Array) -> Info:
    return {
        "query": query, "context": context, "attention_weights": attention, "fast_state": s, "wave_state": w, "particle_state": p,
    }
