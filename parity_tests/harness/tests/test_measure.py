"""Measures are not fooled by NaN, zero, broadcasting or emptiness."""

from __future__ import annotations

import math

import numpy as np
import pytest

from parity_tests.harness.measure import MeasureError, cosine, max_ulp, measure, relative_l2

RNG = np.random.default_rng(0)
A = RNG.normal(size=(3, 5, 7))


def test_equal_arrays_measure_zero() -> None:
    found = measure(A, A.copy())
    assert (found.relative_l2, found.slope, found.max_abs, found.max_ulp, found.mismatched) == (0.0, 1.0, 0.0, 0.0, 0)
    assert found.snr_db == math.inf
    assert found.cosine == pytest.approx(1.0, abs=1e-15)  # one rounding of a normalised product


def test_known_values() -> None:
    found = measure(np.array([3.0, 4.0]), np.array([3.0, 4.5]))
    assert found.relative_l2 == 0.1
    assert found.slope == pytest.approx((9 + 18) / 25, rel=1e-15)  # a division and a sum
    assert found.snr_db == pytest.approx(20.0, rel=1e-15)
    assert (found.max_abs, found.max_abs_at) == (0.5, (1,))


def test_a_uniform_scale_has_cosine_one_and_another_slope() -> None:
    found = measure(A, 1.5 * A)
    assert found.cosine == pytest.approx(1.0, abs=1e-15)
    assert found.slope == pytest.approx(1.5, rel=1e-14)  # sums of 105 terms
    assert found.relative_l2 == pytest.approx(0.5, rel=1e-14)


def test_worst_row_channel_and_step() -> None:
    other = A.copy()
    other[2, 3, 4] += 1.0
    found = measure(A, other)
    assert (found.max_abs_at, found.worst_row, found.worst_channel, found.worst_step) == ((2, 3, 4), (2, 3), 4, 3)
    assert found.worst_cosine < found.cosine


@pytest.mark.parametrize(("left", "right", "expected"), [
    (np.zeros(3), np.zeros(3), 1.0), (np.zeros(3), np.ones(3), 0.0), (np.ones(3), np.zeros(3), 0.0), (np.ones(3), -np.ones(3), -1.0),
])
def test_cosine_of_zeros(left: np.ndarray, right: np.ndarray, expected: float) -> None:
    assert cosine(left, right) == pytest.approx(expected, abs=1e-15)  # one rounding


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_cosine_of_anything_not_finite_fails(bad: float) -> None:
    value = cosine(np.array([1.0, bad]), np.array([1.0, bad]))
    assert math.isnan(value)
    assert not value >= 0.99


def test_only_the_reference_zero_is_infinitely_wrong() -> None:
    assert relative_l2(np.zeros(3), np.full(3, 1e-300)) == math.inf
    assert relative_l2(np.zeros(3), np.zeros(3)) == 0.0


def test_tiny_and_huge_values_neither_underflow_nor_overflow() -> None:
    # squares of these leave the range of float64
    assert relative_l2(np.full(3, 1e-200), np.full(3, 2e-200)) == pytest.approx(1.0, rel=1e-15)
    assert relative_l2(np.full(3, 1e200), np.full(3, 2e200)) == pytest.approx(1.0, rel=1e-15)
    assert math.isfinite(measure(np.full(3, 1.7e308), np.full(3, -1.7e308)).relative_l2)


def test_nan_must_stand_at_the_same_places() -> None:
    left, right = A.copy(), A.copy()
    left[0, 0, 0] = right[0, 0, 0] = math.nan
    same = measure(left, right)
    assert same.relative_l2 == 0.0 and math.isnan(same.cosine) and "same places in both" in same.note
    right[1, 2, 3] = math.nan
    other = measure(left, right)
    assert other.relative_l2 == math.inf and "[1, 2, 3]" in other.note


def test_infinities_must_have_the_same_sign() -> None:
    assert measure(np.array([math.inf, 1.0]), np.array([-math.inf, 1.0])).relative_l2 == math.inf
    assert measure(np.array([math.inf, 1.0]), np.array([math.inf, 1.0])).relative_l2 == 0.0


@pytest.mark.parametrize(("left", "right", "words"), [
    (np.ones((3, 1)), np.ones((3, 5)), r"shape \(3, 5\), expected \(3, 1\)"),
    (np.ones(3), np.ones((1, 3)), r"shape \(1, 3\), expected \(3,\)"),
    (np.ones(3), np.ones(3, np.float32), "dtype float32, expected float64"),
    (np.ones(3), np.ones(3, np.int64), "dtype int64, expected float64"),
    (np.ones((0, 3)), np.ones((0, 3)), "nothing to compare"),
    (np.array(["a"]), np.array(["a"]), "expected numbers"),
])
def test_what_does_not_compare_is_an_error(left: np.ndarray, right: np.ndarray, words: str) -> None:
    with pytest.raises(MeasureError, match=words):
        measure(left, right)


def test_the_worst_row_counts_zero_rows_as_a_whole_array_does() -> None:
    rows = np.array([[0.0, 0.0], [1.0, 2.0], [3.0, 4.0]])
    assert measure(rows, rows * np.array([[1.0], [1.0], [1.5]])).worst_cosine == pytest.approx(1.0, abs=1e-15)  # one rounding
    assert measure(rows, rows + np.array([[1e-9, 0.0], [0.0, 0.0], [0.0, 0.0]])).worst_cosine == 0.0
    assert measure(rows, rows * np.array([[1.0], [-1.0], [1.0]])).worst_cosine == pytest.approx(-1.0, abs=1e-15)


def test_integers_are_counted() -> None:
    assert measure(np.array([1, 2, 3]), np.array([1, 5, 3])).mismatched == 1


def test_ulp_counts_representable_numbers() -> None:
    one = np.array([1.0], np.float32)
    assert max_ulp(one, np.nextafter(one, np.float32(2))) == 1.0
    assert max_ulp(np.array([0.0]), np.array([-0.0])) == 0.0
    tiny = np.nextafter(np.array([0.0]), 1.0)
    assert max_ulp(tiny, -tiny) == 2.0


def test_complex_numbers_compare_by_parts() -> None:
    assert relative_l2(np.array([3.0 + 4.0j]), np.array([3.0 + 4.5j])) == 0.1


def test_a_scalar_has_no_rows() -> None:
    found = measure(np.array(2.0), np.array(2.5))
    assert (found.relative_l2, found.worst_row, found.worst_channel) == (0.25, None, None)
