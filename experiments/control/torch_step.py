"""The control step in torch. Letters as in `experiments.control.steps`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from conf.control_schema import ControlConfig, ControlLossConfig
from experiments.control.steps import Batch, ControlStep
from torch_impl.state import CoreState


def loss_parts(y: Tensor, info: dict[str, Any], batch: dict[str, Tensor], config: ControlLossConfig, discrete: bool) -> dict[str, Tensor]:
    """The loss and its parts from a rollout of both streams: y (T, 2B, A), info as the core returns it."""
    mask, rows = batch["mask"], batch["mask"].shape[1]
    kept = mask.sum()
    chosen, wanted = y[:, :rows], batch["action"]
    action = -(wanted * torch.log_softmax(chosen, -1)).sum(-1) if discrete else (chosen - wanted).square().mean(-1)
    excess = [(info[name].abs() - config.bound).clamp_min(0.0).square().mean() for name in ("fast_state", "wave_state", "particle_state")]
    parts = {
        "action": (mask * action).sum() / kept,
        "value": (mask * (info["value"][:, :rows] - batch["value"]).square()[..., 0]).sum() / kept,
        "world_model": (mask * (info["next_obs"][:, rows:] - batch["following"]).square().mean(-1)).sum() / kept,
        "states": sum(excess[1:], start=excess[0]),
    }
    return {"loss": sum((getattr(config, name) * part for name, part in parts.items()), start=torch.zeros_like(kept)), **parts}


class TorchControlStep(ControlStep):
    """AdamW on all parameters."""

    def __init__(self, model: Any, config: ControlConfig) -> None:
        super().__init__(model, config)
        self.module = model.module
        settings = config.optimiser
        self._optimiser = torch.optim.AdamW(
            self.module.parameters(), lr=0.0, betas=(settings.beta1, settings.beta2), eps=settings.eps, weight_decay=settings.weight_decay)

    def carried_states(self) -> dict[str, np.ndarray]:
        return {name: getattr(self.carried, name).numpy() for name in ("s", "w", "p")}

    def _begin(self, carried: CoreState | None, fresh: np.ndarray) -> CoreState:
        if carried is None:
            return self.module.init_state(len(fresh))
        new = torch.from_numpy(fresh)
        return _rows(lambda leaf: torch.where(new.reshape(-1, *[1] * (leaf.ndim - 1)), torch.zeros_like(leaf), leaf), carried)

    def _step(self, batch: Batch, state: CoreState, rate: float) -> tuple[dict[str, float], CoreState]:
        parts, state = self._forward(batch, state)
        parts["loss"].backward()
        for parameter in self.module.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # a memory that is written and not read in a window of one step
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.config.model.gradient_clip)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        return {name: part.item() for name, part in parts.items()} | {"gradient_norm": norm.item()}, state

    @torch.no_grad()
    def _evaluate(self, batch: Batch, state: CoreState) -> tuple[dict[str, float], CoreState]:
        parts, state = self._forward(batch, state)
        return {name: part.item() for name, part in parts.items()}, state

    def _forward(self, batch: Batch, state: CoreState) -> tuple[dict[str, Tensor], CoreState]:
        tensors = {name: torch.from_numpy(value) for name, value in vars(batch).items()}
        y, after, info = self.module.rollout(state, tensors["observation"], tensors["previous_action"], tensors["reward"])
        parts = loss_parts(y, info, tensors, self.config.loss, self.config.model.output_type == "discrete")
        return parts, CoreState(*_map(Tensor.detach, tuple(after)))


def _rows(function: Any, state: CoreState) -> CoreState:
    """`function` of every leaf that has a row for each episode: all but the scales of the memory."""
    return CoreState(*_map(function, tuple(state[:-1])), state.scales)


def _map(function: Any, tree: Any) -> Any:
    return tuple(_map(function, value) for value in tree) if isinstance(tree, tuple) else function(tree)
