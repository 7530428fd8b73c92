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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.baselines import TransformerConfig
from torch_impl.language import PreNormLM
from torch_impl.layers import linear
from torch_impl.ops.rotary import rotary_table, rotate
from torch_impl.state import State


class WindowAttention(nn.Module):
    """Causal attention over the last `window` tokens, positions rotary and relative to the oldest key that is held."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (linear(config.dim, config.dim) for _ in range(4))

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x (B, L, D); state {"k", "v" (B, H, W, d), "seen" (B, 1)}: the newest of `seen` tokens last. Returns y (B, L, D) and the next state."""
        window, length = self.config.window, x.shape[1]
        q, k, v = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))  # (B, H, L, d)
        k, v = torch.cat([state["k"], k], dim=2), torch.cat([state["v"], v], dim=2)  # (B, H, W + L, d)
        cos, sin = rotary_table(window + length, self.config.head_dim, self.config.rope_base)
        place = torch.arange(window + length, device=x.device)
        distance = place[window:, None] - place  # (L, W + L)
        held = place >= window - state["seen"]  # (B, W + L)
        mask = ((distance >= 0) & (distance <= window)) & held[:, None, None]  # (B, 1, L, W + L)
        y = F.scaled_dot_product_attention(rotate(q, (cos[window:], sin[window:])), rotate(k, (cos, sin)), v, attn_mask=mask)
        seen = (state["seen"] + length).clamp(max=window)
        return self.o_proj(y.transpose(1, 2).flatten(-2)), {"k": k[:, :, length:], "v": v[:, :, length:], "seen": seen}

    def _heads(self, z: Tensor) -> Tensor:
        """z (B, L, D), as (B, H, L, d)."""
        return z.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)


class TransformerBlock(nn.Module):
    """x + WindowAttention(RMSNorm(x)), then x + W_2(silu(W_1 n) * W_3 n) with n = RMSNorm(x)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm_attention = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = WindowAttention(config)
        self.norm_ffn = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.w1, self.w3 = linear(config.dim, config.ffn_dim), linear(config.dim, config.ffn_dim)
        self.w2 = linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x (B, L, D). Returns the block's output (B, L, D) and its state."""
        y, state = self.attention(self.norm_attention(x), {name: value.detach() for name, value in state.items()})
        x = x + y
        n = self.norm_ffn(x)
        return x + self.w2(F.silu(self.w1(n)) * self.w3(n)), state


class Transformer(PreNormLM):
    """Causal language model on attention over a window, with a state of constant size: the keys and values of the window."""

    def __init__(self, config: TransformerConfig | None = None) -> None:
        config = TransformerConfig() if config is None else config
        super().__init__(config, lambda: TransformerBlock(config))

    def state_shapes(self, batch_size: int) -> list[dict[str, tuple[int, ...]]]:
        """Shapes of the states for `batch_size` sequences."""
        config = self.config
        past = (batch_size, config.heads, config.window, config.head_dim)
        return [{"k": past, "v": past, "seen": (batch_size, 1)}] * config.depth
