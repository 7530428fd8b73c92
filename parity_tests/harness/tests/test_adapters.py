"""Adapters: what they record, that nothing they give or take is aliased, and that the policy is put back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("flax")

import jax
import jax.numpy as jnp
import torch
from flax import nnx

from parity_tests.harness.adapters import kind_of, opened
from parity_tests.harness.adapters.base import Unsupported
from parity_tests.harness.adapters.callable_adapter import Engine
from parity_tests.harness.adapters.nnx_trace import Patch
from parity_tests.harness.candidate import Candidate
from parity_tests.harness.case import Case, CaseError
from parity_tests.harness.policy import Policy, applied
from parity_tests.harness.recording import Recording
from parity_tests.harness.tests import toy_nnx, toy_torch
from parity_tests.harness.tests.toy import CASE


@pytest.fixture(scope="module")
def pair() -> tuple[Recording, Candidate]:
    recording = Recording(CASE)
    return recording, Candidate(CASE, recording)


def test_kinds_are_told_by_class() -> None:
    assert kind_of(toy_torch.Toy()) == "torch" and kind_of(toy_nnx.Toy()) == "nnx" and kind_of(Engine(lambda arrays: None)) == "callable"
    with pytest.raises(CaseError, match=r"expected a torch\.nn\.Module, an nnx\.Module, a flax\.linen\.Module or an Engine, found builtins\.int"):
        kind_of(3)


@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_weights_are_copied_in_and_out(pair: tuple, side: str) -> None:
    recording, candidate = pair
    adapter = opened(CASE, side, "float64")
    weights = {name: value.copy() for name, value in (recording.weights if side == "reference" else candidate.weights).items()}
    adapter.load(weights)
    for value in weights.values():
        value[...] = 0
    held = adapter.arrays()
    expected = recording.weights if side == "reference" else candidate.weights
    assert all(np.array_equal(held[name], expected[name]) for name in expected)
    for value in held.values():
        value[...] = 0
    assert all(np.array_equal(adapter.arrays()[name], expected[name]) for name in expected)


def test_training_leaves_the_recorded_weights_alone(pair: tuple) -> None:
    recording, candidate = pair
    batches = [CASE.draw(seed, length=5) for seed in range(2)]
    for adapter, weights in ((recording.adapter("float64"), recording.weights), (candidate.adapter("float64"), candidate.weights)):
        trained = adapter.train(batches, CASE.trajectory, 0)
        held = adapter.arrays()
        assert all(np.array_equal(held[name], weights[name]) for name in weights)
        assert any(not np.array_equal(trained.arrays[name], weights[name]) for name in weights)


@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_wrong_weights_are_refused(side: str) -> None:
    adapter = opened(CASE, side, "float64")
    arrays = adapter.arrays()
    name = next(iter(arrays))
    with pytest.raises(ValueError, match="weights do not fit the model: missing"):
        adapter.load({key: value for key, value in arrays.items() if key != name})
    with pytest.raises(ValueError, match="has shape"):
        adapter.load({**arrays, name: np.ones((1, 2, 3))})


def test_both_record_inputs_and_outputs_of_every_module(pair: tuple) -> None:
    recording, candidate = pair
    inputs = CASE.draw(0)
    states = recording.states(recording.plain()[1])
    left = recording.adapter("float64").run(inputs, states)
    right = candidate.adapter("float64").run(inputs, states)
    paths = [call.path for call in right.calls]
    assert paths == [call.path for call in left.calls if call.path != "head" and not call.path.endswith("cell.norm")]
    cell = next(call for call in right.calls if call.path == "blocks.1.cell")
    assert cell.args[0].shape == (3, 6, 15) and np.array_equal(cell.args[1], states[1]["h"]) and cell.outputs[1].dtype == np.float64
    assert left.effects == right.effects == []


def test_arguments_are_recorded_as_they_were_before_the_call() -> None:
    class Writing(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(2.0)

    case = Case("writing", Writing, Writing, lambda seed: {"x": np.ones((2, 3))})
    run = opened(case, "reference", "float64").run({"x": np.ones((2, 3))})
    assert np.all(run.calls[0].args[0] == 1.0) and np.all(run.outputs == 2.0)


def test_a_module_called_in_a_scan_is_reported_and_not_leaked() -> None:
    class Loop(nnx.Module):
        def __init__(self) -> None:
            self.step = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return jax.lax.scan(lambda h, _: (self.step(h), None), x, None, length=2)[0]

    case = Case("loop", Loop, Loop, lambda seed: {"x": np.ones((2, 3))})
    run = opened(case, "candidate", "float64").run({"x": np.ones((2, 3))})
    assert run.untapped == {"step"} and [call.path for call in run.calls] == [""]


def test_classes_are_put_back_after_a_run(pair: tuple) -> None:
    before = toy_nnx.Cell.__call__, nnx.Linear.__call__, jax.nn.gelu
    adapter = pair[1].adapter("float64").twin((Patch("blocks.0.cell", lambda module, call, args, kwargs: 1 / 0),))
    with pytest.raises(ZeroDivisionError):
        adapter.run(CASE.draw(0), tap=False)
    assert (toy_nnx.Cell.__call__, nnx.Linear.__call__, jax.nn.gelu) == before
    assert "__call__" in vars(toy_nnx.Cell)


@pytest.mark.parametrize("patch", [Patch("blocks.7"), Patch("blocks.0.cell", lambda *_: None, method="forward")])
def test_patches_of_nothing_are_refused(pair: tuple, patch: Patch) -> None:
    with pytest.raises(ValueError, match="a patch names"):
        pair[1].adapter("float64").twin((patch,)).run(CASE.draw(0), tap=False)


def test_equal_layers_share_one_program(pair: tuple) -> None:
    adapter = pair[1].adapter("float64")
    x = np.random.default_rng(0).normal(size=(3, 4, 15))
    first = adapter.call("blocks.0.norm", (x,), {})
    count = adapter.programs.count
    second = adapter.call("blocks.1.norm", (x,), {})
    assert adapter.programs.count == count and not np.array_equal(first, second)


def test_eager_and_compiled_candidates_agree() -> None:
    eager = replace(CASE, jit=False)
    runs = []
    for case in (CASE, eager):
        recording = Recording(case)
        runs.append(Candidate(case, recording).adapter("float64").run(CASE.draw(0)).outputs[0])
    # the same operations, fused or not: rounding of sums over 15 to 21 terms
    np.testing.assert_allclose(runs[0], runs[1], rtol=1e-12, atol=1e-13)


def test_a_float64_model_is_float64_all_through_and_x64_stays_local() -> None:
    adapter = opened(CASE, "candidate", "float64")
    assert {leaf.dtype for name, leaf in adapter.leaves().items() if name != "calls"} <= {"float32", "float64"}
    assert adapter.run(CASE.draw(0)).outputs[0].dtype == np.float64
    assert jnp.zeros(3).dtype == np.float32 and not jax.config.jax_enable_x64


def test_the_policy_is_set_and_put_back() -> None:
    before = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, jax.config.jax_default_matmul_precision
    torch.set_float32_matmul_precision("high")
    try:
        with applied(Policy(threads=1), {"torch", "nnx"}):
            assert (torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == (1, "highest", False)
            assert jax.config.jax_default_matmul_precision == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before[1])
    assert before == (torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32,
                      jax.config.jax_default_matmul_precision)


def test_an_engine_is_compared_with_a_torch_module_by_name() -> None:
    def build(arrays: dict) -> object:
        return lambda x: x @ arrays["weight"].T + arrays["bias"]

    engine = Engine(build, {"weight": np.zeros((3, 5)), "bias": np.zeros(3)})
    case = Case("engine", lambda: torch.nn.Linear(5, 3), lambda: engine, lambda seed: {"x": np.random.default_rng(seed).normal(size=(2, 5))},
                trajectory=None, regimes=("as is", "+ 100"))
    from parity_tests.harness.battery import run_case

    result = run_case(case)
    assert result.held, result.sentence
    assert {tier.name for tier in result.tiers if not tier.skipped} == {"conversion", "coverage", "free", "rounding", "effects", "observability"}
    with pytest.raises(Unsupported):
        opened(case, "candidate", "float64").call("inside", (), {})


def test_an_engine_that_writes_to_its_input_is_found() -> None:
    def build(arrays: dict) -> object:
        def function(x: np.ndarray) -> np.ndarray:
            x *= 2.0
            return x

        return function

    case = Case("writer", lambda: Engine(build), lambda: Engine(build), lambda seed: {"x": np.ones((2, 5))})
    run = opened(case, "candidate", "float64").run({"x": np.ones((2, 5))})
    assert run.effects == ["inputs changed during the call"]
