"""Text to token ids: a `tokenizers.Tokenizer` from the files of a directory, and truncation that counts what it cuts.

Special tokens frame every text ([CLS] and [SEP] of BERT), so that an empty one has tokens too; they count towards the length.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

TOKENIZER = "tokenizer.json"
VOCABULARY = "vocab.txt"
_SLICE = 4096  # texts at a time: an Encoding is many times larger than the ids that are kept of it


def read_tokenizer(directory: Path, file: Path | None = None) -> Any:
    """The `tokenizers.Tokenizer` of `file`, or of `tokenizer.json` in `directory`, or of its `vocab.txt` by way of transformers.

    Raises FileNotFoundError where there is none, ValueError, naming the file, for one that is broken, ImportError for a missing package.
    """
    file = directory / TOKENIZER if file is None else file
    if file.is_file():
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError(f"reading {file} needs: pip install tokenizers") from error
        try:
            return Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the Rust library raises nothing narrower
            raise ValueError(f"{file} is no tokenizer: {error}") from error
    if not (directory / VOCABULARY).is_file():
        raise FileNotFoundError(f"{directory} holds neither {TOKENIZER} nor {VOCABULARY}")
    try:
        from transformers import BertTokenizerFast
    except ImportError as error:
        raise ImportError(f"reading {directory / VOCABULARY} without a {TOKENIZER} needs: pip install transformers") from error
    return BertTokenizerFast.from_pretrained(directory, local_files_only=True).backend_tokenizer


def prepare(tokenizer: Any, vocab_size: int) -> Any:
    """`tokenizer` itself with its truncation and padding switched off; a file may carry both, at lengths of its own.

    Raises ValueError where it has ids outside [0, vocab_size), or frames no text in special tokens.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise ValueError(f"the tokenizer must have ids in [0, {vocab_size}), the model's vocabulary, found {largest}")
    if not tokenizer.num_special_tokens_to_add(False):
        raise ValueError("the tokenizer must frame a text in special tokens, as BERT's does: without them an empty text has no token")
    return tokenizer


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int) -> tuple[list[np.ndarray], int]:
    """Token ids of every text, int64 (n,), n <= `max_length`, and how many texts were truncated. The closing special token stays.

    Raises TypeError, naming the index, for a text that is no str; ValueError for one that is not valid Unicode, and for a `max_length`
    without room for the special tokens.
    """
    special = tokenizer.num_special_tokens_to_add(False)
    if max_length < special:
        raise ValueError(f"max_length must leave room for {special} special tokens, found {max_length}")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"sentences[{index}] must be a str, found {type(text).__name__}")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"sentences[{index}] must be valid Unicode: {error}") from error
    ids, truncated = [], 0
    for start in range(0, len(texts), _SLICE):
        for text, encoding in zip(texts[start : start + _SLICE], tokenizer.encode_batch(texts[start : start + _SLICE]), strict=True):
            if len(encoding) > max_length:
                truncated += 1
                encoding = tokenizer.encode(text, add_special_tokens=False)
                encoding.truncate(max_length - special)
                encoding = tokenizer.post_process(encoding)
            ids.append(np.array(encoding.ids, dtype=np.int64))
    return ids, truncated
