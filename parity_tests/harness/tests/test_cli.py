"""The command: exit status 0, 1 or 2, and one clear line for every question that was wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from parity_tests.harness import formats
from parity_tests.harness.cli import main
from parity_tests.harness.report import from_json

# a case without a framework on the candidate's side, so that a run takes milliseconds
CASES = '''
import numpy as np
from parity_tests.harness import Case, Engine

W = {"w": np.ones((5, 3))}

def engine(bug=0.0):
    return Engine(lambda arrays: lambda x: np.tanh(x @ arrays["w"] + bug), W)

def inputs(seed, batch=2, length=6):
    return {"x": np.random.default_rng(seed).normal(size=(batch, length, 5))}

good = Case("good", engine, engine, inputs, trajectory=None)
bad = Case("bad", engine, lambda: engine(1e-6), inputs, trajectory=None)
number = 3

def both():
    return [good, bad]

def raising():
    raise KeyError("lost")
'''


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cases.py").write_text(CASES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_case_that_holds(place: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["run", "cases.py:good", "--json", "report.json"]) == 0
    assert "good: parity holds" in capsys.readouterr().out
    result = from_json((place / "report.json").read_text())[0]
    assert result.held and {tier.name for tier in result.tiers if tier.skipped} >= {"forced", "gradients", "splits", "optimiser"}


def test_a_case_that_does_not_hold(place: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["run", "cases.py:both", "--quiet"]) == 1
    out = capsys.readouterr().out
    assert "bad: parity does not hold: parts at the whole model: relative L2" in out and "1 of 2 cases hold; bad does not" in out


def test_the_nearest_pyproject_lists_the_cases(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    (place / "pyproject.toml").write_text('[tool.parity]\ncases = ["cases.py:good"]\n')
    (place / "below").mkdir()
    monkeypatch.chdir(place / "below")
    assert main(["run", "--summary", "--tier", "free"]) == 0
    assert "good: parity holds" in capsys.readouterr().out


def test_a_case_by_its_own_name(place: Path, capsys: pytest.CaptureFixture) -> None:
    (place / "pyproject.toml").write_text('[tool.parity]\ncases = ["cases.py:both"]\n')
    assert main(["run", "good", "--tier", "free"]) == 0
    assert "bad" not in capsys.readouterr().out
    assert main(["run", "godd"]) == 2
    assert f"no cases of {place / 'cases.py'}:both are named 'godd', expected one of good, bad" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "words"), [
    (["run", "cases.py"], "a case is named file.py:name or module:name, found 'cases.py'; its cases are "),
    (["run", ":good"], "a case is named file.py:name or module:name, found ':good'"),
    (["run", "good"], "or by its own name where pyproject.toml lists it; found 'good' and there is no pyproject.toml"),
    (["run", "missing.py:good"], "missing.py does not exist"),
    (["run", "cases.py:better"], "cases.py has no 'better'; its cases are bad, good"),
    (["run", "cases.py:number"], "is int, expected a Case"),
    (["run", "cases.py:raising"], "raised KeyError: 'lost'"),
    (["run", "no_such_module:good"], "no_such_module cannot be imported"),
    (["run", "broken.py:good"], "broken.py cannot be imported: ZeroDivisionError"),
    (["run", "cases.py:good", "--tier", "backward"], "invalid choice: 'backward'"),
    (["run", "cases.py:good", "--dtype", "int8"], "invalid choice: 'int8'"),
    (["run", "cases.py:good", "--regime", "as was"], "unknown regime 'as was'"),
    (["run", "cases.py:good", "--threads", "0"], "threads must be a whole number"),
    (["run", "cases.py:good", "--json", "no/such/folder.json"], "the folder no/such does not exist"),
    (["run", "cases.py:good", "--mutations", "--tier", "free"], "need injectors"),
    (["run"], "there is no pyproject.toml"),
    ([], "required: COMMAND"),
    (["walk"], "invalid choice: 'walk'"),
    (["diff", "a.npz", "b.npz"], "a.npz does not exist"),
    (["diff", "a.npz", "b.npz", "--tolerance", "-1"], "--tolerance must be at least 0"),
    (["convert", "a.npz", "b.npz"], "a.npz does not exist"),
    (["convert", "a.npz", "b.npz", "--to", "candidate"], "--case and --to belong together"),
])
def test_user_errors_are_one_line_and_exit_2(place: Path, capsys: pytest.CaptureFixture, arguments: list[str], words: str) -> None:
    (place / "broken.py").write_text("1 / 0\n")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("parity: ") and error.count("\n") == 1


def test_a_pyproject_without_cases(place: Path, capsys: pytest.CaptureFixture) -> None:
    (place / "pyproject.toml").write_text("[tool.parity]\ncases = 3\n")
    assert main(["run"]) == 2
    assert "expected" not in capsys.readouterr().out
    (place / "pyproject.toml").write_text("[tool.parity\n")
    assert main(["run"]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_diff_says_which_arrays_differ(place: Path, capsys: pytest.CaptureFixture) -> None:
    first = {"same": np.ones(3), "other": np.ones(3), "gone": np.ones(2)}
    formats.save(place / "a.npz", first)
    formats.save(place / "b.safetensors", {"same": np.ones(3), "other": np.array([1.0, 1.0, 1.5]), "shape": np.ones(1)})
    assert main(["diff", "a.npz", "b.safetensors"]) == 1
    out = capsys.readouterr().out
    assert "3 of 4 arrays differ" in out and "only in a.npz" in out and "only in b.safetensors" in out and "0.5 at [2]" in out
    formats.save(place / "c.safetensors", first)
    assert main(["diff", "a.npz", "c.safetensors"]) == 0
    assert "3 arrays are equal, value for value" in capsys.readouterr().out
    formats.save(place / "d.npz", {**first, "other": np.ones(3) + 1e-9})
    assert main(["diff", "a.npz", "d.npz", "--tolerance", "1e-8"]) == 0
    formats.save(place / "e.npz", {})
    assert main(["diff", "e.npz", "e.npz"]) == 2


def test_convert_between_formats(place: Path, capsys: pytest.CaptureFixture) -> None:
    arrays = {"w": np.arange(15.0).reshape(5, 3).T}
    formats.save(place / "a.npz", arrays)
    assert main(["convert", "a.npz", "b.safetensors"]) == 0
    assert np.array_equal(formats.load(place / "b.safetensors")["w"], arrays["w"])
    assert main(["convert", "a.npz", "b.txt"]) == 2
    assert "unknown format" in capsys.readouterr().err


def test_convert_between_names_and_back(place: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("flax")
    from parity_tests.harness.tests import toy_torch

    arrays = {name: np.arange(1.0, value.numel() + 1).reshape(tuple(value.shape)) for name, value in toy_torch.Toy().state_dict().items()}
    arrays["head.weight"] = arrays["embedding.weight"]
    formats.save(place / "torch.safetensors", arrays)
    case = ["--case", "parity_tests.harness.tests.toy:CASE"]
    assert main(["convert", "torch.safetensors", "flax.npz", *case, "--to", "candidate"]) == 0
    flax = formats.load(place / "flax.npz")
    assert np.array_equal(flax["blocks.1.up.kernel"], arrays["blocks.1.up.weight"].T) and "head.weight" not in flax
    assert main(["convert", "flax.npz", "back.npz", *case, "--to", "reference"]) == 0
    assert main(["diff", "torch.safetensors", "back.npz"]) == 0
    assert main(["convert", "flax.npz", "wrong.npz", *case, "--to", "candidate"]) == 2
    error = capsys.readouterr().err
    assert "missing blocks.0.cell.norm.weight" in error and "unused blocks.0.cell.norm.scale" in error and error.count("\n") == 1


def test_the_report_of_a_run_can_be_restricted(place: Path) -> None:
    assert main(["run", "cases.py:good", "--tier", "free", "--regime", "length 2", "--dtype", "float32", "--seed", "3", "--json", "r.json"]) == 0
    record = json.loads((place / "r.json").read_text())
    assert {check["regime"] for check in record["cases"][0]["tiers"][0]["checks"]} == {"length 2"}
