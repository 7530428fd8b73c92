"""Every monitor: what makes it fire, and what leaves it quiet."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import runtime
from conf.schema import MonitorsConfig, TrainConfig
from experiments.data.tokens import ByteTokenizer
from experiments.evaluation import validate
from experiments.monitors import context_shift
from experiments.monitors.drift import Drift, measure_drift
from experiments.monitors.findings import Finding, Standing
from experiments.monitors.health import state_health
from experiments.monitors.leak import LeakMonitor, check_leak, leaked
from experiments.monitors.memory import resident_bytes
from experiments.monitors.pathology import Pathology, cosine
from experiments.monitors.weights import DyingWeights
from experiments.steps import make
from experiments.tests import tiny

CONFIG = MonitorsConfig()


@pytest.mark.parametrize(
    ("norm", "level"), [(0.05, "notice"), (0.1, None), (3.0, None), (10.0, None), (10.1, "notice"), (100.0, "notice"), (101.0, "warning")]
)
def test_state_health_by_norm(norm: float, level: str | None) -> None:
    vector = np.array([0.6, 0.0, 0.8])
    states = [{"ssm": np.ones((2, 3)), "wkv": norm * np.broadcast_to(vector, (2, 4, 5, 3))}]
    found = state_health(states, CONFIG)
    assert [(finding.name, finding.level) for finding in found] == ([("0/wkv", level)] if level else [])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_state_that_is_not_finite_is_an_error(value: float) -> None:
    state = np.ones((2, 3))
    state[1, 2] = value
    (finding,) = state_health([{"ssm": np.ones((2, 3))}, {"ssm": state}], CONFIG)
    assert finding.level == "error" and finding.message == "state 1/ssm: 1 of 6 entries are NaN or infinite"


def gradients(rng: np.random.Generator, count: int = 6) -> dict[str, np.ndarray]:
    return {f"p{index}": rng.standard_normal((7, 5)) for index in range(count)}


def test_pathology_is_quiet_on_independent_gradients() -> None:
    rng, pathology = np.random.default_rng(0), Pathology(CONFIG)
    for _ in range(20):
        look = pathology.look(gradients(rng))
        assert pathology.findings(look) == [] and look.symptoms["zeros"] == look.symptoms["vanishing"] == [] and not look.silent


@pytest.mark.parametrize(
    ("symptom", "change"),
    [
        ("zeros", lambda value: np.where(np.arange(35).reshape(7, 5) < 3, value, 0.0)),  # 32 of 35 are zero
        ("vanishing", lambda value: 1e-9 * value),
    ],
)
def test_pathology_fires_for_each_symptom(symptom: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    before, pathology = gradients(np.random.default_rng(1)), Pathology(CONFIG)
    assert pathology.look(before).score == 0
    look = pathology.look({name: change(value) for name, value in before.items()})
    assert look.symptoms[symptom] == list(before) and look.score == 6
    (finding,) = pathology.findings(look)
    assert finding.level == "warning" and f"score 6 is above 5: {symptom}: p0, p1, p2, p3 ..." in finding.message
    assert look.statistics() == {
        "pathology/zeros": 0.0, "pathology/opposed": 0.0, "pathology/vanishing": 0.0, "pathology/silent": 0.0, "pathology/turned": 0.0,
        "pathology/score": 6.0, f"pathology/{symptom}": 6.0,
    }
    five = Pathology(CONFIG, {name: value.ravel() for name, value in before.items()})
    assert five.findings(five.look({name: change(value) if name != "p0" else value for name, value in before.items()})) == []  # a score of 5


def test_pathology_fires_for_gradients_that_turn_round_time_after_time() -> None:
    before = gradients(np.random.default_rng(1))
    pathology = Pathology(CONFIG)
    looks = [pathology.look({name: (-1) ** number * value for name, value in before.items()}) for number in range(4)]
    assert [look.score for look in looks] == [0] * 4 and [look.turned for look in looks] == [0, 6, 6, 6]
    again = Pathology(CONFIG, pathology.arrays(), pathology.record())  # as a resumed run goes on
    look = again.look(before)
    assert look.symptoms["opposed"] == list(before) and "opposed: p0" in again.findings(look)[0].message
    assert again.look(before).score == 0 and again.look({name: -value for name, value in before.items()}).score == 0
    assert Pathology(CONFIG, pathology.arrays()).look(before).score == 0  # without what it remembered


def test_pathology_just_inside_its_bounds() -> None:
    value = np.zeros(30)
    value[:3] = 1.0  # exactly 90 % zeros
    assert Pathology(CONFIG).look({"a": value}).score == 0
    value[2] = 0.0
    assert Pathology(CONFIG).look({"a": value}).symptoms["zeros"] == ["a"]
    for share, turned in ((-0.49, 0), (-0.51, 1)):
        look = Pathology(CONFIG, {"b": np.array([1.0, 0.0])}).look({"b": np.array([share, math.sqrt(1 - share**2)])})
        assert look.turned == turned and look.score == 0
    assert [Pathology(CONFIG).look({"c": np.array([norm])}).score for norm in (1.1e-7, 0.9e-7)] == [0, 1]
    assert cosine(np.zeros(3), np.ones(3)) == 0.0


def test_parameter_without_a_gradient_yet_is_silent_and_later_scored() -> None:
    pathology = Pathology(CONFIG)
    look = pathology.look({"query": np.zeros(4)})
    assert look.silent == ["query"] and look.score == 0
    assert pathology.look({"query": np.ones(4)}).silent == []
    again = Pathology(CONFIG, pathology.arrays()).look({"query": np.zeros(4), "wild": np.array([math.nan, 1.0])})
    assert again.symptoms == {"zeros": ["query"], "opposed": [], "vanishing": ["query"]} and again.silent == []


def test_dying_weights() -> None:
    rng = np.random.default_rng(2)
    arrays = {"a": rng.standard_normal((4, 3)), "zero": np.zeros(3)}
    monitor = DyingWeights(CONFIG)
    assert monitor.look(arrays, arrays) == []
    assert monitor.look({**arrays, "a": 0.02 * arrays["a"]}, arrays) == [] and monitor.statistics()["weights/least_share"] == pytest.approx(0.02)
    restored = DyingWeights(CONFIG, monitor.record())
    (finding,) = restored.look({**arrays, "a": 0.005 * arrays["a"]}, arrays)
    assert finding.name == "a" and "dying" in finding.message
    assert restored.look(arrays, arrays) == []


def test_leak_is_a_rise_that_goes_on() -> None:
    megabyte = 2**20
    settling = [100 + 300 * (1 - math.exp(-index / 8)) for index in range(90)]
    steady = [400 + (index * 7919 % 13) for index in range(90)]
    rising = [100 + 3 * index for index in range(90)]
    assert leaked([value * megabyte for value in settling], 64 * megabyte) is None
    assert leaked([value * megabyte for value in steady], 64 * megabyte) is None
    assert leaked([value * megabyte for value in rising], 64 * megabyte) == pytest.approx(90 * megabyte)
    assert leaked([value * megabyte for value in rising], 95 * megabyte) is None and leaked([0, 10**9], 1) is None
    monitor = LeakMonitor(64.0)
    found = [monitor.look(value * megabyte) for value in rising]
    assert found[0] == [] and "memory keeps rising" in found[-1][0].message
    quiet = LeakMonitor(64.0)
    assert all(quiet.look(value * megabyte) == [] for value in [400.0] * 1000) and len(quiet._samples) <= 300


def test_real_leak_is_seen_and_a_function_that_returns_its_memory_is_not() -> None:
    held: list[mmap.mmap] = []

    def take() -> mmap.mmap:
        """Four megabytes of the system itself: an allocator may have that much from before, and then the process does not grow."""
        pages = mmap.mmap(-1, 4_000_000)
        pages.write(b"1" * len(pages))
        return pages

    assert resident_bytes() > 10 * 2**20
    assert (check_leak(lambda: held.append(take()), 12, 8.0) or 0) == pytest.approx(4 * 4_000_000 / 2**20, rel=0.3)
    held.clear()
    assert check_leak(lambda: take().close(), 12, 8.0) is None


def test_drift_arithmetic() -> None:
    healthy = Drift([2.0, 1.8, 1.7, 1.6], [2.0, 2.0, 1.9, 1.9], [2.0, 2.1, 2.0, 2.2])
    assert healthy.excess == pytest.approx(-0.25) and healthy.ratio == pytest.approx(1.1) and healthy.findings(CONFIG) == []
    losing = Drift([2.0, 2.0, 2.1, 2.3], [2.0] * 4, [1.0] * 4)
    assert [finding.name for finding in losing.findings(CONFIG)] == ["loss"] and "cost 0.200 nats" in losing.findings(CONFIG)[0].message
    growing = Drift([2.0] * 4, [2.0] * 4, [1.0, 1.5, 2.0, 2.5])
    assert [finding.name for finding in growing.findings(CONFIG)] == ["norm"]
    broken = Drift([2.0, math.nan], [2.0, math.nan], [1.0, math.nan])
    assert [finding.name for finding in broken.findings(CONFIG)] == ["loss", "norm"]


def one_block(backend: str) -> TrainConfig:
    settings = tiny.config(backend)
    return replace(settings, model=replace(settings.model, depth=1))


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_drift_of_a_model(backend: str) -> None:
    """Quiet for a new model; a WKV memory that is made to grow (decay above one, nothing normalised) is found."""
    settings = one_block(backend)
    stream = np.random.default_rng(5).integers(97, 123, size=500)
    step = make(runtime.build("grounded_mamba", settings.model, backend=backend, dtype="float64"), settings)
    quiet = measure_drift(step, stream, 4096, 60)
    assert quiet is not None and len(quiet.carried) == 8 and quiet.findings(CONFIG) == [] and quiet.carried[0] == quiet.fresh[0]
    assert quiet.carried[1] != quiet.fresh[1] and measure_drift(step, stream, 4096, 300) is None
    if backend == "torch":
        model = replace(settings.model, decay="direct", normalised_key=False, readout_norm=False)
        arrays = runtime.init.init_arrays("grounded_mamba", model, 0)
        arrays |= {name: np.full_like(value, 1.01) for name, value in arrays.items() if name.endswith("time_decay")}
        growing = make(runtime.build("grounded_mamba", model, backend=backend, dtype="float64", arrays=arrays), replace(settings, model=model))
        found = measure_drift(growing, stream, 4096, 60)
        assert found is not None and "norm" in [finding.name for finding in found.findings(CONFIG)]


def test_findings_that_stand_are_not_news() -> None:
    first, second = Finding("state", "0/ssm", "warning", "high"), Finding("drift", "loss", "warning", "worse")
    standing = Standing()
    assert standing.news(("state",), [first]) == [first] and standing.news(("state",), [first]) == []
    assert standing.news(("drift",), [second]) == [second] and standing.news(("state",), []) == []
    assert standing.news(("state",), [first]) == [first]
    again = Standing(standing.record())
    assert again.news(("state", "drift"), [first, second]) == []


def states(*rows: list[float]) -> list[dict[str, np.ndarray]]:
    return [{"ssm": np.array(rows), "wkv": np.ones((len(rows), 2, 3, 3))}]


def test_context_shift_by_cosine() -> None:
    before, after = states([1.0, 0.0], [1.0, 0.0], [0.0, 0.0]), states([0.9, 0.436], [0.7, 0.714], [5.0, 5.0])
    np.testing.assert_allclose(context_shift.cosines(before, after), [0.9, 0.7, 1.0], rtol=1e-3)  # the rows above are of length one to three digits
    rows = context_shift.shifted(before, after, 0.8)
    assert rows.tolist() == [False, True, False] and context_shift.shifted(None, after, 0.8).tolist() == [False] * 3
    zeros = [{kind: np.zeros_like(value) for kind, value in after[0].items()}]
    (reset,) = context_shift.chosen(rows, zeros, after)
    assert reset["ssm"].tolist() == [[0.9, 0.436], [0.0, 0.0], [5.0, 5.0]] and reset["wkv"].sum(axis=(1, 2, 3)).tolist() == [18.0, 0.0, 18.0]


@pytest.mark.parametrize("backend", ["torch", "cython"])
def test_generation_resets_states_where_the_context_shifts(backend: str) -> None:
    """Without a threshold, or with one that no cosine is below, the tokens are those of `generate`; with 1 every token starts afresh."""
    model: Any = runtime.build("grounded_mamba", tiny.config().model, backend=backend, dtype="float64")
    prompt = np.array([[97, 98, 99, 100], [104, 105, 106, 107]])
    expected = np.asarray(model.generate(prompt, 6, temperature=0.9, top_k=5, seed=3))
    for threshold in (None, -1.0):
        tokens, resets = context_shift.generate(model, prompt, 6, 0.9, 5, 3, threshold=threshold)
        np.testing.assert_array_equal(tokens, expected)
        assert resets == [0, 0]
    tokens, resets = context_shift.generate(model, prompt, 6, 0.0, None, 3, threshold=1.0)
    assert resets == [5, 5]  # every token but the prompt
    for row in range(2):
        for place in range(4, 9):
            logits, _ = model(tokens[row : row + 1, place : place + 1])
            assert tokens[row, place + 1] == np.asarray(logits)[0, -1].argmax()


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_validation_resets_lanes_where_the_context_shifts(backend: str) -> None:
    settings = one_block(backend)
    step = make(runtime.build("grounded_mamba", settings.model, backend=backend, dtype="float64"), settings)
    lanes = np.random.default_rng(6).integers(97, 123, size=(1, 241))
    plain, never, always = (validate(step, lanes, ByteTokenizer(), 60, shift) for shift in (None, -1.0, 1.0))
    assert plain == never and plain.resets == 0 and always.resets == 3 and always.bits_per_byte != plain.bits_per_byte
    chunks = [(lanes[:, start : start + 60].copy(), lanes[:, start + 1 : start + 61].copy()) for start in range(0, 240, 60)]
    entered = [None, *(step.evaluate(*chunk, None)[1] for chunk in chunks)]  # each chunk with no more context than the one before it
    nats = sum(step.evaluate(*chunk, states)[0] for chunk, states in zip(chunks, entered, strict=False))
    assert always.bits_per_byte == pytest.approx(nats / math.log(2) / 240, rel=1e-12)
