"""Each of these porting bugs, put into the healthy toy port, is noticed and located where it was put."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("flax")

from flax import nnx

from parity_tests.harness.adapters import nnx_injectors as bugs
from parity_tests.harness.adapters import nnx_injectors_more as more
from parity_tests.harness.adapters.callable_adapter import Engine
from parity_tests.harness.battery import Battery
from parity_tests.harness.case import Case, CaseError
from parity_tests.harness.mutate import Injector, run_mutations
from parity_tests.harness.plugin import mutation_tests
from parity_tests.harness.tests import toy, toy_nnx


@contextlib.contextmanager
def softmax_over_the_wrong_axis() -> Iterator[None]:
    """A patch of the candidate's code, as a case contributes one: heads and channels of the softmax confused."""
    kept = toy_nnx.Heads.__call__

    def wrong(self: toy_nnx.Heads, x: object) -> object:
        y = self.project(x).reshape(*x.shape[:-1], *self.gain.shape)
        return (toy_nnx.jax.nn.softmax(y, -2) * self.gain[...]).reshape(x.shape)

    toy_nnx.Heads.__call__ = wrong
    try:
        yield
    finally:
        toy_nnx.Heads.__call__ = kept


INJECTORS = (
    bugs.transposed("blocks.1.heads.project"),
    bugs.missing_bias("blocks.0.up"),
    bugs.left_at_initialisation("blocks.1.cell.decay"),
    bugs.plus_one("blocks.1.norm"),
    bugs.swapped_heads("blocks.0.heads.gain", heads=3),
    bugs.scaled_output("blocks.1.cell.read"),
    bugs.wrong_channel("blocks.0.down", channel=4),
    bugs.wrong_last_token("blocks.1.heads"),
    bugs.low_precision("blocks.1.cell.write"),
    bugs.epsilon("norm_out"),
    bugs.fast_variance("blocks.0.norm"),
    bugs.tanh_gelu("blocks.0"),
    bugs.dropped_state("blocks.1.cell"),
    bugs.stale_state("blocks.0.cell"),
    bugs.early_state("blocks.1.cell"),
    bugs.state_in_low_precision("blocks.0.cell"),
    bugs.extra_stop_gradient("blocks.1.up"),
    bugs.untied("embedding"),
    bugs.optimiser_setting(weight_decay=1e-4),
    Injector("softmax over the wrong axis", "blocks.0.heads", context=softmax_over_the_wrong_axis),
)


# the default bounds, under which a variance computed in one pass is rounding and not meaning
CASE = replace(toy.CASE, bounds=(), regimes=("as is", "carried state", "+ 100", "one NaN"))
FURTHER = (more.clipped_after_the_moments(),)
# with `--all-mutations`: the calibration has each of them in our models
REST = (
    more.kept_gradient("blocks.1.cell"),
    more.embedding_scale("embedding"),
    more.exchanged("blocks.0.cell.write.kernel", "blocks.1.cell.write.kernel"),
    more.loaded_twice("blocks.1.cell.write.kernel", "blocks.0.cell.write.kernel"),
    more.wrong_weight_row("blocks.0.up.kernel", 3),
    more.coarse_weight("blocks.1.down.kernel"),
    more.ddof("norm_out"),
    more.nan_to_zero("blocks.1.norm"),
    more.embedding_scale_dtype("embedding"),
    more.clamped_index("embedding", 9),
    more.wrong_head("blocks.0.heads", 3),
    more.tf32_matmul("blocks.0.heads.project"),
    more.cast_before_the_scale("blocks.1.norm"),
    more.wrong_row("blocks.1.cell.read", 1),
    more.coarse_input("blocks.0.down"),
    more.epsilon_outside("blocks.0.norm"),
    more.dropout_left_on("blocks.0.down"),
    more.dropped_ragged_token("blocks.1.cell", 4),
    more.written_in_place("blocks.0.cell", "step"),
    more.coupled_decay(),
    more.epsilon_in_the_root(),
    more.no_bias_correction(),
)

found, test_detected_and_located = mutation_tests((CASE, (*INJECTORS, *FURTHER)), more=((CASE, REST),))


def test_cosine_alone_is_blind_to_most(found: dict) -> None:
    noticed = {name for name, item in found.items() if item.cosine_alone}
    assert bugs.dropped_state("blocks.1.cell").name not in noticed
    assert bugs.untied("embedding").name not in noticed
    assert bugs.tanh_gelu("blocks.0").name not in noticed
    assert bugs.transposed("blocks.1.heads.project").name in noticed
    assert len(noticed) < len(found) / 2


def test_the_rules_that_notice(found: dict) -> None:
    # one-pass variance is rounding, not meaning; an extra stop_gradient is seen by gradients only
    assert found[bugs.fast_variance("blocks.0.norm").name].tier == "rounding"
    assert found[bugs.extra_stop_gradient("blocks.1.up").name].tier == "gradients"
    assert found[bugs.optimiser_setting(weight_decay=1e-4).name].tier == "optimiser"


def test_another_optimiser_is_not_served_with_the_step_that_was_compiled_for_the_right_one() -> None:
    """Its state looks alike and its settings are the same, so that only the function tells the two apart."""
    battery = Battery(replace(CASE, regimes=("as is",), dtypes=("float64",)))
    assert battery.tier("optimiser").held
    with more.epsilon_in_the_root().context():
        twin = battery.candidate.mutated(battery.candidate.weights, (), battery.case.trajectory, None)  # shares what was compiled
        assert not Battery(battery.case, recording=battery.recording, candidate=twin).tier("optimiser").held


def test_the_diagnosis_names_the_family(found: dict) -> None:
    expected = {"kernel not transposed": "transposed kernel", "missing bias": "missing bias", "left at initialisation": "initialisation",
                "(1 + w) for w": "(1 + w) for w", "two heads swapped": "permuted heads", "output x": "uniform slope", "one channel": "one channel",
                "last token": "last token", "cast to": "low precision", "epsilon": "epsilon", "one-pass variance": "one-pass variance",
                "tanh gelu": "gelu", "state dropped": "state dropped", "state stale": "state stale", "state taken": "state early",
                "state in bfloat16": "low precision", "extra stop_gradient": "gradient stopped", "tied weights": "untied",
                "optimiser weight_decay": "optimiser weight_decay", "softmax over": "axis"}
    named = {injector.name: found[injector.name].diagnosis and found[injector.name].diagnosis.family for injector in INJECTORS}
    assert {name: next(family for start, family in expected.items() if name.startswith(start)) for name in named} == named


def test_the_tier_that_notices_what_no_forward_pass_shows(found: dict) -> None:
    late = {more.kept_gradient("blocks.1.cell").name: "gradients", more.clipped_after_the_moments().name: "optimiser"}
    assert {item.name: item.tier for item in found.values() if item.name in late}.items() <= late.items()


def test_a_bug_that_raises_is_refused() -> None:
    def engine() -> Engine:
        return Engine(lambda arrays: lambda x: x[:, int(arrays["w"][0])], {"w": np.zeros(1)})

    case = Case("column", engine, engine, lambda seed: {"x": np.random.default_rng(seed).normal(size=(3, 5))},
                leaves={"w": lambda rng, shape: np.ones(shape)})
    with pytest.raises(CaseError, match="'boom' of case 'column' computes nothing wrong, it raises: the candidate raised IndexError: index 9 is out"):
        run_mutations(case, (Injector("boom", "", weights=lambda weights, _: {"w": 9.0 * weights["w"]}),), healthy=False)


def test_a_convolution_padded_on_the_other_side_sees_the_future() -> None:
    layer = nnx.Conv(3, 3, 4, padding="CAUSAL", feature_group_count=3, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 7, 3)).astype(np.float32)
    patch, = more.padded_on_the_other_side("conv").patches
    padded = np.pad(x, ((0, 0), (0, 3), (0, 0)))
    expected = sum(padded[:, tap : tap + 7] * np.asarray(layer.kernel[...])[tap, 0] for tap in range(4)) + np.asarray(layer.bias[...])
    np.testing.assert_allclose(patch.around(layer, layer, (x,), {}), expected, rtol=0, atol=1e-5)  # float32 sums of four products of order 1


@pytest.mark.parametrize(("leaf", "other", "words"), [
    ("a.kernel", "b.kernel", "must have one shape to change places, found \\(3, 5\\) and \\(5, 3\\)"),
    ("a.kernel", "c.kernel", "names leaf 'c.kernel', which the candidate does not have"),
])
def test_leaves_that_cannot_change_places_are_refused(leaf: str, other: str, words: str) -> None:
    weights = {"a.kernel": np.ones((3, 5)), "b.kernel": np.ones((5, 3))}
    for make in (more.exchanged, more.loaded_twice):
        with pytest.raises(ValueError, match=words):
            make(leaf, other).weights(weights, {})


def test_nothing_to_inject_is_refused() -> None:
    with pytest.raises(CaseError, match="need injectors"):
        run_mutations(toy.CASE, ())
