"""A case that is not well formed is refused when it is written; bounds need reasons; regimes and lint do what they say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from parity_tests.harness import lint
from parity_tests.harness.adapters.base import Leaf, Node
from parity_tests.harness.bounds import DEFAULTS, Bound, BoundError, Bounds
from parity_tests.harness.case import Case, CaseError
from parity_tests.harness.leaves import moved, randomised
from parity_tests.harness.policy import Policy
from parity_tests.harness.regimes import BY_NAME, Regime, chosen, transformed
from parity_tests.harness.tests.toy import CASE


@pytest.mark.parametrize(("value", "reason", "on"), [
    (1e-9, "", "forced"), (1e-9, "because", "forced"), (1e-9, None, "forced"), (float("nan"), "a good reason", "forced"),
    (float("inf"), "a good reason", "forced"), (-1e-9, "a good reason", "forced"), (True, "a good reason", "forced"),
    ("1e-9", "a good reason", "forced"), (1e-9, "a good reason", "everything"), (1.5, "a good reason", "cosine"),
])
def test_a_bound_without_a_number_or_a_reason_is_refused(value: object, reason: object, on: str) -> None:
    with pytest.raises(BoundError):
        Bound(value, reason, on=on)


def test_the_last_bound_that_covers_a_place_holds() -> None:
    bounds = Bounds([Bound(1e-12, "measured on clean ports"), Bound(1e-10, "a long sum there", where="blocks.*.ssm", regime="+ 100")])
    assert bounds.find("forced", "blocks.0.ssm", "+ 100").value == 1e-10
    assert bounds.find("forced", "blocks.0.ssm", "as is").value == 1e-12
    assert bounds.find("free", "blocks.0.ssm", "+ 100").value == 1e-9
    assert all(len(bound.reason.split()) > 3 for bound in DEFAULTS)
    one = Bounds([Bound(1e-7, "a mean over all tokens", where="blocks.*", leaf="2.gate")])
    assert [one.find("forced", "blocks.0", leaf=leaf).value for leaf in ("2.gate", "2", "0", "")] == [1e-7, 1e-9, 1e-9, 1e-9]
    with pytest.raises(BoundError, match="a bound is a Bound"):
        Bounds([1e-9])


@pytest.mark.parametrize(("change", "words"), [
    ({"name": ""}, "needs a name"), ({"reference": 3}, "reference of case 'toy' must be a function"), ({"loss": (len,)}, "pair of functions"),
    ({"dtypes": ("float32",)}, "hold float64"), ({"dtypes": ("float64", "int8")}, "dtypes"), ({"unpaired": {"head": "because"}}, "needs a reason"),
    ({"regimes": ()}, "at least one regime"), ({"regimes": ("as was",)}, "unknown regime 'as was'"), ({"regimes": ("as is", "as is")}, "two regimes"),
    ({"bounds": (1e-9,)}, "a bound is a Bound"),
])
def test_a_case_that_makes_no_sense_is_refused(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(CASE, **change)


@pytest.mark.parametrize("inputs", [lambda seed: {}, lambda seed: [np.ones(3)], lambda seed: {"x": [1.0, 2.0]}])
def test_inputs_that_are_no_arrays_are_refused(inputs: object) -> None:
    with pytest.raises(CaseError, match="input"):
        Case("c", lambda: None, lambda: None, inputs).draw(0)


def test_regimes_change_what_they_say() -> None:
    value = {"x": np.arange(24.0).reshape(2, 3, 4), "ids": np.arange(6).reshape(2, 3), "n": 3}
    assert np.array_equal(transformed(BY_NAME["+ 100"], value)["x"], value["x"] + 100.0)
    assert np.array_equal(transformed(BY_NAME["x 1e-3"], value)["ids"], value["ids"])
    hot = transformed(BY_NAME["one-hot"], value)["x"]
    assert np.array_equal(np.unique(hot), [0.0, 1.0]) and np.array_equal(hot.sum(-1), np.ones((2, 3)))
    repeated = transformed(BY_NAME["repeated token"], value)
    assert repeated["ids"].tolist() == [[0, 0, 0], [3, 3, 3]] and np.array_equal(repeated["x"][:, 2], value["x"][:, 0]) and repeated["n"] == 3
    assert chosen(None)[0].name == "as is"
    with pytest.raises(ValueError, match="transform of regime"):
        Regime("odd", transform="upside down")
    with pytest.raises(ValueError, match="length of regime"):
        Regime("odd", length=0)


def test_lint_of_sizes() -> None:
    found = lint.sizes({"batch": 3, "width": 15, "again": 15, "state": 8, "square": 9, "one": 1})
    assert found == ["sizes: width and again are both 15", "sizes: state = 8 is a power of two", "sizes: square = 9 is a perfect square"]
    assert lint.sizes(CASE.sizes) == []


def test_lint_of_defaults_that_differ() -> None:
    reference = {"n": Node("n", "layernorm", {"eps": 1e-5}), "r": Node("r", "rmsnorm", {"eps": None}),
                 "g": Node("g", "gelu", {"approximate": "none"}), "b": Node("b", "batchnorm", {"eps": 1e-5, "momentum": 0.1})}
    candidate = {"n": Node("n", "layernorm", {"epsilon": 1e-6, "use_fast_variance": True}), "r": Node("r", "rmsnorm", {"epsilon": 1e-6}),
                 "b": Node("b", "batchnorm", {"epsilon": 1e-5, "momentum": 0.99})}
    text = "\n".join(lint.defaults(reference, candidate, lambda path: path if path in candidate else None))
    for words in ("n: epsilon 1e-06 in the candidate, 1e-05", "n: the candidate computes the variance in one pass", "r: torch's RMSNorm without eps",
                  "g: torch's gelu is exact", "b: momentum 0.99"):
        assert words in text


LEAVES = {"norm.weight": Leaf("norm.weight", (7,), "float64", True, "layernorm"), "norm.bias": Leaf("norm.bias", (7,), "float64", True, "layernorm"),
          "tied": Leaf("tied", (7,), "float64", True, "linear"), "count": Leaf("count", (), "int64", False, "Model")}
CURRENT = {"norm.weight": np.ones(7), "norm.bias": np.zeros(7), "tied": np.ones(7), "count": np.array(3)}


def draw(**kwargs: object) -> dict:
    return randomised(LEAVES, CURRENT, **{"seed": 0, "grid": "float32", "overrides": {}, "ties": {"tied": "norm.weight"}, **kwargs})


def test_every_floating_leaf_is_randomised() -> None:
    made = draw()
    assert np.all(np.abs(made["norm.weight"] - 1.0) > 0.09) and np.all(np.abs(made["norm.bias"]) > 0.09)
    assert np.array_equal(made["tied"], made["norm.weight"]) and made["count"] == 3
    assert np.array_equal(made["norm.bias"], made["norm.bias"].astype(np.float32))
    assert np.array_equal(made["norm.bias"], draw()["norm.bias"])
    assert not np.array_equal(made["norm.bias"], draw(seed=1)["norm.bias"])


def test_overrides_are_checked() -> None:
    made = draw(overrides={"*.bias": lambda rng, shape: np.full(shape, 0.25), "count": lambda rng, shape: np.array(7)})
    assert np.all(made["norm.bias"] == 0.25) and made["count"] == 7 and made["count"].dtype == np.int64
    with pytest.raises(CaseError, match="no leaf is named"):
        draw(overrides={"*.decay": lambda rng, shape: np.ones(shape)})
    with pytest.raises(CaseError, match="values for"):
        draw(overrides={"*.bias": lambda rng, shape: np.ones(3)})


def test_a_moved_leaf_moves_everywhere_but_not_uniformly() -> None:
    values = np.array([0.0, 1.0, -2.0, 3.0])
    ratio = moved(values, "x", 0)[1:] / values[1:] - 1.0
    assert np.all(np.abs(ratio) <= 0.01 + 1e-15)  # one rounding above the 1 %
    assert len(np.unique(ratio)) == 3 and moved(values, "x", 0)[0] != 0.0


@pytest.mark.parametrize("settings", [{"matmul": "fast"}, {"threads": 0}, {"threads": True}])
def test_a_policy_that_makes_no_sense_is_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        Policy(**settings)
