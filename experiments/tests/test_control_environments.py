"""Environments as the models see them: scaled actions, flat observations, and one line for everything that cannot be."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from experiments.control import environments
from experiments.control.environments import open_environment
from experiments.errors import RunError

MUJOCO = importlib.util.find_spec("mujoco") is not None


class Fake(gymnasium.Env):
    """Records what it is given; observations (3, 2) of float64 count the steps."""

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, action_space: spaces.Space, observation_space: spaces.Space | None = None, broken: str = "") -> None:
        self.action_space, self.broken, self.given, self.time = action_space, broken, [], 0
        self.observation_space = observation_space or spaces.Box(-np.inf, np.inf, (3, 2), np.float64)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.time = 0
        return np.arange(6.0).reshape(3, 2), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.given.append(action)
        self.time += 1
        seen = np.arange(6.0).reshape(3, 2) + self.time
        if self.broken == "observation":
            seen[1, 1] = np.nan
        return seen, np.inf if self.broken == "reward" else 0.5, False, False, {}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Registers environments for one test; `made(...)` returns the name."""
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.envs.registration.registry))

    def register(*arguments: Any, steps: int | None = 7, **settings: Any) -> str:
        gymnasium.register("Fake-v0", entry_point=lambda **_: Fake(*arguments, **settings), max_episode_steps=steps)
        return "Fake-v0"

    return register


def fails(name: str, *words: str, **settings: Any) -> None:
    with pytest.raises(RunError) as caught:
        open_environment(name, **settings)
    line = str(caught.value)
    assert "\n" not in line and name in line and all(word in line for word in words), line


def test_default_environment() -> None:
    environment = open_environment("Pendulum-v1")
    facts = environment.name, environment.obs_dim, environment.action_dim, environment.discrete, environment.max_steps, environment.seconds
    assert facts == ("Pendulum-v1", 3, 1, False, 200, 0.05)
    first = environment.reset(5)
    assert first.shape == (3,) and first.dtype == np.float32
    assert np.array_equal(first, environment.reset(5)) and not np.array_equal(first, environment.reset(6))
    reference = gymnasium.make("Pendulum-v1")
    reference.reset(seed=5)
    environment.reset(5)
    expected, found = reference.step(np.array([-0.5], dtype=np.float32)), environment.step(np.array([-0.25]))
    assert np.array_equal(found[0], expected[0]) and found[1] == pytest.approx(expected[1], rel=1e-12) and found[2:] == (False, False)


def test_actions_are_scaled_to_the_bounds_and_clipped(made: Any) -> None:
    low, high = np.array([[-1.0, 0.0, 10.0]]), np.array([[3.0, 1.0, 30.0]])
    environment = open_environment(made(spaces.Box(low, high, dtype=np.float64)))
    assert (environment.obs_dim, environment.action_dim, environment.discrete) == (6, 3, False)
    assert np.array_equal(environment.reset(0), np.arange(6, dtype=np.float32))
    for action in (np.array([-1.0, 0.0, 1.0]), np.array([0.5, -7.0, 0.0])):
        environment.step(action)
    given = environment._wrapped.unwrapped.given
    assert given[0].shape == (1, 3) and np.allclose(given[0], [[-1, 0.5, 30]]) and np.allclose(given[1], [[2, 0, 20]])
    with pytest.raises(RunError, match=r"must have 3 entries, found shape \(2,\)"):
        environment.step(np.zeros(2))
    with pytest.raises(RunError, match="action of step 3 is not finite"):
        environment.step(np.array([0, np.nan, 0]))


def test_discrete_actions_by_index_and_one_hot(made: Any) -> None:
    environment = open_environment(made(spaces.Discrete(5, start=2)))
    assert environment.discrete and environment.action_dim == 5
    environment.reset(0)
    for action in (0, np.int64(4), np.eye(5)[3], np.array([-1.0, 2.5, 2.4, 0, 0])):
        environment.step(action)
    assert environment._wrapped.unwrapped.given == [2, 6, 5, 3]
    with pytest.raises(RunError, match=r"one of 0 \.\. 4, found 5"):
        environment.step(5)


def test_episodes_end_at_the_limit(made: Any) -> None:
    action = np.zeros(1)
    name = made(spaces.Box(-1, 1, (1,)), steps=7)
    for limit, expected in ((None, 7), (3, 3)):
        environment = open_environment(name, max_steps=limit)
        assert environment.max_steps == expected
        for _ in range(2):
            environment.reset(0)
            assert [environment.step(action)[3] for _ in range(expected)] == [False] * (expected - 1) + [True]
    gymnasium.envs.registration.registry.pop(name)
    assert open_environment(made(spaces.Box(-1, 1, (1,)), steps=None)).max_steps == environments.DEFAULT_STEPS


def test_unsupported_spaces_are_refused_by_name(made: Any) -> None:
    one = spaces.Box(-1, 1, (1,))
    for arguments, words in (
        ((one, spaces.Dict(a=one)), ("observations must be a Box", "Dict")),
        ((one, spaces.Discrete(9)), ("observations must be a Box", "Discrete(9)")),
        ((spaces.Box(-np.inf, np.inf, (2,)),), ("finite bounds", "Box(-inf, inf, (2,)")),
        ((spaces.MultiDiscrete([3, 5]),), ("Discrete or a Box of real numbers", "MultiDiscrete([3 5])")),
        ((spaces.Box(0, 9, (2,), np.int64),), ("Box of real numbers", "int64")),
    ):
        name = made(*arguments)
        fails(name, *words)
        gymnasium.envs.registration.registry.pop(name)


@pytest.mark.parametrize(("broken", "message"), [("observation", "observation of step 1 is not finite"), ("reward", "reward inf at step 1")])
def test_what_is_not_finite_is_refused(made: Any, broken: str, message: str) -> None:
    environment = open_environment(made(spaces.Box(-1, 1, (1,)), broken=broken))
    environment.reset(0)
    with pytest.raises(RunError, match=message):
        environment.step(np.zeros(1))


def test_unknown_names_give_one_line(recwarn: pytest.WarningsRecorder) -> None:
    fails("Pendulun-v1", "doesn't exist", "Did you mean", "for example Pendulum-v1")
    fails("Pendulum-v7", "v7", "v1")
    fails("ALE/Pong-v5", "Namespace ALE not found")
    fails("nowhere:Thing-v0", "No module named 'nowhere'")
    fails("no name at all", "Malformed")
    assert open_environment("Pendulum").name == "Pendulum-v1"
    assert not recwarn.list


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, **_: Any) -> None:
        raise gymnasium.error.DependencyNotInstalled('MuJoCo is not installed, run `pip install "gymnasium[mujoco]"`')

    with monkeypatch.context() as patch:
        patch.setattr(gymnasium, "make", missing)
        fails("Reacher-v5", "pip install 'groundwave[mujoco]'")
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(RunError, match=r"gymnasium: pip install 'groundwave\[train\]'"):
        open_environment("Pendulum-v1")


def test_what_cannot_be_drawn_gives_one_line(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(made(spaces.Box(-1, 1, (1,))), "no rgb_array renderer", pictures=True)

    def no_screen(self: Any) -> None:
        raise OSError("cannot connect to a display\nand much more")

    monkeypatch.setattr("gymnasium.envs.classic_control.pendulum.PendulumEnv.render", no_screen)
    fails("Pendulum-v1", "no picture can be drawn: cannot connect to a display", pictures=True)
    with pytest.raises(RunError, match="opened without pictures"):
        open_environment("Pendulum-v1").picture()


@pytest.mark.skipif(not MUJOCO, reason="needs the extra mujoco")
def test_mujoco_environment_without_a_renderer(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = open_environment("Reacher-v5")
    assert (environment.obs_dim, environment.action_dim, environment.max_steps, environment.seconds) == (10, 2, 50, 0.02)
    assert set(environment.versions) == {"gymnasium", "mujoco"} and environment.reset(3).dtype == np.float32
    monkeypatch.setenv("MUJOCO_GL", "none_such")
    complaints: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    fails("Reacher-v5", "no picture can be drawn", "MUJOCO_GL=egl", "set: none_such", pictures=True)
    gc.collect()
    assert not complaints  # the viewer that was never whole has nothing to say when it goes


def test_settings_of_renderers_are_set_for_drawing_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for variable in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(variable, raising=False)
    found = []
    monkeypatch.setattr(
        "gymnasium.envs.classic_control.pendulum.PendulumEnv.render",
        lambda self: found.append((os.environ.get("MUJOCO_GL"), os.environ.get("SDL_VIDEODRIVER"))) or np.zeros((5, 7, 3), np.uint8),
    )
    before = dict(os.environ)
    environment = open_environment("Pendulum-v1", pictures=True)
    assert environment.picture().shape == (5, 7, 3) and dict(os.environ) == before
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    environment.picture()
    monkeypatch.setenv("DISPLAY", ":7")
    monkeypatch.delenv("MUJOCO_GL")
    environment.picture()
    assert found == [("egl", "dummy")] * 2 + [("osmesa", "dummy"), (None, None)]


def test_environment_that_fails_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, **_: Any) -> None:
        raise AttributeError("'NoneType' object has no attribute 'glGetError'\nand more")

    monkeypatch.setattr(gymnasium, "make", broken)
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    fails("Reacher-v5", "it cannot be made: AttributeError: 'NoneType' object", "MUJOCO_GL=osmesa is set")


def test_import_needs_no_gymnasium() -> None:
    source = Path(environments.__file__).read_text(encoding="utf-8")
    assert "\nimport gymnasium" not in source and "\nfrom gymnasium" not in source
