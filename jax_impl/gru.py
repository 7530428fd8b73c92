"""GruLM: gated recurrent units in pre-norm residual blocks, the baseline of the comparison.

    x   = embedding(ids)
    x   = x + GRU(RMSNorm(x))        for every block, its hidden width that of the model
    out = lm_head(RMSNorm(x)),  lm_head tied to the embedding

    r, z = sigmoid(W_i x + b_i + W_h h + b_h)        n = tanh(W_in x + b_in + r * (W_hn h + b_hn))        h = (1 - z) * n + z * h

Source: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder" (2014), with the reset gate after the product, as cuDNN and
both frameworks have it. Letters: B batch, L length, D width, V vocabulary.
"""

from __future__ import annotations

import jax
from flax import nnx
from jax import Array

from conf.baselines import GruConfig
from jax_impl.language import PreNormLM
from jax_impl.state import State


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


class GruLM(PreNormLM):
    """Causal language model on gated recurrent units, with a state of constant size.

    `remat` recomputes each block in the backward pass instead of keeping what it computed.
    """

    def __init__(self, config: GruConfig | None = None, *, remat: bool = False, rngs: nnx.Rngs) -> None:
        config = GruConfig() if config is None else config
        super().__init__(config, lambda: GruBlock(config, rngs=rngs), remat=remat, rngs=rngs)

    def state_shapes(self, batch_size: int) -> list[dict[str, tuple[int, ...]]]:
        """Shapes of the states for `batch_size` sequences."""
        return [{"h": (batch_size, self.config.dim)}] * self.config.depth
