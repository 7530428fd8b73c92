"""Inside an NNX model while it is traced: record every module's call, put changed methods in place, and compile each thing once.

`nnx.capture` records outputs only; here the classes of the model's modules get a wrapped method for the length of one trace, so that inputs
are recorded as well and a method can be replaced. A call that ends inside an inner trace (the body of `lax.scan`) cannot be recorded and is
reported as untapped.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import get_opaque_trace_state

from .. import tree
from .base import within

QUICK = ({"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}, {"xla_backend_optimization_level": 0})


@dataclass(frozen=True, eq=False)
class Patch:
    """A change to one module of a candidate, compared by identity.

    path: dotted path of the module. around: `f(module, call, args, kwargs) -> outputs` in the place of `method`. prepare: `f(module)`, which
    may set attributes of the (temporary) module before it runs. method: the method that `around` replaces.
    """

    path: str
    around: Callable[[Any, Callable, tuple, dict], Any] | None = None
    prepare: Callable[[Any], None] | None = None
    method: str = "__call__"

    def below(self, root: str) -> str | None:
        """The path relative to `root`; None when the patch lies outside it."""
        if not root or self.path == root:
            return self.path if not root else ""
        return self.path[len(root) + 1:] if self.path.startswith(f"{root}.") else None


@dataclass
class Tap:
    """Calls of a trace in the order in which they ended, as (path, index, args, kwargs, outputs) of tracers.

    Raises CaseError when they hold more than `limit` bytes.
    """

    limit: int
    calls: list[tuple[str, int, tuple, dict, Any]] = field(default_factory=list)
    untapped: set[str] = field(default_factory=set)
    held: int = 0
    _counts: dict[str, int] = field(default_factory=dict)

    def add(self, path: str, args: tuple, kwargs: dict, outputs: Any) -> None:
        """Record a call that has ended."""
        self.held = within(self.limit, self.held, path, (args, kwargs, outputs))
        index = self._counts[path] = self._counts.get(path, -1) + 1
        self.calls.append((path, index, args, kwargs, outputs))


def modules_of(model: nnx.Module) -> dict[str, nnx.Module]:
    """Every module by dotted path, the model itself under the empty path."""
    return {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)}


def _owned(cls: type, method: str) -> Callable | None:
    # getattr on a class would find the metaclass's __call__ for a class that has none
    return next((base.__dict__[method] for base in cls.__mro__ if method in base.__dict__), None)


@contextlib.contextmanager
def instrumented(model: nnx.Module, patches: Sequence[tuple[str, Patch]], tap: Tap | None) -> Iterator[None]:
    """Wrap the methods of the model's classes while the context lasts. `patches` are (path relative to `model`, patch)."""
    modules = modules_of(model)
    table: dict[tuple[int, str], tuple[str, list[Patch]]] = {}
    for path, module in modules.items():
        if _owned(type(module), "__call__") is not None:
            table[id(module), "__call__"] = (path, [])
    for path, patch in patches:
        if path not in modules:
            raise ValueError(f"a patch names module {path!r}, which the candidate does not have")
        if patch.prepare is not None:
            patch.prepare(modules[path])
        if patch.around is not None:
            if _owned(type(modules[path]), patch.method) is None:
                raise ValueError(f"a patch names method {patch.method!r} of {path!r}, which {type(modules[path]).__name__} does not have")
            table.setdefault((id(modules[path]), patch.method), (path, []))[1].append(patch)
    wanted = {(type(module), method) for module in modules.values() for (key, method) in table if key == id(module)}
    kept, outer, busy = [], get_opaque_trace_state(convention="nnx"), set()

    def wrap(original: Callable, method: str) -> Callable:
        def method_with_tap(self: Any, *args: Any, **kwargs: Any) -> Any:
            key = (id(self), method)
            if key not in table or key in busy:
                return original(self, *args, **kwargs)
            path, changes = table[key]
            busy.add(key)
            try:
                call: Callable = lambda *a, **k: original(self, *a, **k)  # noqa: E731
                for patch in changes:
                    call = _around(patch, self, call)
                outputs = call(*args, **kwargs)
            finally:
                busy.discard(key)
            if tap is not None and method == "__call__":
                if get_opaque_trace_state(convention="nnx") == outer:
                    tap.add(path, args, kwargs, outputs)
                else:
                    tap.untapped.add(path)
            return outputs

        return method_with_tap

    try:
        for cls, method in wanted:
            original = _owned(cls, method)
            kept.append((cls, method, method in cls.__dict__, original))
            setattr(cls, method, wrap(original, method))
        yield
    finally:
        for cls, method, own, original in reversed(kept):
            if own:
                setattr(cls, method, original)
            else:
                delattr(cls, method)


def _around(patch: Patch, module: Any, call: Callable) -> Callable:
    return lambda *args, **kwargs: patch.around(module, call, args, kwargs)


def is_array(leaf: Any) -> bool:
    """Whether a leaf travels through the compiled program (Python scalars do not: they are part of it)."""
    return isinstance(leaf, (jax.Array, jnp.ndarray)) or hasattr(leaf, "__jax_array__")


@functools.cache
def quick_options() -> dict[str, Any] | None:
    """The XLA options that compile fastest (a third of the usual time on a CPU), of those that this version knows."""
    if jax.default_backend() != "cpu":
        return None
    for options in QUICK:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.jit(lambda x: x + 1).lower(jnp.zeros(())).compile(compiler_options=options)
            return options
    return None


def compiled(function: Callable, arguments: tuple, quick: bool) -> Callable:
    """`function` compiled for these arguments; `quick` for programs that run a few times only."""
    return jax.jit(function).lower(*arguments).compile(compiler_options=quick_options() if quick else None)


@functools.cache
def _compilers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=2, thread_name_prefix="parity-compile")


class Hashed:
    """A value as a key whose hash is computed once: that of a graph definition walks the whole model, and every call looks its program up."""

    def __init__(self, value: Any) -> None:
        self.value, self.hash = value, hash(value)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hashed) and (self.value is other.value or (self.hash == other.hash and self.value == other.value))


class Started(Exception):
    """A program was only started on its way; there is no result yet."""


@dataclass
class Programs:
    """Compiled programs by what they compute: a key, the signature of the arguments, and the side results of the trace.

    While `ahead` is set, `run` traces the program, leaves the compiling to another thread, and raises Started.
    """

    held: dict[Any, tuple[Any, dict]] = field(default_factory=dict)
    count: int = 0
    ahead: bool = False

    def run(self, key: Any, function: Callable, value: Any, jit: bool, quick: bool = False) -> Any:
        """`function(value)` for a tree of arrays and Python scalars, compiled on first use for this key and signature.

        `quick` compiles with little optimisation: a third of the time, for programs that run once. Scalars, None and containers of the
        outputs are fixed when it is traced; arrays are computed.
        """
        arrays, structure = tree.pack(value, is_array)
        entry = (key, jit, quick, tree.signature(value), jax.config.jax_enable_x64)
        if entry not in self.held:
            side: dict = {}

            def program(given: list) -> list:
                made, side["structure"] = tree.pack(function(tree.unpack(given, structure)), is_array)
                return made

            self.count += 1
            made: Any = program
            if jit:
                # tracing patches classes, so it stays in this thread; compiling needs neither them nor the interpreter
                lowered = jax.jit(program).lower(arrays)
                made = _compilers().submit(lowered.compile, compiler_options=quick_options() if quick else None)
            self.held[entry] = (made, side)
        if self.ahead:
            raise Started
        program, side = self.held[entry]
        if isinstance(program, Future):
            program = program.result()
            self.held[entry] = (program, side)
        result = program(arrays)
        return tree.unpack(result, side["structure"])
