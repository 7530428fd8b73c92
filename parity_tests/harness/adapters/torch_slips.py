"""Small slips of a port that `torch_alternatives` offers as well: a spread over n - 1, an epsilon outside its root, a step too early or late."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

Alternative = Callable[[Any, tuple, dict], Any]


def slips(name: str, args: tuple, kwargs: dict) -> Iterator[tuple[str, str, Alternative, bool]]:
    """(family, phrase, alternative, particular) for a function called with arguments of these shapes."""
    if name == "layer_norm":
        yield "ddof", "a variance over n - 1 for one over n", _renormalised(lambda var, eps, n: var * n / (n - 1) + eps), True
        yield "epsilon", "an epsilon outside the root", _renormalised(lambda var, eps, n: (var.sqrt() + eps).square()), True
    if name == "mean":
        yield "ddof", "a mean over n - 1 for one over n", _unbiased, False
    if name == "exp":
        yield "decay", "sigmoid for exp(-exp)", lambda func, given, _: torch.sigmoid(torch.log(-given[0])), True
    if name == "stack" and args and isinstance(args[0], list) and len(args[0]) > 2:
        yield "shift in time", "what a loop computed is gathered one step late", (
            lambda func, given, rest: func((torch.zeros_like(given[0][0]), *given[0][:-1]), *given[1:], **rest)), True
    if name == "getitem" and len(args) > 1 and _last(args[1]):
        yield "state early", "the first entry for the last", lambda func, given, _: func(given[0], _first_for_last(given[1])), True


def _renormalised(square: Callable[[torch.Tensor, float, int], torch.Tensor]) -> Alternative:
    """A layer norm that divides by the root of `square(variance, eps, n)`."""
    def make(func: Any, args: tuple, kwargs: dict) -> Any:
        x, shape = args[:2]
        weight, bias, eps = (kwargs.get(word, args[place] if len(args) > place else default) for place, (word, default) in enumerate(
            (("weight", None), ("bias", None), ("eps", 1e-5)), start=2))
        axes = tuple(range(x.ndim - len(shape), x.ndim))
        var = x.var(axes, correction=0, keepdim=True)
        y = (x - x.mean(axes, keepdim=True)) / square(var, eps, x[(0,) * axes[0]].numel()).sqrt()
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    return make


def _unbiased(func: Any, args: tuple, kwargs: dict) -> Any:
    result = func(*args, **kwargs)
    count = args[0].numel() // result.numel()
    return result * count / (count - 1) if count > 1 else None


def _last(key: Any) -> bool:
    return any(type(item) is int and item == -1 for item in (key if isinstance(key, (list, tuple)) else [key]))


def _first_for_last(key: Any) -> Any:
    if isinstance(key, tuple):
        return tuple(0 if type(item) is int and item == -1 else item for item in key)
    return 0
