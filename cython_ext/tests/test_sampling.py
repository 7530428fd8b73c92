"""Sampling: the inverse of the cumulative distribution, one draw per row, whatever the logits are."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cython_ext.sampling import sample_token

B, V = 30, 11


def logits(seed=0, rows=B):
    return np.random.default_rng(seed).normal(0.0, 2.0, (rows, V))


def by_hand(row, temperature, top_k, draw):
    """The token of one row in Python floats: rank, keep, exponentiate, walk until the draw is passed."""
    kept = sorted(range(V), key=lambda token: (-row[token], token))[:top_k]
    weights = [math.exp((row[token] - max(row)) / temperature) if token in kept else 0.0 for token in range(V)]
    target, passed = draw * math.fsum(weights), 0.0
    for token, weight in enumerate(weights):
        passed += weight
        if passed > target:
            return token
    raise AssertionError("the draw was never passed")


@pytest.mark.parametrize("top_k", [None, 1, 4, V])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_equals_the_walk_by_hand(temperature, top_k):
    rows = logits()
    draws = np.random.default_rng(5).random(B)
    found = sample_token(rows, temperature, top_k, np.random.default_rng(5))
    assert found.dtype == np.int64 and found.shape == (B,)
    assert found.tolist() == [by_hand(row.tolist(), temperature, top_k, draw) for row, draw in zip(rows, draws.tolist(), strict=True)]


def test_frequencies_are_the_softmax():
    count = 20_000
    row = logits(3, rows=1)
    p = np.exp(row[0]) / np.exp(row[0]).sum()
    found = np.bincount(sample_token(np.repeat(row, count, axis=0), 1.0, None, np.random.default_rng(0)), minlength=V) / count
    assert (np.abs(found - p) < 5 * np.sqrt(p * (1 - p) / count)).all()  # five standard deviations of a binomial share


@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, None), (0, 3), (1.0, None), (0.2, 2), (1e-300, None)])
def test_the_generator_gives_one_double_per_row(temperature, top_k):
    for rows in (logits(1), np.zeros((B, V))):
        used, counted = np.random.default_rng(9), np.random.default_rng(9)
        sample_token(rows, temperature, top_k, used)
        counted.random(B)
        assert used.bit_generator.state == counted.bit_generator.state


def test_temperature_zero_is_the_largest_and_the_lowest_on_a_tie():
    rows = logits(2)
    rows[3] = 1.0
    rows[4, [7, 9]] = 50.0
    expected = [max(range(V), key=lambda token: (row[token], -token)) for row in rows.tolist()]
    for temperature, top_k in ((0.0, None), (0, 5), (1e-300, None), (3.0, 1)):
        found = sample_token(rows, temperature, top_k, np.random.default_rng(0))
        exact = [i for i in range(B) if temperature == 0 or top_k == 1 or i not in (3, 4)]  # a tie at a temperature stays a tie
        assert [found[i] for i in exact] == [expected[i] for i in exact]


def test_top_k_keeps_the_lowest_ids_on_a_tie():
    rows = np.zeros((400, V))
    rows[:, 6] = 1.0
    found = sample_token(rows, 1.0, 3, np.random.default_rng(0))
    assert set(found.tolist()) == {0, 1, 6}  # 400 draws miss a token of probability 0.2 with probability 1e-39


def test_neither_dtype_nor_offset_nor_layout_matters():
    rows = np.round(logits(4) * 64) / 64  # exact in float16
    expected = sample_token(rows, 0.7, 5, np.random.default_rng(1)).tolist()
    for variant in (rows.astype(np.float32), rows.astype(np.float16), rows + 1024.0, np.asfortranarray(rows), rows.astype(">f8")):
        assert sample_token(variant, 0.7, 5, np.random.default_rng(1)).tolist() == expected
    whole = np.arange(V, dtype=np.int32)[None].repeat(3, axis=0)
    assert sample_token(whole, 0.0, None, np.random.default_rng(1)).tolist() == [V - 1] * 3


def test_the_logits_stay_as_they_were():
    rows = logits()
    before = rows.copy()
    sample_token(rows, 0.5, 2, np.random.default_rng(0))
    assert np.array_equal(rows, before)


@pytest.mark.parametrize("draw", [0.0, np.nextafter(1.0, 0.0)])
def test_the_ends_of_the_draw_never_give_an_impossible_token(draw):
    class Fixed(np.random.Generator):
        def random(self, size=None):
            return np.full(size, draw)

    rows = logits(6)
    rows[:, [0, V - 1]] = -1e6  # probability zero in float64
    found = sample_token(rows, 1.0, None, Fixed(np.random.PCG64(0)))
    assert not np.isin(found, [0, V - 1]).any()


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"temperature": -0.1}, ValueError, ["temperature", "not negative", "-0.1"]),
    ({"temperature": math.nan}, ValueError, ["temperature", "finite", "nan"]),
    ({"temperature": math.inf}, ValueError, ["temperature", "finite", "inf"]),
    ({"temperature": "1"}, TypeError, ["temperature", "number", "str"]),
    ({"top_k": 0}, ValueError, ["top_k", "between 1 and V = 11", "found 0"]),
    ({"top_k": V + 1}, ValueError, ["top_k", "between 1 and V = 11", "found 12"]),
    ({"top_k": 2.0}, TypeError, ["top_k", "integer", "float"]),
    ({"logits": np.where(np.arange(V) == 4, np.nan, logits())}, ValueError, ["logits", "finite", "nan", "row 0", "token 4"]),
    ({"logits": np.where(np.arange(B)[:, None] == 7, -np.inf, logits())}, ValueError, ["logits", "finite", "-inf", "row 7", "token 0"]),
    ({"logits": logits()[0]}, ValueError, ["logits", "(B, V)", "(11,)"]),
    ({"logits": logits()[:0]}, ValueError, ["logits", "no axis empty", "(0, 11)"]),
    ({"logits": logits().tolist()}, TypeError, ["logits", "NumPy array", "list"]),
    ({"logits": logits().astype(complex)}, TypeError, ["logits", "real", "complex128"]),
    ({"rng": np.random.RandomState(0)}, TypeError, ["rng", "Generator", "RandomState"]),
])
def test_bad_input_is_refused_by_name(change, error, words):
    good = {"logits": logits(), "temperature": 1.0, "top_k": None, "rng": np.random.default_rng(0)}
    with pytest.raises(error) as caught:
        sample_token(**{**good, **change})
    assert all(word in str(caught.value) for word in words), str(caught.value)
