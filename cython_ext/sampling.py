"""Sampling of the next token, in NumPy and float64, shared by every backend so that all of them give the same tokens.

    p = softmax(logits / temperature) over the top_k largest;  token = first index with cumsum(p) > draw * sum(p)

The cumulative sum runs in the order of the token ids, not of the probabilities: two backends whose logits differ by rounding could
sort near ties differently. Letters: B batch, V vocabulary.
"""

from __future__ import annotations

import math
import operator

import numpy as np


def sample_token(logits: np.ndarray, temperature: float, top_k: int | None, rng: np.random.Generator) -> np.ndarray:
    """One token id per row, by inverting the cumulative distribution at one uniform draw per row.

    logits (B, V), finite, of any real dtype, taken as float64; temperature 0 means the largest logit, the lowest id on a tie; top_k
    between 1 and V keeps the largest logits, the lowest ids on a tie, None keeps all. `rng` gives exactly B doubles per call
    whatever the other arguments are. Returns (B,) int64. Raises TypeError for a wrong type; ValueError for another shape, logits
    that are not finite, a temperature that is negative or not finite, a top_k outside [1, V].
    """
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng must be a numpy.random.Generator, found {type(rng).__name__}")
    if not isinstance(logits, np.ndarray) or logits.dtype.kind not in "fiu":
        raise TypeError(f"logits must be a NumPy array of real numbers, found {getattr(logits, 'dtype', type(logits).__name__)}")
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"logits must have shape (B, V) with no axis empty, found {logits.shape}")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float, np.integer, np.floating)):
        raise TypeError(f"temperature must be a number, found {type(temperature).__name__}")
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and not negative, found {temperature!r}")
    size = logits.shape[1]
    if top_k is not None:
        try:
            top_k = operator.index(top_k)
        except TypeError:
            raise TypeError(f"top_k must be an integer or None, found {type(top_k).__name__}") from None
        if not 1 <= top_k <= size:
            raise ValueError(f"top_k must lie between 1 and V = {size}, found {top_k}")
    scores = logits.astype(np.float64)
    if not np.isfinite(scores).all():
        row, token = np.argwhere(~np.isfinite(scores))[0]
        raise ValueError(f"logits must be finite, found {scores[row, token]} in row {row} at token {token}")

    draws = rng.random(len(scores))
    if temperature == 0:
        return scores.argmax(axis=1)
    if top_k is not None:
        order = np.argsort(-scores, axis=1, kind="stable")
        np.put_along_axis(scores, order[:, top_k:], -np.inf, axis=1)
    with np.errstate(over="ignore"):  # a tiny temperature sends every other score to -inf, as it should
        weights = np.exp((scores - scores.max(axis=1, keepdims=True)) / float(temperature))
    cumulative = weights.cumsum(axis=1)
    return (cumulative > draws[:, None] * cumulative[:, -1:]).argmax(axis=1)
