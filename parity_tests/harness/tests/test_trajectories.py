"""The optimiser tier on trajectories that multiply roundings: measured by the reference itself, and hiding no bug."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("flax")

import jax
import jax.numpy as jnp
import torch
from flax import nnx

from parity_tests.harness import tiers_more
from parity_tests.harness.adapters.base import Trained
from parity_tests.harness.battery import Battery, run_case
from parity_tests.harness.bounds import Bounds
from parity_tests.harness.case import Case, Trajectory
from parity_tests.harness.compare import Place, exact


def steep(factor: float, steps: int, **other: Any) -> Case:
    """A layer whose training multiplies roundings the more, the steeper it is."""

    class Reference(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sin(factor * super().forward(x))

    class Candidate(nnx.Linear):
        def __call__(self, x: jax.Array) -> jax.Array:
            return jnp.sin(factor * super().__call__(x))

    return Case("steep", lambda: Reference(7, 3), lambda: Candidate(7, 3, rngs=nnx.Rngs(0)),
                lambda seed: {"x": np.random.default_rng(seed).normal(size=(5, 7))}, regimes=("as is",),
                trajectory=Trajectory(steps=steps, lr=3e-3), **other)


def test_a_trajectory_that_multiplies_roundings_is_measured_by_the_reference() -> None:
    """Four blocks of GroundedMamba at a rate of 3e-3 end 1.4e-8 apart, and torch from weights a rounding away ends 3.9e-7 from itself."""
    calm, rough = run_case(steep(3.0, 20), tiers=("optimiser",)), run_case(steep(1000.0, 20), tiers=("optimiser",))
    assert calm.held and {check.allowed for check in calm.checks} == {1e-9}
    loss = next(check for check in rough.checks if check.leaf == "loss")
    assert rough.held, rough.sentence
    assert 1e-9 < loss.value < loss.allowed <= 1e-5 and "a rounding of the first weights" in loss.reason


def test_a_trajectory_that_multiplies_roundings_hides_no_bug_and_says_when_it_says_nothing() -> None:
    case = steep(1000.0, 20)
    battery = Battery(case)
    battery.candidate.trajectory = replace(case.trajectory, eps=1e-5)
    assert not battery.tier("optimiser").held
    wild = run_case(steep(1000.0, 50), tiers=("optimiser",))
    assert not wild.held
    assert all("take fewer steps or a lower rate" in check.detail for check in wild.checks if not check.held and check.quantity == "relative L2")


def test_a_weight_called_loss_is_not_taken_for_the_loss() -> None:
    """The losses of the reference move by 1e-10, the weight by 1e-8: each is allowed 16 times its own."""
    ones, place = np.ones(5), Place("optimiser", "", "3 steps", "float64", 0)
    left, away = Trained(losses=ones, arrays={"loss": ones}), Trained(losses=ones + 1e-10, arrays={"loss": ones + 1e-8})
    battery = SimpleNamespace(recording=SimpleNamespace(live=True), progress=lambda _: None, reference_training_nearby=lambda _: away)
    checks = [check for _ in range(2) for check in exact(place, {"loss": ones}, {"loss": ones + 1e-7}, Bounds({}), "optimiser", 6)]
    losses, weight = tiers_more._excused(battery, checks, left, [])
    assert (losses.allowed, losses.held) == (pytest.approx(1.6e-9), False) and (weight.allowed, weight.held) == (pytest.approx(1.6e-7), True)
