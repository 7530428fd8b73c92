"""More porting bugs that can be put into any NNX candidate: convolutions, embeddings, weights that went astray, precision, norms, gradients.

The conventions are those of `nnx_injectors`: module paths and leaves are the candidate's, `where` is the reference's path when it differs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import tree
from ..mutate import Injector
from .nnx_injectors import changed_leaf, changed_module, main_output

MANTISSA = 10  # bits that TF32 keeps of an operand


def within(namespace: Any, **functions: Callable) -> Callable:
    """An `around`: the module's own call, with functions of `namespace` replaced while it is traced."""

    def around(module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        with contextlib.ExitStack() as stack:
            for name, function in functions.items():
                stack.enter_context(mock.patch.object(namespace, name, function))
            return call(*args, **kwargs)

    return around


@contextlib.contextmanager
def held_at(module: Any, **values: Any) -> Iterator[None]:
    """Variables of a module at other values while the context lasts."""
    kept = {name: getattr(module, name).get_value() for name in values}
    try:
        for name, value in values.items():
            getattr(module, name).set_value(value)
        yield
    finally:
        for name, value in kept.items():
            getattr(module, name).set_value(value)


def flipped_taps(path: str, where: str | None = None) -> Injector:
    """A convolution for a correlation: the taps of the kernel (axis 0) in the other order."""
    return changed_leaf("convolution flipped", f"{path}.kernel", lambda value, _: value[::-1], where)


def shifted_taps(path: str, where: str | None = None) -> Injector:
    """The taps of a kernel (axis 0) one place further, the last one lost."""
    return changed_leaf("convolution shifted", f"{path}.kernel", lambda value, _: np.concatenate([np.zeros_like(value[:1]), value[:-1]]), where)


def padded_on_the_other_side(path: str, where: str | None = None) -> Injector:
    """A causal convolution along axis 1 that sees the future: padded behind, where the past should be before."""

    def around(module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        with held_at(module, kernel=module.kernel.get_value()[::-1]):
            mirrored = call(jnp.flip(args[0], 1), *args[1:], **kwargs)
        return main_output(lambda y: jnp.flip(y, 1))(module, lambda: mirrored, (), {})

    return changed_module("conv padded on the other side", path, where, around)


def cache_off_by_one(path: str, output: int = 1, axis: int = 1, where: str | None = None) -> Injector:
    """A cache of past inputs (leaves of an output, time on `axis`) in which everything stands one step too early."""
    return _on_state("cache off by one", path, output, lambda leaf: jnp.roll(leaf, 1, axis), where)


def _on_state(name: str, path: str, output: int, change: Callable[[Any], Any], where: str | None) -> Injector:
    def around(module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        outputs = list(call(*args, **kwargs))
        outputs[output] = tree.map_leaves(lambda leaf: change(leaf) if tree.is_float(leaf) else leaf, outputs[output])
        return tuple(outputs)

    return changed_module(name, path, where, around)


def embedding_scale(path: str, where: str | None = None) -> Injector:
    """Embeddings times sqrt(width), as Gemma has them, in a model that does not scale them."""
    return changed_module("embedding x sqrt(width)", path, where, main_output(lambda y: y * math.sqrt(y.shape[-1])))


def embedding_scale_dtype(path: str, dtype: str = "bfloat16", where: str | None = None) -> Injector:
    """An embedding whose scale sqrt(width) is right but for its dtype: off by the rounding of sqrt(width) to `dtype`."""

    def rounded(y: Any) -> Any:
        scale = math.sqrt(y.shape[-1])
        return y * (float(np.float64(scale).astype(jnp.dtype(dtype))) / scale)

    return changed_module(f"embedding scale in {dtype}", path, where, main_output(rounded))


def clamped_index(path: str, limit: int, where: str | None = None) -> Injector:
    """Indices (the first argument) above `limit` silently clamped to it."""

    def around(module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        return call(jnp.minimum(args[0], limit), *args[1:], **kwargs)

    return changed_module(f"index clamped at {limit}", path, where, around)


def exchanged(leaf: str, other: str, where: str | None = None) -> Injector:
    """Two leaves of one shape in each other's place: q and k swapped. Located at the first one unless `where` says otherwise."""

    def apply(weights: dict, fresh: Any) -> dict:
        _same_shape(weights, leaf, other)
        return {**weights, leaf: weights[other].copy(), other: weights[leaf].copy()}

    return Injector(f"two weights exchanged ({leaf}, {other})", leaf.rpartition(".")[0] if where is None else where, weights=apply)


def loaded_twice(leaf: str, source: str, where: str | None = None) -> Injector:
    """A leaf that was given the value of another one of its shape, as a loop with a wrong index does."""

    def apply(weights: dict, fresh: Any) -> dict:
        _same_shape(weights, leaf, source)
        return {**weights, leaf: weights[source].copy()}

    return Injector(f"loaded twice ({leaf} from {source})", leaf.rpartition(".")[0] if where is None else where, weights=apply)


def _same_shape(weights: dict, leaf: str, other: str) -> None:
    missing = [name for name in (leaf, other) if name not in weights]
    if missing:
        raise ValueError(f"an injector names leaf {missing[0]!r}, which the candidate does not have")
    if weights[leaf].shape != weights[other].shape:
        raise ValueError(f"{leaf} and {other} must have one shape to change places, found {weights[leaf].shape} and {weights[other].shape}")


def wrong_weight_row(leaf: str, row: int = 0, where: str | None = None) -> Injector:
    """One row (axis 0) of a weight 1 % too large."""
    return changed_leaf("one weight row wrong", leaf, lambda value, _: value * np.where(np.arange(len(value)) == row, 1.01, 1.0).reshape(
        -1, *[1] * (value.ndim - 1)), where)


def coarse_weight(leaf: str, dtype: str = "bfloat16", where: str | None = None) -> Injector:
    """A leaf that was stored in low precision."""
    return changed_leaf(f"weight cast to {dtype}", leaf, lambda value, _: np.asarray(jnp.asarray(value).astype(dtype), value.dtype), where)


def wrong_head(path: str, heads: int, head: int = 0, where: str | None = None) -> Injector:
    """One of `heads` blocks of the last axis 1 % too large."""

    def change(y: Any) -> Any:
        split = y.reshape(*y.shape[:-1], heads, -1)
        return split.at[..., head, :].multiply(1.01).reshape(y.shape)

    return changed_module("one head wrong", path, where, main_output(change))


def wrong_row(path: str, row: int = 0, where: str | None = None) -> Injector:
    """One sequence of the batch (axis 0) 1 % too large."""
    return changed_module("one row wrong", path, where, main_output(lambda y: y.at[row].multiply(1.01)))


def coarse_input(path: str, dtype: str = "bfloat16", argument: int = 0, where: str | None = None) -> Injector:
    """An argument that is silently cast to low precision on its way in."""

    def around(module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        changed = [value.astype(dtype).astype(value.dtype) if index == argument else value for index, value in enumerate(args)]
        return call(*changed, **kwargs)

    return changed_module(f"input cast to {dtype}", path, where, around)


def tf32_matmul(path: str, leaf: str = "kernel", where: str | None = None) -> Injector:
    """A matrix product whose operands, the first argument and a leaf, are rounded as TF32 rounds them."""

    def around(module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        coarse = [jax.lax.reduce_precision(value, 8, MANTISSA) for value in (getattr(module, leaf).get_value(), args[0])]
        with held_at(module, **{leaf: coarse[0]}):
            return call(coarse[1], *args[1:], **kwargs)

    return changed_module("matmul in TF32", path, where, around)


def cast_before_the_scale(path: str, dtype: str = "float32", scale: str = "scale", where: str | None = None) -> Injector:
    """A norm that goes back to low precision before its scale and bias are applied instead of after."""

    def around(module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        bias = getattr(module, "bias", None)
        weight = getattr(module, scale).get_value()
        plain = {scale: jnp.ones_like(weight)} | ({} if bias is None else {"bias": jnp.zeros_like(bias.get_value())})
        shift = 0.0 if bias is None else bias.get_value()
        with held_at(module, **plain):
            y = call(*args, **kwargs)
        return y.astype(dtype).astype(y.dtype) * weight + shift

    return changed_module(f"cast to {dtype} before the scale", path, where, around)


def ddof(path: str, where: str | None = None) -> Injector:
    """A LayerNorm with the variance of a sample, divided by n - 1."""
    return _renormalised("variance with ddof 1", path, lambda var, eps, n: var * n / (n - 1) + eps, where)


def epsilon_outside(path: str, where: str | None = None) -> Injector:
    """A LayerNorm that adds its epsilon to the deviation instead of to the variance."""
    return _renormalised("epsilon outside the root", path, lambda var, eps, n: jnp.square(jnp.sqrt(var) + eps), where)


def _renormalised(name: str, path: str, square: Callable[[Any, float, int], Any], where: str | None) -> Injector:
    def around(module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        x = args[0]
        var = x.var(-1, keepdims=True)
        shift = 0.0 if module.bias is None else module.bias.get_value()
        return (call(*args, **kwargs) - shift) * jnp.sqrt((var + module.epsilon) / square(var, module.epsilon, x.shape[-1])) + shift

    return changed_module(name, path, where, around)


def dropout_left_on(path: str, rate: float = 0.1, where: str | None = None) -> Injector:
    """Dropout on an output, with the same draw in every call."""

    def change(y: Any) -> Any:
        return jnp.where(jax.random.bernoulli(jax.random.key(0), 1.0 - rate, y.shape), y / (1.0 - rate), 0.0)

    return changed_module(f"dropout {rate:g} left on", path, where, main_output(change))


def nan_to_zero(path: str, where: str | None = None) -> Injector:
    """An output in which NaN became 0; only a case with the regime "one NaN" can tell."""
    return changed_module("NaN replaced by 0", path, where, main_output(lambda y: jnp.where(jnp.isnan(y), 0.0, y)))


def written_in_place(path: str, leaf: str, where: str = "effects") -> Injector:
    """A call that writes to a variable of its module."""

    def around(module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        outputs = call(*args, **kwargs)
        variable = getattr(module, leaf)
        variable.set_value(variable.get_value() + 1)
        return outputs

    return changed_module("written in place", path, where, around)


def dropped_ragged_token(path: str, chunk: int, time_outputs: tuple[int, ...] = (0,), where: str | None = None) -> Injector:
    """The last token is left out when the length (axis 1 of the first argument) is no multiple of `chunk`; its outputs are zero."""

    def around(module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        length = args[0].shape[1]
        if length % chunk == 0 or length == 1:
            return call(*args, **kwargs)
        outputs = call(args[0][:, :-1], *args[1:], **kwargs)
        whole = isinstance(outputs, tuple)

        def fill(y: Any) -> Any:
            return jnp.concatenate([y, jnp.zeros_like(y[:, :1])], axis=1)

        filled = [fill(y) if place in time_outputs else y for place, y in enumerate(outputs if whole else (outputs,))]
        return tuple(filled) if whole else filled[0]

    return changed_module("token dropped from a ragged chunk", path, where, around)


def bias_outside(path: str, linear: str, method: str = "__call__", where: str | None = None) -> Injector:
    """f(W x) + b for f(W x + b): the bias of the Linear `linear` of a module is added behind `method`, whose first argument is its output."""

    def around(module: Any, call: Callable, args: tuple, kwargs: dict) -> Any:
        bias = getattr(module, linear).bias.get_value()
        return call(args[0] - bias, *args[1:], **kwargs) + bias

    return changed_module("bias outside the gate", path, where, around, method=method)


def kept_gradient(path: str, rank: int | None = None, where: str | None = None) -> Injector:
    """A missing stop_gradient: those inside the call of a module let the gradient of arrays of `rank` (of all when None) through."""
    stop = jax.lax.stop_gradient
    return changed_module("missing stop_gradient", path, where, within(
        jax.lax, stop_gradient=lambda x: x if rank is None or getattr(x, "ndim", None) == rank else stop(x)))


def _optimiser(name: str, make: Callable[..., Any], **settings: Any) -> Injector:
    def replaced() -> contextlib.AbstractContextManager:
        return mock.patch.object(optax, "adamw", make)

    return Injector(name, "optimiser", trajectory=lambda trajectory: replace(trajectory, **settings), context=replaced, reuse=True)


def coupled_decay() -> Injector:
    """Adam with L2 for AdamW: the decay goes through the moments."""

    def adam(lr: float, b1: float, b2: float, eps: float, weight_decay: float) -> Any:
        return optax.chain(optax.add_decayed_weights(weight_decay), optax.scale_by_adam(b1, b2, eps), optax.scale(-lr))

    return _optimiser("optimiser decay before the moments", adam)


def epsilon_in_the_root() -> Injector:
    """AdamW with its epsilon under the root of the second moment."""

    def adam(lr: float, b1: float, b2: float, eps: float, weight_decay: float) -> Any:
        return optax.chain(optax.scale_by_adam(b1, b2, 0.0, eps), optax.add_decayed_weights(weight_decay), optax.scale(-lr))

    return _optimiser("optimiser eps inside the root", adam)


def clipped_after_the_moments(clip: float = 1.0) -> Injector:
    """AdamW that clips its updates instead of the gradients."""

    def adam(lr: float, b1: float, b2: float, eps: float, weight_decay: float) -> Any:
        return optax.chain(optax.scale_by_adam(b1, b2, eps), optax.clip_by_global_norm(clip), optax.add_decayed_weights(weight_decay),
                           optax.scale(-lr))

    return _optimiser("optimiser clips after the moments", adam, clip=None)


def no_bias_correction() -> Injector:
    """AdamW without the correction of the moments for their start at zero."""

    def adam(lr: float, b1: float, b2: float, eps: float, weight_decay: float) -> Any:
        def init(parameters: Any) -> tuple:
            return tuple(jax.tree.map(jnp.zeros_like, parameters) for _ in range(2))

        def update(grads: Any, moments: tuple, parameters: Any = None) -> tuple:
            first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, moments[0], grads)
            second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, moments[1], grads)
            return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), first, second), (first, second)

        return optax.chain(optax.GradientTransformation(init, update), optax.add_decayed_weights(weight_decay), optax.scale(-lr))

    return _optimiser("optimiser without bias correction", adam)
