"""Corpus, tokens, batches: the split holds, every byte is accounted for, and a step number is all that a batch depends on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from conf.schema import DataConfig
from experiments.data import batches, corpus, tokens
from experiments.errors import RunError


@pytest.fixture(scope="module")
def standard_library() -> corpus.Corpus:
    return corpus.load(DataConfig())


def test_standard_library_is_split_by_file(standard_library: corpus.Corpus) -> None:
    training, validation = standard_library.training, standard_library.validation
    names = {document.name for document in training}
    assert {"pydoc_data/topics.py", "argparse.py"} <= names | {document.name for document in validation}
    assert "pydoc_data/topics.py" in names and not names & {document.name for document in validation}
    assert not {document.text for document in training} & {document.text for document in validation}
    held = sum(len(document.text) for document in validation)
    assert 0.01 < held / (held + sum(len(document.text) for document in training)) < 0.12  # asked for 5 % of the files, which differ in size
    assert not any(set(name.split("/")) & {"test", "tests", "site-packages"} for name in names)


def test_listing_and_hash_follow_the_text(standard_library: corpus.Corpus) -> None:
    listing = standard_library.listing()
    topics = corpus.load(DataConfig(parts=["topics"]))
    assert topics.sha256 == corpus.load(DataConfig(parts=["topics"])).sha256 != listing["sha256"]
    assert topics.training[0].text + topics.validation[0].text in {document.text for document in standard_library.training}
    first = standard_library.validation[0]
    assert listing["validation"][first.name] == len(first.text.encode())


def test_parts_choose_what_is_read() -> None:
    source = '"""Whole."""\nimport re\n\ndef f():\n    """Part."""\n    return 1\n'
    assert corpus._docstrings(source) == "Whole.\n\nPart.\n" and corpus._docstrings("import re\n") == ""


def test_local_folder_and_file(tmp_path: Path) -> None:
    for index in range(30):
        (tmp_path / "sub").mkdir(exist_ok=True)
        (tmp_path / "sub" / f"{index}.txt").write_text(f"text {index}\n" * 5)
    (tmp_path / ".hidden").write_text("never read")
    found = corpus.load(DataConfig(path=str(tmp_path), validation_fraction=0.2))
    assert len(found.training) + len(found.validation) == 30 and found.validation
    single = corpus.load(DataConfig(path=str(tmp_path / "sub" / "7.txt"), validation_fraction=0.25))
    assert single.training[0].text + single.validation[0].text == "text 7\n" * 5 and single.validation[0].text.startswith("text")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no file or folder"),
        (lambda path: path.mkdir(), "holds no file"),
        (lambda path: path.write_text(""), "is empty"),
        (lambda path: path.write_bytes(b"abc\xff\xfe"), "not UTF-8 text: byte 0xff at offset 3"),
        (lambda path: path.write_text("x"), "no held-out text"),
    ],
)
def test_bad_path_is_named(tmp_path: Path, make, message: str) -> None:
    path = tmp_path / "given"
    make(path)
    with pytest.raises(RunError, match=message):
        corpus.load(DataConfig(path=str(path)))


def test_bytes_there_and_back() -> None:
    text = "naïve \N{SNOWMAN}\n"
    ids = tokens.ByteTokenizer().encode(text)
    assert ids.tolist() == list(text.encode()) and tokens.ByteTokenizer().decode([*ids, tokens.END]) == text


def test_pairs_there_and_back_and_cached(tmp_path: Path) -> None:
    words = "the cat and the other cat sat on the mat\n"
    text = tuple(corpus.Document(f"{i}", words * 9 + f"line {i} ïé\0\n") for i in range(4))
    source = corpus.Corpus(text[:3], text[3:], "0" * 64)
    config = DataConfig(tokenizer="bpe", vocab_size=281, cache_dir=str(tmp_path))
    trained, cached = tokens.tokenizer(config, source), tokens.tokenizer(config, source)
    assert len(list(tmp_path.iterdir())) == 1
    for document in text:
        ids = trained.encode(document.text)
        assert len(ids) < len(document.text.encode()) and trained.decode(ids) == document.text
        assert trained.symbols(ids).tolist() == list(document.text.encode())
        assert np.array_equal(ids, cached.encode(document.text))
    assert trained.vocab_size <= 281 and trained.symbols(np.array([tokens.END, 65])).tolist() == [tokens.END, 65]
    next(tmp_path.iterdir()).write_text("{")
    with pytest.raises(RunError, match="is not a tokenizer"):
        tokens.tokenizer(config, source)


def documents() -> list[np.ndarray]:
    """Every token of every document is unique, so that each can be counted."""
    sizes, start, made = (23, 7, 41, 1, 30), 1000, []
    for size in sizes:
        made.append(np.arange(start, start + size, dtype=np.int32))
        start += size
    return made


def test_lanes_are_contiguous_and_labels_one_ahead() -> None:
    stream = batches.Stream(documents(), batch_size=3, context=5, seed=4)
    assert (stream.tokens, stream.lane, stream.steps_per_epoch) == (108, 35, 7)
    first, second = stream.batch(0), stream.batch(1)
    assert first.fresh and not second.fresh and stream.batch(7).fresh
    np.testing.assert_array_equal(first.ids[:, 1:], first.labels[:, :-1])
    np.testing.assert_array_equal(first.labels[:, -1], second.ids[:, 0])
    assert first.ids[0, 0] == tokens.END


def test_batch_depends_on_seed_and_step_alone() -> None:
    stream = batches.Stream(documents(), 3, 5, seed=4)
    later = stream.batch(9)
    stream.batch(2)
    np.testing.assert_array_equal(batches.Stream(documents(), 3, 5, seed=4).batch(9).ids, later.ids)
    assert not np.array_equal(batches.Stream(documents(), 3, 5, seed=5).batch(0).ids, stream.batch(0).ids)
    assert not np.array_equal(stream.batch(0).ids, stream.batch(7).ids)


@pytest.mark.parametrize("steps", [1, 3, 7, 9, 14])
def test_seen_is_what_the_batches_held_each_once(steps: int) -> None:
    stream = batches.Stream(documents(), 3, 5, seed=4)
    given: set[int] = set()
    for step in range(steps):
        batch = stream.batch(step)
        given |= set(batch.ids.ravel().tolist()) | set(batch.labels.ravel().tolist())
    counted = Counter(np.concatenate(stream.seen(steps)).tolist())
    ends = counted.pop(tokens.END, 0)
    # A run of a single token has no context to be fitted with, and is the only thing left out.
    missing = given - {tokens.END} - counted.keys()
    assert counted.keys() <= given and len(missing) <= 2 and set(counted.values()) == {1}
    assert ends <= 2 * len(documents())


def test_too_little_text_is_named() -> None:
    with pytest.raises(RunError, match="at least 601 are needed"):
        batches.Stream(documents(), 6, 100, 0)
    with pytest.raises(RunError, match="held-out tokens are too few"):
        batches.lanes(np.arange(4), 100, 7)


def test_validation_lanes_score_each_token_once() -> None:
    stream = np.arange(50)
    lanes = batches.lanes(stream, 41, 4)
    assert lanes.shape == (4, 11)
    assert Counter(lanes[:, 1:].ravel().tolist()) == Counter(range(1, 41))
