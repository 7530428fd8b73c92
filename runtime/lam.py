"""`LAM`: sentences to embeddings, on any backend.

    model = LAM.from_pretrained(path, backend="cython")        "cython", "torch" or "jax"
    embeddings = model.encode(["Hello world"])                 (n, D) float32, unit rows

Letters: n sentences, D width.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtime import files, public
from runtime.build import build
from runtime.checkpoint import WEIGHTS, load_set, save_arrays
from runtime.encoding import embed, plan, progress
from runtime.init import init_arrays
from runtime.teacher import read_teacher
from runtime.tokenizer import TOKENIZER, prepare, read_tokenizer, tokenize

BACKENDS = ("cython", "torch", "jax")  # in the order in which they are fallen back to
_TORCH_WEIGHTS = "pytorch_model.bin"


class LAM:
    """A sentence encoder: a model that `runtime.build("lam", ...)` made, and its tokenizer, a `tokenizers.Tokenizer`.

    `.model`, `.tokenizer`, `.config` (`conf.models.LamConfig`) and `.backend`, the one that is used. The tokenizer's own truncation and
    padding are switched off. Raises TypeError for another model, ValueError for a tokenizer that does not go with it.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        if getattr(model, "name", None) != "lam":
            raise TypeError(f"model must be one that runtime.build made under the name 'lam', found {type(model).__name__}")
        self.model, self.tokenizer = model, prepare(tokenizer, model.config.vocab_size)
        self.config, self.backend = model.config, model.backend

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], backend: str = "cython", strict: bool = False, dtype: str | None = None, weights: str | None = None
    ) -> LAM:
        """The model in a local directory: one of `save`, or a public LAM with `model.safetensors` or `pytorch_model.bin` and a tokenizer.

        A backend that cannot be loaded, for want of a package or of the compiled kernel, gives way to the next of "cython", "torch",
        "jax" with a RuntimeWarning, or raises ImportError if `strict`. `dtype`, "float32" or "float64", is as stored unless given. `weights`
        "bfloat16" halves the bytes of the products' weights on "cython", arithmetic staying float32.

        Raises FileNotFoundError for a directory or file that is not there; ValueError for an unknown backend and, naming the file, for
        one that is broken or whose arrays are missing, unmapped or misshapen.
        """
        _check_backend(backend)
        directory = _directory(path)
        tokenizer_file = None
        if files.is_saved_set(directory):
            name, config, arrays, stored, paths = load_set(directory)
            if name != "lam":
                raise ValueError(f"{directory} holds a {name!r}, expected a 'lam'")
            tokenizer_file = paths.get(TOKENIZER)
        else:
            config, arrays, stored = _read_public(directory)
        tokenizer = read_tokenizer(directory, tokenizer_file)
        return cls(_load(config, arrays, backend, strict, stored if dtype is None else dtype, weights), tokenizer)

    @classmethod
    def from_teacher(
        cls, path: str | os.PathLike[str], backend: str = "cython", seed: int = 0, strict: bool = False, dtype: str = "float32"
    ) -> LAM:
        """An untrained student of a local BERT checkpoint, all-MiniLM-L6-v2 say: its embeddings, feed-forwards, norms and tokenizer.

        The DeltaNet layers are drawn from `seed`. `backend` and `strict` as in `from_pretrained`. Raises as `runtime.teacher.read_teacher`.
        """
        _check_backend(backend)
        directory = _directory(path)
        config, taken = read_teacher(directory)
        tokenizer = read_tokenizer(directory)
        return cls(_load(config, init_arrays("lam", config, seed) | taken, backend, strict, dtype), tokenizer)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write model and tokenizer, to be read on any backend. Raises OSError where the directory cannot be written."""
        save_arrays("lam", self.config, self.model.arrays(), directory, self.model.dtype, texts={TOKENIZER: self.tokenizer.to_str()})

    def encode(
        self,
        sentences: str | Iterable[str],
        batch_size: int = 32,
        max_length: int | None = None,
        normalize: bool = True,
        show_progress_bar: bool | None = None,
    ) -> np.ndarray:
        """Embeddings (n, D) of n sentences, float32 (float64 of a float64 model); (D,) of a single str, (0, D) of none.

        Rows have unit length, or are the plain means over tokens where `normalize` is False. A text of more than `max_length` tokens,
        special ones included (the model's limit unless given), is truncated; one warning counts them. An empty text has the embedding
        of its special tokens. Long texts come in batches smaller than `batch_size`. `show_progress_bar` None shows one on a terminal.

        Raises TypeError, naming the index, for a sentence that is no str; ValueError for a `batch_size` or `max_length` out of range.
        """
        if not isinstance(sentences, Iterable):
            raise TypeError(f"sentences must be a str or a list of str, found {type(sentences).__name__}")
        limit = self.config.max_length
        _check_whole("batch_size", batch_size)
        _check_whole("max_length", limit if max_length is None else max_length, limit)
        texts = [sentences] if isinstance(sentences, str) else list(sentences)
        ids, truncated = tokenize(self.tokenizer, texts, limit if max_length is None else max_length)
        if truncated:
            text = f"{truncated} of {len(texts)} sentences have more than max_length={max_length or limit} tokens and were truncated"
            warnings.warn(text, stacklevel=2)
        batches = plan([len(one) for one in ids], batch_size, limit if self.backend == "jax" else None)
        result = np.empty((len(ids), self.config.dim), dtype=self.model.dtype)
        with progress(sum(map(len, ids)), len(batches), show_progress_bar) as done:
            embed(self.model, ids, batches, result, normalize, done)
        return result[0] if isinstance(sentences, str) else result


def _load(config: Any, arrays: Mapping[str, np.ndarray], backend: str, strict: bool, dtype: str, weights: str | None = None) -> Any:
    """The model on `backend`, or, unless `strict`, on the first of the others that can be loaded, which then keep the weights as `dtype`."""
    failed: dict[str, str] = {}
    for candidate in (backend, *(other for other in BACKENDS if other != backend)):
        try:
            model = build("lam", config, candidate, arrays, dtype, weights=weights if candidate == backend else None)
        except ImportError as error:
            if strict:
                raise
            failed[candidate] = str(error)
            continue
        for name, reason in failed.items():
            warnings.warn(f"LAM's backend {name!r} cannot be loaded, {candidate!r} is used instead: {reason}", RuntimeWarning, stacklevel=3)
        return model
    raise ImportError("LAM has no backend that can be loaded: " + "; ".join(f"{name!r}: {reason}" for name, reason in failed.items()))


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, found {backend!r}")


def _check_whole(name: str, value: Any, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1 or (most is not None and value > most):
        words = "of at least 1" if most is None else f"from 1 to {most}"
        raise ValueError(f"{name} must be an integer {words}, found {value!r}")


def _directory(path: str | os.PathLike[str]) -> Path:
    directory = Path(path)
    if not directory.is_dir():
        raise FileNotFoundError(f"no directory {directory}; models are read from local directories, nothing is downloaded")
    return directory


def _read_public(directory: Path) -> tuple[Any, dict[str, np.ndarray], str]:
    """Configuration, arrays under our names and dtype of a public LAM."""
    path = next((directory / name for name in (WEIGHTS, _TORCH_WEIGHTS) if (directory / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{directory} holds neither {WEIGHTS} nor {_TORCH_WEIGHTS}")
    held = files.read_arrays(path)
    try:
        config, arrays = public.config("lam", held), public.rename("lam", held)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return config, arrays, str(next(iter(arrays.values())).dtype)
