"""Induction and recall in bytes: puzzles that only what stands in the context can solve, each scored against its chance with an error bar.

    induction   END s_1 ... s_n \\n s_o ... s_i -> s_{i+1}              s: the letters in random order; after the marker they are repeated from s_o on
    recall      END k_1=V_1; ... k_n=V_n; \\n k_i=V_i; k_j= -> V_j      distinct keys and values; the keys asked for are drawn one by one

An answer is the likeliest of a few options, all of which stand in the context and are as likely to whoever has not found the place: in recall
the values of all keys, in induction the next letter and others that are not repeated, so many of them older that its rank by age is drawn
evenly. So chance is one over their number, exactly, and neither counting letters nor knowing which came first beats it. Equal logits share
the answer. The error is that of the mean over sequences, which are independent.
Letters: N sequences, L length, P scored positions, O options, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.data.batches import Batch
from experiments.data.tokens import END
from experiments.steps.base import IGNORED

LOWER, UPPER, MARKER = np.arange(ord("a"), ord("z") + 1), np.arange(ord("A"), ord("Z") + 1), ord("\n")
OPTIONS = 8
REPEATED = 7  # letters after the marker; all but the first are answers
QUERIES = 8  # keys that are asked for; there are OPTIONS of them


@dataclass(frozen=True)
class Puzzles:
    """ids (N, L) int64; `positions` (P,) whose next token is asked for; `options` (N, P, O) of it, the right one first."""

    ids: np.ndarray
    positions: np.ndarray
    options: np.ndarray

    @property
    def chance(self) -> float:
        """Share of right answers of a guess among the options."""
        return 1.0 / self.options.shape[-1]

    def batch(self) -> Batch:
        """The puzzles to train on: only the answers are labels."""
        labels = np.full_like(self.ids, IGNORED)
        labels[:, self.positions] = self.options[..., 0]
        return Batch(self.ids, labels, fresh=True)


@dataclass(frozen=True)
class Score:
    """Share of right answers, what a guess has, and the standard error of the share."""

    accuracy: float
    chance: float
    error: float
    sequences: int

    @property
    def above_chance(self) -> bool:
        """Whether the share lies more than three standard errors above chance."""
        return self.accuracy - 3 * self.error > self.chance


def induction(count: int, seed: int | list[int]) -> Puzzles:
    """`count` orders of the alphabet, each with a stretch of `REPEATED` letters of it once more after the marker."""
    rng, others = np.random.default_rng(seed), OPTIONS - 1
    letters = rng.permuted(np.tile(LOWER, (count, 1)), axis=1)  # (N, n)
    first = rng.integers(others, len(LOWER) - others - REPEATED + 1, (count, 1))  # with `others` letters before it, and behind the last answer
    end, marker = np.full((count, 1), END), np.full((count, 1), MARKER)
    ids = np.concatenate([end, letters, marker, np.take_along_axis(letters, first + np.arange(REPEATED), 1)], axis=1)
    place, options = np.arange(len(LOWER)), []
    for step in range(1, REPEATED):
        order = rng.random((count, len(LOWER)))
        older = np.argsort(np.where(place < first, order, 2.0), axis=1)[:, :others]
        newer = np.argsort(np.where(place > first + step, order, 2.0), axis=1)[:, :others]
        rank = rng.integers(0, OPTIONS, (count, 1))  # how many of the options are older than the answer
        chosen = np.concatenate([np.arange(others) < rank, np.arange(others) < others - rank], axis=1)
        wrong = np.concatenate([older, newer], axis=1)[chosen].reshape(count, others)
        options.append(np.take_along_axis(letters, np.concatenate([first + step, wrong], axis=1), 1))
    return Puzzles(ids.astype(np.int64), 1 + len(LOWER) + np.arange(1, REPEATED), np.stack(options, axis=1))


def recall(count: int, seed: int | list[int]) -> Puzzles:
    """`count` lists of `OPTIONS` pairs of a key and a value, with `QUERIES` of the keys after them."""
    rng = np.random.default_rng(seed)
    keys = rng.permuted(np.tile(LOWER, (count, 1)), axis=1)[:, :OPTIONS]
    values = rng.permuted(np.tile(UPPER, (count, 1)), axis=1)[:, :OPTIONS]
    asked = rng.integers(0, OPTIONS, (count, QUERIES))
    order = np.concatenate([np.tile(np.arange(OPTIONS), (count, 1)), asked], axis=1)  # (N, pairs)
    pairs = np.stack([np.take_along_axis(keys, order, 1), np.full_like(order, ord("=")), np.take_along_axis(values, order, 1),
                      np.full_like(order, ord(";"))], axis=-1)  # (N, pairs, 4)
    end, marker = np.full((count, 1), END), np.full((count, 1), MARKER)
    ids = np.concatenate([end, pairs[:, :OPTIONS].reshape(count, -1), marker, pairs[:, OPTIONS:].reshape(count, -1)], axis=1)
    turned = (asked[..., None] + np.arange(OPTIONS)) % OPTIONS  # the right one first, (N, P, O)
    options = np.take_along_axis(np.broadcast_to(values[:, None], turned.shape), turned, 2)
    return Puzzles(ids.astype(np.int64), 1 + 4 * OPTIONS + 1 + 4 * np.arange(QUERIES) + 1, options)


TASKS: dict[str, Callable[[int, int | list[int]], Puzzles]] = {"induction": induction, "recall": recall}


def answers(logits: np.ndarray, puzzles: Puzzles) -> np.ndarray:
    """Credit (N, P) of logits (N, L, V): one for the right answer, an equal share where several options are the likeliest."""
    asked = np.take_along_axis(logits[:, puzzles.positions], puzzles.options, axis=-1)  # (N, P, O)
    likeliest = asked == asked.max(-1, keepdims=True)
    return likeliest[..., 0] / likeliest.sum(-1)


def score(model: Any, puzzles: Puzzles, batch_size: int = 64) -> Score:
    """Ask a language model of `runtime.build` (a `TrainStep`'s `model` is one), which answers from states of zero; nothing is trained."""
    credit = []
    for start in range(0, len(puzzles.ids), batch_size):
        rows = slice(start, start + batch_size)
        part = Puzzles(puzzles.ids[rows], puzzles.positions, puzzles.options[rows])
        credit.append(answers(np.asarray(model(part.ids)[0]), part).mean(1))
    each = np.concatenate(credit)
    error = float(each.std(ddof=1) / math.sqrt(len(each))) if len(each) > 1 else math.nan
    return Score(float(each.mean()), puzzles.chance, error, len(each))
