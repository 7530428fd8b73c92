"""Batches of texts of similar length, so that little of them is padding, within a budget of tokens, so that long ones do not explode."""

from __future__ import annotations

import numpy as np


def batches(lengths: np.ndarray, batch_tokens: int, keys: np.ndarray | None = None) -> list[np.ndarray]:
    """Indices of texts in batches of at most `batch_tokens` tokens, padding included, in the order of `keys`, else of their lengths.

    A text that is longer than that by itself is a batch by itself.
    """
    found: list[list[int]] = []
    longest = 0
    for i in np.argsort(lengths if keys is None else keys, kind="stable"):
        longest = max(longest, int(lengths[i])) if found else int(lengths[i])
        if not found or longest * (len(found[-1]) + 1) > batch_tokens:
            found.append([])
            longest = int(lengths[i])
        found[-1].append(int(i))
    return [np.array(batch) for batch in found]


def plan(lengths: np.ndarray, epochs: int, batch_tokens: int, seed: int) -> list[np.ndarray]:
    """The batches of all epochs: in each, texts of similar length together and the batches in random order.

    Lengths are jittered by up to 15 % before they are sorted, so that an epoch's batches are not those of the last.
    """
    found: list[np.ndarray] = []
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, 3, epoch])
        made = batches(lengths, batch_tokens, lengths * rng.uniform(1.0, 1.15, len(lengths)))
        found += [made[i] for i in rng.permutation(len(made))]
    return found
