"""Linen candidates: found and named, called by themselves, written to, patched; what cannot be compared is refused in one line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("flax")

import jax
import jax.numpy as jnp
import torch
from flax import linen as nn

from parity_tests.harness.adapters import kind_of, opened
from parity_tests.harness.adapters.linen_adapter import LinenAdapter
from parity_tests.harness.adapters.nnx_injectors import epsilon, left_at_initialisation, scaled_output, transposed
from parity_tests.harness.adapters.nnx_trace import Patch
from parity_tests.harness.battery import Battery, run_case
from parity_tests.harness.bounds import Bound
from parity_tests.harness.candidate import Candidate
from parity_tests.harness.case import Case, CaseError, StateProtocol, Trajectory
from parity_tests.harness.mutate import run_mutations
from parity_tests.harness.recording import Recording
from parity_tests.harness.tests import toy, toy_linen, toy_torch

TOY = replace(
    toy.CASE, name="linen toy", reference=lambda: toy_torch.Toy(depth=1), candidate=lambda: toy_linen.Toy(depth=1), names=toy_linen.NAMES,
    unpaired={}, regimes=("as is",), dtypes=("float64",))


@pytest.fixture(scope="module")
def battery() -> Battery:
    return Battery(TOY)


@pytest.mark.parametrize("tier", ["conversion", "coverage", "forced", "free", "effects"])
def test_a_healthy_port_holds(battery: Battery, tier: str) -> None:
    """Layers of a setup, compact layers, a list, a variable outside params, and a head that uses the embedding's table."""
    result = battery.tier(tier)
    assert result.held and not result.skipped, result.sentence
    if tier == "forced":
        paths = {check.where for check in result.checks}
        assert {"embedding", "blocks.0.cell", "blocks.0.cell.norm", "blocks.0.up", "blocks.0.down", "head"} <= paths and len(paths) == 13


def test_leaves_and_modules_are_named_by_path(battery: Battery) -> None:
    adapter = battery.candidate.adapter("float64")
    leaves, nodes = adapter.leaves(), adapter.modules()
    assert {name for name, leaf in leaves.items() if not leaf.trainable} == {"calls", "blocks_0.cell.step"}
    assert leaves["blocks_0.Dense_0.kernel"].shape == (15, 21) and leaves["blocks_0.Dense_0.kernel"].layer == "linear"
    assert nodes["blocks_0.norm"].layer == "layernorm" and nodes["blocks_0.norm"].settings["epsilon"] == 1e-5
    assert adapter.kind == "linen" and kind_of(toy_linen.Toy()) == "linen"


def test_both_sides_record_the_same_calls(battery: Battery) -> None:
    regime = battery.recording.plain()[0]
    left, right = battery.recording.run(regime), battery.free_run(regime)
    names = {"blocks.0": "blocks_0", "blocks.0.up": "blocks_0.Dense_0", "blocks.0.down": "blocks_0.Dense_1"}
    renamed = [names.get(call.path, call.path.replace("blocks.", "blocks_")) for call in left.calls]
    assert [call.path for call in right.calls] == renamed and right.effects == [] and right.untapped == frozenset()
    assert right.outputs[0].dtype == np.float64 and not jax.config.jax_enable_x64


def test_a_wrong_epsilon_is_located() -> None:
    result = run_case(replace(TOY, candidate=lambda: toy_linen.Toy(depth=1, epsilon=1e-3)), tiers=["forced"])
    assert result.sentence.startswith("parts at norm_out: relative L2")
    assert any("norm_out: epsilon 0.001 in the candidate, 1e-05" in line for line in result.lint)


class Memory(torch.nn.Module):
    """h_t = 0.5 h_{t-1} + norm(proj(x_t)) * count."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.norm = torch.nn.Linear(7, 7), torch.nn.LayerNorm(7)
        self.register_buffer("count", torch.ones(7))

    def forward(self, x: torch.Tensor, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        h, out = x.new_zeros(x.shape[0], 7) if state is None else state, []
        y = self.norm(self.proj(x)) * self.count
        for t in range(x.shape[1]):
            h = 0.5 * h + y[:, t]
            out.append(h)
        return torch.stack(out, 1), h


class MemoryTwin(nn.Module):
    """The twin of `Memory`; `writing` moves its count, `wrap` is a transformation of Flax around a layer."""

    dtype: Any = jnp.float32
    writing: bool = False
    wrap: Any = staticmethod(lambda cls: cls)

    @nn.compact
    def __call__(self, x: jax.Array, state: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        count = self.variable("statistics", "count", jnp.ones, (7,))
        h, out = jnp.zeros((x.shape[0], 7), x.dtype) if state is None else state, []
        y = self.wrap(nn.Dense)(7, dtype=self.dtype, name="proj")(x)
        y = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=self.dtype, name="norm")(y) * count.value
        if self.writing:
            count.value = count.value + 1.0
        for t in range(x.shape[1]):
            h = 0.5 * h + y[:, t]
            out.append(h)
        return jnp.stack(out, 1), h


def inputs(seed: int, batch: int = 3, length: int = 5) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).normal(size=(batch, length, 7))}


MEMORY = Case(
    "memory", Memory, MemoryTwin, inputs, states=StateProtocol(split_length=3), trajectory=Trajectory(steps=3, length=2),
    regimes=("as is", "carried state"), bounds=[Bound(1e-12, "two layers of width 7, sums of 7 terms")])


def test_every_tier_runs_on_a_linen_module() -> None:
    """Weights in float64 and float32, states, gradients of every leaf and input, splits, AdamW, side effects, observability."""
    result = run_case(MEMORY)
    assert result.held, result.sentence
    assert [tier.name for tier in result.tiers if tier.skipped] == ["voting"]  # two implementations have no majority
    names = {check.leaf for check in result.checks if check.tier == "gradients"}
    assert {"proj.weight", "norm.bias", "input.x", "state", "args.0"} <= names and "count" not in names


def test_bugs_put_into_a_linen_module_are_located() -> None:
    bugs = [transposed("proj"), left_at_initialisation("norm.bias"), epsilon("norm"), scaled_output("norm")]
    for mutation in run_mutations(replace(MEMORY, dtypes=("float64",), regimes=("as is", "x 1e-3")), bugs, healthy=False):
        assert mutation.held, mutation


def test_a_variable_that_is_written_to_is_a_side_effect_and_no_more() -> None:
    case = replace(MEMORY, candidate=lambda: MemoryTwin(writing=True))
    result = run_case(case, tiers=["free", "effects"])
    assert result.tiers[0].held and "candidate: variable count changed during the call" in result.sentence
    assert np.array_equal(Candidate(case, Recording(case)).adapter("float64").arrays()["count"], Recording(case).weights["count"])


def test_layers_inside_remat_are_compared_by_force() -> None:
    case = replace(MEMORY, candidate=lambda: MemoryTwin(wrap=nn.remat), regimes=("as is",))
    tested = Battery(case)
    assert tested.tier("forced").held and {check.where for check in tested.tier("forced").checks} == {"proj", "norm"}
    assert tested.tier("free").held and tested.free_run(tested.recording.plain()[0]).untapped == {"proj"}


class Stacked(nn.Module):
    """Four layers of which Flax holds the weights in one array."""

    transform: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.transform is nn.scan:
            class Step(nn.Module):
                @nn.compact
                def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
                    return nn.Dense(7)(x), None

            return nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)()(x, None)[0]
        return nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=4)(7)(x)


class Normed(nn.Module):
    """A batch norm."""

    training: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.BatchNorm(use_running_average=not self.training, epsilon=1e-5, name="norm")(x)


class Doubled(nn.Module):
    """One name in two collections."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.param("scale", nn.initializers.ones, (7,)) * self.variable("other", "scale", jnp.ones, (7,)).value


class Dropping(nn.Module):
    """A dropout that is always on."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dropout(0.5, deterministic=False)(nn.Dense(7, name="proj")(x))


@pytest.mark.parametrize(("candidate", "words"), [
    (lambda: Stacked(nn.scan), r"bias of case 'memory' has shape \(4, 7\) in the variables and \(7,\) where module 'ScanStep_0.* uses it: nn\.scan"),
    (lambda: Stacked(nn.vmap), r"bias of case 'memory' has shape \(4, 7\) in the variables and \(7,\) where module 'VmapDense_0' uses it: nn\.scan"),
    (Doubled, r"collections '\w+' and '\w+' of case 'memory' both hold 'scale'"),
    (lambda: Normed().bind({}), "is a bound Normed; give the module itself"),
    (lambda: nn.Dense(features="7"), "the variables of the candidate of case 'memory' cannot be made from its inputs: TypeError"),
])
def test_what_cannot_be_compared_is_refused(candidate: Any, words: str) -> None:
    with pytest.raises(CaseError, match=words) as caught:
        opened(replace(MEMORY, candidate=candidate), "candidate", "float64")
    assert "\n" not in str(caught.value)


def test_a_module_that_draws_random_numbers_says_so() -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = torch.nn.Linear(7, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.proj(x)

    result = run_case(replace(MEMORY, reference=Plain, candidate=Dropping, states=None, regimes=("as is",)), tiers=["free"])
    assert 'it draws random numbers when it is called (Dropout_0 needs PRNG for "dropout"): make it deterministic' in result.sentence


@pytest.mark.parametrize("training", [False, True])
def test_statistics_of_a_batch_norm_go_by_name(training: bool) -> None:
    class Reference(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x)

    case = Case("norm", Reference, lambda: Normed(training), lambda seed: {"x": np.random.default_rng(seed).normal(size=(5, 7))},
                regimes=("as is",), dtypes=("float64",), trajectory=None)
    result = run_case(case, tiers=["conversion", "coverage", "forced", "effects"])
    assert result.held is not training
    if training:
        assert any("candidate: variable norm.mean changed during the call" in check.detail for check in result.checks)


def test_weights_are_converted_by_kind_of_layer() -> None:
    """Embedding, full and depthwise convolution, RMSNorm, GroupNorm and a bare parameter, through the whole model."""

    class Reference(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.gain = torch.nn.Embedding(11, 6), torch.nn.Parameter(torch.ones(2, 6))
            self.conv, self.depth = torch.nn.Conv1d(6, 10, 3), torch.nn.Conv1d(10, 10, 2, groups=10)
            self.group, self.rms = torch.nn.GroupNorm(5, 10), torch.nn.RMSNorm(10, eps=1e-5)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = (self.embedding(ids) * self.gain[1]).transpose(1, 2)
            return self.rms(self.group(self.depth(self.conv(x))).transpose(1, 2))

    class Twin(nn.Module):
        @nn.compact
        def __call__(self, ids: jax.Array) -> jax.Array:
            x = nn.Embed(11, 6, name="embedding")(ids) * self.param("gain", nn.initializers.ones, (2, 6))[1]
            x = nn.Conv(10, (3,), padding="VALID", name="conv")(x)
            x = nn.Conv(10, (2,), feature_group_count=10, padding="VALID", name="depth")(x)
            x = nn.GroupNorm(num_groups=5, epsilon=1e-5, use_fast_variance=False, name="group")(x)
            return nn.RMSNorm(epsilon=1e-5, use_fast_variance=False, name="rms")(x)

    case = Case("kinds", Reference, Twin, lambda seed: {"ids": np.random.default_rng(seed).integers(0, 11, (3, 7))}, regimes=("as is",))
    battery = Battery(case)
    for tier in ("conversion", "coverage"):
        assert battery.tier(tier).held, battery.tier(tier).sentence
    whole = [check for check in battery.tier("free").checks if not check.where]  # by themselves torch's convolutions take channels first
    assert whole and all(check.held for check in whole)
    assert battery.candidate.leaves["conv.kernel"].shape == (3, 6, 10) and battery.candidate.leaves["depth.kernel"].shape == (2, 1, 10)


def test_equal_layers_share_one_program() -> None:
    class Pair(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(7)(nn.Dense(7)(x))

    adapter = opened(replace(MEMORY, candidate=Pair), "candidate", "float64")
    first = adapter.call("Dense_0", (np.ones((2, 7)),), {})
    count = adapter.programs.count
    assert not np.array_equal(adapter.call("Dense_1", (np.ones((2, 7)),), {}), first) and adapter.programs.count == count
    assert isinstance(adapter, LinenAdapter)


@pytest.mark.parametrize("patch", [Patch("blocks_7"), Patch("proj", lambda *_: None, method="forward")])
def test_patches_of_nothing_are_refused(patch: Patch) -> None:
    adapter = opened(MEMORY, "candidate", "float64")
    with pytest.raises(ValueError, match="a patch names"):
        adapter.twin((patch,)).run(inputs(0), tap=False)
