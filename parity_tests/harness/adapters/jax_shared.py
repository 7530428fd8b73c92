"""What the adapters of both kinds of Flax module share: precision by context, arrays, and the scalars that are differentiated."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import tree
from ..policy import Policy
from .base import cotangent, target
from .nnx_trace import is_array

RANDOM = "make it deterministic (dropout left on?), by its own settings or by `call` of the case"


@contextlib.contextmanager
def precision(policy: Policy) -> Iterator[None]:
    """JAX's matmul precision as the policy says while the context lasts."""
    with jax.default_matmul_precision("default" if policy.tf32 else policy.matmul):
        yield


def device() -> str:
    """The device JAX computes on."""
    found = jax.devices()[0]
    return f"{found.platform} ({found.device_kind})"


def wide(on: bool) -> Any:
    """Context in which JAX has 64-bit types (or has not)."""
    return jax.enable_x64(on)


@dataclass(frozen=True)
class Part:
    """A module by itself: what tells it from others (`graph`), its weights by name relative to `path`, which of them are trained, and
    `live(weights)`, a context that gives it with these weights as something to call."""

    path: str
    graph: Any
    weights: Mapping[str, Any]
    trained: Mapping[str, bool]
    live: Callable[[Mapping[str, Any]], contextlib.AbstractContextManager[Callable[..., Any]]]


def is_float32(held: Any) -> bool:
    """Whether a dtype setting of a layer is float32."""
    try:
        return jnp.dtype(held) == jnp.float32
    except TypeError:
        return False


def numpied(value: Any) -> Any:
    """A leaf as an independent NumPy array; half precision becomes float32, which holds its values exactly."""
    if not is_array(value):
        return value
    if str(value.dtype) in ("bfloat16", "float16"):
        value = value.astype(jnp.float32)
    return np.array(value, copy=True)


def projection(outputs: Any, seed: int) -> Any:
    """A fixed random projection of every float output, summed."""
    total: Any = 0.0
    for name, leaf in tree.named(outputs).items():
        if tree.is_float(leaf):
            total = total + (leaf * jnp.asarray(cotangent(name, tuple(leaf.shape), seed), leaf.dtype)).sum()
    return total


def distance(outputs: Any, seed: int) -> Any:
    """The default loss: half the mean squared distance of every float output from a fixed random target, summed."""
    total: Any = 0.0
    for name, leaf in tree.named(outputs).items():
        if tree.is_float(leaf):
            total = total + 0.5 * jnp.square(leaf - jnp.asarray(target(name, tuple(leaf.shape), seed), leaf.dtype)).mean()
    return total
