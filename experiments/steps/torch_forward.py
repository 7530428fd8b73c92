"""How a module computes in the training step, in PyTorch: blocks computed again in the backward pass, linear layers in bfloat16.

    y = round(round(x) round(W)^T) + b        round: to bfloat16; the product is summed in float32, and so are the gradients of x and W

Both are put on the layers from outside, for a step, so that the models know nothing of them and validation, sampling and files are of the
float32 parameters alone. Not autocast: it would take every matrix product inside the recurrences and the attention, with states and decays,
which have to stay in float32, and would mean something else in the two frameworks. The head is left out: rounding its output would be a
rounding of the logits, and so of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from conf.schema import TrainingConfig


def projected(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer with its product in bfloat16; x and y in float32."""
    y = F.linear(x.to(torch.bfloat16), layer.weight.to(torch.bfloat16)).to(x.dtype)
    return y if layer.bias is None else y + layer.bias


class Recomputed:
    """A function call of which autograd keeps the inputs alone; what else it would keep is computed again when the first of it is asked for.

    As `torch.utils.checkpoint` without reentrance, which refuses to give a tensor twice: the backward pass of the compiled WKV asks twice.
    """

    def __init__(self, function: Callable[..., Any], *inputs: Any) -> None:
        self._function, self._inputs = function, inputs
        self._count = 0
        self._kept: list[Tensor] = []

    def __call__(self) -> Any:
        with saved_tensors_hooks(self._number, self._get):
            return self._function(*self._inputs)

    def _number(self, _: Tensor) -> int:
        self._count += 1
        return self._count - 1

    def _get(self, number: int) -> Tensor:
        if not self._kept:
            with torch.enable_grad(), saved_tensors_hooks(self._keep, lambda tensor: tensor):
                self._function(*self._inputs)
            if len(self._kept) != self._count:
                raise RuntimeError(f"a block computed again kept {len(self._kept)} tensors, at first {self._count}: it must compute alike twice")
        return self._kept[number]

    def _keep(self, tensor: Tensor) -> Tensor:
        self._kept.append(tensor.detach())
        return self._kept[-1]


def recomputed(function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`, its intermediate results computed again in the backward pass."""
    return Recomputed(function, *inputs)()


@contextmanager
def training(module: nn.Module, config: TrainingConfig) -> Iterator[None]:
    """The module as `config` has it, for forward and backward of a step: a block that is computed again has to be computed alike."""
    changed: list[nn.Module] = []
    try:
        for block in module.blocks:
            if config.precision == "bfloat16":
                for layer in block.modules():
                    if isinstance(layer, nn.Linear):
                        layer.forward = partial(projected, layer)
                        changed.append(layer)
            if config.remat:
                block.forward = partial(recomputed, block.forward)
                changed.append(block)
        yield
    finally:
        for layer in changed:
            del layer.forward
