"""Configuration of the models: frozen dataclasses that refuse impossible sizes when they are made.

Hydra uses them as schemas, so every field has a plain type, choices are strings, and lists (what YAML gives) become tuples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

DT_CLAMPS = ("smooth", "hard")
GATES = ("fixed", "learned")
DECAYS = ("exp_exp", "direct")
TIME_FIRSTS = ("bonus", "gain")
TRANSFORMS = ("lam", "exact")


def whole(config: Any, **least: int) -> None:
    """Raise ValueError unless each named field of `config` is an int no smaller than given."""
    for name, low in least.items():
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name} must be an integer of at least {low}, found {value!r}")


def choice(config: Any, name: str, choices: tuple[str, ...]) -> None:
    if getattr(config, name) not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, found {getattr(config, name)!r}")


def between(config: Any, name: str, low: float, high: float, *, ends: str = "()") -> None:
    """Raise ValueError unless low < field < high; a square bracket in `ends` includes that end."""
    value = getattr(config, name)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    above = number and (value >= low if ends[0] == "[" else value > low)
    below = number and (value <= high if ends[1] == "]" else value < high)
    if not (above and below):
        raise ValueError(f"{name} must lie in {ends[0]}{low}, {high}{ends[1]}, found {value!r}")


def divisible(config: Any, size: str, parts: str) -> None:
    """Raise ValueError unless the field `size` is a multiple of the field `parts`."""
    if getattr(config, size) % getattr(config, parts):
        raise ValueError(f"{size} must be divisible by {parts}, found {size}={getattr(config, size)} and {parts}={getattr(config, parts)}")


@dataclass(frozen=True)
class GroundedMambaConfig:
    """GroundedMamba: a normalised selective SSM and an RWKV memory side by side in every block.

    Raises ValueError, naming the field, for sizes that cannot be built.
    """

    vocab_size: int = 10000
    dim: int = 512
    depth: int = 8
    ssm_dim: int = 16
    rwkv_heads: int = 4
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_bias: tuple[float, ...] = (1.0, 0.5)  # its length is the number of outputs of dt_proj
    dt_clamp: str = "smooth"
    max_singular: float = 0.99
    gate: str = "fixed"
    gate_ssm: float = 0.7
    decay: str = "exp_exp"
    time_first: str = "bonus"
    normalised_key: bool = True
    readout_norm: bool = True
    memory_size: int = 1024  # 0 leaves the memory bank out
    memory_alpha: float = 0.01
    memory_every: int = 100
    memory_writes: int = 64
    retrieval_heads: int = 4
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if not isinstance(self.dt_bias, (list, tuple)):
            raise ValueError(f"dt_bias must be a list of one or two numbers, found {self.dt_bias!r}")
        object.__setattr__(self, "dt_bias", tuple(float(value) for value in self.dt_bias))
        whole(self, vocab_size=1, dim=1, depth=1, ssm_dim=4, rwkv_heads=1)  # a LayerNorm over fewer than 4 values keeps nothing
        whole(self, memory_size=0, memory_every=1, memory_writes=1, retrieval_heads=1)
        for heads in ("rwkv_heads",) + ("retrieval_heads",) * (self.memory_size > 0):
            divisible(self, "dim", heads)
        if self.readout_norm and self.dim // self.rwkv_heads < 2:
            raise ValueError(f"readout_norm needs heads of at least 2 channels, found dim={self.dim} and rwkv_heads={self.rwkv_heads}")
        if len(self.dt_bias) not in (1, 2) or not all(map(math.isfinite, self.dt_bias)):
            raise ValueError(f"dt_bias must hold one or two finite numbers, found {self.dt_bias}")
        between(self, "dt_max", 0.0, math.inf)
        between(self, "dt_min", 0.0, self.dt_max, ends="[)")
        between(self, "max_singular", 0.0, math.inf)
        between(self, "gate_ssm", 0.0, 1.0)
        between(self, "memory_alpha", 0.0, 1.0)
        between(self, "norm_eps", 0.0, math.inf)
        choice(self, "dt_clamp", DT_CLAMPS)
        choice(self, "gate", GATES)
        choice(self, "decay", DECAYS)
        choice(self, "time_first", TIME_FIRSTS)

    @property
    def head_dim(self) -> int:
        """P, channels of one RWKV head."""
        return self.dim // self.rwkv_heads

    @classmethod
    def of(cls, config: GroundedMambaConfig | None, **sizes: int | None) -> GroundedMambaConfig:
        """`config` itself, or the default with the given sizes; ValueError when both are given."""
        given = {name: size for name, size in sizes.items() if size is not None}
        if config is not None and given:
            raise ValueError(f"give a config or sizes, not both: found a config and {', '.join(given)}")
        if config is not None and not isinstance(config, cls):
            raise ValueError(f"config must be a {cls.__name__}, found {type(config).__name__}")
        return cls(**given) if config is None else config

    @classmethod
    def groundthink(cls, **sizes: Any) -> GroundedMambaConfig:
        """The variant that computes exactly what the public GroundThink code computes; 13,692,184 parameters at default sizes."""
        variant: dict[str, Any] = dict(
            dt_bias=(1.0,), dt_clamp="hard", decay="direct", time_first="gain",
            normalised_key=False, readout_norm=False, memory_size=0,
        )
        return cls(**{**variant, **sizes})


@dataclass(frozen=True)
class DeltaNetConfig:
    """DeltaNetLM: a causal language model on the plain delta rule.

    Raises ValueError, naming the field, for sizes that cannot be built.
    """

    vocab_size: int = 10000
    dim: int = 512
    depth: int = 8
    heads: int = 4
    ffn_dim: int = 1408
    conv_kernel: int = 4
    chunk_size: int = 64
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        whole(self, vocab_size=1, dim=1, depth=1, heads=1, ffn_dim=1, conv_kernel=1, chunk_size=1)
        divisible(self, "dim", "heads")
        between(self, "norm_eps", 0.0, math.inf)

    @property
    def head_dim(self) -> int:
        """d, channels of one head."""
        return self.dim // self.heads


@dataclass(frozen=True)
class LamConfig:
    """LAM: a sentence encoder, BERT with hierarchical DeltaNet in the place of self-attention; LAM-base by default.

    `chunk_size` belongs to the weights: under `transform="lam"` it changes results. `gelu_repeats` is 2 in the public LAM and 1 in
    BERT. Raises ValueError, naming the field, for sizes that cannot be built.
    """

    vocab_size: int = 30522
    dim: int = 384
    heads: int = 12
    depth: int = 6
    ffn_dim: int = 1536
    max_positions: int = 512
    max_length: int = 32768
    chunk_size: int = 64
    transform: str = "lam"
    conv: str = "same"
    gelu_repeats: int = 2
    norm_eps: float = 1e-12
    rms_eps: float = 1e-6

    def __post_init__(self) -> None:
        whole(self, vocab_size=1, dim=1, heads=1, depth=1, ffn_dim=1, max_positions=2, max_length=1, chunk_size=1, gelu_repeats=1)
        divisible(self, "dim", "heads")
        choice(self, "transform", TRANSFORMS)
        if self.conv != "same":
            raise ValueError(f"conv of an encoder on the hierarchical rule must be 'same', found {self.conv!r}: its chunk means look ahead")
        between(self, "norm_eps", 0.0, math.inf)
        between(self, "rms_eps", 0.0, math.inf)

    @property
    def head_dim(self) -> int:
        """d, channels of one head."""
        return self.dim // self.heads
