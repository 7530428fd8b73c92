"""Errors over time steps and provenance: what a report draws along an axis, and where it says that it comes from."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from parity_tests.harness import Case, Engine, StateProtocol, provenance, run_case
from parity_tests.harness.battery import Result
from parity_tests.harness.series import POINTS, TIME, over_time, steps

PLACE = ("blocks.0", "as is", "float64")


def inputs(seed: int, batch: int | None = None, length: int | None = None) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).normal(size=(batch or 3, length or 7, 5))}


def engine(late: float = 0.0) -> Engine:
    """y = x w, with an error in the last time step."""
    def build(arrays: dict[str, np.ndarray]) -> object:
        def apply(x: np.ndarray) -> np.ndarray:
            y = x @ arrays["w"]
            return np.concatenate([y[:, :-1], y[:, -1:] * (1.0 + late)], axis=1)

        return apply

    return Engine(build, {"w": np.ones((5, 11))})


CASE = Case("late", engine, lambda: engine(1e-3), inputs, trajectory=None)


def test_the_error_stands_at_the_step_that_has_it() -> None:
    expected = np.random.default_rng(0).normal(size=(3, 7, 5))
    found = expected.copy()
    found[:, 4] += 0.25
    (line,) = over_time(PLACE, (1, 7), {"y": expected}, {"y": found})
    wanted = 0.25 / np.sqrt(np.mean(expected**2))
    assert (line.where, line.regime, line.dtype, line.leaf, line.stride) == ("blocks.0", "as is", "float64", "y", 1)
    assert line.candidate == pytest.approx([0.0] * 4 + [wanted] + [0.0] * 2, rel=1e-3) and line.reference == []
    (line,) = over_time(PLACE, (0, 3), expected, found, expected * 1.5)
    assert len(line.candidate) == len(line.reference) == 3 and min(line.reference) > 0.0


def test_many_steps_keep_their_peak() -> None:
    expected = np.ones((2, 3 * POINTS - 1, 3))
    found = expected.copy()
    found[:, 100] += 7.0
    (line,) = over_time(PLACE, (1, 3 * POINTS - 1), expected, found)
    assert len(line.candidate) == POINTS and line.stride == 3 and line.candidate[100 // 3] == 7.0 and sum(line.candidate) == 7.0


@pytest.mark.parametrize("other", [{}, {"y": np.ones((3, 6, 5))}, {"z": np.ones((3, 7, 5))}], ids=["missing", "misshapen", "renamed"])
def test_leaves_that_do_not_compare_are_left_to_the_checks(other: dict) -> None:
    assert over_time(PLACE, (1, 7), {"y": np.ones((3, 7, 5))}, other) == []


def test_only_floats_with_the_time_axis_and_channels_are_followed() -> None:
    outputs = {"ids": np.ones((3, 7, 5), int), "flat": np.ones((3, 7)), "state": np.ones((3, 11, 5)), "y": np.ones((3, 7, 5))}
    assert [line.leaf for line in over_time(PLACE, (1, 7), outputs, outputs)] == ["y"]
    assert over_time(PLACE, None, outputs, outputs) == []
    assert steps(CASE, inputs(0)) == (1, 7) and steps(CASE, {"x": np.ones(7)}) is None and steps(CASE, {"x": np.ones((7, 1))}) is None
    first = replace(CASE, states=StateProtocol(axis=0, along=("x",)))
    assert steps(first, {"mask": np.ones((2, 2)), "x": np.ones((13, 3, 5))}) == (0, 13)


@pytest.fixture(scope="module")
def late() -> Result:
    return run_case(CASE)


def test_a_battery_follows_the_plain_run_and_the_longest(late: Result) -> None:
    assert not late.held
    lines = {(line.regime, line.dtype): line for line in late.series}
    assert set(lines) == {(regime, dtype) for regime in ("as is", "length 100") for dtype in ("float64", "float32")}
    line = lines["as is", "float64"]
    assert line.kind == TIME and line.candidate[:-1] == [0.0] * 6 and line.candidate[-1] > 1e-4 and not line.reference
    low = lines["length 100", "float32"]
    assert len(low.candidate) == len(low.reference) == 100 and max(low.candidate) == low.candidate[-1] > 100.0 * max(low.reference)


def test_a_result_says_where_it_comes_from(late: Result) -> None:
    assert late.meta["seed"] == 0 and late.meta["dtypes"] == ["float64", "float32"] and "length 100" in late.meta["regimes"]
    assert late.meta["time"].endswith("+00:00")


def test_the_commit_is_that_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    (tmp_path / "repository").mkdir()

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.invalid")
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path / "repository", check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "repository" / "a.py").write_text("a = 1\n")
    git("add", "a.py")
    git("commit", "-q", "-m", "first")
    provenance.commit.cache_clear()
    try:
        assert provenance.commit(tmp_path / "repository") == git("rev-parse", "HEAD")
        provenance.commit.cache_clear()
        (tmp_path / "repository" / "untracked").write_text("")
        (tmp_path / "repository" / "a.py").write_text("a = 2\n")
        assert provenance.commit(tmp_path / "repository") == git("rev-parse", "HEAD") + "+"
        assert provenance.commit(tmp_path) == "" and provenance.commit(tmp_path / "nowhere") == ""
    finally:
        provenance.commit.cache_clear()
