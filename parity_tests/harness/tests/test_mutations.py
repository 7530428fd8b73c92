"""Each of these porting bugs, put into the healthy toy port, is noticed and located where it was put."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest

pytest.importorskip("torch")
pytest.importorskip("flax")

from parity_tests.harness.adapters import nnx_injectors as bugs
from parity_tests.harness.case import CaseError
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
CASE = replace(toy.CASE, bounds=(), regimes=("as is", "carried state", "+ 100"))


found, test_detected_and_located = mutation_tests((CASE, INJECTORS))


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


def test_the_diagnosis_names_the_family(found: dict) -> None:
    expected = {"kernel not transposed": "transposed kernel", "missing bias": "missing bias", "left at initialisation": "initialisation",
                "(1 + w) for w": "(1 + w) for w", "two heads swapped": "permuted heads", "output x": "uniform slope", "one channel": "one channel",
                "last token": "last token", "cast to": "low precision", "epsilon": "epsilon", "one-pass variance": "one-pass variance",
                "tanh gelu": "gelu", "state dropped": "state dropped", "state stale": "state stale", "state taken": "state early",
                "state in bfloat16": "low precision", "extra stop_gradient": "gradient stopped", "tied weights": "untied",
                "optimiser weight_decay": "optimiser weight_decay", "softmax over": "axis"}
    named = {item.name: item.diagnosis and item.diagnosis.family for item in found.values()}
    assert {name: next(family for start, family in expected.items() if name.startswith(start)) for name in named} == named


def test_nothing_to_inject_is_refused() -> None:
    with pytest.raises(CaseError, match="need injectors"):
        run_mutations(toy.CASE, ())
