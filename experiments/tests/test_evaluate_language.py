"""`groundwave evaluate` on a run: three tasks, what they leave, their exit status; and the page and the list made of runs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments import cli, opened, page, report, review, train
from experiments.errors import RunError
from experiments.folder import plain
from experiments.opened import configuration, open_model
from experiments.tests.test_train import smoke


@pytest.fixture(scope="module")
def runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two runs of three steps from different seeds, each with a W&B folder that only looks like one."""
    root = tmp_path_factory.mktemp("runs")
    for name, seed in (("one", 0), ("two", 1)):
        config = replace(smoke(text, "model.depth=1", f"seed={seed}"), long_context=name == "one")
        train.run(config, root / name)
        place = root / name / "wandb" / f"offline-run-20260101_00000{seed}-{name}"
        place.mkdir(parents=True)
        (place / f"run-{name}.wandb").write_bytes(b"")
        (root / name / "wandb" / "latest-run").symlink_to(place.name)
    return {name: root / name for name in ("one", "two")}


def evaluate(task: str, model: Path, out: Path, *more: str) -> tuple[int, dict[str, Any]]:
    status = cli.main(["evaluate", f"task={task}", f"model={model}", f"run_dir={out}", *more])
    return status, json.loads((out / "result.json").read_text())


def test_validate_and_checklist_of_a_run(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs["one"]
    status, found = evaluate("validate", run, tmp_path / "validate", "tokens=210", "puzzles=6")
    summary = json.loads((run / "summary.json").read_text())
    assert status == 0 and found["validate"]["perplexity"]["tokens"] == 210 and found["validate"]["reasoning"]["recall"]["chance"] == 1 / 8
    assert summary["validate/bits_per_byte"] == summary["validation_bits_per_byte"]
    assert json.loads((run / "evaluation" / "validate.json").read_text())["rows"] == found["rows"]
    status, found = evaluate("checklist", run / "golden", tmp_path / "checklist", "repeats=10")
    assert status == 0 and found["backend"] == "cython" and len(found["checklist"]) == 8
    assert "reproducible" in capsys.readouterr().out and (run / "evaluation" / "checklist.json").is_file()


@pytest.mark.usefixtures("drawn")
def test_long_context_of_a_checkpoint_and_status(runs: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """A model of three steps uses no context, so the task says so and ends with 1; its engine's memory is flat."""
    checkpoint = runs["one"] / "checkpoints" / "step-00000003"
    status, found = evaluate("long_context", checkpoint / "model", tmp_path / "long", "backend=torch", "lengths=[90,360]", f"path={text}")
    assert status == 1 and [row["tokens"] for row in found["long_context"]] == [90, 360] and found["backend"] == "torch"
    held = {verdict["name"]: verdict["held"] for verdict in found["verdicts"]}
    assert held["memory is flat"] and held["states are healthy"] and not held["context is used"]
    assert (tmp_path / "long" / "long_context.svg").is_file() and set(found["engine_megabytes"]) == {"90", "360"}


def test_a_model_without_a_run_is_measured(runs: dict[str, Path], text: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    for path in (runs["one"] / "checkpoints" / "step-00000003" / "model").iterdir():
        (alone / path.name).write_bytes(path.read_bytes())
    found = open_model(str(alone), text=str(text))
    assert found.run is None and found.config.model.dim == 12 and len(found.held_out) > 300
    assert found.load("cython").backend == "cython"


def test_configuration_of_another_version_is_read(text: Path) -> None:
    config = smoke(text, "model.dt_bias=[0.5]")
    fields = plain(config)
    del fields["monitors"], fields["evaluation"]["context_shift"]
    fields["training"]["gone"] = 3
    assert configuration(fields) == replace(config, run_dir=None)
    with pytest.raises(RunError, match="the configuration of its run cannot be read: 'architecture'"):
        configuration({})


WRONG = {
    "no model": (["task=checklist"], "model must be the folder of a run or of a checkpoint, found None; give model=FOLDER"),
    "no folder": (["task=validate", "model=nowhere"], "model: no folder nowhere; expected that of a run"),
    "no run": (["task=validate", "model=EMPTY"], "holds neither checkpoints/, checkpoint.json nor config.json"),
    "a backend that does not train": (["task=validate", "model=RUN", "backend=cython"], "backend must be one of 'torch', 'torch_compiled', 'jax'"),
    "a backend of nothing": (["task=checklist", "model=RUN", "backend=onnx"], "backend must be one of 'torch', 'torch_compiled',"),
    "no text": (["task=long_context", "model=RUN", "path=nowhere"], "path: no file or folder nowhere"),
    "too long": (["task=long_context", "model=RUN", "lengths=[1000000]"], "evaluation.lengths: the held-out text has"),
    "lengths": (["task=long_context", "model=RUN", "lengths=[1]"], "lengths must hold numbers of tokens of at least 3, found [1]"),
    "task": (["task=validation", "model=RUN"], "task must be one of 'sts', 'documents', 'validate', 'checklist', 'long_context', found 'validation'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(case: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, message = WRONG[case]
    (tmp_path / "empty").mkdir()
    overrides = [each.replace("RUN", str(runs["one"])).replace("EMPTY", str(tmp_path / "empty")) for each in overrides]
    try:
        status = cli.main(["evaluate", *overrides, f"run_dir={tmp_path / 'out'}"])
    except SystemExit as stop:
        status = int(str(stop.code))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and message in line


def test_page_of_a_run_needs_nothing_else(runs: dict[str, Path]) -> None:
    """What training left of it, with a sample that would be markup if it were not escaped."""
    made = (runs["one"] / page.PAGE).read_text()
    assert "<script" not in made and not re.search(r"(src|href)=\"(?!#|data:)", made) and "Content-Security-Policy" in made
    for heading in ("Curves", "States and gates", "Events", "Long context", "Validation", "Samples", "Configuration"):
        assert re.search(rf"<h2[^>]*>{heading}</h2>", made), heading
    assert made.count("<svg viewBox=\"0 0 100 100\"") >= 12 and "model.ssm_dim" in made and "Machine and versions" in made
    run = page.read(runs["one"])
    run.sample, run.events = "<b>def</b>", [{"step": 7, "kind": "explosion", "level": "warning", "message": "loss 9 is above 3: back"}]
    made = page.page([run])
    assert "&lt;b&gt;def" in made and "<b>def" not in made and "1 x explosion" in made and "loss 9 is above 3: back" in made


def test_page_of_two_runs_lays_them_over_one_another(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "both.html"
    assert cli.main(["report", str(runs["one"]), str(runs["two"]), "--output", str(target)]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    made = target.read_text()
    assert "2 runs" in made and "Difference of the training loss" in made and "layer 0, two" in made
    differing = re.findall(r"<tr class=\"differs\"><td class=\"k\">([^<]+)</td>", made)
    assert "seed" in differing and "long_context" in differing and "model.dim" not in differing
    again = page.page([page.read(runs["one"]), page.read(runs["two"])])
    assert again == page.page([page.read(runs["one"]), page.read(runs["two"])])
    three = page.page([page.read(runs["one"], name) for name in "abc"])
    assert "mean over the layers" in three


def test_page_of_nothing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "holds no metrics.jsonl, so it is no run of groundwave train" in line


def test_review_lists_and_opens_every_run(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = runs["one"].parent
    assert cli.main(["review", str(root)]) == 0
    output = capsys.readouterr().out
    assert "2 W&B runs" in output and "grounded_mamba" in output and f"wandb leet {root / '.review' / 'wandb'}" in output
    links = sorted((root / ".review" / "wandb").iterdir())
    assert [link.name for link in links] == ["offline-run-20260101_000000-one", "offline-run-20260101_000001-two"]
    assert all(link.is_symlink() and next(link.glob("*.wandb")).is_file() for link in links)
    called: list[list[str]] = []
    monkeypatch.setattr(review.sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(review.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(review.subprocess, "run", lambda command, **_: called.append(command) or type("Done", (), {"returncode": 0}))
    assert cli.main(["review", str(root)]) == 0 and called[0][-2:] == ["leet", str(root / ".review" / "wandb")]
    assert len(review.logged([root])) == 2  # the links are no runs of their own
    monkeypatch.chdir(tmp_path)
    for arguments, message in ((["nowhere"], "review: no folder nowhere"), ([], "review: no W&B run below runs, multirun, outputs (none of them")):
        assert cli.main(["review", *arguments]) == 2 and message in capsys.readouterr().err


def test_numbers_as_shown() -> None:
    assert [page.number(value) for value in (3, 3.0, 12345.678, 0.000123456, True, None, "text")] == [
        "3", "3", "12346", "0.00012346", "True", "", "text"]
    assert report.finite(opened.finite({"a": float("nan")})) == {"a": None}
