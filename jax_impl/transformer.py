"""Transformer: a small pre-norm decoder with rotary positions, the baseline of the comparison.

    x   = embedding(ids)
    x   = x + W_o attention(W_q n, W_k n, W_v n), n = RMSNorm(x);   x = x + W_2(silu(W_1 n) * W_3 n), n = RMSNorm(x)      for every block
    out = lm_head(RMSNorm(x)),  lm_head tied to the embedding

A token attends to itself and to the `window` tokens before it, in every block. That is what it can carry from call to call: the keys and
values of the last `window` tokens. Its context is bounded, at depth * window tokens, where that of the recurrent models is not.
Sources: Vaswani et al., "Attention Is All You Need" (2017); Su et al., "RoFormer" (2021); the block of LLaMA.
Letters: B batch, L length, D width, H heads, d head width, W window, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.attention import dot_product_attention_weights
from jax import Array

from conf.baselines import TransformerConfig
from jax_impl.language import PreNormLM
from jax_impl.layers import linear
from jax_impl.ops.rotary import rotary_table, rotate
from jax_impl.state import State


class WindowAttention(nnx.Module):
    """Causal attention over the last `window` tokens, positions rotary and relative to the oldest key that is held."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (linear(config.dim, config.dim, rngs=rngs) for _ in range(4))

    def __call__(self, x: Array, state: State) -> tuple[Array, State]:
        """x (B, L, D); state {"k", "v" (B, H, W, d), "seen" (B, 1)}: the newest of `seen` tokens last. Returns y (B, L, D) and the next state."""
        window, length = self.config.window, x.shape[1]
        q, k, v = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))  # (B, H, L, d)
        k, v = jnp.concatenate([state["k"], k], axis=2), jnp.concatenate([state["v"], v], axis=2)  # (B, H, W + L, d)
        cos, sin = rotary_table(window + length, self.config.head_dim, self.config.rope_base)
        place = jnp.arange(window + length)
        distance = place[window:, None] - place  # (L, W + L)
        held = place >= window - state["seen"]  # (B, W + L)
        mask = ((distance >= 0) & (distance <= window)) & held[:, None, None]  # (B, 1, L, W + L)
        q, turned = rotate(q, (cos[window:], sin[window:])), rotate(k, (cos, sin))
        # jax.nn.dot_product_attention takes its softmax in float32 whatever it is given
        weights = dot_product_attention_weights(q.swapaxes(1, 2), turned.swapaxes(1, 2), mask=mask)  # (B, H, L, W + L)
        seen = jnp.minimum(state["seen"] + length, window)
        return self.o_proj((weights @ v).swapaxes(1, 2).reshape(x.shape)), {"k": k[:, :, length:], "v": v[:, :, length:], "seen": seen}

    def _heads(self, z: Array) -> Array:
        """z (B, L, D), as (B, H, L, d)."""
        return z.reshape(*z.shape[:2], self.config.heads, -1).swapaxes(1, 2)


class TransformerBlock(nnx.Module):
    """x + WindowAttention(RMSNorm(x)), then x + W_2(silu(W_1 n) * W_3 n) with n = RMSNorm(x)."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.norm_attention = nnx.RMSNorm(config.dim, epsilon=config.norm_eps, use_fast_variance=False, rngs=rngs)
        self.attention = WindowAttention(config, rngs=rngs)
        self.norm_ffn = nnx.RMSNorm(config.dim, epsilon=config.norm_eps, use_fast_variance=False, rngs=rngs)
        self.w1, self.w3 = linear(config.dim, config.ffn_dim, rngs=rngs), linear(config.dim, config.ffn_dim, rngs=rngs)
        self.w2 = linear(config.ffn_dim, config.dim, rngs=rngs)

    def __call__(self, x: Array, state: State) -> tuple[Array, State]:
        """x (B, L, D). Returns the block's output (B, L, D) and its state."""
        y, state = self.attention(self.norm_attention(x), jax.lax.stop_gradient(state))
        x = x + y
        n = self.norm_ffn(x)
        return x + self.w2(jax.nn.silu(self.w1(n)) * self.w3(n)), state


class Transformer(PreNormLM):
    """Causal language model on attention over a window, with a state of constant size: the keys and values of the window.

    `remat` recomputes each block in the backward pass instead of keeping what it computed.
    """

    def __init__(self, config: TransformerConfig | None = None, *, remat: bool = False, rngs: nnx.Rngs) -> None:
        config = TransformerConfig() if config is None else config
        super().__init__(config, lambda: TransformerBlock(config, rngs=rngs), remat=remat, rngs=rngs)

    def state_shapes(self, batch_size: int) -> list[dict[str, tuple[int, ...]]]:
        """Shapes of the states for `batch_size` sequences."""
        config = self.config
        past = (batch_size, config.heads, config.window, config.head_dim)
        return [{"k": past, "v": past, "seen": (batch_size, 1)}] * config.depth
