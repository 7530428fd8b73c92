"""The two streams of a training batch, from a window of episodes: see `experiments.control.steps`.

What is drawn is a function of (seed, step) or (seed, episode) alone, so that frameworks, and a run that begins in the middle, see the same.
"""

from __future__ import annotations

import numpy as np

from conf.control_schema import ControlConfig
from experiments.control.steps import Batch
from experiments.control.windows import Window


def batch(window: Window, config: ControlConfig, step: int | None = None) -> Batch:
    """Policy rows and world-model rows of a window; with the noise of training step `step`, or without any.

    In a share `known_reward` of the episodes the policy rows are told the reward; 0 stands for one that is not known. The noise is on what
    the world-model rows see, not on what they have to predict: they learn to go on from their own, slightly wrong, predictions.
    """
    settings, dtype = config.training, np.dtype(config.backend.dtype)
    known = np.array([np.random.default_rng([config.seed, 3, episode]).random() < settings.known_reward for episode in window.episode])
    seen = window.observations
    if step is not None and settings.observation_noise:
        rng = np.random.default_rng([config.seed, 4, step])
        seen = seen + settings.observation_noise * rng.random((seen.shape[1], 1)) * rng.standard_normal(seen.shape)
    return Batch(
        observation=_both(window.observations, seen, dtype),
        previous_action=_both(window.previous_actions, window.actions, dtype),
        reward=_both(np.where(known[:, None], window.rewards, 0.0), np.zeros_like(window.rewards), dtype),
        action=window.targets.astype(dtype), value=window.values.astype(dtype), following=window.next_observations.astype(dtype),
        mask=window.mask.astype(dtype), fresh=np.concatenate([window.fresh, window.fresh]),
    )


def _both(policy: np.ndarray, world_model: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return np.concatenate([policy, world_model], axis=1).astype(dtype)
