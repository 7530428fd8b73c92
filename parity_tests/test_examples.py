"""The examples over other people's implementations: short, and they say what they are there to say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("flax")

from parity_tests.harness import formats, golden, run_case
from parity_tests.harness.case import Case
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


FLA = {"delta": "fla_delta_rule.npz", "rwkv": "fla_rwkv6.npz"}
OURS = [(name, place) for name in FLA for place in range(5)]
CHEAP = ["free", "rounding", "gradients", "splits"]  # what a port of an op can be asked that compiles nothing; JAX is asked less


def fla(name: str, place: int = 0) -> Case:
    """The case of one implementation of an op against flash-linear-attention's."""
    return load(f"{EXAMPLES / 'fla_ops.py'}:CASES")[place + 5 * (name == "rwkv")]


@pytest.mark.parametrize(("name", "place"), OURS, ids=[fla(name, place).name.replace(" ", "_") for name, place in OURS])
def test_our_ops_compute_what_flash_linear_attention_computes(name: str, place: int) -> None:
    """Against files that its own code wrote, fla-core 0.6.0:

    parity golden parity_tests/examples/fla_ops.py:delta --out parity_tests/golden/fla_delta_rule.npz --regime "length 2"
    parity golden parity_tests/examples/fla_ops.py:rwkv --out parity_tests/golden/fla_rwkv6.npz --regime "length 2"
    """
    case = fla(name, place)
    jax = "JAX" in case.name
    result = golden.check(EXAMPLES.parent / "golden" / FLA[name], case).run(["free", "gradients"] if jax else CHEAP)
    assert result.held, result.sentence
    done = {tier.name for tier in result.tiers if not tier.skipped}
    assert done == {"free", "gradients"} if jax else done >= {"free", "rounding", "splits"} and ("gradients" in done) == ("torch" in case.name)


@pytest.mark.parametrize("name", FLA)
def test_a_value_of_flash_linear_attention_that_is_changed_is_noticed(name: str, tmp_path: Path) -> None:
    arrays = formats.load(EXAMPLES.parent / "golden" / FLA[name])
    formats.save(tmp_path / "f.npz", {**arrays, "carried state/outputs/0": arrays["carried state/outputs/0"] * (1.0 + 1e-11)})
    assert "relative L2 1e-11" in golden.check(tmp_path / "f.npz", fla(name, 4)).run(["free"]).sentence
    assert np.all(arrays["as is/inputs/v"] != 0.0)


@pytest.mark.parametrize("name", FLA)
def test_the_files_are_what_flash_linear_attention_computes(name: str) -> None:
    pytest.importorskip("fla")
    result = golden.check(EXAMPLES.parent / "golden" / FLA[name], fla(name), side="reference").run(CHEAP)
    assert result.held and not any(tier.skipped for tier in result.tiers), result.sentence
