"""The training step in JAX: two jitted functions, gradient and update. Letters as in `experiments.steps.base`.

The optimiser works on flat dicts, torch name -> leaf in Flax's layout, so that groups, moments and gradients go by the same names as
in torch. Every call runs inside `enable_x64` when the model is float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from conf.schema import LossConfig, TrainConfig
from experiments.distributed.group import ALONE, Group
from experiments.steps.base import IGNORED, Gradients, States, Totals, TrainStep
from experiments.steps.groups import GROUPS, group_of
from experiments.steps.jax_forward import options, training
from jax_impl.weights import flatten, torch_name

Flat = dict[str, Any]


def norm(x: Array) -> Array:
    """Euclidean norm along the last axis, with gradient zero where the norm is zero."""
    square = (x * x).sum(-1)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def _nats(logits: Array, labels: Array) -> Array:
    """Cross-entropy (B, L) of each label, zero where it is ignored."""
    kept = labels != IGNORED
    target = jnp.where(kept, labels, 0)
    return -jnp.where(kept, jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], axis=-1)[..., 0], 0.0)


def loss_parts(logits: Array, labels: Array, states: States, config: LossConfig, totals: Totals | None = None) -> dict[str, Array]:
    """The loss and its weighted parts, or a group's share of them. logits (B, L, V), labels (B, L), states as the model returns them."""
    cross_entropy = _nats(logits, labels).sum() / (jnp.maximum((labels != IGNORED).sum(), 1) if totals is None else totals.tokens)
    penalty = jnp.zeros((), logits.dtype)
    norms = [norm(state[kind]).mean() for state in states for kind in config.state_penalty if config.state_weight]
    for place, mean in enumerate(norms):
        if totals is None:
            penalty = penalty + (mean - config.state_norm) ** 2
        else:
            beyond = totals.norms[place] - config.state_norm
            penalty = penalty + totals.share * (beyond**2 + 2 * beyond * (mean - totals.norms[place]))
    penalty = config.state_weight * penalty
    smoothness = config.smooth_weight * norm(logits[:, 1:] - logits[:, :-1]).mean() if config.smooth_weight else jnp.zeros((), logits.dtype)
    smoothness = smoothness if totals is None else totals.share * smoothness
    return {"loss": cross_entropy + penalty + smoothness, "cross_entropy": cross_entropy, "state_penalty": penalty, "smoothness": smoothness}


class Functions:
    """The pure functions of a step, jitted once for a configuration: steps of a sweep over seeds share what XLA compiled."""

    _made: ClassVar[dict[str, Functions]] = {}

    @classmethod
    def of(cls, function: Any, params: Any, config: TrainConfig, mesh: Any = None) -> Functions:
        """The functions for a model's functional face, its parameters' structure and the parts of the configuration that are compiled in.

        With a mesh, gradients and parameters are on all of its devices and states divided among them.
        """
        how = (config.training.remat, config.training.precision)
        key = repr((mesh and mesh.describe(), function.config, config.backend.name, config.backend.dtype, config.loss, config.optimiser, how))
        if key not in cls._made:
            cls._made[key] = cls(function, params, config, mesh)
        return cls._made[key]

    def __init__(self, function: Any, params: Any, config: TrainConfig, mesh: Any) -> None:
        self.function, self.config = function, config
        self.paths = {torch_name(path): path for path in flatten(params)}
        settings = config.optimiser
        adamw = optax.inject_hyperparams(optax.adamw, static_args=("b1", "b2", "eps", "weight_decay"))
        self.transform = optax.partition(
            {
                group: adamw(
                    learning_rate=0.0, b1=settings.beta1, b2=settings.beta2, eps=settings.eps, weight_decay=getattr(settings, group).weight_decay
                )
                for group in GROUPS
            },
            {name: group_of(name) for name in self.paths},
        )
        everywhere, divided = ({"out_shardings": mesh.everywhere}, mesh.rows) if mesh else ({}, None)
        placed = {"out_shardings": (mesh.everywhere, mesh.everywhere, mesh.rows, None)} if mesh else {}
        self.gradient = jax.jit(self._gradient, compiler_options=options(config.training), **placed)
        self.update = jax.jit(self._update, **everywhere)
        self.norm = jax.jit(self._norm, **everywhere)
        self.finite = jax.jit(self._finite, **everywhere)
        self.rows = jax.jit(self._rows, out_shardings=divided)
        self.joined = jax.jit(self._joined, out_shardings=divided)
        self.update_memory = jax.jit(function.update_memory, **everywhere) if hasattr(function, "update_memory") else None
        self.evaluation = jax.jit(self._evaluation)

    def flat(self, params: Any) -> Flat:
        return {torch_name(path): leaf for path, leaf in flatten(params).items()}

    def nested(self, flat: Flat) -> Any:
        tree: dict[Any, Any] = {}
        for name, path in self.paths.items():
            here = tree
            for part in path[:-1]:
                here = here.setdefault(part, {})
            here[path[-1]] = flat[name]
        return tree

    def _gradient(
        self, variables: Any, ids: Array, labels: Array, states: States, totals: dict[str, Array] | None
    ) -> tuple[Flat, dict[str, Array], States, dict[str, Any]]:
        def loss(params: Any) -> tuple[Array, Any]:
            module = training(self.function.merge({**variables, "params": params}), self.config.training)
            logits, after, aux = module(ids, states, return_aux=True)
            parts = loss_parts(logits, labels, after, self.config.loss, None if totals is None else Totals(**totals))
            return parts["loss"], (parts, after, aux)

        gradient, (parts, after, aux) = jax.grad(loss, has_aux=True)(variables["params"])
        return self.flat(gradient), parts, after, aux

    @staticmethod
    def _norm(gradient: Flat) -> Array:
        return jnp.sqrt(sum((leaf * leaf).sum() for leaf in gradient.values()))

    @staticmethod
    def _finite(states: States) -> Array:
        return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(states)]).all()

    @staticmethod
    def _rows(states: States, rows: Array) -> States:
        return jax.tree.map(lambda leaf: leaf[rows], states)

    @staticmethod
    def _joined(groups: tuple[States, ...]) -> States:
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *groups)

    def _update(self, params: Any, optimiser: Any, gradient: Flat, rates: dict[str, Array]) -> tuple[Any, Any, Array]:
        total = self._norm(gradient)
        factor = jnp.minimum(1.0, self.config.optimiser.clip_norm / (total + 1e-6))  # torch's formula
        inner = {}
        for group, masked in optimiser.inner_states.items():
            injected = masked.inner_state
            injected = injected._replace(hyperparams={**injected.hyperparams, "learning_rate": rates[group]})
            inner[group] = masked._replace(inner_state=injected)
        flat = self.flat(params)
        updates, optimiser = self.transform.update(jax.tree.map(lambda leaf: leaf * factor, gradient), optimiser._replace(inner_states=inner), flat)
        return self.nested(optax.apply_updates(flat, updates)), optimiser, total

    def _evaluation(self, variables: Any, ids: Array, labels: Array, states: States) -> tuple[Array, States, dict[str, Any]]:
        logits, after, aux = self.function.apply(variables, ids, states, return_aux=True)
        return _nats(logits, labels), after, aux


class JaxStep(TrainStep):
    """AdamW over the groups of `GROUPS`; leaves frozen by the configuration are buffers and in none of them."""

    def __init__(self, model: Any, config: TrainConfig, group: Group = ALONE) -> None:
        super().__init__(model, config, group)
        self._mesh: Any = None if group.name == "none" else group
        self._functions = Functions.of(model.model, model.variables["params"], config, self._mesh)
        self._evaluation = Functions.of(model.model, model.variables["params"], config).evaluation  # of every process by itself
        self._grads: Flat | None = None
        with self._precision():
            self._optimiser = self._put(self._functions.transform.init(self._functions.flat(model.variables["params"])))
            self._hold(model.variables)

    def _precision(self) -> Any:
        return jax.enable_x64(self.config.backend.dtype == "float64")

    def zero_states(self, batch_size: int) -> States:
        with self._precision():
            return self.model.model.init_states(batch_size)

    def evaluate(self, ids: np.ndarray, labels: np.ndarray, states: States | None) -> tuple[float, States]:
        nats, after, _ = self._evaluated(ids, labels, states)
        return nats, after

    def observe(self, ids: np.ndarray, labels: np.ndarray, states: States | None) -> tuple[float, States, dict[str, Any]]:
        nats, after, aux = self._evaluated(ids, labels, states)
        return nats, after, {"states": self._numpy(after), "ssm_states": self._numpy(aux.get("ssm_states", []))}

    def _evaluated(self, ids: np.ndarray, labels: np.ndarray, states: States | None) -> tuple[float, States, dict[str, Any]]:
        states = self.zero_states(len(ids)) if states is None else states
        with self._precision():
            each, after, aux = self._evaluation(self.model.variables, ids, labels, states)
        return float(np.asarray(each, dtype=np.float64).sum()), after, aux

    def optimiser_arrays(self) -> dict[str, np.ndarray]:
        arrays = {}
        for masked in self._optimiser.inner_states.values():
            moments = _moments(masked.inner_state.inner_state)
            for label, tree in (("first", moments.mu), ("second", moments.nu)):
                arrays |= {f"{label}.{name}": self._torch_layout(name, leaf) for name, leaf in tree.items() if not isinstance(leaf, optax.MaskedNode)}
        return arrays

    def load_optimiser(self, arrays: Mapping[str, np.ndarray], steps: int) -> None:
        self.steps_done = steps
        inner = {}
        with self._precision():
            for group, masked in self._optimiser.inner_states.items():
                held = masked.inner_state.inner_state
                moments = _moments(held)
                count = jnp.asarray(steps, moments.count.dtype)
                loaded = moments._replace(count=count, mu=self._load(moments.mu, "first", arrays), nu=self._load(moments.nu, "second", arrays))
                chain = tuple(loaded if part is moments else part for part in held)
                inner[group] = masked._replace(inner_state=masked.inner_state._replace(count=count, inner_state=chain))
            self._optimiser = self._put(self._optimiser._replace(inner_states=inner))

    def _load(self, tree: Flat, label: str, arrays: Mapping[str, np.ndarray]) -> Flat:
        return {
            name: leaf if isinstance(leaf, optax.MaskedNode) else jnp.array(self._torch_layout(name, arrays[f"{label}.{name}"]), leaf.dtype)
            for name, leaf in tree.items()
        }

    def _torch_layout(self, name: str, leaf: Any) -> np.ndarray:
        """A leaf in torch's layout, or back: the transpose is its own inverse."""
        value = np.asarray(leaf)
        return np.array(value.T if self._functions.paths[name][-1] == "kernel" else value, order="C")

    def _accumulate(self, ids: np.ndarray, labels: np.ndarray, states: States) -> tuple[dict[str, Any], States, dict[str, Any]]:
        with self._precision():
            known, dtype = self._totals, self.config.backend.dtype
            totals = None if known is None else self._put({name: jnp.asarray(value, dtype) for name, value in vars(known).items()})
            if self._mesh is not None:
                ids, labels, states = self._mesh.divided((ids, labels, states))
            gradient, parts, after, aux = self._functions.gradient(self._variables, ids, labels, states, totals)
            self._grads = gradient if self._grads is None else jax.tree.map(jnp.add, self._grads, gradient)
        return jax.device_get(parts), after, aux

    def _apply(self, rates: Mapping[str, float]) -> float:
        variables = self._variables
        with self._precision():
            given = self._put({group: jnp.asarray(rates[group], self.config.backend.dtype) for group in GROUPS})
            params, self._optimiser, total = self._functions.update(variables["params"], self._optimiser, self._grads, given)
            self._hold({**variables, "params": params})
        self._grads = None
        return float(total)

    def _gradients(self) -> Gradients:
        return {name: self._torch_layout(name, leaf) for name, leaf in (self._grads or {}).items()}

    def _add(self, gradients: Mapping[str, np.ndarray]) -> None:
        with self._precision():
            for name, value in gradients.items():
                gradient = self._grads[name]
                self._grads[name] = gradient + self._put(jnp.asarray(self._torch_layout(name, value), gradient.dtype))

    def _norm(self) -> float:
        with self._precision():
            return float(self._functions.norm(self._grads))

    def _clean(self) -> dict[str, int]:
        counts = {name: int((~np.isfinite(np.asarray(leaf))).sum()) for name, leaf in self._grads.items()}
        counts = {name: count for name, count in counts.items() if count}
        with self._precision():
            self._grads |= {name: self._put(jnp.zeros(self._grads[name].shape, self._grads[name].dtype)) for name in counts}
        return counts

    def _discard(self) -> None:
        self._grads = None

    def _load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        with self._precision():
            self._hold(self.model.model.variables(dict(arrays)))

    def _update_memory(self, aux: dict[str, Any]) -> None:
        with self._precision():
            self._hold(self._functions.update_memory(self._variables, {"memory_rows": aux["memory_rows"]}))

    def _aux(self, ids: np.ndarray, states: States) -> dict[str, Any]:
        return self._evaluated(ids, ids, states)[2]

    @property
    def _variables(self) -> Any:
        """The model's variables as training holds them: on all devices of the mesh, if there is one."""
        return self.model.variables if self._mesh is None else self._everywhere

    def _hold(self, variables: Any) -> None:
        """Take over variables; with a mesh, `model` has the copies of one device."""
        if self._mesh is not None:
            self._everywhere = self._put(variables)
            variables = self._mesh.own(self._everywhere)
        self.model.variables = variables

    def _put(self, tree: Any) -> Any:
        return tree if self._mesh is None else self._mesh.replicated(tree)

    def _evaluable(self, states: States) -> States:
        return states if self._mesh is None else self._numpy(states)

    def _finite(self, states: States) -> bool:
        if self._mesh is None:
            return super()._finite(states)
        with self._precision():
            return bool(np.asarray(self._functions.finite(states)))

    def _native(self, tree: Any) -> Any:
        with self._precision():
            return jax.tree.map(jnp.asarray, tree)

    def _numpy(self, tree: Any) -> Any:
        if self._mesh is None:
            return jax.tree.map(np.array, tree)
        with self._precision():
            return self._mesh.whole(tree)

    def _rows(self, states: States, rows: np.ndarray) -> States:
        with self._precision():
            return self._functions.rows(self._mesh.divided(states), rows) if self._mesh else jax.tree.map(lambda leaf: leaf[rows], states)

    def _joined(self, groups: tuple[States, ...]) -> States:
        with self._precision():
            return self._functions.joined(groups) if self._mesh else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *groups)


def _moments(chain: tuple[Any, ...]) -> optax.ScaleByAdamState:
    """Adam's own state among the states of `optax.adamw`'s parts."""
    return next(part for part in chain if isinstance(part, optax.ScaleByAdamState))
