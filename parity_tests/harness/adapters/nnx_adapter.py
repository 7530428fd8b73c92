"""Flax NNX: run with every module tapped, one layer by itself, gradients by plain jax.grad, AdamW by optax; x64 by context only."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import errors, nnx

from .. import tree
from ..case import Case, Trajectory
from .base import Call, Gradients, Leaf, Node, Run, Trained, check_names, joined
from .jax_shared import RANDOM, Part, distance, is_float32, numpied, projection, wide
from .nnx_trace import Hashed, Patch, Programs, Tap, instrumented, modules_of

LAYERS = (
    (nnx.Linear, "linear"), (nnx.LinearGeneral, "lineargeneral"), (nnx.Embed, "embedding"), (nnx.LayerNorm, "layernorm"),
    (nnx.RMSNorm, "rmsnorm"), (nnx.GroupNorm, "groupnorm"), (nnx.BatchNorm, "batchnorm"), (nnx.Dropout, "dropout"),
)
SETTINGS = ("epsilon", "use_fast_variance", "momentum", "rate", "deterministic", "num_groups", "padding", "dtype")


def _random(variable: nnx.Variable) -> bool:
    return isinstance(variable, nnx.RngState)


def _layer(module: nnx.Module) -> str:
    if isinstance(module, nnx.Conv):
        rank = len(module.kernel_size) if isinstance(module.kernel_size, (tuple, list)) else 1
        return f"conv{rank}d"
    return next((name for cls, name in LAYERS if isinstance(module, cls)), type(module).__name__)


def _retyped(model: nnx.Module, dtype: str) -> None:
    """Set every module's own computation dtype from float32, the default that Flax fixes when a layer is made, to the given one.

    This is to NNX what `.to(dtype)` is to torch. A dtype that is not float32 was chosen, and stays.
    """
    for module in modules_of(model).values():
        for name in ("dtype", "param_dtype"):
            held = getattr(module, name, None)
            if held is not None and is_float32(held):
                setattr(module, name, jnp.dtype(dtype))


class NNXAdapter:
    """An NNX module in one precision. `patches` and `salt` make a mutated twin; `programs` may be shared by such twins."""

    kind = "nnx"

    def __init__(self, model: nnx.Module, dtype: str, case: Case, position: int) -> None:
        self.dtype, self.case, self.position = dtype, case, position
        self.programs, self.patches, self.salt = Programs(), (), None
        with self._context():
            if hasattr(model, "eval"):
                model.eval()
            self.model = model
            _retyped(model, dtype)
            self.graph, state = nnx.split(model)
            self.known = Hashed(self.graph)
            flat = dict(nnx.to_flat_state(state))
            self.random = {path: variable for path, variable in flat.items() if _random(variable)}
            self.variables = {".".join(map(str, path)): (path, variable) for path, variable in flat.items() if path not in self.random}
            self.weights = {name: variable.get_value() for name, (_, variable) in self.variables.items()}
        self._leaves: dict[str, Leaf] = {}
        self._digests: dict[str, str] = {}
        self._subs: dict[str, Part] = {}

    def release(self) -> None:
        """Give the compiled programs back: each holds memory mappings, and Linux allows a process 65,530 of them."""
        self.programs.held.clear()

    def twin(self, patches: Sequence[Patch], salt: Any = None) -> NNXAdapter:
        """The same model with patches in place, sharing compiled programs; `salt` keeps it from sharing any."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.patches, other.salt, other.weights = tuple(patches), salt, dict(self.weights)
        other._digests, other._subs = {}, {}
        return other

    def modules(self) -> dict[str, Node]:
        """Every module by dotted path, the model itself under the empty path; plain lists of modules are no modules."""
        return {path: Node(path, _layer(module), {name: getattr(module, name) for name in SETTINGS if hasattr(module, name)}, type(module))
                for path, module in modules_of(self.model).items() if not isinstance(module, (nnx.List, nnx.Dict))}

    def leaves(self) -> dict[str, Leaf]:
        """Every variable but random-number states, whatever its kind; `nnx.Param` is what is trained."""
        if not self._leaves:
            modules = modules_of(self.model)
            for name, (_, variable) in self.variables.items():
                value, owner = variable.get_value(), modules.get(name.rpartition(".")[0])
                self._leaves[name] = Leaf(name, tuple(np.shape(value)), str(value.dtype), isinstance(variable, nnx.Param),
                                          "Variable" if owner is None else _layer(owner))
        return dict(self._leaves)

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Set every leaf by value (never a view of the given memory). Raises ValueError for other names or shapes."""
        check_names(arrays, self.leaves())
        with self._context():
            self.weights = {name: self._array(np.asarray(arrays[name])) for name in self.variables}
        self._digests, self._subs = {}, {}

    def arrays(self) -> dict[str, np.ndarray]:
        """Copies of every leaf."""
        return {name: numpied(value) for name, value in self.weights.items()}

    def run(self, inputs: Mapping[str, np.ndarray], states: Any = None, *, tap: bool = True, quick: bool = True) -> Run:
        """Run the model once, tapping every module, and report variables that the run changed; `quick` compiles with little optimisation."""

        def function(value: dict) -> dict:
            record = Tap(self.case.tap_limit)
            with self._live(value["weights"], record if tap else None) as model:
                outputs = self._invoke(model, value["inputs"], value["states"])
            return {"outputs": outputs, "calls": record.calls, "after": self._values(model) if tap else {}, "untapped": sorted(record.untapped)}

        with self._context():
            value = {"weights": self.weights, "inputs": self._arrays(dict(inputs)), "states": self._arrays(states)}
            result = self.programs.run(("run", tap, *self._key()), function, value, self.case.jit,
                                       quick=quick)
            result = tree.map_leaves(numpied, result)
        before = self.arrays() if tap else {}
        effects = [f"variable {name} changed during the call" for name, value in before.items() if value.tobytes() != result["after"][name].tobytes()]
        return Run(result["outputs"], [Call(*call) for call in result["calls"]], effects, frozenset(result["untapped"]))

    def call(self, path: str, args: tuple, kwargs: dict) -> Any:
        """Outputs of the module at `path` on the given arguments; equal modules share one compiled program."""
        with self._context():
            part = self._part(path)

            def function(value: dict) -> Any:
                with part.live(value["weights"]) as module:
                    return module(*value["args"], **value["kwargs"])

            value = {"weights": part.weights, "args": self._arrays(args), "kwargs": self._arrays(kwargs)}
            return tree.map_leaves(numpied, self.programs.run(("call", *self._key(path, part.graph)), function, value, self.case.jit, quick=True))

    def gradients(self, inputs: Mapping[str, np.ndarray], states: Any, seed: int) -> Gradients:
        """Loss of the case and its gradients with respect to every nnx.Param, float input and state leaf."""

        def loss(weights: dict, given: dict) -> Any:
            with self._live(weights) as model:
                outputs = self._invoke(model, given["input"], given["state"])
            return self._loss(outputs, given["input"], seed)

        with self._context():
            trained = {name: leaf.trainable for name, leaf in self.leaves().items()}
            given = {"input": self._arrays(dict(inputs)), "state": self._arrays(states)}
            return self._differentiate(("gradients", seed, *self._key()), loss, self.weights, trained, given, lambda name: name)

    def call_gradients(self, path: str, args: tuple, kwargs: dict, seed: int) -> Gradients:
        """Gradients of a fixed random projection of one layer's outputs, by full leaf name and `args.N`."""
        with self._context():
            part = self._part(path)

            def loss(values: dict, given: dict) -> Any:
                with part.live(values) as module:
                    return projection(module(*given["args"], **given["kwargs"]), seed)

            given = {"args": self._arrays(args), "kwargs": self._arrays(kwargs)}
            key = ("call gradients", seed, *self._key(path, part.graph))
            return self._differentiate(key, loss, part.weights, part.trained, given, lambda name: joined(part.path, name))

    def train(self, batches: Sequence[Mapping[str, np.ndarray]], trajectory: Trajectory, seed: int) -> Trained:
        """AdamW by optax over the batches; parameters are nnx.Param, other variables change only through `after`."""
        optimiser = optax.adamw(trajectory.lr, b1=trajectory.betas[0], b2=trajectory.betas[1], eps=trajectory.eps,
                                weight_decay=trajectory.weight_decay)
        with self._context():
            split = [{}, {}]
            for name, leaf in self.leaves().items():
                split[0 if leaf.trainable else 1][name] = self.weights[name]
            parameters, others = split

            def loss(parameters: dict, others: dict, given: dict) -> Any:
                given = {name: given[name] for name in batches[0]}  # jit sorts a dict by its keys, and inputs go by position
                with self._live({**parameters, **others}) as model:
                    outputs = trajectory.call[self.position](model, given) if trajectory.call else self._invoke(model, given, None)
                return self._loss(outputs, given, seed), outputs

            def step(parameters: dict, others: dict, optimiser_state: Any, given: dict) -> Any:
                (value, outputs), grads = jax.value_and_grad(loss, has_aux=True)(parameters, others, given)
                if trajectory.clip is not None:  # torch's formula
                    norm = jnp.sqrt(sum(jnp.sum(jnp.square(grad)) for grad in jax.tree.leaves(grads)))
                    grads = jax.tree.map(lambda grad: grad * jnp.minimum(1.0, trajectory.clip / (norm + 1e-6)), grads)
                updates, optimiser_state = optimiser.update(grads, optimiser_state, parameters)
                parameters = optax.apply_updates(parameters, updates)
                if trajectory.after:
                    with self._live({**parameters, **others}) as model:
                        trajectory.after[self.position](model, outputs)
                        values = self._values(model)
                    parameters, others = ({name: values[name] for name in group} for group in (parameters, others))
                return parameters, others, optimiser_state, value

            losses, optimiser_state, key = [], optimiser.init(parameters), ("train", optax.adamw, trajectory, seed, *self._key())
            for batch in batches:
                given = (parameters, others, optimiser_state, self._arrays(dict(batch)))
                parameters, others, optimiser_state, value = self.programs.run(key, lambda value: step(*value), given, self.case.jit, quick=True)
                losses.append(float(value))
            arrays = {name: numpied(value) for name, value in {**parameters, **others}.items()}
        return Trained(np.asarray(losses), arrays)

    def start(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Begin to compile what a call of `run`, `call`, `gradients`, `call_gradients` or `train` with these arguments will need.

        An error is not raised here: the call itself meets it again, where it is reported.
        """
        if not self.case.jit:
            return
        self.programs.ahead = True
        try:
            with contextlib.suppress(Exception):
                getattr(self, method)(*args, **kwargs)
        finally:
            self.programs.ahead = False

    def identity(self, path: str) -> tuple:
        """What the outputs of one layer depend on beside its arguments: equal identities mean equal results."""
        if path not in self._digests:
            state = hashlib.sha256()
            for name, value in self.weights.items():
                if not path or name.startswith(f"{path}."):
                    state.update(name.encode() + np.asarray(value).tobytes())
            self._digests[path] = state.hexdigest()
        return self._digests[path], tuple(id(patch) for _, patch in self._below(path)), id(self.salt) if self.salt is not None else None

    def _context(self) -> Any:
        return wide(self.dtype == "float64")

    def _key(self, path: str = "", graph: Any = None) -> tuple:
        # patches are keyed by the objects themselves, which keeps them alive as long as the program
        return (self.known if graph is None else graph, tuple(self._below(path)), self.salt)

    def _below(self, path: str) -> list[tuple[str, Patch]]:
        return [(patch.below(path), patch) for patch in self.patches if patch.below(path) is not None]

    @contextlib.contextmanager
    def _live(self, weights: Mapping[str, Any], tap: Tap | None = None) -> Iterator[nnx.Module]:
        """The model with these weights, its patches in place and its calls recorded in `tap` while the context lasts."""
        model = self._merged(weights)
        with instrumented(model, [(patch.path, patch) for patch in self.patches], tap):
            try:
                yield model
            except errors.TraceContextError as error:
                if "Rng" not in str(error):
                    raise
                raise RuntimeError(f"it draws random numbers when it is called ({str(error).partition(' (http')[0]}): {RANDOM}") from error

    def _merged(self, weights: Mapping[str, Any]) -> nnx.Module:
        flat = {path: variable.replace(weights[name]) for name, (path, variable) in self.variables.items()}
        return nnx.merge(self.graph, nnx.from_flat_state(list({**flat, **self.random}.items())))

    def _values(self, model: nnx.Module) -> dict[str, Any]:
        flat = dict(nnx.to_flat_state(nnx.state(model)))
        return {name: flat[path].get_value() for name, (path, _) in self.variables.items()}

    def _part(self, path: str) -> Part:
        """The module at `path` by itself, split from a model that holds the weights."""
        if path not in self._subs:
            if "model" not in self.__dict__.get("_filled", {}) or self._filled["weights"] is not self.weights:
                self._filled = {"weights": self.weights, "model": self._merged(self.weights)}
                self._filled["modules"] = modules_of(self._filled["model"])
            graph, state = nnx.split(self._filled["modules"][path])
            flat = {".".join(map(str, key)): (key, variable) for key, variable in nnx.to_flat_state(state)}
            weights = {name: variable.get_value() for name, (_, variable) in flat.items() if not _random(variable)}

            @contextlib.contextmanager
            def live(values: Mapping[str, Any]) -> Iterator[nnx.Module]:
                module = nnx.merge(graph, _state(values, flat))
                with instrumented(module, self._below(path), None):
                    yield module

            self._subs[path] = Part(path, Hashed(graph), weights, {name: isinstance(flat[name][1], nnx.Param) for name in weights}, live)
        return self._subs[path]

    def _differentiate(self, key: tuple, loss: Callable, weights: dict, trained: Mapping[str, bool], given: Any, rename: Callable) -> Gradients:
        def function(value: dict) -> dict:
            fixed, structure = tree.pack(value["given"], tree.is_float)
            moving = {name: leaf for name, leaf in value["weights"].items() if trained[name] and tree.is_float(leaf)}

            def scalar(parameters: dict, floats: list) -> Any:
                return jnp.asarray(loss({**value["weights"], **parameters}, tree.unpack(floats, structure)))

            total, (parameters, floats) = jax.value_and_grad(scalar, argnums=(0, 1))(moving, fixed)
            inputs = {name: slot for name, slot in tree.named(tree.unpack(floats, structure)).items() if tree.is_float(slot)}
            return {"loss": total, "parameters": parameters, "inputs": inputs}

        result = tree.map_leaves(numpied, self.programs.run(key, function, {"weights": weights, "given": given}, self.case.jit, quick=True))
        return Gradients(float(result["loss"]), {rename(name): value for name, value in result["parameters"].items()}, result["inputs"])

    def _loss(self, outputs: Any, given: dict, seed: int) -> Any:
        return distance(outputs, seed) if self.case.loss is None else self.case.loss[self.position](outputs, given)

    def _invoke(self, model: nnx.Module, given: dict, carried: Any) -> Any:
        if self.case.call is not None:
            return self.case.call[self.position](model, given, carried)
        return model(*given.values()) if carried is None else model(*given.values(), carried)

    def _array(self, value: np.ndarray) -> jax.Array:
        # a copy of NumPy's that is handed over: jnp.array would compile a conversion for every shape
        return jax.device_put(np.array(value, dtype=jnp.dtype(self.dtype) if value.dtype.kind == "f" else None))

    def _arrays(self, value: Any) -> Any:
        return tree.map_leaves(lambda leaf: self._array(np.asarray(leaf)) if isinstance(leaf, (np.ndarray, np.generic)) else leaf, value)


def _state(weights: Mapping[str, Any], variables: Mapping[str, tuple]) -> nnx.State:
    return nnx.from_flat_state([(key, variable.replace(weights[name]) if name in weights else variable)
                                for name, (key, variable) in variables.items()])
