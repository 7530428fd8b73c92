"""`TrainStep`: one optimiser step, written once; a framework adds gradients, updates and conversions.

    loss = cross-entropy (labels of -100 ignored) + state_weight * sum over layers and kinds of (mean |state| - state_norm)^2
           + smooth_weight * mean |logits_t - logits_{t-1}|

Norms run along the last axis and means over the rest; their gradient at zero is zero. With accumulation the rows of a batch are
taken in groups, each with its own carried states, so the gradient is that of the whole batch up to the square in the penalty.
Letters: B batch, L length, V vocabulary, N state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conf.schema import TrainConfig
from experiments.data.batches import Batch

IGNORED = -100
PARTS = ("loss", "cross_entropy", "state_penalty", "smoothness")
States = list[dict[str, Any]]


@dataclass
class StepResult:
    """What a step measured: the parts of the loss, weighted as they enter it, the gradient's norm before clipping, and details on request."""

    losses: dict[str, float]
    gradient_norm: float
    gate: np.ndarray  # (layers,), empty for a model without one
    gradients: dict[str, np.ndarray] = field(default_factory=dict)  # torch names, before clipping
    states: list[dict[str, np.ndarray]] = field(default_factory=list)
    ssm_states: list[np.ndarray] = field(default_factory=list)  # (B, L, N) of every layer


class TrainStep(ABC):
    """Owns the model, the optimiser and the states that are carried from step to step (rows in the order of the lanes)."""

    def __init__(self, model: Any, config: TrainConfig) -> None:
        self.model, self.config = model, config
        self.steps_done = 0
        self.states: States | None = None
        size = config.training.batch_size
        self._order = np.random.default_rng([config.seed, 1]).permutation(size) if config.data.permute_rows else None

    def step(self, batch: Batch, rates: Mapping[str, float], *, details: bool = False) -> StepResult:
        """One optimiser step with the learning rate of every group. Rows go through the model in `permute_rows`' order, if any."""
        fresh = batch.fresh or self.states is None or not self.config.training.carry_states
        before = self.zero_states(len(batch.ids)) if fresh else self.states
        ids, labels, states = batch.ids, batch.labels, before
        if self._order is not None:
            ids, labels, states = ids[self._order], labels[self._order], self._rows(before, self._order)
        groups = self.config.training.accumulation
        rows = np.array_split(np.arange(len(ids)), groups)
        outcomes = [self._accumulate(ids[chosen], labels[chosen], states if groups == 1 else self._rows(states, chosen)) for chosen in rows]
        parts, afters, auxes = zip(*outcomes, strict=True)
        after = afters[0] if groups == 1 else self._joined(afters)
        gradients = self._gradients() if details else {}
        aux = auxes[-1]
        if self._order is not None and self._memory_due():
            aux = self._aux(batch.ids[rows[-1]], self._rows(before, rows[-1]))  # the rows that the bank takes depend on their order
        norm = self._apply(rates)
        self.states = after if self._order is None else self._rows(after, np.argsort(self._order))
        if self._has_bank():
            self._update_memory(aux)
        self.steps_done += 1
        losses = {name: float(np.mean([part[name] for part in parts])) for name in PARTS}
        result = StepResult(losses, float(norm), np.asarray(self._numpy(aux.get("gate", ())), dtype=np.float64), gradients)
        if details:
            result.states, result.ssm_states = self._numpy(self.states), self._numpy(aux.get("ssm_states", []))
        return result

    def _has_bank(self) -> bool:
        return bool(getattr(self.model.config, "memory_size", 0))

    def _memory_due(self) -> bool:
        return self._has_bank() and (self.steps_done + 1) % self.model.config.memory_every == 0

    def arrays(self) -> dict[str, np.ndarray]:
        """Parameters and buffers under torch's names."""
        return self.model.arrays()

    def carried(self) -> dict[str, np.ndarray]:
        """The carried states as a flat dict; empty before the first step."""
        states = [] if self.states is None else self._numpy(self.states)
        return {f"{layer}.{kind}": value for layer, state in enumerate(states) for kind, value in state.items()}

    def load_carried(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Inverse of `carried`."""
        layers = sorted({int(name.split(".")[0]) for name in arrays})
        states = [{name.split(".")[1]: value for name, value in arrays.items() if name.startswith(f"{layer}.")} for layer in layers]
        self.states = self._native(states) if states else None

    @abstractmethod
    def zero_states(self, batch_size: int) -> States:
        """States before the first token."""

    @abstractmethod
    def evaluate(self, ids: np.ndarray, labels: np.ndarray, states: States | None) -> tuple[float, States]:
        """Total cross-entropy in nats over labels that are not ignored, and the states to go on from. Nothing is trained."""

    @abstractmethod
    def observe(self, ids: np.ndarray, labels: np.ndarray, states: States | None) -> tuple[float, States, dict[str, Any]]:
        """`evaluate`, and NumPy copies of the states ("states") and of the SSM states of every token ("ssm_states")."""

    @abstractmethod
    def optimiser_arrays(self) -> dict[str, np.ndarray]:
        """AdamW's moments: `first.NAME` and `second.NAME` in the shapes of torch's parameters."""

    @abstractmethod
    def load_optimiser(self, arrays: Mapping[str, np.ndarray], steps: int) -> None:
        """Inverse of `optimiser_arrays`, after `steps` steps."""

    @abstractmethod
    def _accumulate(self, ids: np.ndarray, labels: np.ndarray, states: States) -> tuple[dict[str, Any], States, dict[str, Any]]:
        """Add this group's share of the gradient; the loss parts, the states after it and the model's aux."""

    @abstractmethod
    def _apply(self, rates: Mapping[str, float]) -> float:
        """Clip, update the parameters, clear the gradient; its norm before clipping."""

    @abstractmethod
    def _gradients(self) -> dict[str, np.ndarray]:
        """The accumulated gradient under torch's names, in torch's layout."""

    @abstractmethod
    def _update_memory(self, aux: dict[str, Any]) -> None:
        """Count one optimiser step in the memory bank."""

    @abstractmethod
    def _aux(self, ids: np.ndarray, states: States) -> dict[str, Any]:
        """The model's aux of a forward pass without gradient."""

    @abstractmethod
    def _native(self, tree: Any) -> Any:
        """NumPy arrays of a nested list or dict as the framework's."""

    @abstractmethod
    def _numpy(self, tree: Any) -> Any:
        """The inverse of `_native`."""

    @abstractmethod
    def _rows(self, states: States, rows: np.ndarray) -> States:
        """Those rows of every state."""

    @abstractmethod
    def _joined(self, groups: tuple[States, ...]) -> States:
        """States of groups of rows as states of all rows."""
