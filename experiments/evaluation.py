"""Validation in a streamed pass over held-out text: bits per byte from the cross-entropy alone, and the trigram's on the same bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from experiments.data.tokens import PADDING, Tokenizer
from experiments.ngram import Trigram, bits_per_byte
from experiments.steps.base import TrainStep


@dataclass(frozen=True)
class Validation:
    """Bits per byte, perplexity per token, and over how much they were taken."""

    bits_per_byte: float
    perplexity: float
    tokens: int
    bytes: int
    resets: int = 0  # rows whose states were reset because their context had shifted


def validate(step: TrainStep, lanes: np.ndarray, tokenizer: Tokenizer, chunk: int, shift: float | None = None) -> Validation:
    """Run the lanes (B, S + 1) through the model in chunks of columns, states handed on from zero.

    Every lane's first token is given and not scored. Ends of documents are predicted too; only bytes are divided by. A loss that is not
    finite ends the pass, and is what the result says. `shift`: cosine of hidden states at the ends of two chunks below which a lane goes on
    from what reading the second chunk from zero states gives; None never does that.
    """
    total, states, resets = 0.0, None, 0
    for start in range(0, lanes.shape[1] - 1, chunk):
        window = lanes[:, start : start + chunk + 1]
        ids = np.ascontiguousarray(window[:, :-1])
        nats, after = step.evaluate(ids, np.ascontiguousarray(window[:, 1:]), states)
        total += nats
        if not math.isfinite(total):
            break  # states that are not finite would be refused
        after, shifted = (after, 0) if shift is None else step.reset_shifted(states, after, ids, shift)
        states, resets = after, resets + shifted
    tokens, count = lanes.shape[0] * (lanes.shape[1] - 1), scored_bytes(lanes, tokenizer)
    return Validation(bits_per_byte(total, count), math.exp(min(total / tokens, 700.0)) if math.isfinite(total) else total, tokens, count, resets)


def scored_bytes(lanes: np.ndarray, tokenizer: Tokenizer) -> int:
    """Number of bytes that the columns after the first stand for."""
    return sum(int((tokenizer.symbols(lane[1:]) < 256).sum()) for lane in lanes)


def trigram_bits_per_byte(trigram: Trigram, lanes: np.ndarray, tokenizer: Tokenizer) -> float:
    """The trigram on the same bytes: whatever the model's first token of a lane stands for is context and not scored."""
    bits = 0.0
    for lane in lanes:
        context = tokenizer.symbols(lane[:1])
        symbols = np.concatenate([context[-1:], tokenizer.symbols(lane[1:])])
        bits += trigram.bits(symbols)
    return bits / scored_bytes(lanes, tokenizer)


def seen_symbols(runs: list[np.ndarray], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Bytes and ends of documents that runs of tokens stand for."""
    return [tokenizer.symbols(run[run != PADDING]) for run in runs]
