"""Ways to move what has stopped moving, for parameters that a monitor found dying. Each is off unless `recovery.unfreeze.method` names it.

    soft_reset          noise of 1 % of its spread on every carried state and on the parameters of the states and the memory
    selective_reinit    the dying parameters get their initial values, and moments of zero
    gradient_injection  for some steps, noise is added to the gradient of the dying parameters

Noise depends on seed, step and name alone, so a run that goes on from a checkpoint draws the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping

import numpy as np

from experiments.steps.base import TrainStep
from runtime.init import init_arrays

SOFT = ("state", "memory")  # parts of a parameter's name
_BANK = ("memory_keys", "memory_values")  # a running mean of what was read: noise there would be remembered text that never was


def noise(name: str, shape: tuple[int, ...], seed: int, step: int) -> np.ndarray:
    """Standard normal numbers of a name, a seed and a step."""
    return np.random.default_rng([seed, step, zlib.crc32(name.encode())]).standard_normal(shape)


def softened(arrays: Mapping[str, np.ndarray], share: float, seed: int, step: int) -> dict[str, np.ndarray]:
    """`arrays` with noise of `share` of each one's standard deviation."""
    return {
        name: (value + share * float(np.std(value)) * noise(name, value.shape, seed, step)).astype(value.dtype) for name, value in arrays.items()
    }


def soft_reset(step: TrainStep, number: int, share: float) -> list[str]:
    """Shake carried states and the parameters with "state" or "memory" in their names; the names of those parameters."""
    arrays, seed = step.arrays(), step.config.seed
    chosen = {
        name: value for name, value in arrays.items() if value.dtype.kind == "f" and any(part in name for part in SOFT) and not name.endswith(_BANK)
    }
    step.load_arrays(arrays | softened(chosen, share, seed, number))
    step.load_carried(softened(step.carried(), share, seed, number))
    return sorted(chosen)


def selective_reinit(step: TrainStep, names: Iterable[str]) -> list[str]:
    """Give the parameters `names` their initial values and moments of zero; the names."""
    names, config = sorted(names), step.config
    initial = init_arrays(config.architecture, step.model.config, config.seed)
    step.load_arrays(step.arrays() | {name: initial[name] for name in names} | _ties(step, initial, names))
    moments = step.optimiser_arrays()
    if moments:
        zeroed = {f"{label}.{name}" for label in ("first", "second") for name in names}
        step.load_optimiser({name: np.zeros_like(value) if name in zeroed else value for name, value in moments.items()}, step.steps_done)
    return names


def _ties(step: TrainStep, initial: Mapping[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
    tied = "embedding.weight" in names and "lm_head.weight" in step.arrays()
    return {"lm_head.weight": initial["embedding.weight"]} if tied else {}


def gradient_injection(gradients: Mapping[str, np.ndarray], names: Iterable[str], spread: float, seed: int, step: int) -> dict[str, np.ndarray]:
    """Noise of standard deviation `spread` to add to the gradients of `names`."""
    return {name: (spread * noise(name, gradients[name].shape, seed, step)).astype(gradients[name].dtype) for name in names if name in gradients}
