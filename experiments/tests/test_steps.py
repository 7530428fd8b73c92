"""The training step: both frameworks do the same thing, and each does what its description says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import runtime
from conf.models import GroundedMambaConfig
from conf.schema import DataConfig, TrainConfig
from experiments import schedule
from experiments.data.batches import Batch
from experiments.steps import TrainStep, make
from experiments.steps.groups import group_of
from experiments.tests import tiny


def build(settings: TrainConfig, arrays: dict[str, np.ndarray] | None = None) -> TrainStep:
    model = runtime.build(
        settings.architecture, settings.model, backend=settings.backend.name, dtype=settings.backend.dtype, arrays=arrays, seed=settings.seed
    )
    return make(model, settings)


def train(settings: TrainConfig, steps: int, arrays: dict[str, np.ndarray] | None = None) -> tuple[TrainStep, list[dict[str, float]]]:
    step, stream = build(settings, arrays), tiny.stream(settings)
    losses = []
    for number in range(steps):
        losses.append(step.step(stream.batch(number), schedule.rates(number + 1, settings.training.steps, settings.optimiser)).losses)
    return step, losses


def difference(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """Relative L2 difference by name."""
    assert found.keys() == expected.keys()
    return {
        name: float(np.linalg.norm(found[name] - expected[name]) / max(np.linalg.norm(np.float64(expected[name])), 1e-300))
        for name in expected
        if np.any(found[name] != expected[name])
    }


def awkward(settings: TrainConfig) -> dict[str, np.ndarray]:
    """Arrays in which no leaf keeps its special initial value (a zero gate, a norm of ones); counters stay."""
    rng = np.random.default_rng(11)
    arrays = runtime.init.init_arrays(settings.architecture, settings.model, 0)
    arrays = {name: value + (0.05 * rng.standard_normal(value.shape) if value.dtype.kind == "f" else 0) for name, value in arrays.items()}
    for name in arrays:
        if name.endswith(("memory_keys", "memory_values")):
            arrays[name] = np.zeros_like(arrays[name])
    return arrays | {"lm_head.weight": arrays["embedding.weight"].copy()}


@pytest.mark.parametrize("gate", ["fixed", "learned"])
def test_fifty_adamw_steps_agree_between_frameworks(gate: str) -> None:
    """Parameters, buffers and moments, with the bank written on steps 10, 20, ... and read from then on."""
    settings = tiny.config("torch")
    settings = replace(settings, model=replace(settings.model, gate=gate, depth=2 if gate == "fixed" else 1))
    arrays = awkward(settings)
    torch_step, torch_losses = train(settings, 50, arrays)
    jax_step, jax_losses = train(replace(settings, backend=replace(settings.backend, name="jax")), 50, arrays)
    final = torch_step.arrays()
    assert final["blocks.0.rwkv.writes"] == 5 and final["blocks.0.rwkv.memory_count"].sum() == 15
    # 1e-9: fifty steps amplify the 1e-16 of one product by less than 1e5; a difference of meaning starts above 1e-4.
    assert max(difference(jax_step.arrays(), final).values(), default=0.0) < 1e-9
    assert max(difference(jax_step.optimiser_arrays(), torch_step.optimiser_arrays()).values(), default=0.0) < 1e-8  # squares: twice as much
    for found, expected in zip(jax_losses, torch_losses, strict=True):
        assert found == pytest.approx(expected, rel=1e-9)
    assert difference(final, {name: np.asarray(value) for name, value in arrays.items()}).keys() >= {
        name for name in arrays if name.startswith("blocks.0.rwkv.memory")
    }


def test_deltanet_trains_alike_in_both_frameworks() -> None:
    """Parameters, moments, losses and carried states after fifty AdamW steps; its loss falls, and o_norm.gate, which is frozen, stays."""
    settings = tiny.deltanet("torch")
    arrays = awkward(settings)
    torch_step, torch_losses = train(settings, 50, arrays)
    jax_step, jax_losses = train(tiny.deltanet("jax"), 50, arrays)
    # 1e-9 and 1e-8 as above
    assert max(difference(jax_step.arrays(), torch_step.arrays()).values(), default=0.0) < 1e-9
    assert max(difference(jax_step.optimiser_arrays(), torch_step.optimiser_arrays()).values(), default=0.0) < 1e-8
    assert max(difference(jax_step.carried(), torch_step.carried()).values(), default=0.0) < 1e-9
    for found, expected in zip(jax_losses, torch_losses, strict=True):
        assert found == pytest.approx(expected, rel=1e-9)
    assert torch_losses[-1]["cross_entropy"] < torch_losses[0]["cross_entropy"] - 1
    moved = difference(torch_step.arrays(), arrays).keys()
    assert moved == {name for name in arrays if not name.endswith("o_norm.gate")}
    assert {group_of(name) for name in arrays} == {"norm", "other"}


@pytest.mark.parametrize("name", ["transformer", "gru"])
def test_baselines_train_alike_in_both_frameworks(name: str) -> None:
    """Parameters, moments, losses and carried states after fifty AdamW steps; the loss falls and every leaf moves."""
    make_config = {"transformer": tiny.transformer, "gru": tiny.gru}[name]
    settings = make_config("torch")
    arrays = awkward(settings)
    torch_step, torch_losses = train(settings, 50, arrays)
    jax_step, jax_losses = train(make_config("jax"), 50, arrays)
    # 1e-9 and 1e-8 as above
    assert max(difference(jax_step.arrays(), torch_step.arrays()).values(), default=0.0) < 1e-9
    assert max(difference(jax_step.optimiser_arrays(), torch_step.optimiser_arrays()).values(), default=0.0) < 1e-8
    assert max(difference(jax_step.carried(), torch_step.carried()).values(), default=0.0) < 1e-9
    for found, expected in zip(jax_losses, torch_losses, strict=True):
        assert found == pytest.approx(expected, rel=1e-9)
    assert torch_losses[-1]["cross_entropy"] < torch_losses[0]["cross_entropy"] - 1
    assert difference(torch_step.arrays(), arrays).keys() == arrays.keys()
    assert {group_of(key) for key in arrays} == {"norm", "other"}
    assert {key for key in arrays if group_of(key) == "norm"} == {key for key in arrays if "norm" in key}


def test_compiled_backend_trains_as_the_reference() -> None:
    settings = tiny.config("torch")
    reference, _ = train(settings, 12)
    compiled, _ = train(replace(settings, backend=replace(settings.backend, name="torch_compiled")), 12)
    assert max(difference(compiled.arrays(), reference.arrays()).values(), default=0.0) < 1e-11  # a twelfth of the steps above


def test_step_is_adamw_by_hand() -> None:
    """One parameter of every group after two steps, from the recorded gradients and the textbook formula."""
    settings = tiny.config("torch")
    step, stream = build(settings), tiny.stream(settings)
    before, optimiser = step.arrays(), settings.optimiser
    names = {"ssm": "blocks.1.ssm.A", "rwkv": "blocks.0.rwkv.key_proj.weight", "norm": "blocks.0.ssm.state_norm.weight", "other": "embedding.weight"}
    moments = {name: [np.zeros_like(before[name]), np.zeros_like(before[name])] for name in names.values()}
    expected = {name: before[name].copy() for name in names.values()}
    for number in (1, 2):
        rates = schedule.rates(number, settings.training.steps, optimiser)
        result = step.step(stream.batch(number - 1), rates, details=True)
        clip = min(1.0, optimiser.clip_norm / (result.gradient_norm + 1e-6))
        assert clip < 1  # else the clipping is not looked at
        for group, name in names.items():
            gradient, (first, second) = clip * result.gradients[name], moments[name]
            first[:] = 0.9 * first + 0.1 * gradient
            second[:] = 0.95 * second + 0.05 * gradient**2
            direction = (first / (1 - 0.9**number)) / (np.sqrt(second / (1 - 0.95**number)) + 1e-8)
            factor, decay = {"ssm": (0.5, 0.1), "rwkv": (0.3, 0.01), "norm": (1.0, 0.0), "other": (1.0, 0.1)}[group]
            assert rates[group] == pytest.approx(factor * 1e-2 * number / 7)
            expected[name] -= rates[group] * (direction + decay * expected[name])
    after = step.arrays()
    for name in names.values():
        np.testing.assert_allclose(after[name], expected[name], rtol=1e-10, err_msg=name)  # a dozen operations in float64


def test_groups_follow_the_names() -> None:
    names = runtime.init.init_arrays("grounded_mamba", tiny.config().model, 0)
    assert {name for name in names if group_of(name) == "norm"} == {
        name for name in names if any(part in name for part in ("ln_ssm", "ln_rwkv", "ln_out", "state_norm", "readout_norm"))
    }
    assert group_of("blocks.0.ssm.dt_proj.bias") == "ssm" and group_of("blocks.0.rwkv.memory_gate") == "rwkv"
    assert group_of("embedding.weight") == group_of("blocks.0.gate_proj.weight") == "other"


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_frozen_leaves_stay_and_unused_ones_decay(backend: str) -> None:
    """gate_proj is in no group; memory_query has no gradient before the first write, and zero is not None: it decays."""
    settings = tiny.config(backend)
    step, _ = train(settings, 3)
    before, after = runtime.init.init_arrays("grounded_mamba", settings.model, 0), step.arrays()
    assert not any("gate_proj" in name for name in step.optimiser_arrays())
    np.testing.assert_array_equal(after["blocks.0.gate_proj.bias"], before["blocks.0.gate_proj.bias"])
    name = "blocks.1.rwkv.memory_query.weight"
    kept = np.prod([1 - schedule.rates(number, 50, settings.optimiser)["rwkv"] * 0.01 for number in (1, 2, 3)])
    np.testing.assert_allclose(after[name], before[name] * kept, rtol=1e-14)
    assert kept < 1 - 1e-6  # the decay is visible at that tolerance


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_norm_has_zero_gradient_at_zero(backend: str) -> None:
    """Equal logits at neighbouring tokens: the smoothness is zero there and its gradient finite, in both frameworks the same."""
    value = np.array([[3.0, -4.0], [0.0, 0.0]])
    if backend == "torch":
        from experiments.steps.torch_step import norm

        x = torch.tensor(value, requires_grad=True)
        y = norm(x)
        y.sum().backward()
        length, gradient = y.detach().numpy(), x.grad.numpy()
    else:
        import jax

        from experiments.steps.jax_step import norm as jax_norm

        with jax.enable_x64(True):
            length, gradient = np.asarray(jax_norm(value)), np.asarray(jax.grad(lambda x: jax_norm(x).sum())(value))
    np.testing.assert_array_equal(length, [5.0, 0.0])
    np.testing.assert_allclose(gradient, [[0.6, -0.8], [0.0, 0.0]], rtol=1e-15)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_loss_is_the_formula_of_its_docstring(backend: str) -> None:
    settings = tiny.config(backend)
    stream = tiny.stream(settings)
    batch = stream.batch(0)
    labels = batch.labels.copy()
    labels[1, 3:7] = -100
    step = build(settings)
    logits, states = step.model(batch.ids, [dict(state) for state in step._numpy(step.zero_states(3))])
    logits, states = np.asarray(logits), [{kind: np.asarray(value) for kind, value in state.items()} for state in states]
    shifted = logits - logits.max(-1, keepdims=True)
    nats = np.log(np.exp(shifted).sum(-1)) - np.take_along_axis(shifted, np.maximum(labels, 0)[..., None], -1)[..., 0]
    penalty = 0.3 * sum((np.linalg.norm(state[kind], axis=-1).mean() - 2.0) ** 2 for state in states for kind in ("ssm", "wkv"))
    smoothness = 0.07 * np.linalg.norm(np.diff(logits, axis=1), axis=-1).mean()
    losses = step.step(Batch(batch.ids, labels, True), schedule.rates(1, 50, settings.optimiser)).losses
    assert losses["cross_entropy"] == pytest.approx(nats[labels != -100].mean(), rel=1e-12)
    assert losses["state_penalty"] == pytest.approx(penalty, rel=1e-12)
    assert losses["smoothness"] == pytest.approx(smoothness, rel=1e-12)
    assert losses["loss"] == pytest.approx(nats[labels != -100].mean() + penalty + smoothness, rel=1e-12)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_permuted_rows_change_the_order_of_sums_only(backend: str) -> None:
    settings = tiny.config(backend)
    plain, losses = train(settings, 12)
    permuted, others = train(replace(settings, data=DataConfig(permute_rows=True)), 12)
    assert plain.arrays()["blocks.0.rwkv.writes"] == 1  # which rows the bank takes must not depend on the order
    assert sorted(permuted._order.tolist()) == [0, 1, 2] and permuted._order.tolist() != [0, 1, 2]
    assert others[-1]["loss"] == pytest.approx(losses[-1]["loss"], rel=1e-11)
    worst = difference(permuted.arrays() | permuted.carried(), plain.arrays() | plain.carried())
    assert 0 < max(worst.values()) < 1e-11  # rounding, and some of it


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_states_are_carried_or_not(backend: str) -> None:
    settings = tiny.config(backend)
    carried, losses = train(settings, 2)
    _, fresh = train(replace(settings, training=replace(settings.training, carry_states=False)), 2)
    assert losses[0] == fresh[0] and abs(losses[1]["cross_entropy"] - fresh[1]["cross_entropy"]) > 1e-6
    assert set(carried.carried()) == {"0.ssm", "0.wkv", "1.ssm", "1.wkv"}


@pytest.mark.parametrize("backend", ["torch", "torch_compiled", "jax"])
def test_restored_step_goes_on_bit_for_bit(backend: str) -> None:
    settings = tiny.config(backend)
    whole, _ = train(settings, 12)
    half, _ = train(settings, 5)
    restored, stream = build(settings, half.arrays()), tiny.stream(settings)
    restored.load_optimiser(half.optimiser_arrays(), 5)
    restored.load_carried(half.carried())
    for number in range(5, 12):
        restored.step(stream.batch(number), schedule.rates(number + 1, 50, settings.optimiser))
    for found, expected in ((restored.arrays(), whole.arrays()), (restored.optimiser_arrays(), whole.optimiser_arrays())):
        assert difference(found, expected) == {}


def test_moments_travel_between_frameworks() -> None:
    settings = tiny.config("torch")
    half, _ = train(settings, 4)
    other = build(replace(settings, backend=replace(settings.backend, name="jax")), half.arrays())
    other.load_optimiser(half.optimiser_arrays(), 4)
    assert difference(other.optimiser_arrays(), half.optimiser_arrays()) == {}
    other.load_carried(half.carried())
    stream, rates = tiny.stream(settings), schedule.rates(5, 50, settings.optimiser)
    half.step(stream.batch(4), rates)
    other.step(stream.batch(4), rates)
    assert max(difference(other.arrays(), half.arrays()).values()) < 1e-12  # one step of float64 rounding


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_evaluation_ignores_and_trains_nothing(backend: str) -> None:
    settings = tiny.config(backend)
    step = build(settings)
    before = step.arrays()
    ids = np.random.default_rng(5).integers(0, 258, (2, 13))
    labels = np.roll(ids, -1, axis=1)
    labels[:, -1] = -100
    nats, states = step.evaluate(ids, labels, None)
    first, middle = step.evaluate(ids[:, :6].copy(), labels[:, :6].copy(), None)
    second, last = step.evaluate(ids[:, 6:].copy(), labels[:, 6:].copy(), middle)
    assert nats == pytest.approx(first + second, rel=1e-12)
    np.testing.assert_allclose(step._numpy(last)[1]["wkv"], step._numpy(states)[1]["wkv"], rtol=1e-10)
    assert difference(step.arrays(), before) == {}


def test_default_config_has_no_group_without_members() -> None:
    assert {group_of(name) for name in runtime.init.init_arrays("grounded_mamba", GroundedMambaConfig(vocab_size=7, depth=1), 0)} == {
        "ssm", "rwkv", "norm", "other"
    }
