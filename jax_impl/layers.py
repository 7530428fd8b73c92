"""The two branches of a GroundedMamba block: a selective state space that reacts and an RWKV memory that holds on.

    SSM:   h_t = LN((I + dt_A A-hat) h_{t-1} + dt_B B a_t)      y_t = C h_t + D * a_t
    RWKV:  y_t = W_o (norm(WKV(sigmoid(W_r b), W_k b, W_v b)) + memory_gate * bank(W_q b))

Source: GroundThink's StableStateSSM and RWKVGroundedMemory.
Letters: B batch, L length, D width, N state, H heads, P head width, M slots, R rows written to the bank.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from conf.models import GroundedMambaConfig
from jax_impl.ops import memory_bank
from jax_impl.ops.normalise import head_norm
from jax_impl.ops.selective_scan import selective_scan, spectral_bound
from jax_impl.ops.wkv import wkv

IMPLS = ("recurrent", "chunked", "compiled")


class Frozen(nnx.Variable):
    """A weight that belongs to the model and is never trained."""


class Buffer(nnx.Variable):
    """A value that the model keeps and updates by itself."""


class StableStateSSM(nnx.Module):
    """Selective state space with a bounded transition and a normalised state."""

    def __init__(self, config: GroundedMambaConfig, impl: str, *, rngs: nnx.Rngs) -> None:
        self.config, self.impl = config, "compiled" if impl == "compiled" else "recurrent"
        noise = jax.random.normal(rngs.params(), (config.ssm_dim, config.ssm_dim), jnp.float32)
        self.A = nnx.Param(-0.1 * jnp.eye(config.ssm_dim, dtype=jnp.float32) + 0.01 * noise)
        small = nnx.initializers.normal(0.01)
        self.B_proj = nnx.Linear(config.dim, config.ssm_dim, use_bias=False, kernel_init=small, rngs=rngs)
        self.C_proj = nnx.Linear(config.ssm_dim, config.dim, use_bias=False, kernel_init=small, rngs=rngs)
        self.D = nnx.Param(jnp.ones(config.dim, jnp.float32))
        self.dt_proj = linear(config.dim, len(config.dt_bias), bias=config.dt_bias, rngs=rngs)
        self.state_norm = layer_norm(config.ssm_dim, config.norm_eps, rngs=rngs)

    def step_size(self, z: Array) -> Array:
        """Map dt_proj's outputs into [dt_min, dt_max]. "hard" has no gradient above dt_max, where the initial bias lies."""
        low, high = self.config.dt_min, self.config.dt_max
        if self.config.dt_clamp == "hard":
            return jnp.clip(jnp.logaddexp(z, 0.0), low, high)  # softplus, finite gradient for any z
        return low + (high - low) * jax.nn.sigmoid(z)

    def __call__(self, a: Array, state: Array | None = None) -> tuple[Array, Array]:
        """a (B, L, D), state (B, N) or None for zeros. Returns y (B, L, D) and the states of all tokens (B, L, N)."""
        dt = self.step_size(self.dt_proj(a))  # (B, L, 1 or 2)
        dt_b = dt[..., 1] / self.config.dt_max if dt.shape[-1] == 2 else None
        states, _ = selective_scan(
            self.B_proj(a), dt[..., 0], dt_b, spectral_bound(self.A[...], self.config.max_singular),
            self.state_norm.scale[...], self.state_norm.bias[...], state, eps=self.config.norm_eps, impl=self.impl,
        )
        return self.C_proj(states) + self.D[...] * a, states


class HeadNorm(nnx.Module):
    """Normalise the channels of each head of each token, then scale and shift per channel."""

    def __init__(self, dim: int, eps: float) -> None:
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(dim, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(dim, jnp.float32))

    def __call__(self, y: Array) -> Array:
        """y (B, L, H, P). Returns (B, L, D)."""
        return head_norm(y, self.weight[...], self.bias[...], self.eps)


class RWKVGroundedMemory(nnx.Module):
    """RWKV memory with a fixed decay per channel and, beside it, a bank of slowly averaged rows."""

    def __init__(self, config: GroundedMambaConfig, impl: str, chunk_size: int, *, rngs: nnx.Rngs) -> None:
        self.config, self.impl, self.chunk_size = config, impl, chunk_size
        dim, heads = config.dim, config.rwkv_heads
        self.key_proj = linear(dim, dim, rngs=rngs)
        self.value_proj = linear(dim, dim, rngs=rngs)
        self.receptance_proj = linear(dim, dim, rngs=rngs)
        self.output_proj = linear(dim, dim, rngs=rngs)
        rate = -5.0 * jnp.arange(1, heads + 1, dtype=jnp.float32) / heads
        decay = rate if config.decay == "exp_exp" else jnp.exp(rate)
        self.time_decay = nnx.Param(jnp.repeat(decay[:, None], config.head_dim, axis=1))
        self.time_first = nnx.Param(jnp.full((heads, config.head_dim), 0.5, jnp.float32))
        if config.readout_norm:
            self.readout_norm = HeadNorm(dim, config.norm_eps)
        if config.memory_size:
            self.memory_query = linear(dim, dim, rngs=rngs)
            self.memory_gate = nnx.Param(jnp.zeros(dim, jnp.float32))
            self.memory_keys = Buffer(jnp.zeros((config.memory_size, dim), jnp.float32))
            self.memory_values = Buffer(jnp.zeros((config.memory_size, dim), jnp.float32))
            self.memory_count = Buffer(jnp.zeros(config.memory_size, int))
            self.update_counter = Buffer(jnp.zeros((), int))
            self.writes = Buffer(jnp.zeros((), int))

    def __call__(self, b: Array, state: Array | None = None) -> tuple[Array, Array, tuple[Array, Array] | None]:
        """b (B, L, D), state (B, H, P, P) or None for zeros.

        Returns y (B, L, D), the last state, and the key and value rows (R, D) that the bank would write, detached; None without a bank.
        """
        config = self.config
        r, k, v = jax.nn.sigmoid(self.receptance_proj(b)), self.key_proj(b), self.value_proj(b)
        rows = self.rows(k, v) if config.memory_size else None
        w = jnp.exp(-jnp.exp(self.time_decay[...])) if config.decay == "exp_exp" else self.time_decay[...]  # (H, P)
        r, k, v = (x.reshape(*x.shape[:-1], *w.shape) for x in (r, k, v))  # (B, L, H, P)
        if config.normalised_key:
            k = (1 - w) * k
        y, state = wkv(r, k, v, w, self.time_first[...], state, time_first=config.time_first, impl=self.impl, chunk_size=self.chunk_size)
        y = self.readout_norm(y) if config.readout_norm else y.reshape(b.shape)  # (B, L, D)
        if config.memory_size:
            # slots fill in order, so an empty first slot is an empty bank
            y = jax.lax.cond(self.memory_count[0] > 0, lambda y: y + self.retrieve(b), lambda y: y, y)
        return self.output_proj(y), state, rows

    def retrieve(self, b: Array) -> Array:
        """The gated read of the bank for b (B, L, D); at least one slot must be occupied."""
        return self.memory_gate[...] * memory_bank.read(
            self.memory_query(b), self.memory_keys[...], self.memory_values[...], self.memory_count[...],
            alpha=self.config.memory_alpha, heads=self.config.retrieval_heads,
        )

    def rows(self, k: Array, v: Array) -> tuple[Array, Array]:
        """The rows (R, D) of k and v (B, L, D), flattened over tokens, that the next write would store."""
        tokens = k.shape[0] * k.shape[1]
        positions = memory_bank.row_positions(tokens, min(self.config.memory_writes, tokens, self.config.memory_size), self.writes[...])
        return tuple(jax.lax.stop_gradient(x).reshape(tokens, -1)[positions] for x in (k, v))

    def update_memory(self, rows: tuple[Array, Array]) -> None:
        """Count one optimiser step; on every `memory_every`-th, write `rows` (R, D), (R, D) into the bank."""
        counter = self.update_counter[...] + 1
        due = counter % self.config.memory_every == 0
        bank = (self.memory_keys[...], self.memory_values[...], self.memory_count[...])
        keys, values, count = jax.lax.cond(
            due, lambda bank: memory_bank.write(*bank, *rows, alpha=self.config.memory_alpha), lambda bank: bank, bank)
        self.update_counter[...] = counter
        self.memory_keys[...], self.memory_values[...], self.memory_count[...] = keys, values, count
        self.writes[...] = self.writes[...] + due


def linear(inputs: int, outputs: int, bias: tuple[float, ...] | None = None, *, rngs: nnx.Rngs) -> nnx.Linear:
    """Linear layer with weights uniform in +-1 / sqrt(inputs) and, where given, the initial bias."""
    def uniform(key: Array, shape: tuple[int, ...], dtype: jnp.dtype, **_: object) -> Array:
        return jax.random.uniform(key, shape, dtype, -inputs**-0.5, inputs**-0.5)

    layer = nnx.Linear(inputs, outputs, use_bias=bias is not None, kernel_init=uniform, rngs=rngs)
    if bias is not None:
        layer.bias[...] = jnp.array(bias, jnp.float32)
    return layer


def layer_norm(features: int, eps: float, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm as torch computes it: epsilon given, variance in two passes."""
    return nnx.LayerNorm(features, epsilon=eps, use_fast_variance=False, rngs=rngs)
