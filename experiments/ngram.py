"""An interpolated byte trigram: the baseline that a trained model has to beat.

    p(c | a b) = l3 N(abc) / N(ab) + l2 N(bc) / N(b) + l1 N(c) / N + l0 / V

The weights l (summing to one) depend on how full the context is: Jelinek-Mercer smoothing, with contexts put into buckets by their
average count N(ab) / distinct(ab) and, where ab was never seen, by that of b. They are found by expectation-maximisation on every
twentieth stretch of the seen text, against counts of the rest; the counts are then taken over all of it. Validation text has no part in this.

Source: Jelinek and Mercer 1980; buckets by average count: Chen and Goodman 1998. V symbols: 256 bytes and the end of a document.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

VOCABULARY = 257
_STRETCH = 4096  # bytes of one stretch of text that is held out, or not, as a whole
_EVERY = 20
_BUCKETS = 40
_ROUNDS = 30


@dataclass(frozen=True)
class Counts:
    """Counts of one text: unigrams (V,), bigrams (V, V), and the trigrams that occur, sorted by code a V^2 + b V + c."""

    unigram: np.ndarray
    bigram: np.ndarray
    codes: np.ndarray
    trigram: np.ndarray
    context: np.ndarray  # (V, V): times that ab was followed by something
    distinct: np.ndarray  # (V, V): by how many symbols


class Trigram:
    """`Trigram.fit(runs)`, then `bits(symbols)`."""

    def __init__(self, counts: Counts, weights: np.ndarray) -> None:
        self.counts, self.weights = counts, weights  # weights (buckets, 4): uniform, unigram, bigram, trigram

    @classmethod
    def fit(cls, runs: list[np.ndarray]) -> Trigram:
        """Fit on stretches of contiguous symbols (n,) in [0, 257). Raises ValueError if they hold fewer than three symbols."""
        if sum(map(len, runs)) < 3:
            raise ValueError(f"a trigram needs at least 3 symbols, found {sum(map(len, runs))}")
        pieces = [run[start : start + _STRETCH] for run in runs for start in range(0, len(run), _STRETCH)]
        held = pieces[_EVERY - 1 :: _EVERY] or pieces[-1:]
        kept = [piece for index, piece in enumerate(pieces) if index % _EVERY != _EVERY - 1]
        kept = kept if len(pieces) >= _EVERY else (pieces[:-1] or pieces)
        some = _count(kept)
        buckets, parts = zip(*(_parts(some, piece) for piece in held), strict=True)
        return cls(_count(runs), _fit_weights(np.concatenate(buckets), np.concatenate(parts)))

    def bits(self, symbols: np.ndarray) -> float:
        """Total bits of symbols[1:] (n,) given what stands before each in `symbols`."""
        buckets, parts = _parts(self.counts, symbols)
        return float(-np.log2((self.weights[buckets] * parts).sum(-1)).sum())


def _count(runs: list[np.ndarray]) -> Counts:
    v = VOCABULARY
    unigram = np.zeros(v, dtype=np.int64)
    bigram = np.zeros(v * v, dtype=np.int64)
    codes = []
    for run in runs:
        run = run.astype(np.int64)
        unigram += np.bincount(run[1:], minlength=v)
        if len(run) > 1:
            np.add.at(bigram, run[:-1] * v + run[1:], 1)
        if len(run) > 2:
            codes.append((run[:-2] * v + run[1:-1]) * v + run[2:])
    every, counts = np.unique(np.concatenate(codes) if codes else np.zeros(0, dtype=np.int64), return_counts=True)
    context = np.bincount(every // v, weights=counts, minlength=v * v).astype(np.int64)
    distinct = np.bincount(every // v, minlength=v * v)
    return Counts(unigram, bigram.reshape(v, v), every, counts, context.reshape(v, v), distinct.reshape(v, v))


def _parts(counts: Counts, symbols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For symbols[1:]: the bucket of the context (n - 1,), and the four probabilities that are mixed (n - 1, 4).

    A missing context, the one before the first two symbols included, gives zero for its order; its bucket carries no such weight.
    """
    v = VOCABULARY
    symbols = symbols.astype(np.int64)
    b, c = symbols[:-1], symbols[1:]
    a = np.concatenate([[-1], symbols[:-2]])
    known = a >= 0
    after_ab = np.where(known, counts.context[a, b], 0)
    after_b = counts.bigram[b].sum(-1) if len(b) < v else counts.bigram.sum(-1)[b]
    code = (a * v + b) * v + c
    place = np.minimum(np.searchsorted(counts.codes, code), max(len(counts.codes) - 1, 0))
    n_abc = np.where(known & (counts.codes[place] == code), counts.trigram[place], 0) if len(counts.codes) else np.zeros(len(c))
    parts = np.stack([
        np.full(len(c), 1.0 / v),
        counts.unigram[c] / max(counts.unigram.sum(), 1),
        counts.bigram[b, c] / np.maximum(after_b, 1),
        n_abc / np.maximum(after_ab, 1),
    ], axis=-1)
    full = np.where(after_ab > 0, after_ab / np.maximum(np.where(known, counts.distinct[a, b], 1), 1), 0.0)
    thin = np.minimum(after_b, 1)  # 1 where at least b was seen
    bucket = np.where(after_ab > 0, 2 + np.minimum(np.floor(4 * np.log2(np.maximum(full, 1.0))), _BUCKETS - 3), thin).astype(np.int64)
    return bucket, parts


def _fit_weights(buckets: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Expectation-maximisation of the weights (buckets, 4); every bucket starts equal, and keeps half a count of that."""
    allowed = np.ones((_BUCKETS, 4))
    allowed[0, 2:] = 0.0
    allowed[1, 3:] = 0.0
    prior = allowed / allowed.sum(-1, keepdims=True)
    weights = prior.copy()
    for _ in range(_ROUNDS):
        shares = weights[buckets] * parts
        shares /= shares.sum(-1, keepdims=True)
        total = 0.5 * prior
        for order in range(4):
            total[:, order] += np.bincount(buckets, weights=shares[:, order], minlength=_BUCKETS)
        weights = total / total.sum(-1, keepdims=True)
    return weights


def bits_per_byte(nats: float, count: int) -> float:
    """Bits per byte of a total loss in nats over text of `count` bytes."""
    return nats / math.log(2) / count
