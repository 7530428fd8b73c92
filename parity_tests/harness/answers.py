"""A golden file read as the recording of a reference: it answers what was asked when it was made, and says so of everything else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from . import formats, mapping, tree
from .adapters.base import Call, Gradients, Leaf, Node, Run, Trained, Unsupported, digest
from .case import Case, CaseError, Trajectory
from .recording import Forced, Recording, Skip
from .regimes import AS_IS, BY_NAME, Regime
from .structures import Arrays

SCHEMA = "parity-golden/1"


class GoldenError(ValueError):
    """A file that is no golden file; the message is one line."""


class Golden(Recording):
    """A golden file in the place of a reference that runs. Raises GoldenError for a file that is none."""

    live = False

    def __init__(self, case: Case, path: Path) -> None:
        held = formats.load(path)
        try:
            meta = json.loads(str(held["meta"])) if held.get("meta", np.zeros(1)).shape == () else {}
        except ValueError:
            meta = {}
        if not isinstance(meta, dict) or meta.get("schema") != SCHEMA:
            raise GoldenError(f"{path} is no golden file of schema {SCHEMA}, as `parity golden CASE --out FILE.npz` writes it"
                              + (f": its schema is {meta['schema']!r}" if isinstance(meta, dict) and "schema" in meta else ""))
        self.path, self.meta, self._arrays = path, meta, Arrays(held)
        try:
            self._read(case)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise GoldenError(f"{path} is a golden file with something missing: {type(error).__name__}: {error}") from error

    def _read(self, case: Case) -> None:
        meta, take = self.meta, self._arrays.give
        every = [(Regime(**entry["regime"]), entry) for entry in meta["regimes"]]
        self.regimes = tuple(regime for regime, entry in every if entry["asked"])
        self.case = replace(case, seed=meta["seed"], dtypes=tuple(meta["dtypes"]), regimes=self.regimes)
        self.rename = mapping.renamer(case.names)
        self.kind = meta["kind"]
        self.leaves = {entry["name"]: Leaf(**{**entry, "shape": tuple(entry["shape"])}) for entry in meta["leaves"]}
        self.weights = {name: self._arrays.held[meta["weights"][name]].copy() for name in self.leaves}
        self.candidate_outputs, self.shared, self.refused, self.written = {}, {}, {}, {}
        self._skips, self._inputs, self._states, self._layers, self._held = {}, {}, {}, {}, {}
        self._runs, self._own = {}, {}
        adapter = Answers(self.leaves, {node["path"]: Node(**node) for node in meta["modules"]}, self.weights, self.path)
        self._adapter = adapter
        for regime, entry in every:
            if "skip" in entry:
                self._skips[regime.name] = entry["skip"]
            else:
                calls = [Call(path, index, *map(take, parts)) for path, index, *parts in entry["calls"]]
                self._inputs[regime.name], self._states[regime.name] = take(entry["inputs"]), take(entry["states"])
                self._runs[regime.name, "float64"] = Run(take(entry["outputs"]), calls)
                for dtype, outputs in entry["own"].items():
                    self._runs[regime.name, dtype] = Run(take(outputs), [])
                if "gradients" in entry:
                    adapter.answers["gradients", digest((self._inputs[regime.name], self._states[regime.name]))] = self._answer(entry["gradients"])
            self._skips[f"layers of {regime.name}"] = entry.get("skip layers")
            self._layers[regime.name] = [Forced(item["path"], item["index"], take(item["args"]), take(item["kwargs"]), take(item["outputs"]))
                                         for item in entry["layers"]]
            for item, layer in zip(entry["layers"], self._layers[regime.name], strict=True):
                for dtype, outputs in item["own"].items():
                    self._own[regime.name, layer.index, dtype] = take(outputs)
                if "gradients" in item:
                    adapter.answers["call_gradients", digest((layer.path, layer.args, layer.kwargs))] = self._answer(item["gradients"])
        for key, outputs in meta["splits"]:
            adapter.answers["run", key] = Run(take(outputs), [])
        training = meta["training"]
        key = training.get("batches", "")
        adapter.answers["train", key] = Trained(take(training["losses"]), take(training["arrays"])) if key else self._answer(training)

    def _answer(self, entry: Mapping[str, Any]) -> Any:
        if "unsupported" in entry:
            return Unsupported(entry["unsupported"])
        if "error" in entry:
            return RuntimeError(entry["error"])
        return Gradients(entry["loss"], self._arrays.give(entry["parameters"]), self._arrays.give(entry["inputs"]))

    def adapter(self, dtype: str) -> Answers:
        """What answers in the reference's place."""
        return self._adapter

    def inputs(self, regime: Regime, offset: int = 0) -> dict[str, np.ndarray]:
        """The inputs of a regime. Raises Skip where the reference had none."""
        self._applies(regime.name)
        return {name: value.copy() for name, value in self._inputs[regime.name].items()}

    def states(self, regime: Regime) -> Any:
        """The state handed over under a regime."""
        self._applies(regime.name)
        return tree.map_leaves(lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, self._states[regime.name])

    def run(self, regime: Regime, dtype: str = "float64") -> Run:
        """The run that the file holds. Raises Skip where the reference had none."""
        self._applies(regime.name)
        return self._runs[regime.name, dtype]

    def forced(self, regime: Regime) -> list[Forced]:
        """The layers that the file holds for a regime."""
        self._applies(f"layers of {regime.name}")
        return self._layers[regime.name]

    def own(self, regime: Regime, forced: Forced, dtype: str) -> Any:
        """Outputs of a layer of the reference in a lower precision."""
        return self._own[regime.name, forced.index, dtype]

    def within(self, dtype: str) -> Golden:
        """The recording on whose grid a precision is compared: a file holds one."""
        return self

    def neighbours(self, regime: Regime, dtype: str, forced: Forced | None = None) -> list[tuple[Any, Any]]:
        """Outputs on inputs a few roundings away, of which a file has none: an error is held against that on the very input alone."""
        return []

    def _applies(self, what: str) -> None:
        if self._skips.get(what) is not None:
            raise Skip(self._skips[what])

    def plain(self) -> list[Regime]:
        """As of a reference that runs, by what the file holds."""
        return [BY_NAME[AS_IS]] + ([BY_NAME["carried state"]] if "carried state" in self._layers and self.case.states is not None else [])


class Answers:
    """The reference as far as a file can be asked: the recorded answer, or an error that says that there is none."""

    kind = "golden file"

    def __init__(self, leaves: dict[str, Leaf], nodes: dict[str, Node], weights: Mapping[str, np.ndarray], path: Path) -> None:
        self.answers: dict[tuple[str, str], Any] = {}
        self._leaves, self._nodes, self._weights, self.path = leaves, nodes, weights, path

    def leaves(self) -> dict[str, Leaf]:
        """Every leaf of the reference."""
        return dict(self._leaves)

    def modules(self) -> dict[str, Node]:
        """Every module of the reference."""
        return dict(self._nodes)

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Raises Unsupported for other weights than those of the file."""
        if any(not np.array_equal(value, self._weights[name]) for name, value in arrays.items()):
            raise Unsupported("a golden file answers for the weights that it was made with only")

    def arrays(self) -> dict[str, np.ndarray]:
        """Copies of the weights."""
        return {name: value.copy() for name, value in self._weights.items()}

    def call(self, path: str, args: tuple, kwargs: dict) -> Any:
        """Raises Unsupported."""
        raise Unsupported("a golden file computes nothing new")

    def run(self, inputs: Mapping[str, np.ndarray], states: Any = None, *, tap: bool = True, quick: bool = True) -> Run:
        """A whole sequence that splits are compared to. Raises CaseError for any other."""
        return self._answered("run", digest((dict(inputs), states)))

    def gradients(self, inputs: Mapping[str, np.ndarray], states: Any, seed: int) -> Gradients:
        """Gradients end to end, as recorded."""
        return self._answered("gradients", digest((dict(inputs), states)))

    def call_gradients(self, path: str, args: tuple, kwargs: dict, seed: int) -> Gradients:
        """Gradients of a layer, as recorded."""
        return self._answered("call_gradients", digest((path, args, kwargs)))

    def train(self, batches: Sequence[Mapping[str, np.ndarray]], trajectory: Trajectory, seed: int) -> Trained:
        """Losses and leaves of the optimiser run, as recorded."""
        return self._answered("train", digest(batches) if ("train", "") not in self.answers else "")

    def _answered(self, method: str, key: str) -> Any:
        found = self.answers.get((method, key))
        if found is None:
            raise CaseError(f"the case asks for {method} on other inputs than those of {self.path}: its inputs have changed since, make the file "
                            "again")
        if isinstance(found, Exception):
            raise found
        return found
