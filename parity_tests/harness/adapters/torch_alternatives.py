"""What a port may have written in the place of a tensor function: the table that `torch_variants` tries.

An alternative is `f(func, args, kwargs) -> result`; None from it means that it does not apply to that call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .torch_slips import slips

Alternative = Callable[[Any, tuple, dict], Any]
STOPPED, BATCH = "gradient stopped", "averaged over the batch"
RESHAPES = ("unflatten", "flatten", "reshape", "view")
CASTS = ("matmul", "linear", "softmax", "exp", "cumsum", "sum", "einsum")
CONSTANTS = ("mul", "add", "sub", "rsub", "div", "pow", "clamp")
ACTIVATIONS: dict[str, Callable] = {
    "relu": F.relu, "silu": F.silu, "gelu": F.gelu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "softplus": F.softplus, "exp": torch.exp,
}
REDUCTIONS: dict[str, Callable] = {"sum": torch.sum, "mean": torch.mean, "amax": torch.amax}
COMPARED = {"gt": torch.ge, "ge": torch.gt, "lt": torch.le, "le": torch.lt}


@functools.lru_cache(1024)
def named(func: Any) -> str:
    """The name of a function without the underscores of an operator: `__rsub__` is "rsub", `x *= y` is "mul"."""
    name = getattr(func, "__name__", str(func)).strip("_")
    name = {"truediv": "div", "true_divide": "div", "multiply": "mul", "subtract": "sub", "rmul": "mul", "radd": "add", "imul": "mul",
            "iadd": "add", "isub": "sub", "rdiv": "rtruediv"}.get(name, name)
    return "mT" if name == "get" and getattr(getattr(func, "__self__", None), "__name__", "") in ("mT", "T", "H", "mH") else name


def _first(args: tuple) -> torch.Tensor | None:
    return args[0] if args and isinstance(args[0], torch.Tensor) else None


def _on(function: Callable[[torch.Tensor], Any]) -> Alternative:
    """The function of the first argument alone."""
    return lambda func, args, kwargs: None if _first(args) is None else function(args[0])


def _then(function: Callable[[Any], Any]) -> Alternative:
    """The function of the result."""
    return lambda func, args, kwargs: function(func(*args, **kwargs))


def _with(**changes: Any) -> Alternative:
    """The same call with other keyword arguments."""
    return lambda func, args, kwargs: func(*args, **{**kwargs, **changes})


def _operand(place: int) -> Alternative:
    """A binary operation left out: one of its operands in the shape of the result."""
    def make(func: Any, args: tuple, kwargs: dict) -> Any:
        if len(args) <= place or not isinstance(args[place], torch.Tensor):
            return None
        result = func(*args, **kwargs)
        return args[place].to(result.dtype).expand(result.shape) if args[place].ndim <= result.ndim else None

    return make


def alternatives(name: str, args: tuple, kwargs: dict, result: Any) -> Iterator[tuple[str, str, Alternative, bool]]:
    """(family, phrase, alternative, particular) for a function called with arguments of these shapes; the particular ones are tried first."""
    shape = result if isinstance(result, torch.Size) else None
    if name == "gelu":
        exact = kwargs.get("approximate", "none") == "none"
        yield "gelu", "tanh for erf in gelu" if exact else "erf for tanh in gelu", _with(approximate="tanh" if exact else "none"), True
    if name in ACTIVATIONS or name == "logaddexp":
        if name == "sigmoid":
            yield "inverted gate", "1 - sigmoid for sigmoid", _then(lambda y: 1.0 - y), True
            yield "decay", "exp(-exp) for sigmoid", _on(lambda x: torch.exp(-torch.exp(x))), True
        for other, function in ACTIVATIONS.items():
            if other != name and not (name == "logaddexp" and other == "softplus"):
                yield "activation", f"{other} for {'softplus' if name == 'logaddexp' else name}", _on(function), True
        yield "activation", f"{name} missing", _on(lambda x: x), True
    if name in ("softmax", "log_softmax") and shape is not None:
        held = kwargs.get("dim", args[1] if len(args) > 1 else -1)
        function = torch.softmax if name == "softmax" else torch.log_softmax
        for axis in range(len(shape)):
            if isinstance(held, int) and axis != held % len(shape):
                yield "axis", f"{name} over axis {axis} for {held % len(shape)}", _on(lambda x, f=function, axis=axis: f(x, axis)), True
        if name == "softmax":
            yield "activation", "sigmoid for softmax", _on(torch.sigmoid), True
    if name in ("layer_norm", "rms_norm", "group_norm"):
        yield from _norms(name, kwargs)
    if name in ("var", "std", "var_mean", "std_mean"):
        held = kwargs.get("correction", 1 if kwargs.get("unbiased", True) else 0)
        clean = {key: value for key, value in kwargs.items() if key not in ("unbiased", "correction")}
        yield "ddof", "a spread over n - 1 for one over n, or the other way", (
            lambda func, given, _: func(*given, **clean, correction=1 - int(held or 0)) if len(given) < 3 else None), True
    if name in ("tril", "triu"):
        for by in (1, -1):
            yield "mask off by one", f"{name} off by one", (lambda func, given, _, by=by: func(
                given[0], (given[1] if len(given) > 1 else _.get("diagonal", 0)) + by)), True
        yield "mask missing", f"a missing {name}", _on(lambda x: x), True
    if name in ("argmin", "argmax"):
        yield "tie", f"the last of equal values for the first in {name}", _last_of_equal, True
        other = "argmax" if name == "argmin" else "argmin"
        yield "extreme", f"{other} for {name}", (lambda func, given, rest: getattr(torch, other)(*given, **rest)), True
    if name in COMPARED or name in ("eq", "ne"):
        if name in COMPARED:
            yield "condition", f"{COMPARED[name].__name__} for {name}", (lambda func, given, _: COMPARED[name](*given)), True
        yield "condition", "a condition that is always true", _then(torch.ones_like), True
        yield "condition", "a condition that is never true", _then(torch.zeros_like), True
    if name == "where":
        for place, which in ((1, "first"), (2, "second")):
            yield "condition", f"always the {which} of two in where", _operand(place), True
    if name in ("clamp", "clip", "clamp_min", "clamp_max"):
        yield "clamp missing", "a missing clamp", _on(lambda x: x), True
    if name in ("normalize",):
        yield "normalisation missing", "a missing normalisation", _on(lambda x: x), True
    if name == "linear":
        yield "missing bias", "a missing bias", lambda func, given, _: func(*given[:2]), True
        yield "transposed kernel", "a kernel that is not transposed", _transposed(1), True
    if name in ("matmul", "bmm", "mm"):
        for place in (0, 1):
            yield "transposed kernel", f"operand {place} of a product not transposed", _transposed(place), True
    if name in ("mT", "transpose", "t", "swapaxes"):
        yield "transposed kernel", "a missing transposition", _untransposed, True
    if name in ("chunk", "split") and isinstance(result, list):
        yield "split order", f"the parts of {name} in the other order", _then(lambda parts: tuple(reversed(parts))), True
    if name in ("cat", "concat", "stack", "concatenate"):
        yield "split order", f"the parts of {name} in the other order", (
            lambda func, given, rest: func(tuple(reversed(given[0])), *given[1:], **rest)), True
        count = len(args[0]) if args and isinstance(args[0], list) else 0
        for one in range(count - 1 if 2 < count < 9 else 0):
            yield "split order", f"parts {one} and {one + 1} of {name} exchanged", (lambda func, given, rest, one=one: func(
                (*given[0][:one], given[0][one + 1], given[0][one], *given[0][one + 2:]), *given[1:], **rest)), True
    if name in REDUCTIONS:
        yield from _reductions(name, args, kwargs)
    if name == "pad":
        yield "padding side", "padded on the other side", _other_side, True
    if name in ("and", "logical_and", "bitwise_and"):
        for place in (0, 1):
            yield "condition", "one of two conditions ignored", _operand(place), True
    if name == "cumsum":
        yield "shift in time", "a sum that leaves out its own step", lambda func, given, rest: func(*given, **rest) - given[0], True
    if name == "rsub":
        yield "inverted gate", "x for 1 - x", _operand(0), True
    words = {"mul": "factor", "div": "division", "add": "term", "sub": "term"}
    if name in words:
        if name in ("add", "sub"):
            yield "sign", "another sign", lambda func, given, _: given[0] - given[1] if name == "add" else given[0] + given[1], False
        for place in (0, 1):
            yield f"missing {words[name]}", f"a missing {words[name]}", _operand(place), False
        if name == "div":
            yield "missing division", "a product for a quotient", lambda func, given, _: given[0] * given[1], False
    if name == "neg":
        yield "sign", "a missing minus", _on(lambda x: x), False
    if name in ("sqrt", "rsqrt", "square", "abs", "log", "reciprocal", "pow"):
        yield "missing function", f"a missing {name}", _on(lambda x: x), False
    yield from slips(name, args, kwargs)


def _reductions(name: str, args: tuple, kwargs: dict) -> Iterator[tuple[str, str, Alternative, bool]]:
    """A sum or a mean over other axes (where the result keeps its number of axes), and another reduction over the same ones."""
    shape, held = args[0] if args and isinstance(args[0], torch.Size) else (), kwargs.get("dim", args[1] if len(args) > 1 else None)
    keeps = bool(kwargs.get("keepdim", args[2] if len(args) > 2 else False))
    axes = [held] if isinstance(held, int) else (list(held) if isinstance(held, (tuple, list)) else [])
    axes = [axis % len(shape) for axis in axes if isinstance(axis, int) and shape]
    if not axes:
        return
    places = range(len(shape))
    others = [(axis,) for axis in places] + [(axis, axis + 1) for axis in places[:-1]] + [(axis, axis + 1, axis + 2) for axis in places[:-2]]
    for other in others:
        if sorted(other) != sorted(axes) and keeps:
            yield "axis", f"{name} over {_listed(other)} for {_listed(axes)}", (
                lambda func, given, _, other=other: func(given[0], other, keepdim=True)), True
    for word, function in REDUCTIONS.items():
        if word != name:
            yield "reduction", f"{word} for {name}", _on(lambda x, f=function: f(x, tuple(axes), keeps)), False
    for word, at in (("first", 0), ("last", -1)):
        if len(axes) == 1:
            yield "reduction", f"the {word} entry for the {name}", _on(
                lambda x, at=at: x.narrow(axes[0], at % x.shape[axes[0]], 1) if keeps else x.select(axes[0], at)), False


def _listed(axes: Iterable[int]) -> str:
    axes = list(axes)
    return f"axis {axes[0]}" if len(axes) == 1 else f"axes {', '.join(map(str, axes[:-1]))} and {axes[-1]}"


def _norms(name: str, kwargs: dict) -> Iterator[tuple[str, str, Alternative, bool]]:
    held = kwargs.get("eps")
    for eps in (1e-5, 1e-6, 1e-8, 1e-12, 1e-3):
        if eps != held:
            yield "epsilon", f"epsilon {eps:g}" + ("" if held is None else f" for {held:g}"), _with(eps=eps), True
    for leaf, family, phrase, change in (("weight", "(1 + w) for w", "(1 + w) for w", lambda w: 1.0 + w),
                                         ("weight", "scale missing", "a missing scale", torch.ones_like),
                                         ("bias", "missing bias", "a missing bias", torch.zeros_like)):
        def make(func: Any, args: tuple, rest: dict, leaf: str = leaf, change: Callable = change) -> Any:
            value = rest.get(leaf)
            return None if value is None else func(*args, **{**rest, leaf: change(value)})

        yield family, phrase, make, True


def _transposed(place: int) -> Alternative:
    def make(func: Any, args: tuple, kwargs: dict) -> Any:
        value = args[place] if len(args) > place else None
        if not isinstance(value, torch.Tensor) or value.ndim < 2 or value.shape[-1] != value.shape[-2]:
            return None
        return func(*args[:place], value.mT, *args[place + 1:], **kwargs)

    return make


def _untransposed(func: Any, args: tuple, kwargs: dict) -> Any:
    result = func(*args, **kwargs)
    return args[0] if isinstance(result, torch.Tensor) and result.shape == args[0].shape else None


def _other_side(func: Any, args: tuple, kwargs: dict) -> Any:
    pads = tuple(args[1]) if len(args) > 1 else ()
    swapped = tuple(pads[place ^ 1] for place in range(len(pads)))
    return func(args[0], swapped, *args[2:], **kwargs) if len(pads) % 2 == 0 and swapped != pads else None


def _last_of_equal(func: Any, args: tuple, kwargs: dict) -> Any:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if dim is None or kwargs.get("keepdim"):
        return None
    return args[0].shape[dim] - 1 - func(args[0].flip(dim), dim)


def other_order(func: Any, args: tuple, kwargs: dict) -> Any:
    """A split or a join of the last axes with the two in the other order."""
    result = func(*args, **kwargs)
    x = _first(args)
    if x is None:
        return None
    if result.ndim == x.ndim + 1 and result.shape[:-2] == x.shape[:-1]:
        return x.reshape(*x.shape[:-1], result.shape[-1], result.shape[-2]).mT
    if result.ndim == x.ndim - 1 and result.shape[:-1] == x.shape[:-2]:
        return x.mT.reshape(result.shape)
    return None


def cast(dtype: str) -> Alternative:
    """The result rounded to a coarser precision."""
    def make(func: Any, args: tuple, kwargs: dict) -> Any:
        result = func(*args, **kwargs)
        is_float = isinstance(result, torch.Tensor) and result.is_floating_point()
        return result.to(getattr(torch, dtype)).to(result.dtype) if is_float else None

    return make


def averaged(func: Any, args: tuple, kwargs: dict) -> Any:
    """The result averaged over its first axis."""
    result = func(*args, **kwargs)
    if not isinstance(result, torch.Tensor) or not result.is_floating_point() or result.ndim == 0:
        return None
    return result.mean(0, keepdim=True).expand(result.shape)


def stopped(name: str) -> Iterator[tuple[str, Alternative]]:
    """(phrase, alternative) for gradients: a result that lets none through, or a detached one that does."""
    if name == "detach":
        yield "a gradient that should end", _on(lambda x: x)
    elif name not in ("get", "size", "dim"):
        def detached(func: Any, args: tuple, kwargs: dict) -> Any:
            result = func(*args, **kwargs)
            return result.detach() if isinstance(result, torch.Tensor) and result.is_floating_point() else None

        yield f"a gradient stopped at {name}", detached
        for place in (0, 1):
            def one_detached(func: Any, args: tuple, kwargs: dict, place: int = place) -> Any:
                if len(args) <= place or not isinstance(args[place], torch.Tensor) or not args[place].is_floating_point():
                    return None
                return func(*args[:place], args[place].detach(), *args[place + 1:], **kwargs)

            yield f"the gradient through operand {place} of {name} stopped", one_detached
