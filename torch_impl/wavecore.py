"""WaveCore: a recurrent core that reads and writes a memory of several levels (CMS) while three states advance.

    e       = encoder(x_obs, a_prev, r_t)                       q, c = CMS read(s, e)
    w~      = wave(w, [z; c]),  z = W_z e                       p~ = p + W_2 relu(LN(W_1 [p; c]))
    s~      = s + g U_p p~ + (1 - g) U_w w~,  g = sigmoid(W_g [s; e; c])
    s, w, p = clip(s~), clip(w~), clip(p~);  CMS write(s, e, r);  heads of the decoder on [s; c]

`forward` takes and gives the memory as it is. `step` and `rollout` carry a `CoreState`, in which the decay of the memory is lazy.
Source: ContinuonBrain's CoreModel. Letters: B batch, T time, n slots of a level, d width of a level, d_* as in `WaveCoreConfig`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from conf.models import WaveCoreConfig
from torch_impl.ops import cms
from torch_impl.ops.wave import linear_step, saturate, selective_step, softplus
from torch_impl.state import CoreState, check_core, check_time

LN_EPS = 1e-6
IMPLS = ("recurrent", "compiled")
Levels = tuple[Tensor, ...]
Info = dict[str, Any]


class Encoder(nn.Module):
    """Observation, previous action and reward as one vector."""

    def __init__(self, config: WaveCoreConfig, obs_dim: int, action_dim: int) -> None:
        super().__init__()
        width = config.d_e
        self.obs_in = dense(obs_dim, 2 * width)
        self.obs_norm = nn.LayerNorm(2 * width, eps=LN_EPS)
        self.obs_out = dense(2 * width, width)
        self.action = dense(action_dim, width // 2)
        self.reward = dense(1, width // 4)
        self.join_in = dense(width + width // 2 + width // 4, 2 * width)
        self.join_norm = nn.LayerNorm(2 * width, eps=LN_EPS)
        self.join_out = dense(2 * width, width)
        self.norm = nn.LayerNorm(width, eps=LN_EPS)

    def forward(self, x_obs: Tensor, a_prev: Tensor, r_t: Tensor) -> Tensor:
        """x_obs (..., obs), a_prev (..., action), r_t (..., 1). Returns e (..., d_e)."""
        o = self.obs_out(torch.relu(self.obs_norm(self.obs_in(x_obs))))
        a, r = torch.relu(self.action(a_prev)), torch.relu(self.reward(r_t))
        return self.norm(self.join_out(torch.relu(self.join_norm(self.join_in(torch.cat([o, a, r], -1))))))


class CMSRead(nn.Module):
    """Attention over the slots of every level, and a mixture of what the levels answer."""

    def __init__(self, config: WaveCoreConfig, impl: str) -> None:
        super().__init__()
        self.impl = impl
        width = config.d_s + config.d_e
        self.query_in = dense(width, width)
        self.query_norm = nn.LayerNorm(width, eps=LN_EPS)
        self.query_out = dense(width, config.d_k)
        self.level_proj = nn.ModuleList(dense(size, config.d_c, bias=False) for size in config.cms_dims)
        self.mixing = dense(config.num_levels * config.d_c, config.num_levels)

    def forward(self, s: Tensor, e: Tensor, memories: Levels, keys: Levels, scales: Levels | None = None) -> tuple[Tensor, Tensor, Levels]:
        """s (B, d_s), e (B, d_e), per level (B, n, d), (B, n, d_k), and () where the memory is lazy. Returns query, context, attention."""
        query = self.query_out(torch.relu(self.query_norm(self.query_in(torch.cat([s, e], -1)))))  # (B, d_k)
        attention, contents = cms.read_levels(query, memories, keys, scales, impl=self.impl)
        answers = [project(content) for project, content in zip(self.level_proj, contents, strict=True)]  # (B, d_c)
        mix = torch.softmax(self.mixing(torch.cat(answers, -1)), -1)  # (B, levels)
        context = (mix[..., None] * torch.stack(answers, -2)).sum(-2)  # (B, d_c)
        return query, context, attention


class SelectiveSSM(nn.Module):
    """A selective state space of one step, whose carry is the wave state."""

    def __init__(self, config: WaveCoreConfig) -> None:
        super().__init__()
        self.config = config
        width, state = config.d_w // config.mamba_state_dim, config.mamba_state_dim
        self.a_raw, self.B_base, self.C_base = (nn.Parameter(0.02 * torch.randn(width, state)) for _ in range(3))
        self.D = nn.Parameter(torch.zeros(width))
        self.dt_proj, self.b_proj, self.c_proj = (dense(width, width) for _ in range(3))

    def forward(self, u: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        """u (B, d_i), carry (B, d_i, state). Returns y (B, d_i) and the next carry."""
        dt = softplus(self.dt_proj(u)) * self.config.mamba_dt_scale + self.config.mamba_dt_min
        return selective_step(u, carry, dt, self.b_proj(u), self.c_proj(u), self.a_raw, self.B_base, self.C_base, self.D)


class MambaWave(nn.Module):
    """The wave state as a gated selective state space."""

    def __init__(self, config: WaveCoreConfig) -> None:
        super().__init__()
        inner = config.d_w // config.mamba_state_dim
        self.wave_in = dense(config.d_p + config.d_c, inner)
        self.gate_proj = dense(config.d_p + config.d_c, inner)
        self.wave_out = dense(inner, config.d_w)
        self.ssm = SelectiveSSM(config)
        self.state_dim = config.mamba_state_dim

    def forward(self, w: Tensor, z: Tensor, c: Tensor) -> Tensor:
        """w (B, d_w), z (B, d_p), c (B, d_c). Returns the next w (B, d_w), not clipped."""
        zc = torch.cat([z, c], -1)
        y, h = self.ssm(self.wave_in(zc), w.unflatten(-1, (-1, self.state_dim)))  # (B, d_i), (B, d_i, state)
        return 0.5 * h.flatten(-2) + 0.5 * self.wave_out(y * torch.sigmoid(self.gate_proj(zc)))


class LinearWave(nn.Module):
    """The wave state as a linear map, diagonal plus low rank, whose rows the context modulates."""

    def __init__(self, config: WaveCoreConfig) -> None:
        super().__init__()
        width = config.d_w
        self.A_diag = nn.Parameter(torch.zeros(width))
        self.A_U, self.A_V = (nn.Parameter(0.01 * torch.randn(width, width // 4)) for _ in range(2))
        self.A_modulation = dense(config.d_c, width)
        self.B_net = dense(config.d_c + config.d_p, width)

    def forward(self, w: Tensor, z: Tensor, c: Tensor) -> Tensor:
        """w (B, d_w), z (B, d_p), c (B, d_c). Returns the next w (B, d_w), not clipped."""
        return linear_step(w, self.A_diag, self.A_U, self.A_V, self.A_modulation(c)) + self.B_net(torch.cat([c, z], -1))


class HopeCore(nn.Module):
    """The three states, one step on."""

    def __init__(self, config: WaveCoreConfig) -> None:
        super().__init__()
        self.limit = config.state_saturation_limit
        self.U_p, self.U_w = (nn.Parameter(nn.init.xavier_uniform_(torch.empty(config.d_s, width))) for width in (config.d_p, config.d_w))
        self.z_proj = dense(config.d_e, config.d_p)
        self.particle_in = dense(config.d_p + config.d_c, config.d_p + config.d_c)
        self.particle_norm = nn.LayerNorm(config.d_p + config.d_c, eps=LN_EPS)
        self.particle_out = dense(config.d_p + config.d_c, config.d_p)
        self.gate = dense(config.d_s + config.d_e + config.d_c, config.d_s)
        self.wave = (MambaWave if config.use_mamba_wave else LinearWave)(config)

    def forward(self, s: Tensor, w: Tensor, p: Tensor, e: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """s (B, d_s), w (B, d_w), p (B, d_p), e (B, d_e), c (B, d_c). Returns the next s, w and p, clipped."""
        w = self.wave(w, self.z_proj(e), c)
        p = p + self.particle_out(torch.relu(self.particle_norm(self.particle_in(torch.cat([p, c], -1)))))
        g = torch.sigmoid(self.gate(torch.cat([s, e, c], -1)))
        s = s + g * (p @ self.U_p.mT) + (1 - g) * (w @ self.U_w.mT)
        return saturate(s, self.limit), saturate(w, self.limit), saturate(p, self.limit)


class CMSWrite(nn.Module):
    """Decay of every level, and one row of each."""

    def __init__(self, config: WaveCoreConfig, impl: str) -> None:
        super().__init__()
        self.config, self.impl = config, impl
        width = config.d_s + config.d_e
        self.value = nn.ModuleList(dense(width, size) for size in config.cms_dims)
        self.key = nn.ModuleList(dense(width, config.d_k) for _ in config.cms_dims)
        self.gate = nn.ModuleList(dense(width + 1, 1) for _ in config.cms_dims)

    def forward(
        self, s: Tensor, e: Tensor, r: Tensor, memories: Levels, keys: Levels, norms: Levels | None = None, scales: Levels | None = None
    ) -> tuple[Levels, ...]:
        """s (B, d_s), e (B, d_e), r (B, 1) and the memory. Returns memories and keys, and norms and scales where they are given."""
        se = torch.cat([s, e], -1)
        ser = torch.cat([se, r], -1)
        values, new_keys = ([layer(se) for layer in layers] for layers in (self.value, self.key))
        gates = [torch.sigmoid(layer(ser)) for layer in self.gate]
        config = self.config
        return cms.write_levels(
            memories, keys, norms, scales, values, new_keys, gates, config.cms_decays, rule=config.cms_write, threshold=config.salience_threshold,
            impl=self.impl)


class Decoder(nn.Module):
    """The heads: action, value of the state, next observation."""

    def __init__(self, config: WaveCoreConfig, obs_dim: int, output_dim: int) -> None:
        super().__init__()
        width = config.d_s + config.d_c
        self.continuous = config.output_type == "continuous"
        self.hidden_in = dense(width, width)
        self.hidden_norm = nn.LayerNorm(width, eps=LN_EPS)
        self.hidden_out = dense(width, width // 2)
        self.action = dense(width // 2, output_dim) if "action" in config.heads else None
        self.value = dense(width // 2, 1) if "value" in config.heads else None
        self.world_model = dense(width // 2, obs_dim) if "world_model" in config.heads else None

    def forward(self, s: Tensor, c: Tensor) -> tuple[Tensor | None, Info]:
        """s (..., d_s), c (..., d_c). Returns y (..., output), None without the action head, and the other heads by name."""
        h = torch.relu(self.hidden_out(torch.relu(self.hidden_norm(self.hidden_in(torch.cat([s, c], -1))))))
        y = None if self.action is None else self.action(h)
        heads = {} if self.value is None else {"value": self.value(h)}
        if self.world_model is not None:
            heads["next_obs"] = self.world_model(h)
        return torch.tanh(y) if self.continuous and y is not None else y, heads


class WaveCore(nn.Module):
    """The whole core. Every method takes a batch axis on all of its tensors, or on none.

    `impl` is "recurrent" or "compiled" (the memory by Cython kernels; the wave, whose op costs more than the dozen small ones that it replaces, in
    torch). Raises ValueError, naming the argument, for wrong widths, levels that do not match, a batch that differs between arguments, another
    dtype than the weights', and values that are not finite.
    """

    def __init__(self, config: WaveCoreConfig, obs_dim: int, action_dim: int, output_dim: int, impl: str = "recurrent") -> None:
        super().__init__()
        if impl not in IMPLS:
            raise ValueError(f"impl must be {' or '.join(map(repr, IMPLS))}, found {impl!r}")
        self.config = config.sized(obs_dim, action_dim, output_dim)
        self.encoder = Encoder(config, obs_dim, action_dim)
        self.cms_read = CMSRead(config, impl)
        self.core = HopeCore(config)
        self.cms_write = CMSWrite(config, impl)
        self.decoder = Decoder(config, obs_dim, output_dim)

    def forward(
        self, x_obs: Tensor, a_prev: Tensor, r_t: Tensor, s_prev: Tensor, w_prev: Tensor, p_prev: Tensor, cms_memories: Levels, cms_keys: Levels
    ) -> tuple[Tensor | None, Info]:
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

    def step(self, state: CoreState, x_obs: Tensor, a_prev: Tensor, r_t: Tensor) -> tuple[Tensor | None, CoreState, Info]:
        """One step from `state` on x_obs (B, obs), a_prev (B, action), r_t (B, 1). Returns y, the next state, and info without the memory."""
        check_core(self.config, (x_obs, a_prev, r_t), state, self.core.U_p.dtype)
        state, info = self._advance(state, self.encoder(x_obs, a_prev, r_t), r_t)
        y, heads = self.decoder(state.s, info["context"])
        return y, state, info | heads

    def rollout(self, state: CoreState, x_obs: Tensor, a_prev: Tensor, r_t: Tensor) -> tuple[Tensor | None, CoreState, Info]:
        """T steps from `state`: x_obs (T, B, obs), a_prev (T, B, action), r_t (T, B, 1). Returns as `step`, y and info with T in front.

        Encoder and decoder see all steps at once: only the states need one after another.
        """
        check_time(x_obs, a_prev, r_t)
        check_core(self.config, (x_obs, a_prev, r_t), state, self.core.U_p.dtype, time=True)
        infos = []
        for e, r in zip(self.encoder(x_obs, a_prev, r_t), r_t, strict=True):
            state, info = self._advance(state, e, r)
            infos.append(info)
        stacked = _stack(infos)
        y, heads = self.decoder(stacked["fast_state"], stacked["context"])
        return y, state, stacked | heads

    def _advance(self, state: CoreState, e: Tensor, r: Tensor) -> tuple[CoreState, Info]:
        """The recurrent part of a step."""
        query, context, attention = self.cms_read(state.s, e, state.memories, state.keys, state.scales)
        s, w, p = self.core(state.s, state.w, state.p, e, context)
        memory = self.cms_write(s, e, r, state.memories, state.keys, state.norms, state.scales)
        return CoreState(s, w, p, *memory), _info(query, context, attention, s, w, p)

    def init_state(self, batch: int | None = None) -> CoreState:
        """Zeros: the state before the first step, for `batch` rows or without a batch axis."""
        config, rows = self.config, () if batch is None else (batch,)
        levels = tuple(zip(config.cms_sizes, config.cms_dims, strict=True))

        def zeros(*shape: int) -> Tensor:
            return self.core.U_p.new_zeros((*rows, *shape))

        return self.state(
            zeros(config.d_s), zeros(config.d_w), zeros(config.d_p),
            tuple(zeros(*level) for level in levels), tuple(zeros(size, config.d_k) for size, _ in levels),
        )

    def state(self, s: Tensor, w: Tensor, p: Tensor, cms_memories: Levels, cms_keys: Levels) -> CoreState:
        """The lazy state that holds given states and a plain memory."""
        norms = tuple(memory.detach().square().sum(-1) for memory in cms_memories)
        return CoreState(s, w, p, tuple(cms_memories), tuple(cms_keys), norms, tuple(s.new_ones(()) for _ in cms_memories))

    def memories(self, state: CoreState) -> tuple[Levels, Levels]:
        """The plain memories (B, n, d) and keys (B, n, d_k) of every level of a lazy state."""
        pairs = [(scale * memory, scale * key) for scale, memory, key in zip(state.scales, state.memories, state.keys, strict=True)]
        memories, keys = zip(*pairs, strict=True)
        return memories, keys


def dense(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """Linear layer with LeCun-normal weights, cut at two standard deviations, and zero bias."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    std = inputs**-0.5 / 0.87962566103423978  # of the normal that has variance 1 / inputs once it is cut
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def _info(query: Tensor, context: Tensor, attention: Levels, s: Tensor, w: Tensor, p: Tensor) -> Info:
    return {
        "query": query, "context": context, "attention_weights": attention, "fast_state": s, "wave_state": w, "particle_state": p,
    }


def _stack(infos: list[Info]) -> Info:
    return {
        name: tuple(map(torch.stack, zip(*(info[name] for info in infos), strict=True))) if isinstance(value, tuple)
        else torch.stack([info[name] for info in infos])
        for name, value in infos[0].items()
    }
