"""A core in its environment: forecasts of a world model that is exact, or wrong in a known way; a core as a policy; exponents."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np

import runtime
from conf.control_schema import ControlEvaluationConfig
from conf.models import HEADS
from experiments.control.dataset import Statistics
from experiments.control.evaluation import CorePolicy, back_to_back, forecast
from experiments.control.rollouts import run_episodes
from experiments.control.stability import exponent
from experiments.tests.test_control_steps import CORE

A = np.array([[0.9, 0.2], [-0.1, 0.8]])
B = np.array([[0.5, -0.3]])
K = np.array([[0.4], [-0.7]])
STATISTICS = Statistics(np.array([1.0, -2.0]), np.array([2.0, 0.5]), np.array([3.0]))
SETTINGS = ControlEvaluationConfig(starts=3, warm_up=4, horizon=5)


class Linear:
    """x <- x A + a B in normalised units; an episode ends after `life` steps if that is given."""

    name, obs_dim, action_dim, discrete, max_steps = "Linear-v0", 2, 1, False, 99

    def __init__(self, life: int = 99) -> None:
        self.life, self.time = life, 0

    def reset(self, seed: int) -> np.ndarray:
        self.x, self.time = np.random.default_rng(seed).normal(size=2), 0
        return STATISTICS.raw(self.x)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        self.x, self.time = self.x @ A + action @ B, self.time + 1
        return STATISTICS.raw(self.x), 1.0, self.time >= self.life, False


class Exact:
    """A model that knows `Linear`, but for `error` in every prediction; its state counts its steps."""

    dtype, config = "float64", SimpleNamespace(action_dim=1, state_saturation_limit=0.0)

    def __init__(self, error: float = 0.0) -> None:
        self.error = error

    def init_state(self, rows: int) -> int:
        return 0

    def step(self, state: int, x: np.ndarray, a: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, int, dict[str, Any]]:
        assert not r.any()
        return x @ K, state + 1, {"next_obs": x @ A + a @ B + self.error}


def test_a_world_model_that_is_exact_foresees_exactly() -> None:
    """The observations pass through float32 in `Statistics`: 1e-6 is its rounding, and a wrong action would cost 1e-1."""
    found = forecast(Exact(), STATISTICS, [Linear() for _ in range(3)], [5, 6, 7], SETTINGS)
    assert found.model.shape == found.persistence.shape == (5,) and found.starts.tolist() == [3] * 5
    assert found.model.max() < 1e-6 and found.one_step < 1e-6
    closed = A + K @ B
    starts = np.stack([np.random.default_rng(seed).normal(size=2) @ np.linalg.matrix_power(closed, 4) for seed in (5, 6, 7)])
    moved = [starts @ np.linalg.matrix_power(closed, horizon) - starts for horizon in range(1, 6)]
    np.testing.assert_allclose(found.persistence, [np.sqrt((move**2).mean()) for move in moved], rtol=1e-5)
    path = [starts @ np.linalg.matrix_power(closed, horizon) for horizon in range(6)]
    steps = np.stack([after - before for before, after in pairwise(path)])
    np.testing.assert_allclose(found.one_step_persistence, np.sqrt((steps**2).mean()), rtol=1e-5)


def test_an_error_is_fed_back_and_grows_as_the_closed_loop_makes_it_grow() -> None:
    found = forecast(Exact(0.01), STATISTICS, [Linear() for _ in range(3)], [5, 6, 7], SETTINGS)
    error, expected = np.zeros(2), []
    for _ in range(5):
        error = error @ (A + K @ B) + 0.01
        expected.append(np.sqrt((error**2).mean()))
    np.testing.assert_allclose(found.model, expected, rtol=1e-4)
    assert abs(found.one_step - 0.01) < 1e-6
    assert found.figures["ratio"] == found.model.mean() / found.persistence.mean()


def test_what_comes_after_the_end_of_an_episode_is_not_counted() -> None:
    found = forecast(Exact(), STATISTICS, [Linear(), Linear(life=6), Linear(life=2)], [5, 6, 7], SETTINGS)
    assert found.starts.tolist() == [2, 2, 1, 1, 1] and found.model.max() < 1e-6
    short = forecast(Exact(), STATISTICS, [Linear(life=6)], [5], SETTINGS)
    assert short.starts.tolist() == [1, 1, 0, 0, 0] and np.isnan(short.model).tolist() == [False, False, True, True, True]
    assert np.isnan(short.figures["ratio"]) and short.one_step < 1e-6
    assert np.isnan(forecast(Exact(), STATISTICS, [Linear(life=3)], [5], SETTINGS).one_step)


def core(backend: str = "torch", **fields: Any) -> Any:
    config = replace(CORE, heads=HEADS, **fields)
    return runtime.build("wavecore", config, obs_dim=2, action_dim=1, output_dim=1, backend=backend, dtype="float64", seed=1)


def test_a_core_as_policy_carries_its_state_and_counts_what_is_at_the_limit() -> None:
    model = core(state_saturation_limit=0.5)
    policy = CorePolicy(model, STATISTICS, record=True)
    episodes = run_episodes([Linear(life=9), Linear(life=9)], policy, [3, 4])
    assert len(policy.thoughts) == len(policy.saturated) == 9
    assert policy.thoughts[0]["attention"][1].shape == (7,) and policy.thoughts[0]["s"].shape == (11,)
    state = model.init_state(1)
    x, a, r = back_to_back(episodes, STATISTICS, 0, 9, "float64")
    for t in range(9):
        y, state, info = model.step(state, x[t : t + 1], a[t : t + 1], r[t : t + 1])
        np.testing.assert_allclose(y[0], episodes.targets[t], rtol=1e-6)  # float32 in the record
        np.testing.assert_allclose(info["fast_state"][0], policy.thoughts[t]["s"], rtol=1e-6, atol=1e-9)
    both = [back_to_back(episodes, STATISTICS, episode, 9, "float64") for episode in (0, 1)]
    _, _, info = model.rollout(model.init_state(2), *(np.stack(parts, 1) for parts in zip(*both, strict=True)))
    found = policy.saturation(100)
    assert found["s"] == np.mean(np.abs(info["fast_state"][-1]) >= 0.5) and 0 < found["s"] <= 1
    free = CorePolicy(core(state_saturation_limit=0.0), STATISTICS)
    run_episodes([Linear(life=3)], free, [3])
    assert free.saturation(3) == {"s": 0.0, "w": 0.0, "p": 0.0}


def test_successive_episodes_are_one_rollout_that_goes_round() -> None:
    policy = CorePolicy(core(), STATISTICS)
    episodes = run_episodes([Linear(life=4), Linear(life=7)], policy, [3, 4])
    x, a, r = back_to_back(episodes, STATISTICS, 1, 14, "float64")
    rows = [*range(4, 11), *range(4), *range(4, 7)]
    np.testing.assert_array_equal(a, episodes.previous_actions[rows])
    np.testing.assert_array_equal(x, STATISTICS.observations(episodes.observations[rows]))
    assert r[0] == 0 and r[1] == np.float32(1 / 3)


def test_exponents_are_the_same_in_both_frameworks() -> None:
    rng = np.random.default_rng(2)
    inputs = tuple(rng.normal(size=(1007, 2, width)) for width in (2, 1, 1))
    ours, theirs = (exponent(core(backend), inputs, 7) for backend in ("torch", "jax"))
    assert ours.shape == (2,) and np.isfinite(ours).all()
    # a mean of 1,000 logarithms, each good to 1e-12 as long as both follow the same path, which a contracting core does
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)
