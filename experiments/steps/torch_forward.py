"""How a module computes in the training step, in PyTorch: blocks computed again in the backward pass, linear layers in bfloat16.

    y = round(round(x) round(W)^T) + b        round: to bfloat16; the product is summed in float32, and so are the gradients of x and W

Both are put on the layers from outside, for a step, so that the models know nothing of them and validation, sampling and files are of the
float32 parameters alone. Not autocast: it would take every matrix product inside the recurrences and the attention, with states and decays,
which have to stay in float32, and would mean something else in the two frameworks. The head is left out: rounding its output would be a
rounding of the logits, and so of the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conf.schema import TrainingConfig


def projected(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer with its product in bfloat16; x and y in float32."""
    y = F.linear(x.to(torch.bfloat16), layer.weight.to(torch.bfloat16)).to(x.dtype)
    return y if layer.bias is None else y + layer.bias


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
                block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
                changed.append(block)
        yield
    finally:
        for layer in changed:
            del layer.forward
