"""The texts of a distillation: sentences, and passages of several chunks; a part of both is held out.

Sentences have about 15 tokens, but decays and chunk flux act from the third chunk of 64 tokens on: they learn from the passages alone.
A passage is running text of one document, or sentences of the file joined in random order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conf.distil_schema import DistilConfig, DistilDataConfig
from conf.schema import DataConfig
from experiments.data import corpus
from experiments.distillation import sentences
from experiments.errors import RunError

Count = Callable[[Sequence[str]], np.ndarray]
SPECIAL = 2  # tokens that frame a text


@dataclass(frozen=True)
class Texts:
    """Training and held-out texts. `long` are held-out passages of at least the longest length of the evaluation, to be cut."""

    sentences: tuple[str, ...]
    passages: tuple[str, ...]
    held_sentences: tuple[str, ...]
    held_passages: tuple[str, ...]
    long: tuple[str, ...]
    sources: dict[str, object]  # what is written down of where they come from

    @property
    def training(self) -> tuple[str, ...]:
        """All training texts."""
        return self.sentences + self.passages

    @property
    def held_out(self) -> tuple[str, ...]:
        """All held-out texts but `long`."""
        return self.held_sentences + self.held_passages


def check(config: DistilConfig) -> None:
    """Raise RunError unless the files that the configuration names are there."""
    corpus.check_path(_text(config.data))
    for name, value in (("data.sentences", config.data.sentences), ("evaluation.sts", config.evaluation.sts)):
        if value is not None and not Path(value).is_file():
            raise RunError(f"{name}: no file {value}")


def gather(config: DistilConfig, count: Count) -> Texts:
    """The texts of the configuration; `count` gives the tokens of texts. Raises RunError for what cannot be read, or is too little."""
    data, monitored = config.data, config.evaluation
    text = corpus.load(_text(data))
    documents = [found for document in text.training if (found := sentences.split(document.text))]
    held_documents = [found for document in text.validation if (found := sentences.split(document.text))]
    given = sentences.read(Path(data.sentences)) if data.sentences else []
    held_given = sorted(given, key=_place)[: min(monitored.sentences, len(given) // 10)]
    held_set = set(held_given)
    given = [sentence for sentence in given if sentence not in held_set]

    rng = np.random.default_rng([config.seed, 1])
    known = set(given) | held_set
    own = list(dict.fromkeys(sentence for document in documents for sentence in document if sentence not in known))
    chosen = _some(given, data.count, rng)
    chosen += _some(own, data.count - len(chosen), rng)
    if not chosen:
        raise RunError("data: no sentence to train on; give text with data.path=... or sentences with data.sentences=...")

    share = data.passage_share / (1 - data.passage_share)
    wanted = share * int((count(chosen) + SPECIAL).sum())
    limits = (data.passage_min, data.passage_max)
    joined = passages([given], count, rng, data.joined_share * wanted if given else 0.0, limits, shuffle=True)
    running = passages(documents, count, rng, wanted - tokens(joined, count), limits)

    fixed = np.random.default_rng([0, 2])  # the same held-out texts for every seed
    held_own = list(dict.fromkeys(sentence for document in held_documents for sentence in document))
    held = _some(held_given or held_own, monitored.sentences, fixed)
    average = (data.passage_min + data.passage_max) / 2
    held_passages = passages(held_documents, count, fixed, monitored.passages * average, limits)
    longest = max(monitored.lengths)
    end_to_end = [[sentence for document in held_documents for sentence in document]]
    long = passages(end_to_end, count, fixed, math.inf, (longest, longest + 100))[: monitored.passages]
    sources = {
        "corpus_sha256": text.sha256, "sentences_file": data.sentences, "sentences": len(chosen), "of_the_file": len(set(chosen) & set(given)),
        "passages_joined": len(joined), "passages_of_running_text": len(running), "held_out_sentences": len(held),
        "held_out_passages": len(held_passages), "held_out_long": len(long),
    }
    return Texts(tuple(chosen), tuple(joined + running), tuple(held), tuple(held_passages), tuple(long), sources)


def passages(
    documents: Sequence[Sequence[str]], count: Count, rng: np.random.Generator, wanted: float, limits: tuple[int, int], *, shuffle: bool = False
) -> list[str]:
    """Passages of consecutive sentences of one document, of `limits[0]` to `limits[1]` tokens with the special ones, `wanted` tokens in all.

    Lengths are uniform between the limits. With `shuffle` the sentences of a document are in random order and are used again when they
    run out; otherwise each is used once at most, and the passages may come to fewer tokens than wanted.
    """
    low, high = limits
    counts = [count(document) for document in documents]
    found: list[str] = []
    total = 0
    while total < wanted:
        before = total
        for index in rng.permutation(len(documents)):
            order = rng.permutation(len(documents[index])) if shuffle else np.arange(len(documents[index]))
            held: list[str] = []
            size, target = SPECIAL, int(rng.integers(low, high + 1))
            for i in order:
                if total >= wanted:
                    return found
                if size + counts[index][i] > max(target, low) and size >= low:
                    found.append(" ".join(held))
                    total, held, size, target = total + size, [], SPECIAL, int(rng.integers(low, high + 1))
                if size + counts[index][i] > high:
                    held, size = [], SPECIAL
                    continue
                held.append(documents[index][i])
                size += int(counts[index][i])
            if size >= low and total < wanted:
                found.append(" ".join(held))
                total += size
        if not shuffle or total == before:
            break
    return found


def tokens(texts: Sequence[str], count: Count) -> int:
    """Tokens of all texts, the special ones included."""
    return int((count(texts) + SPECIAL).sum()) if texts else 0


def _text(data: DistilDataConfig) -> DataConfig:
    return DataConfig(path=data.path, parts=list(data.parts), validation_fraction=data.validation_fraction)


def _some(found: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """At most `count` of the texts, in their order."""
    if count <= 0:
        return []
    return [found[i] for i in sorted(rng.permutation(len(found))[:count])]


def _place(sentence: str) -> bytes:
    """Place of a sentence among others by its hash, so that what is held out does not depend on the seed."""
    return hashlib.sha256(sentence.encode()).digest()
