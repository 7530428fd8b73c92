"""A core in its environment: returns of its policy, and how well its world model foresees what the policy does.

    one step     x_(t+1) from the true x_t and a_t
    open loop    from a start on, nothing of the environment is seen: the policy acts on what the world model predicted, the world model
                 predicts from that and the policy's own action, both going on from the states that they have at the start
    persistence  x_(t+h) = x_t

Errors are root mean squares over starts and observation entries, in standard deviations of the training data. The policy is noise-free, and
here is not told rewards, in the environment or out of it. Letters: B environments, H horizon, O observation width, A action width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conf.control_schema import ControlEvaluationConfig
from conf.models import WaveCoreConfig
from experiments.control.dataset import Statistics
from experiments.control.environments import Environment
from experiments.control.rollouts import Episodes, one_hot

EVALUATION_SEED, FORECAST_SEED = 0, 10_000  # the first of each; the seeds of recorded episodes begin at `dataset.FIRST_SEED`
STATES = {"s": "fast_state", "w": "wave_state", "p": "particle_state"}


def saturated(states: Mapping[str, np.ndarray], config: WaveCoreConfig) -> dict[str, float]:
    """Share of the entries of each state that sit at the limit; 0 where there is none."""
    limit = config.state_saturation_limit or math.inf
    return {name: float((np.abs(value) >= limit).mean()) for name, value in states.items()}


class CorePolicy:
    """A core as a policy: normalises what it is given, carries its state, and keeps what it thought of the first environment if asked."""

    def __init__(self, model: Any, statistics: Statistics, *, record: bool = False) -> None:
        """`model`: what `runtime.build("wavecore", ...)` made, on any backend."""
        self._model, self._statistics, self._record = model, statistics, record
        self._dtype = np.dtype(model.dtype)
        self._state: Any = None
        self.saturated: list[dict[str, float]] = []  # per step, by state: share of entries at the limit
        self.thoughts: list[dict[str, Any]] = []  # per step, of environment 0: s, w, p, attention by level, value

    def start(self, seeds: Sequence[int]) -> None:
        """Zero state for every environment."""
        self._state, self.saturated, self.thoughts = self._model.init_state(len(seeds)), [], []

    def act(self, observations: np.ndarray, previous_actions: np.ndarray, rewards: np.ndarray) -> np.ndarray:
        """(B, O), (B, A), (B, 1) in the environment's units -> actions, or logits, (B, A)."""
        inputs = self._statistics.observations(observations), previous_actions, self._statistics.rewards(rewards)
        y, self._state, info = self._model.step(self._state, *(np.asarray(part, dtype=self._dtype) for part in inputs))
        states = {name: np.asarray(info[key]) for name, key in STATES.items()}
        self.saturated.append(saturated(states, self._model.config))
        if self._record:
            attention = [np.asarray(level)[0] for level in info["attention_weights"]]
            self.thoughts.append({name: value[0] for name, value in states.items()} | {"attention": attention, "value": float(info["value"][0, 0])})
        return np.asarray(y)

    def saturation(self, step: int) -> dict[str, float]:
        """Share of the entries of s, w and p at the limit after `step` steps, or after the last one; over all environments."""
        return self.saturated[min(step, len(self.saturated)) - 1]


@dataclass(frozen=True)
class Forecast:
    """Errors by horizon (H,) of the open loop and of persistence, and of one step along the true path; `starts` that were counted at each (H,)."""

    model: np.ndarray
    persistence: np.ndarray
    one_step: float
    one_step_persistence: float
    starts: np.ndarray = field(repr=False)

    @property
    def figures(self) -> dict[str, float]:
        """Means over the horizons, and the ratio of model to persistence."""
        model, persistence = float(self.model.mean()), float(self.persistence.mean())
        return {
            "one_step": self.one_step, "one_step_persistence": self.one_step_persistence, "open_loop": model, "open_loop_persistence": persistence,
            "ratio": model / persistence,
        }


class _Streams:
    """Policy and world model of one core, each with its own state, on normalised observations; no reward is known."""

    def __init__(self, model: Any, rows: int, discrete: bool) -> None:
        self._step, self._discrete, self._dtype = model.step, discrete, np.dtype(model.dtype)
        self._policy, self._world = model.init_state(rows), model.init_state(rows)
        self.action = np.zeros((rows, model.config.action_dim), dtype=self._dtype)
        self._reward = np.zeros((rows, 1), dtype=self._dtype)

    def copy(self) -> _Streams:
        """Both streams as they are now; states are never written in place."""
        return copy.copy(self)

    def advance(self, observation: np.ndarray) -> np.ndarray:
        """The policy acts on (B, O), the world model says what follows (B, O)."""
        observation = observation.astype(self._dtype)
        y, self._policy, _ = self._step(self._policy, observation, self.action, self._reward)
        y = np.asarray(y)
        self.action = (one_hot(y.argmax(-1), y.shape[1]) if self._discrete else y).astype(self._dtype)
        _, self._world, info = self._step(self._world, observation, self.action, self._reward)
        return np.asarray(info["next_obs"])


def forecast(
    model: Any, statistics: Statistics, environments: Sequence[Environment], seeds: Sequence[int], settings: ControlEvaluationConfig
) -> Forecast:
    """Forecasts from one start in each environment, after `warm_up` steps of the episode of its seed.

    A start counts for the horizons that its episode reaches; where none reaches a horizon, its error and all means over horizons are NaN.
    """
    true = _Streams(model, len(environments), environments[0].discrete)
    raw = np.stack([environment.reset(int(seed)) for environment, seed in zip(environments, seeds, strict=True)])
    going = np.ones(len(environments), dtype=bool)
    path, alive, said = [statistics.observations(raw)], [], []
    imagined: _Streams | None = None
    for t in range(settings.warm_up + settings.horizon):
        if t == settings.warm_up:
            imagined = true.copy()
        said.append(true.advance(path[-1]))
        raw = raw.copy()
        for lane in np.flatnonzero(going):
            raw[lane], _, ended, cut = environments[lane].step(true.action[lane])
            going[lane] = not (ended or cut)
        path.append(statistics.observations(raw))
        alive.append(going.copy())
    assert imagined is not None
    start, seen, here = path[settings.warm_up], [], path[settings.warm_up]
    for _ in range(settings.horizon):
        here = imagined.advance(here)
        seen.append(here)
    truth, told = np.stack(path[settings.warm_up + 1 :]), np.stack(said[settings.warm_up :])
    # an observation counts where the episode had not ended before it: the last one of an episode is still true
    kept = np.concatenate([np.ones_like(alive[:1]), alive[:-1]])[settings.warm_up :]  # (H, B)
    before = np.stack(path[settings.warm_up : -1])
    return Forecast(
        _rms(np.stack(seen) - truth, kept, 1), _rms(start - truth, kept, 1), float(_rms(told - truth, kept)), float(_rms(before - truth, kept)),
        kept.sum(1),
    )


def _rms(error: np.ndarray, kept: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Of (H, B, O) where (H, B) is set: (H,) for axis 1, of all together for None; NaN where nothing is."""
    count = kept.sum(axis)
    return np.sqrt((np.square(error).mean(-1) * kept).sum(axis) / np.where(count > 0, count, np.nan))


def back_to_back(episodes: Episodes, statistics: Statistics, first: int, steps: int, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a core saw in successive episodes, as one rollout of `steps` steps from the beginning of episode `first`.

    x (steps, O), a (steps, A), r (steps, 1); after the last episode the first follows.
    """
    rows = (episodes.offsets[first] + np.arange(steps)) % episodes.steps
    parts = statistics.observations(episodes.observations), episodes.previous_actions, statistics.rewards(episodes.rewards)
    x, a, r = (part[rows].astype(dtype) for part in parts)
    return x, a, r
