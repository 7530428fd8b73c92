"""LAM: a sentence encoder, BERT's embeddings and feed-forward layers with hierarchical DeltaNet in the place of self-attention.

    x = LN(word[ids] + token_type[0] + position(n))
    for each layer:   x = LN(x + DeltaNetLayer(x));   x = LN(x + W_out gelu(gelu(W_in x)))
    embedding = l2norm(mean over valid tokens of x)

Source: LAM. Letters: B batch, L length, D width, P positions, n valid tokens of a sentence, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from conf.models import LamConfig
from jax_impl.deltanet import DeltaNetLayer
from jax_impl.layers import layer_norm, linear
from jax_impl.ops.delta_rule import l2norm
from jax_impl.state import check_mask, check_token_ids


class LamOutput(NamedTuple):
    """last_hidden_state (B, L, D), zero at padded positions; embedding (B, D), unit rows; hidden_states, depth + 1 of (B, L, D), or None."""

    last_hidden_state: Array
    embedding: Array
    hidden_states: tuple[Array, ...] | None


class LamBlock(nnx.Module):
    """LN(x + DeltaNetLayer(x)), then LN(x + W_out gelu(W_in x)), the gelu applied `gelu_repeats` times."""

    def __init__(self, config: LamConfig, impl: str, *, rngs: nnx.Rngs) -> None:
        self.repeats = config.gelu_repeats
        self.delta = DeltaNetLayer(
            config.dim, config.heads, conv=config.conv, chunk_size=config.chunk_size, transform=config.transform, rms_eps=config.rms_eps,
            impl=impl, rngs=rngs)
        self.norm_delta = layer_norm(config.dim, config.norm_eps, rngs=rngs)
        self.ffn_in = linear(config.dim, config.ffn_dim, bias=(0.0,) * config.ffn_dim, rngs=rngs)
        self.ffn_out = linear(config.ffn_dim, config.dim, bias=(0.0,) * config.dim, rngs=rngs)
        self.norm_ffn = layer_norm(config.dim, config.norm_eps, rngs=rngs)

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """x (B, L, D); mask (B, L) or None. Returns (B, L, D), zero at padded positions."""
        x = self.norm_delta(x + self.delta(x, mask)[0])
        h = self.ffn_in(x)
        for _ in range(self.repeats):
            h = jax.nn.gelu(h, approximate=False)
        x = self.norm_ffn(x + self.ffn_out(h))
        return x if mask is None else x * mask[..., None]


class LAM(nnx.Module):
    """Sentence encoder. `impl` is "recurrent" (one chunk after another), "chunked" or "compiled" (the Cython rule; gradients as chunked).

    `remat` recomputes each block in the backward pass instead of keeping what it computed.
    """

    def __init__(self, config: LamConfig | None = None, *, impl: str = "chunked", remat: bool = False, rngs: nnx.Rngs) -> None:
        self.config = LamConfig() if config is None else config
        self.remat = remat
        dim, small = self.config.dim, nnx.initializers.normal(0.02)
        self.word_embeddings = nnx.Embed(self.config.vocab_size, dim, embedding_init=small, rngs=rngs)
        self.position_embeddings = nnx.Embed(self.config.max_positions, dim, embedding_init=small, rngs=rngs)
        self.token_type_embeddings = nnx.Embed(2, dim, embedding_init=small, rngs=rngs)
        for table in (self.word_embeddings, self.position_embeddings, self.token_type_embeddings):
            table.dtype = None  # Flax fixes it to the dtype at construction, and would round float64 weights to float32
        self.embedding_norm = layer_norm(dim, self.config.norm_eps, rngs=rngs)
        self.blocks = nnx.List([LamBlock(self.config, impl, rngs=rngs) for _ in range(self.config.depth)])

    def __call__(self, input_ids: Array, attention_mask: Array | None = None, output_hidden_states: bool = False) -> LamOutput:
        """input_ids (B, L) in [0, V), L at most `max_length`; attention_mask (B, L), nonzero for valid tokens, or None for all.

        Raises ValueError for ids out of range, empty or too long input, and a mask of another shape, with a hole, with padding on the
        left or with a row without valid tokens (values only outside `jit`).
        """
        check_token_ids(input_ids, self.config.vocab_size)
        length = input_ids.shape[1]
        if length > self.config.max_length:
            raise ValueError(f"input_ids may have at most max_length={self.config.max_length} tokens, found {length}")
        mask = None
        if attention_mask is not None:
            check_mask(attention_mask, tuple(input_ids.shape))
            mask = attention_mask != 0
        x = self.word_embeddings(input_ids) + self.token_type_embeddings.embedding[0] + self.positions(length, mask)
        x = self.embedding_norm(x)  # (B, L, D)
        if mask is not None:
            x = x * mask[..., None]
        hidden = [x]
        for block in self.blocks:
            x = (jax.checkpoint(block.__call__) if self.remat else block)(x, mask)
            hidden.append(x)
        mean = x.mean(1) if mask is None else x.sum(1) / mask.sum(1, keepdims=True)
        return LamOutput(x, l2norm(mean), tuple(hidden) if output_hidden_states else None)

    def positions(self, length: int, mask: Array | None) -> Array:
        """Position embeddings (1 or B, L, D): a sentence of more than P tokens has the table stretched over its n valid ones.

        Row i of n lies at i (P - 1) / (n - 1), in whole numbers and a remainder: float32 cannot hold the quotient of a long text.
        """
        table = self.position_embeddings.embedding[...]
        last = table.shape[0] - 1
        if length <= last + 1:
            return table[None, :length]
        i = jnp.arange(length)
        n = jnp.full((1, 1), length) if mask is None else mask.sum(1, keepdims=True)  # (1 or B, 1)
        stretched = n > last + 1
        spans = jnp.maximum(n - 1, 1)
        low = jnp.minimum(jnp.where(stretched, i * last // spans, i), last)  # (1 or B, L)
        share = jnp.where(stretched, i * last % spans, 0).astype(table.dtype) / spans
        below, above = table[low], table[jnp.minimum(low + 1, last)]
        return below + share[..., None] * (above - below)
