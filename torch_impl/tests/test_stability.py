"""The largest Lyapunov exponent where it is known, what is part of the map and what is not, and the share of saturated units."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conf.models import WaveCoreConfig
from torch_impl import stability
from torch_impl.stability import benettin, lyapunov_exponent, saturated_fraction
from torch_impl.wavecore import WaveCore

CONFIG = WaveCoreConfig(
    d_s=14, d_w=10, d_p=7, d_e=13, d_k=5, d_c=11, num_levels=2, cms_sizes=(6, 9), cms_dims=(15, 17), cms_decays=(0.1, 0.05), mamba_dt_scale=0.7)
OBS, ACTION, OUTPUT = 19, 12, 18


def test_linear_maps_with_a_known_spectrum() -> None:
    """One map for each row, with eigenvalues 1.3, 0.9, -0.5 times the row's factor, which are not orthogonal."""
    basis = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 3)))
    matrix = basis @ torch.diag(torch.tensor([1.3, 0.9, -0.5], dtype=torch.float64)) @ basis.inverse()
    factors = torch.tensor([[1.0], [0.6]], dtype=torch.float64)

    def step(varied: tuple[Tensor, Tensor], held: None, now: Any) -> tuple[tuple[Tensor, ...], None]:
        x = factors * (torch.cat(varied, -1) @ matrix.mT)
        return x.split((2, 1), -1), held

    start = torch.ones(2, 2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    found = benettin(step, start, None, range(300), 150)
    # after 150 steps the tangent is the first eigenvector to (0.9 / 1.3)^150 = 1e-24
    torch.testing.assert_close(found, torch.log(1.3 * factors[:, 0]), rtol=0, atol=1e-13)


def test_the_logistic_map() -> None:
    """x <- 4 x (1 - x) has exponent ln 2, and a mean over T steps is off by log(sin 2a / sin 2b) / T with angles a, b of its ends."""
    def step(varied: tuple[Tensor], held: None, now: Any) -> tuple[tuple[Tensor], None]:
        return (4 * varied[0] * (1 - varied[0]),), held

    found = benettin(step, (torch.tensor([[0.3], [0.77], [0.12]], dtype=torch.float64),), None, range(2100), 100)
    assert (found - math.log(2)).abs().max() < 10 / 2000  # an end where sin is e^-10 has probability 1e-4


def test_what_is_held_is_no_part_of_the_map_and_a_dead_tangent_has_no_exponent() -> None:
    """x <- 0.5 x + m, m <- 2 x: with m in the tangent the exponent would be log 1.69, without it is log 0.5."""
    def step(varied: tuple[Tensor], held: Tensor, now: Tensor) -> tuple[tuple[Tensor], Tensor]:
        return (now * varied[0] + 1e-3 * held,), 2e3 * varied[0]

    start = torch.ones(1, 1, dtype=torch.float64)
    found = benettin(step, (start,), start, torch.full((60,), 0.5, dtype=torch.float64), 10)
    assert found.item() == pytest.approx(math.log(0.5), abs=1e-14)
    assert benettin(step, (start,), start, torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64), 0).item() == -math.inf


def analytic(particle_bias: float) -> tuple[WaveCore, float]:
    """A core of zeros but for the wave: s and p have slope 1, or 0 at the limit where the bias drives them; w_i the factor exp(-dt_i A_i) / 2."""
    torch.manual_seed(0)
    model = WaveCore(CONFIG, OBS, ACTION, OUTPUT).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        ssm = model.core.wave.ssm
        ssm.a_raw.copy_(torch.linspace(0, 4, 10)[:, None])
        ssm.dt_proj.bias.copy_(torch.linspace(0, 5, 10))
        model.core.particle_out.bias.fill_(particle_bias)
        model.core.U_p.fill_(1.0)
    a, dt = np.logaddexp(ssm.a_raw.detach().numpy()[:, 0], 0), np.logaddexp(ssm.dt_proj.bias.detach().numpy(), 0) * 0.7 + 1e-4
    return model, float((np.log(0.5) - dt * a).max())


@pytest.mark.parametrize("batch", [None, 3])
def test_cores_whose_exponent_is_known(batch: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stability, "LEAST_STEPS", 60)
    rows = () if batch is None else (batch,)
    inputs = tuple(torch.ones(160, *rows, width, dtype=torch.float64) for width in (OBS, ACTION, 1))
    model, wave = analytic(particle_bias=2.0)
    assert wave < -1.0
    state = model.init_state(batch)._replace(w=torch.full((*rows, 10), 3.0, dtype=torch.float64))
    found = lyapunov_exponent(model, state, inputs, burn_in=100)
    # the second of the wave's factors is 0.72 of the first, so that after the burn-in the tangent is the first unit to 0.72^100 = 1e-14
    torch.testing.assert_close(found, torch.full(rows, wave, dtype=torch.float64), rtol=0, atol=1e-13)
    model, _ = analytic(particle_bias=0.0)
    found = lyapunov_exponent(model, model.init_state(batch), inputs, burn_in=100)
    # p keeps the tangent that it is given, s adds half the sum of it every step, and that of w is gone
    s, _, p = stability.start(tuple(model.init_state(batch)[:3]))
    first, last = (((s + 0.5 * steps * p.sum(-1, keepdim=True)).square().sum(-1) + p.square().sum(-1)).sqrt() for steps in (100, 160))
    torch.testing.assert_close(found, torch.log(last / first) / 60, rtol=0, atol=1e-13)


def test_the_exponent_of_a_whole_core_is_that_of_two_rollouts_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is 1e-7 off in s, w and p, is pulled back to that distance after every step, and reads the first one's memory."""
    monkeypatch.setattr(stability, "LEAST_STEPS", 40)
    torch.manual_seed(0)
    model, rng = WaveCore(CONFIG, OBS, ACTION, OUTPUT).double(), np.random.default_rng(0)
    inputs = tuple(torch.from_numpy(rng.normal(size=(50, width))) for width in (OBS, ACTION, 1))
    with torch.no_grad():
        _, state, _ = model.rollout(model.init_state(), *(x[:5].flip(0) for x in inputs))  # away from zero, where relu has two slopes
    found = lyapunov_exponent(model, state, inputs, burn_in=10)
    tangent, total = stability.start(tuple(state[:3])), 0.0
    size = torch.cat(tangent).norm()
    tangent = [x / size for x in tangent]
    with torch.no_grad():
        for step, now in enumerate(zip(*inputs, strict=True)):
            moved = [type(state)(*(x + sign * 1e-7 * d for x, d in zip(state[:3], tangent, strict=True)), *state[3:]) for sign in (1, -1)]
            up, down = (model.step(one, *now)[1][:3] for one in moved)
            state = model.step(state, *now)[1]
            tangent = [(high - low) / 2e-7 for high, low in zip(up, down, strict=True)]
            size = torch.cat(tangent).norm()
            tangent = [x / size for x in tangent]
            total += float(size.log()) if step >= 10 else 0.0
    # central differences at 1e-7 have an error of 1e-9 or so, which 50 steps hardly amplify
    assert found.item() == pytest.approx(total / 40, abs=1e-6) and abs(found.item()) > 1e-3


def test_it_refuses() -> None:
    torch.manual_seed(0)
    model = WaveCore(CONFIG, OBS, ACTION, OUTPUT).double()
    x, a, r = (torch.ones(1200, 3, width, dtype=torch.float64) for width in (OBS, ACTION, 1))
    state = model.init_state(3)
    with pytest.raises(ValueError, match=r"^an exponent needs at least 1000 steps after the burn-in, found 1200 steps with burn_in=500$"):
        lyapunov_exponent(model, state, (x, a, r))
    with pytest.raises(ValueError, match=r"^burn_in must be a number of steps, at least 0, found -1$"):
        lyapunov_exponent(model, state, (x, a, r), burn_in=-1)
    x[7, 2], a[7, 2], r[7, 2] = 0.0, 0.0, 0.0
    with pytest.raises(ValueError, match=r"^inputs must not be zero, found x_obs, a_prev and r_t all zero at step 7 of row 2$"):
        lyapunov_exponent(model, state, (x, a, r), burn_in=200)
    with pytest.raises(ValueError, match=r"^inputs must not be zero, found x_obs, a_prev and r_t all zero at step 0$"):
        lyapunov_exponent(model, model.init_state(), tuple(torch.zeros(1000, width, dtype=torch.float64) for width in (OBS, ACTION, 1)), 0)
    with pytest.raises(ValueError, match=r"^state\.s must have shape"):
        lyapunov_exponent(model, model.init_state(5), (x, a, r), burn_in=200)
    x[8, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^x_obs \(1200, 3, 19\) must be finite"):
        lyapunov_exponent(model, state, (x, a, r), burn_in=200)


def test_saturated_fraction_counts_units_at_the_limit() -> None:
    model = WaveCore(CONFIG, OBS, ACTION, OUTPUT)
    state = model.init_state(3)
    state.s[0], state.w[1, 2:5], state.p[2, 0] = -10.0, 10.0, 9.999
    assert saturated_fraction(model, state) == {"s": pytest.approx(1 / 3), "w": pytest.approx(0.1), "p": 0.0}
    info = {"fast_state": torch.full((4, 3, 14), 10.0), "wave_state": torch.zeros(4, 3, 10), "particle_state": torch.zeros(4, 3, 7)}
    assert saturated_fraction(model, info) == {"s": 1.0, "w": 0.0, "p": 0.0}
    unlimited = WaveCore(WaveCoreConfig.development(state_saturation_limit=0), OBS, ACTION, OUTPUT)
    assert saturated_fraction(unlimited, info) == {"s": 0.0, "w": 0.0, "p": 0.0}
