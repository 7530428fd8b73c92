"""GruLM: gated recurrent units in pre-norm residual blocks, the baseline of the comparison.

    x   = embedding(ids)
    x   = x + GRU(RMSNorm(x))        for every block, its hidden width that of the model
    out = lm_head(RMSNorm(x)),  lm_head tied to the embedding

    r, z = sigmoid(W_i x + b_i + W_h h + b_h)        n = tanh(W_in x + b_in + r * (W_hn h + b_hn))        h = (1 - z) * n + z * h

Source: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder" (2014), with the reset gate after the product, as cuDNN and
both frameworks have it. Letters: B batch, L length, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from conf.baselines import GruConfig
from torch_impl.generate import generate
from torch_impl.state import State, check_states, check_token_ids


class GRU(nn.GRU):
    """torch's GRU of one layer, batch first, with a state (B, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, batch_first=True)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, L, D), h (B, D). Returns y (B, L, D) and the last state (B, D)."""
        y, last = super().forward(x, h[None].contiguous())
        return y, last[0]


class GruBlock(nn.Module):
    """x + GRU(RMSNorm(x))."""

    def __init__(self, config: GruConfig) -> None:
        super().__init__()
        self.norm_gru = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.gru = GRU(config.dim)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x (B, L, D), state {"h" (B, D)}. Returns the block's output (B, L, D) and its state."""
        y, h = self.gru(self.norm_gru(x), state["h"].detach())
        return x + y, {"h": h}


class GruLM(nn.Module):
    """Causal language model on gated recurrent units, with a state of constant size."""

    def __init__(self, config: GruConfig | None = None) -> None:
        super().__init__()
        self.config = GruConfig() if config is None else config
        self.embedding = nn.Embedding(self.config.vocab_size, self.config.dim)
        self.blocks = nn.ModuleList(GruBlock(self.config) for _ in range(self.config.depth))
        self.norm = nn.RMSNorm(self.config.dim, eps=self.config.norm_eps)
        self.lm_head = nn.Linear(self.config.dim, self.config.vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.lm_head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, states: list[State] | None = None, *, return_aux: bool = False) -> tuple[Any, ...]:
        """input_ids (B, L) in [0, V). Returns logits (B, L, V) and the states to hand to the next call; with `return_aux` an empty dict.

        States passed in are detached (truncated backpropagation); those returned are not. Raises ValueError for ids out of range,
        empty input, and states of another shape or dtype or with NaN.
        """
        check_token_ids(input_ids, self.config.vocab_size)
        if states is not None:
            check_states(states, self.state_shapes(input_ids.shape[0]), self.embedding.weight.dtype)
        x = self.embedding(input_ids)  # (B, L, D)
        new_states = []
        for block, state in zip(self.blocks, states or self.init_states(input_ids.shape[0]), strict=True):
            x, state = block(x, state)
            new_states.append(state)
        logits = self.lm_head(self.norm(x))  # (B, L, V)
        return (logits, new_states, {}) if return_aux else (logits, new_states)

    def state_shapes(self, batch_size: int) -> list[dict[str, tuple[int, ...]]]:
        """Shapes of the states for `batch_size` sequences."""
        return [{"h": (batch_size, self.config.dim)}] * self.config.depth

    def init_states(self, batch_size: int) -> list[State]:
        """Zeros: the states before the first token."""
        new_zeros = self.embedding.weight.new_zeros
        return [{name: new_zeros(shape) for name, shape in shapes.items()} for shapes in self.state_shapes(batch_size)]

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 0
    ) -> Tensor:
        """Continue `input_ids` (B, L) by `max_new_tokens` tokens; returns (B, L + max_new_tokens). See `torch_impl.generate`."""
        return generate(self, input_ids, max_new_tokens, temperature, top_k, seed)
