"""`parity run --html` and `parity report`: the same report again, from its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from parity_tests.harness import records, report
from parity_tests.harness.cli import main
from parity_tests.harness.tests import synthetic
from parity_tests.harness.tests.test_cli import CASES
from parity_tests.harness.tests.test_html import Page


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cases.py").write_text(CASES)
    (tmp_path / "old.json").write_text(report.to_json([synthetic.result("made", wrong="blocks.1.norm", time="2026-01-01T00:00:00+00:00")]))
    (tmp_path / "new.json").write_text(report.to_json([synthetic.result("made", time="2026-03-01T00:00:00+00:00")]))
    (tmp_path / "other.json").write_text(report.to_json([synthetic.result("other [x]", wrong="blocks.2.norm")]))
    (tmp_path / "wrong.json").write_text('{"schema": "parity-report/1", "held": true, "cases": [3]}')
    (tmp_path / "empty.json").write_text('{"schema": "parity-report/1", "held": false, "cases": []}')
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_writes_the_page_that_its_json_makes(place: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["run", "cases.py:both", "--quiet", "--json", "a.json", "--html", "a.html"]) == 1
    assert main(["report", "a.json", "--html", "b.html"]) == 1
    assert (place / "a.html").read_text() == (place / "b.html").read_text()
    assert list(Page((place / "a.html").read_text()).table("case")) == ["bad", "good"]
    assert "bad: parity does not hold" in capsys.readouterr().out


def test_the_terminal_report_is_printed_again(place: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["run", "cases.py:good", "--quiet", "--json", "a.json"]) == 0
    first = capsys.readouterr().out
    assert main(["report", "a.json"]) == 0
    assert capsys.readouterr().out == first


def test_of_one_case_the_newest_result_counts(place: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["report", "new.json", "old.json", "--summary", "--html", "page.html"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("made: parity holds\n")
    assert "earlier, 2026-01-01T00:00:00+00:00, commit ab12ab12ab12: did not hold: parts at blocks.1.norm" in out
    assert list(Page((place / "page.html").read_text()).table("case")) == ["made"]
    assert main(["report", "old.json"]) == 1


def test_several_files_are_one_report(place: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["report", "new.json", "other.json", "--html", "page.html"]) == 1
    assert "1 of 2 cases hold; other [x] does not" in capsys.readouterr().out
    assert list(Page((place / "page.html").read_text()).table("case")) == ["other [x]", "made"]


def test_the_schema_is_printed(capsys: pytest.CaptureFixture) -> None:
    assert main(["report", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == records.schema()


@pytest.mark.parametrize(("arguments", "words"), [
    (["report"], "report needs at least one JSON file"),
    (["report", "missing.json"], "missing.json cannot be read: No such file"),
    (["report", "cases.py"], "cases.py: expected a report of schema parity-report/1, found no JSON"),
    (["report", "new.json", "wrong.json"], "wrong.json: cases[0]: expected an object (Result), found 3"),
    (["report", "empty.json"], "empty.json: expected at least one case, found none"),
    (["mutate"], "the following arguments are required: CASE"),
    (["mutate", "cases.py:good"], "case 'good' has no injectors: give it some by Case(injectors=...)"),
    (["mutate", "cases.py:good", "cases.py:good"], "cases to mutate need names of their own, found good, good"),
    (["mutate", "cases.py:good", "--json", "no/such/file.json"], "--json no/such/file.json: the folder no/such does not exist"),
    (["report", "bytes.json"], "bytes.json: expected JSON in UTF-8"),
    (["report", "new.json", "--html", "no/such/page.html"], "--html no/such/page.html: the folder no/such does not exist"),
    (["report", "new.json", "--html", "."], "--html . cannot be written: Is a directory"),
    (["run", "cases.py:good", "--html", "no/such/page.html"], "--html no/such/page.html: the folder no/such does not exist"),
])
def test_user_errors_are_one_line_and_exit_2(place: Path, capsys: pytest.CaptureFixture, arguments: list[str], words: str) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("parity: ") and error.count("\n") == 1


BUGS = CASES + '''
from parity_tests.harness import Injector

def scaled(by, **more):
    return Injector(f"w x {by}", "", weights=lambda weights, fresh: {"w": by * weights["w"]}, **more)

mutated = Case("mutated", engine, engine, inputs, trajectory=None, injectors=(scaled(1.5, families=("setting",)), scaled(2.0, unseen=True)))
survived = Case("survived", engine, engine, inputs, trajectory=None, injectors=(scaled(1.0 + 1e-13), scaled(3.0)))
wrong = Case("wrong", engine, lambda: engine(1e-6), inputs, trajectory=None, injectors=(scaled(3.0),))
elsewhere = Case("elsewhere", engine, engine, inputs, trajectory=None, injectors=(Injector("w x 2", "inside", weights=scaled(2.0).weights),))
'''


def test_bugs_that_are_killed(place: Path, capsys: pytest.CaptureFixture) -> None:
    (place / "bugs.py").write_text(BUGS)
    assert main(["mutate", "bugs.py:mutated", "--json", "few.json"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("injected bugs: mutated\n") and "w x 1.5" in out and "w x 2.0" not in out
    assert "killed 1 of 1, located 1 of 1, named right 0 of 1; cosine >= 0.99 alone notices 0 of 1" in out
    assert main(["mutate", "bugs.py:mutated", "--unseen", "--json", "all.json", "--html", "all.html"]) == 0
    seen, apart = capsys.readouterr().out.split("not seen while tuning\n")
    assert "w x 1.5" in seen and "w x 2.0" not in seen and "w x 2.0" in apart
    found = report.mutations_from_json((place / "all.json").read_text())["mutated"]
    assert [(item.name, item.held, item.unseen, item.named) for item in found] == [("w x 1.5", True, False, False), ("w x 2.0", True, True, None)]
    assert json.loads((place / "all.json").read_text())["held"] is True
    assert main(["run", "bugs.py:mutated", "--mutations", "--quiet", "--summary"]) == 0
    assert capsys.readouterr().out.count("killed 1 of 1") == 2
    assert main(["report", "all.json", "--html", "again.html"]) == 0
    assert (place / "again.html").read_text().replace("Parity report", "Injected bugs") == (place / "all.html").read_text()


@pytest.mark.parametrize(("case", "words"), [
    ("survived", "killed 1 of 2, located 1 of 2"), ("elsewhere", "killed 1 of 1, located 0 of 1"),
])
def test_a_survivor_and_a_wrong_place_are_failures(place: Path, capsys: pytest.CaptureFixture, case: str, words: str) -> None:
    (place / "bugs.py").write_text(BUGS)
    assert main(["mutate", f"bugs.py:{case}", "--json", "found.json"]) == 1
    assert words in capsys.readouterr().out and json.loads((place / "found.json").read_text())["held"] is False


def test_bugs_in_a_candidate_that_is_wrong_without_them_are_refused(place: Path, capsys: pytest.CaptureFixture) -> None:
    (place / "bugs.py").write_text(BUGS)
    assert main(["mutate", "bugs.py:wrong"]) == 2
    assert "case 'wrong' does not hold without a mutation: parts at the whole model" in capsys.readouterr().err
