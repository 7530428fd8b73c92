"""What `make calibrate` has kept of every porting bug is what this tree would give, and says what the harness is held to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from parity_tests import calibrate, sources
from parity_tests.harness import Case, Engine, Injector, records
from parity_tests.harness.mutate import Mutation

MODELS = ("GroundedMamba", "LAM", "WaveCore")


@pytest.fixture(scope="module")
def kept() -> tuple[dict, dict[str, list[Mutation]]]:
    """The record of the run, and its mutations by case."""
    assert calibrate.FILE.is_file(), f"{calibrate.FILE} does not exist: `make calibrate` writes it"
    text = calibrate.FILE.read_text(encoding="utf-8")
    return json.loads(text)["calibration"], records.mutations_from_json(text)


def of(kept: tuple[dict, dict[str, list[Mutation]]], model: str, unseen: bool) -> list[Mutation]:
    record, found = kept
    return [item for case in record["models"][model]["cases"] for item in found[case] if item.unseen is unseen]


def test_the_sources_are_those_of_the_run(kept: tuple[dict, dict[str, list[Mutation]]]) -> None:
    wrong = sources.changed(kept[0]["sources"], calibrate.digests())
    assert not wrong, f"`make calibrate` has to run again: {', '.join(wrong)}"


@pytest.mark.parametrize("model", MODELS)
def test_every_bug_is_killed_and_nearly_all_are_located(kept: tuple[dict, dict[str, list[Mutation]]], model: str) -> None:
    found = of(kept, model, unseen=False)
    assert len(found) >= 40 and len({item.name for item in found}) == len(found)
    assert [item.name for item in found if not item.detected] == []
    assert sum(item.held for item in found) >= 0.95 * len(found), [item.sentence for item in found if not item.held]


def test_the_diagnosis_names_seven_of_ten(kept: tuple[dict, dict[str, list[Mutation]]]) -> None:
    known = [item for model in MODELS for item in of(kept, model, unseen=False) if item.named is not None]
    wrong = [f"{item.name}: {item.diagnosis}, expected {' or '.join(item.families)}" for item in known if not item.named]
    assert len(known) >= 100 and len(wrong) <= 0.3 * len(known), wrong


@pytest.mark.parametrize("model", MODELS)
def test_ten_bugs_that_nothing_was_tuned_for_are_reported_apart(kept: tuple[dict, dict[str, list[Mutation]]], model: str) -> None:
    assert len(of(kept, model, unseen=True)) == 10


def test_the_totals_are_those_of_the_mutations(kept: tuple[dict, dict[str, list[Mutation]]]) -> None:
    assert set(kept[0]["models"]) == set(MODELS)
    for model in MODELS:
        made = calibrate.totals([*of(kept, model, unseen=False), *of(kept, model, unseen=True)])
        assert {name: kept[0]["models"][model][name] for name in made} == made


def test_the_bugs_are_those_of_the_lists(kept: tuple[dict, dict[str, list[Mutation]]]) -> None:
    mutations = pytest.importorskip("parity_tests.mutations")
    assert {case.name: [(item.name, item.where) for item in case.injectors] for case in mutations.CASES} == {
        case: [(item.name, item.expected) for item in found] for case, found in kept[1].items()}


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    found = {"one": [Mutation("a \"bug\"", "x", "x", True, "free", ("2 meaning",), 0.5, True, "says"),
                     Mutation("b", "x", "", False, "", (), 1.0, False, "")],
             "two": [Mutation("c", "y", "y", True, "free", ("2 meaning",), 1.0, False, "says", unseen=True)]}
    path = tmp_path / "new" / "file.json"
    calibrate.write(path, found, {"commit": "abc", "models": {"M": {"cases": ["one", "two"]}}})
    text = path.read_text()
    assert records.mutations_from_json(text) == found and records.from_json(text) == []
    record = json.loads(text)
    assert record["held"] is False and record["calibration"] == {"commit": "abc", "models": {"M": {"cases": ["one", "two"]}}}
    assert calibrate.kept(path, {}) == ({}, {})  # no digests were kept
    calibrate.write(path, found, {"models": {"M": {"cases": ["one", "two"]}}, "sources": {"a.py": "1"}})
    assert calibrate.kept(path, {"a.py": "1"}) == (found, {"M": {"cases": ["one", "two"]}})
    assert calibrate.kept(path, {"a.py": "2"}) == calibrate.kept(path.with_name("none"), {"a.py": "1"}) == ({}, {})
    assert [name.name for name in path.parent.iterdir()] == ["file.json"] and text.count('"name"') == text.count('{"name"') == 3


def test_the_command_writes_every_model_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    mutations = pytest.importorskip("parity_tests.mutations")

    def engine() -> Engine:
        return Engine(lambda arrays: lambda x: np.tanh(x @ arrays["w"]), {"w": np.ones((5, 3))})

    def case(name: str, by: float) -> Case:
        bugs = (Injector(f"w x {by}", "", weights=lambda weights, _: {"w": by * weights["w"]}),)
        return Case(name, engine, engine, lambda seed, batch=3: {"x": np.random.default_rng(seed).normal(size=(batch, 5))}, trajectory=None,
                    injectors=bugs)

    models = {"one": (case("a", 1.5),), "two": (case("b", 1.0 + 1e-13), case("c", 2.0))}
    monkeypatch.setattr(mutations, "MODELS", models)
    path = tmp_path / "made.json"
    assert calibrate.main(["--output", str(path)]) == 1  # a bug of 1e-13 survives
    found, record = records.mutations_from_json(path.read_text()), json.loads(path.read_text())["calibration"]
    assert {name: [item.detected for item in own] for name, own in found.items()} == {"a": [True], "b": [False], "c": [True]}
    assert record["models"]["two"]["cases"] == ["b", "c"] and record["models"]["two"]["seen"]["killed"] == 1
    assert record["sources"] == calibrate.digests() and "torch" in record["policy"]["versions"]
    monkeypatch.setattr(mutations, "MODELS", {"one": (case("a", 3.0),), "three": (case("d", 4.0),)})
    assert calibrate.main(["--output", str(path), "--resume"]) == 1  # the survivor is still there
    assert "three written to" in capsys.readouterr().out
    again = records.mutations_from_json(path.read_text())
    assert list(again) == ["a", "b", "c", "d"] and again["a"] == found["a"]


CODE = 'def f(x):\n    """Doubled."""\n    return 2 * x\n'


@pytest.mark.parametrize(("text", "same"), [
    ('def f(x):\n    """Twice x."""\n    # doubled\n    return (2 *\n            x)\n', True),
    ('def f(x):\n    return 2 * x\n', True),
    ('def f(x):\n    """Doubled."""\n    return 3 * x\n', False),
    ('def f(y):\n    """Doubled."""\n    return 2 * y\n', False),
    ('def f(x):\n    """Doubled."""\n    return 2.0 * x\n', False),
])
def test_digests_see_the_code_and_not_the_words(text: str, same: bool) -> None:
    assert (sources.digest(text) == sources.digest(CODE)) is same


def test_changed_sources_are_named(tmp_path: Path) -> None:
    found = sources.changed({"a.py": "1", "b.py": "2", "c.py": "3"}, {"a.py": "1", "b.py": "4", "d.py": "5"})
    assert found == ["b.py changed", "c.py is gone"]  # d.py is new: what makes use of it would have changed
    with pytest.raises(ValueError, match="no source fits"):
        sources.digests(root=tmp_path)
