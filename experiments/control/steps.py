"""`ControlStep`: one optimiser step of behaviour cloning, value and world model, written once; a framework adds gradients and updates.

    loss = w_a L(y, expert action) + w_v (value - return)^2 + w_m |next_obs - next observation|^2
           + w_s sum over s, w, p of mean max(|state| - bound, 0)^2
    L    = squared error (continuous) or cross-entropy (discrete); means over the steps that the mask keeps

The same core runs over two streams, the rows of one batch. Policy rows see (x_t, a_(t-1), r_(t-1)) and give action and value. World-model
rows have to know the action whose result they predict: it is their `a_prev`, as it will be the next step's, so they see (x_t, a_t, 0) and
give x_(t+1). Each stream has its own states and memory, which go on from window to window; their gradients do not.
Letters: T steps of a window, B episodes, O observation width, A action width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from conf.control_schema import ControlConfig

PARTS = ("loss", "action", "value", "world_model", "states")


@dataclass(frozen=True)
class Batch:
    """A window of both streams, all in the dtype of the model: policy rows, then world-model rows."""

    observation: np.ndarray  # (T, 2B, O), normalised, as all that follows
    previous_action: np.ndarray  # (T, 2B, A)
    reward: np.ndarray  # (T, 2B, 1), zero where it is not known
    action: np.ndarray  # (T, B, A) the expert's, one-hot where choices are discrete
    value: np.ndarray  # (T, B, 1)
    following: np.ndarray  # (T, B, O)
    mask: np.ndarray  # (T, B) 1 where the step belongs to an episode
    fresh: np.ndarray  # (2B,) bool, rows at which an episode begins with this window


class ControlStep(ABC):
    """Owns the model, the optimiser and what the rows carry from window to window."""

    def __init__(self, model: Any, config: ControlConfig) -> None:
        """`model`: what `runtime.build("wavecore", ...)` made on `config.backend`."""
        self.model, self.config = model, config
        self.carried: Any = None

    def step(self, batch: Batch, rate: float) -> dict[str, float]:
        """One optimiser step at learning rate `rate`. Returns the parts of the loss, unweighted but for "loss", and the gradient's norm."""
        parts, self.carried = self._step(batch, self._begin(self.carried, batch.fresh), rate)
        return parts

    def evaluate(self, batch: Batch, carried: Any = None) -> tuple[dict[str, float], Any]:
        """The parts of the loss without training, and what to go on from."""
        return self._evaluate(batch, self._begin(carried, batch.fresh))

    @abstractmethod
    def carried_states(self) -> dict[str, np.ndarray]:
        """s, w and p (2B, ·) of the rows as the last window left them, for monitors."""

    @abstractmethod
    def _begin(self, carried: Any, fresh: np.ndarray) -> Any:
        """`carried` with the rows of new episodes set to zero, memory included; zeros everywhere where nothing is carried."""

    @abstractmethod
    def _step(self, batch: Batch, state: Any, rate: float) -> tuple[dict[str, float], Any]:
        """`step` from a given state."""

    @abstractmethod
    def _evaluate(self, batch: Batch, state: Any) -> tuple[dict[str, float], Any]:
        """`evaluate` from a given state."""


def make(model: Any, config: ControlConfig) -> ControlStep:
    """The step for a model that `runtime.build` made; imports only that backend's framework."""
    if config.backend.name == "jax":
        from experiments.control.jax_step import JaxControlStep

        return JaxControlStep(model, config)
    from experiments.control.torch_step import TorchControlStep

    return TorchControlStep(model, config)
