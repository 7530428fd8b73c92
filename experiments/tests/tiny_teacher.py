"""A teacher of a few thousand random weights with a tokenizer of whole words and letters, and files of text and pairs for it."""

from __future__ import annotations

import string
from pathlib import Path

import numpy as np

SUBJECTS = ("The cat", "A dog", "One bird", "My friend", "The old man", "Her sister", "That horse")
VERBS = ("sees", "likes", "follows", "finds", "draws", "keeps")
OBJECTS = ("a red ball", "the small house", "some green tea", "an open door", "two young trees", "the long road", "a quiet song")
POSITIONS = 190


def sentences() -> list[str]:
    """All 294 sentences, in a fixed random order."""
    found = [f"{subject} {verb} {thing}." for subject in SUBJECTS for verb in VERBS for thing in OBJECTS]
    return [found[i] for i in np.random.default_rng(5).permutation(len(found))]


def make_teacher(folder: Path) -> Path:
    """A BERT of width 12 in `folder`, with weights large enough for sentences to differ."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = sorted({word.lower() for part in (*SUBJECTS, *VERBS, *OBJECTS) for word in part.split()})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase, *(f"##{c}" for c in string.ascii_lowercase), *".,?", *words]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    framed = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=framed)
    BertTokenizerFast(tokenizer_object=tokenizer).save_pretrained(str(folder))
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20,
        max_position_embeddings=POSITIONS, initializer_range=0.4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        BertModel(config).save_pretrained(str(folder))
    return folder


def make_text(folder: Path) -> Path:
    """Seven files of 40 sentences, two to a line."""
    folder.mkdir(parents=True)
    found = sentences()
    for index in range(7):
        part = found[40 * index : 40 * (index + 1)]
        (folder / f"{index}.txt").write_text("\n".join(" ".join(part[i : i + 2]) for i in range(0, 40, 2)) + "\n")
    return folder


def make_pairs(path: Path) -> Path:
    """A CSV of 23 pairs with made-up scores."""
    found = sentences()
    rng = np.random.default_rng(11)
    rows = [f'"{found[i]}","{found[2 * i + 1]}",{rng.uniform(0, 5):.2f}' for i in range(23)]
    path.write_text("\n".join(rows) + "\n")
    return path
