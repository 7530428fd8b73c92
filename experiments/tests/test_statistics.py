"""Schedule and statistics against values by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from conf.schema import OptimiserConfig
from experiments import schedule
from experiments.monitors.memory import peak_bytes, reset_peak
from experiments.monitors.statistics import autocorrelation, gradient_statistics, state_statistics
from experiments.tasks.long_context import LaggedProducts


@pytest.mark.parametrize(("step", "expected"), [(1, 0.1), (5, 0.5), (10, 1.0), (40, 0.75), (55, 0.5), (95, 0.1), (100, 0.1)])
def test_schedule(step: int, expected: float) -> None:
    assert schedule.factor(step, steps=100, warmup=10, floor=0.1) == pytest.approx(expected, rel=1e-12)


def test_schedule_without_warmup_and_shorter_than_it() -> None:
    assert schedule.factor(1, 100, 0, 0.1) < 1 < 1 + schedule.factor(1, 1, 0, 0.1)
    assert [schedule.factor(step, 3, 5, 0.1) for step in (1, 2, 3)] == [0.2, 0.4, 0.6]


def test_rates_scale_by_group() -> None:
    rates = schedule.rates(5, 100, OptimiserConfig(rate=2e-3, warmup=10))
    assert rates == pytest.approx({"ssm": 5e-4, "rwkv": 3e-4, "norm": 1e-3, "other": 1e-3})


def test_gradient_statistics() -> None:
    table = gradient_statistics({"a": np.array([[1.0, -3.0, np.nan], [2.0, np.inf, 4.0]]), "b": np.array([np.nan])})
    assert table == {
        "gradient/a/nonfinite": 2.0, "gradient/a/mean": 1.0, "gradient/a/std": pytest.approx(math.sqrt(6.5)),
        "gradient/a/min": -3.0, "gradient/a/max": 4.0, "gradient/b/nonfinite": 1.0,
    }


def test_state_statistics() -> None:
    states = [{"ssm": np.array([[3.0, 4.0], [0.0, 0.0]]), "wkv": np.array([[[[1.0, -7.0]]]])}]
    table = state_statistics(states, [np.ones((2, 5, 3))], lag=4)
    assert table["state/0/ssm/norm"] == 2.5 and table["state/0/ssm/rms"] == 2.5 and table["state/0/ssm/largest"] == 4.0
    assert table["state/0/wkv/largest"] == 7.0 and table["state/0/wkv/norm"] == pytest.approx(math.sqrt(50))
    assert table["state/0/ssm/autocorrelation_4"] == pytest.approx(1.0)
    assert "state/0/ssm/autocorrelation_5" not in state_statistics(states, [np.ones((2, 5, 3))], lag=5)


def test_autocorrelation_of_rotation_is_its_cosine() -> None:
    angles = 0.3 * np.arange(50)
    states = np.stack([np.cos(angles), np.sin(angles)], axis=-1)[None]
    assert autocorrelation(states[:, :-7], states[:, 7:]) == pytest.approx(math.cos(2.1), rel=1e-12)
    assert math.isnan(autocorrelation(np.zeros((1, 3, 2)), np.zeros((1, 3, 2))))


@pytest.mark.parametrize("chunks", [(200,), (3, 5, 100, 92), (50, 50, 50, 50), (31, 169)])
def test_streamed_autocorrelation_is_that_of_the_whole(chunks: tuple[int, ...]) -> None:
    states = np.random.default_rng(0).standard_normal((2, 200, 3)).cumsum(1)
    running = LaggedProducts(31)
    for chunk in np.split(states, np.cumsum(chunks)[:-1], axis=1):
        running.add(chunk)
    assert running.value() == pytest.approx(autocorrelation(states[:, :-31], states[:, 31:]), rel=1e-12)
    assert running._last.shape[1] == 31


def test_short_stream_has_no_lagged_value() -> None:
    running = LaggedProducts(31)
    running.add(np.ones((1, 31, 2)))
    assert math.isnan(running.value())


def test_peak_memory_sees_an_allocation() -> None:
    forgets = reset_peak()
    before = peak_bytes()
    held = np.ones(40_000_000)
    # A tenth is left for what the rest of the process gives back meanwhile; where the old peak stays, it may hide this one.
    assert peak_bytes() >= (before + 0.9 * held.nbytes if forgets else held.nbytes)
