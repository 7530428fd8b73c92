"""Configuration of the comparison's baselines, a Transformer and a GRU: as `conf.models`, with presets of GroundedMamba's sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from conf.models import between, divisible, whole


@dataclass(frozen=True)
class TransformerConfig:
    """Transformer: a small pre-norm decoder with rotary positions, a baseline. A token sees itself and the `window` tokens before it, per block.

    Raises ValueError, naming the field, for sizes that cannot be built.
    """

    vocab_size: int = 10000
    dim: int = 512
    depth: int = 8
    heads: int = 4
    ffn_dim: int = 1408
    window: int = 256
    rope_base: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        whole(self, vocab_size=1, dim=1, depth=1, heads=1, ffn_dim=1, window=1)
        divisible(self, "dim", "heads")
        if self.head_dim % 2:
            raise ValueError(f"dim must give heads of an even width for rotary positions, found dim={self.dim} and heads={self.heads}")
        between(self, "rope_base", 1.0, math.inf)
        between(self, "norm_eps", 0.0, math.inf)

    @property
    def head_dim(self) -> int:
        """d, channels of one head."""
        return self.dim // self.heads

    @classmethod
    def preset(cls, name: str, **fields: Any) -> TransformerConfig:
        """"tiny" or "small": over bytes within 2 % of the parameters of the GroundedMamba of that name, with its depth and heads."""
        return cls(**{**_preset(name, PRESETS["transformer"]), **fields})


@dataclass(frozen=True)
class GruConfig:
    """GruLM: gated recurrent units in pre-norm residual blocks, a baseline.

    Raises ValueError, naming the field, for sizes that cannot be built.
    """

    vocab_size: int = 10000
    dim: int = 512
    depth: int = 8
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        whole(self, vocab_size=1, dim=1, depth=1)
        between(self, "norm_eps", 0.0, math.inf)

    @classmethod
    def preset(cls, name: str, **fields: Any) -> GruConfig:
        """"tiny" or "small": over bytes within 2 % of the parameters of the GroundedMamba of that name, with its depth."""
        return cls(**{**_preset(name, PRESETS["gru"]), **fields})


# Depth and heads are GroundedMamba's; the width is the multiple of 8 that comes nearest to its parameters, for the Transformer with a
# feed-forward of about 8/3 of the width, which then makes up the rest.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "transformer": {"tiny": dict(dim=88, depth=4, heads=4, ffn_dim=226), "small": dict(dim=168, depth=6, heads=4, ffn_dim=458)},
    "gru": {"tiny": dict(dim=120, depth=4), "small": dict(dim=240, depth=6)},
}


def _preset(name: str, presets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if name not in presets:
        raise ValueError(f"preset must be one of {', '.join(map(repr, presets))}, found {name!r}")
    return presets[name]
