"""What `make calibrate` keeps of every porting bug reads back, is gone on with, and knows the sources that it is of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from parity_tests import calibrate, sources
from parity_tests.harness import Case, Engine, Injector, records
from parity_tests.harness.mutate import Mutation


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
    assert sources.changed({"a.py": "1", "b.py": "2", "c.py": "3"}, {"a.py": "1", "b.py": "4", "d.py": "5"}) == [
        "b.py changed", "c.py is gone", "d.py is new"]
    with pytest.raises(ValueError, match="no source fits"):
        sources.digests(root=tmp_path)
