"""Flax Linen: an unbound `flax.linen.Module`, whose variables are made from the case's own inputs, behind the face of the NNX adapter.

Modules exist only while the model is called, so the call that makes the variables also finds them: their paths (`Dense_0`, `blocks_1.norm`),
kinds and settings, and a copy of each that can be called by itself. `nn.intercept_methods` records every call, puts patches in place, and
forces inputs on a module that cannot be called by itself because it uses variables of another. Leaves are named by module path and
name, whatever their collection; those of `params` are trained, those of other collections (`batch_stats`, `cache`) are not. Every
collection may be written to during a call: what changed is reported as a side effect, and is gone afterwards. Layers that `nn.scan` or
`nn.vmap` stack are refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.extend.core import get_opaque_trace_state

from ..case import Case, CaseError, raised
from .base import Leaf, Node, joined
from .jax_shared import RANDOM, Part, is_float32
from .nnx_adapter import SETTINGS, NNXAdapter
from .nnx_trace import Patch, Programs, Tap, compiled

LAYERS = (
    (nn.Dense, "linear"), (nn.DenseGeneral, "lineargeneral"), (nn.Embed, "embedding"), (nn.LayerNorm, "layernorm"), (nn.RMSNorm, "rmsnorm"),
    (nn.GroupNorm, "groupnorm"), (nn.BatchNorm, "batchnorm"), (nn.Dropout, "dropout"),
)
UNCALLED = ("setup", "<lambda>")  # what Flax itself calls while it builds a module


@dataclass(frozen=True)
class Found:
    """A module that the model calls. `module` is an unbound copy, `shapes` the variables it owns as it sees them, `foreign` the paths of modules
    outside it that it was given."""

    keys: tuple[str, ...]
    layer: str
    settings: Mapping[str, Any]
    module: nn.Module
    shapes: Mapping[tuple[str, ...], tuple[int, ...]]
    foreign: frozenset[str]


class _Reached(Exception):
    """Carries the outputs of a forced module out of the model's call."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs


class LinenAdapter(NNXAdapter):
    """A Linen module in one precision. Raises CaseError for a module that is bound, cannot be initialised, or stacks its layers."""

    kind = "linen"

    def __init__(self, model: nn.Module, dtype: str, case: Case, position: int) -> None:
        role = ("reference", "candidate")[position]
        if model.scope is not None:
            raise CaseError(f"the {role} of case {case.name!r} is a bound {type(model).__name__}; give the module itself, without variables")
        self.dtype, self.case, self.position, self.model = dtype, case, position, model
        self.programs, self.patches, self.salt, self.known = Programs(), (), None, "model"
        self._leaves: dict[str, Leaf] = {}
        self._digests: dict[str, str] = {}
        self._subs: dict[str, Part] = {}
        self._found: dict[str, Found] = {}
        with self._context():
            self._plain = self._arrays(case.draw(case.seed))

            def start(key: jax.Array) -> Any:
                with nn.intercept_methods(self._finding):
                    return nn.meta.unbox(nn.init(lambda bound: self._invoke(bound, self._plain, None), model)(key))

            try:
                key = jax.random.key(0)
                made = flatten_dict(compiled(start, (key,), quick=True)(key))
            except CaseError:
                raise
            except Exception as error:
                raise CaseError(f"the variables of the {role} of case {case.name!r} cannot be made from its inputs: {raised(error)}") from error
            self.variables: dict[str, tuple[str, ...]] = {}
            for keys in made:
                name = ".".join(keys[1:])
                if name in self.variables:
                    raise CaseError(f"collections {self.variables[name][0]!r} and {keys[0]!r} of case {case.name!r} both hold {name!r}")
                self.variables[name] = keys
            self.weights = {name: self._array_of(made[keys]) for name, keys in self.variables.items()}
        self._refuse_stacks()

    def modules(self) -> dict[str, Node]:
        """Every module that the model calls, by dotted path, the model itself under the empty path."""
        return {path: Node(path, found.layer, found.settings, type(found.module)) for path, found in self._found.items()}

    def leaves(self) -> dict[str, Leaf]:
        """Every variable of every collection; those of `params` are what is trained."""
        if not self._leaves:
            for name, keys in self.variables.items():
                value, owner = self.weights[name], self._found.get(name.rpartition(".")[0])
                layer = "Variable" if owner is None else owner.layer
                self._leaves[name] = Leaf(name, tuple(value.shape), str(value.dtype), keys[0] == "params", layer)
        return dict(self._leaves)

    def keyed(self) -> dict[str, str]:
        """Name of every leaf -> the same with its collection before it, as a file of variables has it: params.proj.kernel."""
        return {name: ".".join(keys) for name, keys in self.variables.items()}

    def identity(self, path: str) -> tuple:
        """What the outputs of one layer depend on beside its arguments: equal identities mean equal results."""
        return super().identity("" if self._found[path].foreign else path)

    def _array_of(self, value: Any) -> jax.Array:
        return jnp.asarray(value, self.dtype) if jnp.issubdtype(value.dtype, jnp.floating) else jnp.asarray(value)

    def _finding(self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        """An interceptor that notes every module, after its call, when its variables are there."""
        module, method = context.module, context.method_name
        self._retyped(module)
        outputs = call(*args, **kwargs)
        if method not in UNCALLED and _dotted(module.path) not in self._found:
            path = _dotted(module.path)
            given = [value for field in _fields(module) for value in jax.tree.leaves(getattr(module, field), is_leaf=_is_module) if _is_module(value)]
            foreign = {_dotted(value.path) for value in given if value.scope is not None}
            shapes = {keys: tuple(jnp.shape(value)) for keys, value in flatten_dict(nn.meta.unbox(dict(module.variables))).items() if len(keys) == 2}
            self._found[path] = Found(
                tuple(module.path), _layer(module), {name: getattr(module, name) for name in SETTINGS if hasattr(module, name)},
                module.clone(_deep_clone=True, _reset_names=True, name=None), shapes,
                frozenset(other for other in foreign if path and not other.startswith(f"{path}.")))
        return outputs

    def _retyped(self, module: nn.Module) -> None:
        """Set the module's computation dtype from float32, the usual default of a Linen model, to the adapter's, as `.to(dtype)` does in torch."""
        for name in ("dtype", "param_dtype"):
            held = getattr(module, name, None)
            if held is not None and is_float32(held):
                object.__setattr__(module, name, jnp.dtype(self.dtype))  # past the check that a module does not change after it was made

    def _refuse_stacks(self) -> None:
        for path, found in self._found.items():
            for (collection, leaf), shape in found.shapes.items():
                name = joined(path, leaf)
                whole = self.variables.get(name)
                if whole is not None and whole[0] == collection and tuple(self.weights[name].shape) != shape:
                    raise CaseError(
                        f"{name} of case {self.case.name!r} has shape {tuple(self.weights[name].shape)} in the variables and {shape} where module "
                        f"{path!r} uses it: nn.scan or nn.vmap stacks its layers, which cannot be compared one by one; give a module that "
                        "loops over them")

    def _nested(self, weights: Mapping[str, Any], prefix: str = "") -> dict:
        keys = len(self._found[prefix].keys) if prefix else 0
        flat = {}
        for name, value in weights.items():
            collection, *path = self.variables[joined(prefix, name)]
            flat[(collection, *path[keys:])] = value
        return unflatten_dict(flat)

    @contextlib.contextmanager
    def _bound(self, model: nn.Module, variables: dict, patches: Sequence[tuple[str, Patch]], tap: Tap | None) -> Iterator[nn.Module]:
        with nn.intercept_methods(self._intercepting(patches, tap)):
            try:
                yield model.bind(variables, mutable=list(variables))
            except errors.InvalidRngError as error:
                raise RuntimeError(f"it draws random numbers when it is called ({str(error).partition(' (http')[0]}): {RANDOM}") from error

    def _live(self, weights: Mapping[str, Any], tap: Tap | None = None) -> contextlib.AbstractContextManager[nn.Module]:
        return self._bound(self.model, self._nested(weights), [(patch.path, patch) for patch in self.patches], tap)

    def _intercepting(self, patches: Sequence[tuple[str, Patch]], tap: Tap | None) -> Callable:
        """An interceptor that sets dtypes, puts patches in place and records calls; `patches` are (path relative to the bound module, patch)."""
        for patch in self.patches:
            if patch.path not in self._found:
                raise ValueError(f"a patch names module {patch.path!r}, which the candidate does not have")
            if not hasattr(type(self._found[patch.path].module), patch.method):
                owner = type(self._found[patch.path].module).__name__
                raise ValueError(f"a patch names method {patch.method!r} of {patch.path!r}, which {owner} does not have")
        outer, busy = get_opaque_trace_state(convention="nnx"), set()

        def intercept(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
            module, method, path = context.module, context.method_name, _dotted(context.module.path)
            self._retyped(module)
            own = [patch for place, patch in patches if place == path] if method != "<lambda>" else []
            for patch in own:
                if patch.prepare is not None:
                    with _thawed(module):
                        patch.prepare(module)
            key, changes = (path, method), [patch for patch in own if patch.around is not None and patch.method == method]
            tapped = tap is not None and method == "__call__"
            if key in busy or not (changes or tapped):
                return call(*args, **kwargs)
            busy.add(key)
            try:
                inner = call
                for patch in changes:
                    inner = _around(patch, module, inner)
                outputs = inner(*args, **kwargs)
            finally:
                busy.discard(key)
            if tapped and get_opaque_trace_state(convention="nnx") == outer:
                tap.add(path, args, kwargs, outputs)
            elif tapped:
                tap.untapped.add(path)
            return outputs

        return intercept

    def _values(self, model: nn.Module) -> dict[str, Any]:
        flat = flatten_dict(nn.meta.unbox(dict(model.variables)))
        return {name: flat[keys] for name, keys in self.variables.items()}

    def _part(self, path: str) -> Part:
        """The module at `path` by itself: its unbound copy with its own variables, or the whole model with inputs forced on it."""
        if path not in self._subs:
            found = self._found[path]
            if found.foreign:
                inside = (path, *found.foreign)
                trained = {name: keys[0] == "params" and name.startswith(tuple(f"{other}." for other in inside))
                           for name, keys in self.variables.items()}
                self._subs[path] = Part("", ("forced", path, self.patches), self.weights, trained, lambda values: self._forced(path, values))
            else:
                prefix = f"{path}." if path else ""
                weights = {name.removeprefix(prefix): value for name, value in self.weights.items() if name.startswith(prefix)}
                trained = {name: self.variables[joined(path, name)][0] == "params" for name in weights}
                self._subs[path] = Part(path, _likeness(found.module) or ("part", path), weights, trained, lambda values: self._bound(
                    found.module, self._nested(values, path), self._below(path), None))
        return self._subs[path]

    @contextlib.contextmanager
    def _forced(self, path: str, values: Mapping[str, Any]) -> Iterator[Callable[..., Any]]:
        """The module at `path` as a function: the model is called on the case's inputs, and the module's first call gets the given arguments."""

        def function(*args: Any, **kwargs: Any) -> Any:
            def force(call: Callable, own: tuple, named: dict, context: nn.module.InterceptorContext) -> Any:
                if context.method_name == "__call__" and _dotted(context.module.path) == path:
                    raise _Reached(call(*args, **kwargs))
                return call(*own, **named)

            with self._live(values) as model, nn.intercept_methods(force):
                try:
                    self._invoke(model, self._plain, None)
                except _Reached as reached:
                    return reached.outputs
            raise RuntimeError(f"module {path!r} is not called on the inputs of the case")

        yield function


def _dotted(path: Sequence[str]) -> str:
    return ".".join(path)


def _is_module(value: Any) -> bool:
    return isinstance(value, nn.Module)


def _fields(module: nn.Module) -> list[str]:
    return [field.name for field in dataclasses.fields(module) if field.name not in ("parent", "name")]


def _layer(module: nn.Module) -> str:
    if isinstance(module, nn.Conv):
        rank = len(module.kernel_size) if isinstance(module.kernel_size, (tuple, list)) else 1
        return f"conv{rank}d"
    return next((name for cls, name in LAYERS if isinstance(module, cls)), type(module).__name__)


def _likeness(module: nn.Module) -> tuple | None:
    """What two modules share that compute the same function of arguments and variables; None when it cannot be told. Initialisers do not count."""
    settings = tuple((field, getattr(module, field)) for field in _fields(module) if not field.endswith("_init"))
    try:
        hash(settings)
    except TypeError:
        return None
    return type(module), settings


def _around(patch: Patch, module: nn.Module, call: Callable) -> Callable:
    return lambda *args, **kwargs: patch.around(module, call, args, kwargs)


@contextlib.contextmanager
def _thawed(module: nn.Module) -> Iterator[None]:
    """Attributes of a module can be set while the context lasts."""
    module._state.is_initialized = False
    try:
        yield
    finally:
        module._state.is_initialized = True
