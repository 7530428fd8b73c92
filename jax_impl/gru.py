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

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from conf.baselines import GruConfig
from jax_impl.generate import generate
from jax_impl.state import State, check_states, check_token_ids


class GRU(nnx.GRUCell):
    """Flax's GRU cell along L, given the bias of the hidden side that torch's has and Flax's leaves out."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(dim, dim, rngs=rngs)
        self.dense_h = nnx.Linear(dim, 3 * dim, rngs=rngs)

    def __call__(self, x: Array, h: Array) -> tuple[Array, Array]:
        """x (B, L, D), h (B, D). Returns y (B, L, D) and the last state (B, D)."""
        last, y = jax.lax.scan(super().__call__, h, x.swapaxes(0, 1))
        return y.swapaxes(0, 1), last


class GruBlock(nnx.Module):
    """x + GRU(RMSNorm(x))."""

    def __init__(self, config: GruConfig, *, rngs: nnx.Rngs) -> None:
        self.norm_gru = nnx.RMSNorm(config.dim, epsilon=config.norm_eps, use_fast_variance=False, rngs=rngs)
        self.gru = GRU(config.dim, rngs=rngs)

    def __call__(self, x: Array, state: State) -> tuple[Array, State]:
        """x (B, L, D), state {"h" (B, D)}. Returns the block's output (B, L, D) and its state."""
        y, h = self.gru(self.norm_gru(x), jax.lax.stop_gradient(state["h"]))
        return x + y, {"h": h}


class GruLM(nnx.Module):
    """Causal language model on gated recurrent units, with a state of constant size.

    `remat` recomputes each block in the backward pass instead of keeping what it computed.
    """

    def __init__(self, config: GruConfig | None = None, *, remat: bool = False, rngs: nnx.Rngs) -> None:
        self.config = GruConfig() if config is None else config
        self.remat = remat
        self.embedding = nnx.Embed(self.config.vocab_size, self.config.dim, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.embedding.dtype = None  # Flax fixes it to the dtype at construction, and would round float64 weights to float32
        self.blocks = nnx.List([GruBlock(self.config, rngs=rngs) for _ in range(self.config.depth)])
        self.norm = nnx.RMSNorm(self.config.dim, epsilon=self.config.norm_eps, use_fast_variance=False, rngs=rngs)

    def __call__(self, input_ids: Array, states: list[State] | None = None, *, return_aux: bool = False) -> tuple[Any, ...]:
        """input_ids (B, L) in [0, V). Returns logits (B, L, V) and the states to hand to the next call; with `return_aux` an empty dict.

        States passed in are detached (truncated backpropagation); those returned are not. Raises ValueError for ids out of range,
        empty input, and states of another shape or dtype or with NaN (values only outside `jit`).
        """
        check_token_ids(input_ids, self.config.vocab_size)
        if states is not None:
            check_states(states, self.state_shapes(input_ids.shape[0]), self.embedding.embedding.dtype)
        x = self.embedding(input_ids)  # (B, L, D)
        new_states = []
        for block, state in zip(self.blocks, states or self.init_states(input_ids.shape[0]), strict=True):
            x, state = (jax.checkpoint(block.__call__) if self.remat else block)(x, state)
            new_states.append(state)
        logits = self.embedding.attend(self.norm(x))  # (B, L, V)
        return (logits, new_states, {}) if return_aux else (logits, new_states)

    def state_shapes(self, batch_size: int) -> list[dict[str, tuple[int, ...]]]:
        """Shapes of the states for `batch_size` sequences."""
        return [{"h": (batch_size, self.config.dim)}] * self.config.depth

    def init_states(self, batch_size: int) -> list[State]:
        """Zeros: the states before the first token."""
        dtype = self.embedding.embedding.dtype
        return [{name: jnp.zeros(shape, dtype) for name, shape in shapes.items()} for shapes in self.state_shapes(batch_size)]

    def generate(
        self, input_ids: Array, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 0
    ) -> Array:
        """Continue `input_ids` (B, L) by `max_new_tokens` tokens; returns (B, L + max_new_tokens). See `jax_impl.generate`."""
        return generate(self, input_ids, max_new_tokens, temperature, top_k, seed)
