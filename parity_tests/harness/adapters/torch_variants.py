"""What a torch module would compute with one thing in it changed: a setting, or one function that it calls.

    sites     every place of its code at which a tensor function is called, told apart by file and position in the bytecode
    change    a function mode that computes something else at one site; nothing of the module's code or of torch is touched

`diagnose` runs the reference with each variation and looks whether it then computes what the candidate does.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .torch_alternatives import BATCH, CASTS, CONSTANTS, RESHAPES, STOPPED, alternatives, averaged, cast, named, other_order, stopped
from .torch_sites import Recorder, site_of
from .torch_values import readings

MAX_SITES = 300
EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12, 1e-3, 0.0)


@dataclass(frozen=True)
class Variation:
    """One change. `change(value)` is a context in which the module computes it; `value` a number to be fitted, None where there is none."""

    family: str
    phrase: str
    change: Callable[[float], Any]
    value: float | None = None
    particular: bool = True


class Variations:
    """The variations of the module at a path of a torch model."""

    def __init__(self, model: torch.nn.Module, path: str, right: frozenset[str] = frozenset()) -> None:
        self.module = model.get_submodule(path)
        self.right = [inner for name, inner in self.module.named_modules() if name and (f"{path}.{name}" if path else name) in right]

    def settings(self) -> Iterator[Variation]:
        """Attributes and fields of a config that are names, truth values or numbers, with other values; numbers last, and fitted last of all."""
        made, held = [], {id(inner) for module in self.right for inner in module.modules()}
        for path, module in self.module.named_modules():
            if id(module) in held:
                continue
            for name, value in list(vars(module).items()):
                if name.startswith("_") or name == "training":
                    continue
                if dataclasses.is_dataclass(value) and not isinstance(value, type):
                    for field in dataclasses.fields(value):
                        made += self._setting(path, module, name, field.name, getattr(value, field.name))
                else:
                    made += self._setting(path, module, name, None, value)
        order = {str: 0, bool: 1, int: 2, tuple: 3, float: 4}
        for _, item in sorted(made, key=lambda entry: (entry[1].value is not None, order[entry[0]])):
            yield item

    def functions(self, run: Callable[[], Any], batch: int | None, *, gradients: bool = False) -> Iterator[Variation]:
        """Every function that `run` calls, with what a port may have written in its place."""
        recorder = Recorder()
        with recorder.outside(self.right), recorder:
            run()
        sites = dict(list(recorder.sites.items())[:MAX_SITES])
        outer: dict[tuple, set] = {}
        for key, site in sites.items():
            outer.setdefault((key[0], site.name), set()).add(key)
        groups = [(keys, sites[next(iter(keys))]) for keys in outer.values()]
        groups += [({key}, site) for key, site in sites.items() if len(outer[key[0], site.name]) > 1]
        if gradients:
            for keys, site in groups:
                for name, alternative in stopped(site.name):
                    yield Variation(STOPPED, f"{name} {site.where}", _at(keys, alternative))
            return
        alike: dict[tuple, set] = {}
        callers: dict[tuple, set] = {}
        for key, site in sites.items():
            alike.setdefault((site.code, site.name), set()).add(key)
            callers.setdefault((key[0], key[1][0], site.name) if len(key) > 2 else key, set()).add(key)
        groups += [(keys, sites[next(iter(keys))]) for keys in alike.values() if len({key[0] for key in keys}) > 1]
        groups += [(keys, sites[next(iter(keys))]) for (place, *_, name), keys in callers.items() if 1 < len(keys) < len(outer[place, name])]
        made = [(item, keys, site) for keys, site in groups for item in alternatives(site.name, site.args, site.kwargs, site.result)]
        for (family, phrase, alternative, particular), keys, site in made:
            if particular:
                yield Variation(family, f"{phrase} {site.where}", _at(keys, alternative))
        reshaped = {key: site for key, site in sites.items() if site.name in RESHAPES}
        apart = {key for key, site in reshaped.items() if _ndim(site.result) > _ndim(site.args[0] if site.args else None)}
        for what, keys in (("split or joined", set(reshaped)), ("split", apart), ("joined", set(reshaped) - apart)):
            if keys and (what == "split or joined" or len(keys) < len(reshaped)):
                yield Variation("axis", f"channels {what} in the other order", _at(keys, other_order))
        for (family, phrase, alternative, particular), keys, site in made:
            if not particular:
                yield Variation(family, f"{phrase} {site.where}", _at(keys, alternative), particular=False)
        for keys, site in groups:
            for place, value in enumerate(site.args):
                if site.name in CONSTANTS and isinstance(value, float) and value != 0.0:
                    yield Variation("constant", f"{{value:.6g}} for {value:.6g} {site.where}", _constant(keys, place), value, particular=False)
            if site.name in ("sqrt", "rsqrt"):
                yield Variation("epsilon", f"{{value:.3g}} added inside the root {site.where}", _added(keys), 0.0, particular=False)
        if batch is not None and batch > 1:
            for keys, site in groups:
                if isinstance(site.result, torch.Size) and site.result and site.result[0] == batch:
                    yield Variation(BATCH, f"{site.name} averaged over the batch {site.where}", _at(keys, averaged))
        for keys, site in groups:
            if isinstance(site.result, torch.Size) and site.name in CASTS:
                for dtype in ("float32", "bfloat16", "float16"):
                    yield Variation("low precision", f"{site.name} in {dtype} {site.where}", _at(keys, cast(dtype)), particular=False)

    def values(self, run: Callable[[], Any]) -> Iterator[Variation]:
        """Every function that `run` calls, reading the value from before or after an update in the place of one of its arguments."""
        for family, phrase, change in readings(run, self.right):
            yield Variation(family, phrase, change, particular=False)

    def _setting(self, path: str, module: Any, name: str, field: str | None, value: Any) -> Iterator[tuple[type, Variation]]:
        spelled = f"{path}.{field or name}" if path else (field or name)

        def change(other: Any) -> Any:
            held = getattr(module, name)
            return _replaced(module, name, other if field is None else _with(held, field, other))

        packages = {type(module).__module__.partition(".")[0]} | ({type(getattr(module, name)).__module__.partition(".")[0]} if field else set())
        family = "epsilon" if "eps" in spelled.rpartition(".")[2] else "setting"
        if isinstance(value, bool):
            options: tuple = (not value,)
        elif isinstance(value, int):
            options = tuple(dict.fromkeys(other for other in (value + 1, value - 1, 2 * value, value // 2, 1, 0) if other != value and other >= 0))
        elif isinstance(value, str):
            options = tuple(sorted(set().union(*(_words(package, field or name, value) for package in packages))))
        elif isinstance(value, float):
            usual = EPSILONS if family == "epsilon" else (0.0, 1.0, *((0.1, 10.0, 100.0) if value == 0.0 else ()))  # zero may mean "off"
            options = tuple(other for other in usual if other != value)
        elif isinstance(value, tuple) and len(value) > 1 and all(type(item) in (int, float) for item in value):
            options = tuple(other for other in dict.fromkeys((value[::-1], *((item,) * len(value) for item in value))) if other != value)
        else:
            return
        for other in options:
            shown = f"{other:g}" if isinstance(other, float) else repr(other)
            held = f"{value:g}" if isinstance(value, float) else repr(value)
            yield type(value), Variation(family, f"{spelled} {shown} for {held}", lambda _, other=other: change(other))
        if isinstance(value, float):
            yield float, Variation(family, f"{spelled} {{value:.6g}} for {value:g}", change, value)


def untied(model: torch.nn.Module, ties: Mapping[str, str]) -> torch.nn.Module:
    """A copy of the model in which every tied leaf is a parameter of its own, with the same values."""
    made = copy.deepcopy(model)
    for name in ties:
        owner, _, leaf = name.rpartition(".")
        module = made.get_submodule(owner)
        setattr(module, leaf, torch.nn.Parameter(getattr(module, leaf).detach().clone()))
    return made


def _with(config: Any, field: str, value: Any) -> Any:
    """A copy of a dataclass with one field changed, whatever its own checks would say."""
    made = copy.copy(config)
    object.__setattr__(made, field, value)
    return made


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    held = module.__dict__[name]
    module.__dict__[name] = value
    try:
        yield
    finally:
        module.__dict__[name] = held


@functools.cache
def _sources(package: str) -> tuple[ast.AST, ...]:
    """The syntax trees of the loaded modules of a package; none for torch itself."""
    made = []
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == package and package != "torch" and getattr(module, "__file__", None):
            with contextlib.suppress(OSError, TypeError, SyntaxError):
                made.append(ast.parse(inspect.getsource(module)))
    return tuple(made)


@functools.cache
def _words(package: str, field: str, value: str) -> frozenset[str]:
    """What a setting that is a name may be besides: words listed together with it, and words that something of its name is compared with."""
    found: set[str] = set()
    for node in (node for source in _sources(package) for node in ast.walk(source)):
        if isinstance(node, (ast.Tuple, ast.List, ast.Set, ast.Dict)):
            parts = node.keys if isinstance(node, ast.Dict) else node.elts
            listed = {item.value for item in parts if isinstance(item, ast.Constant) and isinstance(item.value, str)}
            found |= listed if value in listed and len(listed) == len(parts) else set()
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(isinstance(side, (ast.Name, ast.Attribute)) and field in (getattr(side, "id", ""), getattr(side, "attr", "")) for side in sides):
                found |= {side.value for side in sides if isinstance(side, ast.Constant) and isinstance(side.value, str)}
    return frozenset(found - {value})


class _Changed(TorchFunctionMode):
    """Computes `alternative(func, args, kwargs)` at some sites; None from it means that the function itself is meant."""

    def __init__(self, keys: set, alternative: Callable) -> None:
        super().__init__()
        self.keys, self.alternative = keys, alternative
        self.names = {key[-1] for key in keys}  # told before the frames are looked through, which takes longer than most functions

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = named(func)
        found = site_of(2) if name in self.names else None
        if found is not None and (*found[0], name) in self.keys:
            made = self.alternative(func, args, kwargs or {})
            if made is not None:
                return made
        return func(*args, **(kwargs or {}))


def _at(keys: set, alternative: Callable) -> Callable[[float], Any]:
    return lambda _: _Changed(keys, alternative)


def _constant(keys: set, place: int) -> Callable[[float], Any]:
    def change(value: float) -> Any:
        return _Changed(keys, lambda func, args, kwargs: func(*args[:place], value, *args[place + 1:], **kwargs))

    return change


def _added(keys: set) -> Callable[[float], Any]:
    return lambda value: _Changed(keys, lambda func, args, kwargs: func(args[0] + value, *args[1:], **kwargs))


def _ndim(value: Any) -> int:
    return len(value) if isinstance(value, torch.Size) else 0
