"""The places of a torch module's code at which tensor functions are called, told apart by file and position in the bytecode."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .torch_alternatives import named

TORCH = os.path.dirname(torch.__file__)
LAYERS = os.path.join(TORCH, "nn", "modules", "")
HERE = os.path.dirname(__file__)
MODES = tuple(os.path.join(HERE, name) for name in ("torch_sites.py", "torch_variants.py", "torch_values.py"))


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


def site_of(skip: int) -> tuple[tuple, Any, int] | None:
    """Where a function is being called: the innermost place outside of torch, and the place that called its code.

    In a layer of torch that an adapter calls by itself, the place in that layer.
    """
    frame, chain, layer = sys._getframe(skip), [], None
    while frame is not None and len(chain) < 2:
        if layer is None and not chain and frame.f_code.co_filename.startswith(LAYERS):
            layer = frame
        if not frame.f_code.co_filename.startswith(TORCH) and frame.f_code.co_filename not in MODES:
            chain.append((frame.f_code, frame.f_lasti, frame.f_lineno))
        frame = frame.f_back
    if not chain or os.path.dirname(chain[0][0].co_filename) == HERE:  # without a layer, an adapter that makes tensors of arrays
        return None if layer is None else (((layer.f_code, layer.f_lasti),), layer.f_code, layer.f_lineno)
    inner = chain[0]
    return ((inner[0], inner[1]), *(item[:2] for item in chain[1:])), inner[0], inner[2]


class Recorder(TorchFunctionMode):
    """Notes every site; computes what is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[tuple, Site] = {}
        self.inside = 0

    def noted(self, key: tuple, args: tuple, result: Any) -> None:
        """For recorders that keep more than the sites."""

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
        found = None if self.inside else site_of(2)
        if found is not None:
            key = (*found[0], named(func))
            self.noted(key, args, result)
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
