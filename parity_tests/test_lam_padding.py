"""A sentence's embedding depends on the sentence alone: not on padding, on its neighbours, on its place in the batch or on the backend.

200 sentences of 1 to 400 tokens, lengths on both sides of the ends of chunks, and some longer than the table of positions, encoded alone
without padding and again in shuffled, padded batches. Letters: B batch, L length, D width, P positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import runtime
from conf.models import LamConfig

pytest.importorskip("torch")
pytest.importorskip("jax")

CONFIG = LamConfig(vocab_size=97, dim=30, heads=5, depth=2, ffn_dim=41, gelu_repeats=1)  # P and the chunk are LAM-base's
LONG = (513, 700, 1300)
EDGES = (1, 2, 63, 64, 65, 127, 128, 129, 130, 192, 193)
SIZES = (128, 448, 1344)  # padded lengths: few, because JAX compiles each


def sentences() -> list[np.ndarray]:
    """Token ids of 200 sentences and three long ones, in mixed order."""
    rng = np.random.default_rng(8)
    lengths = [*EDGES, *rng.integers(1, 401, size=200 - len(EDGES)), *LONG]
    return [rng.integers(0, CONFIG.vocab_size, size=length) for length in rng.permutation(lengths)]


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """Weights with which everything matters: decays, fluxes and gates away from their initial values."""
    rng = np.random.default_rng(9)
    initial = runtime.init.init_arrays("lam", CONFIG, 0)
    return {name: value + rng.normal(scale=0.3, size=value.shape) * (value.ndim == 1 or "flux" in name) for name, value in initial.items()}


@pytest.fixture(scope="module")
def truth(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Embeddings (n, D) in float64, each sentence alone and unpadded."""
    model = runtime.build("lam", CONFIG, backend="torch", arrays=arrays, dtype="float64")
    return np.concatenate([model(ids[None]).embedding for ids in sentences()])


def batches(rng: np.random.Generator, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Numbers, ids and masks of shuffled sentences, grouped only by the padded length that they need; the last of a group are few."""
    every = sentences()
    needed = np.array([next(padded for padded in SIZES if padded >= len(ids)) for ids in every])
    for padded in SIZES:
        members = rng.permutation(np.flatnonzero(needed == padded))
        for chosen in np.array_split(members, -(-len(members) // size)):
            rows = np.resize(chosen, size)  # JAX gets full batches: some sentences twice
            ids = rng.integers(0, CONFIG.vocab_size, size=(size, padded))  # padding is any token
            mask = np.arange(padded) < np.array([len(every[i]) for i in rows])[:, None]
            for row, i in enumerate(rows):
                ids[row, : len(every[i])] = every[i]
            yield rows, ids, mask.astype(np.int64)


def moved(found: np.ndarray, expected: np.ndarray) -> float:
    """Greatest distance of unit vectors."""
    return float(np.linalg.norm(found.astype(np.float64) - expected, axis=-1).max())


@pytest.mark.parametrize("backend", ["torch", "cython", "jax"])
def test_float64_embedding_is_the_sentences_own(backend: str, arrays: dict[str, np.ndarray], truth: np.ndarray) -> None:
    model = runtime.build("lam", CONFIG, backend=backend, arrays=arrays, dtype="float64")
    for rows, ids, mask in batches(np.random.default_rng(1), 7):
        # 21 chunks of the longest sentence pass their states on through two layers: some 1e3 roundings of 1e-16
        assert moved(model(ids, mask).embedding, truth[rows]) < 1e-11


@pytest.mark.parametrize("backend", ["torch", "cython"])
def test_float32_embedding_moves_by_rounding(backend: str, arrays: dict[str, np.ndarray], truth: np.ndarray) -> None:
    """In padded batches no further from the truth than twice the worst of the sentences alone: rounding, not meaning."""
    model = runtime.build("lam", CONFIG, backend=backend, arrays=arrays, dtype="float32")
    alone = moved(np.concatenate([model(ids[None]).embedding for ids in sentences()]), truth)
    assert 1e-8 < alone < 1e-5  # float32 at all, and no worse than a hundred of its roundings
    for rows, ids, mask in batches(np.random.default_rng(2), 7):
        assert moved(model(ids, mask).embedding, truth[rows]) < 2 * alone


def test_hidden_states_at_padded_positions_are_zero(arrays: dict[str, np.ndarray]) -> None:
    model = runtime.build("lam", CONFIG, backend="torch", arrays=arrays, dtype="float64")
    _, ids, mask = next(batches(np.random.default_rng(3), 5))
    output: Any = model(ids, mask, output_hidden_states=True)
    assert (mask == 0).any() and len(output.hidden_states) == CONFIG.depth + 1
    for hidden in (*output.hidden_states, output.last_hidden_state):
        assert (hidden[mask == 0] == 0).all() and (np.abs(hidden[mask == 1]).sum(-1) > 0).all()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 0, 1], [1, 1, 1, 1]], "row 0 has padding before a valid token"), ([[1, 1, 1, 1], [0, 0, 0, 0]], "row 1 has no valid token"),
        ([[1, 1, 1, 1], [0, 1, 1, 1]], "row 1 has padding before a valid token"), ([[1, 1, 1], [1, 1, 1]], "must have the shape of input_ids"),
    ],
    ids=["hole", "empty_row", "left_padding", "shape"],
)
@pytest.mark.parametrize("backend", ["torch", "cython", "jax"])
def test_bad_masks_are_refused(backend: str, mask: list[list[int]], message: str) -> None:
    model = runtime.build("lam", CONFIG, backend=backend)
    with pytest.raises(ValueError, match=message):
        model(np.ones((2, 4), np.int64), np.array(mask))
