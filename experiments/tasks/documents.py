"""Long documents: time and memory of one embedding against the number of tokens, which a recurrent encoder keeps in proportion.

The text is CPython's documentation and docstrings, one after another, cut at a token; each length is encoded by itself, alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conf.schema import DataConfig
from experiments.data import corpus
from experiments.errors import RunError
from experiments.monitors.memory import peak_bytes, reset_peak

REPEATS = 3


@dataclass(frozen=True)
class Row:
    """One length: median seconds, tokens per second, and the process's peak memory above what it held before any."""

    tokens: int
    seconds: float
    tokens_per_second: float
    megabytes_above: float


def texts(tokenizer: Any, lengths: Sequence[int]) -> list[str]:
    """Text of exactly so many tokens, special ones included, for every length. Raises RunError where there is not as much text."""
    documents = corpus.load(DataConfig(parts=["topics", "docstrings"]))
    text = "\n".join(document.text for document in documents.training)[: 16 * max(lengths)]
    encoding = tokenizer.encode(text, add_special_tokens=False)
    special = tokenizer.num_special_tokens_to_add(False)
    if len(encoding.ids) + special < max(lengths):
        raise RunError(f"lengths: the text has {len(encoding.ids)} tokens, {max(lengths)} were asked for")
    return [text[: encoding.offsets[length - special - 1][1]] for length in lengths]


def run(lam: Any, lengths: Sequence[int]) -> list[Row]:
    """One row for each length, in rising order; `lam` is a `runtime.LAM`. The first call of a length gives its memory, those after it its time."""
    rows = []
    lam.encode("What only the first call does, such as loading libraries.")
    reset_peak()
    held = peak_bytes()
    lengths = sorted(lengths)
    for length, document in zip(lengths, texts(lam.tokenizer, lengths), strict=True):
        reset_peak()
        lam.encode(document)
        above = peak_bytes() - held
        seconds = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            lam.encode(document)
            seconds.append(time.perf_counter() - started)
        median = statistics.median(seconds)
        rows.append(Row(length, median, length / median, above / 2**20))
    return rows
