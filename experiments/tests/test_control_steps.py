"""The control step: both frameworks alike, what each stream sees, and the parts of the loss against NumPy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import runtime
from conf.control_schema import ControlBackendConfig, ControlConfig, ControlLossConfig, ControlTrainingConfig, EpisodesConfig
from conf.models import HEADS, WaveCoreConfig
from experiments.control import steps, streams
from experiments.control.jax_step import loss_parts as jax_loss_parts
from experiments.control.torch_step import loss_parts
from experiments.control.windows import Window

STEPS, LANES, OBS, ACTION = 5, 3, 6, 7
CORE = WaveCoreConfig(
    d_s=11, d_w=10, d_p=7, d_e=13, d_k=3, d_c=6, num_levels=2, cms_sizes=(5, 7), cms_dims=(6, 10), cms_decays=(0.2, 0.1), heads=HEADS,
    learning_rate=1e-2, gradient_clip=0.5,
)


def config(backend: str = "torch", output_type: str = "continuous", **sections: Any) -> ControlConfig:
    base = ControlConfig(
        model=replace(CORE, output_type=output_type), backend=ControlBackendConfig(backend, "float64"), data=EpisodesConfig(training=9),
        training=ControlTrainingConfig(steps=6, batch_size=LANES, context=STEPS, observation_noise=0.3),
        loss=ControlLossConfig(action=0.9, value=0.4, world_model=1.3, states=0.2, bound=0.1),
    )
    return replace(base, **sections)


def window(seed: int, fresh: list[bool], discrete: bool = False) -> Window:
    """Random rows; the last steps of one lane are past its episode's end."""
    rng = np.random.default_rng(seed)

    def rows(width: int) -> np.ndarray:
        return rng.normal(size=(STEPS, LANES, width)).astype(np.float32)

    mask = np.ones((STEPS, LANES), np.float32)
    mask[3:, 1] = 0
    targets = np.eye(ACTION, dtype=np.float32)[rng.integers(ACTION, size=(STEPS, LANES))] if discrete else np.tanh(rows(ACTION))
    return Window(
        rows(OBS), rows(ACTION), rows(1), targets, rows(ACTION), rows(1), rows(OBS), mask, np.array(fresh), np.arange(LANES) + seed,
        np.zeros(LANES, np.int64),
    )


def step_of(settings: ControlConfig) -> steps.ControlStep:
    widths = {"obs_dim": OBS, "action_dim": ACTION, "output_dim": ACTION}
    return steps.make(runtime.build("wavecore", settings.model, backend=settings.backend.name, dtype="float64", seed=3, **widths), settings)


def test_both_frameworks_take_the_same_steps() -> None:
    """Float64, with rows that begin an episode in between: 6 steps of AdamW amplify rounding less than the 50 that have 1e-9."""
    torch_step, jax_step = (step_of(config(backend)) for backend in ("torch", "jax"))
    fresh = [[True] * 3, [False] * 3, [False, True, False], [False] * 3, [True, False, False], [False] * 3]
    norms = []
    for number, rows in enumerate(fresh, start=1):
        batch = streams.batch(window(number, rows), config(), number)
        ours, theirs = (step.step(batch, 1e-2) for step in (torch_step, jax_step))
        assert ours.keys() == theirs.keys() == {*steps.PARTS, "gradient_norm"}
        for name, value in ours.items():
            assert abs(value - theirs[name]) <= 1e-9 * abs(value), (number, name)
        norms.append(ours["gradient_norm"])
    assert max(norms) > CORE.gradient_clip  # clipping was at work
    ours, theirs = torch_step.model.arrays(), jax_step.model.arrays()
    for name, value in ours.items():
        assert np.linalg.norm(value - theirs[name]) <= 1e-9 * np.linalg.norm(value), name
    for name, value in torch_step.carried_states().items():
        assert np.linalg.norm(value - jax_step.carried_states()[name]) <= 1e-9 * np.linalg.norm(value), name
    batch = streams.batch(window(9, [False] * 3), config())
    (ours, _), (theirs, _) = (step.evaluate(batch, step.carried) for step in (torch_step, jax_step))
    assert all(abs(value - theirs[name]) <= 1e-9 * abs(value) for name, value in ours.items())


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_new_episode_begins_from_zero_and_others_go_on(backend: str) -> None:
    """Lane 1 begins anew: it sees what a lane of a first step sees, though the scale of its memory is not 1 any more."""
    settings = config(backend)
    carried = step_of(settings)
    carried.evaluate(streams.batch(window(1, [True] * 3), settings))
    _, state = carried.evaluate(streams.batch(window(1, [True] * 3), settings))
    second = streams.batch(window(2, [False, True, False]), settings)
    _, after = carried.evaluate(second, state)
    _, begun = carried.evaluate(replace(second, fresh=np.ones(2 * LANES, bool)))
    for name in ("s", "w", "p"):
        went_on, anew = np.asarray(getattr(after, name)), np.asarray(getattr(begun, name))
        same = np.abs(went_on - anew).max(-1) <= 1e-12 * np.abs(anew).max()
        assert same.tolist() == [False, True, False, False, True, False], name


def test_world_model_rows_know_the_action_whose_result_they_predict() -> None:
    given, settings = window(1, [True, False, True]), config(training=ControlTrainingConfig(3, LANES, STEPS, known_reward=0.5))
    batch = streams.batch(given, settings, 4)
    np.testing.assert_array_equal(batch.previous_action[:, :LANES], given.previous_actions)
    np.testing.assert_array_equal(batch.previous_action[:, LANES:], given.actions)
    np.testing.assert_array_equal(batch.observation, np.concatenate([given.observations] * 2, 1))
    np.testing.assert_array_equal(batch.following, given.next_observations)
    assert not batch.reward[:, LANES:].any()
    assert batch.fresh.tolist() == [True, False, True] * 2
    assert all(value.dtype == np.float64 for name, value in vars(batch).items() if name != "fresh")


def test_reward_is_told_in_whole_episodes_and_noise_is_on_what_the_world_model_sees() -> None:
    settings = config(training=ControlTrainingConfig(3, LANES, STEPS, known_reward=0.5, observation_noise=0.3))
    told = {}
    for seed in range(20):  # episodes seed, seed + 1, seed + 2: each is met three times
        given = window(seed, [True] * 3)
        batch = streams.batch(given, settings, seed)
        for lane, episode in enumerate(given.episode):
            known = bool(batch.reward[:, lane].any())
            assert not known or np.array_equal(batch.reward[:, lane], given.rewards[:, lane])
            assert told.setdefault(int(episode), known) == known
        np.testing.assert_array_equal(batch.observation[:, :LANES], given.observations)
        noise = batch.observation[:, LANES:] - given.observations
        assert noise.any(-1).all() and np.abs(noise).max() < 2
    assert 0 < sum(told.values()) < len(told)
    again = streams.batch(window(3, [True] * 3), settings, 3)
    np.testing.assert_array_equal(again.observation, streams.batch(window(3, [True] * 3), settings, 3).observation)
    assert (again.observation[:, LANES:] != streams.batch(window(3, [True] * 3), settings, 4).observation[:, LANES:]).any()


@pytest.mark.parametrize("discrete", [False, True])
def test_parts_of_the_loss_are_those_of_the_formula(discrete: bool) -> None:
    settings = config()
    batch = streams.batch(window(5, [True] * 3, discrete), settings)
    rng = np.random.default_rng(0)
    y, value, following = (rng.normal(size=(STEPS, 2 * LANES, width)) for width in (ACTION, 1, OBS))
    states = {name: rng.normal(size=(STEPS, 2 * LANES, width)) for name, width in (("fast_state", 4), ("wave_state", 3), ("particle_state", 2))}
    info = {name: torch.from_numpy(array) for name, array in (*states.items(), ("value", value), ("next_obs", following))}
    tensors = {name: torch.from_numpy(array) for name, array in vars(batch).items()}
    found = {name: float(part) for name, part in loss_parts(torch.from_numpy(y), info, tensors, settings.loss, discrete).items()}
    with jax.enable_x64(True):
        arrays = jax.tree.map(lambda tensor: jnp.asarray(tensor.numpy()), (torch.from_numpy(y), info, tensors))
        theirs = {name: float(part) for name, part in jax_loss_parts(*arrays, settings.loss, discrete).items()}
    expected = dict.fromkeys(("action", "value", "world_model"), 0.0)
    for t in range(STEPS):
        for lane in range(LANES):
            if batch.mask[t, lane]:
                chosen, wanted = y[t, lane], batch.action[t, lane]
                error = np.log(np.exp(chosen).sum()) - chosen[wanted.argmax()] if discrete else ((chosen - wanted) ** 2).mean()
                expected["action"] += error / 13  # 3 lanes of 5 steps, 2 of them left out
                expected["value"] += (value[t, lane, 0] - batch.value[t, lane, 0]) ** 2 / 13
                expected["world_model"] += ((following[t, LANES + lane] - batch.following[t, lane]) ** 2).mean() / 13
    expected["states"] = sum((np.maximum(np.abs(state) - 0.1, 0) ** 2).mean() for state in states.values())
    expected["loss"] = 0.9 * expected["action"] + 0.4 * expected["value"] + 1.3 * expected["world_model"] + 0.2 * expected["states"]
    assert found.keys() == expected.keys()
    for name in expected:
        assert abs(found[name] - expected[name]) <= 1e-13 * abs(expected[name]), name
        assert abs(theirs[name] - expected[name]) <= 1e-13 * abs(expected[name]), name
