"""Schemas of `control.yaml`: one dataclass for each section, as in `conf.schema`. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from conf.models import HEADS, WaveCoreConfig, between, choice, whole
from conf.schema import DTYPES, CheckpointConfig, TrackerConfig

CONTROL_BACKENDS = ("torch", "torch_compiled", "jax")


@dataclass(frozen=True)
class ControlBackendConfig:
    """What computes: framework, precision, threads of torch (None leaves its choice; the default core's products are too small to share)."""

    name: str = "torch"
    dtype: str = "float32"
    threads: int | None = 1

    def __post_init__(self) -> None:
        choice(self, "name", CONTROL_BACKENDS)
        choice(self, "dtype", DTYPES)
        if self.threads is not None:
            whole(self, threads=1)


@dataclass(frozen=True)
class EnvironmentConfig:
    """A Gymnasium environment by name. `expert`: "module:function" in the place of the one that is scripted for that name."""

    name: str = "Pendulum-v1"
    expert: str | None = None

    def __post_init__(self) -> None:
        for name in ("name", "expert"):
            if getattr(self, name) is not None and not getattr(self, name):
                raise ValueError(f"{name} must not be empty")


@dataclass(frozen=True)
class EpisodesConfig:
    """Episodes of the expert, recorded once. An episode has noise of one of the standard deviations `noise`, in units of the action's half range.

    `random_share` of the steps lies in stretches of random actions. `discount` is that of the value target.
    """

    training: int = 160
    validation: int = 32
    noise: list[float] = field(default_factory=lambda: [0.1, 0.3, 1.0])
    random_share: float = 0.15
    discount: float = 0.97
    cache_dir: str = "runs/cache"

    def __post_init__(self) -> None:
        whole(self, training=1, validation=1)
        between(self, "random_share", 0.0, 1.0, ends="[]")
        between(self, "discount", 0.0, 1.0, ends="[)")
        if not self.noise or any(isinstance(sigma, bool) or not 0.0 <= sigma < math.inf for sigma in self.noise):
            raise ValueError(f"noise must hold standard deviations of at least 0, found {list(self.noise)}")


@dataclass(frozen=True)
class ControlOptimiserConfig:
    """AdamW with one group; its rate and clipping are the model's `learning_rate` and `gradient_clip`. Warm-up, then cosine to `floor`."""

    weight_decay: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    warmup: int = 100
    floor: float = 0.02

    def __post_init__(self) -> None:
        between(self, "weight_decay", 0.0, math.inf, ends="[)")
        between(self, "beta1", 0.0, 1.0, ends="[)")
        between(self, "beta2", 0.0, 1.0, ends="[)")
        between(self, "eps", 0.0, math.inf)
        between(self, "floor", 0.0, 1.0, ends="[]")
        whole(self, warmup=0)


@dataclass(frozen=True)
class ControlLossConfig:
    """Weights of cloned action, value and next observation, and of the squared excess of |s|, |w| and |p| over `bound`."""

    action: float = 1.0
    value: float = 0.1
    world_model: float = 1.0
    states: float = 0.1
    bound: float = 5.0

    def __post_init__(self) -> None:
        for name in ("action", "value", "world_model", "states", "bound"):
            between(self, name, 0.0, math.inf, ends="[)")


@dataclass(frozen=True)
class ControlTrainingConfig:
    """Updates on windows of `context` steps of `batch_size` episodes; states and memory go on from window to window, their gradients do not.

    `known_reward`: share of episodes in which the core is told the reward. `observation_noise`: largest standard deviation, in normalised
    units, of noise on what the world model sees (drawn from 0 to this for each window and episode).
    """

    steps: int = 1500
    batch_size: int = 32
    context: int = 25
    known_reward: float = 0.5
    observation_noise: float = 0.0
    log_every: int = 10

    def __post_init__(self) -> None:
        whole(self, steps=1, batch_size=1, context=1, log_every=1)
        between(self, "known_reward", 0.0, 1.0, ends="[]")
        between(self, "observation_noise", 0.0, math.inf, ends="[)")


@dataclass(frozen=True)
class ControlEvaluationConfig:
    """In the environment: `episodes` episodes of policy, expert and random actions; forecasts of `horizon` steps from `starts` starts, each
    after `warm_up` steps of an episode; a Lyapunov exponent over `lyapunov_steps` steps after `burn_in`, none for 0. `pictures`: an
    episode is rendered.
    """

    every: int = 200
    episodes: int = 20
    starts: int = 64
    warm_up: int = 10
    horizon: int = 50
    lyapunov_steps: int = 1000
    burn_in: int = 500
    pictures: bool = True

    def __post_init__(self) -> None:
        whole(self, every=1, episodes=1, starts=1, warm_up=0, horizon=1, lyapunov_steps=0, burn_in=0)
        if 0 < self.lyapunov_steps < 1000:
            raise ValueError(f"lyapunov_steps must be 0 or at least 1000, found {self.lyapunov_steps}")


def default_core() -> WaveCoreConfig:
    """The core of `model=wavecore_tiny`."""
    return WaveCoreConfig.development(heads=HEADS, learning_rate=1e-3, gradient_clip=1.0)


@dataclass(frozen=True)
class ControlConfig:
    """Root of `control.yaml`."""

    seed: int = 0
    output_dir: str = "runs"
    run_dir: str | None = None
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    model: WaveCoreConfig = field(default_factory=default_core)
    backend: ControlBackendConfig = field(default_factory=ControlBackendConfig)
    data: EpisodesConfig = field(default_factory=EpisodesConfig)
    optimiser: ControlOptimiserConfig = field(default_factory=ControlOptimiserConfig)
    loss: ControlLossConfig = field(default_factory=ControlLossConfig)
    training: ControlTrainingConfig = field(default_factory=ControlTrainingConfig)
    evaluation: ControlEvaluationConfig = field(default_factory=ControlEvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)

    def __post_init__(self) -> None:
        whole(self, seed=0)
        if set(self.model.heads) != set(HEADS):
            raise ValueError(f"model.heads must be {', '.join(HEADS)}: all three are trained, found {', '.join(self.model.heads)}")
        if self.training.batch_size > self.data.training:
            raise ValueError(
                f"training.batch_size must be at most data.training episodes, found {self.training.batch_size} and {self.data.training}")
