"""A Gymnasium environment as the models see it: flat float32 observations, actions in [-1, 1] or one-hot.

    continuous   environment action = low + (a + 1) / 2 (high - low),  a clipped to [-1, 1]
    discrete     environment action = start + argmax(a),  a one-hot or logits; a class index is taken as well

Letters: O observation width, A action width.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.errors import RunError

DEFAULT_STEPS = 1000  # of an episode, where the environment sets no limit


class Environment:
    """One environment; made by `open_environment`.

    `name` with its version, `obs_dim`, `action_dim` (number of choices if `discrete`), `max_steps` of an episode, `seconds` of a step
    (None where the environment does not tell), `versions` of the packages that decide what it does.
    """

    def __init__(self, wrapped: Any, name: str, pictures: bool) -> None:
        """`wrapped`: a made gymnasium.Env. Raises RunError for spaces that no model takes."""
        from gymnasium import spaces

        seen, acts = wrapped.observation_space, wrapped.action_space
        if not isinstance(seen, spaces.Box):
            raise RunError(f"environment {name}: observations must be a Box of numbers, found {seen}")
        self.discrete = isinstance(acts, spaces.Discrete)
        if isinstance(acts, spaces.Discrete):
            self.action_dim, self._start = int(acts.n), int(acts.start)
        elif isinstance(acts, spaces.Box) and np.issubdtype(acts.dtype, np.floating):
            if not (np.isfinite(acts.low).all() and np.isfinite(acts.high).all()):
                raise RunError(f"environment {name}: actions must have finite bounds to be scaled from [-1, 1], found {acts}")
            self.action_dim = int(np.prod(acts.shape))
            low, high = acts.low.astype(np.float64).ravel(), acts.high.astype(np.float64).ravel()
            self._middle, self._half = (low + high) / 2, (high - low) / 2
            self._shape, self._dtype = acts.shape, acts.dtype
        else:
            raise RunError(f"environment {name}: actions must be Discrete or a Box of real numbers, found {acts}")
        self.name, self.obs_dim, self.pictures = name, int(np.prod(seen.shape)), pictures
        limit = wrapped.spec.max_episode_steps if wrapped.spec else None
        self.max_steps = int(limit or DEFAULT_STEPS)
        inner = wrapped.unwrapped
        step = getattr(inner, "dt", None) or getattr(inner, "tau", None)
        self.seconds = float(step) if isinstance(step, (int, float)) else None
        self.versions = _versions(type(inner).__module__)
        self._wrapped, self._time = wrapped, 0

    def reset(self, seed: int) -> np.ndarray:
        """First observation (O,) float32 of the episode of `seed`."""
        self._time = 0
        observation, _ = self._wrapped.reset(seed=int(seed))
        return self._flat(observation)

    def step(self, action: np.ndarray | int) -> tuple[np.ndarray, float, bool, bool]:
        """Observation (O,) float32, reward, terminated, truncated. Raises RunError for an action, or a result, that is not finite."""
        given = np.asarray(action)
        if self.discrete:
            index = int(given) if given.ndim == 0 and given.dtype.kind in "iu" else int(self._vector(given).argmax())
            if not 0 <= index < self.action_dim:
                raise RunError(f"environment {self.name}: the action must be one of 0 .. {self.action_dim - 1}, found {index}")
            chosen: Any = self._start + index
        else:
            scaled = self._middle + self._half * self._vector(given).clip(-1.0, 1.0)
            chosen = scaled.astype(self._dtype).reshape(self._shape)
        observation, reward, terminated, truncated, _ = self._wrapped.step(chosen)
        self._time += 1
        if not np.isfinite(reward):
            raise RunError(f"environment {self.name}: reward {reward} at step {self._time}")
        return self._flat(observation), float(reward), bool(terminated), bool(truncated) or self._time >= self.max_steps

    def picture(self) -> np.ndarray:
        """What there is to see, (height, width, 3) uint8. Raises RunError where it cannot be drawn."""
        if not self.pictures:
            raise RunError(f"environment {self.name}: opened without pictures")
        try:
            with warnings.catch_warnings(), _off_screen():
                warnings.simplefilter("ignore")
                drawn = self._wrapped.render()
        except Exception as error:  # renderers have no exception in common
            _forget(error)
            raise RunError(f"environment {self.name}: no picture can be drawn: {_line(error)}{_display_hint(self.versions)}") from error
        if not isinstance(drawn, np.ndarray) or drawn.ndim != 3 or drawn.shape[2] != 3:
            raise RunError(f"environment {self.name}: its rgb_array picture must be (height, width, 3), found {type(drawn).__name__}")
        return drawn.astype(np.uint8, copy=False)

    def close(self) -> None:
        """Give back what a renderer holds."""
        self._wrapped.close()

    def _vector(self, action: np.ndarray) -> np.ndarray:
        if action.size != self.action_dim:
            raise RunError(f"environment {self.name}: the action must have {self.action_dim} entries, found shape {action.shape}")
        flat = action.astype(np.float64).reshape(self.action_dim)
        if not np.isfinite(flat).all():
            raise RunError(f"environment {self.name}: the action of step {self._time + 1} is not finite")
        return flat

    def _flat(self, observation: Any) -> np.ndarray:
        flat = np.asarray(observation, dtype=np.float32).reshape(-1)
        if flat.size != self.obs_dim:
            raise RunError(f"environment {self.name}: the observation must have {self.obs_dim} entries, found {flat.size}")
        if not np.isfinite(flat).all():
            raise RunError(f"environment {self.name}: the observation of step {self._time} is not finite")
        return flat


def open_environment(name: str, *, pictures: bool = False, max_steps: int | None = None) -> Environment:
    """The environment registered as `name` ("Pendulum-v1", "module:Name-v0"); with `pictures` it is drawn off screen.

    `max_steps` replaces the environment's own limit of an episode. Raises RunError, one line, where gymnasium or a package that the
    environment needs is missing, the name is unknown, its spaces are not supported, or, with `pictures`, it cannot be drawn.
    """
    try:
        import gymnasium
    except ImportError as error:
        raise RunError("control needs the package gymnasium: pip install 'groundwave[train]'") from error
    options: dict[str, Any] = {"render_mode": "rgb_array"} if pictures else {}
    if max_steps is not None:
        options["max_episode_steps"] = max_steps
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an outdated version, a missing one: the name in use is in every record
            made = gymnasium.make(name, disable_env_checker=True, **options)
    except gymnasium.error.DependencyNotInstalled as error:
        raise RunError(f"environment {name}: {_missing(_line(error))}") from error
    except (gymnasium.error.Error, ImportError) as error:
        raise RunError(f"environment {name}: {_line(error)}{_examples(error)}") from error
    except Exception as error:  # an environment is somebody else's code, and mujoco's import fails in many ways for a bad MUJOCO_GL
        hint = f"; MUJOCO_GL={os.environ['MUJOCO_GL']} is set" if "MUJOCO_GL" in os.environ else ""
        raise RunError(f"environment {name}: it cannot be made: {type(error).__name__}: {_line(error)}{hint}") from error
    opened = Environment(made, made.spec.id if made.spec else name, pictures)
    if pictures:
        if "rgb_array" not in made.metadata.get("render_modes", ()):
            raise RunError(f"environment {opened.name}: it has no rgb_array renderer, so no picture can be drawn")
        opened.reset(0)
        opened.picture()
    return opened


@contextlib.contextmanager
def _off_screen() -> Iterator[None]:
    """Where there is no screen, renderers are told so while they draw; what the user has set stays."""
    told = {"PYGAME_HIDE_SUPPORT_PROMPT": "1"}
    if sys.platform.startswith("linux") and not os.environ.get("DISPLAY") and not os.environ.get("WAYLAND_DISPLAY"):
        told |= {"SDL_VIDEODRIVER": "dummy", "MUJOCO_GL": "egl"}
    told = {name: value for name, value in told.items() if name not in os.environ}
    os.environ.update(told)
    try:
        yield
    finally:  # a MUJOCO_GL that does not work keeps the next process from importing mujoco at all
        for name in told:
            os.environ.pop(name, None)


def _forget(error: BaseException | None) -> None:
    """Let go of what an error's frames hold: a viewer of gymnasium's that was never whole complains when it is collected, here unheard."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__context__
    finally:
        sys.unraisablehook = hook


def _display_hint(versions: dict[str, str]) -> str:
    if "mujoco" not in versions:
        return ""
    return f"; MuJoCo draws with MUJOCO_GL=egl, osmesa or glfw (set: {os.environ.get('MUJOCO_GL', 'none')})"


def _versions(module: str) -> dict[str, str]:
    """Versions of gymnasium and of the packages that the environment's own module computes with."""
    packages = ["gymnasium"]
    if "mujoco" in sys.modules and "mujoco" in module:
        packages.append("mujoco")
    if module.split(".")[0] != "gymnasium":
        packages.append(module.split(".")[0])
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not a package"
    return found


def _line(error: Exception) -> str:
    """The first line of a message, without its final stop."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(". ")


def _missing(message: str) -> str:
    if "mujoco" in message.lower():
        return "it needs MuJoCo: pip install 'groundwave[mujoco]'"
    return message


def _examples(error: Exception) -> str:
    from gymnasium.error import NameNotFound

    return " (for example Pendulum-v1, CartPole-v1, Reacher-v5)" if isinstance(error, NameNotFound) else ""
