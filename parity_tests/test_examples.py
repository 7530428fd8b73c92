"""The examples over other people's implementations: short, and they say what they are there to say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("flax")

from parity_tests.harness import run_case
from parity_tests.harness.loading import load

EXAMPLES = Path(__file__).parent / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_at_most_40_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 40


def test_the_gru_cell_of_nnx_has_a_bias_less() -> None:
    result = run_case(load(f"{EXAMPLES / 'gru_cell.py'}:upstream")[0])
    assert not result.held and result.sentence.startswith(
        "parts at the whole model: 1 problem with the weights:\n  missing bias: bias_hh (21,) of the reference has no place in the candidate")


def test_the_gru_cell_with_that_bias_holds() -> None:
    result = run_case(load(f"{EXAMPLES / 'gru_cell.py'}:repaired")[0], tiers=["conversion", "free", "gradients", "observability"])
    assert result.held, result.sentence
    assert not any(tier.skipped for tier in result.tiers)


def test_griffin_holds_on_whole_documents() -> None:
    pytest.importorskip("recurrentgemma")
    case = replace(load(f"{EXAMPLES / 'griffin.py'}:whole")[0], regimes=("as is",), dtypes=("float64",))
    result = run_case(case, tiers=["conversion", "coverage", "forced", "free"])
    assert result.held, result.sentence
    assert "blocks.1.attention_block" in {check.where for check in result.checks if check.tier == "forced"}


def test_the_caches_of_griffin_part_after_a_reset() -> None:
    """torch's convolution masks its input in place, and what it keeps of it for the next step is masked as well."""
    pytest.importorskip("recurrentgemma")
    result = run_case(replace(load(f"{EXAMPLES / 'griffin.py'}:resets")[0], regimes=("as is",)), tiers=["forced"])
    conv = "blocks.0.recurrent_block.conv_1d"
    assert result.sentence.startswith(f"parts at {conv} (1): relative L2 ")
    wrong = {(check.where, check.leaf) for check in result.checks if not check.held}
    assert wrong == {(conv, "1"), ("blocks.0.recurrent_block", "1.conv1d_state"), ("blocks.0", "1.conv1d_state")}
    assert f"{conv}: the reference writes to its argument kwargs.x, so whatever reads that later sees it changed" in result.notes
