"""The largest Lyapunov exponent where it is known, what is part of the map and what is not, and the share of saturated units."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from conf.models import WaveCoreConfig
from jax_impl import stability
from jax_impl.functional import WaveCoreModel
from jax_impl.stability import benettin, lyapunov_exponent, saturated_fraction
from parity_tests.harness.adapters.nnx_trace import quick_options

CONFIG = WaveCoreConfig(
    d_s=14, d_w=10, d_p=7, d_e=13, d_k=5, d_c=11, num_levels=2, cms_sizes=(6, 9), cms_dims=(15, 17), cms_decays=(0.1, 0.05), mamba_dt_scale=0.7)
OBS, ACTION, OUTPUT = 19, 12, 18


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def test_linear_maps_with_a_known_spectrum() -> None:
    """One map for each row, with eigenvalues 1.3, 0.9, -0.5 times the row's factor, which are not orthogonal."""
    basis = np.random.default_rng(0).normal(size=(3, 3))
    matrix = basis @ np.diag([1.3, 0.9, -0.5]) @ np.linalg.inv(basis)
    factors = np.array([[1.0], [0.6]])

    def step(varied: tuple[Array, Array], held: None, now: Any) -> tuple[tuple[Array, ...], None]:
        x = factors * (jnp.concatenate(varied, -1) @ matrix.T)
        return (x[:, :2], x[:, 2:]), held

    found = benettin(step, (jnp.ones((2, 2)), jnp.ones((2, 1))), None, jnp.arange(300), 150)
    # after 150 steps the tangent is the first eigenvector to (0.9 / 1.3)^150 = 1e-24
    np.testing.assert_allclose(found, np.log(1.3 * factors[:, 0]), rtol=0, atol=1e-13)


def test_the_logistic_map() -> None:
    """x <- 4 x (1 - x) has exponent ln 2, and a mean over T steps is off by log(sin 2a / sin 2b) / T with angles a, b of its ends."""
    def step(varied: tuple[Array], held: None, now: Any) -> tuple[tuple[Array], None]:
        return (4 * varied[0] * (1 - varied[0]),), held

    found = benettin(step, (jnp.array([[0.3], [0.77], [0.12]]),), None, jnp.arange(2100), 100)
    assert np.abs(found - math.log(2)).max() < 10 / 2000  # an end where sin is e^-10 has probability 1e-4


def test_what_is_held_is_no_part_of_the_map_and_a_dead_tangent_has_no_exponent() -> None:
    """x <- 0.5 x + m, m <- 2 x: with m in the tangent the exponent would be log 1.69, without it is log 0.5."""
    def step(varied: tuple[Array], held: Array, now: Array) -> tuple[tuple[Array], Array]:
        return (now * varied[0] + 1e-3 * held,), 2e3 * varied[0]

    start = jnp.ones((1, 1))
    found = benettin(step, (start,), start, jnp.full(60, 0.5), 10)
    assert found.item() == pytest.approx(math.log(0.5), abs=1e-14)
    assert benettin(step, (start,), start, jnp.array([0.5, 0.0, 0.5]), 0).item() == -math.inf


def analytic(particle_bias: float) -> tuple[WaveCoreModel, dict[str, Any], float]:
    """A core of zeros but for the wave: s and p have slope 1, or 0 at the limit where the bias drives them; w_i the factor exp(-dt_i A_i) / 2."""
    model = WaveCoreModel(CONFIG, OBS, ACTION, OUTPUT, dtype="float64")
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape), jax.eval_shape(model.init))["params"]
    core = params["core"]
    core["wave"]["ssm"]["a_raw"] += np.linspace(0, 4, 10)[:, None]
    core["wave"]["ssm"]["dt_proj"]["bias"] += np.linspace(0, 5, 10)
    core["particle_out"]["bias"] += particle_bias
    core["U_p"] += 1.0
    a, dt = np.logaddexp(np.linspace(0, 4, 10), 0), np.logaddexp(np.linspace(0, 5, 10), 0) * 0.7 + 1e-4
    return model, {"params": params}, float((np.log(0.5) - dt * a).max())


@pytest.mark.parametrize("batch", [None, 3])
def test_cores_whose_exponent_is_known(batch: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stability, "LEAST_STEPS", 60)
    monkeypatch.setattr(stability, "_along", jax.jit(stability._along.__wrapped__, static_argnums=0, compiler_options=quick_options()))
    rows = () if batch is None else (batch,)
    inputs = tuple(np.ones((160, *rows, width)) for width in (OBS, ACTION, 1))
    model, variables, wave = analytic(particle_bias=2.0)
    assert wave < -1.0
    state = jax.tree.map(np.asarray, model.init_state(batch))
    found = lyapunov_exponent(model, variables, state._replace(w=np.full((*rows, 10), 3.0)), inputs, burn_in=100)
    # the second of the wave's factors is 0.72 of the first, so that after the burn-in the tangent is the first unit to 0.72^100 = 1e-14
    np.testing.assert_allclose(found, np.full(rows, wave), rtol=0, atol=1e-13)
    variables["params"]["core"]["particle_out"]["bias"][:] = 0.0
    found = lyapunov_exponent(model, variables, state, inputs, burn_in=100)
    # p keeps the tangent that it is given, s adds half the sum of it every step, and that of w is gone
    s, _, p = map(np.asarray, stability.start(tuple(state[:3])))
    first, last = (np.sqrt(np.square(s + 0.5 * steps * p.sum(-1, keepdims=True)).sum(-1) + np.square(p).sum(-1)) for steps in (100, 160))
    np.testing.assert_allclose(found, np.log(last / first) / 60, rtol=0, atol=1e-13)


def test_it_refuses() -> None:
    model, variables, _ = analytic(0.0)
    x, a, r = (np.ones((1200, 3, width)) for width in (OBS, ACTION, 1))
    state = model.init_state(3)
    with pytest.raises(ValueError, match=r"^an exponent needs at least 1000 steps after the burn-in, found 1200 steps with burn_in=500$"):
        lyapunov_exponent(model, variables, state, (x, a, r))
    with pytest.raises(ValueError, match=r"^burn_in must be a number of steps, at least 0, found -1$"):
        lyapunov_exponent(model, variables, state, (x, a, r), burn_in=-1)
    x[7, 2], a[7, 2], r[7, 2] = 0.0, 0.0, 0.0
    with pytest.raises(ValueError, match=r"^inputs must not be zero, found x_obs, a_prev and r_t all zero at step 7 of row 2$"):
        lyapunov_exponent(model, variables, state, (x, a, r), burn_in=200)
    with pytest.raises(ValueError, match=r"^inputs must not be zero, found x_obs, a_prev and r_t all zero at step 0$"):
        lyapunov_exponent(model, variables, model.init_state(), tuple(np.zeros((1000, width)) for width in (OBS, ACTION, 1)), 0)
    with pytest.raises(ValueError, match=r"^state\.s must have shape"):
        lyapunov_exponent(model, variables, model.init_state(5), (x, a, r), burn_in=200)
    x[8, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"^x_obs \(1200, 3, 19\) must be finite"):
        lyapunov_exponent(model, variables, state, (x, a, r), burn_in=200)


def test_saturated_fraction_counts_units_at_the_limit() -> None:
    model = WaveCoreModel(CONFIG, OBS, ACTION, OUTPUT)
    state = jax.tree.map(np.array, model.init_state(3))
    state.s[0], state.w[1, 2:5], state.p[2, 0] = -10.0, 10.0, 9.999
    assert saturated_fraction(model, state) == {"s": pytest.approx(1 / 3), "w": pytest.approx(0.1), "p": 0.0}
    info = {"fast_state": np.full((4, 3, 14), 10.0), "wave_state": np.zeros((4, 3, 10)), "particle_state": np.zeros((4, 3, 7))}
    assert saturated_fraction(model, info) == {"s": 1.0, "w": 0.0, "p": 0.0}
    unlimited = WaveCoreModel(WaveCoreConfig.development(state_saturation_limit=0), OBS, ACTION, OUTPUT)
    assert saturated_fraction(unlimited, info) == {"s": 0.0, "w": 0.0, "p": 0.0}
