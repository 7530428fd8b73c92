"""GruLM: gated recurrent units in pre-norm residual blocks, the baseline of the comparison.

    x   = embedding(ids)
    x   = x + GRU(RMSNorm(x))        for every block, its hidden width that of the model
    out = lm_head(RMSNorm(x)),  lm_head tied to the embedding

    r, z = sigmoid(W_i x + b_i + W_h h + b_h)        n = tanh(W_in x + b_in + r * (W_hn h + b_hn))        h = (1 - z) * n + z * h

Source: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder" (2014), with the reset gate after the product, as cuDNN and
both frameworks have it. Letters: B batch, L length, D width, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn

from conf.baselines import GruConfig
from torch_impl.language import PreNormLM
from torch_impl.state import State


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


class GruLM(PreNormLM):
    """Causal language model on gated recurrent units, with a state of constant size."""

    def __init__(self, config: GruConfig | None = None) -> None:
        config = GruConfig() if config is None else config
        super().__init__(config, lambda: GruBlock(config))

    def state_shapes(self, batch_size: int) -> list[dict[str, tuple[int, ...]]]:
        """Shapes of the states for `batch_size` sequences."""
        return [{"h": (batch_size, self.config.dim)}] * self.config.depth
