"""Trees of different containers are compared by name, and never in silence when a leaf is missing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from parity_tests.harness import tree
from parity_tests.harness.bounds import Bounds
from parity_tests.harness.compare import Place, exact

PLACE = Place("free", "layer", "as is", "float64")


class State(NamedTuple):
    ssm: np.ndarray
    wkv: np.ndarray | None


X, Y = np.arange(3.0) + 1, np.arange(5.0) + 1


def test_a_named_tuple_equals_a_dict_and_a_list_a_tuple() -> None:
    assert list(tree.named([State(X, Y)])) == list(tree.named(({"ssm": X, "wkv": Y},))) == ["0.ssm", "0.wkv"]
    assert all(check.held for check in exact(PLACE, [State(X, Y)], ({"ssm": X, "wkv": Y},), Bounds(), "free"))


@pytest.mark.parametrize(("reference", "candidate", "words"), [
    ([X, Y], [X], "2 leaves in the reference, 1 in the candidate; missing '1'"),
    ([X], [X, Y], "unexpected '1'"),
    (State(X, None), State(X, Y), "unexpected 'wkv'"),
    ([], [], "nothing to compare"),
    (None, None, "nothing to compare"),
    ({"a": X}, {"b": X}, "missing 'a'; unexpected 'b'"),
])
def test_other_leaves_are_a_failed_check(reference: object, candidate: object, words: str) -> None:
    checks = exact(PLACE, reference, candidate, Bounds(), "free")
    assert [check.held for check in checks] == [False]
    assert words in checks[0].detail and checks[0].rule == 1


def test_nothing_broadcasts_between_leaves() -> None:
    checks = exact(PLACE, {"y": np.ones((3, 5))}, {"y": np.ones((1, 5))}, Bounds(), "free")
    assert not checks[0].held and "shape (1, 5), expected (3, 5)" in checks[0].detail


def test_integers_are_compared_as_integers() -> None:
    checks = exact(PLACE, {"n": np.array([1, 2])}, {"n": np.array([1, 3])}, Bounds(), "free")
    assert not checks[0].held and "1 of 2 differ" in checks[0].detail


def test_a_uniform_scale_fails_by_its_slope_even_inside_a_wide_bound() -> None:
    from parity_tests.harness.bounds import Bound

    bounds = Bounds([Bound(0.9, "a bound so wide that only the slope can fail", on="free")])
    failed = [check for check in exact(PLACE, X, 1.5 * X, bounds, "free") if not check.held]
    assert [check.quantity for check in failed] == ["slope - 1"]


def test_pack_and_unpack() -> None:
    value = {"a": State(X, None), "n": 3, "l": [Y, "text"]}
    arrays, structure = tree.pack(value, lambda leaf: isinstance(leaf, np.ndarray))
    back = tree.unpack(arrays, structure)
    assert isinstance(back["a"], State) and back["a"].wkv is None and back["n"] == 3 and back["l"][1] == "text"
    assert back["a"].ssm is X and back["l"][0] is Y


def test_leaves_move_into_the_containers_of_another_tree() -> None:
    made = tree.like([State(X, None), 3], ({"ssm": Y}, 4))
    assert isinstance(made, list) and isinstance(made[0], State) and made[0].ssm is Y and made[0].wkv is None and made[1] == 4
    other = {"wkv": Y}
    assert tree.like(State(X, None), other) is other  # other leaves: whoever compares them says so


def test_signatures_tell_shapes_and_scalars_apart() -> None:
    assert tree.signature([X, 1]) == tree.signature([X + 1, 1])
    assert tree.signature([X, 1]) != tree.signature([X, 2])
    assert tree.signature([X]) != tree.signature([X.astype(np.float32)])
    assert hash(tree.signature({"a": [X, None]})) is not None


def test_the_same_name_twice_is_an_error() -> None:
    with pytest.raises(tree.TreeError, match="two leaves are named '1'"):
        tree.named({1: X, "1": Y})


@pytest.mark.parametrize(("dtype", "bits"), [("float32", 23), ("bfloat16", 7), ("float16", 10)])
def test_grid_keeps_what_the_dtype_can_hold(dtype: str, bits: int) -> None:
    value = np.array([1.0 + 2.0**-bits, 1.0 + 2.0**-(bits + 2)])
    assert tree.to_grid(value, dtype).tolist() == [1.0 + 2.0**-bits, 1.0]
