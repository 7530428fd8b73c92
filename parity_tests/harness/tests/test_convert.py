"""Conversion, proved on integers of which none occurs twice; every operation has an inverse; every problem is named, all at once."""

from __future__ import annotations

import numpy as np
import pytest

from parity_tests.harness import mapping
from parity_tests.harness.adapters.base import Leaf
from parity_tests.harness.convert import (
    Concat,
    Constant,
    ConversionError,
    HeadPermutation,
    Reshape,
    Rule,
    Split,
    Transpose,
    WeightMap,
    unique_integers,
)

SHAPES = {"linear.weight": (5, 3), "conv.weight": (7, 3, 2), "image.weight": (5, 3, 2, 7), "embed.weight": (11, 3), "norm.weight": (3,),
          "norm.bias": (3,), "bare": (2, 3)}
LAYERS = {"linear": "linear", "conv": "conv1d", "image": "conv2d", "embed": "embedding", "norm": "layernorm", "": "Model"}
TARGETS = {"linear.kernel": (3, 5), "conv.kernel": (2, 3, 7), "image.kernel": (2, 7, 3, 5), "embed.embedding": (11, 3), "norm.scale": (3,),
           "norm.bias": (3,), "bare": (2, 3)}


def leaves(shapes: dict, layers: dict = LAYERS) -> dict[str, Leaf]:
    return {name: Leaf(name, shape, "float64", True, layers.get(name.rpartition(".")[0], "Model")) for name, shape in shapes.items()}


def build(reference: dict = SHAPES, candidate: dict = TARGETS, **kwargs: object) -> WeightMap:
    return mapping.build(leaves(reference), leaves(candidate), **{"names": {}, "ties": {}, **kwargs})


def test_every_kind_of_layer_lands_where_it_belongs() -> None:
    integers = unique_integers(SHAPES)
    made = build().to_candidate(integers)
    assert {name: value.shape for name, value in made.items()} == TARGETS
    assert made["linear.kernel"][2, 4] == integers["linear.weight"][4, 2]
    assert made["conv.kernel"][1, 2, 6] == integers["conv.weight"][6, 2, 1]
    assert made["image.kernel"][1, 6, 2, 4] == integers["image.weight"][4, 2, 1, 6]
    assert len(np.unique(np.concatenate([value.ravel() for value in made.values()]))) == sum(value.size for value in integers.values())


def test_there_and_back_bit_for_bit_and_copied() -> None:
    weight_map, integers = build(), unique_integers(SHAPES)
    made = weight_map.to_candidate(integers)
    back = weight_map.to_reference(made)
    for name, value in integers.items():
        assert np.array_equal(back[name], value) and not np.shares_memory(back[name], value)
    assert not any(np.shares_memory(left, right) for left in made.values() for right in integers.values())
    assert all(value.flags.c_contiguous for value in made.values())


X = unique_integers({"x": (6, 10)})["x"]


@pytest.mark.parametrize("operations", [
    (Transpose((1, 0)),), (Reshape((6, 10), (3, 2, 10)),), (HeadPermutation((2, 0, 1), axis=0),), (HeadPermutation((1, 0), axis=1),),
    (Split(0, (1, 5)), Concat(0, (1, 5))), (Reshape((6, 10), (3, 2, 10)), Transpose((1, 2, 0)), HeadPermutation((4, 3, 2, 1, 0), axis=1)),
], ids=["transpose", "reshape", "heads of rows", "heads of columns", "split and concat", "three in a row"])
def test_operations_carry_their_inverse(operations: tuple) -> None:
    rule = Rule("x", "y", operations)
    made = rule.forward([X])
    assert np.array_equal(np.sort(made[0].ravel()), np.sort(X.ravel()))
    assert np.array_equal(rule.inverse(made)[0], X)


def test_heads_move_as_blocks() -> None:
    made = HeadPermutation((2, 0, 1)).forward([X])[0]
    assert np.array_equal(made[:2], X[4:6]) and np.array_equal(made[2:4], X[:2])


def test_a_fused_projection_splits_and_joins_again() -> None:
    reference, candidate = {"qkv": (9, 5)}, {"q": (5, 2), "k": (5, 3), "v": (5, 4)}
    rule = Rule(("qkv",), ("q", "k", "v"), (Split(0, (2, 3, 4)), Transpose((1, 0))))
    weight_map = build(reference, candidate, rules=[rule])
    integers = unique_integers(reference)
    made = weight_map.to_candidate(integers)
    assert made["k"][4, 2] == integers["qkv"][4, 4]
    assert np.array_equal(weight_map.to_reference(made)["qkv"], integers["qkv"])
    assert weight_map.gradients({"q": made["q"]}) == {}
    assert list(weight_map.gradients(made)) == ["qkv"]


def test_constants_are_made_on_one_side_and_checked_on_the_way_back() -> None:
    rules = [Rule((), ("mask",), (Constant(np.array([1.0, 0.0])),)), Rule(("count",), (), (Constant(np.array(0)),))]
    weight_map = build({"count": ()}, {"mask": (2,)}, rules=rules)
    made = weight_map.to_candidate({"count": np.array(0)})
    assert made["mask"].tolist() == [1.0, 0.0]
    assert weight_map.to_reference(made)["count"] == 0
    with pytest.raises(ConversionError, match="a constant of shape"):
        weight_map.to_reference({"mask": np.array([1.0, 2.0])})


def test_ties_are_declared_checked_and_restored() -> None:
    reference = leaves({"embed.weight": (11, 3), "head.weight": (11, 3)}, {"embed": "embedding", "head": "linear"})
    reference["head.weight"] = Leaf("head.weight", (11, 3), "float64", True, "linear", shared="embed.weight")
    candidate = leaves({"embed.embedding": (11, 3)})
    with pytest.raises(ConversionError, match=r"tied but not declared: head\.weight"):
        mapping.build(reference, candidate, names={}, ties={})
    weight_map = mapping.build(reference, candidate, names={}, ties={"head.weight": "embed.weight"})
    table = np.arange(33.0).reshape(11, 3)
    back = weight_map.to_reference(weight_map.to_candidate({"embed.weight": table, "head.weight": table.copy()}))
    assert np.array_equal(back["head.weight"], table) and not np.shares_memory(back["head.weight"], back["embed.weight"])
    with pytest.raises(ConversionError, match=r"head\.weight differs from embed\.weight"):
        weight_map.to_candidate({"embed.weight": table, "head.weight": table + 1})


def test_a_tie_that_is_none_is_refused() -> None:
    with pytest.raises(ConversionError, match="declared to share memory with a, but it does not"):
        build({"a": (3,), "b": (3,)}, {"a": (3,)}, ties={"b": "a"})


def test_all_problems_in_one_error_with_suggestions() -> None:
    reference = {"linear.weight": (5, 3), "lost": (2, 7), "bare": (3,), "twice": (2,)}
    candidate = {"linear.kernel": (5, 3), "found": (7, 2), "bare": (4,), "twice": (2,)}
    with pytest.raises(ConversionError) as caught:
        build(reference, candidate, rules=[Rule("bare", "twice"), Rule("nothing", "bare")])
    text = str(caught.value)
    for words in ("linear.weight (5, 3) becomes (3, 5), but linear.kernel is (5, 3)", "unused: lost (2, 7)", "(nearest: found (7, 2))",
                  "missing: found (7, 2)", "(nearest: lost (2, 7))", "doubly matched: twice is set by", "names nothing, which neither model has",
                  "missing: bare (4,)", "misshapen: bare (3,)"):
        assert words in text, f"{words!r} not in\n{text}"


@pytest.mark.parametrize(("arrays", "words"), [
    ({}, "missing .*bare"), ({**unique_integers(SHAPES), "extra": np.ones(2)}, "unused extra"),
])
def test_arrays_by_other_names_are_refused(arrays: dict, words: str) -> None:
    with pytest.raises(ConversionError, match=words):
        build().to_candidate(arrays)


@pytest.mark.parametrize(("names", "path", "expected"), [
    ({"model.layers.*": "blocks.*"}, "model.layers.3.norm.weight", "blocks.3.norm.weight"),
    ({"a": "b", "a.c": "d"}, "a.c.x", "d.x"),
    ({"a.*.mlp.*": "b.*.*"}, "a.1.mlp.2.w", "b.1.2.w"),
    ({"blocks.*": "blocks_*", "blocks.*.up": "blocks_*.Dense_0"}, "blocks.3.up.weight", "blocks_3.Dense_0.weight"),
    ({}, "a.b", "a.b"),
    (str.upper, "a.b", "A.B"),
])
def test_names_are_mapped_by_prefix(names: object, path: str, expected: str) -> None:
    assert mapping.renamer(names)(path) == expected


def test_a_renamed_leaf_keeps_the_kind_of_its_layer() -> None:
    weight_map = build({"linear.weight": (5, 3), "a.decay": (2,)}, {"proj.kernel": (3, 5), "a.log_decay": (2,)},
                       names={"linear": "proj", "a.decay": "a.log_decay"})
    assert [rule.targets for rule in weight_map.rules] == [("proj.kernel",), ("a.log_decay",)]


@pytest.mark.parametrize("make", [
    lambda: Reshape((2, 3), (5,)), lambda: HeadPermutation((0, 0)), lambda: Rule((), ()),
    lambda: Transpose((0, 1)).forward([np.ones(3)]), lambda: HeadPermutation((1, 0)).forward([np.ones(3)]),
    lambda: Split(0, (1, 1)).forward([np.ones(3)]), lambda: Concat(0, (1, 2)).forward([np.ones(2), np.ones(1)]),
    lambda: Rule("a", ("b", "c")).forward([np.ones(3)]),
])
def test_operations_that_do_not_fit_are_refused(make: object) -> None:
    with pytest.raises(ConversionError):
        make()
