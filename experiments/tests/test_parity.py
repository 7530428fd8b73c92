"""`groundwave parity`: batteries of cases, precisions and seeds, what each logs, the pages, and history; on functions, which take milliseconds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.parity_schema import PRECISIONS, ParityConfig
from conf.schema import TrackerConfig
from experiments import cli, parity, parity_board, trackers
from parity_tests.harness import report
from parity_tests.harness.case import DTYPES
from parity_tests.harness.tests import synthetic

CASES = '''
import numpy as np
from parity_tests.harness import Case, Engine

W = {"w": np.ones((5, 3))}

def engine(bug=0.0):
    return Engine(lambda arrays: lambda x: np.tanh(x @ arrays["w"] + bug), W)

def inputs(seed, batch=2, length=7):
    return {"x": np.random.default_rng(seed).normal(size=(batch, length, 5))}

good = Case("good", engine, engine, inputs, trajectory=None)
bad = Case("bad / case", engine, lambda: engine(1e-6), inputs, trajectory=None)
both = [good, bad]
'''


class Fake(trackers.Tracker):
    """Keeps what is logged."""

    made: list[Fake] = []  # noqa: RUF012

    def __init__(self, settings: Mapping[str, Any], name: str, group: str | None, tags: Sequence[str]) -> None:
        self.settings, self.name, self.group, self.tags = dict(settings), name, group, list(tags)
        self.lines: list[tuple[int, dict[str, Any]]] = []
        self.tables: dict[str, tuple[list[str], list[list[Any]]]] = {}
        self.pages: dict[str, str] = {}
        self.images: list[str] = []
        self.artifacts: list[tuple[str, str]] = []
        self.values: dict[str, Any] = {}
        self.steps: list[int] = []
        self.ended = 0
        Fake.made.append(self)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self.lines.append((step, dict(values)))
        self.steps.append(step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        assert all(len(row) == len(columns) for row in rows)
        self.tables[name] = (list(columns), [list(row) for row in rows])
        self.steps.append(step)

    def image(self, name: str, path: Path, step: int) -> None:
        assert path.is_file()
        self.images.append(name)

    def html(self, name: str, page: str, step: int) -> None:
        self.pages[name] = page
        self.steps.append(step)

    def artifact(self, name: str, path: Path, kind: str, metadata: Mapping[str, Any]) -> None:
        assert path.is_file()
        self.artifacts.append((name, kind))

    def summary(self, values: Mapping[str, Any]) -> None:
        self.values |= values

    def finish(self) -> None:
        self.ended += 1


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cases.py").write_text(CASES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Fake, "made", [])
    monkeypatch.setattr(trackers, "make", lambda config, run_dir, *, settings, name, group, tags, run_id: Fake(settings, name, group, tags))
    return tmp_path


def test_every_case_precision_and_seed_is_a_battery_and_a_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["parity", "source=cases.py:both", "case=all", "dtype=[float32,float64]", "seed=[3,5]", "run_dir=out"])
    assert status == 1  # bad does not hold
    names = [f"{name}-{dtype}-seed{seed}" for name in ("good", "bad_case") for dtype in ("float32", "float64") for seed in (3, 5)]
    assert [run.name for run in Fake.made] == names and all(run.group == "out" and run.ended == 1 for run in Fake.made)
    assert all((place / "out" / name / "parity.json").is_file() for name in names)
    page = (place / "out" / "parity.html").read_text()
    assert "4 of 8 cases hold" in page and "bad / case, seed 5, float32" in page and page.index("bad / case, seed 3") < page.index("good, seed 3")
    assert "4 of 8 cases hold; bad / case, seed 3, float32 does not" in " ".join(capsys.readouterr().out.split())
    good, bad = Fake.made[0], Fake.made[4]
    assert good.tags == ["parity", "good", "float32", "held"] and bad.tags[-1] == "failed" and bad.settings["seed"] == 3
    assert good.values["held"] is True and bad.values["held"] is False and bad.values["sentence"].startswith("parts at the whole model")
    assert bad.artifacts == [("parity-bad_case-float32-seed3", "parity-report")]
    assert "parts at the whole model" in bad.pages["report"] and bad.tables["failures"][1]
    assert json.loads((place / "out" / names[0] / "parity.json").read_text())["cases"][0]["meta"]["seed"] == 3


def test_a_sweep_runs_on_after_a_failure_and_ends_with_one_page(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["parity", "-m", "case=cases.py:bad,cases.py:good", "tiers=[free]", "run_dir=swept"]) == 1
    assert [run.group for run in Fake.made] == ["swept", "swept"]
    page = (place / "swept" / "parity.html").read_text()
    assert "1 of 2 cases hold" in page and (place / "swept" / "1" / "parity.html").is_file()


def test_earlier_runs_are_the_history(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reports of the same case, precision and seed, each once; one that cannot be read is said, another seed is another question."""
    arguments = ["parity", "case=cases.py:good", "seed=3"]
    assert cli.main([*arguments, "run_dir=runs/first"]) == 0
    path = place / "runs" / "first" / "good-float32-seed3" / "parity.json"
    (old,) = report.from_json(path.read_text())
    path.write_text(report.to_json([replace(old, meta={**old.meta, "commit": "0123456789" * 4, "time": "2020-01-01T00:00:00+00:00"})]))
    assert cli.main(["parity", "case=cases.py:good", "seed=4", "run_dir=runs/another"]) == 0
    (place / "runs" / "broken.json").write_text('{"schema": "parity-report/1", "cases": [3]}')
    (place / "runs" / "copy.json").write_text(path.read_text())
    assert cli.main([*arguments, "run_dir=runs/second"]) == 0
    assert "left out of the history: runs/broken.json: cases[0]: expected an object" in capsys.readouterr().err
    run = Fake.made[-1]
    columns, rows = run.tables["history"]
    assert columns[:3] == ["time", "commit", "held"] and "free" in columns and len(rows) == 2
    assert rows[0][:3] == ["2020-01-01T00:00:00+00:00", "0123456789" * 4, True] and "history_plot" in run.images
    assert "012345678901" in run.pages["report"] and "Earlier results" in (place / "runs" / "second" / "parity.html").read_text()
    assert len(Fake.made[0].tables["history"][1]) == 1 and "history_plot" not in Fake.made[0].images
    assert parity.earlier(ParityConfig(history=None), place) == [] and parity.earlier(ParityConfig(history="nowhere"), place) == []


def test_the_dashboard_holds_the_numbers_of_the_result(place: Path) -> None:
    made = synthetic.result("made", wrong="blocks.3.norm")
    run = Fake({}, "made", None, [])
    parity_board.log(run, made, [], place / "pictures")
    columns, rows = run.tables["layers"]
    worst = {c.where: c for c in sorted((c for c in made.checks if c.tier == "forced"), key=lambda c: c.value)}
    assert [row[1] for row in rows] == [*(f"blocks.{place}.norm" for place in range(5)), "(model)"]
    for row in rows[:5]:
        named = dict(zip(columns, row, strict=True))
        assert named["forced"] == worst[row[1]].value and named["forced allowed"] == 1e-12 and named["held"] is (row[1] != "blocks.3.norm")
        low = max((c for c in made.checks if c.tier == "rounding" and c.where == row[1] and c.dtype == "bfloat16"), key=lambda c: c.value / c.allowed)
        assert (named["bfloat16"], named["bfloat16 own"]) == (low.value, low.own_error)
    steps = dict(run.lines)
    assert steps[2]["depth/forced_log10"] == math.log10(rows[2][3]) and "depth/forced_log10" not in steps[5]
    assert steps[5]["depth/free_log10"] == math.log10(max(rows[5][5], 1e-17))
    line = next(item for item in made.series if item.kind == "training")
    assert [steps[place]["training/reference"] for place in range(50)] == line.reference and "time/float32_0_own_log10" in steps[62]
    assert run.steps == sorted(run.steps) and run.images == ["error_against_depth"]  # W&B refuses steps that go back
    assert run.values["worst/forced"] == worst["blocks.3.norm"].value and run.values["failed"] == sum(not c.held for c in made.checks)
    assert run.values["worst_of_allowed/forced"] == pytest.approx(run.values["worst/forced"] / 1e-12) and math.isfinite(run.values["least_cosine"])
    assert run.tables["failures"][1][0][:2] == ["forced", "blocks.3.norm"] and len(run.tables["tiers"][1]) == len(made.tiers)


def test_wandb_takes_a_page(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    tracker = trackers.make(TrackerConfig(mode="disabled"), tmp_path, settings={}, name="a", group=None, tags=[], run_id=None)
    tracker.html("report", "<!doctype html><title>a</title>", 1)
    tracker.finish()
    assert not [item for item in recwarn if "left out from here on" in str(item.message)]


def test_yaml_and_schema_say_the_same_defaults() -> None:
    composed = cli.validate(cli.composed([], "parity"), "parity")
    assert replace(composed, tracker=TrackerConfig()) == ParityConfig() and set(PRECISIONS) == set(DTYPES)
    listed = cli.validate(cli.composed(["case=[lam,deltanet_lm]", "seed=[0,2]", "dtype=bfloat16"], "parity"), "parity")
    assert (listed.cases, listed.seeds, listed.dtypes) == (["lam", "deltanet_lm"], [0, 2], ["bfloat16"])


WRONG = {
    "unknown key": (["cases=good"], "cases"),
    "unknown added key": (["+cases=good"], "cases: unknown field"),
    "no case": (["case=[]"], "case must be one or several names of cases, found []"),
    "case twice": (["case=[a,a]"], "case must name each of its values once"),
    "all and another": (["case=[all,good]"], "case must be 'all' or names, not both"),
    "unknown case": (["case=better"], "case: cases.py:both has no 'better'; expected all, file.py:name, or of good, bad / case"),
    "missing file": (["case=nowhere.py:good"], "case: nowhere.py does not exist"),
    "missing name": (["case=cases.py:none"], "case: cases.py has no 'none'"),
    "missing source": (["source=nowhere.py:both"], "case: nowhere.py does not exist"),
    "source without a name": (["source=cases"], "source must be module:name or file.py:name, found 'cases'"),
    "unknown precision": (["dtype=int8"], "dtype must be of float64, float32, bfloat16, float16, found 'int8'"),
    "wrong seed": (["seed=-1"], "seed must be one or several whole numbers of at least 0, found -1"),
    "seed of another type": (["seed=[0,x]"], "seed must be one or several whole numbers of at least 0, found [0, 'x']"),
    "unknown tier": (["tiers=[backward]"], "tiers: unknown tier 'backward'; expected conversion, coverage"),
    "unknown regime": (["regimes=[as was]"], "regimes: unknown regime 'as was'"),
    "wrong threads": (["threads=0"], "threads must be an integer of at least 1"),
    "wrong number of files": (["history_files=0"], "history_files must be an integer of at least 1"),
    "sweep without -m": (["seed=0,1"], "add -m"),
    "one bad job of a sweep": (["-m", "case=good,better"], "has no 'better'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_overrides_are_one_line(case: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = WRONG[case]
    before = [] if any("source=" in argument for argument in arguments) else ["source=cases.py:both"]
    assert cli.main(["parity", *arguments, *before, f"output_dir={place}/runs"]) == 2
    written = capsys.readouterr()
    lines = written.err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0] and "Traceback" not in written.err and not written.out, written
    assert not (place / "runs").exists()
