"""Defaults that no module carries as a setting: they stand in the source of the classes, and in the functions that their methods call.

    variance    torch divides by n - 1 (correction=1), jax.numpy by n (ddof=0)
    gelu        torch's is exact, JAX's the tanh approximation, unless `approximate` says otherwise
    indices     torch raises for one out of range; nnx.Embed and jnp.take give NaN, x[i] the nearest element
    AdamW       torch decays weights by 1e-2, optax by 1e-4, unless weight_decay is given
    clipping    torch divides by norm + 1e-6, optax.clip_by_global_norm by the norm

A call counts when it is written in a class of the model or in a function that it reaches, outside the frameworks themselves.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from .adapters.base import Node

FRAMEWORKS = ("torch", "jax", "jaxlib", "flax", "optax", "numpy", "scipy", "einops", "builtins")
SPREAD = ("std", "var", "std_mean", "var_mean")
NARROWED = ("correction", "ddof", "unbiased")


@dataclass(frozen=True)
class Written:
    """A call as it is written: the dotted name, how many arguments stand by position, the keywords, and where."""

    name: str
    positional: int
    keywords: frozenset[str]
    place: str

    @property
    def last(self) -> str:
        """The name without what it hangs on."""
        return self.name.rpartition(".")[2]

    @property
    def root(self) -> str:
        """The first part of the name; empty for a method of an expression."""
        return self.name.partition(".")[0] if "." in self.name else ""


def _ours(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "builtins")).partition(".")[0] not in FRAMEWORKS


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return "?"


def _methods(cls: type) -> Iterator[FunctionType]:
    """The functions that a class has, each as it is found on an instance: what is overridden is not read."""
    for name in dir(cls):
        found = inspect.getattr_static(cls, name)
        found = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
        if isinstance(found, FunctionType):
            found = inspect.unwrap(found)
            if _ours(found):
                yield found


def _parsed(thing: FunctionType) -> tuple[ast.AST, str, int] | None:
    try:
        lines, first = inspect.getsourcelines(thing)
        return ast.parse(textwrap.dedent("".join(lines))), Path(inspect.getsourcefile(thing) or "?").name, first
    except (OSError, TypeError, SyntaxError):  # typed into a console, generated, or part of an expression
        return None


def _reached(name: str, scope: dict[str, Any]) -> Any:
    found: Any = scope.get(name.partition(".")[0])
    for part in name.split(".")[1:]:
        if not isinstance(found, ModuleType) or found.__name__.partition(".")[0] in FRAMEWORKS:  # theirs are not read, and some names of theirs warn
            return None
        found = getattr(found, part, None)
    return inspect.unwrap(found) if isinstance(found, FunctionType) else found


def written(classes: Iterable[type]) -> Iterator[Written]:
    """Every call in the methods of the classes and in the functions that they reach; what a class inherits from a framework is the framework's."""
    waiting = [method for cls in classes if _ours(cls) for method in _methods(cls)]
    seen: set[int] = set()
    while waiting:
        thing = waiting.pop(0)
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        parsed, module = _parsed(thing), inspect.getmodule(thing)
        if parsed is None or module is None:
            continue
        tree, file, first = parsed
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = _dotted(node.func)
                yield Written(name, len(node.args), frozenset(key.arg for key in node.keywords if key.arg), f"{file}:{first + node.lineno - 1}")
                found = _reached(name, vars(module))
                if isinstance(found, FunctionType) and _ours(found):
                    waiting.append(found)


def _first(calls: Iterable[Written], accept: Callable[[Written], bool]) -> str | None:
    return next((call.place for call in calls if accept(call)), None)


def _spread(call: Written) -> bool:
    whole = call.positional - (call.root in ("torch", "jnp", "np", "numpy", "jax"))  # of torch.var(x, 0) and x.var(0): the same
    return call.last in SPREAD and not call.keywords & set(NARROWED) and whole < 2


def defaults(reference: Iterable[Node], candidate: Iterable[Node]) -> list[str]:
    """One line for each default that the two sides' source leaves to the framework and on which the frameworks differ."""
    nodes = list(reference), list(candidate)
    left, right = (list(written(dict.fromkeys(node.cls for node in side if node.cls is not None))) for side in nodes)
    found = []

    def pair(mine: str | None, theirs: str | None, text: str) -> None:
        if mine is not None and theirs is not None:
            found.append(f"{text} ({mine} and {theirs})")

    pair(_first(left, _spread), _first(right, _spread), "torch's var and std divide by n - 1, jnp's by n, unless correction or ddof is given")
    pair(_first(left, lambda call: call.last == "gelu" and "approximate" not in call.keywords),
         _first(right, lambda call: call.last == "gelu" and "approximate" not in call.keywords and call.positional < 2),
         "torch's gelu is exact, jax.nn.gelu the tanh approximation unless approximate=False")
    pair(_first(left, lambda call: call.last == "AdamW" and "weight_decay" not in call.keywords),
         _first(right, lambda call: call.last == "adamw" and "weight_decay" not in call.keywords),
         "AdamW decays weights by 1e-2 in torch and by 1e-4 in optax unless weight_decay is given")
    pair(_first(left, lambda call: call.last == "clip_grad_norm_"), _first(right, lambda call: call.last == "clip_by_global_norm"),
         "torch clips by norm + 1e-6, optax by the norm")
    taken = _first(right, lambda call: call.last == "take" and call.root in ("jnp", "jax") and "mode" not in call.keywords)
    if taken is not None:
        found.append(f"an index out of range raises in torch and gives NaN from jnp.take unless mode is given ({taken})")
    elif any(node.layer == "embedding" for node in nodes[0]) and any(node.layer == "embedding" for node in nodes[1]):
        found.append("an id outside the table raises in torch's Embedding and gives NaN in Flax's Embed: check ids before the model")
    return found
