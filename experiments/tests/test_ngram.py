"""The trigram baseline: a probability distribution, equal to the formula, and strong where there is structure."""

from __future__ import annotations

import math

import numpy as np
import pytest

from experiments import ngram
from experiments.ngram import Trigram


def text(size: int, seed: int) -> np.ndarray:
    """A second-order chain over 11 symbols: the next symbol follows from the last two, nine times in ten."""
    rng = np.random.default_rng(seed)
    symbols = [3, 5]
    for _ in range(size):
        symbols.append(int(rng.integers(11)) if rng.random() < 0.1 else (3 * symbols[-1] + 5 * symbols[-2] + 1) % 11)
    return np.array(symbols, dtype=np.int32)


def test_probabilities_sum_to_one() -> None:
    fitted = Trigram.fit([text(9000, 0)])
    for context in ([3, 5], [256, 3], [200, 201], [3, 77]):  # known, half known, unknown
        total = 0.0
        for symbol in range(ngram.VOCABULARY):
            alone, both = fitted.bits(np.array(context)), fitted.bits(np.array([*context, symbol]))
            total += 2.0 ** -(both - alone)
        assert total == pytest.approx(1.0, abs=1e-9)


def test_first_symbol_has_no_bigram_but_the_context_given() -> None:
    """bits(symbols) scores all but the first; the second has one symbol of context."""
    fitted = Trigram.fit([text(9000, 0)])
    symbols = text(30, 5)
    assert fitted.bits(symbols[:1]) == 0.0
    assert fitted.bits(symbols[:9]) + fitted.bits(symbols[7:]) > fitted.bits(symbols) > fitted.bits(symbols[:9])


def test_bits_are_the_formula() -> None:
    """One trigram by hand, from counts taken with plain loops and the fitted weights."""
    run = text(3000, 1)
    fitted = Trigram.fit([run])
    a, b, c = (int(symbol) for symbol in run[100:103])
    triples = list(zip(run[:-2].tolist(), run[1:-1].tolist(), run[2:].tolist(), strict=True))
    n_abc, n_ab = triples.count((a, b, c)), sum(triple[:2] == (a, b) for triple in triples)
    pairs = list(zip(run[:-1].tolist(), run[1:].tolist(), strict=True))
    n_bc, n_b = pairs.count((b, c)), sum(pair[0] == b for pair in pairs)
    n_c, n = run[1:].tolist().count(c), len(run) - 1
    average = n_ab / len({triple[2] for triple in triples if triple[:2] == (a, b)})
    weights = fitted.weights[2 + math.floor(4 * math.log2(average))]
    expected = weights @ [1 / 257, n_c / n, n_bc / n_b, n_abc / n_ab]
    found = fitted.bits(np.array([a, b, c])) - fitted.bits(np.array([a, b]))
    assert found == pytest.approx(-math.log2(expected), rel=1e-12)


def test_it_finds_the_structure_that_is_there() -> None:
    """Entropy of the chain: -0.9 log2(0.9 + 0.1 / 11) - ... = 0.80 bits; order one would need more than three."""
    right = 0.9 + 0.1 / 11
    entropy = -right * math.log2(right) - 10 * (0.1 / 11) * math.log2(0.1 / 11)
    fitted, held = Trigram.fit([text(60000, 2)]), text(20000, 3)
    per_symbol = fitted.bits(held) / (len(held) - 1)
    assert entropy - 0.05 < per_symbol < entropy + 0.05  # 0.05: sampling of 20,000 symbols and of 121 contexts


def test_fitting_is_better_than_equal_weights_and_uses_nothing_else() -> None:
    run, held = text(5000, 6), text(5000, 7)
    fitted = Trigram.fit([run])
    plain = Trigram(fitted.counts, np.full_like(fitted.weights, 0.25))
    assert fitted.bits(held) < plain.bits(held)
    assert fitted.bits(held) == Trigram.fit([run]).bits(held)


def test_runs_are_not_joined() -> None:
    counts = ngram._count([np.array([1, 2, 3]), np.array([4, 5, 6])])
    assert counts.trigram.sum() == 2 and counts.bigram.sum() == 4 and counts.bigram[3, 4] == 0


def test_too_little_text() -> None:
    with pytest.raises(ValueError, match="at least 3 symbols, found 2"):
        Trigram.fit([np.array([1, 2])])
    assert math.isfinite(Trigram.fit([np.array([1, 2, 3])]).bits(np.array([9, 9, 9, 1])))
