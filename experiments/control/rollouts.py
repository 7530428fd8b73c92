"""Episodes of a policy in environments that are stepped together, and their record.

Row t of an episode holds what the model reads and what follows from it:

    observations[t], previous_actions[t] = actions[t - 1], rewards[t] = outcomes[t - 1]    (both 0 at the start of an episode)
    targets[t]    what a labelling expert would do there, or actions[t] where there is none
    actions[t]    what was done; it led to outcomes[t], the reward, and next_observations[t]

Letters: B environments, N rows of all episodes, E episodes, O observation width, A action width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from experiments.control.environments import Environment
from experiments.control.experts import Expert
from experiments.errors import RunError


class Policy(Protocol):
    """Acts in B environments at once; carries its own state from step to step."""

    def start(self, seeds: Sequence[int]) -> None:
        """Begin B episodes anew; the seeds are those that the environments were reset with."""

    def act(self, observations: np.ndarray, previous_actions: np.ndarray, rewards: np.ndarray) -> np.ndarray:
        """(B, O), (B, A), (B, 1) -> actions (B, A): in [-1, 1], or one-hot or logits where they are discrete.

        The rows of an episode that has ended stay what they were at its end; the actions for them are ignored.
        """


@dataclass(frozen=True)
class Episodes:
    """Rows of E episodes, one after another; float32 but for the last four, which are by episode.

    observations, next_observations (N, O); previous_actions, targets, actions (N, A); rewards, outcomes (N, 1); offsets (E + 1,) int64, first
    row of each episode and N; seeds (E,) int64; terminated (E,) bool, False where the limit of steps ended it.
    """

    observations: np.ndarray
    previous_actions: np.ndarray
    rewards: np.ndarray
    targets: np.ndarray
    actions: np.ndarray
    outcomes: np.ndarray
    next_observations: np.ndarray
    offsets: np.ndarray
    seeds: np.ndarray
    terminated: np.ndarray

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.seeds)

    @property
    def steps(self) -> int:
        """Number of rows."""
        return int(self.offsets[-1])

    @property
    def lengths(self) -> np.ndarray:
        """Rows (E,) of every episode."""
        return np.diff(self.offsets)

    @property
    def returns(self) -> np.ndarray:
        """Undiscounted sum of the rewards (E,) float64 of every episode."""
        return np.add.reduceat(self.outcomes[:, 0].astype(np.float64), self.offsets[:-1])

    def rows(self, episode: int) -> slice:
        """Where an episode's rows are."""
        return slice(int(self.offsets[episode]), int(self.offsets[episode + 1]))

    def values(self, discount: float) -> np.ndarray:
        """outcomes[t] + discount * outcomes[t + 1] + ... up to the end of the episode (N, 1) float32."""
        found = np.zeros((self.steps, 1))
        lengths = self.lengths
        last = np.zeros((len(self), 1))
        for back in range(1, int(lengths.max()) + 1):  # from the end of all episodes at once
            at = self.offsets[1:][lengths >= back] - back
            last = self.outcomes[at] + discount * last[lengths[lengths >= back - 1] >= back]
            found[at] = last
        return found.astype(np.float32)


class Scripted:
    """The policy of an expert."""

    def __init__(self, expert: Expert) -> None:
        self._expert = expert

    def start(self, seeds: Sequence[int]) -> None:
        """An expert has no state."""

    def act(self, observations: np.ndarray, previous_actions: np.ndarray, rewards: np.ndarray) -> np.ndarray:
        """What the expert does."""
        return self._expert(observations)


class Random:
    """Uniform actions, a function of (seed, seed of the episode, step)."""

    def __init__(self, environment: Environment, seed: int) -> None:
        self._discrete, self._width, self._seed = environment.discrete, environment.action_dim, seed
        self._generators: list[np.random.Generator] = []

    def start(self, seeds: Sequence[int]) -> None:
        """One generator for each episode."""
        self._generators = [np.random.default_rng([self._seed, 0, seed]) for seed in seeds]

    def act(self, observations: np.ndarray, previous_actions: np.ndarray, rewards: np.ndarray) -> np.ndarray:
        """Uniform in [-1, 1], or over the choices."""
        if self._discrete:
            return one_hot([int(generator.integers(self._width)) for generator in self._generators], self._width)
        return np.stack([generator.uniform(-1, 1, self._width) for generator in self._generators])


def one_hot(indices: Sequence[int] | np.ndarray, width: int) -> np.ndarray:
    """(B, width) float32."""
    return np.eye(width, dtype=np.float32)[np.asarray(indices)]


def run_episodes(
    environments: Sequence[Environment], policy: Policy, seeds: Sequence[int], *, label: Expert | None = None,
    seen: Callable[[int], None] = lambda lane: None,
) -> Episodes:
    """One episode for each seed, in the order of the seeds, as many at a time as there are environments.

    `label` fills `targets`; `seen` hears, before each step, the number of every environment whose episode goes on.
    Raises RunError for actions of a wrong shape or that are not finite.
    """
    if not seeds or not environments:
        raise RunError(f"rollouts need a seed and an environment, found {len(seeds)} and {len(environments)}")
    if len({(environment.name, environment.obs_dim, environment.action_dim) for environment in environments}) > 1:
        raise RunError(f"rollouts need environments of one kind, found {', '.join(sorted({environment.name for environment in environments}))}")
    parts = []
    for first in range(0, len(seeds), len(environments)):
        chosen = [int(seed) for seed in seeds[first : first + len(environments)]]
        parts.append(_together(environments[: len(chosen)], policy, chosen, label, seen))
    return joined(parts)


def joined(parts: Sequence[Episodes]) -> Episodes:
    """All episodes of several records, in order."""
    lengths = np.concatenate([part.lengths for part in parts])
    rows = {name: np.concatenate([getattr(part, name) for part in parts]) for name in (*_ROWS, "seeds", "terminated")}
    return Episodes(**rows, offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


_ROWS = ("observations", "previous_actions", "rewards", "targets", "actions", "outcomes", "next_observations")


def _together(
    environments: Sequence[Environment], policy: Policy, seeds: Sequence[int], label: Expert | None, seen: Callable[[int], None]
) -> Episodes:
    count, width, discrete = len(seeds), environments[0].action_dim, environments[0].discrete
    observations = np.stack([environment.reset(seed) for environment, seed in zip(environments, seeds, strict=True)])
    previous, rewards = np.zeros((count, width), dtype=np.float32), np.zeros((count, 1), dtype=np.float32)
    going, terminated = np.ones(count, dtype=bool), np.zeros(count, dtype=bool)
    records: list[dict[str, np.ndarray]] = []
    alive: list[np.ndarray] = []
    policy.start(seeds)
    while going.any():
        given = np.asarray(policy.act(observations, previous, rewards), dtype=np.float32)
        if given.shape != (count, width):
            raise RunError(f"environment {environments[0].name}: the policy must return actions {(count, width)}, found {given.shape}")
        if not np.isfinite(given[going]).all():
            raise RunError(f"environment {environments[0].name}: the policy's actions of step {len(alive) + 1} are not finite")
        actions = one_hot(given.argmax(-1), width) if discrete else given.clip(-1, 1)
        targets = actions if label is None else np.asarray(label(observations), dtype=np.float32)
        if targets.shape != (count, width):
            raise RunError(f"environment {environments[0].name}: the expert must return actions {(count, width)}, found {targets.shape}")
        record = dict(zip(_ROWS, (observations, previous, rewards, targets, actions), strict=False))
        observations, previous, rewards, now = observations.copy(), previous.copy(), rewards.copy(), going.copy()
        for lane in np.flatnonzero(now):
            seen(int(lane))
            observations[lane], rewards[lane, 0], ended, cut = environments[lane].step(actions[lane])
            previous[lane] = actions[lane]
            going[lane], terminated[lane] = not (ended or cut), ended
        records.append({**record, "outcomes": rewards, "next_observations": observations})
        alive.append(now)
    kept = np.stack(alive, axis=1)  # (B, T)
    rows = {name: np.stack([record[name] for record in records], axis=1)[kept] for name in _ROWS}
    offsets = np.concatenate([[0], np.cumsum(kept.sum(1))]).astype(np.int64)
    return Episodes(**rows, offsets=offsets, seeds=np.array(seeds, dtype=np.int64), terminated=terminated)
