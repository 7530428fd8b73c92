"""Porting bugs that can be put into any NNX candidate: into its weights, its layers, its carried state, its gradients, its optimiser.

`nnx_injectors_more` has the others. Module paths are those of the candidate; `where` is the reference's path when it differs. Leaves are
candidate names. `changed_leaf`, `changed_module` and `main_output` are what injectors of one's own are made of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .. import tree
from ..mutate import Injector
from .nnx_trace import Patch


def changed_leaf(name: str, leaf: str, change: Callable[[np.ndarray, np.ndarray], np.ndarray], where: str | None = None) -> Injector:
    """Another value of one leaf: `change(value, value at initialisation)`, of the same shape."""

    def apply(weights: dict, fresh: Any) -> dict:
        if leaf not in weights:
            raise ValueError(f"injector {name!r} names leaf {leaf!r}, which the candidate does not have")
        made = np.ascontiguousarray(change(weights[leaf], fresh[leaf]), weights[leaf].dtype)
        if made.shape != weights[leaf].shape:
            raise ValueError(f"injector {name!r} changes the shape of {leaf} from {weights[leaf].shape} to {made.shape}: it would be refused")
        return {**weights, leaf: made}

    return Injector(f"{name} ({leaf})", leaf.rpartition(".")[0] if where is None else where, weights=apply)


def changed_module(name: str, path: str, where: str | None = None, around: Callable | None = None, prepare: Callable | None = None,
                   method: str = "__call__") -> Injector:
    """Another call of one module, or other attributes of it: `around` and `prepare` as `Patch` takes them."""
    return Injector(f"{name} ({path})", path if where is None else where, patches=(Patch(path, around, prepare, method),))


def transposed(path: str, where: str | None = None) -> Injector:
    """The kernel of a square Linear not transposed."""
    return changed_leaf("kernel not transposed", f"{path}.kernel", lambda value, _: value.T, where)


def missing_bias(path: str, where: str | None = None) -> Injector:
    """A bias that is not there."""
    return changed_leaf("missing bias", f"{path}.bias", lambda value, _: np.zeros_like(value), where)


def left_at_initialisation(leaf: str, where: str | None = None) -> Injector:
    """A leaf that conversion forgot."""
    return changed_leaf("left at initialisation", leaf, lambda _, fresh: fresh, where)


def plus_one(path: str, where: str | None = None) -> Injector:
    """(1 + w) for w in a norm."""
    return changed_leaf("(1 + w) for w", f"{path}.scale", lambda value, _: 1.0 + value, where)


def swapped_heads(leaf: str, heads: int, axis: int = 0, where: str | None = None) -> Injector:
    """The first two of `heads` blocks along an axis exchanged."""

    def swap(value: np.ndarray, _: np.ndarray) -> np.ndarray:
        blocks = np.split(value, heads, axis=axis)
        return np.concatenate([blocks[1], blocks[0], *blocks[2:]], axis=axis)

    return changed_leaf("two heads swapped", leaf, swap, where)


def main_output(change: Callable[[Any], Any]) -> Callable:
    """An `around` that changes the module's output, or the first element of a tuple of outputs."""

    def around(module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        outputs = call(*args, **kwargs)
        return (change(outputs[0]), *outputs[1:]) if isinstance(outputs, tuple) else change(outputs)

    return around


def scaled_output(path: str, factor: float = 1.5, where: str | None = None) -> Injector:
    """A uniform scale, which no cosine sees."""
    return changed_module(f"output x {factor:g}", path, where, main_output(lambda y: y * factor))


def wrong_channel(path: str, channel: int = 0, where: str | None = None) -> Injector:
    """One channel of the last axis 1 % too large."""
    return changed_module("one channel wrong", path, where, main_output(lambda y: y.at[..., channel].multiply(1.01)))


def wrong_last_token(path: str, where: str | None = None) -> Injector:
    """The last time step (axis 1) 1 % too large."""
    return changed_module("last token wrong", path, where, main_output(lambda y: y.at[:, -1].multiply(1.01)))


def shifted(path: str, where: str | None = None) -> Injector:
    """Time steps (axis 1) shifted by one."""
    return changed_module("shifted by one", path, where, main_output(lambda y: jnp.roll(y, 1, axis=1)))


def averaged_over_batch(path: str, where: str | None = None) -> Injector:
    """An output averaged over the batch."""
    return changed_module("averaged over the batch", path, where, main_output(lambda y: jnp.broadcast_to(y.mean(0, keepdims=True), y.shape)))


def low_precision(path: str, dtype: str = "float32", where: str | None = None) -> Injector:
    """The output of one module in low precision, cast back."""
    return changed_module(f"cast to {dtype}", path, where, main_output(lambda y: y.astype(dtype).astype(y.dtype)))


def extra_stop_gradient(path: str, where: str | None = None) -> Injector:
    """A gradient that ends at a module."""
    return changed_module("extra stop_gradient", path, where, main_output(jax.lax.stop_gradient))


def epsilon(path: str, value: float = 1e-6, where: str | None = None) -> Injector:
    """A norm with Flax's default epsilon instead of torch's."""
    return changed_module(f"epsilon {value:g}", path, where, prepare=lambda module: setattr(module, "epsilon", value))


def fast_variance(path: str, where: str | None = None) -> Injector:
    """A norm that computes its variance in one pass."""
    return changed_module("one-pass variance", path, where, prepare=lambda module: setattr(module, "use_fast_variance", True))


def tanh_gelu(path: str, where: str | None = None) -> Injector:
    """The tanh approximation inside the call of a module that uses `jax.nn.gelu` or `nnx.gelu`."""

    def around(module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        exact = jax.nn.gelu

        def tanh(x: Any, approximate: bool = True) -> Any:
            return exact(x, approximate=True)

        held = jax.nn.gelu, nnx.gelu
        jax.nn.gelu = nnx.gelu = tanh
        try:
            return call(*args, **kwargs)
        finally:
            jax.nn.gelu, nnx.gelu = held

    return changed_module("tanh gelu", path, where, around)


def dropped_state(path: str, argument: int = 1, where: str | None = None) -> Injector:
    """A module that starts from zero whatever state it is given."""

    def around(module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        changed = [tree.map_leaves(jnp.zeros_like, value) if index == argument else value for index, value in enumerate(args)]
        return call(*changed, **kwargs)

    return changed_module("state dropped", path, where, around)


def stale_state(path: str, argument: int = 1, output: int = 1, where: str | None = None) -> Injector:
    """A module that returns the state it was given (zeros when it was given none)."""

    def around(module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        outputs = list(call(*args, **kwargs))
        given = args[argument] if len(args) > argument else None
        outputs[output] = tree.map_leaves(jnp.zeros_like, outputs[output]) if given is None else given
        return tuple(outputs)

    return changed_module("state stale", path, where, around)


def early_state(path: str, output: int = 1, where: str | None = None) -> Injector:
    """A module that returns the state from before its last time step (axis 1 of its first argument)."""

    def around(module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        outputs = list(call(*args, **kwargs))
        if args[0].shape[1] > 1:
            outputs[output] = call(args[0][:, :-1], *args[1:], **kwargs)[output]
        return tuple(outputs)

    return changed_module("state taken before the update", path, where, around)


def state_in_low_precision(path: str, output: int = 1, dtype: str = "bfloat16", where: str | None = None) -> Injector:
    """A state that is stored in low precision."""

    def around(module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        outputs = list(call(*args, **kwargs))
        outputs[output] = tree.map_leaves(lambda leaf: leaf.astype(dtype).astype(leaf.dtype) if tree.is_float(leaf) else leaf, outputs[output])
        return tuple(outputs)

    return changed_module(f"state in {dtype}", path, where, around)


def untied(path: str, method: str = "attend", leaf: str = "embedding", where: str | None = None) -> Injector:
    """A tied head that uses a copy of the table: the values are right, the gradient does not reach the table."""

    def around(module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        variable = getattr(module, leaf)
        value = variable.get_value()
        variable.set_value(jax.lax.stop_gradient(value))
        try:
            return call(*args, **kwargs)
        finally:
            variable.set_value(value)

    return changed_module("tied weights untied", path, where, around, method=method)


def optimiser_setting(**settings: Any) -> Injector:
    """An optimiser with other hyperparameters than the reference's: fields of `Trajectory`."""
    spelled = ", ".join(f"{name}={value}" for name, value in settings.items())
    return Injector(f"optimiser {spelled}", "optimiser", trajectory=lambda trajectory: replace(trajectory, **settings))
