"""How a module computes in the training step, in JAX: blocks computed again in the backward pass, linear layers in bfloat16.

    y = round(round(x) round(W)) + b        round: to bfloat16; the product is summed in float32, and so are the gradients of x and W

Both are put on the layers from outside, for a step, so that the models know nothing of them and validation, sampling and files are of the
float32 parameters alone. The head is left out: rounding its output would be a rounding of the logits, and so of the loss. Rounding is
`reduce_precision`, because XLA leaves out a conversion to bfloat16 and back where it finds float32 the faster one.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from conf.schema import TrainingConfig


def rounded(x: Array) -> Array:
    """x in its own dtype, rounded to bfloat16."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def projected(x: Array, kernel: Array, dimensions: Any, **options: Any) -> Array:
    """`lax.dot_general` with its product in bfloat16; x and y in float32."""
    y = lax.dot_general(rounded(x).astype(jnp.bfloat16), rounded(kernel).astype(jnp.bfloat16), dimensions, **options)
    return rounded(y.astype(x.dtype))


def options(config: TrainingConfig) -> dict[str, str] | None:
    """What XLA has to be told: its scheduler for CPUs looks for parallel work first, and computes blocks again before anything is freed."""
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if config.remat and jax.default_backend() == "cpu" else None


def training(module: Any, config: TrainingConfig) -> Any:
    """The module, merged for this trace alone, as `config` has it."""
    module.remat = config.remat
    if config.precision == "bfloat16":
        for block in module.blocks:
            for _, layer in nnx.iter_modules(block):
                if isinstance(layer, nnx.Linear):
                    layer.dot_general = projected
    return module
