"""Experts: far better than chance, vectorised, and known by name or by module:function. Rollouts: what a row holds."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np
import pytest

from experiments.control import experts
from experiments.control.environments import open_environment
from experiments.control.experts import EXPERTS, expert_for
from experiments.control.rollouts import Random, Scripted, one_hot, run_episodes
from experiments.errors import RunError

NAMES = [
    "Pendulum-v1", "CartPole-v1",
    pytest.param("Reacher-v5", marks=pytest.mark.skipif(importlib.util.find_spec("mujoco") is None, reason="needs the extra mujoco")),
]
# over these seeds; measured -118 against -1252, 500 against 26, -4.3 against -42
LEAST = {"Pendulum-v1": -200.0, "CartPole-v1": 499.0, "Reacher-v5": -6.0}
CHANCE = {"Pendulum-v1": -900.0, "CartPole-v1": 40.0, "Reacher-v5": -30.0}


class Echo:
    """Keeps what it is given and acts by a fixed plan."""

    def __init__(self, plan: np.ndarray) -> None:
        self.plan, self.seen, self.starts = plan, [], []

    def start(self, seeds: Sequence[int]) -> None:
        self.starts.append(list(seeds))
        self.seen.append([])

    def act(self, observations: np.ndarray, previous_actions: np.ndarray, rewards: np.ndarray) -> np.ndarray:
        self.seen[-1].append((observations.copy(), previous_actions.copy(), rewards.copy()))
        return self.plan[len(self.seen[-1]) - 1, : len(observations)]


@pytest.mark.parametrize("name", NAMES)
def test_expert_is_far_better_than_chance(name: str) -> None:
    lanes = [open_environment(name) for _ in range(7)]
    assert set(LEAST) == set(EXPERTS)
    expert = run_episodes(lanes, Scripted(expert_for(name)), range(7))
    chance = run_episodes(lanes, Random(lanes[0], 0), range(7))
    assert expert.returns.mean() > LEAST[name] and chance.returns.mean() < CHANCE[name]
    assert expert.actions.dtype == np.float32 and np.abs(expert.actions).max() <= 1


@pytest.mark.parametrize("name", list(EXPERTS))
def test_experts_take_any_leading_axes(name: str) -> None:
    width = {"Pendulum-v1": 3, "Reacher-v5": 10, "CartPole-v1": 4}[name]
    seen = np.random.default_rng(3).standard_normal((5, 3, width)).astype(np.float32)
    together = EXPERTS[name](seen)
    assert together.shape[:2] == (5, 3) and together.dtype == np.float32
    for i, j in np.ndindex(5, 3):
        assert np.array_equal(EXPERTS[name](seen[i, j]), together[i, j])


def test_pendulum_gains_energy_below_and_holds_above() -> None:
    hanging = np.array([[-1, 0, 0.5], [-1, 0, -0.5]])
    assert np.array_equal(experts.pendulum(hanging), [[1], [-1]])
    too_fast = np.array([-1, 0, 8.0])  # 32 - 15 > 15: more energy than at the top
    assert experts.pendulum(too_fast) == -1
    assert experts.pendulum(np.array([np.cos(0.1), np.sin(0.1), 0.0])) == pytest.approx(-0.5)


def test_reacher_turns_the_way_that_is_possible() -> None:
    target = np.array([0.05, 0.12])

    def pushed(shoulder: float, elbow: float) -> np.ndarray:
        angles = np.array([shoulder, elbow])
        return experts.reacher(np.concatenate([np.cos(angles), np.sin(angles), target, [0, 0, 0, 0]]))

    # from either solution's own angles there is nothing to do
    bend = np.arccos((target @ target - 0.1**2 - 0.11**2) / (2 * 0.1 * 0.11))
    for elbow in (bend, -bend):
        shoulder = np.arctan2(target[1], target[0]) - np.arctan2(0.11 * np.sin(elbow), 0.1 + 0.11 * np.cos(elbow))
        reached = [0.1 * np.cos(shoulder) + 0.11 * np.cos(shoulder + elbow), 0.1 * np.sin(shoulder) + 0.11 * np.sin(shoulder + elbow)]
        assert np.allclose(reached, target, atol=1e-12) and np.allclose(pushed(shoulder, elbow), 0, atol=1e-6)
        assert pushed(shoulder, elbow - 0.2)[1] == pytest.approx(0.06, abs=1e-6)
    far = np.array([0.3, 0.3])  # out of reach: stretched towards it
    angles = np.array([np.pi / 4, 0.0])
    assert np.allclose(experts.reacher(np.concatenate([np.cos(angles), np.sin(angles), far, [0, 0, 0, 0]])), 0, atol=1e-6)


def test_experts_by_name() -> None:
    assert expert_for("CartPole-v1") is experts.cart_pole
    assert expert_for("Any-v0", "experiments.control.experts:pendulum") is experts.pendulum
    for environment, given, message in (
        ("Acrobot-v1", None, "Acrobot-v1 has no scripted expert; there is one for Pendulum-v1, Reacher-v5, CartPole-v1"),
        ("Pendulum-v1", "no_colon", "module:function, found 'no_colon'"),
        ("Pendulum-v1", "nowhere.at_all:f", "No module named 'nowhere'"),
        ("Pendulum-v1", "experiments.control.experts:nobody", "has no nobody"),
        ("Pendulum-v1", "experiments.control.experts:EXPERTS", "must be a function of observations, found dict"),
    ):
        with pytest.raises(RunError) as caught:
            expert_for(environment, given)
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_rows_of_a_rollout_follow_from_one_another() -> None:
    plan = np.random.default_rng(1).uniform(-1.5, 1.5, (11, 3, 1)).astype(np.float32)
    policy, heard = Echo(plan), []
    lanes = [open_environment("Pendulum-v1", max_steps=11) for _ in range(3)]
    found = run_episodes(lanes, policy, [5, 3, 9, 4, 5], label=experts.pendulum, seen=heard.append)
    assert policy.starts == [[5, 3, 9], [4, 5]] and heard == [0, 1, 2] * 11 + [0, 1] * 11
    assert len(found) == 5 and found.steps == 55 and found.seeds.tolist() == [5, 3, 9, 4, 5] and not found.terminated.any()
    assert found.observations.dtype == found.actions.dtype == found.outcomes.dtype == np.float32
    for episode in range(5):
        rows = found.rows(episode)
        group, lane = divmod(episode, 3)
        assert np.array_equal(found.actions[rows], plan[:, lane].clip(-1, 1))
        assert not found.previous_actions[rows][0].any() and not found.rewards[rows][0].any()
        assert np.array_equal(found.previous_actions[rows][1:], found.actions[rows][:-1])
        assert np.array_equal(found.rewards[rows][1:], found.outcomes[rows][:-1])
        assert np.array_equal(found.observations[rows][1:], found.next_observations[rows][:-1])
        assert np.array_equal(found.targets[rows], experts.pendulum(found.observations[rows]))
        for t, (observations, previous, rewards) in enumerate(policy.seen[group]):
            assert np.array_equal(observations[lane], found.observations[rows][t]) and np.array_equal(previous[lane], found.previous_actions[rows][t])
            assert np.array_equal(rewards[lane], found.rewards[rows][t])
    environment = open_environment("Pendulum-v1", max_steps=11)
    seen, total = [environment.reset(9)], 0.0
    for action in plan[:, 2]:
        observation, reward, *_ = environment.step(action)
        seen.append(observation)
        total += reward
    rows = found.rows(2)
    assert np.array_equal(found.observations[rows], seen[:-1]) and np.array_equal(found.next_observations[rows], seen[1:])
    assert found.returns[2] == pytest.approx(total, rel=1e-6)  # rewards are kept as float32


def test_episodes_of_different_lengths_do_not_disturb_each_other() -> None:
    lanes = [open_environment("CartPole-v1") for _ in range(5)]
    seeds = [13, 2, 7, 31, 5]
    together = run_episodes(lanes, Random(lanes[0], 4), seeds)
    assert len(set(together.lengths)) > 1 and together.terminated.all()
    plans = [together.actions[together.rows(episode)][: together.lengths.min(), 0].tolist() for episode in range(5)]
    assert all(plans.count(plan) == 1 for plan in plans)
    for episode, seed in enumerate(seeds):
        alone = run_episodes(lanes[:1], Random(lanes[0], 4), [seed])
        for name in ("observations", "actions", "outcomes", "next_observations", "previous_actions", "rewards"):
            assert np.array_equal(getattr(alone, name), getattr(together, name)[together.rows(episode)]), name
    assert np.array_equal(together.returns, together.lengths) and np.array_equal(together.actions.sum(1), np.ones(together.steps))


def test_values_are_discounted_returns() -> None:
    lanes = [open_environment("CartPole-v1") for _ in range(5)]
    found = run_episodes(lanes, Random(lanes[0], 4), range(5))
    for episode in range(5):
        expected, total = [], 0.0
        for reward in found.outcomes[found.rows(episode), 0][::-1]:
            total = reward + 0.9 * total
            expected.insert(0, total)
        assert np.allclose(found.values(0.9)[found.rows(episode), 0], expected, rtol=1e-6, atol=0)  # float32
    assert np.array_equal(found.values(0.0), found.outcomes)


def test_unusable_policies_are_refused() -> None:
    lanes = [open_environment("Pendulum-v1", max_steps=3) for _ in range(3)]
    for plan, message in (
        (np.zeros((3, 3, 2)), r"must return actions \(3, 1\), found \(3, 2\)"),
        (np.full((3, 3, 1), np.nan), "actions of step 1 are not finite"),
    ):
        with pytest.raises(RunError, match=message):
            run_episodes(lanes, Echo(plan), [1, 2, 3])
    with pytest.raises(RunError, match=r"expert must return actions \(3, 1\), found \(3,\)"):
        run_episodes(lanes, Echo(np.zeros((3, 3, 1))), [1, 2, 3], label=lambda seen: seen[:, 0])
    with pytest.raises(RunError, match="need a seed and an environment"):
        run_episodes(lanes, Echo(np.zeros((3, 3, 1))), [])
    with pytest.raises(RunError, match="one kind, found CartPole-v1, Pendulum-v1"):
        run_episodes([lanes[0], open_environment("CartPole-v1")], Echo(np.zeros((3, 3, 1))), [1])
    assert np.array_equal(one_hot([2, 0], 3), [[0, 0, 1], [1, 0, 0]])
