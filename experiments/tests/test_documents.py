"""The documents task: texts of exactly the lengths asked for, a row for each, one line for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import runtime
from experiments import cli
from experiments.tasks import documents
from experiments.tests.tiny_teacher import make_teacher


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    runtime.LAM.from_teacher(make_teacher(folder / "teacher"), backend="torch").save(folder / "model")
    return folder / "model"


def test_texts_have_the_tokens_asked_for(saved: Path) -> None:
    tokenizer = runtime.LAM.from_pretrained(saved, backend="torch").tokenizer
    for length, text in zip((7, 1031), documents.texts(tokenizer, (7, 1031)), strict=True):
        assert abs(len(tokenizer.encode(text).ids) - length) <= 1  # cut inside a word, its last piece may become another


def test_command_writes_a_row_for_each_length(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", "task=documents", f"model={saved}", "backend=torch", "lengths=[201,33]", f"run_dir={tmp_path / 'run'}"]
    assert cli.main(arguments) == 0
    rows = json.loads((tmp_path / "run" / "result.json").read_text())["documents"]
    assert [row["tokens"] for row in rows] == [33, 201] and all(row["seconds"] > 0 for row in rows)
    assert rows[0]["tokens_per_second"] == pytest.approx(33 / rows[0]["seconds"])
    assert "201" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lengths=[40000]"], "lengths: the model takes at most 32768 tokens, 40000 were asked for"),
        (["model=teacher"], "model: task=documents needs the folder of a saved LAM"), (["lengths=[]"], "lengths must hold numbers of tokens"),
        (["model=nowhere"], "model: no folder nowhere"),
    ],
)
def test_wrong_input_is_one_line(
    overrides: list[str], message: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if any(override.startswith("model=") for override in overrides) else [f"model={saved}"]
    arguments = ["evaluate", "task=documents", *model, "backend=torch", f"run_dir={tmp_path / 'run'}", *overrides]
    try:
        status = cli.main(arguments)
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err.strip()
    assert status == 2 and message in error and len(error.splitlines()) == 1
