"""Questions that make no sense get an answer in one line that says what was found; none passes in silence, none ends in a traceback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("flax")

import jax
import jax.numpy as jnp
import torch
from flax import nnx

from parity_tests.harness.adapters import opened
from parity_tests.harness.adapters.callable_adapter import Engine
from parity_tests.harness.battery import Battery, Result, run_case
from parity_tests.harness.case import Case, CaseError, StateProtocol
from parity_tests.harness.cli import main


class Layer(torch.nn.Module):
    """One linear layer, and `change` of what it gives."""

    def __init__(self, change: Callable = lambda y: y) -> None:
        super().__init__()
        self.proj, self.change = torch.nn.Linear(5, 7), change

    def forward(self, x: torch.Tensor) -> Any:
        return self.change(self.proj(x))


class Twin(nnx.Module):
    """The twin of `Layer`."""

    def __init__(self, change: Callable = lambda y: y) -> None:
        self.proj, self.change = nnx.Linear(5, 7, rngs=nnx.Rngs(0)), change

    def __call__(self, x: jax.Array) -> Any:
        return self.change(self.proj(x))


def inputs(seed: int, batch: int = 3) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).normal(size=(batch, 5))}


def boom(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("no such number\nand more")


CASE = Case("layer", Layer, Twin, inputs, regimes=("as is",), dtypes=("float64",))


def engines(change: Callable[[np.ndarray], Any], other: Callable[[np.ndarray], Any] | None = None, **settings: Any) -> Case:
    """A pair of functions with a weight, `change` of its product on one side and `other` (the same) on the other."""
    def engine(function: Callable) -> Engine:
        return Engine(lambda arrays: lambda x: function(x @ arrays["w"]), {"w": np.ones((5, 7))})

    return replace(CASE, name="engines", reference=lambda: engine(change), candidate=lambda: engine(other or change), **settings)


def test_a_reference_with_dropout_left_on() -> None:
    case = replace(CASE, reference=lambda: Layer(lambda y: torch.nn.functional.dropout(y, 0.5, True)))
    with pytest.raises(CaseError, match=r"the reference of case 'layer' gives other outputs when it is called again .* \(dropout left on\?\)"):
        run_case(case, tiers=["free"])


def test_a_candidate_with_dropout_left_on() -> None:
    class Dropping(Twin):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.dropout(super().__call__(x), deterministic=False)

    result = run_case(replace(CASE, candidate=Dropping), tiers=["free"])
    assert "the candidate raised RuntimeError: it draws random numbers when it is called" in result.sentence


def test_a_candidate_that_gives_something_else_each_time() -> None:
    rng = np.random.default_rng(0)
    result = run_case(engines(lambda y: y, lambda y: y + rng.normal()), tiers=["free", "effects"])
    assert result.sentence.startswith("parts at the whole model: candidate: a second call on the same inputs gave other bits: it is not")


@pytest.mark.parametrize(("where", "words"), [
    (slice(None), "none of 21 values is finite, in both: nothing can be compared"),
    (0, "7 of 21 values are not finite, at the same places in both"),
])
def test_nan_on_both_sides_is_no_agreement(where: Any, words: str) -> None:
    def spoiled(y: np.ndarray) -> np.ndarray:
        y[where] = np.nan
        return y

    result = run_case(engines(spoiled), tiers=["free"])
    assert not result.held and result.sentence.startswith(f"parts at the whole model: {words} [") and "rule 10 cosine" in result.sentence


def test_a_precision_in_which_the_reference_itself_breaks() -> None:
    case = engines(lambda y: y * y.dtype.type(1e30) * y.dtype.type(1e30), dtypes=("float64", "float32"))
    with np.errstate(over="ignore"):
        result = run_case(case, tiers=["free", "rounding"])
    assert result.tiers[0].held and "the reference itself gives no finite value in float32: nothing can be compared" in result.sentence


@pytest.mark.parametrize(("factor", "holds"), [(1.0, True), (1.01, False)])
def test_a_precision_in_which_the_reference_breaks_in_places(factor: float, holds: bool) -> None:
    """One row leaves the range of float32 in the reference: the others are measured, and that row does not excuse them."""
    def raised(y: np.ndarray) -> np.ndarray:
        scale = np.ones(3, y.dtype)
        scale[-1] = 1e30
        return y * scale[:, None] * scale[:, None]

    case = engines(raised, lambda y: raised(y) * (y.dtype.type(factor) if y.dtype == np.float32 else 1.0), dtypes=("float64", "float32"))
    with np.errstate(over="ignore"):
        result = run_case(case, tiers=["free", "rounding"])
    wide, narrow = ([check for check in tier.checks if not check.where] for tier in result.tiers)
    assert all(check.held for check in wide) and [check.held for check in narrow] == [holds]
    assert "7 of 21 values are not finite in the reference's own float32 and are left out" in narrow[0].reason


def test_integer_outputs_are_compared_and_train_nothing() -> None:
    case = replace(CASE, reference=lambda: Layer(lambda y: y.argmax(-1)), candidate=lambda: Twin(lambda y: y.argmax(-1)))
    battery = Battery(case)
    result = battery.run(["free", "gradients", "optimiser"])
    assert result.tiers[0].held and [check.quantity for check in result.tiers[0].checks if not check.where] == ["values that differ"]
    assert "as is: all gradients of the reference are zero (no float output?) and prove nothing" in "\n".join(result.notes)
    assert result.tiers[2].skipped == "no output of the reference is a float that depends on a trained weight, and the case gives no loss"
    wrong = replace(case, candidate=lambda: Twin(lambda y: (-y).argmax(-1)))
    assert "of 3 differ" in run_case(wrong, tiers=["free"]).sentence


@pytest.mark.parametrize("nothing", [(), {}, None], ids=str)
def test_outputs_without_a_leaf(nothing: Any) -> None:
    result = run_case(engines(lambda y: nothing), tiers=["free"])
    assert result.sentence.startswith("parts at the whole model: nothing to compare: neither side has a leaf")


def test_modules_with_other_trees() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.more = torch.nn.Linear(5, 7), torch.nn.Linear(7, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.more(self.proj(x))

    result = run_case(replace(CASE, reference=Two))
    lines = result.sentence.splitlines()
    assert lines[0] == "parts at the whole model: 2 problems with the weights:"
    assert lines[1].startswith("  unused: more.weight (7, 7) of the reference has no place in the candidate")
    assert lines[2].startswith("  unused: more.bias (7,) of the reference has no place in the candidate")


def test_a_bias_that_the_candidate_does_not_have() -> None:
    class Without(Twin):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nnx.Linear(5, 7, use_bias=False, rngs=nnx.Rngs(0))

    assert "1 problem with the weights:\n  missing bias: proj.bias (7,)" in run_case(replace(CASE, candidate=Without)).sentence


@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_more_activations_than_the_limit(side: str) -> None:
    """x, y of the layer and of the model: 2 x (3 x 5 + 3 x 7) values of 8 bytes."""
    enough = opened(replace(CASE, tap_limit=576), side, "float64").run(inputs(0))
    assert len(enough.calls) == 2
    adapter = opened(replace(CASE, tap_limit=575), side, "float64")
    with pytest.raises(CaseError, match=r"more than tap_limit, 575 bytes \(reached at the model\)"):
        adapter.run(inputs(0))
    assert adapter.run(inputs(0), tap=False).outputs.shape == (3, 7)
    if side == "reference":
        with pytest.raises(CaseError, match="make the inputs smaller, or give the case a higher tap_limit"):
            run_case(replace(CASE, tap_limit=575))
    with pytest.raises(CaseError, match="must be a whole number of bytes"):
        replace(CASE, tap_limit=0)


@pytest.mark.parametrize(("change", "words"), [
    ({"inputs": boom}, "inputs of case 'layer' raised"), ({"reference": boom}, "the reference of case 'layer' cannot be made:"),
    ({"candidate": boom}, "the candidate of case 'layer' cannot be made:"),
    ({"call": (boom, boom)}, "the reference of case 'layer' cannot be run on x (3, 5) float64:"),
    ({"leaves": {"*": boom}}, "leaves: the function for proj.weight raised"), ({"names": boom}, "names of the case raised"),
    ({"states": StateProtocol(initial=boom), "regimes": ("as is", "carried state")}, "states.initial of case 'layer' raised"),
])
def test_a_function_of_the_case_that_raises(change: dict, words: str) -> None:
    with pytest.raises(CaseError) as caught:
        run_case(replace(CASE, **change), tiers=["free"])
    text = str(caught.value)
    assert text.startswith(words) and "ZeroDivisionError: no such number (test_bad_inputs.py, line " in text and "\n" not in text


@pytest.mark.parametrize(("change", "tier", "side"), [
    ({"loss": (boom, boom)}, "gradients", "reference"), ({"loss": (boom, boom)}, "optimiser", "reference"),
    ({"loss": (lambda outputs, given: outputs.sum(), boom)}, "gradients", "candidate"), ({"adapt": boom}, "forced", "candidate"),
])
def test_a_side_that_raises_is_named(change: dict, tier: str, side: str) -> None:
    result = run_case(replace(CASE, **change), tiers=[tier])
    assert f"the {side} raised ZeroDivisionError: no such number" in result.sentence


def written() -> Result:
    def doubled(y: torch.Tensor) -> torch.Tensor:
        return y.mul_(2.0)

    class Inner(torch.nn.Module):
        def forward(self, y: torch.Tensor) -> torch.Tensor:
            return doubled(y)

    class Outer(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.proj(x)
            return self.inner(y), y

    class Clean(nnx.Module):
        def __call__(self, y: jax.Array) -> jax.Array:
            return y * 2.0

    class OuterTwin(Twin):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Clean()

        def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = self.proj(x)
            return self.inner(y), y

    return run_case(replace(CASE, reference=Outer, candidate=OuterTwin), tiers=["forced", "free", "gradients"])


def test_a_layer_that_writes_to_its_argument_is_named() -> None:
    """Both layers are right by themselves, and so are their gradients; what is wrong is what the model reads afterwards."""
    result = written()
    assert result.tiers[0].held and not result.tiers[1].held
    assert [check.where for check in result.checks if check.tier == "gradients" and not check.held and "layer" in check.regime] == []
    assert "inner: the reference writes to its argument args.0, so whatever reads that later sees it changed" in result.notes


FILES = {
    "ends.py": "import sys\nsys.exit(0)\n",
    "late.py": "import sys\nfrom parity_tests.harness import Case\nbad = Case('bad', lambda: sys.exit(0), lambda: None, lambda seed: {})\n",
    "odd.py": "bad = (\n",
}


@pytest.mark.parametrize(("name", "words"), [
    ("ends.py", "ends.py cannot be imported: SystemExit: 0 (ends.py, line 2)"),
    ("late.py", "the reference of case 'bad' cannot be made: SystemExit: 0 (late.py, line 3)"),
    ("odd.py", "odd.py cannot be imported: SyntaxError"),
])
def test_a_case_file_that_ends_the_program_does_not_pass(tmp_path: Path, capsys: pytest.CaptureFixture, name: str, words: str) -> None:
    (tmp_path / name).write_text(FILES[name])
    assert main(["run", f"{tmp_path / name}:bad"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("parity: ") and error.count("\n") == 1


def test_nan_in_jax_is_found_as_well() -> None:
    case = replace(CASE, reference=lambda: Layer(lambda y: y * float("nan")), candidate=lambda: Twin(lambda y: y * jnp.nan))
    result = run_case(case, tiers=["free"])
    assert "none of 21 values is finite, in both: nothing can be compared" in result.sentence


def test_a_weight_that_the_loss_does_not_reach_decays_on_both_sides() -> None:
    """torch's AdamW skips what has no gradient, and optax knows no absent one: the two would part by the decay."""
    class Idle(Layer):
        def __init__(self) -> None:
            super().__init__(lambda y: y)
            self.idle = torch.nn.Parameter(torch.ones(7))

    class IdleTwin(Twin):
        def __init__(self) -> None:
            super().__init__(lambda y: y)
            self.idle = nnx.Param(jnp.ones(7))

    result = run_case(replace(CASE, reference=Idle, candidate=IdleTwin), tiers=["optimiser"])
    assert result.held, result.sentence
    assert {"idle"} <= {check.leaf for check in result.checks}
