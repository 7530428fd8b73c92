"""A plain function over named NumPy arrays: an engine, a formula, a twin written from the specification. It has no modules inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import tree
from ..case import Case, Trajectory
from .base import Call, Gradients, Leaf, Node, Run, Trained, Unsupported, check_names, digest


@dataclass(frozen=True)
class Engine:
    """`build(arrays) -> f`, where `f(*inputs[, states])` takes and gives trees of NumPy arrays.

    arrays: name -> an array of the right shape and dtype for every weight (values do not matter, the harness replaces them); empty for a
        function without weights. Names that are the reference's own need no weight map.
    trainable: names of those that a reference would train.
    """

    build: Callable[[Mapping[str, np.ndarray]], Callable[..., Any]]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    trainable: tuple[str, ...] | None = None


class CallableAdapter:
    """An Engine in one precision: floats are cast to it, and nothing inside can be tapped."""

    kind = "callable"

    def __init__(self, engine: Engine, dtype: str, case: Case, position: int) -> None:
        if dtype not in ("float64", "float32", "float16"):
            raise Unsupported(f"NumPy has no {dtype}")
        self.engine, self.dtype, self.case, self.position = engine, dtype, case, position
        self.weights = {name: self._cast(value) for name, value in engine.arrays.items()}

    def modules(self) -> dict[str, Node]:
        """The function itself, under the empty path."""
        return {"": Node("", "Engine")}

    def leaves(self) -> dict[str, Leaf]:
        """The named weights of the engine."""
        train = self.engine.trainable
        return {name: Leaf(name, tuple(value.shape), str(value.dtype), value.dtype.kind == "f" and (train is None or name in train), "Engine")
                for name, value in self.weights.items()}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace the weights by copies of the given ones. Raises ValueError for other names or shapes."""
        check_names(arrays, self.leaves())
        self.weights = {name: self._cast(arrays[name]) for name in self.weights}

    def arrays(self) -> dict[str, np.ndarray]:
        """Copies of the weights."""
        return {name: value.copy() for name, value in self.weights.items()}

    def run(self, inputs: Mapping[str, np.ndarray], states: Any = None, *, tap: bool = True, quick: bool = True) -> Run:
        """Call the function once, and report inputs, states or weights that it wrote to."""
        given, carried = tree.map_leaves(self._cast, dict(inputs)), tree.map_leaves(self._cast, states)
        held = [self.weights, given, carried]
        before = [digest(value) for value in held]
        kept = (tree.map_leaves(np.copy, tuple(given.values())), tree.map_leaves(np.copy, carried))
        outputs = tree.map_leaves(self._array, self._invoke(given, carried))
        effects = [f"{what} changed during the call" for what, value, was in zip(("weights or buffers", "inputs", "states"), held, before,
                                                                                 strict=True) if digest(value) != was]
        args = kept[0] if carried is None else (*kept[0], kept[1])
        return Run(outputs, [Call("", 0, args, {}, outputs)] if tap else [], effects)

    def call(self, path: str, args: tuple, kwargs: dict) -> Any:
        """The function on the given arguments. Raises Unsupported for a path inside it."""
        if path:
            raise Unsupported("a function has no layers")
        if self.case.call is not None:
            raise Unsupported("a function with a call of its own is compared end to end only")
        given = tree.map_leaves(self._cast, (args, kwargs))
        return tree.map_leaves(self._array, self.engine.build(self.weights)(*given[0], **given[1]))

    def gradients(self, inputs: Mapping[str, np.ndarray], states: Any, seed: int) -> Gradients:
        """Raises Unsupported."""
        raise Unsupported("a function over NumPy arrays has no gradients")

    def call_gradients(self, path: str, args: tuple, kwargs: dict, seed: int) -> Gradients:
        """Raises Unsupported."""
        raise Unsupported("a function over NumPy arrays has no gradients")

    def train(self, batches: Sequence[Mapping[str, np.ndarray]], trajectory: Trajectory, seed: int) -> Trained:
        """Raises Unsupported."""
        raise Unsupported("a function over NumPy arrays cannot be trained")

    def _invoke(self, given: dict, carried: Any) -> Any:
        function = self.engine.build(self.weights)
        if self.case.call is not None:
            return self.case.call[self.position](function, given, carried)
        return function(*given.values()) if carried is None else function(*given.values(), carried)

    def _cast(self, value: Any) -> Any:
        if not isinstance(value, (np.ndarray, np.generic)):
            return value
        return np.array(value, self.dtype if value.dtype.kind == "f" else value.dtype, order="C", copy=True)

    @staticmethod
    def _array(value: Any) -> Any:
        return np.array(value, copy=True) if isinstance(value, (np.ndarray, np.generic)) else value
