"""From token ids to embeddings: sorted by length, in batches of similar ones, and back in the order given.

Compiling backends get few shapes: lengths are rounded up, four steps to an octave at most, and rows are padded where a batch is not full.
Padding changes no result beyond rounding. Letters: B batch, L length, D width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

BATCH_TOKENS = 2048  # of a batch, padding included: what bounds memory; larger batches measured slower, for they leave the cache
FEW_BATCHES = 8  # up to this many, nobody needs a progress bar


class Batch(NamedTuple):
    """The texts of a batch, by index, and its shape: `rows` >= len(indices), `length` >= the longest of them."""

    indices: list[int]
    rows: int
    length: int


def plan(lengths: Sequence[int], batch_size: int, most: int | None = None, tokens: int = BATCH_TOKENS) -> list[Batch]:
    """Batches of at most `batch_size` texts and, unless a single text is longer, `tokens` tokens; longest texts first.

    `most` None makes every batch as large as its texts; a number rounds shapes, and is the largest length there may be.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches: list[Batch] = []
    start = 0
    while start < len(order):
        longest = lengths[order[start]]
        length = longest if most is None else min(rounded(longest), most)
        rows = max(1, min(batch_size, tokens // length))
        indices = order[start : start + rows]
        if most is None:
            rows = len(indices)
        elif len(indices) < rows and (rows, length) not in {batch[1:] for batch in batches}:
            rows = min(rows, 1 << (len(indices) - 1).bit_length())
        batches.append(Batch(indices, rows, length))
        start += len(indices)
    return batches


def rounded(length: int) -> int:
    """The next multiple of 16 up to 128, beyond of a quarter of the power of two below: at most a quarter and 15 more."""
    step = 1 << max((length - 1).bit_length() - 3, 4)
    return -(-length // step) * step


def padded(ids: Sequence[np.ndarray], batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Ids (B, L), zero where there are none, and the mask (B, L); a row without a text has one valid token."""
    matrix, mask = np.zeros((batch.rows, batch.length), dtype=np.int64), np.zeros((batch.rows, batch.length), dtype=bool)
    mask[len(batch.indices) :, 0] = True
    for row, index in enumerate(batch.indices):
        matrix[row, : len(ids[index])] = ids[index]
        mask[row, : len(ids[index])] = True
    return matrix, mask


def embed(
    model: Callable[..., Any], ids: Sequence[np.ndarray], batches: Iterable[Batch], result: np.ndarray, normalize: bool, done: Callable[[int], None]
) -> None:
    """Fill the rows of `result` (n, D) with the embeddings of `ids`: unit rows, or the means over tokens that they are made of.

    `done` is called with the number of tokens of every batch that is through.
    """
    for batch in batches:
        matrix, mask = padded(ids, batch)
        texts = len(batch.indices)
        output = model(matrix, mask)
        if normalize:
            result[batch.indices] = output.embedding[:texts]
        else:  # zero at padded positions; summed in float64, for a long text has as many roundings as tokens
            result[batch.indices] = output.last_hidden_state[:texts].sum(1, dtype=np.float64) / mask[:texts].sum(1, keepdims=True)
        done(sum(len(ids[index]) for index in batch.indices))


@contextmanager
def progress(total: int, batches: int, show: bool | None) -> Iterator[Callable[[int], None]]:
    """What is to be called with the tokens done: a bar on stderr, if `show`, or, where it is None, if that is a terminal and worth it."""
    if not (sys.stderr.isatty() and batches > FEW_BATCHES if show is None else show):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("encode", total=total)
        yield lambda count: bar.update(task, advance=count)
