"""Batches from contiguous lanes, the same for every framework and a function of (seed, step) alone.

    stream  = END d_1 END d_2 END ... of one epoch, documents in the order of its shuffle          (n,)
    lane b  = stream[b S : (b + 1) S + 1],  S = (n - 1) // B;  lanes overlap by the one token that is both label and input
    step s  = columns [s L, (s + 1) L) of every lane, labels one to the right                       (B, L)

Row b of a step goes on where row b of the step before ended, so that states can be carried; the next epoch shuffles the
documents again. Letters: B lanes, L context, n tokens of an epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.data.corpus import Document
from experiments.data.tokens import END, Tokenizer
from experiments.errors import RunError


@dataclass(frozen=True)
class Batch:
    """ids and labels (B, L) int64; `fresh`: whether an epoch starts, where carried states mean nothing."""

    ids: np.ndarray
    labels: np.ndarray
    fresh: bool


class Stream:
    """Training batches by step number."""

    def __init__(self, documents: list[np.ndarray], batch_size: int, context: int, seed: int) -> None:
        """`documents`: token ids of each file. Raises RunError for text too short for one batch."""
        self.documents, self.batch_size, self.context, self.seed = documents, batch_size, context, seed
        self.tokens = sum(map(len, documents)) + len(documents) + 1
        self.lane = (self.tokens - 1) // batch_size
        self.steps_per_epoch = self.lane // context
        if not self.steps_per_epoch:
            raise RunError(
                f"data: {self.tokens} training tokens are too few for training.batch_size={batch_size} and training.context={context}; "
                f"at least {batch_size * context + 1} are needed"
            )
        self._epoch, self._stream = -1, np.zeros(0, dtype=np.int32)

    def order(self, epoch: int) -> np.ndarray:
        """Numbers of the documents in the order of an epoch."""
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.documents))

    def batch(self, step: int) -> Batch:
        """The batch of step 0, 1, ..."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._stream = epoch, joined([self.documents[i] for i in self.order(epoch)])
        start = place * self.context
        columns = np.arange(self.batch_size)[:, None] * self.lane + np.arange(start, start + self.context + 1)
        window = self._stream[columns].astype(np.int64)
        return Batch(np.ascontiguousarray(window[:, :-1]), np.ascontiguousarray(window[:, 1:]), place == 0)

    def seen(self, steps: int) -> list[np.ndarray]:
        """The tokens that the first `steps` steps read, inputs and labels, each position of a document once.

        Returned as runs: stretches of one document, led by END where the document was entered at its start and followed by END where
        it was read to the end.
        """
        masks = [np.zeros(len(document) + 2, dtype=bool) for document in self.documents]
        for epoch in range(-(-steps // self.steps_per_epoch)):
            columns = min(steps - epoch * self.steps_per_epoch, self.steps_per_epoch) * self.context + 1
            start = 0
            for number in self.order(epoch):
                end = start + len(masks[number])  # both ENDs; the second is the first of the next document
                first, last = start // self.lane, (end - 1) // self.lane
                for lane in range(max(first - 1, 0), min(last, self.batch_size - 1) + 1):
                    low, high = max(start, lane * self.lane), min(end, lane * self.lane + columns)
                    masks[number][max(low - start, 0) : max(high - start, 0)] = True
                start = end - 1
        runs = []
        for document, mask in zip(self.documents, masks, strict=True):
            padded = np.concatenate([[END], document, [END]]).astype(np.int32)
            edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
            runs += [padded[low:high] for low, high in zip(edges[::2], edges[1::2], strict=True) if high - low > 1]
        return runs


class OneBatch(Stream):
    """The first batch of a stream at every step, from fresh states."""

    def batch(self, step: int) -> Batch:
        return super().batch(0)

    def seen(self, steps: int) -> list[np.ndarray]:
        return super().seen(min(steps, 1))


def joined(documents: list[np.ndarray]) -> np.ndarray:
    """END d_1 END d_2 END ... (n,) int32."""
    end = np.array([END], dtype=np.int32)
    return np.concatenate([end, *(part for document in documents for part in (document, end))])


def encode(documents: tuple[Document, ...], tokens: Tokenizer) -> list[np.ndarray]:
    """Token ids of every document."""
    return [tokens.encode(document.text) for document in documents]


def held_out(documents: list[np.ndarray]) -> np.ndarray:
    """The held-out stream, in an order that is mixed but the same for every seed."""
    return joined([documents[i] for i in np.random.default_rng(0).permutation(len(documents))])


def lanes(stream: np.ndarray, tokens: int, batch_size: int) -> np.ndarray:
    """The first `tokens` predicted tokens of `stream` as (B, S + 1): S columns to predict and the one before. Raises RunError if too short."""
    columns = min(tokens, len(stream) - 1) // batch_size
    if columns < 1:
        raise RunError(f"evaluation: {len(stream)} held-out tokens are too few for evaluation.batch_size={batch_size}")
    return stream[np.arange(batch_size)[:, None] * columns + np.arange(columns + 1)].astype(np.int64)
