"""The loss of a distillation and the student's step.

    loss = w_h mean_l( sum |s_l - t_l|^2 / sum |t_l|^2 ) + w_e mean(1 - cos)        sums over valid tokens and channels

s_l and t_l are the hidden states of student and teacher after layer l = 1 .. depth; the embedding layer's are equal by construction.
Letters: B texts, L length, T valid tokens of the batch, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from conf.distil_schema import DistilLossConfig, DistilOptimiserConfig
from experiments.schedule import factor

EMBEDDINGS = ("word_embeddings.", "position_embeddings.", "token_type_embeddings.", "embedding_norm.")
GROUPS = ("delta", "teacher")


class Parts(NamedTuple):
    """The loss; relative squared error (depth,) by layer; mean of 1 - cosine."""

    loss: Tensor
    layers: Tensor
    embedding: Tensor


@dataclass(frozen=True)
class Figures:
    """One step in numbers."""

    loss: float
    hidden: float
    embedding: float
    gradient_norm: float


def distillation_loss(
    student_states: Sequence[Tensor], student_embedding: Tensor, states: Tensor, embedding: Tensor, mask: Tensor, weights: DistilLossConfig
) -> Parts:
    """`student_states`: depth of (B, L, D); `states` (T, depth, D), tokens in the order of `mask` (B, L); embeddings (B, D), unit rows."""
    errors = [
        (student[mask] - states[:, layer]).square().sum() / states[:, layer].square().sum() for layer, student in enumerate(student_states)
    ]
    layers = torch.stack(errors)
    apart = (1 - (student_embedding * embedding).sum(-1)).mean()
    return Parts(weights.hidden * layers.mean() + weights.embedding * apart, layers, apart)


def group_of(name: str) -> str | None:
    """The group of rates of a parameter: "delta", "teacher", or None for the embeddings, which are frozen unless asked for."""
    if name.startswith(EMBEDDINGS):
        return None
    return "delta" if ".delta." in name else "teacher"


class Student:
    """A LAM's torch module under training."""

    def __init__(self, module: nn.Module, optimiser: DistilOptimiserConfig, loss: DistilLossConfig) -> None:
        """Freezes the embeddings of `module` unless the configuration moves them."""
        self.module, self.config, self.loss = module, optimiser, loss
        chosen: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in module.named_parameters():
            group = group_of(name) or ("teacher" if optimiser.train_embeddings else None)
            if group is None:
                parameter.requires_grad_(False)
            if parameter.requires_grad:
                chosen.setdefault((group or "teacher", parameter.ndim > 1), []).append(parameter)
        groups = [
            {"params": parameters, "weight_decay": optimiser.weight_decay if matrices else 0.0, "group": group}
            for (group, matrices), parameters in chosen.items()
        ]
        self._trained = [parameter for group in groups for parameter in group["params"]]
        self._optimiser = torch.optim.AdamW(groups, lr=0.0, betas=(optimiser.beta1, optimiser.beta2), eps=optimiser.eps, fused=True)

    def rates(self, step: int, steps: int) -> dict[str, float]:
        """Learning rate of every group at `step` = 1 .. `steps`."""
        scale = factor(step, steps, self.config.warmup, self.config.floor)
        return {"delta": scale * self.config.delta_rate, "teacher": scale * self.config.teacher_rate}

    def forward(self, ids: np.ndarray, mask: np.ndarray, states: np.ndarray, embedding: np.ndarray) -> Parts:
        """Loss of a batch: ids and mask (B, L); the teacher's states (T, depth, D) and embeddings (B, D)."""
        valid = torch.from_numpy(mask)
        out = self.module(torch.from_numpy(ids), valid, output_hidden_states=True)
        return distillation_loss(out.hidden_states[1:], out.embedding, torch.from_numpy(states), torch.from_numpy(embedding), valid, self.loss)

    def step(self, batch: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], rates: dict[str, float]) -> Figures:
        """One update. The figures are those before it."""
        for group in self._optimiser.param_groups:
            group["lr"] = rates[group["group"]]
        self._optimiser.zero_grad()
        parts = self.forward(*batch)
        parts.loss.backward()
        parts = Parts(*(part.detach() for part in parts))
        norm = nn.utils.clip_grad_norm_(self._trained, self.config.clip_norm)
        self._optimiser.step()
        return Figures(float(parts.loss), float(parts.layers.mean()), float(parts.embedding), float(norm))

    def observe(self, batches: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]) -> dict[str, Any]:
        """Over the batches, without an update: relative squared error by layer, over tokens, and mean cosine, over texts."""
        layers, apart, tokens, texts = np.zeros(0), 0.0, 0, 0
        with torch.no_grad():
            for batch in batches:
                parts = self.forward(*batch)
                size, count = int(batch[1].sum()), len(batch[0])
                layers = (layers if layers.size else 0.0) + parts.layers.numpy().astype(np.float64) * size
                apart, tokens, texts = apart + float(parts.embedding) * count, tokens + size, texts + count
        return {"layers": (layers / max(tokens, 1)).tolist(), "cosine": 1 - apart / max(texts, 1)}

    def embed(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Embeddings (B, D) of ids and mask (B, L)."""
        with torch.no_grad():
            return self.module(torch.from_numpy(ids), torch.from_numpy(mask)).embedding.numpy()
