"""The reference, recorded once: its runs under every regime, and its layers on their own inputs, shared by every candidate compared to it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from . import mapping, tree
from .adapters import opened
from .adapters.base import Adapter, Call, Run, Unsupported, digest
from .case import Case, CaseError, raised
from .compare import EPS
from .leaves import randomised
from .regimes import AS_IS, BY_NAME, Regime, chosen, transformed

# of 20,000 healthy LayerNorms of 3 rows of 7 near 100, 3.5e-4 err by more than 16 times the reference's own error, and none by more than 6 times
# the median of its errors on 8 neighbours; of as many with a variance in one pass 99.8 % are found by either
NEIGHBOURS = 8
MAX_CALLS = 2  # of one module in one run: the first sees the initial state, the last a state that has been through everything


@dataclass(frozen=True)
class Forced:
    """A layer of the reference on inputs of its own: NumPy arguments on the case's grid, and the float64 outputs for them."""

    path: str
    index: int
    args: tuple
    kwargs: dict
    outputs: Any


class Skip(Exception):
    """A regime that does not apply to a case; the message says why."""


class ReferenceRaised(Exception):
    """An exception of the reference while the two were compared; the message is the exception in one line."""


@contextlib.contextmanager
def of_reference() -> Iterator[None]:
    """What is raised in here, other than Unsupported, is the reference's: it is raised again as ReferenceRaised."""
    try:
        yield
    except Unsupported:
        raise
    except Exception as error:
        raise ReferenceRaised(raised(error)) from error


def matching(table: Mapping[str, str], name: str) -> str | None:
    """The reason of the first pattern of a table that fits a name."""
    return next((reason for pattern, reason in table.items() if fnmatchcase(name, pattern)), None)


class Recording:
    """Runs of the reference of a case, made when they are first asked for and kept. One that is not `live` is read from a golden file."""

    live = True

    def __init__(self, case: Case) -> None:
        self.case = case
        self.regimes = chosen(case.regimes)
        self.rename = mapping.renamer(case.names)
        self.reference: dict[str, Adapter] = {"float64": opened(case, "reference", "float64")}
        base = self.reference["float64"]
        self.leaves = base.leaves()
        if case.states is not None and case.states.output < 0:
            raise CaseError(f"states.output of case {case.name!r} counts from 0, found {case.states.output}")
        self.weights = randomised(self.leaves, base.arrays(), seed=case.seed, grid=case.grid, overrides=case.leaves, ties=case.ties)
        base.load(self.weights)
        self.kind = base.kind
        self.candidate_outputs: dict[tuple, Any] = {}
        self.shared: dict[Any, Any] = {}
        self.refused: dict[tuple[str, str], str] = {}
        self.written: dict[str, str] = {}
        self._runs: dict[tuple[str, str], Run] = {}
        self._forced: dict[str, list[Forced]] = {}
        self._own: dict[tuple, Any] = {}
        self._carried: Any = None
        self._within: dict[str, Recording] = {}

    def within(self, dtype: str) -> Recording:
        """The recording whose weights and inputs a precision holds: this one, or one of its own, rounded further, for a half precision
        beside another lower one."""
        if dtype in ("float64", self.case.grid):
            return self
        if dtype not in self._within:
            other = self._within[dtype] = Recording(dataclasses.replace(self.case, dtypes=("float64", dtype)))
            # rounded from the values here, as an adapter rounds them: rounding the drawn values at once can give the other neighbour
            other.weights = {name: tree.to_grid(value, dtype) if value.dtype.kind == "f" else value for name, value in self.weights.items()}
            other.reference["float64"].load(other.weights)
        return self._within[dtype]

    def adapter(self, dtype: str) -> Adapter:
        """The reference in a precision, with the randomised weights."""
        if dtype not in self.reference:
            self.reference[dtype] = opened(self.case, "reference", dtype)
            self.reference[dtype].load(self.weights)
        return self.reference[dtype]

    def grid(self, value: Any) -> Any:
        """A tree with every float array rounded to the coarsest precision of the case, as float64."""
        return tree.map_leaves(lambda leaf: tree.to_grid(leaf, self.case.grid) if isinstance(leaf, np.ndarray) and leaf.dtype.kind == "f" else leaf,
                               value)

    def inputs(self, regime: Regime, offset: int = 0) -> dict[str, np.ndarray]:
        """The inputs of a regime. Raises Skip when the case's inputs cannot be made like that."""
        for argument in ("length", "batch"):
            if getattr(regime, argument) is not None and not self.case.accepts(argument):
                raise Skip(f"inputs of the case take no {argument}")
        drawn = self.case.draw(self.case.seed + offset, batch=regime.batch, length=regime.length)
        if regime.on_floats and not any(value.dtype.kind == "f" for value in drawn.values()):
            raise Skip("the model reads integers only; applied to the inputs of each layer")
        axis = 1 if self.case.states is None else self.case.states.axis
        return self.grid(transformed(regime, drawn, axis))

    def states(self, regime: Regime) -> Any:
        """The state handed over under a regime, None where none is. Raises Skip for a carried state in a model without one."""
        if not regime.carried:
            return None
        if self.case.states is None:
            raise Skip("the model carries no state")
        if self._carried is None:
            if self.case.states.initial is not None:
                drawn = self.case.draw(self.case.seed)
                shape = next(iter(drawn.values())).shape
                first_is_time = self.case.states.axis == 0 and next(iter(drawn)) in self.case.along(drawn)
                try:
                    made = self.case.states.initial(self.case.seed, shape[1 if first_is_time else 0])
                except Exception as error:
                    raise CaseError(f"states.initial of case {self.case.name!r} raised {raised(error)}") from error
                given = self.grid(made)
                self._carried = tree.like(self.state_of(self.run(BY_NAME[AS_IS]).outputs), given)
            else:
                other = self.reference["float64"].run(self.inputs(BY_NAME[AS_IS], offset=1), None, tap=False)
                self._carried = self.grid(self.state_of(other.outputs))
        return self._carried

    def state_of(self, outputs: Any) -> Any:
        """The state in the outputs of a run. Raises CaseError when the outputs are no tuple that holds it."""
        place = self.case.states.output
        if not isinstance(outputs, (tuple, list)) or len(outputs) <= place:
            raise CaseError(f"states.output of case {self.case.name!r} is {place}, but the model returned {type(outputs).__name__} "
                            f"of {len(outputs) if isinstance(outputs, (tuple, list)) else 1}")
        return outputs[place]

    def run(self, regime: Regime, dtype: str = "float64") -> Run:
        """The tapped run of the reference under a regime; raises Skip where it does not apply."""
        key = (regime.name, dtype)
        if key not in self._runs:
            inputs, states = self.inputs(regime), self.states(regime)
            try:
                run = self.adapter(dtype).run(inputs, states, tap=dtype == "float64")
                again = self.adapter(dtype).run(inputs, states) if key == (AS_IS, "float64") else run
            except Exception as error:
                if regime.name == AS_IS:
                    if isinstance(error, CaseError):
                        raise
                    given = self.case.shown(inputs)
                    raise CaseError(f"the reference of case {self.case.name!r} cannot be run on {given}: {raised(error)}") from error
                raise Skip(f"the reference refuses it: {error}") from error
            if digest(again.outputs) != digest(run.outputs):
                raise CaseError(f"the reference of case {self.case.name!r} gives other outputs when it is called again with the same weights and "
                                "inputs: it draws random numbers (dropout left on?) or keeps something between calls; make it deterministic")
            self.written.update(run.written)
            self._runs[key] = run
        return self._runs[key]

    def order(self) -> dict[str, int]:
        """Module path -> position at which its first call ends in the plain run; modules that do not run come last."""
        order: dict[str, int] = {}
        for regime in self.plain():
            for call in self.run(regime).calls:
                order.setdefault(call.path, len(order))
        return order

    def plain(self) -> list[Regime]:
        """The plain run and, for a model with states, the one with a carried state."""
        return [BY_NAME[AS_IS]] + ([BY_NAME["carried state"]] if self.case.states is not None else [])

    def forced(self, regime: Regime) -> list[Forced]:
        """Every layer on the reference's own inputs under a regime: those it met in that run, or those of the plain runs transformed.

        The model itself is left out: on its own inputs it is the free run.
        """
        if regime.name not in self._forced:
            sources = [item for plain in (self.plain() if regime.on_floats else [regime]) for item in self._selected(self.run(plain).calls)]
            made = []
            for call in sources:
                if not call.path or matching(self.case.not_forced, call.path) is not None:
                    continue
                args, kwargs = self.grid(transformed(regime, (call.args, call.kwargs)) if regime.on_floats else (call.args, call.kwargs))
                # the outputs are those for the rounded inputs, so that one oracle serves every precision
                try:
                    outputs = self.reference["float64"].call(call.path, args, kwargs)
                except Exception as error:
                    if not regime.on_floats:
                        raise CaseError(f"layer {call.path!r} of the reference cannot be called by itself: {error}; give not_forced") from error
                    self.refused[regime.name, call.path] = str(error)
                    continue
                made.append(Forced(call.path, len(made), args, kwargs, outputs))
            self._forced[regime.name] = made
        return self._forced[regime.name]

    def own(self, regime: Regime, forced: Forced, dtype: str) -> Any:
        """Outputs of a forced layer of the reference in a lower precision."""
        key = (regime.name, forced.index, dtype)
        if key not in self._own:
            with of_reference():
                self._own[key] = self.adapter(dtype).call(forced.path, forced.args, forced.kwargs)
        return self._own[key]

    def neighbours(self, regime: Regime, dtype: str, forced: Forced | None = None) -> list[tuple[Any, Any]]:
        """Outputs in float64 and in a lower precision of a forced layer, or of the model under a regime, on inputs a few roundings away.

        Empty for inputs without floats.
        """
        if forced is None:
            given: Any = (self.inputs(regime), self.states(regime))
            call = lambda adapter, moved: adapter.run(*moved, tap=False).outputs  # noqa: E731
        else:
            given = (forced.args, forced.kwargs)
            call = lambda adapter, moved: adapter.call(forced.path, *moved)  # noqa: E731
        if not any(isinstance(leaf, np.ndarray) and leaf.dtype.kind == "f" for _, leaf in tree.listed(given)):
            return []
        rng, found = np.random.default_rng([self.case.seed, 0 if forced is None else 1 + forced.index]), []

        def move(leaf: Any) -> Any:
            floating = isinstance(leaf, np.ndarray) and leaf.dtype.kind == "f"
            return leaf * (1.0 + EPS[dtype] * rng.integers(-2, 3, leaf.shape)) if floating else leaf

        for _ in range(NEIGHBOURS):
            moved = self.grid(tree.map_leaves(move, given))
            with of_reference():
                found.append(tuple(call(self.adapter(name), moved) for name in ("float64", dtype)))
        return found

    @staticmethod
    def _selected(calls: list[Call]) -> list[Call]:
        last = {call.path: call.index for call in calls}
        return [call for call in calls if call.index < MAX_CALLS - 1 or call.index == last[call.path]]
