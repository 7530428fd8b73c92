"""Context shift at inference: where a hidden state turns away from the one before, the text has changed and the states are reset.

    cosine_b = mean over layers of <h, h'> / (|h| |h'|),  h and h' the state before and after a stretch of tokens, of row b

Below the threshold (0.8 in the original's advice) the row reads that stretch again from zero states and goes on from there. The state
that is looked at is the SSM's; of a model without one, the matrix state, flattened. Letters: B batch, L length, N state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cython_ext.sampling import sample_token

HIDDEN = ("ssm", "S", "wkv")  # the first of these that a layer has


def cosines(before: Sequence[Mapping[str, np.ndarray]], after: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """(B,) mean over layers of the cosine between hidden states; one where either state is still zero, which is no turn."""
    layers = []
    for earlier, later in zip(before, after, strict=True):
        kind = next((name for name in HIDDEN if name in earlier), next(iter(earlier)))
        first = np.asarray(earlier[kind], dtype=np.float64).reshape(len(earlier[kind]), -1)
        second = np.asarray(later[kind], dtype=np.float64).reshape(len(later[kind]), -1)
        scale = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
        layers.append(np.where(scale > 0, (first * second).sum(1) / np.where(scale > 0, scale, 1.0), 1.0))
    return np.mean(layers, axis=0)


def shifted(before: Sequence[Mapping[str, np.ndarray]] | None, after: Sequence[Mapping[str, np.ndarray]], threshold: float) -> np.ndarray:
    """(B,) whether a row's context has shifted; no row has at the start of a stream (`before` is None)."""
    if before is None:
        return np.zeros(len(next(iter(after[0].values()))), dtype=bool)
    return cosines(before, after) < threshold


def chosen(
    rows: np.ndarray, there: Sequence[Mapping[str, np.ndarray]], elsewhere: Sequence[Mapping[str, np.ndarray]]
) -> list[dict[str, np.ndarray]]:
    """States from `there` in `rows` (B,), from `elsewhere` in all others."""
    return [
        {kind: np.where(rows.reshape(-1, *[1] * (value.ndim - 1)), first[kind], value) for kind, value in second.items()}
        for first, second in zip(there, elsewhere, strict=True)
    ]


def generate(
    model: Callable[..., Any], input_ids: np.ndarray, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 0,
    *, threshold: float | None = None,
) -> tuple[np.ndarray, list[int]]:
    """`model.generate` with the option to reset states: tokens (B, L + max_new_tokens) and, per row, how often its states were reset.

    The token just read is what a reset row goes on from. With `threshold` None the tokens are those of `model.generate`.
    """
    rng = np.random.default_rng(seed)
    tokens, states, resets = [np.asarray(input_ids)], None, np.zeros(len(input_ids), dtype=np.int64)
    for _ in range(max_new_tokens):
        logits, after = model(tokens[-1], states)
        if threshold is not None:
            rows = shifted(states, after, threshold)
            if rows.any():
                fresh_logits, fresh = model(tokens[-1], None)
                logits = np.where(rows[:, None, None], fresh_logits, logits)
                after = chosen(rows, fresh, after)
                resets += rows
        states = after
        drawn = sample_token(np.asarray(logits)[:, -1].astype(np.float64), temperature, top_k, rng)
        tokens.append(drawn.astype(tokens[0].dtype)[:, None])
    return np.concatenate(tokens, axis=1), resets.tolist()
