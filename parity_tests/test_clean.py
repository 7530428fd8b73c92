"""No false alarms on random clean configurations: five of each model here, other ones than those of `calibration/clean.json`, which is held to
its sources and to what it has to say."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest

from parity_tests import clean, clean_cases, histograms, sources
from parity_tests.harness import Battery, lint
from parity_tests.harness.bounds import Bounds
from parity_tests.harness.compare import Place, rounded

SEEDS = {"grounded_mamba": 2, "lam": 6, "wavecore": 7}  # with a bank; a causal layer on the plain rule; single steps on one level


@pytest.mark.parametrize("model", SEEDS)
def test_five_clean_configurations_raise_no_alarm(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # gradients of single layers compile most, and every model's own tests have them
    monkeypatch.setattr(clean, "LATE", [group for group in clean.LATE if group != ("layer gradients",)])
    examined = clean.Examined(first=SEEDS[model])
    entries = [examined.entry(model, number) for number in range(clean.DRAWS)]
    examined.release()
    assert [entry["alarm"] for entry in entries] == [""] * clean.DRAWS
    assert len({json.dumps(entry["configuration"]) for entry in entries}) == 1 and min(entry["checks"] for entry in entries) > 50
    assert all(any(key.startswith("3, float32") for key in entry["worst"]) for entry in entries)
    rules = {rule for entry in entries for rule in entry["rules"]}
    assert rules >= {1, 2, 3, 6, 7, 8, 9}, rules


def test_a_large_wave_that_cancels_is_no_alarm() -> None:
    """Under + 100 one state of core is the sum of products near 1e7 and not at its limit, which all the others are: 3.7e-12 seen."""
    case, _ = clean_cases.made("wavecore", 1, 3)
    tier = Battery(dataclasses.replace(case, regimes=("as is", "+ 100"), dtypes=("float64",))).tier("forced")
    assert tier.held, tier.sentence


@pytest.mark.parametrize("model", clean_cases.MODELS)
def test_configurations_have_no_two_axes_alike_and_meet_every_choice(model: str) -> None:
    made = [clean_cases.made(model, seed, 0) for seed in range(40 if model != "wavecore" else 12)]
    assert all(lint.sizes(case.sizes) == [] and case.sizes for case, _ in made)
    assert len({case.seed for case, _ in made}) == len(made) == len({json.dumps(described) for _, described in made})
    met = Counter((name, value) for _, described in made for name, value in described.items() if isinstance(value, (str, bool)))
    expected = {
        "grounded_mamba": [("gate", "learned"), ("decay", "direct"), ("dt_clamp", "hard"), ("time_first", "gain"), ("normalised_key", False),
                           ("readout_norm", False), ("impl", "recurrent")],
        "lam": [("kind", "layer"), ("kind", "encoder"), ("kind", "deltanet_lm"), ("rule", "plain"), ("conv", "causal"), ("transform", "exact"),
                ("output_gate", False), ("impl", "chunked")],
        "wavecore": [("kind", "step"), ("kind", "rollout"), ("use_mamba_wave", False), ("cms_write", "slot0"), ("output_type", "discrete")],
    }[model]
    assert [choice for choice in expected if not met[choice]] == []


def test_a_seed_gives_the_same_configuration_again_and_draws_differ() -> None:
    (first, described), (again, same), (other, alike) = (clean_cases.made("lam", 7, draw) for draw in (0, 0, 1))
    assert described == same == alike and first.seed == again.seed != other.seed
    assert first.regimes == again.regimes and first.sizes == other.sizes


def test_five_draws_go_through_every_tier() -> None:
    assert {name for number in range(5) for name in clean.late(number, False)} == set(clean.late(0, True))
    assert {*clean.CORE, *clean.late(0, True)} >= {"splits", "effects", "optimiser", "observability", "whole gradients", "layer gradients"}


def entry(model: str = "lam", number: int = 0, alarm: str = "", multiple: float = 3.0, dtype: str = "float32") -> dict[str, Any]:
    return {"model": model, "number": number, "seed": 1000, "draw": number, "configuration": {}, "checks": 7, "failed": int(bool(alarm)),
            "alarm": alarm, "rules": [3], "worst": {"3, float32, rounding": [multiple / 16, "norm (output), as is"]},
            "multiples": {dtype: {str(clean.bin_of(multiple)): 2}}, "under_floor": {dtype: 5}, "worst_multiple": {dtype: multiple},
            "cpu_seconds": 1.0, "seconds": 2.0}


def test_what_is_measured_of_a_configuration() -> None:
    import numpy as np

    oracle = np.linspace(1.0, 2.0, 21)
    for factor, expected in ((3.0, {"3": 1}), (0.0, {})):  # 3 lies in [2^1.5, 2^2)
        own, found = oracle * (1 + 2e-6), oracle * (1 + factor * 2e-6)
        kept = clean.measured(rounded(Place("rounding", "norm", "as is", "float32"), oracle, own, found, Bounds()))
        assert kept["multiples"].get("float32", {}) == expected
        assert kept["under_floor"] == ({} if expected else {"float32": 1})
        assert kept["worst"]["3, float32, rounding"][0] == pytest.approx(factor / 16, rel=0.01)
    assert [clean.bin_of(multiple) for multiple in (0.5, 1.0, 1.5, 2.0, 1e30, float("inf"))] == [-2, 0, 1, 2, 40, 40]


class Stub:
    """Stands for `Examined`: counts what is asked for, and gives an alarm for the number that it is told."""

    asked: ClassVar[list[tuple[str, int]]] = []
    alarm: ClassVar[int | None] = None

    def __init__(self, **_: Any) -> None: ...

    def entry(self, model: str, number: int) -> dict[str, Any]:
        self.asked.append((model, number))
        return entry(model, number, "parts at norm" if number == self.alarm else "")


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> type[Stub]:
    monkeypatch.setattr(Stub, "asked", [])
    monkeypatch.setattr(Stub, "alarm", None)
    monkeypatch.setattr(clean, "Examined", Stub)
    return Stub


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path, stub: type[Stub], capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "clean.json"
    assert clean.main(["--count", "2", "--model", "lam", "--output", str(file)]) == 0
    assert clean.main(["--count", "3", "--model", "lam", "--output", str(file), "--resume"]) == 0
    assert stub.asked == [("lam", 0), ("lam", 1), ("lam", 2)]
    record = json.loads(file.read_text())
    assert record["models"]["lam"] == clean.record_of(record["configurations"], {}, clean.DRAWS)["models"]["lam"]
    assert record["models"]["lam"]["checks"] == 21 and record["models"]["lam"]["multiples"] == {"float32": {"3": 6}}
    record["sources"]["conf/models.py"] = "other"
    file.write_text(json.dumps(record))
    assert clean.main(["--count", "4", "--model", "lam", "--output", str(file), "--resume"]) == 2
    assert "was computed from other sources (conf/models.py changed): run it without --resume" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"clean.json", "clean.png", "README.md"}


def test_an_alarm_is_shown_and_decides_the_exit_status(
    tmp_path: Path, stub: type[Stub], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:
    stub.alarm = 1
    monkeypatch.setattr(histograms, "picture", lambda *_: None)
    assert clean.main(["--count", "2", "--model", "wavecore", "--output", str(tmp_path / "clean.json")]) == 1
    shown = capsys.readouterr().out
    assert "wavecore 1: parts at norm" in shown and "wavecore: 2 configurations, 14 checks, 1 alarms" in shown


def test_the_table_says_what_the_record_says() -> None:
    record = clean.record_of([entry(multiple=3.0), entry(number=1, multiple=10.0), entry("wavecore", dtype="bfloat16", multiple=1.3)], {}, 5)
    table = histograms.text(record)
    assert "| lam | float32 | 10 | 4 | 0.00% | 0.00% | 50.00% | 50.00% | 100.00% | 10 | 16 |" in table
    assert "| wavecore | bfloat16 | 5 | 2 | 0.00% | 100.00% |" in table and "| lam | 3, float32, rounding | 0.625 | seed 1000.1: norm" in table


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    return json.loads((clean.FOLDER / "clean.json").read_text(encoding="utf-8"))


def test_the_calibration_is_of_these_sources(kept: dict[str, Any]) -> None:
    wrong = sources.changed(kept["sources"], sources.digests(clean.OWN))
    assert not wrong, f"`make calibrate` has to run again: {', '.join(wrong)}"


def test_a_hundred_clean_configurations_of_each_model_and_no_alarm(kept: dict[str, Any]) -> None:
    assert kept["models"] == json.loads(json.dumps(clean.record_of(kept["configurations"], {}, kept["draws"])["models"]))
    for model in clean_cases.MODELS:
        numbers = {entry["number"] for entry in kept["configurations"] if entry["model"] == model}
        assert len(numbers) >= 100 and kept["models"][model]["alarms"] == 0
    assert re.search(r"\d{4}-\d\d-\d\d", kept["time"]) and histograms.text(kept) == (clean.FOLDER / "README.md").read_text(encoding="utf-8")
