"""Schemas of the Hydra tree: one dataclass for each section of `train.yaml`. Standard library only.

Hydra checks keys and types against these classes; the ranges are checked when the objects are made, so a run first turns
its configuration into objects. Messages name the field without its section; the command line adds the section.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from conf.baselines import GruConfig, TransformerConfig
from conf.comparison_schema import ComparisonConfig
from conf.debug_schema import DebugConfig, EarlyStoppingConfig, RateFinderConfig, SweepConfig
from conf.distributed_schema import DistributedConfig
from conf.models import DeltaNetConfig, GroundedMambaConfig, between, choice, whole
from conf.tracker_schema import TrackerConfig

MODELS = {"grounded_mamba": GroundedMambaConfig, "deltanet_lm": DeltaNetConfig, "transformer": TransformerConfig, "gru": GruConfig}
BACKENDS = ("torch", "torch_compiled", "jax", "jax_compiled")
DTYPES = ("float32", "float64")
PARTS = ("topics", "docstrings", "source")
TOKENIZERS = ("bytes", "bpe")
BYTE_VOCABULARY = 258  # 256 bytes, end of document, padding
STATE_KINDS = {"grounded_mamba": ("ssm", "wkv"), "deltanet_lm": ("S",), "transformer": (), "gru": ("h",)}  # states whose norm a penalty can hold
PRECISIONS = ("full", "bfloat16")
UNFREEZE = ("none", "soft_reset", "selective_reinit", "gradient_injection")


def _at_least(config: Any, low: float, *names: str) -> None:
    for name in names:
        between(config, name, low, math.inf, ends="[)")


@dataclass(frozen=True)
class BackendConfig:
    """What computes: framework, precision, threads (None leaves the framework's choice)."""

    name: str = "torch_compiled"
    dtype: str = "float32"
    threads: int | None = 1  # the default model's products are too small to share; larger ones set None

    def __post_init__(self) -> None:
        choice(self, "name", BACKENDS)
        choice(self, "dtype", DTYPES)
        if self.threads is not None:
            whole(self, threads=1)


@dataclass(frozen=True)
class DataConfig:
    """Text, its split by file and its tokens. `path` (a file or folder of UTF-8 text) replaces CPython's own text."""

    path: str | None = None
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    tokenizer: str = "bytes"
    vocab_size: int = BYTE_VOCABULARY
    validation_fraction: float = 0.05
    permute_rows: bool = False  # same lanes in another order in memory: another order of summation, the same mathematics
    cache_dir: str = "runs/cache"

    def __post_init__(self) -> None:
        choice(self, "tokenizer", TOKENIZERS)
        between(self, "validation_fraction", 0.0, 0.5, ends="(]")
        if self.tokenizer == "bytes" and self.vocab_size != BYTE_VOCABULARY:
            raise ValueError(f"vocab_size must be {BYTE_VOCABULARY} with tokenizer='bytes', found {self.vocab_size}")
        whole(self, vocab_size=BYTE_VOCABULARY)
        unknown = sorted(set(self.parts) - set(PARTS))
        if unknown or (self.path is None and not self.parts):
            raise ValueError(f"parts must name some of {', '.join(PARTS)}, found {list(self.parts)}")
        if self.path is not None and not self.path:
            raise ValueError("path must name a file or a folder, found an empty string")


@dataclass(frozen=True)
class GroupConfig:
    """One AdamW group: factor on the learning rate and decoupled weight decay."""

    rate: float = 1.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _at_least(self, 0.0, "rate", "weight_decay")


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW, clipping by the global norm, warm-up and cosine down to `floor`."""

    rate: float = 2e-2
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0
    warmup: int = 100
    floor: float = 0.1
    ssm: GroupConfig = field(default_factory=lambda: GroupConfig(0.5, 0.1))
    rwkv: GroupConfig = field(default_factory=lambda: GroupConfig(0.3, 0.01))
    norm: GroupConfig = field(default_factory=lambda: GroupConfig(1.0, 0.0))
    other: GroupConfig = field(default_factory=lambda: GroupConfig(1.0, 0.1))

    def __post_init__(self) -> None:
        between(self, "rate", 0.0, math.inf)
        between(self, "beta1", 0.0, 1.0, ends="[)")
        between(self, "beta2", 0.0, 1.0, ends="[)")
        between(self, "eps", 0.0, math.inf)
        between(self, "clip_norm", 0.0, math.inf)
        between(self, "floor", 0.0, 1.0, ends="[]")
        whole(self, warmup=0)


@dataclass(frozen=True)
class LossConfig:
    """Weights of the parts of the loss; `state_penalty` names the states whose norm is held near `state_norm`."""

    state_penalty: list[str] = field(default_factory=lambda: ["ssm"])
    state_weight: float = 0.1
    state_norm: float = 5.0
    smooth_weight: float = 0.01

    def __post_init__(self) -> None:
        _at_least(self, 0.0, "state_weight", "state_norm", "smooth_weight")
        kinds = [kind for each in STATE_KINDS.values() for kind in each]
        if not set(self.state_penalty) <= set(kinds) or len(set(self.state_penalty)) != len(self.state_penalty):
            raise ValueError(f"state_penalty must name each of {', '.join(kinds)} at most once, found {list(self.state_penalty)}")


@dataclass(frozen=True)
class TrainingConfig:
    """Batches and the loop. `stop_at` ends a run early and leaves the schedule of `steps` as it is.

    `batch_size` counts the lanes of one optimiser step; `accumulation` of n sends them through the model in n equal groups. `remat` computes
    every block again in the backward pass instead of keeping what it computed. `precision` is that of the products of linear layers in training.
    """

    steps: int = 2000
    stop_at: int | None = None
    batch_size: int = 8
    context: int = 128
    accumulation: int = 1
    remat: bool = False
    precision: str = "full"
    carry_states: bool = True
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    log_every: int = 10
    monitor_every: int = 50

    def __post_init__(self) -> None:
        whole(self, steps=1, batch_size=1, context=2, accumulation=1, log_every=1, monitor_every=1)
        choice(self, "precision", PRECISIONS)
        if self.stop_at is not None:
            whole(self, stop_at=1)
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation must divide batch_size, found accumulation={self.accumulation} and batch_size={self.batch_size}")

    @property
    def last_step(self) -> int:
        """Number of the step after which the run ends."""
        return self.steps if self.stop_at is None else min(self.steps, self.stop_at)


@dataclass(frozen=True)
class EvaluationConfig:
    """Validation in a streamed pass over held-out text, what is measured at the end, the sample, and the lengths of the long-context task."""

    every: int = 250
    tokens: int = 131072
    final_tokens: int = 262144
    batch_size: int = 16
    sample_prompt: str = "def "
    sample_tokens: int = 240
    temperature: float = 0.7
    top_k: int | None = 40
    lengths: list[int] = field(default_factory=lambda: [1024, 4096, 8192, 16384])
    chunk: int = 512
    streams: int = 8  # stretches of text that the perplexity of a length is taken over, as far as there is text
    puzzles: int = 256  # of each task of reasoning, at the end; 0: no more than bits per byte is measured there
    context_shift: float | None = None  # cosine of successive hidden states below which states are reset; None: never

    def __post_init__(self) -> None:
        if self.context_shift is not None:
            between(self, "context_shift", -1.0, 1.0, ends="[]")
        whole(self, every=1, tokens=2, final_tokens=2, batch_size=1, sample_tokens=0, chunk=1, streams=1, puzzles=0)
        between(self, "temperature", 0.0, math.inf, ends="[)")
        if self.top_k is not None:
            whole(self, top_k=1)
        if not self.lengths or any(length < 1 for length in self.lengths):
            raise ValueError(f"lengths must hold positive numbers of tokens, found {list(self.lengths)}")


@dataclass(frozen=True)
class CheckpointConfig:
    """How often a checkpoint is written and how many of the newest are kept."""

    every: int = 250
    keep: int = 3

    def __post_init__(self) -> None:
        whole(self, every=1, keep=1)


@dataclass(frozen=True)
class UnfreezeConfig:
    """What is done to parameters that died. `noise` is relative to a parameter's spread, `injection` the spread of the gradient put in."""

    method: str = "none"
    noise: float = 0.01
    injection: float = 1e-3
    steps: int = 20  # for how many steps gradients are put in

    def __post_init__(self) -> None:
        choice(self, "method", UNFREEZE)
        _at_least(self, 0.0, "noise", "injection")
        whole(self, steps=1)


@dataclass(frozen=True)
class RecoveryConfig:
    """What a run does about losses and gradients that are not finite, and about a loss that explodes.

    A loss explodes above `explosion` times the larger of one nat and the median of the last `window` losses, once there are `minimum` of them.
    `patience` skipped steps in a row count as an explosion. Below `floor` of the configured rate the run gives up.
    """

    enabled: bool = True
    skip_factor: float = 0.5
    rollback_factor: float = 0.7
    explosion: float = 3.0
    window: int = 50
    minimum: int = 10
    patience: int = 3
    floor: float = 1e-3
    good_states: int = 5
    golden: bool = True
    unfreeze: UnfreezeConfig = field(default_factory=UnfreezeConfig)

    def __post_init__(self) -> None:
        between(self, "skip_factor", 0.0, 1.0, ends="(]")
        between(self, "rollback_factor", 0.0, 1.0, ends="(]")
        between(self, "explosion", 1.0, math.inf)
        between(self, "floor", 0.0, 1.0, ends="()")
        whole(self, window=1, minimum=1, patience=1, good_states=1)
        if self.minimum > self.window:
            raise ValueError(f"minimum must be at most window, found minimum={self.minimum} and window={self.window}")


@dataclass(frozen=True)
class MonitorsConfig:
    """Bounds beyond which a monitor raises an event; every `training.monitor_every` steps, drift at every evaluation."""

    enabled: bool = True
    state_low: float = 0.1
    state_high: float = 10.0
    state_warn: float = 100.0
    zero_share: float = 0.9
    opposed: float = -0.5
    opposed_looks: int = 4  # in a row
    vanishing: float = 1e-7
    alert: int = 5
    dying: float = 0.01  # share of a parameter's greatest RMS
    drift_tokens: int = 4096
    drift_chunk: int = 512
    drift_nats: float = 0.1
    drift_ratio: float = 2.0
    leak_megabytes: float = 64.0

    def __post_init__(self) -> None:
        _at_least(self, 0.0, "state_low", "vanishing", "drift_nats", "leak_megabytes")
        between(self, "zero_share", 0.0, 1.0, ends="[)")
        between(self, "opposed", -1.0, 0.0, ends="[)")
        between(self, "dying", 0.0, 1.0, ends="[)")
        between(self, "drift_ratio", 1.0, math.inf)
        whole(self, alert=0, opposed_looks=1, drift_tokens=2, drift_chunk=1)
        if not self.state_low < self.state_high <= self.state_warn:
            raise ValueError(
                f"state_low < state_high <= state_warn must hold, found state_low={self.state_low}, state_high={self.state_high} and "
                f"state_warn={self.state_warn}"
            )
        if self.drift_tokens < 2 * self.drift_chunk:
            raise ValueError(
                f"drift_tokens must hold at least two chunks, found drift_tokens={self.drift_tokens} and drift_chunk={self.drift_chunk}"
            )


@dataclass(frozen=True)
class TrainConfig:
    """Root of `train.yaml`. `model` holds an object of the class that `architecture` names in `MODELS`."""

    architecture: str = "grounded_mamba"
    seed: int = 0
    output_dir: str = "runs"
    run_dir: str | None = None
    resume: str = "none"
    long_context: bool = True
    model: Any = field(default_factory=GroundedMambaConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    monitors: MonitorsConfig = field(default_factory=MonitorsConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    comparison: ComparisonConfig = field(default_factory=ComparisonConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    rate_finder: RateFinderConfig = field(default_factory=RateFinderConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        choice(self, "architecture", tuple(MODELS))
        choice(self, "resume", ("none", "auto"))
        whole(self, seed=0)
        if not set(self.loss.state_penalty) <= set(STATE_KINDS[self.architecture]):
            raise ValueError(
                f"loss.state_penalty of {self.architecture} may name {', '.join(STATE_KINDS[self.architecture]) or 'nothing'}, "
                f"found {list(self.loss.state_penalty)}"
            )
        if self.training.precision == "bfloat16":
            if self.backend.dtype != "float32":
                raise ValueError(f"training.precision=bfloat16 keeps parameters and states in float32, found backend.dtype={self.backend.dtype}")
            if self.architecture == "gru":
                raise ValueError("training.precision=bfloat16 is for products outside a recurrence, of which gru has none but the head")
        if self.model.vocab_size < self.data.vocab_size:
            raise ValueError(
                f"model.vocab_size must be at least data.vocab_size, found model.vocab_size={self.model.vocab_size} "
                f"and data.vocab_size={self.data.vocab_size}"
            )
        if self.rate_finder.enabled and self.distributed.name != "none":
            raise ValueError(f"rate_finder looks in one process, found distributed.name={self.distributed.name}")
        self.distributed.check(self.backend.name, permuted=self.data.permute_rows, compared=bool(self.comparison.models))
