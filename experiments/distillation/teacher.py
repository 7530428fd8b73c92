"""The teacher: a BERT-like sentence encoder that transformers reads from a local folder, never from a network.

    embedding = l2norm(mean over valid tokens of the last hidden state)

Letters: B batch, L length, D width, n texts.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conf.distil_schema import TeacherConfig
from experiments.errors import RunError
from runtime.encoders import WEIGHTS, package_folder
from runtime.files import digest

_OTHER = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")


def locate(config: TeacherConfig) -> Path:
    """The folder of the teacher. Raises RunError where neither it nor the package is there, or the weight file is not the one expected."""
    if config.path is not None:
        folder = Path(config.path)
        if not folder.is_dir():
            raise RunError(f"teacher.path: no folder {folder}")
        expected, name = config.sha256, "teacher.sha256"
    else:
        try:
            folder = package_folder(config.package)
        except ModuleNotFoundError as error:
            raise RunError(f"teacher: {error}, or give a local folder with teacher.path=...") from error
        expected, name = config.package_sha256, "teacher.package_sha256"
    weights = weight_file(folder)
    actual = digest(weights) if expected is not None else None
    if actual != expected:
        raise RunError(f"teacher: {weights} has sha256 {actual}, {name} is {expected}")
    return folder


def weight_file(folder: Path) -> Path:
    """The weight file of a folder. Raises RunError where there is none, or no config.json."""
    present = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not present or not (folder / "config.json").is_file():
        missing = "config.json" if present else " or ".join(WEIGHTS)
        raise RunError(f"teacher: {folder} holds no {missing}")
    return present[0]


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """No call to a model hub inside: the variables that huggingface_hub and transformers read, and their former values after it."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Teacher:
    """The encoder, its tokenizer, and `digest`, a hash over all files that decide what it computes."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        """Read the model and tokenizer of `folder`. Raises RunError for what transformers cannot read, or has fewer positions than `max_tokens`."""
        self.folder, self.max_tokens = folder, max_tokens
        with offline():
            try:
                import transformers
                from transformers import AutoModel, AutoTokenizer
            except ImportError as error:
                raise RunError("teacher: the package transformers is not installed: pip install transformers") from error
            level = transformers.logging.get_verbosity()
            bars = transformers.logging.is_progress_bar_enabled()
            transformers.logging.set_verbosity_error()
            transformers.logging.disable_progress_bar()
            try:
                self.tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
                self.model: Any = AutoModel.from_pretrained(str(folder), local_files_only=True).eval().float()
            except (OSError, ValueError, KeyError) as error:
                raise RunError(f"teacher: transformers cannot read {folder}: {' '.join(str(error).split())[:300]}") from error
            finally:
                transformers.logging.set_verbosity(level)
                if bars:
                    transformers.logging.enable_progress_bar()
        positions = int(self.model.config.max_position_embeddings)
        if max_tokens > positions:
            raise RunError(f"teacher.max_tokens must be at most the {positions} positions of {folder}, found {max_tokens}")
        self.dim, self.depth = int(self.model.config.hidden_size), int(self.model.config.num_hidden_layers)
        parts = [path for path in (weight_file(folder), *(folder / name for name in _OTHER)) if path.is_file()]
        listed = "".join(f"{path.name} {digest(path)}\n" for path in parts)
        self.digest = hashlib.sha256(listed.encode()).hexdigest()

    @property
    def padding(self) -> int:
        """Id that fills a batch."""
        return int(self.tokenizer.pad_token_id or 0)

    def ids(self, texts: Sequence[str], max_tokens: int | None = None) -> list[np.ndarray]:
        """Token ids (L,) int32 of every text, with the special tokens, cut to `max_tokens`."""
        found = self.tokenizer(list(texts), truncation=True, max_length=max_tokens or self.max_tokens)["input_ids"] if texts else []
        return [np.asarray(row, dtype=np.int32) for row in found]

    def counts(self, texts: Sequence[str]) -> np.ndarray:
        """Tokens (n,) of every text, without the special ones."""
        found = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        return np.array([len(row) for row in found], dtype=np.int64)

    def outputs(self, ids: np.ndarray, mask: np.ndarray) -> tuple[tuple[Any, ...], Any]:
        """Of ids and mask (B, L): the depth + 1 hidden states (B, L, D), that of the embedding layer first, and embeddings (B, D); torch tensors."""
        import torch

        with torch.no_grad():
            valid = torch.from_numpy(mask.astype(np.int64))
            hidden = self.model(input_ids=torch.from_numpy(ids.astype(np.int64)), attention_mask=valid, output_hidden_states=True).hidden_states
            return hidden, torch.nn.functional.normalize(mean_of_valid(hidden[-1], valid), dim=-1)

    def embed(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Embeddings (B, D) of ids and mask (B, L)."""
        return self.outputs(ids, mask)[1].numpy()

    def embed_layer(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Means (B, D) of the embedding layer's output over valid tokens."""
        import torch

        return mean_of_valid(self.outputs(ids, mask)[0][0], torch.from_numpy(mask.astype(np.int64))).numpy()

    def embed_words(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Means (B, D) of the rows of the word table, a static vector per token, over valid tokens but the special ones that frame a text."""
        table = self.model.get_input_embeddings().weight.detach().numpy()
        inner = mask & ~np.isin(ids, [self.tokenizer.cls_token_id, self.tokenizer.sep_token_id])
        weights = np.where(inner.any(1, keepdims=True), inner, mask)  # an empty text has nothing but them
        return (table[ids] * weights[..., None]).sum(1) / weights.sum(1, keepdims=True)


Embed = Callable[[np.ndarray, np.ndarray], np.ndarray]


def mean_of_valid(x: Any, mask: Any) -> Any:
    """Means (B, D) of x (B, L, D) over the positions where mask (B, L) is 1."""
    weights = mask[..., None].to(x.dtype)
    return (x * weights).sum(1) / weights.sum(1)


def padded(rows: Sequence[np.ndarray], padding: int) -> tuple[np.ndarray, np.ndarray]:
    """ids (B, L) int64, filled with `padding` on the right, and mask (B, L) bool of rows of ids (L,)."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max())[None] < lengths[:, None]
    ids = np.full(mask.shape, padding, dtype=np.int64)
    ids[mask] = np.concatenate(rows)
    return ids, mask


def embeddings(embed: Embed, rows: Sequence[np.ndarray], padding: int, batch_size: int) -> np.ndarray:
    """What `embed` makes of every row of ids, (n, D), in the order of the rows; batches are of similar length."""
    order = np.argsort([-len(row) for row in rows], kind="stable")
    found: list[np.ndarray] = []
    for start in range(0, len(order), batch_size):
        found.append(embed(*padded([rows[i] for i in order[start : start + batch_size]], padding)))
    out = np.empty_like(np.concatenate(found))
    out[order] = np.concatenate(found)
    return out
