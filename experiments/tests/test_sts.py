"""STS: the table is read as it stands or refused by line, and the correlations are those of the definition."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import runtime
from conf.distil_schema import TeacherConfig
from experiments import cli
from experiments.distillation.teacher import Teacher, embeddings, locate
from experiments.errors import RunError
from experiments.tasks import sts
from experiments.tests import tiny_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher.make_teacher(tmp_path_factory.mktemp("teacher"))


def status(arguments: list[str]) -> int | str | None:
    """Exit status of the command; errors that only a started job meets leave as SystemExit."""
    try:
        return cli.main(arguments)
    except SystemExit as left:
        return left.code


def table(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "pairs.csv"
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("header", ["", "sentence1,sentence2,score\n"])
def test_pairs_are_read(header: str, tmp_path: Path) -> None:
    pairs = sts.read_pairs(table(tmp_path, f'{header}"A cat, black.",A dog.,1.5\n\n"He said ""no"".",No.,4\n,"Two\nlines.",0.0\n'))
    assert pairs.first == ("A cat, black.", 'He said "no".', "") and pairs.second == ("A dog.", "No.", "Two\nlines.")
    assert pairs.scores.tolist() == [1.5, 4.0, 0.0]


WRONG = {
    "two columns": ("a b,c d,1\na b,2\n", r"line 2: expected 3 columns .*, found 2"),
    "four columns": ("a b,c, d,1\n", r"line 1: expected 3 columns .*, found 4"),
    "score with a letter": ("a,b,1\nc,d,2\ne,f,4.x\n", r"line 3: the score must be a finite number, found '4.x'"),
    "score that is a word": ("a,b,1\nc,d,high\n", r"line 2: the score must be a finite number, found 'high'"),
    "bad score in the first line": ("a,b,5.O\nc,d,2\n", r"line 1: the score must be a finite number, found '5.O'"),
    "nan": ("a,b,1\nc,d,nan\n", r"line 2: the score must be a finite number, found 'nan'"),
    "after a cell of two lines": ('"a\nb",b,1\nc,d,x\n', r"line 3: the score"),
    "one score": ("a,b,2\nc,d,2\n", r"at least two different scores, found 2 pairs"),
    "empty": ("", r"at least two different scores, found 0 pairs"),
    "open quote": ('a,b,1\n"c,d,2\n', r"not CSV"),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_tables_are_refused(case: str, tmp_path: Path) -> None:
    text, message = WRONG[case]
    with pytest.raises(RunError, match=message) as caught:
        sts.read_pairs(table(tmp_path, text))
    assert str(tmp_path / "pairs.csv") in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"evaluation\.sts: no file"):
        sts.read_pairs(tmp_path / "none.csv", "evaluation.sts")
    (tmp_path / "latin.csv").write_bytes(b"caf\xe9,b,1\n")
    with pytest.raises(RunError, match="not UTF-8 text: byte 0xe9 at offset 3"):
        sts.read_pairs(tmp_path / "latin.csv")
    with pytest.raises(RunError, match="cannot read"):
        sts.read_pairs(tmp_path)


def test_correlations_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(2)
    similarities, scores = rng.normal(size=37), np.round(rng.uniform(0, 5, size=37))  # rounding makes ties
    found = sts.correlate(similarities, scores)
    ranks = [stats.rankdata(values) for values in (similarities, scores)]
    for value, (x, y) in ((found.spearman, ranks), (found.pearson, (similarities, scores))):
        x, y = x - x.mean(), y - y.mean()
        # a sum of 37 products in float64, in another order: a few units of 1e-16
        assert abs(value - (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())) < 1e-13
    assert found.pairs == 37 and sts.correlate(np.arange(5.0) ** 3, np.arange(5.0)).spearman == pytest.approx(1.0, abs=1e-15)


def test_each_sentence_is_encoded_once_and_rows_go_to_their_pairs() -> None:
    vectors = {"a": [1.0, 0.0], "b": [0.0, 2.0], "c": [3.0, 3.0], "": [0.0, 0.0]}
    asked: list[list[str]] = []

    def encode(texts: list[str]) -> np.ndarray:
        asked.append(texts)
        return np.array([vectors[text] for text in texts], dtype=np.float32)

    pairs = sts.Pairs(("a", "b", "c", "a"), ("a", "c", "a", ""), np.array([5.0, 3.0, 4.0, 0.0]))
    found = sts.evaluate(encode, pairs)
    assert asked == [["a", "b", "c", ""]]
    expected = np.array([1.0, np.sqrt(0.5), np.sqrt(0.5), 0.0])
    assert found == sts.correlate(sts.cosines(np.array([[1, 0], [0, 2], [3, 3], [1, 0]]), np.array([[1, 0], [3, 3], [1, 0], [0, 0]])), pairs.scores)
    assert found.pearson == pytest.approx(stats.pearsonr(expected, pairs.scores).statistic, abs=1e-12)  # rounding of four cosines


def test_command_scores_teacher_and_saved_student(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_teacher.make_pairs(tmp_path / "pairs.csv")
    pairs = sts.read_pairs(path)
    student = runtime.LAM.from_teacher(teacher, backend="torch", seed=3)
    student.save(tmp_path / "student")
    read = Teacher(locate(TeacherConfig(path=str(teacher), max_tokens=100)), 100)
    expected = {
        str(tmp_path / "student"): sts.evaluate(lambda texts: student.encode(texts), pairs),
        "teacher": sts.evaluate(lambda texts: embeddings(read.embed, read.ids(texts), read.padding, 7), pairs),
    }
    for name, scores in expected.items():
        shared = [f"path={path}", f"model={name}", "backend=torch", f"teacher.path={teacher}", "max_tokens=100", "teacher.max_tokens=100"]
        assert cli.main(["evaluate", "task=sts", *shared, f"run_dir={tmp_path}/out-{Path(name).name}"]) == 0
        found = json.loads((tmp_path / f"out-{Path(name).name}" / "result.json").read_text())
        # the same float32 embeddings in batches of another size: cosines move by rounding, 1e-7 each, and no rank with them
        assert abs(found["spearman"] - scores.spearman) < 1e-9 and abs(found["pearson"] - scores.pearson) < 1e-5 and found["pairs"] == 23
        assert f"{scores.spearman:.4f}" in capsys.readouterr().out
    assert expected["teacher"].spearman != expected[str(tmp_path / "student")].spearman


def test_wrong_input_of_the_command_is_one_line(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = tiny_teacher.make_pairs(tmp_path / "pairs.csv")
    bad = table(tmp_path / "..", "a,b,1\nc,d,much\n")
    cases = {
        ("model=teacher",): "path must name a CSV file",
        (f"path={pairs}",): "model must be the folder of a saved LAM or 'teacher', found None",
        (f"path={pairs}", "model=/nowhere"): "model: no folder /nowhere",
        (f"path={tmp_path}/none.csv", "model=teacher"): "path: no file",
        (f"path={bad}", "model=teacher"): "line 2: the score must be a finite number, found 'much'",
        (f"path={pairs}", "model=teacher", "task=dance"): "task must be one of 'sts', 'documents', 'validate',",
        (f"path={pairs}", "model=teacher", "backend=torch_compiled"): "backend must be one of",
        (f"path={pairs}", "model=teacher", "models=3"): "models",
        (f"path={pairs}", f"model={tmp_path / 'empty'}"): "model: ",
        (f"path={pairs}", "model=teacher", f"teacher.path={tmp_path / 'empty'}"): "holds no model.safetensors or pytorch_model.bin",
        (f"path={pairs}", "model=teacher", f"teacher.path={teacher}", "teacher.max_tokens=400"): "at most the 190 positions",
    }
    (tmp_path / "empty").mkdir()
    for arguments, message in cases.items():
        assert status(["evaluate", *arguments, f"output_dir={tmp_path}/runs"]) == 2, arguments
        written = capsys.readouterr()
        lines = written.err.strip().splitlines()
        assert len(lines) == 1 and message in lines[0], (arguments, written)
