"""Largest Lyapunov exponents of a trained core, along what it does in its environment."""

from __future__ import annotations

from typing import Any

import numpy as np

import runtime
from conf.control_schema import ControlConfig
from experiments.control.dataset import Statistics
from experiments.control.environments import open_environment
from experiments.control.evaluation import EVALUATION_SEED, CorePolicy, back_to_back
from experiments.control.rollouts import Episodes, run_episodes

LANES = 4  # rollouts of successive episodes that are looked at together


def exponents(model: Any, statistics: Statistics, episodes: Episodes, config: ControlConfig) -> dict[str, float]:
    """Largest exponents in nats per step along the policy's own rollouts.

    "lyapunov/episodes": over its episodes back to back, the core going on from each into the next; the largest of several such rollouts that
    begin at different episodes. "lyapunov/held": along one episode without its limit of steps, where the environment lets it go on.
    """
    settings = config.evaluation
    steps = settings.burn_in + settings.lyapunov_steps
    starts = np.arange(LANES) * len(episodes) // LANES
    lanes = [back_to_back(episodes, statistics, int(start), steps, config.backend.dtype) for start in starts]
    found = {"lyapunov/episodes": float(exponent(model, tuple(np.stack(part, 1) for part in zip(*lanes, strict=True)), settings.burn_in).max())}
    environment = open_environment(config.environment.name, max_steps=steps)
    held = run_episodes([environment], CorePolicy(model, statistics), [EVALUATION_SEED])
    environment.close()
    if held.steps == steps:
        rollout = back_to_back(held, statistics, 0, steps, config.backend.dtype)
        found["lyapunov/held"] = float(exponent(model, tuple(part[:, None] for part in rollout), settings.burn_in).max())
    return found


def exponent(model: Any, inputs: tuple[np.ndarray, ...], burn_in: int) -> np.ndarray:
    """Exponent (B,) of every row of inputs x (T, B, O), a (T, B, A), r (T, B, 1), from the zero state on the model's own framework."""
    rows = inputs[0].shape[1]
    if model.backend == "jax":
        import jax
        import jax.numpy as jnp

        from jax_impl.stability import lyapunov_exponent

        with jax.enable_x64(model.dtype == "float64"):
            arrays = tuple(map(jnp.asarray, inputs))
            return np.asarray(lyapunov_exponent(model.model, model.variables, model.model.init_state(rows), arrays, burn_in))
    import torch

    from torch_impl.stability import lyapunov_exponent as of_torch

    if model.backend == "torch_compiled":  # whose gradients are first-order, and an exponent differentiates one
        model = runtime.build("wavecore", model.config, "torch", model.arrays(), model.dtype)
    return of_torch(model.module, model.module.init_state(rows), tuple(map(torch.from_numpy, inputs)), burn_in).numpy()
