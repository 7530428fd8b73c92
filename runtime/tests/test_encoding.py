"""Batches: every text once, longest first, bounded in tokens, and few shapes for a backend that compiles."""

import numpy as np
import pytest

from runtime.encoding import Batch, padded, plan, progress, rounded


def test_every_text_once_longest_first_and_ties_in_order():
    lengths = [5, 9, 5, 2, 9, 7, 5]
    batches = plan(lengths, 3)
    assert [batch.indices for batch in batches] == [[1, 4, 5], [0, 2, 6], [3]]
    assert [batch[1:] for batch in batches] == [(3, 9), (3, 5), (1, 2)]
    assert plan([], 3) == [] and plan([], 3, 90) == []


def test_tokens_of_a_batch_are_bounded():
    lengths = [400, 70, 90, 100, 30, 30, 30]
    batches = plan(lengths, 5, tokens=200)
    assert [batch.indices for batch in batches] == [[0], [3, 2], [1, 4], [5, 6]]
    assert all(batch.rows * batch.length <= 200 for batch in batches[1:])
    assert batches[0] == Batch([0], 1, 400)  # longer than the budget: alone


@pytest.mark.parametrize("length, expected", [
    (1, 16), (16, 16), (17, 32), (128, 128), (129, 160), (257, 320), (513, 640), (1024, 1024), (1025, 1280), (20000, 20480), (32768, 32768),
])
def test_rounded_lengths(length, expected):
    assert rounded(length) == expected


def test_few_shapes():
    assert len({rounded(length) for length in range(1, 32769)}) == 8 + 8 * 4  # to 128, and four in each of eight octaves
    assert all(rounded(length) < 1.25 * length + 16 for length in range(1, 32769))
    lengths = np.random.default_rng(0).integers(1, 291, 1000).tolist()
    batches = plan(lengths, 7, 290)
    assert sorted(index for batch in batches for index in batch.indices) == list(range(1000))
    assert {batch.rows for batch in batches} == {7}
    assert max(batch.length for batch in batches) == 290  # the model takes no more
    assert len({batch[1:] for batch in batches}) == 8 + 4 + 1  # to 128, to 256, and 290


def test_a_batch_that_is_not_full_takes_a_shape_that_there_is_or_a_power_of_two():
    assert [batch[1:] for batch in plan([20] * 17, 7, 90)] == [(7, 32)] * 3
    assert plan([20] * 5, 7, 90)[0][1:] == (7, 32)  # 8 would be more than the batch
    assert plan([20] * 5, 13, 90)[0][1:] == (8, 32)
    assert plan([20], 13, 90)[0][1:] == (1, 32)
    assert [batch[1:] for batch in plan([20] * 7 + [3], 7, 90)] == [(7, 32), (1, 16)]


def test_padding():
    ids = [np.array([5, 6, 7]), np.array([8]), np.array([9, 10])]
    matrix, mask = padded(ids, Batch([2, 1], 3, 5))
    assert matrix.tolist() == [[9, 10, 0, 0, 0], [8, 0, 0, 0, 0], [0, 0, 0, 0, 0]] and matrix.dtype == np.int64
    assert mask.tolist() == [[True, True, False, False, False], [True] + [False] * 4, [True] + [False] * 4]


@pytest.mark.parametrize("terminal, batches, show, shown", [
    (True, 9, None, True), (True, 8, None, False), (False, 99, None, False), (True, 99, False, False), (False, 1, True, True),
])
def test_progress_bar(monkeypatch, capsys, terminal, batches, show, shown):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    with progress(50, batches, show) as done:
        done(20)
        done(30)
    captured = capsys.readouterr()
    assert captured.out == "" and ("100%" in captured.err) == shown and bool(captured.err) == shown
