"""What a torch module would compute if one function in it read another value: the one from before an update, or from after it.

A value is told by where it stands, an argument or the result of a call at one site, so that a loop reads that of its own round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .torch_alternatives import named
from .torch_sites import Recorder, site_of

LEFT_OUT = {"mul": "missing factor", "div": "missing division", "clamp": "clamp missing", "clip": "clamp missing"}
MAX_STEPS = 400
MAX_BYTES = 1 << 28  # of the results that one run may keep; what comes later is not looked at
Source = tuple[tuple, int | None]  # the key of a site, and which argument of it, None for its result


class _Step:
    """One call at a site."""

    def __init__(self, key: tuple, args: tuple, result: Any) -> None:
        self.key, self.result = key, result
        self.tensors = {place: value for place, value in enumerate(args) if isinstance(value, torch.Tensor) and value.ndim}

    @property
    def name(self) -> str:
        return self.key[-1]


class _Flow(Recorder):
    """Notes every step with the tensors themselves, which are kept so that none is taken for another."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[tuple, _Step] = {}
        self.made: dict[int, _Step] = {}
        self.kept: list[Any] = []
        self.bytes = 0

    def noted(self, key: tuple, args: tuple, result: Any) -> None:
        if self.bytes > MAX_BYTES:
            return
        self.kept.append((args, result))
        self.bytes += result.numel() * result.element_size() if isinstance(result, torch.Tensor) else 0
        step = _Step(key, args, result)
        if key not in self.steps:
            self.steps[key] = step
        if isinstance(result, torch.Tensor):
            self.made.setdefault(id(result), step)


def readings(run: Callable[[], Any], right: list[torch.nn.Module]) -> Iterator[tuple[str, str, Callable[[float], Any]]]:
    """(family, phrase, change) for every argument of every function that `run` calls, and every value near it of the same shape."""
    flow = _Flow()
    with flow.outside(right), flow:
        run()
    steps = list(flow.steps.values())[:MAX_STEPS]
    taken: dict[int, list[_Step]] = {}
    near: dict[tuple, dict[tuple, Source]] = {}  # by what is said of them: alone, and together with the same place reached by other ways
    far: dict[tuple, dict[tuple, Source]] = {}
    for step in steps:
        for place, value in step.tensors.items():
            for family, phrase, source, close in _sources(flow, taken, step, value):
                spoken = family, f"{step.name} reads {phrase} {flow.sites[step.key].where}", place
                for kind in (step.key[0], step.key):
                    (near if close else far).setdefault((*spoken, kind, source[1]), {}).setdefault(step.key, source)
            taken.setdefault(id(value), []).append(step)
    for group in (near, far):
        for (family, phrase, place, kind, _), sources in group.items():
            if len(sources) > 1 or kind in sources:
                yield family, phrase, _reading(place, sources)


def _sources(flow: _Flow, taken: dict[int, list[_Step]], step: _Step, value: torch.Tensor) -> Iterator[tuple[str, str, Source, bool]]:
    def alike(other: Any) -> bool:
        return isinstance(other, torch.Tensor) and other is not value and other.shape == value.shape and other.dtype == value.dtype

    producer = flow.made.get(id(value))
    for place, before in ({} if producer is None else producer.tensors).items():
        if alike(before):
            stale = "stale value" if id(before) in flow.made else "state stale"
            stale = "missing term" if producer.name in ("add", "sub") and len(producer.tensors) == 1 else stale  # a number, and no update
            yield LEFT_OUT.get(producer.name, stale), f"the value from before {producer.name}", (producer.key, place), True
        earlier = flow.made.get(id(before))
        for place, first in ({} if earlier is None else earlier.tensors).items():
            if alike(first):
                yield ("stale value" if id(first) in flow.made else "state stale"), (
                    f"the value from before {earlier.name} and {producer.name}"), (earlier.key, place), False
    for other in taken.get(id(value), ()):
        if other.key != step.key and alike(other.result):
            yield "order", f"the value from after {other.name}", (other.key, None), True


def _reading(place: int, sources: dict[tuple, Source]) -> Callable[[float], Any]:
    return lambda _: _Read(place, sources)


class _Read(TorchFunctionMode):
    """At some sites, one argument is the last value that stood at the site's source."""

    def __init__(self, place: int, sources: dict[tuple, Source]) -> None:
        super().__init__()
        self.place, self.sources = place, sources
        self.wanted = set(sources.values())
        self.names = {key[-1] for key in sources} | {key[-1] for key, _ in self.wanted}
        self.values: dict[Source, torch.Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = named(func)
        found = site_of(2) if name in self.names else None
        key = None if found is None else (*found[0], name)
        self.values.update({(key, place): value for place, value in enumerate(args) if (key, place) in self.wanted})
        value = self.values.get(self.sources[key]) if key in self.sources else None
        if value is not None and len(args) > self.place and value.shape == args[self.place].shape:
            args = (*args[:self.place], value, *args[self.place + 1:])
        result = func(*args, **(kwargs or {}))
        if (key, None) in self.wanted:
            self.values[key, None] = result
        return result
