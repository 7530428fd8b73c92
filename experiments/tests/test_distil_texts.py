"""Texts of a distillation: what is a sentence, what a file gives, how long passages are, and which batches they come in."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.distil_schema import DistilConfig, DistilDataConfig, DistilEvaluationConfig
from experiments.distillation import batches, sentences, texts
from experiments.errors import RunError
from experiments.tests import tiny_teacher

PROSE = """Return the item.  It is removed, e.g. Python's own, from the list
(see Mr. Smith's note). Does the key exist? "Yes" is no answer!

   >>> this.is_code()
   This line belongs to it.

====== ======
A table is no prose at all.
====== ======

* The first bullet goes on
  over two lines.
* No. This one has an early end.

usage: prog [-h] [--long] not a sentence
Too short.

Here f(x) = (a[i] + b[i]) / {2 * c[i]} ** 7 ^ 9.
"""


def words(found: list[str]) -> np.ndarray:
    """A token per word."""
    return np.array([len(text.split()) for text in found], dtype=np.int64)


def test_prose_is_split_into_sentences() -> None:
    assert sentences.split(PROSE) == [
        "It is removed, e.g. Python's own, from the list (see Mr. Smith's note).",
        "Does the key exist?",
        '"Yes" is no answer!',
        "The first bullet goes on over two lines.",
        "No. This one has an early end.",
    ]


def test_file_of_lines_and_tables(tmp_path: Path) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_text("One  sentence here.\n\nAnother one, 2.5 long.\nOne sentence here.\n")
    assert sentences.read(plain) == ["One sentence here.", "Another one, 2.5 long."]
    rows = '"A dog, brown.",A cat sits.,4.5\nRain falls.,"A dog, brown.",0.25\nSnow,It snows now.,3\n'
    for header in ("", "sentence1,sentence2,score\n"):
        table = tmp_path / "pairs.csv"
        table.write_text(header + rows)
        assert sentences.read(table) == ["A dog, brown.", "A cat sits.", "Rain falls.", "Snow", "It snows now."]
    tabs = tmp_path / "pairs.tsv"
    tabs.write_text("main-news\t3\tIt rains, and rains.\nmain-news\t4\tIt is dry.\n")
    assert sentences.read(tabs) == ["It rains, and rains.", "It is dry."]


def test_unusable_files_of_sentences_are_refused(tmp_path: Path) -> None:
    files = {"empty.txt": b"\n \n", "numbers.csv": b"1,2.5\n3,4\n", "latin.txt": b"caf\xe9\n"}
    messages = {"empty.txt": "holds no sentence", "numbers.csv": "no column of sentences among its 2", "latin.txt": "byte 0xe9 at offset 3"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RunError, match=messages[name]):
            sentences.read(tmp_path / name)
    with pytest.raises(RunError, match=r"data\.sentences: no file"):
        sentences.read(tmp_path / "none.csv")


def test_running_passages_are_consecutive_and_within_the_limits() -> None:
    rng = np.random.default_rng(3)
    documents = [[f"d{d}s{i} " + "w " * int(rng.integers(1, 9)) + "." for i in range(37)] for d in range(5)]
    found = texts.passages(documents, words, np.random.default_rng(1), 10**9, (30, 61))
    sizes = [int(words([passage])[0]) + texts.SPECIAL for passage in found]
    # the longest sentence has 10 words, so a passage may end that much before its target, but not before the lower limit
    assert min(sizes) >= 30 and max(sizes) <= 61 and max(sizes) - min(sizes) > 15
    names = [[word for word in passage.split() if word.startswith("d")] for passage in found]
    for passage in names:
        places = [tuple(map(int, name[1:].split("s"))) for name in passage]
        assert all(after == (d, i + 1) for (d, i), after in itertools.pairwise(places))
    used = [name for passage in names for name in passage]
    assert len(used) == len(set(used)) > 150  # of 185 sentences; the rest are tails shorter than a passage
    less = texts.passages(documents, words, np.random.default_rng(1), 200, (30, 61))
    assert less == found[: len(less)] and 200 <= sum(sizes[: len(less)]) < 200 + 61


def test_joined_passages_use_sentences_again() -> None:
    given = [f"s{i} a b c d." for i in range(11)]
    found = texts.passages([given], words, np.random.default_rng(2), 400, (20, 33), shuffle=True)
    sizes = words(found) + texts.SPECIAL
    assert 400 <= sizes.sum() < 400 + 33 and sizes.min() >= 20 and sizes.max() <= 33
    orders = {tuple(word for word in passage.split() if word.startswith("s")) for passage in found}
    assert len(orders) == len(found) and all(order != tuple(sorted(order)) for order in list(orders)[:2])
    assert texts.passages([["far too long " * 20]], words, np.random.default_rng(2), 400, (20, 33), shuffle=True) == []


def config(text: Path, file: Path | None, **data: Any) -> DistilConfig:
    return DistilConfig(
        data=DistilDataConfig(path=str(text), sentences=None if file is None else str(file), validation_fraction=0.3, **data),
        evaluation=DistilEvaluationConfig(sentences=13, passages=3, lengths=[40, 70]),
    )


def test_gathered_texts_are_apart_and_as_many_as_asked_for(tmp_path: Path) -> None:
    text = tiny_teacher.make_text(tmp_path / "text")
    file = tmp_path / "given.txt"
    file.write_text("\n".join(f"Given sentence of number {chr(97 + i // 26)}{chr(97 + i % 26)}." for i in range(90)))
    settings = config(text, file, count=100, passage_share=0.5, passage_min=20, passage_max=45, joined_share=0.4)
    found = texts.gather(settings, words)
    given = {sentence for sentence in found.sentences if sentence.startswith("Given")}
    assert len(found.sentences) == 100 and len(given) == 81  # a tenth of the file is held out, the corpus fills up
    assert len(found.held_sentences) == 9 and all(sentence.startswith("Given") for sentence in found.held_sentences)
    assert not set(found.held_sentences) & set(found.sentences)
    assert not any(held in passage for held in found.held_sentences for passage in found.passages)
    total, long = texts.tokens(found.sentences, words), texts.tokens(found.passages, words)
    assert total <= long < total + 2 * 45  # half of the tokens, to within the last passage of each kind
    joined = [passage for passage in found.passages if passage.startswith("Given")]
    assert 0.4 * total <= texts.tokens(joined, words) < 0.4 * total + 45
    held = " ".join(found.held_passages + found.long)
    assert len(found.long) == 3 and all(size + texts.SPECIAL >= 70 for size in words(list(found.long)))
    assert not any(sentence in held for sentence in found.sentences[81:])
    again, other = texts.gather(settings, words), texts.gather(DistilConfig(seed=1, data=settings.data, evaluation=settings.evaluation), words)
    assert again == found and other.sentences != found.sentences and (other.held_out, other.long) == (found.held_out, found.long)


def test_corpus_alone_gives_sentences_and_running_text(tmp_path: Path) -> None:
    text = tiny_teacher.make_text(tmp_path / "text")
    found = texts.gather(config(text, None, count=10**6, passage_share=0.2, passage_min=20, passage_max=45), words)
    everything = [line for file in sorted(text.glob("*.txt")) for line in sentences.split(file.read_text())]
    assert set(found.sentences) | set(found.held_sentences) <= set(everything) and len(found.held_sentences) == 13
    assert found.sources["of_the_file"] == 0 and found.sources["passages_joined"] == 0 and found.passages
    assert texts.gather(config(text, None, passage_share=0.0), words).passages == ()


def test_batches_hold_every_text_once_within_the_budget() -> None:
    lengths = np.random.default_rng(4).integers(3, 97, size=203)
    plan = batches.plan(lengths, 3, 130, seed=5)
    epochs = np.split(np.concatenate(plan), 3)
    assert all(sorted(epoch) == list(range(203)) for epoch in epochs) and not np.array_equal(epochs[0], epochs[1])
    padded = [int(lengths[chosen].max()) * len(chosen) for chosen in plan]
    assert max(padded) <= 130 and sum(padded) < 1.25 * 3 * lengths.sum()  # sorted with 15 % of jitter; unsorted it is 1.6
    assert [chosen.tolist() for chosen in batches.plan(lengths, 3, 130, seed=5)] == [chosen.tolist() for chosen in plan]
    assert [chosen.tolist() for chosen in batches.plan(lengths, 3, 130, seed=6)] != [chosen.tolist() for chosen in plan]
    assert [chosen.tolist() for chosen in batches.batches(np.array([50, 3, 4]), 10)] == [[1, 2], [0]]
