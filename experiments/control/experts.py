"""Scripted experts: what a good controller does at an observation.

An expert is a function of observations (..., O), in the environment's own units, that returns the model's actions (..., A) as float32:
in [-1, 1], or one-hot where the choices are discrete. Letters: O observation width, A action width.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.errors import RunError

Expert = Callable[[np.ndarray], np.ndarray]


def pendulum(observations: np.ndarray) -> np.ndarray:
    """Swing-up by energy, then proportional and derivative control near the top; (cos, sin, speed) -> torque / 2.

    The pendulum obeys w' = 15 sin(angle) + 3 torque, so E = w^2 / 2 + 15 cos(angle) is kept without torque and is 15 upright and at rest.
    """
    cosine, sine, speed = np.moveaxis(np.asarray(observations, dtype=np.float64), -1, 0)
    angle = np.arctan2(sine, cosine)
    energy = speed * speed / 2 + 15 * cosine
    swing = 2 * np.where(speed < 0, -1.0, 1.0) * np.clip(15 - energy, -1, 1)
    hold = -(10 * angle + 2.5 * speed)
    torque = np.where((np.abs(angle) < 0.6) & (np.abs(speed) < 3), hold, swing)
    return (np.clip(torque, -2, 2) / 2)[..., None].astype(np.float32)


def reacher(observations: np.ndarray) -> np.ndarray:
    """Proportional and derivative control of both joints towards the angles that put the fingertip on the target.

    Observation: cosines and sines of both angles, target (x, y), both speeds, fingertip minus target. Links of 0.10 and 0.11 m.
    Of the two solutions, elbow one way or the other, the one that needs the smaller turns.
    """
    seen = np.asarray(observations, dtype=np.float64)
    angles = np.arctan2(seen[..., 2:4], seen[..., 0:2])
    x, y, speeds = seen[..., 4], seen[..., 5], seen[..., 6:8]
    first, second = 0.10, 0.11
    elbow = np.arccos(np.clip((x * x + y * y - first**2 - second**2) / (2 * first * second), -1, 1))
    turns = []
    for bend in (elbow, -elbow):
        shoulder = np.arctan2(y, x) - np.arctan2(second * np.sin(bend), first + second * np.cos(bend))
        # the elbow stops at 3 radians either way and cannot turn through; the shoulder takes the short way round
        turn = np.stack([(shoulder - angles[..., 0] + np.pi) % (2 * np.pi) - np.pi, bend - angles[..., 1]], axis=-1)
        turns.append(turn)
    cost = [np.square(turn).sum(-1, keepdims=True) for turn in turns]
    turn = np.where(cost[0] <= cost[1], turns[0], turns[1])
    return np.clip(0.3 * turn - 0.05 * speeds, -1, 1).astype(np.float32)


def cart_pole(observations: np.ndarray) -> np.ndarray:
    """Push towards where the pole falls, with a little of the cart's place and speed, so that it stays in the middle: one-hot (left, right)."""
    place, speed, angle, turning = np.moveaxis(np.asarray(observations, dtype=np.float64), -1, 0)
    right = angle + 0.3 * turning + 0.03 * place + 0.06 * speed > 0
    return np.stack([~right, right], axis=-1).astype(np.float32)


EXPERTS: dict[str, Expert] = {"Pendulum-v1": pendulum, "Reacher-v5": reacher, "CartPole-v1": cart_pole}


def expert_for(environment: str, given: str | None = None) -> Expert:
    """The scripted expert of an environment, or the one given as "module:function". Raises RunError where there is none."""
    if given is None:
        if environment not in EXPERTS:
            known = ", ".join(EXPERTS)
            raise RunError(f"environment {environment} has no scripted expert; there is one for {known}; another is given as module:function")
        return EXPERTS[environment]
    module, colon, name = given.partition(":")
    if not (module and colon and name):
        raise RunError(f"the expert must be given as module:function, found {given!r}")
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise RunError(f"expert {given}: {error}") from error
    except AttributeError as error:
        raise RunError(f"expert {given}: the module {module} has no {name}") from error
    if not callable(found):
        raise RunError(f"expert {given} must be a function of observations, found {type(found).__name__}")
    return found


def source_hash(expert: Expert) -> str:
    """sha256 over the name and the source file of an expert. Raises RunError where it has no source to read."""
    try:
        path = inspect.getsourcefile(expert)
        source = Path(path).read_bytes() if path else b""
    except (TypeError, OSError) as error:
        raise RunError(f"expert {getattr(expert, '__name__', expert)!r} has no source file, by which its dataset could be known") from error
    return hashlib.sha256(getattr(expert, "__qualname__", type(expert).__qualname__).encode() + b"\0" + source).hexdigest()
