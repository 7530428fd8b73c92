"""Semantic textual similarity: do cosines of embeddings order pairs of sentences as people do?

Spearman's rank correlation and Pearson's correlation of the cosine of the two embeddings with the score, over the pairs of a CSV of
(sentence, sentence, score). Source of the task: Cer et al., "SemEval-2017 Task 1" (2017).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from experiments.errors import RunError

Encode = Callable[[list[str]], np.ndarray]


@dataclass(frozen=True)
class Pairs:
    """n pairs of sentences and their scores (n,)."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    scores: np.ndarray


@dataclass(frozen=True)
class Scores:
    """Correlations over `pairs` pairs."""

    spearman: float
    pearson: float
    pairs: int


def read_pairs(path: Path, field: str = "path") -> Pairs:
    """Pairs of a UTF-8 CSV of (sentence, sentence, score).

    A first row whose third cell holds no digit is a header. Raises RunError, naming `field`, the file and the line, for a file that is
    missing or no such table, a row without exactly three cells, a score that is no finite number, and scores that are all the same.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.reader(file, strict=True)
            rows = [(reader.line_num, row) for row in reader if row]
    except FileNotFoundError as error:
        raise RunError(f"{field}: no file {path}") from error
    except UnicodeDecodeError as error:
        raise RunError(f"{field}: {path} is not UTF-8 text: byte {error.object[error.start]:#04x} at offset {error.start}") from error
    except csv.Error as error:
        raise RunError(f"{field}: {path}, line {reader.line_num}: not CSV: {error}") from error
    except OSError as error:
        raise RunError(f"{field}: cannot read {path}: {error.strerror or error}") from error
    for line, row in rows:
        if len(row) != 3:
            raise RunError(f"{field}: {path}, line {line}: expected 3 columns (sentence, sentence, score), found {len(row)}")
    if rows and not any(character.isdigit() for character in rows[0][1][2]):
        rows = rows[1:]
    scores = np.array([_score(row[2], f"{field}: {path}, line {line}") for line, row in rows])
    if len(np.unique(scores)) < 2:
        raise RunError(f"{field}: {path} must hold pairs of at least two different scores, found {len(rows)} pairs")
    return Pairs(tuple(row[0] for _, row in rows), tuple(row[1] for _, row in rows), scores)


def _score(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RunError(f"{where}: the score must be a finite number, found {text!r}")
    return value


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosine (n,) of the rows of two arrays (n, D), in float64; 0 for a zero row."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    sizes = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return (first * second).sum(1) / np.where(sizes > 0, sizes, 1.0)


def correlate(similarities: np.ndarray, scores: np.ndarray) -> Scores:
    """Correlations of similarities with scores, both (n,)."""
    return Scores(float(stats.spearmanr(similarities, scores).statistic), float(stats.pearsonr(similarities, scores).statistic), len(scores))


def evaluate(encode: Encode, pairs: Pairs) -> Scores:
    """Correlations of the embeddings that `encode` gives, (n, D) for n sentences; each sentence is encoded once."""
    unique = unique_sentences(pairs)
    place = {sentence: i for i, sentence in enumerate(unique)}
    found = encode(unique)
    first, second = (found[[place[sentence] for sentence in side]] for side in (pairs.first, pairs.second))
    return correlate(cosines(first, second), pairs.scores)


def unique_sentences(pairs: Pairs) -> list[str]:
    """Every sentence once, in order."""
    seen: Sequence[str] = (*pairs.first, *pairs.second)
    return list(dict.fromkeys(seen))
