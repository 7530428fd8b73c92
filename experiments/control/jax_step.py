"""The control step in JAX: one jitted function from gradient to update. Letters as in `experiments.control.steps`."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from conf.control_schema import ControlConfig, ControlLossConfig, ControlOptimiserConfig
from conf.models import SizedWaveCoreConfig
from experiments.control.steps import Batch, ControlStep
from jax_impl.functional import WaveCoreModel
from jax_impl.state import CoreState


def loss_parts(y: Array, info: dict[str, Any], batch: dict[str, Array], config: ControlLossConfig, discrete: bool) -> dict[str, Array]:
    """The loss and its parts from a rollout of both streams: y (T, 2B, A), info as the core returns it."""
    mask, rows = batch["mask"], batch["mask"].shape[1]
    kept = mask.sum()
    chosen, wanted = y[:, :rows], batch["action"]
    action = -(wanted * jax.nn.log_softmax(chosen, -1)).sum(-1) if discrete else jnp.square(chosen - wanted).mean(-1)
    excess = [jnp.square(jax.nn.relu(jnp.abs(info[name]) - config.bound)).mean() for name in ("fast_state", "wave_state", "particle_state")]
    parts = {
        "action": (mask * action).sum() / kept,
        "value": (mask * jnp.square(info["value"][:, :rows] - batch["value"])[..., 0]).sum() / kept,
        "world_model": (mask * jnp.square(info["next_obs"][:, rows:] - batch["following"]).mean(-1)).sum() / kept,
        "states": sum(excess[1:], start=excess[0]),
    }
    return {"loss": sum((getattr(config, name) * part for name, part in parts.items()), start=jnp.zeros_like(kept)), **parts}


@lru_cache(maxsize=8)
def _compiled(config: SizedWaveCoreConfig, dtype: str, loss: ControlLossConfig, optimiser: ControlOptimiserConfig) -> tuple[Callable[..., Any], ...]:
    """Initial optimiser state, update and evaluation; shared by all runs of a sweep over seeds."""
    model = WaveCoreModel(config, config.obs_dim, config.action_dim, config.output_dim, dtype=dtype)
    transform = optax.chain(
        optax.scale_by_adam(optimiser.beta1, optimiser.beta2, optimiser.eps), optax.add_decayed_weights(optimiser.weight_decay))

    def forward(params: Any, state: CoreState, batch: dict[str, Array]) -> tuple[Array, Any]:
        y, after, info = model.rollout({"params": params}, state, batch["observation"], batch["previous_action"], batch["reward"])
        parts = loss_parts(y, info, batch, loss, config.output_type == "discrete")
        return parts["loss"], (parts, after)

    def update(params: Any, held: Any, state: CoreState, batch: dict[str, Array], rate: Array) -> tuple[Any, ...]:
        gradient, (parts, after) = jax.grad(forward, has_aux=True)(params, state, batch)
        norm = jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(gradient)))
        factor = jnp.minimum(1.0, config.gradient_clip / (norm + 1e-6))  # torch's formula
        steps, held = transform.update(jax.tree.map(lambda leaf: factor * leaf, gradient), held, params)
        return jax.tree.map(lambda leaf, step: leaf - rate * step, params, steps), held, parts | {"gradient_norm": norm}, after

    return transform.init, jax.jit(update, donate_argnums=(1, 2)), jax.jit(forward)


class JaxControlStep(ControlStep):
    """AdamW on all parameters."""

    def __init__(self, model: Any, config: ControlConfig) -> None:
        super().__init__(model, config)
        with self._precision():
            start, self._update, self._forward = _compiled(model.config, config.backend.dtype, config.loss, config.optimiser)
            self._held = start(model.variables["params"])

    def _precision(self) -> Any:
        return jax.enable_x64(self.config.backend.dtype == "float64")

    def carried_states(self) -> dict[str, np.ndarray]:
        return {name: np.asarray(getattr(self.carried, name)) for name in ("s", "w", "p")}

    def _begin(self, carried: CoreState | None, fresh: np.ndarray) -> CoreState:
        with self._precision():
            if carried is None:
                return self.model.model.init_state(len(fresh))
            rows = jax.tree.map(
                lambda leaf: jnp.where(fresh.reshape(-1, *[1] * (leaf.ndim - 1)), jnp.zeros_like(leaf), leaf), tuple(carried[:-1]))
            return CoreState(*rows, carried.scales)

    def _step(self, batch: Batch, state: CoreState, rate: float) -> tuple[dict[str, float], CoreState]:
        with self._precision():
            arrays = {name: jnp.asarray(value) for name, value in vars(batch).items()}
            params, self._held, parts, after = self._update(self.model.variables["params"], self._held, state, arrays, rate)
            self.model.variables = {"params": params}
        return {name: float(part) for name, part in parts.items()}, after

    def _evaluate(self, batch: Batch, state: CoreState) -> tuple[dict[str, float], CoreState]:
        with self._precision():
            arrays = {name: jnp.asarray(value) for name, value in vars(batch).items()}
            _, (parts, after) = self._forward(self.model.variables["params"], state, arrays)
        return {name: float(part) for name, part in parts.items()}, after
