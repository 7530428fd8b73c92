"""Text to token ids: what a tokenizer file may carry, truncation that keeps the closing token, and bad input."""

import sys

import numpy as np
import pytest

tokenizers = pytest.importorskip("tokenizers")

from runtime import tokenizer as module  # noqa: E402
from runtime.tokenizer import prepare, read_tokenizer, tokenize  # noqa: E402

TEXTS = ["the man plays", "", "A WOMAN reads today", "zebra " * 8 + "[SEP]"]
IDS = [[2, 5, 7, 10, 3], [2, 3], [2, 6, 8, 11, 27, 3], [2] + [1] * 8 + [3, 3]]


@pytest.fixture
def tokenizer(tokenizer_text):
    return prepare(tokenizers.Tokenizer.from_str(tokenizer_text), 61)


def test_its_own_truncation_and_padding_are_off(tokenizer):
    ids, truncated = tokenize(tokenizer, TEXTS, 90)
    assert [one.tolist() for one in ids] == IDS and truncated == 0
    assert all(one.dtype == np.int64 for one in ids)


def test_truncation_keeps_the_closing_token_and_counts(tokenizer):
    ids, truncated = tokenize(tokenizer, TEXTS, 5)
    assert [one.tolist() for one in ids] == [[2, 5, 7, 10, 3], [2, 3], [2, 6, 8, 11, 3], [2, 1, 1, 1, 3]] and truncated == 2
    assert [one.tolist() for one in tokenize(tokenizer, TEXTS, 2)[0]] == [[2, 3]] * 4
    assert tokenize(tokenizer, TEXTS, 11)[1] == 0
    assert tokenize(tokenizer, TEXTS, 10)[0][3].tolist() == [2] + [1] * 8 + [3]  # its own [SEP] goes, the closing one stays
    with pytest.raises(ValueError, match="max_length must leave room for 2 special tokens, found 1"):
        tokenize(tokenizer, TEXTS, 1)


def test_slices_are_joined(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "_SLICE", 3)
    ids, truncated = tokenize(tokenizer, TEXTS * 2, 8)
    assert [one.tolist() for one in ids] == [[*one[:7], 3] if len(one) > 8 else one for one in IDS * 2] and truncated == 2


@pytest.mark.parametrize("value", [None, 3, b"bytes", ["a list"]])
def test_a_text_that_is_no_str(tokenizer, value):
    with pytest.raises(TypeError, match=rf"^sentences\[1\] must be a str, found {type(value).__name__}$"):
        tokenize(tokenizer, ["the man", value], 90)


def test_half_a_surrogate_pair(tokenizer):
    with pytest.raises(ValueError, match=r"sentences\[2\] must be valid Unicode: .*surrogates"):
        tokenize(tokenizer, ["the", "caf\u00e9", "a\ud800"], 90)


def test_a_tokenizer_that_does_not_go_with_the_model(tokenizer_text):
    made = tokenizers.Tokenizer.from_str(tokenizer_text)
    assert prepare(made, 28) is made
    with pytest.raises(ValueError, match=r"must have ids in \[0, 27\), the model's vocabulary, found 27"):
        prepare(made, 27)
    with pytest.raises(ValueError, match="must frame a text in special tokens"):
        prepare(tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")), 61)


def test_files(tmp_path, tokenizer_text):
    with pytest.raises(FileNotFoundError, match=r"holds neither tokenizer\.json nor vocab\.txt"):
        read_tokenizer(tmp_path)
    for text in (tokenizer_text[:-40], "", '{"version": "1.0"}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
            read_tokenizer(tmp_path)
    (tmp_path / "other.json").write_text(tokenizer_text)
    assert read_tokenizer(tmp_path, tmp_path / "other.json").get_vocab_size() == 28


def test_a_vocabulary_alone(tmp_path, tokenizer, monkeypatch):
    pytest.importorskip("transformers")
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    assert [one.tolist() for one in tokenize(prepare(read_tokenizer(tmp_path), 61), TEXTS, 90)[0]] == IDS
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"vocab\.txt without a tokenizer\.json needs: pip install transformers"):
        read_tokenizer(tmp_path)


def test_without_tokenizers(tmp_path, tokenizer_text, monkeypatch):
    (tmp_path / "tokenizer.json").write_text(tokenizer_text)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"tokenizer\.json needs: pip install tokenizers"):
        read_tokenizer(tmp_path)
