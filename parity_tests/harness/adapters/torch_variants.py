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
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .torch_alternatives import BATCH, CASTS, CONSTANTS, RESHAPES, STOPPED, alternatives, averaged, cast, named, other_order, stopped

TORCH = os.path.dirname(torch.__file__)
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


class Site:
    """A place at which a function is called: its name, the code around it, how often, and what it was given first."""

    def __init__(self, name: str, code: Any, line: int) -> None:
        self.name, self.code, self.line = name, code, line
        self.args: tuple = ()
        self.kwargs: dict = {}
        self.result: Any = None

    @property
    def where(self) -> str:
        """"in step_size, layers.py:49"."""
        return f"in {self.code.co_name}, {os.path.basename(self.code.co_filename)}:{self.line}"


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
        order = {str: 0, bool: 1, int: 2, float: 3}
        for _, item in sorted(made, key=lambda entry: (entry[1].value is not None, order[entry[0]])):
            yield item

    def functions(self, run: Callable[[], Any], batch: int | None, *, gradients: bool = False) -> Iterator[Variation]:
        """Every function that `run` calls, with what a port may have written in its place."""
        recorder = _Recorder()
        with recorder.outside(self.right), recorder:
            run()
        sites = dict(list(recorder.sites.items())[:MAX_SITES])
        if gradients:
            for key, site in sites.items():
                for name, alternative in stopped(site.name):
                    yield Variation(STOPPED, f"{name} {site.where}", _at({key}, alternative))
            return
        outer: dict[tuple, set] = {}
        for key, site in sites.items():
            outer.setdefault((key[0], site.name), set()).add(key)
        groups = [(keys, sites[next(iter(keys))]) for keys in outer.values()]
        groups += [({key}, site) for key, site in sites.items() if len(outer[key[0], site.name]) > 1]
        alike: dict[tuple, set] = {}
        for key, site in sites.items():
            alike.setdefault((site.code, site.name), set()).add(key)
        groups += [(keys, sites[next(iter(keys))]) for keys in alike.values() if len({key[0] for key in keys}) > 1]
        for particular in (True, False):
            for keys, site in groups:
                for family, phrase, alternative, exact in alternatives(site.name, site.args, site.kwargs, site.result):
                    if exact is particular:
                        yield Variation(family, f"{phrase} {site.where}", _at(keys, alternative), particular=particular)
        reshaped = {key for key, site in sites.items() if site.name in RESHAPES}
        if reshaped:
            yield Variation("axis", "channels split or joined in the other order", _at(reshaped, other_order))
        if batch is not None and batch > 1:
            for keys, site in groups:
                if isinstance(site.result, torch.Size) and site.result and site.result[0] == batch:
                    yield Variation(BATCH, f"{site.name} averaged over the batch {site.where}", _at(keys, averaged))
        for keys, site in groups:
            if isinstance(site.result, torch.Size) and site.name in CASTS:
                for dtype in ("float32", "bfloat16", "float16"):
                    yield Variation("low precision", f"{site.name} in {dtype} {site.where}", _at(keys, cast(dtype)), particular=False)
        for keys, site in groups:
            for place, value in enumerate(site.args):
                if site.name in CONSTANTS and isinstance(value, float) and value != 0.0:
                    yield Variation("constant", f"{{value:.6g}} for {value:.6g} {site.where}", _constant(keys, place), value, particular=False)

    def _setting(self, path: str, module: Any, name: str, field: str | None, value: Any) -> Iterator[tuple[type, Variation]]:
        spelled = f"{path}.{field or name}" if path else (field or name)

        def change(other: Any) -> Any:
            held = getattr(module, name)
            return _replaced(module, name, other if field is None else _with(held, field, other))

        family = "epsilon" if "eps" in spelled.rpartition(".")[2] else "setting"
        if isinstance(value, bool):
            options: tuple = (not value,)
        elif isinstance(value, int):
            options = tuple(dict.fromkeys(other for other in (value + 1, value - 1, 2 * value, value // 2, 1, 0) if other != value and other >= 0))
        elif isinstance(value, str):
            options = tuple(sorted(_words(type(module).__module__.partition(".")[0], field or name, value)))
        elif isinstance(value, float):
            options = tuple(other for other in (EPSILONS if family == "epsilon" else (0.0, 1.0)) if other != value)
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


def _site(skip: int) -> tuple[tuple, Any, int] | None:
    """Where a function is being called: the innermost place outside of torch, and the place that called its code."""
    frame, chain = sys._getframe(skip), []
    while frame is not None and len(chain) < 2:
        if not frame.f_code.co_filename.startswith(TORCH) and frame.f_code.co_filename != __file__:
            chain.append((frame.f_code, frame.f_lasti, frame.f_lineno))
        frame = frame.f_back
    if not chain:
        return None
    inner = chain[0]
    return ((inner[0], inner[1]), *(item[:2] for item in chain[1:])), inner[0], inner[2]


class _Recorder(TorchFunctionMode):
    """Notes every site; computes what is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[tuple, Site] = {}
        self.inside = 0

    @contextlib.contextmanager
    def outside(self, modules: list[torch.nn.Module]) -> Iterator[None]:
        """Note nothing while one of these modules computes."""
        def move(by: int) -> Callable:
            def hook(*_: Any) -> None:
                self.inside += by

            return hook

        handles = [handle for module in modules for handle in (module.register_forward_pre_hook(move(1)), module.register_forward_hook(move(-1)))]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = None if self.inside else _site(2)
        if found is not None:
            key = (*found[0], named(func))
            if key not in self.sites:
                site = self.sites[key] = Site(named(func), *found[1:])
                site.args, site.kwargs = tuple(map(_shape, args)), {name: _shape(value) for name, value in (kwargs or {}).items()}
                site.result = _shape(result)
        return result


def _shape(value: Any) -> Any:
    """What is kept of an argument: the shape of a tensor, anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.shape
    return [_shape(item) for item in value] if isinstance(value, (list, tuple)) else value


class _Changed(TorchFunctionMode):
    """Computes `alternative(func, args, kwargs)` at some sites; None from it means that the function itself is meant."""

    def __init__(self, keys: set, alternative: Callable) -> None:
        super().__init__()
        self.keys, self.alternative = keys, alternative

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = _site(2)
        if found is not None and (*found[0], named(func)) in self.keys:
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
