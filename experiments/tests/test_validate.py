"""Validation of states: a model that uses its context and one that does not are told apart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import runtime
from conf.schema import MonitorsConfig
from experiments.evaluation import Validation
from experiments.monitors.drift import Drift
from experiments.steps import make
from experiments.tasks import validate
from experiments.tasks.reasoning import Score
from experiments.tests import tiny


class Reader:
    """A step whose state counts letters and saves `saved` nats per token, or one whose state is the same whatever it read."""

    def __init__(self, saved: float, *, counts: bool, spoilt: bool = False) -> None:
        self.saved, self.counts, self.spoilt = saved, counts, spoilt
        self.rng = np.random.default_rng(0)

    def evaluate(self, ids: np.ndarray, labels: np.ndarray, states: Any) -> tuple[float, Any]:
        nats, after, _ = self.observe(ids, labels, states)
        return nats, after

    def observe(self, ids: np.ndarray, labels: np.ndarray, states: Any) -> tuple[float, Any, dict[str, Any]]:
        letters = (ids[..., None] == np.arange(97, 123)).sum(1).astype(float)
        before = np.zeros_like(letters) if states is None else states[0]["ssm"]
        after = [{"ssm": before + letters if self.counts else 1.0 + 0.01 * self.rng.standard_normal(letters.shape)}]
        nats = 2.0 - (self.saved if states is not None else 0.0) + 1e-3 * self.rng.standard_normal()
        return math.nan if self.spoilt else nats * ids.size, after, {"states": after}


def lanes(rows: int = 3, columns: int = 181) -> np.ndarray:
    """Every lane has letters of its own."""
    rng = np.random.default_rng(1)
    return np.stack([97 + 5 * row + rng.integers(0, 5, columns) for row in range(rows)])


def test_states_that_are_used_save_nats_and_hold_their_text() -> None:
    kept, coherence = validate.windows(Reader(0.2, counts=True), lanes(), 10, 3)
    assert kept is not None and kept.windows == 3 and kept.gain.value == pytest.approx(0.2 / 3, abs=0.01) and kept.gain.positive
    assert kept.fresh - kept.carried == pytest.approx(kept.gain.value)
    assert coherence["ssm"].gap.positive and coherence["ssm"].own > 0.9 and coherence["ssm"].other < 0.1


def test_states_that_are_not_used_save_nothing() -> None:
    kept, coherence = validate.windows(Reader(0.0, counts=False), lanes(), 10, 3)
    assert kept is not None and not kept.gain.positive and not coherence["ssm"].gap.positive
    assert validate.windows(Reader(0.2, counts=True), lanes(1), 30, 1)[1] == {}  # no other lane
    assert validate.windows(Reader(0.2, counts=True), lanes(), 91, 1) == (None, {})
    spoilt, nothing = validate.windows(Reader(0.0, counts=True, spoilt=True), lanes(), 30, 1)
    assert spoilt is not None and math.isnan(spoilt.carried) and nothing == {}


def test_mean_and_its_error() -> None:
    found = validate.Mean.of([1.0, 2.0, 3.0, 6.0])
    assert found.value == 3.0 and found.error == pytest.approx(math.sqrt(14 / 3 / 4)) and not found.positive
    assert validate.Mean.of([1.0, 1.1]).positive and not validate.Mean.of([1.0]).positive  # one window has no error


def test_rows_say_what_the_numbers_say() -> None:
    def report(gain: float, accuracy: float, excess: float) -> validate.Report:
        kept = validate.Retention(1.0, 1.0 + gain, validate.Mean(gain, 0.01), 256, 9)
        drift = Drift([1.0 + excess] * 4, [1.0] * 4, [1.0] * 4)
        return validate.Report(
            Validation(2.0, 7.4, 100, 90), kept, {"wkv": validate.Coherence(0.9, 0.9 - gain, validate.Mean(gain, 0.01))},
            {"recall": Score(accuracy, 0.125, 0.01, 64)}, drift, tuple(found.message for found in drift.findings(MonitorsConfig())),
        )

    good, bad = (dict((row[0], row[2]) for row in report(*case).rows()) for case in ((0.2, 0.5, -0.1), (0.02, 0.14, 0.2)))
    assert good["context retention"] == "its states save" and "nothing that can be told from noise" in bad["context retention"]
    assert good["coherence of wkv"] == "holds something of its text" and "is not nearer" in bad["coherence of wkv"]
    assert (good["recall"], bad["recall"]) == ("above chance", "chance") and good["drift"] == "none" and "carried states cost 0.200" in bad["drift"]
    assert report(0.2, 0.5, -0.1).finite and not report(math.nan, 0.5, -0.1).finite


def test_windows_of_a_model_are_those_of_a_plain_pass() -> None:
    rows = np.random.default_rng(5).integers(97, 123, size=(3, 241))
    settings = tiny.gru()
    step = make(runtime.build("gru", settings.model, "torch", dtype="float64"), settings)
    kept, coherence = validate.windows(step, rows, 20, 3)
    parts = [(rows[:, low : low + 60].copy(), rows[:, low + 1 : low + 61].copy()) for low in (0, 60, 120, 180)]
    carried = [step.evaluate(*parts[index + 1], step.evaluate(*parts[index], None)[1])[0] for index in (0, 2)]
    assert kept is not None and kept.carried == pytest.approx(sum(carried) / 360, rel=1e-12) and set(coherence) == {"h"}
    assert kept.fresh == pytest.approx(sum(step.evaluate(*parts[index], None)[0] for index in (1, 3)) / 360, rel=1e-12)
