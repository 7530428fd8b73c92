"""The candidate of a case in every precision, with the reference's weights converted into it, and its mutated twins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from . import mapping
from .adapters import opened
from .adapters.base import Adapter, Leaf
from .case import Case, Trajectory
from .convert import WeightMap
from .recording import Forced, Recording


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

    def path(self, reference_path: str) -> str | None:
        """The candidate's path of a reference module; None when the candidate has no such module."""
        path = self.recording.rename(reference_path) if reference_path else ""
        return path if path in self.paths else None

    def call(self, forced: Forced, dtype: str) -> Any:
        """A layer on the reference's own inputs; equal modules with equal weights are computed once, mutated twins included."""
        adapter, path = self.adapter(dtype), self.path(forced.path)
        args, kwargs = forced.args, forced.kwargs
        if self.case.adapt is not None:
            args, kwargs = self.case.adapt(forced.path, args, kwargs)
        if not hasattr(adapter, "identity"):
            return adapter.call(path, args, kwargs)
        # the Forced object itself is the key, which keeps its id from being used again
        key = (forced.path, id(forced), dtype, adapter.identity(path))
        held = self.recording.candidate_outputs
        if key not in held:
            held[key] = (forced, adapter.call(path, args, kwargs))
        return held[key][1]

    def mutated(self, weights: Mapping[str, np.ndarray], patches: tuple, trajectory: Trajectory | None, salt: Any) -> Candidate:
        """A twin with other weights, patched modules or another trajectory. Raises TypeError when the candidate cannot be patched."""
        if patches and self.kind != "nnx":
            raise TypeError(f"a candidate of kind {self.kind} has no modules to patch")
        other = object.__new__(Candidate)
        other.__dict__.update(self.__dict__)
        other.weights, other.trajectory, other.adapters = dict(weights), trajectory, {}
        for dtype in self.case.dtypes:
            source = self.adapter(dtype)
            if self.kind == "nnx":
                other.adapters[dtype] = source.twin(patches, salt)
            else:
                other.adapters[dtype] = opened(self.case, "candidate", dtype)
            other.adapters[dtype].load(other.weights)
        return other
