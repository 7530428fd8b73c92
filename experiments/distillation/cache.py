"""What the teacher makes of every text, on disk, so that the student's passes over the texts cost no pass of the teacher.

    CACHE/teacher-KEY/hidden.npy        (T, layers, D) float16: hidden states after each layer, texts one after another
    CACHE/teacher-KEY/embeddings.npy    (n, D) float32
    CACHE/teacher-KEY/cache.json        key, shapes and sha256 of both, written last

KEY is a hash over the teacher's files, the token ids and the layers. Half precision is enough for hidden states: they leave a LayerNorm
with entries of size 1, rounding to 11 bits adds 1e-7 to a relative squared error, and the student's own is above 1e-2. The folder is
written under another name and renamed, and the arrays are mapped, not read, into memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.distillation.batches import batches
from experiments.distillation.teacher import Teacher, padded
from experiments.errors import RunError
from runtime.files import digest, flush

_DESCRIPTION, _HIDDEN, _EMBEDDINGS = "cache.json", "hidden.npy", "embeddings.npy"


@dataclass(frozen=True)
class Outputs:
    """Teacher outputs of n texts: token ids, hidden states (T, layers, D) of all their tokens, embeddings (n, D)."""

    ids: tuple[np.ndarray, ...]
    hidden: np.ndarray
    embeddings: np.ndarray
    offsets: np.ndarray  # (n + 1,) rows of `hidden`

    @property
    def lengths(self) -> np.ndarray:
        """Tokens (n,) of every text."""
        return np.diff(self.offsets)

    def rows(self, chosen: np.ndarray) -> np.ndarray:
        """Hidden states (t, layers, D) float32 of the tokens of the chosen texts, one text after another."""
        return np.concatenate([self.hidden[self.offsets[i] : self.offsets[i + 1]] for i in chosen]).astype(np.float32)


def key(teacher_digest: str, ids: Sequence[np.ndarray], layers: int) -> str:
    """Hash of what decides the outputs."""
    found = hashlib.sha256(f"{teacher_digest} {layers} {len(ids)}\n".encode())
    found.update(np.array([len(row) for row in ids], dtype="<i8").tobytes())
    for row in ids:
        found.update(row.astype("<i4").tobytes())
    return found.hexdigest()


def outputs(
    cache: Path, teacher: Teacher, ids: Sequence[np.ndarray], batch_tokens: int, told: Callable[[int], None] = lambda done: None
) -> Outputs:
    """Outputs of the teacher for every text of token ids, from `cache` or computed and put there.

    `told` hears the number of texts done. Raises RunError where the cache cannot be written.
    """
    name = key(teacher.digest, ids, teacher.depth)
    folder = cache / f"teacher-{name[:16]}"
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
    shapes = {_HIDDEN: [int(offsets[-1]), teacher.depth, teacher.dim], _EMBEDDINGS: [len(ids), teacher.dim]}
    try:
        problem = _problem(folder, name, shapes)
        if problem is not None:
            if folder.exists():
                print(f"groundwave: teacher outputs in {folder} are computed again: {problem}", file=sys.stderr)
            _write(folder, name, shapes, teacher, ids, offsets, batch_tokens, told)
        hidden, embeddings = (np.load(folder / file, mmap_mode="r", allow_pickle=False) for file in (_HIDDEN, _EMBEDDINGS))
    except OSError as error:
        raise RunError(f"data.cache_dir: cannot write {folder}: {error.strerror or error}") from error
    return Outputs(tuple(ids), hidden, embeddings, offsets)


def _problem(folder: Path, name: str, shapes: dict[str, list[int]]) -> str | None:
    """Why the folder cannot be used, or None."""
    if not (folder / _DESCRIPTION).is_file():
        return f"{_DESCRIPTION} is missing"
    try:
        described: Any = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        if described["key"] != name or described["shapes"] != shapes:
            return "they are of another teacher, of other texts or of other layers"
        torn = [file for file in shapes if not (folder / file).is_file() or digest(folder / file) != described["sha256"][file]]
    except (ValueError, KeyError, TypeError):
        return f"{_DESCRIPTION} is truncated or altered"
    return f"{', '.join(torn)} is missing, truncated or altered" if torn else None


def _write(
    folder: Path, name: str, shapes: dict[str, list[int]], teacher: Teacher, ids: Sequence[np.ndarray], offsets: np.ndarray, batch_tokens: int,
    told: Callable[[int], None],
) -> None:
    temporary = folder.with_name(f".writing-{os.getpid()}-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        hidden = np.lib.format.open_memmap(temporary / _HIDDEN, mode="w+", dtype=np.float16, shape=tuple(shapes[_HIDDEN]))
        embeddings = np.empty(tuple(shapes[_EMBEDDINGS]), dtype=np.float32)
        done = 0
        for chosen in batches(np.diff(offsets), batch_tokens):
            states, embedded = teacher.outputs(*(batch := padded([ids[i] for i in chosen], teacher.padding)))
            lengths = batch[1].sum(1)
            for layer, state in enumerate(states[1:]):
                for place, i in enumerate(chosen):
                    hidden[offsets[i] : offsets[i + 1], layer] = state[place, : lengths[place]].numpy()
            embeddings[chosen] = embedded.numpy()
            done += len(chosen)
            told(done)
        hidden.flush()
        del hidden
        np.save(temporary / _EMBEDDINGS, embeddings)
        described = {"key": name, "shapes": shapes, "sha256": {file: digest(temporary / file) for file in shapes}}
        (temporary / _DESCRIPTION).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        for file in (*shapes, _DESCRIPTION):
            flush(temporary / file)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
