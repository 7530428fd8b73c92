"""A case: a reference, a candidate, and all that has to be said to compare the two."""

from __future__ import annotations

import inspect
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import mapfile
from .bounds import Bound, Bounds
from .regimes import Regime, chosen

DTYPES = ("float64", "float32", "bfloat16", "float16")


class CaseError(ValueError):
    """A case that cannot be run as it is written."""


def raised(error: BaseException) -> str:
    """An exception in one line: its class, the first line of its message, and where in the user's files it came from."""
    line = (str(error).strip().splitlines() or [""])[0]
    others = ("<", str(Path(__file__).parent), sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if not frame.filename.startswith(others) or frame.filename.startswith(str(Path(__file__).parent / "tests"))]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{': ' if line else ''}{line}{place}"


def _is_model(value: Any) -> bool:
    """Whether a value is a module itself; no framework is imported for the question."""
    return any(cls.__name__ == "Module" and cls.__module__.startswith(("torch.nn", "flax.nnx", "flax.linen")) for cls in type(value).__mro__)


def missing(error: BaseException) -> str:
    """What to do about a framework that is not there."""
    name = (getattr(error, "name", None) or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    extra = {"torch": "torch", "jax": "jax", "flax": "jax", "optax": "jax"}.get(name)
    if extra is None:
        return ""
    return (f"; it comes with pip install 'groundwave[{extra}]', and a file that imports it inside the functions that make the models can be "
            "checked against a golden file without it")


@dataclass(frozen=True)
class StateProtocol:
    """How a model is called with a carried state and split along time.

    The state is handed over as the argument after the inputs (or to `Case.call`), and is element `output` of the tuple that the model
    returns. `axis` is the time axis of every input named in `along` (all of them when None) and of every other element of that tuple.
    `initial(seed, batch)` gives a state of NumPy arrays; without it the state that the reference ends with on other inputs is carried.
    Each side gets it in the containers that it hands out itself (a NamedTuple of its own, a dict, a list) when the leaves have the same names.
    `detached` declares that no gradient flows into a state passed in; it is then checked to be exactly zero. `split_length` is the length
    at which every two-way split is tried.
    """

    output: int = 1
    axis: int = 1
    along: tuple[str, ...] | None = None
    initial: Callable[[int, int], Any] | None = None
    detached: bool = False
    split_length: int = 17


@dataclass(frozen=True)
class Trajectory:
    """The AdamW run of the optimiser tier: `steps` steps on inputs of seeds seed, seed + 1, ..., gradients clipped to the norm `clip`.

    `call` replaces the forward call for this tier, `after` is called after each step: both are pairs (reference, candidate) of functions,
    `call[i](module, inputs) -> outputs` (what the loss receives) and `after[i](module, outputs)`, which may change buffers in place.
    `batch` and `length` are those of the inputs when the case's inputs take them.
    """

    steps: int = 50
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float | None = 1.0
    call: tuple[Callable, Callable] | None = None
    after: tuple[Callable, Callable] | None = None
    batch: int | None = None
    length: int | None = None


@dataclass(frozen=True)
class Case:
    """A reference and a candidate that should compute the same thing.

    name: what reports call it.
    reference, candidate: functions without arguments that make a `torch.nn.Module`, an `nnx.Module`, a `flax.linen.Module` (unbound; its
        variables are made from the inputs of `seed`), or an `Engine` (a function over named arrays). They may take `dtype` ("float64", ...)
        when construction depends on it.
    inputs: `inputs(seed) -> dict of named NumPy arrays`, handed over by position in the order of the dict. With parameters `batch` and
        `length` (None for the case's own sizes) the length and batch regimes run as well.
    names: reference module path -> candidate module path where the two differ, as a mapping of dotted prefixes (`*` stands for one part, or
        for the end of one: `{"blocks.*": "blocks_*"}`) or a function; leaves follow their module.
    weights: rules of `convert` for the leaves that the kinds of layers do not settle, or the path of a file that `parity map` wrote.
    ties: reference leaf -> the reference leaf that it shares memory with (`{"lm_head.weight": "embedding.weight"}`).
    leaves: pattern of reference leaf names -> `f(rng, shape) -> values` used by the randomisation in place of the default.
    states: None for a model that carries no state.
    loss: pair (reference, candidate) of `f(outputs, inputs) -> scalar`; None for the mean squared distance of every
        float output from a fixed random target.
    call: pair (reference, candidate) of `f(module, inputs, states) -> outputs`; None for `module(*inputs.values()[, states])`. A Linen
        module comes bound to its variables.
    adapt: `f(path, args, kwargs) -> (args, kwargs)`, rewrites the reference's recorded arguments of a layer for the candidate's.
    also: name -> further implementation for the vote: a factory as `candidate`, or a pair (factory, call) with a call of its own.
    trajectory: None leaves the optimiser tier out, and the report says so.
    bounds: over the defaults of `bounds`, the last that covers a place holds.
    unpaired: pattern of reference module paths that the candidate does not have -> reason.
    not_forced: pattern of module paths that are not called by themselves -> reason.
    unobservable: pattern of reference leaves that change nothing -> reason.
    regimes: `Regime` objects or names of the standard ones; None for all of those. dtypes: float64 and the precisions beside it.
    sizes: name -> size of every axis, for the lint.
    injectors: mutations for `parity mutate`, `parity run --mutations` and `run_mutations`.
    seed: of the randomised weights and of the inputs.
    jit: whether the candidate's calls are compiled as one program, as they are in use.
    tap_limit: bytes that the recorded inputs and outputs of all modules of one run may take.
    """

    name: str
    reference: Callable[..., Any]
    candidate: Callable[..., Any]
    inputs: Callable[..., Mapping[str, np.ndarray]]
    names: Mapping[str, str] | Callable[[str], str] = field(default_factory=dict)
    weights: Sequence[Any] | str | Path = ()
    ties: Mapping[str, str] = field(default_factory=dict)
    leaves: Mapping[str, Callable] = field(default_factory=dict)
    states: StateProtocol | None = None
    loss: tuple[Callable, Callable] | None = None
    call: tuple[Callable, Callable] | None = None
    adapt: Callable | None = None
    also: Mapping[str, Any] = field(default_factory=dict)
    trajectory: Trajectory | None = field(default_factory=Trajectory)
    bounds: Sequence[Bound] = ()
    regimes: Sequence[Regime | str] | None = None
    dtypes: Sequence[str] = ("float64", "float32")
    unpaired: Mapping[str, str] = field(default_factory=dict)
    not_forced: Mapping[str, str] = field(default_factory=dict)
    unobservable: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    injectors: Sequence[Any] = ()
    seed: int = 0
    jit: bool = True
    tap_limit: int = 1 << 30

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise CaseError(f"a case needs a name, found {self.name!r}")
        for role in ("reference", "candidate", "inputs"):
            if _is_model(getattr(self, role)):
                kind = type(getattr(self, role)).__name__
                raise CaseError(f"{role} of case {self.name!r} is a {kind}, expected a function that makes it: {role}=lambda: {kind}(...)")
            if not callable(getattr(self, role)):
                raise CaseError(f"{role} of case {self.name!r} must be a function, found {getattr(self, role)!r}")
        if isinstance(self.weights, (str, Path)):
            rules, ties = mapfile.load(self.weights)
            object.__setattr__(self, "weights", rules)
            object.__setattr__(self, "ties", {**ties, **self.ties})
        for pair in ("loss", "call"):
            value = getattr(self, pair)
            if value is not None and not (isinstance(value, tuple) and len(value) == 2 and all(map(callable, value))):
                raise CaseError(f"{pair} of case {self.name!r} must be a pair of functions (reference, candidate), found {value!r}")
        for name, entry in self.also.items():
            if not callable(entry) and not (isinstance(entry, tuple) and len(entry) == 2 and all(map(callable, entry))):
                raise CaseError(f"also[{name!r}] of case {self.name!r} must be a factory or a pair (factory, call), found {entry!r}")
        for table in ("unpaired", "not_forced", "unobservable"):
            for pattern, reason in getattr(self, table).items():
                if not isinstance(reason, str) or len(reason.split()) < 2:
                    raise CaseError(f"{table}[{pattern!r}] of case {self.name!r} needs a reason, found {reason!r}")
        unknown = [dtype for dtype in self.dtypes if dtype not in DTYPES]
        if unknown or "float64" not in self.dtypes:
            raise CaseError(f"dtypes of case {self.name!r} must be of {', '.join(DTYPES)} and hold float64, found {tuple(self.dtypes)!r}")
        if isinstance(self.tap_limit, bool) or not isinstance(self.tap_limit, int) or self.tap_limit < 1:
            raise CaseError(f"tap_limit of case {self.name!r} must be a whole number of bytes, found {self.tap_limit!r}")
        Bounds(self.bounds)
        chosen(self.regimes)

    @property
    def grid(self) -> str:
        """The precision to which weights and inputs are rounded, so that the others start from equal values: float32 where the case has it.

        A half precision beside another lower one has a recording of its own (`Recording.within`): on its few values the sums of float32
        are exact here and there, and an error of zero measures nothing.
        """
        return next(dtype for dtype in ("float32", "bfloat16", "float16", "float64") if dtype in self.dtypes)

    def accepts(self, argument: str) -> bool:
        """Whether `inputs` takes the argument `batch` or `length`."""
        parameters = inspect.signature(self.inputs).parameters
        return argument in parameters or any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters.values())

    def draw(self, seed: int, *, batch: int | None = None, length: int | None = None) -> dict[str, np.ndarray]:
        """Inputs of a seed as a dict of NumPy arrays. Raises CaseError when they are anything else."""
        sizes = {name: value for name, value in (("batch", batch), ("length", length)) if value is not None}
        try:
            given = self.inputs(seed, **sizes)
        except Exception as error:
            how = "; it is called as inputs(seed), with batch= and length= where it takes them" if isinstance(error, TypeError) else ""
            raise CaseError(f"inputs of case {self.name!r} raised {raised(error)}{how}") from error
        if not isinstance(given, Mapping) or not given:
            raise CaseError(f"inputs of case {self.name!r} must give a dict of named arrays, found {type(given).__name__}")
        for name, value in given.items():
            if not isinstance(value, np.ndarray):
                raise CaseError(f"input {name!r} of case {self.name!r} must be a NumPy array, found {type(value).__name__}")
        return dict(given)

    @staticmethod
    def shown(inputs: Mapping[str, np.ndarray]) -> str:
        """Inputs as errors name them: x (3, 5) float64, ids (3, 7) int64."""
        return ", ".join(f"{name} {value.shape} {value.dtype}" for name, value in inputs.items())

    def along(self, inputs: Mapping[str, np.ndarray]) -> tuple[str, ...]:
        """Names of the inputs that have a time axis."""
        if self.states is None:
            return ()
        return tuple(inputs) if self.states.along is None else self.states.along


def make(factory: Callable[..., Any], dtype: str) -> Any:
    """Call a factory of a case, with `dtype` when it takes it."""
    try:
        takes = "dtype" in inspect.signature(factory).parameters
    except (TypeError, ValueError):
        takes = False
    return factory(dtype=dtype) if takes else factory()
