"""Blocks that are computed again, and products in bfloat16: the same numbers or nearly, less kept, and the same thing in both frameworks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
import torch

import runtime
from conf.schema import BackendConfig, TrainConfig
from experiments import schedule
from experiments.steps import TrainStep
from experiments.steps.base import StepResult
from experiments.tests import tiny
from experiments.tests.test_steps import awkward, build, difference


def config(backend: str, dtype: str = "float32", architecture: str = "grounded_mamba", **training: Any) -> TrainConfig:
    base = {"grounded_mamba": tiny.config, "deltanet_lm": tiny.deltanet, "transformer": tiny.transformer, "gru": tiny.gru}[architecture](
        backend.removesuffix("_compiled"), dtype)
    return replace(base, backend=BackendConfig(name=backend, dtype=dtype), training=replace(base.training, **training))


def train(settings: TrainConfig, steps: int, arrays: dict[str, np.ndarray] | None = None) -> tuple[TrainStep, list[StepResult]]:
    step, stream = build(settings, arrays), tiny.stream(settings)
    return step, [
        step.step(stream.batch(number), schedule.rates(number + 1, settings.training.steps, settings.optimiser), details=number == 0)
        for number in range(steps)
    ]


def step_of(settings: TrainConfig) -> StepResult:
    """The first step of a model of one block."""
    return train(replace(settings, model=replace(settings.model, depth=1)), 1)[1][0]


def held(step: TrainStep) -> dict[str, np.ndarray]:
    return step.arrays() | step.optimiser_arrays() | step.carried()


@pytest.mark.parametrize("architecture", ["grounded_mamba", "deltanet_lm", "transformer", "gru"])
@pytest.mark.parametrize("backend", ["torch", "torch_compiled"])
def test_blocks_computed_again_change_no_bit_in_torch(backend: str, architecture: str) -> None:
    if backend == "torch_compiled" and architecture in ("transformer", "gru"):
        return  # which have no kernels
    arrays = awkward(config(backend, architecture=architecture))
    plain, _ = train(config(backend, architecture=architecture), 12, arrays)
    again, _ = train(config(backend, architecture=architecture, remat=True), 12, arrays)
    assert difference(held(again), held(plain)) == {}
    assert not any("forward" in vars(module) for module in again.module.modules())  # nothing is left on the layers


def test_torch_keeps_less() -> None:
    """Bytes of the tensors that autograd keeps between forward and backward, the layers' own parameters left out."""
    kept = {}
    for remat in (False, True):
        settings = config("torch", remat=remat)
        step, stream, sizes = build(settings), tiny.stream(settings), {}
        parameters = {parameter.data_ptr() for parameter in step.module.parameters()}

        def pack(tensor: torch.Tensor, sizes: dict[int, int] = sizes, parameters: set[int] = parameters) -> torch.Tensor:
            if tensor.data_ptr() not in parameters:
                sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step._accumulate(stream.batch(0).ids, stream.batch(0).labels, step.zero_states(3))
        kept[remat] = sum(sizes.values())
    assert 0 < kept[True] < kept[False] / 2


def test_jax_keeps_less() -> None:
    """Temporary memory of the compiled gradient, of four blocks, of a GRU; optimised or compiled quickly, as elsewhere in the tests, it is one."""
    sizes = {}
    for remat in (False, True):
        settings = config("jax", architecture="gru", remat=remat, context=64)
        settings = replace(settings, model=replace(settings.model, depth=4))
        step, stream = build(settings), tiny.stream(settings)
        batch = stream.batch(0)
        given = (step.model.variables, batch.ids, batch.labels, step.zero_states(3), None)
        optimised = step._functions.gradient.lower(*given).compile()
        sizes[remat] = optimised.memory_analysis().temp_size_in_bytes
    for one, other in zip(jax.tree.leaves(optimised(*given)), jax.tree.leaves(step._functions.gradient(*given)), strict=True):
        assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(other)  # float32 sums over 64 steps and four blocks
    assert 0 < sizes[True] < 0.8 * sizes[False]


ROUNDING = 2.0**-8  # of a number in bfloat16, at most half of this


@pytest.mark.parametrize("architecture", ["grounded_mamba", "deltanet_lm", "transformer"])
def test_products_in_bfloat16(architecture: str) -> None:
    """Against float32: another loss, by rounding alone; parameters, moments and states in float32; thirty steps of training go down."""
    _, reference = train(config("torch", architecture=architecture), 1)
    step, results = train(config("torch", architecture=architecture, precision="bfloat16"), 30)
    first, exact = results[0].losses["cross_entropy"], reference[0].losses["cross_entropy"]
    assert 0 < abs(first / exact - 1) < ROUNDING
    worst = difference(results[0].gradients, reference[0].gradients)
    assert 1e-4 < np.median(list(worst.values())) < 0.1
    assert all(value.dtype == np.float32 for value in held(step).values() if value.dtype.kind == "f")
    assert all(value.dtype == np.float32 for state in step._numpy(step.states) for value in state.values())
    assert results[-1].losses["cross_entropy"] < first - 0.5
    assert not any("forward" in vars(module) for module in step.module.modules())


def test_only_linear_layers_of_the_blocks_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.steps import torch_forward

    seen: list[torch.nn.Linear] = []
    original = torch_forward.projected

    def projected(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        seen.append(layer)
        y = original(layer, x)
        assert x.dtype == y.dtype == layer.weight.dtype == torch.float32
        if layer.bias is None:
            assert torch.equal(y, y.bfloat16().float())
        return y

    monkeypatch.setattr(torch_forward, "projected", projected)
    step, _ = train(config("torch", precision="bfloat16"), 1)
    names = {name.split(".", 2)[2] for name, module in step.module.named_modules() if module in seen}
    assert names == {"ssm.B_proj", "ssm.C_proj", "ssm.dt_proj", *(f"rwkv.{name}_proj" for name in ("key", "value", "receptance", "output"))}


def test_frameworks_round_alike() -> None:
    """The first step in both: a hundred times nearer to each other than either is to float32."""
    exact, torch_step, jax_step = (
        step_of(config(backend, architecture="transformer", precision=precision))
        for backend, precision in (("torch", "full"), ("torch", "bfloat16"), ("jax", "bfloat16"))
    )
    parts = {}
    for name, one, other in (("both", torch_step, jax_step), ("torch", torch_step, exact), ("jax", jax_step, exact)):
        parts[name] = float(np.median(list(difference(one.gradients, other.gradients).values())))
    assert 0 < parts["both"] < 0.01 * min(parts["torch"], parts["jax"]), parts
    assert abs(torch_step.losses["loss"] - jax_step.losses["loss"]) < 0.1 * abs(torch_step.losses["loss"] - exact.losses["loss"])


def test_bfloat16_together_with_blocks_computed_again() -> None:
    plain, _ = train(config("torch_compiled", precision="bfloat16"), 3)
    again, _ = train(config("torch_compiled", precision="bfloat16", remat=True), 3)
    assert difference(held(again), held(plain)) == {}


@pytest.mark.parametrize(("settings", "message"), [
    (lambda: config("torch", "float64", precision="bfloat16"), "keeps parameters and states in float32, found backend.dtype=float64"),
    (lambda: config("torch", architecture="gru", precision="bfloat16"), "of which gru has none but the head"),
    (lambda: config("torch", precision="float16"), "precision must be one of 'full', 'bfloat16', found 'float16'"),
])
def test_impossible_precision_is_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings()


def test_saved_model_is_that_of_the_float32_parameters() -> None:
    """Validation and what is saved know nothing of the step's rounding."""
    settings = config("torch", precision="bfloat16")
    step, _ = train(settings, 2)
    model = runtime.build(settings.architecture, settings.model, backend="torch", arrays=step.arrays())
    ids = np.random.default_rng(0).integers(97, 123, (2, 9))
    logits, _ = model(ids)
    np.testing.assert_array_equal(step.module(torch.from_numpy(ids))[0].detach().numpy(), logits)
