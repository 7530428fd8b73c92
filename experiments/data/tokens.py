"""Tokens of text: bytes, or byte pairs merged by a tokenizer trained on the training files.

Ids 0 to 255 are the bytes in both; 256 ends a document and stands before the first one; 257 pads. Every token but those two
stands for a known string of bytes, so that losses can be given per byte whatever the tokenizer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from conf.schema import BYTE_VOCABULARY, DataConfig
from experiments.data.corpus import Corpus
from experiments.errors import RunError

END, PADDING = 256, 257


class ByteTokenizer:
    """Each byte is a token."""

    vocab_size = BYTE_VOCABULARY

    def encode(self, text: str) -> np.ndarray:
        """Ids (n,) int32 of the UTF-8 bytes of `text`."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special ids are left out, bytes that are no UTF-8 are replaced."""
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", errors="replace")

    def symbols(self, ids: np.ndarray) -> np.ndarray:
        """The bytes (m,) that `ids` (n,) stand for, as int32, with END kept as 256."""
        return ids[ids != PADDING].astype(np.int32)


class PairTokenizer:
    """Byte pairs, trained with the `tokenizers` package and kept in a file."""

    def __init__(self, specification: str) -> None:
        """`specification` is the JSON of a `tokenizers.Tokenizer` over byte-level symbols. Raises ValueError if it is not."""
        from tokenizers import Tokenizer, pre_tokenizers

        try:
            self._tokenizer = Tokenizer.from_str(specification)
        except Exception as error:  # the package raises no narrower class
            raise ValueError(f"not the JSON of a tokenizer: {error}") from error
        to_byte = _byte_of(pre_tokenizers.ByteLevel.alphabet())
        pieces = sorted(self._tokenizer.get_vocab().items(), key=lambda item: item[1])
        # The trainer numbers the alphabet and the merges from 0; single bytes move to their own value, merges behind the specials.
        merged = [(piece, number) for piece, number in pieces if len(piece) > 1]
        self._bytes = [bytes([i]) for i in range(256)] + [b"", b""] + [bytes(to_byte[c] for c in piece) for piece, _ in merged]
        self._ours = np.full(max(number for _, number in pieces) + 1, -1, dtype=np.int32)
        for piece, number in pieces:
            if len(piece) == 1:
                self._ours[number] = to_byte[piece]
        for index, (_, number) in enumerate(merged):
            self._ours[number] = BYTE_VOCABULARY + index
        self.vocab_size = len(self._bytes)

    def encode(self, text: str) -> np.ndarray:
        """Ids (n,) int32 of `text`."""
        return self._ours[np.asarray(self._tokenizer.encode(text).ids, dtype=np.int64)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special ids are left out, bytes that are no UTF-8 are replaced."""
        return b"".join(self._bytes[int(i)] for i in ids).decode("utf-8", errors="replace")

    def symbols(self, ids: np.ndarray) -> np.ndarray:
        """The bytes (m,) that `ids` (n,) stand for, as int32, with END kept as 256."""
        runs = [np.array([END], dtype=np.int32) if i == END else np.frombuffer(self._bytes[i], dtype=np.uint8).astype(np.int32) for i in ids]
        return np.concatenate(runs) if runs else np.zeros(0, dtype=np.int32)


Tokenizer = ByteTokenizer | PairTokenizer


def tokenizer(config: DataConfig, corpus: Corpus) -> Tokenizer:
    """The tokenizer of the configuration; byte pairs are trained once for each training text and vocabulary, and kept in `cache_dir`.

    Raises RunError where `tokenizers` is not installed.
    """
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    path = Path(config.cache_dir) / f"bpe-{corpus.sha256[:16]}-{config.vocab_size}.json"
    try:
        return PairTokenizer(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        specification = _train(config.vocab_size, [document.text for document in corpus.training])
    except (ValueError, KeyError) as error:
        raise RunError(f"data.cache_dir: {path} is not a tokenizer; delete it and it is trained again ({error})") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(specification, encoding="utf-8")
    os.replace(temporary, path)
    return PairTokenizer(specification)


def _train(vocab_size: int, texts: list[str]) -> str:
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError as error:
        raise RunError("data.tokenizer=bpe needs the package tokenizers: pip install 'groundwave[train]'") from error
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # Two ids of the vocabulary are the specials, which are ours and not the trainer's.
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    trained.train_from_iterator(texts, trainer)
    return json.dumps(json.loads(trained.to_str()), sort_keys=True)


def _byte_of(alphabet: list[str]) -> dict[str, int]:
    """Byte of each character of the byte-level alphabet (GPT-2's): printable bytes stand for themselves, the rest follow from 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    rest = [byte for byte in range(256) if byte not in set(printable)]
    table.update({chr(256 + index): byte for index, byte in enumerate(rest)})
    if set(table) != set(alphabet):
        raise RunError("data.tokenizer: the installed tokenizers package has another byte-level alphabet than GPT-2's")
    return table
