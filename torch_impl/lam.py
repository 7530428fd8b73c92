"""LAM: a sentence encoder, BERT's embeddings and feed-forward layers with hierarchical DeltaNet in the place of self-attention.

    x = LN(word[ids] + token_type[0] + position(n))
    for each layer:   x = LN(x + DeltaNetLayer(x));   x = LN(x + W_out gelu(gelu(W_in x)))
    embedding = l2norm(mean over valid tokens of x)

Source: LAM. Letters: B batch, L length, D width, P positions, n valid tokens of a sentence, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.models import LamConfig
from torch_impl.deltanet import DeltaNetLayer
from torch_impl.layers import linear
from torch_impl.ops.delta_rule import l2norm
from torch_impl.state import check_mask, check_token_ids


class LamOutput(NamedTuple):
    """last_hidden_state (B, L, D), zero at padded positions; embedding (B, D), unit rows; hidden_states, depth + 1 of (B, L, D), or None."""

    last_hidden_state: Tensor
    embedding: Tensor
    hidden_states: tuple[Tensor, ...] | None


class LamBlock(nn.Module):
    """LN(x + DeltaNetLayer(x)), then LN(x + W_out gelu(W_in x)), the gelu applied `gelu_repeats` times."""

    def __init__(self, config: LamConfig, impl: str) -> None:
        super().__init__()
        self.repeats = config.gelu_repeats
        self.delta = DeltaNetLayer(
            config.dim, config.heads, conv=config.conv, chunk_size=config.chunk_size, transform=config.transform, rms_eps=config.rms_eps, impl=impl)
        self.norm_delta = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.ffn_in = linear(config.dim, config.ffn_dim, bias=(0.0,) * config.ffn_dim)
        self.ffn_out = linear(config.ffn_dim, config.dim, bias=(0.0,) * config.dim)
        self.norm_ffn = nn.LayerNorm(config.dim, eps=config.norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, L, D); mask (B, L) or None. Returns (B, L, D), zero at padded positions."""
        x = self.norm_delta(x + self.delta(x, mask)[0])
        h = self.ffn_in(x)
        for _ in range(self.repeats):
            h = F.gelu(h)
        x = self.norm_ffn(x + self.ffn_out(h))
        return x if mask is None else x * mask[..., None]


class LAM(nn.Module):
    """Sentence encoder. `impl` is "recurrent" (one chunk after another), "chunked" or "compiled" (the Cython rule; no gradients)."""

    def __init__(self, config: LamConfig | None = None, *, impl: str = "chunked") -> None:
        super().__init__()
        self.config = LamConfig() if config is None else config
        dim = self.config.dim
        self.word_embeddings = nn.Embedding(self.config.vocab_size, dim)
        self.position_embeddings = nn.Embedding(self.config.max_positions, dim)
        self.token_type_embeddings = nn.Embedding(2, dim)
        for table in (self.word_embeddings, self.position_embeddings, self.token_type_embeddings):
            nn.init.normal_(table.weight, std=0.02)
        self.embedding_norm = nn.LayerNorm(dim, eps=self.config.norm_eps)
        self.blocks = nn.ModuleList(LamBlock(self.config, impl) for _ in range(self.config.depth))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False) -> LamOutput:
        """input_ids (B, L) in [0, V), L at most `max_length`; attention_mask (B, L), nonzero for valid tokens, or None for all.

        Raises ValueError for ids out of range, empty or too long input, and a mask of another shape, with a hole, with padding on the
        left or with a row without valid tokens.
        """
        check_token_ids(input_ids, self.config.vocab_size)
        length = input_ids.shape[1]
        if length > self.config.max_length:
            raise ValueError(f"input_ids may have at most max_length={self.config.max_length} tokens, found {length}")
        mask = None
        if attention_mask is not None:
            check_mask(attention_mask, tuple(input_ids.shape))
            mask = attention_mask != 0
        x = self.word_embeddings(input_ids) + self.token_type_embeddings.weight[0] + self.positions(length, mask)
        x = self.embedding_norm(x)  # (B, L, D)
        if mask is not None:
            x = x * mask[..., None]
        hidden = [x]
        for block in self.blocks:
            x = block(x, mask)
            hidden.append(x)
        mean = x.mean(1) if mask is None else x.sum(1) / mask.sum(1, keepdim=True)
        return LamOutput(x, l2norm(mean), tuple(hidden) if output_hidden_states else None)

    def positions(self, length: int, mask: Tensor | None) -> Tensor:
        """Position embeddings (1 or B, L, D): a sentence of more than P tokens has the table stretched over its n valid ones.

        Row i of n lies at i (P - 1) / (n - 1), in whole numbers and a remainder: float32 cannot hold the quotient of a long text.
        """
        table = self.position_embeddings.weight
        last = table.shape[0] - 1
        if length <= last + 1:
            return table[None, :length]
        i = torch.arange(length, device=table.device)
        n = i.new_full((1, 1), length) if mask is None else mask.sum(1, keepdim=True)  # (1 or B, 1)
        stretched = n > last + 1
        spans = (n - 1).clamp(min=1)
        low = torch.where(stretched, i * last // spans, i).clamp(max=last)  # (1 or B, L)
        share = torch.where(stretched, i * last % spans, 0).to(table.dtype) / spans
        return torch.lerp(table[low], table[(low + 1).clamp(max=last)], share[..., None])
