"""`TrainStep`: one optimiser step, written once; a framework adds gradients, updates and conversions.

    loss = cross-entropy (labels of -100 ignored) + state_weight * sum over layers and kinds of (mean |state| - state_norm)^2
           + smooth_weight * mean |logits_t - logits_{t-1}|

Norms run along the last axis and means over the rest; their gradient at zero is zero.

A batch is what one optimiser step sees: `training.batch_size` lanes of `training.context` tokens. With `training.accumulation` = n its lanes
go through the model in n groups (micro-batches), each with the carried states of its lanes. Every mean stays one over the whole batch, so
that groups change no loss and no gradient: cross-entropy is divided by the labels of the whole batch that are not ignored; and the square
of the penalty, which does not split, is taken to first order about the mean norm m of the whole batch,

    (m - target)^2 = sum over groups of share * ((m - target)^2 + 2 (m - target) (m_group - m)),

exact in value and in gradient. A forward pass without gradients, before the others, gives m. Alone the memory bank knows of groups: its
rows are those of the last one.
Letters: B batch, L length, V vocabulary, N state.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conf.schema import TrainConfig
from experiments.data.batches import Batch
from experiments.distributed.group import ALONE, Group
from experiments.monitors import context_shift
from runtime.arrays import check

IGNORED = -100
PARTS = ("loss", "cross_entropy", "state_penalty", "smoothness")
States = list[dict[str, Any]]
Gradients = dict[str, np.ndarray]


@dataclass(frozen=True)
class Totals:
    """What a group of rows has to know of the whole batch: its labels that count, the group's share of rows, mean norms of states."""

    tokens: float  # of which a process that has rows of its own counts its share
    share: float
    norms: np.ndarray  # by layer, then by kind as `loss.state_penalty` names them; empty without a penalty


@dataclass
class StepResult:
    """What a step measured: the parts of the loss, weighted as they enter it, the gradient's norm before clipping, and details on request."""

    losses: dict[str, float]
    gradient_norm: float
    gate: np.ndarray  # (layers,), empty for a model without one
    gradients: dict[str, np.ndarray] = field(default_factory=dict)  # torch names, before clipping
    states: list[dict[str, np.ndarray]] = field(default_factory=list)
    ssm_states: list[np.ndarray] = field(default_factory=list)  # (B, L, N) of every layer
    skipped: str = ""  # what was not finite, where a guarded step therefore changed nothing
    zeroed: dict[str, int] = field(default_factory=dict)  # parameters whose gradient a guarded step zeroed -> entries that were not finite


class TrainStep(ABC):
    """Owns the model, the optimiser and the states that are carried from step to step (rows in the order of the lanes)."""

    def __init__(self, model: Any, config: TrainConfig, group: Group = ALONE) -> None:
        """`group`: the processes that the model is trained in; rows and carried states in here are then those of this one."""
        self.model, self.config, self.group = model, config, group
        self._last = True  # whether the micro-batch at hand is the last of its step
        self.steps_done = 0
        self.states: States | None = None
        self._totals: Totals | None = None  # of the batch at hand, where it goes through in groups
        size = config.training.batch_size
        self._order = np.random.default_rng([config.seed, 1]).permutation(size) if config.data.permute_rows else None

    def step(
        self, batch: Batch, rates: Mapping[str, float], *, details: bool = False, guard: bool = False,
        inject: Callable[[Gradients], Gradients] | None = None,
    ) -> StepResult:
        """One optimiser step with the learning rate of every group. Rows go through the model in `permute_rows`' order, if any.

        `guard`: a loss, state or gradient norm that is not finite leaves parameters, optimiser, bank and carried states as they were, and
        a parameter's gradient that is not finite is zeroed. `inject`: what to add to the gradient that it is given.
        """
        batch = self._mine(batch)
        fresh = batch.fresh or self.states is None or not self.config.training.carry_states
        before = self.zero_states(len(batch.ids)) if fresh else self.states
        ids, labels, states = batch.ids, batch.labels, before
        if self._order is not None:
            ids, labels, states = ids[self._order], labels[self._order], self._rows(before, self._order)
        groups = self.config.training.accumulation
        rows = np.array_split(np.arange(len(ids)), groups)
        self._totals = self._totals_of(ids, labels, states, rows) if groups > 1 else None
        outcomes = []
        for number, chosen in enumerate(rows, start=1):
            self._last = number == groups
            outcomes.append(self._accumulate(ids[chosen], labels[chosen], states if groups == 1 else self._rows(states, chosen)))
        parts, afters, auxes = zip(*outcomes, strict=True)
        after = afters[0] if groups == 1 else self._joined(afters)
        aux = auxes[-1]
        losses = {name: float(np.sum([part[name] for part in parts])) for name in PARTS}
        result = StepResult(losses, math.nan, np.asarray(self._numpy(aux.get("gate", ())), dtype=np.float64))
        if inject is not None:
            self._add(inject(self._gradients()))
        result.gradients = self._gradients() if details else {}
        if guard:
            self._guard(result, after)
        if not result.skipped:
            if self._order is not None and self._memory_due():
                aux = self._aux(batch.ids[rows[-1]], self._rows(before, rows[-1]))  # the rows that the bank takes depend on their order
            result.gradient_norm = float(self._apply(rates))
            self.states = after if self._order is None else self._rows(after, np.argsort(self._order))
            if self._has_bank():
                self._update_memory(aux)
            self.steps_done += 1
        else:
            self._discard()
            self.states = before
        if details:
            result.states, result.ssm_states = self._whole(self._numpy(self.states)), self._whole(self._numpy(aux.get("ssm_states", [])))
        return result

    def _totals_of(self, ids: np.ndarray, labels: np.ndarray, states: States, rows: list[np.ndarray]) -> Totals:
        """What groups of equal size, the rows `rows`, need of their batch."""
        settings, norms = self.config.loss, []
        if settings.state_weight and settings.state_penalty:
            for chosen in rows:
                _, after = self.evaluate(ids[chosen], labels[chosen], self._evaluable(self._rows(states, chosen)))
                norms.append([np.linalg.norm(state[kind], axis=-1).mean() for state in self._numpy(after) for kind in settings.state_penalty])
        tokens, *means = self._means([float((labels != IGNORED).sum()), *(np.mean(norms, axis=0) if norms else ())])
        return Totals(tokens or 1.0, 1 / len(rows), np.array(means))

    def _guard(self, result: StepResult, after: States) -> None:
        """Say in `result` why the step must not be applied, or clean its gradient."""
        infinite = [f"{name} {value}" for name, value in result.losses.items() if not math.isfinite(value)]
        finite = self._finite(after)
        if infinite or not finite:
            result.skipped = ", ".join(infinite) or "a state that would be carried"
            return
        norm = self._norm()
        if not math.isfinite(norm):
            result.zeroed = self._clean()
            norm = self._norm() if result.zeroed else norm
        if not math.isfinite(norm):
            result.skipped = f"gradient norm {norm}"

    def restore(self, arrays: Mapping[str, np.ndarray], optimiser: Mapping[str, np.ndarray], states: Mapping[str, np.ndarray], updates: int) -> None:
        """Go back to what `arrays`, `optimiser_arrays` and `carried` gave after `updates` steps; no moments at all stand for zeros."""
        self.load_arrays(arrays)
        moments = optimiser or {name: np.zeros_like(value) for name, value in self.optimiser_arrays().items()}
        if moments:
            self.load_optimiser(moments, updates)
        self.steps_done = updates
        self.load_carried(states)

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Parameters and buffers under torch's names, tied ones left out or equal. Raises ValueError for missing, unused or misshapen ones."""
        self._load_arrays(check(self.config.architecture, self.model.config, arrays, self.config.backend.dtype))

    def reset_shifted(self, before: States | None, after: States, ids: np.ndarray, threshold: float) -> tuple[States, int]:
        """`after` reading `ids` (B, L) from `before`; rows whose context shifted get what reading them from zero states gives. Their number too."""
        now = self._numpy(after)
        rows = context_shift.shifted(None if before is None else self._numpy(before), now, threshold)
        if not rows.any():
            return after, 0
        fresh = self._numpy(self.evaluate(ids, ids, None)[1])
        return self._native(context_shift.chosen(rows, fresh, now)), int(rows.sum())

    def _has_bank(self) -> bool:
        return bool(getattr(self.model.config, "memory_size", 0))

    def _memory_due(self) -> bool:
        return self._has_bank() and (self.steps_done + 1) % self.model.config.memory_every == 0

    def arrays(self) -> dict[str, np.ndarray]:
        """Parameters and buffers under torch's names."""
        return self.model.arrays()

    def carried(self) -> dict[str, np.ndarray]:
        """The carried states as a flat dict; empty before the first step."""
        states = [] if self.states is None else self._whole(self._numpy(self.states))
        return {f"{layer}.{kind}": value for layer, state in enumerate(states) for kind, value in state.items()}

    def load_carried(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Inverse of `carried`."""
        layers = sorted({int(name.split(".")[0]) for name in arrays})
        states = [{name.split(".")[1]: value for name, value in arrays.items() if name.startswith(f"{layer}.")} for layer in layers]
        self.states = self._native(self._part(states)) if states else None

    def _mine(self, batch: Batch) -> Batch:
        """The rows of a batch that this process takes."""
        return batch

    def _part(self, tree: Any) -> Any:
        """The rows that this process takes of NumPy arrays of all rows (B, ...)."""
        return tree

    def _whole(self, tree: Any) -> Any:
        """NumPy arrays of all rows from those of this process: the inverse of `_part`."""
        return tree

    def _evaluable(self, states: States) -> States:
        """States of training as `evaluate` takes them."""
        return states

    def _means(self, numbers: list[float]) -> list[float]:
        """Means over the processes that have rows of their own."""
        return numbers

    def _finite(self, states: States) -> bool:
        """Whether every entry of the states of all rows is finite."""
        return all(np.isfinite(value).all() for state in self._numpy(states) for value in state.values())

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
        """Add this group's share of the gradient; its share of the loss parts, the states after it and the model's aux."""

    @abstractmethod
    def _apply(self, rates: Mapping[str, float]) -> float:
        """Clip, update the parameters, clear the gradient; its norm before clipping."""

    @abstractmethod
    def _gradients(self) -> Gradients:
        """The accumulated gradient under torch's names, in torch's layout."""

    @abstractmethod
    def _add(self, gradients: Mapping[str, np.ndarray]) -> None:
        """Add to the accumulated gradient of the parameters named."""

    @abstractmethod
    def _norm(self) -> float:
        """Norm of the accumulated gradient."""

    @abstractmethod
    def _clean(self) -> dict[str, int]:
        """Zero the gradient of every parameter in which an entry is not finite; the number of such entries by name."""

    @abstractmethod
    def _discard(self) -> None:
        """Clear the accumulated gradient."""

    @abstractmethod
    def _load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over complete and checked parameters and buffers."""

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
