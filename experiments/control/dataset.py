"""Episodes of an expert made to err, labelled with what it would have done, and kept on disk.

    executed[t] = clip(expert(observation[t]) + n[t], -1, 1)     n[t] = rho n[t-1] + sqrt(1 - rho^2) sigma N(0, 1),  sigma one of `noise`
    target[t]   = expert(observation[t])

but for segments of random actions, each held for a few steps. Where actions are discrete, sigma is the chance that a step's action is
drawn at random. The errors show the model how the expert comes back from them, and the world model what actions do.

    CACHE/control-KEY/training.safetensors, validation.safetensors, config.json

KEY is a hash over the environment, the versions it runs on, every option, the expert's source and that of the code that collects.
The folder is written under another name and renamed. Letters: N rows, O observation width, A action width.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from experiments.control.environments import Environment, open_environment
from experiments.control.experts import Expert, expert_for, source_hash
from experiments.control.rollouts import Episodes, one_hot, run_episodes
from experiments.errors import RunError
from runtime.files import read_arrays, read_set, write_arrays, write_set

SEEDS_PER_SIDE = 500_000
FIRST_SEED = 1_000_000  # seeds below are for evaluation: no episode of a dataset begins with one
LANES = 16
SEGMENT, HELD = (5, 21), (1, 6)  # lengths in steps, lower and upper limit (excluded), of a random segment and of one action in it


@dataclass(frozen=True)
class Collection:
    """What decides a dataset. `expert`: None for the scripted one, else "module:function"; `max_steps`: None for the environment's own limit."""

    environment: str = "Pendulum-v1"
    expert: str | None = None
    episodes: int = 200
    validation_episodes: int = 20
    seed: int = 0
    noise: tuple[float, ...] = (0.1, 0.3, 1.0)
    correlation: float = 0.9
    random_share: float = 0.1
    max_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("episodes", "validation_episodes"):
            if not 1 <= getattr(self, name) <= SEEDS_PER_SIDE:
                raise RunError(f"{name} must be in 1 .. {SEEDS_PER_SIDE}, found {getattr(self, name)}")
        if self.seed < 0:
            raise RunError(f"seed must be at least 0, found {self.seed}")
        if not self.noise or not all(0 <= sigma < np.inf for sigma in self.noise):
            raise RunError(f"noise must hold at least one number and none below 0, found {list(self.noise)}")
        if not 0 <= self.correlation < 1:
            raise RunError(f"correlation must be in [0, 1), found {self.correlation}")
        if not 0 <= self.random_share <= 1:
            raise RunError(f"random_share must be in [0, 1], found {self.random_share}")
        if self.max_steps is not None and self.max_steps < 1:
            raise RunError(f"max_steps must be at least 1, found {self.max_steps}")


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation (O,) of observations, RMS of the rewards of steps; float32. One where a column does not vary.

    Rewards are scaled, not shifted, so that the 0 that stands before the first step stays 0.
    """

    observation_mean: np.ndarray
    observation_std: np.ndarray
    reward_rms: np.ndarray

    def observations(self, raw: np.ndarray) -> np.ndarray:
        """(..., O) with mean 0 and deviation 1 over the training rows."""
        return ((raw - self.observation_mean) / self.observation_std).astype(np.float32)

    def raw(self, observations: np.ndarray) -> np.ndarray:
        """The inverse of `observations`."""
        return observations * self.observation_std + self.observation_mean

    def rewards(self, raw: np.ndarray) -> np.ndarray:
        """(..., 1) with RMS 1 over the training rows."""
        return (raw / self.reward_rms).astype(np.float32)


@dataclass(frozen=True)
class Dataset:
    """Episodes of both sides, in the environment's own units, and the statistics of the training side."""

    training: Episodes
    validation: Episodes
    statistics: Statistics
    folder: Path
    collected: bool  # in this call, not read


class _Erring:
    """The expert with noise and random segments: a function of (seed, seed of the episode), whatever runs beside it."""

    def __init__(self, environment: Environment, expert: Expert, options: Collection) -> None:
        self._expert, self._options = expert, options
        self._width, self._discrete, self._steps = environment.action_dim, environment.discrete, environment.max_steps
        self._time = 0

    def start(self, seeds: Sequence[int]) -> None:
        plans = [self._plan(seed) for seed in seeds]
        self._noise, self._random, self._chosen = (np.stack(part, axis=1) for part in zip(*plans, strict=True))
        self._time = 0

    def act(self, observations: np.ndarray, previous_actions: np.ndarray, rewards: np.ndarray) -> np.ndarray:
        clean, t = self._expert(observations), self._time
        self._time += 1
        noisy = clean if self._discrete else np.clip(clean + self._noise[t], -1, 1)
        return np.where(self._random[t, :, None], self._chosen[t], noisy)

    def _plan(self, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Noise (T, A), whether the action is random (T,), and the random action (T, A), of one episode."""
        options, steps, width = self._options, self._steps, self._width
        generator = np.random.default_rng([options.seed, 1, seed])
        sigma = options.noise[seed % len(options.noise)]
        noise = generator.standard_normal((steps, width))
        for t in range(1, steps):
            noise[t] = options.correlation * noise[t - 1] + np.sqrt(1 - options.correlation**2) * noise[t]
        held = generator.integers(*HELD, steps)
        places = np.repeat(np.arange(steps), held)[:steps]
        chosen = one_hot(generator.integers(width, size=steps), width) if self._discrete else generator.uniform(-1, 1, (steps, width))
        random = np.zeros(steps, dtype=bool)
        while random.mean() < options.random_share:
            start = generator.integers(1 - SEGMENT[0], steps)
            random[max(start, 0) : start + generator.integers(*SEGMENT)] = True
        if self._discrete:
            free = generator.random(steps) < sigma
            chosen = np.where(random[:, None], chosen[places], chosen)
            return np.zeros((steps, width)), random | free, chosen
        return sigma * noise, random, chosen[places]


def collect(environments: Sequence[Environment], expert: Expert, options: Collection, seeds: Sequence[int]) -> Episodes:
    """Episodes of the erring expert, one for each seed; `targets` hold the clean actions."""
    return run_episodes(environments, _Erring(environments[0], expert, options), seeds, label=expert)


def episode_seeds(options: Collection) -> tuple[range, range]:
    """Seeds of the training and of the validation episodes: apart from each other, from other `seed`s, and from evaluation's."""
    first = FIRST_SEED + 2 * SEEDS_PER_SIDE * options.seed
    second = first + SEEDS_PER_SIDE
    return range(first, first + options.episodes), range(second, second + options.validation_episodes)


def load(options: Collection, cache: Path, told: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> Dataset:
    """The dataset of the options, from `cache` or collected and put there; a broken one is told of and collected again.

    Raises RunError where the environment or the expert is missing or the cache cannot be written.
    """
    environment = open_environment(options.environment, max_steps=options.max_steps)
    expert = expert_for(environment.name, options.expert)
    described = _description(environment, expert, options)
    key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    folder = cache / f"control-{key[:16]}"
    collected = False
    try:
        try:
            sides = _read(folder, described)
        except (ValueError, OSError) as error:
            if folder.exists():
                told(f"groundwave: control data in {folder} are collected again: {error}")
            _write(folder, described, environment, expert, options)
            collected = True
            sides = _read(folder, described)
    except (OSError, ValueError) as error:
        raise RunError(f"cannot write control data into {folder}: {getattr(error, 'strerror', None) or error}") from error
    return Dataset(*sides, statistics(sides[0]), folder, collected)


def statistics(training: Episodes) -> Statistics:
    """Of the training rows, in float64."""
    seen = training.observations.astype(np.float64)
    deviation, rms = seen.std(0), np.sqrt(np.square(training.outcomes, dtype=np.float64).mean(0))
    return Statistics(
        seen.mean(0).astype(np.float32),
        np.where(deviation > 1e-6, deviation, 1.0).astype(np.float32),
        np.where(rms > 1e-6, rms, 1.0).astype(np.float32),
    )


def _description(environment: Environment, expert: Expert, options: Collection) -> dict[str, Any]:
    sources = b"".join((Path(__file__).parent / name).read_bytes() for name in ("environments.py", "rollouts.py", "dataset.py"))
    return {
        **asdict(options), "environment": environment.name, "noise": list(options.noise), "max_steps": environment.max_steps,
        "versions": environment.versions | {"numpy": np.__version__}, "expert_source": source_hash(expert),
        "source": hashlib.sha256(sources).hexdigest(),
    }


def _read(folder: Path, described: dict[str, Any]) -> tuple[Episodes, Episodes]:
    """Both sides. Raises ValueError or OSError, naming the file, for what is missing, truncated or altered."""
    found, paths = read_set(folder)
    if found.get("dataset") != described:
        raise ValueError(f"{folder / 'config.json'} describes another dataset")
    sides = []
    for name in ("training", "validation"):
        arrays = read_arrays(paths[f"{name}.safetensors"])
        sides.append(Episodes(**{field.name: arrays[field.name] for field in fields(Episodes)}))
    return sides[0], sides[1]


def _write(folder: Path, described: dict[str, Any], environment: Environment, expert: Expert, options: Collection) -> None:
    lanes = [environment] + [
        open_environment(options.environment, max_steps=options.max_steps) for _ in range(min(LANES, options.episodes) - 1)
    ]
    sides = dict(zip(("training", "validation"), (collect(lanes, expert, options, seeds) for seeds in episode_seeds(options)), strict=True))
    temporary = folder.with_name(f".writing-{os.getpid()}-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write_set(
            temporary,
            {
                "dataset": described,
                **{name: {"steps": side.steps, "mean_return": float(side.returns.mean())} for name, side in sides.items()},
            },
            {f"{name}.safetensors": lambda path, side=side: write_arrays(path, _arrays(side)) for name, side in sides.items()},
        )
        try:
            _read(folder, described)  # another process that needs the same data may have been faster
        except (ValueError, OSError):
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _arrays(side: Episodes) -> dict[str, np.ndarray]:
    return {field.name: getattr(side, field.name) for field in fields(Episodes)}
