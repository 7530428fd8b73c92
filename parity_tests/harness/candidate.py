"""The candidate of a case in every precision, with the reference's weights converted into it, and its mutated twins."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from . import mapping
from .adapters import opened
from .adapters.base import Adapter, Leaf
from .case import Case, Trajectory
from .convert import WeightMap
from .recording import Forced, Recording

COMPILED = ("nnx", "linen")  # kinds of candidates whose adapters compile, and make twins


class Candidate:
    """Adapters by precision, the weight map, and the weights as converted. Raises ConversionError when the weights do not fit."""

    def __init__(self, case: Case, recording: Recording) -> None:
        self.case, self.recording = case, recording
        self.adapters: dict[str, Adapter] = {"float64": opened(case, "candidate", "float64")}
        self.kind = self.adapters["float64"].kind
        self.leaves: dict[str, Leaf] = self.adapters["float64"].leaves()
        self.fresh = self.adapters["float64"].arrays()
        self.map: WeightMap = mapping.build(recording.leaves, self.leaves, names=case.names, rules=case.weights, ties=case.ties)
        self.weights = self.map.to_candidate(recording.weights)
        self.trajectory: Trajectory | None = case.trajectory
        self.adapters["float64"].load(self.weights)
        self.paths = frozenset(self.adapters["float64"].modules())
        self.injector: Any = None

    def adapter(self, dtype: str) -> Adapter:
        """The candidate in a precision, holding the weights."""
        if dtype not in self.adapters:
            self.adapters[dtype] = opened(self.case, "candidate", dtype)
            self.adapters[dtype].load(self.weights)
        return self.adapters[dtype]

    def release(self) -> None:
        """Give back what was compiled; whatever is called again is compiled again."""
        if self.kind in COMPILED:
            for adapter in self.adapters.values():
                adapter.release()

    def path(self, reference_path: str) -> str | None:
        """The candidate's path of a reference module; None when the candidate has no such module."""
        path = self.recording.rename(reference_path) if reference_path else ""
        return path if path in self.paths else None

    def call(self, forced: Forced, dtype: str) -> Any:
        """A layer on the reference's own inputs; equal modules with equal weights are computed once, mutated twins included."""
        adapter, held = self.adapter(dtype), self.recording.candidate_outputs
        if not hasattr(adapter, "identity"):
            return adapter.call(*self.arguments(forced))
        key = self._key(forced, dtype)
        if key not in held:
            held[key] = (forced, adapter.call(*self.arguments(forced)))
        return held[key][1]

    def arguments(self, forced: Forced) -> tuple[str, tuple, dict]:
        """The candidate's path of a layer, and its arguments as the candidate takes them."""
        args, kwargs = forced.args, forced.kwargs
        if self.case.adapt is not None:
            args, kwargs = self.case.adapt(forced.path, args, kwargs)
        return self.path(forced.path), args, kwargs

    def start_calls(self, layers: Iterable[Forced], dtype: str) -> None:
        """Begin to compile what `call` will need for these layers."""
        for forced in layers:
            if self.path(forced.path) is not None and (self.kind not in COMPILED or self._key(forced, dtype) not in self.recording.candidate_outputs):
                self.start(dtype, "call", lambda forced=forced: (self.arguments(forced), {}))

    def start(self, dtype: str, method: str, arguments: Callable[[], tuple[tuple, dict]]) -> None:
        """Begin to compile what a method of the adapter will need; adapters that compile nothing have nothing to begin."""
        if self.kind in COMPILED:
            with contextlib.suppress(Exception):  # what is wrong with the arguments is reported when they are used
                args, kwargs = arguments()
                self.adapter(dtype).start(method, *args, **kwargs)

    def _key(self, forced: Forced, dtype: str) -> tuple:
        # the outputs keep the Forced object, so that its id is not used again
        return (forced.path, id(forced), dtype, self.adapter(dtype).identity(self.path(forced.path)))

    def beside(self, recording: Recording) -> Candidate:
        """The same candidate with the weights of another recording of the same model, sharing what was compiled. Raises TypeError when the
        candidate compiles nothing."""
        if self.kind not in COMPILED:
            raise TypeError(f"a candidate of kind {self.kind} shares nothing: make another")
        other = object.__new__(Candidate)
        other.__dict__.update(self.__dict__)
        other.case, other.recording, other.trajectory = recording.case, recording, recording.case.trajectory
        other.weights = self.map.to_candidate(recording.weights)
        other.adapters = {dtype: adapter.twin(()) for dtype, adapter in self.adapters.items()}
        for adapter in other.adapters.values():
            adapter.case = recording.case
            adapter.load(other.weights)
        return other

    def mutated(self, weights: Mapping[str, np.ndarray], patches: tuple, trajectory: Trajectory | None, salt: Any) -> Candidate:
        """A twin with other weights, patched modules or another trajectory. Raises TypeError when the candidate cannot be patched."""
        if patches and self.kind not in COMPILED:
            raise TypeError(f"a candidate of kind {self.kind} has no modules to patch")
        other = object.__new__(Candidate)
        other.__dict__.update(self.__dict__)
        other.weights, other.trajectory, other.adapters = dict(weights), trajectory, {}
        for dtype in self.case.dtypes:
            source = self.adapter(dtype)
            if self.kind in COMPILED:
                other.adapters[dtype] = source.twin(patches, salt)
            else:
                other.adapters[dtype] = opened(self.case, "candidate", dtype)
            other.adapters[dtype].load(other.weights)
        return other
