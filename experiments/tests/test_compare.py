"""Comparing curves: within the band, outside it, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import cli, compare
from experiments.errors import RunError

A = {step: 3.0 - 0.01 * step for step in range(1, 40)}


def shifted(size: float) -> dict[int, float]:
    return {step: loss + size * step * (-1) ** step for step, loss in A.items()}


def test_within_and_outside_the_band() -> None:
    band = [shifted(1e-5)]
    inside, outside = compare.compare(A, shifted(3.9e-5), band), compare.compare(A, shifted(4.1e-5), band)
    assert inside.within and not outside.within and outside.worst_ratio == pytest.approx(4.1, rel=1e-6)  # at the last step: none is later
    assert (inside.largest_difference, inside.at_step) == (pytest.approx(39 * 3.9e-5), 39)


def test_band_may_be_read_ten_steps_later_and_no_more() -> None:
    band = [{step: loss + (1e-3 if step >= 25 else 1e-6) for step, loss in A.items()}]
    assert compare.compare(A, {**A, 15: A[15] + 3e-3}, band).within
    assert not compare.compare(A, {**A, 14: A[14] + 3e-3}, band).within


def test_band_is_the_one_at_the_step() -> None:
    """A difference from the first step on is not excused by a band that is wide at the end."""
    early = {**A, 2: A[2] + 1e-2}
    assert not compare.compare(A, early, [shifted(1e-4)]).within
    assert compare.compare(A, {**A, 39: A[39] + 1e-2}, [shifted(1e-4)]).within


def test_agreement_to_the_bit_needs_no_band() -> None:
    same = compare.compare(A, dict(A), [dict(A)])
    assert same.within and same.worst_ratio == 0.0
    assert compare.compare(A, A).within is None


def test_no_common_step() -> None:
    with pytest.raises(RunError, match="no step was logged by all runs"):
        compare.compare(A, {100: 1.0})


@pytest.mark.usefixtures("drawn")
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, losses in (("a", A), ("b", shifted(2e-5)), ("c", shifted(1e-5)), ("far", shifted(1e-3))):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": step, "train/loss": loss}) for step, loss in losses.items()]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 41, "tr')
    a, b, c, far = (str(tmp_path / name) for name in ("a", "b", "c", "far"))
    assert cli.main(["compare", a, b, "--band", c, "--output", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["within"] is True and (tmp_path / "out" / "compare.svg").exists()
    assert cli.main(["compare", a, far, "--band", c]) == 1
    assert "NO, above" in capsys.readouterr().out
    assert cli.main(["compare", a, b]) == 0
    written = capsys.readouterr().out
    assert "no band" in written and "nan" not in written.split()
    assert cli.main(["compare", a, str(tmp_path / "nothing")]) == 2
    assert "holds no metrics.jsonl" in capsys.readouterr().err
