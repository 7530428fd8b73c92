"""The training step in PyTorch. Letters as in `experiments.steps.base`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from conf.schema import LossConfig, TrainConfig
from experiments.data.batches import Batch
from experiments.distributed.group import ALONE, Group
from experiments.steps.base import IGNORED, Gradients, States, Totals, TrainStep
from experiments.steps.groups import GROUPS, group_of
from experiments.steps.torch_forward import training
from runtime.arrays import layout


def norm(x: Tensor) -> Tensor:
    """Euclidean norm along the last axis, with gradient zero where the norm is zero."""
    square = (x * x).sum(-1)
    positive = square > 0
    return torch.where(positive, torch.sqrt(torch.where(positive, square, 1.0)), 0.0)


def loss_parts(
    logits: Tensor, labels: Tensor, states: States, config: LossConfig, totals: Totals | None = None,
    means: Callable[[Sequence[Tensor]], list[Tensor]] = list,
) -> dict[str, Tensor]:
    """The loss and its weighted parts, or a group's share of them. logits (B, L, V), labels (B, L), states as the model returns them; `means` of
    the processes' numbers."""
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    smoothness = config.smooth_weight * norm(logits[:, 1:] - logits[:, :-1]).mean() if config.smooth_weight else logits.new_zeros(())
    norms = [norm(state[kind]).mean() for state in states for kind in config.state_penalty if config.state_weight]
    total, count, smoothness, *norms = means([total, (labels != IGNORED).sum(), smoothness, *norms])
    cross_entropy = total / (torch.where(count > 0, count, 1) if totals is None else totals.tokens)
    penalty = logits.new_zeros(())
    for place, mean in enumerate(norms):
        if totals is None:
            penalty = penalty + (mean - config.state_norm) ** 2
        else:
            beyond = float(totals.norms[place]) - config.state_norm
            penalty = penalty + totals.share * (beyond**2 + 2 * beyond * (mean - float(totals.norms[place])))
    penalty = config.state_weight * penalty
    smoothness = smoothness if totals is None else totals.share * smoothness
    return {"loss": cross_entropy + penalty + smoothness, "cross_entropy": cross_entropy, "state_penalty": penalty, "smoothness": smoothness}


class TorchStep(TrainStep):
    """AdamW over the groups of `GROUPS`; parameters frozen by the configuration are in none of them."""

    def __init__(self, model: Any, config: TrainConfig, group: Group = ALONE) -> None:
        super().__init__(model, config, group)
        self.module = model.module
        self._shared: Any = None if group.name == "none" else group  # processes of torch that train together
        self._lanes = self._shared and self._shared.lanes(config.training.batch_size, config.training.accumulation)
        if self._shared:
            self._shared.shard(self.module)
        self._parameters = {name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad}
        members: dict[str, list[Tensor]] = {group: [] for group in GROUPS}
        for name, parameter in self._parameters.items():
            members[group_of(name)].append(parameter)
        settings = config.optimiser
        self._optimiser = torch.optim.AdamW(
            [
                {"params": parameters, "lr": 0.0, "weight_decay": getattr(settings, group).weight_decay, "name": group}
                for group, parameters in members.items()
                if parameters
            ],
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
        )

    def zero_states(self, batch_size: int) -> States:
        if self._shared is None:
            return self.module.init_states(batch_size)
        dtype = next(self.module.parameters()).dtype  # a sharded parameter makes sharded zeros
        return [{kind: torch.zeros(shape, dtype=dtype) for kind, shape in shapes.items()} for shapes in self.module.state_shapes(batch_size)]

    def arrays(self) -> dict[str, np.ndarray]:
        if self._shared is None:
            return super().arrays()
        held = self.module.state_dict()
        return {name: self._whole_array(held[name]) for name in layout(self.model.name, self.model.config)}

    @torch.no_grad()
    def evaluate(self, ids: np.ndarray, labels: np.ndarray, states: States | None) -> tuple[float, States]:
        logits, states = self.module(torch.from_numpy(ids), states)
        return self._nats(logits, labels), states

    @torch.no_grad()
    def observe(self, ids: np.ndarray, labels: np.ndarray, states: States | None) -> tuple[float, States, dict[str, Any]]:
        logits, states, aux = self.module(torch.from_numpy(ids), states, return_aux=True)
        return self._nats(logits, labels), states, {"states": self._numpy(states), "ssm_states": self._numpy(aux.get("ssm_states", []))}

    @staticmethod
    def _nats(logits: Tensor, labels: np.ndarray) -> float:
        target = torch.from_numpy(labels)
        each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="none")
        return float(each.double().sum())

    def optimiser_arrays(self) -> dict[str, np.ndarray]:
        arrays = {}
        for name, parameter in self._parameters.items():
            state = self._optimiser.state[parameter]
            if state:
                arrays[f"first.{name}"] = self._whole_array(state["exp_avg"])
                arrays[f"second.{name}"] = self._whole_array(state["exp_avg_sq"])
        return arrays

    def load_optimiser(self, arrays: Mapping[str, np.ndarray], steps: int) -> None:
        self.steps_done = steps
        for name, parameter in self._parameters.items():
            self._optimiser.state[parameter] = {
                "step": torch.tensor(float(steps)),
                "exp_avg": self._held(arrays[f"first.{name}"].copy(), parameter),
                "exp_avg_sq": self._held(arrays[f"second.{name}"].copy(), parameter),
            }

    def _accumulate(self, ids: np.ndarray, labels: np.ndarray, states: States) -> tuple[dict[str, Any], States, dict[str, Any]]:
        shared, due = self._shared, self._shared is not None and self._last and self._memory_due()
        module = shared.trained(self.module) if shared else self.module
        with (
            training(self.module, self.config.training),
            shared.reducing(module, self._last) if shared else nullcontext(),
            shared.bank_rows(self.module) if due else nullcontext() as rows,
        ):
            logits, states, aux = module(torch.from_numpy(ids), states, return_aux=True)
            parts = loss_parts(logits, torch.from_numpy(labels), states, self.config.loss, self._totals, shared.means if shared else list)
            parts["loss"].backward()
        if shared and "gate" in aux:
            aux = {**aux, "gate": shared.mean(aux["gate"])}
        if due:
            aux = {**aux, "memory_rows": rows()}
        detached = [{kind: value.detach() for kind, value in state.items()} for state in states]
        return {name: part.item() for name, part in parts.items()}, detached, aux

    def _apply(self, rates: Mapping[str, float]) -> float:
        self._fill()
        total = torch.nn.utils.clip_grad_norm_(self._parameters.values(), self.config.optimiser.clip_norm)
        for group in self._optimiser.param_groups:
            group["lr"] = rates[group["name"]]
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        return self._full(total).item()

    def _fill(self) -> None:
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # AdamW skips None, and would skip the decay with it

    def _gradients(self) -> Gradients:
        return {
            name: np.zeros(tuple(parameter.shape)) if parameter.grad is None else self._whole_array(parameter.grad)
            for name, parameter in self._parameters.items()
        }

    def _add(self, gradients: Mapping[str, np.ndarray]) -> None:
        self._fill()
        for name, value in gradients.items():
            gradient = self._parameters[name].grad
            gradient += self._held(value, gradient)

    def _norm(self) -> float:
        self._fill()
        return self._full(torch.nn.utils.get_total_norm([parameter.grad for parameter in self._parameters.values()])).item()

    def _clean(self) -> dict[str, int]:
        counts = {name: int((~torch.isfinite(self._full(parameter.grad))).sum()) for name, parameter in self._parameters.items()}
        counts = {name: count for name, count in counts.items() if count}
        for name in counts:
            self._parameters[name].grad.zero_()
        return counts

    def _discard(self) -> None:
        self._optimiser.zero_grad(set_to_none=True)

    def _load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        held = self.module.state_dict()
        with torch.no_grad():
            for name, value in arrays.items():
                held[name].copy_(self._held(value, held[name]))

    def _update_memory(self, aux: dict[str, Any]) -> None:
        self.module.update_memory(aux)

    @torch.no_grad()
    def _aux(self, ids: np.ndarray, states: States) -> dict[str, Any]:
        return self.module(torch.from_numpy(ids), states, return_aux=True)[2]

    def _full(self, tensor: Tensor) -> Tensor:
        return tensor if self._shared is None else self._shared.full(tensor)

    def _whole_array(self, tensor: Tensor) -> np.ndarray:
        """A copy of all of a tensor that may be sharded."""
        return self._full(tensor).detach().cpu().numpy().copy()

    def _held(self, value: np.ndarray, like: Tensor) -> Tensor:
        """An array as `like` holds its own numbers, sharded if it is."""
        tensor = torch.from_numpy(value).to(like.dtype)
        return tensor if self._shared is None else self._shared.placed(tensor, like)

    def _mine(self, batch: Batch) -> Batch:
        return batch if self._lanes is None else Batch(batch.ids[self._lanes], batch.labels[self._lanes], batch.fresh)

    def _part(self, tree: Any) -> Any:
        return tree if self._lanes is None else _map(lambda leaf: leaf[self._lanes], tree)

    def _whole(self, tree: Any) -> Any:
        if self._shared is None:
            return tree
        size = self.config.training.batch_size // self._shared.size
        accumulation = self.config.training.accumulation
        return _map(lambda leaf: self._shared.whole(leaf, accumulation if len(leaf) == size else 1), tree)  # or of one micro-batch

    def _means(self, numbers: list[float]) -> list[float]:
        return numbers if self._shared is None else [mean.item() for mean in self._shared.means([torch.tensor(each).double() for each in numbers])]

    def _finite(self, states: States) -> bool:
        finite = super()._finite(states)
        return finite if self._shared is None else self._shared.every(finite)

    def _native(self, tree: Any) -> Any:
        return _map(torch.from_numpy, tree)

    def _numpy(self, tree: Any) -> Any:
        return _map(lambda leaf: leaf.detach().cpu().numpy(), tree)

    def _rows(self, states: States, rows: np.ndarray) -> States:
        index = torch.from_numpy(rows)
        return _map(lambda leaf: leaf[index], states)

    def _joined(self, groups: tuple[States, ...]) -> States:
        return [{kind: torch.cat([group[layer][kind] for group in groups]) for kind in groups[0][layer]} for layer in range(len(groups[0]))]


def _map(function: Any, tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _map(function, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_map(function, value) for value in tree]
    return function(tree)
