"""Training windows from parallel lanes of episodes, the same for every framework and a function of (seed, step) alone.

A lane goes through one episode after another, in an order shuffled anew each time round. Step s gives T rows of each of B lanes; rows go
on where the lane's rows of step s - 1 ended, so that state and memory can be carried, unless the lane begins an episode there
(`fresh`). An episode whose length is no multiple of T fills its last window with rows that the mask leaves out. At step 0 the lanes
stand at different windows of their first episodes, so that a batch shows all phases of an episode. Letters: T steps, B lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.control.dataset import Statistics
from experiments.control.rollouts import Episodes
from experiments.errors import RunError


@dataclass(frozen=True)
class Window:
    """T steps of B lanes, time first, float32; observations, rewards and values normalised.

    observations, next_observations (T, B, O); previous_actions, targets, actions (T, B, A); rewards, values (T, B, 1); mask (T, B), 1 for
    the rows that count; fresh (B,) bool, where the carried state must be replaced by that of a start; episode, time (B,) int64, place
    of the first row.
    """

    observations: np.ndarray
    previous_actions: np.ndarray
    rewards: np.ndarray
    targets: np.ndarray
    actions: np.ndarray
    values: np.ndarray
    next_observations: np.ndarray
    mask: np.ndarray
    fresh: np.ndarray
    episode: np.ndarray
    time: np.ndarray


class Rows:
    """Normalised rows of episodes, from which windows are cut."""

    def __init__(self, episodes: Episodes, statistics: Statistics, discount: float) -> None:
        """`discount` of the values, in [0, 1); they are scaled by 1 - discount and the RMS of rewards, so that they are of order 1."""
        if not 0 <= discount < 1:
            raise RunError(f"discount must be in [0, 1), found {discount}")
        self.episodes = episodes
        self._columns = {
            "observations": statistics.observations(episodes.observations),
            "previous_actions": episodes.previous_actions,
            "rewards": statistics.rewards(episodes.rewards),
            "targets": episodes.targets,
            "actions": episodes.actions,
            "values": statistics.rewards(episodes.values(discount) * (1 - discount)),
            "next_observations": statistics.observations(episodes.next_observations),
        }

    def window(self, episode: Sequence[int] | np.ndarray, time: Sequence[int] | np.ndarray, steps: int, fresh: np.ndarray | None = None) -> Window:
        """`steps` rows of each chosen episode from row `time` on; those past its end repeat its last row and are masked out.

        `fresh`: where `time` is 0 if not given.
        """
        chosen, begin = np.asarray(episode, dtype=np.int64), np.asarray(time, dtype=np.int64)
        at = self.episodes.offsets[chosen] + begin + np.arange(steps)[:, None]  # (T, B)
        end = self.episodes.offsets[chosen + 1]
        rows = np.minimum(at, end - 1)
        return Window(
            **{name: column[rows] for name, column in self._columns.items()}, mask=(at < end).astype(np.float32),
            fresh=begin == 0 if fresh is None else fresh, episode=chosen, time=begin,
        )

    def whole(self, chosen: Sequence[int] | np.ndarray) -> Window:
        """Whole episodes, as many steps as the longest of them has."""
        return self.window(chosen, np.zeros(len(chosen), dtype=np.int64), int(self.episodes.lengths[np.asarray(chosen)].max()))


class Windows:
    """Training windows by step number."""

    def __init__(self, rows: Rows, batch_size: int, context: int, seed: int) -> None:
        """B = `batch_size`, T = `context`. Raises RunError where there are fewer episodes than lanes."""
        self.rows, self.batch_size, self.context, self.seed = rows, batch_size, context, seed
        if min(batch_size, context) < 1:
            raise RunError(f"batch_size and context must be at least 1, found {batch_size} and {context}")
        if len(rows.episodes) < batch_size:
            raise RunError(f"batch_size={batch_size} lanes need at least as many episodes, found {len(rows.episodes)}")
        self._counts = -(-rows.episodes.lengths // context)  # windows of each episode
        self.steps_per_epoch = max(1, int(self._counts.sum()) // batch_size)
        self._queue: list[int] = []
        self._round = 0
        self._plan: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def batch(self, step: int) -> Window:
        """The batch of step 0, 1, ..."""
        while len(self._plan) <= step:
            self._plan.append(self._next())
        episode, window, fresh = self._plan[step]
        return self.rows.window(episode, window * self.context, self.context, fresh)

    def _next(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if not self._plan:
            episode = np.array([self._draw() for _ in range(self.batch_size)])
            window = np.arange(self.batch_size) * self._counts[episode] // self.batch_size
            return episode, window, np.ones(self.batch_size, dtype=bool)
        episode, window = self._plan[-1][0].copy(), self._plan[-1][1] + 1
        fresh = window >= self._counts[episode]
        for lane in np.flatnonzero(fresh):
            episode[lane], window[lane] = self._draw(), 0
        return episode, window, fresh

    def _draw(self) -> int:
        if not self._queue:
            self._queue = np.random.default_rng([self.seed, 2, self._round]).permutation(len(self.rows.episodes)).tolist()
            self._round += 1
        return self._queue.pop()
