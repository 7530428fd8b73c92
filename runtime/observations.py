"""Observations from text: sentences as vectors, for a WaveCore whose `obs_dim` is the encoder's width.

    observe = TextObservations("all-MiniLM-L6-v2")                     or a local folder, or a name of the model hub
    x_obs = observe(["the door is open", "the door is shut"])          (2, observe.width) float32, unit rows

The encoder is any that transformers reads; what follows it is what its sentence-transformers files say (`runtime.encoders`), the mean over
tokens where there are none. EmbeddingGemma, the default, is 768 wide and has two Dense layers after its mean. Its licence must be accepted on
the hub before it can be fetched. Letters: B batch, L length, D width.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from runtime.arrays import shorten
from runtime.encoders import find, quiet, read_head

EMBEDDING_GEMMA = "google/embeddinggemma-300m"


class TextObservations:
    """A frozen text encoder, on the CPU in float32.

    `model`: a local folder; "all-MiniLM-L6-v2", which is read from the installed package that carries it, its weights verified; or a name of
    the model hub. `max_length`: tokens of a text, special ones included, beyond which it is truncated with a warning; what the folder says,
    if not given. `normalise`: rows of unit length, whether or not the folder says so; False leaves out a Normalize at the end. `prompt`: the
    name of one of the folder's prompts, put before every text; its default one, if it has one, when not given.

    `.width` of an observation, `.max_length`, `.prompt` (the text), `.batch_size`.

    Raises ImportError where transformers or PyTorch is missing, and in one line what cannot be found, fetched or read: FileNotFoundError,
    ModuleNotFoundError for a package, ValueError for an encoder that is unknown, incomplete or has a head that is unknown.
    """

    def __init__(
        self, model: str | os.PathLike[str] = EMBEDDING_GEMMA, *, max_length: int | None = None, normalise: bool = True,
        prompt: str | None = None, batch_size: int = 32,
    ) -> None:
        try:
            import torch  # noqa: F401
            import transformers  # noqa: F401
        except ImportError as error:
            raise ImportError("observations from text need PyTorch and transformers: pip install torch transformers") from error
        folder = find(model)
        self._head = read_head(folder)
        self._model, self._tokenizer = _read(self._head.folder)
        text_config = self._model.config.get_text_config()
        self.width = self._head.width(int(text_config.hidden_size))
        self.normalise, self.batch_size = normalise, _whole("batch_size", batch_size)
        limit = min(int(getattr(text_config, "max_position_embeddings", None) or 10**9), int(self._tokenizer.model_max_length))
        self.max_length = min(self._head.max_length or limit, limit) if max_length is None else _whole("max_length", max_length, limit)
        name = self._head.default_prompt if prompt is None else prompt
        if name is not None and name not in self._head.prompts:
            known = ", ".join(map(repr, self._head.prompts)) or "none"
            raise ValueError(f"prompt must be one of those of {folder}, {known}, found {name!r}")
        self.prompt = "" if name is None else self._head.prompts[name]
        if self.prompt and not self._head.include_prompt:
            raise ValueError(f"{folder} leaves the prompt out of its pooling, which is not known here")

    def __call__(self, texts: str | Iterable[str]) -> np.ndarray:
        """Observations (n, width) float32 of n texts, in their order; (width,) of a single str, (0, width) of none.

        White space around a text is dropped. An empty text has the observation of its special tokens and the prompt. Neither the other texts
        nor the batches change a text's observation beyond rounding. Raises TypeError, naming the index, for a text that is no str.
        """
        if not isinstance(texts, Iterable):
            raise TypeError(f"texts must be a str or a list of str, found {type(texts).__name__}")
        several = [texts] if isinstance(texts, str) else list(texts)
        ids = self._ids(several)
        result = np.empty((len(ids), self.width), dtype=np.float32)
        for indices in _alike([len(one) for one in ids], self.batch_size):
            result[indices] = self._embed(np.stack([ids[index] for index in indices]))
        return result[0] if isinstance(texts, str) else result

    def _ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids (L,) of every text, prompt and special tokens included."""
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts[{index}] must be a str, found {type(text).__name__}")
        if not texts:
            return []
        prepared = [(self.prompt + text).strip() for text in texts]
        prepared = [text.lower() for text in prepared] if self._head.lower else prepared
        found = self._tokenizer(prepared, truncation=False, padding=False, verbose=False)["input_ids"]
        long = [index for index, one in enumerate(found) if len(one) > self.max_length]
        if long:
            warnings.warn(f"{len(long)} of {len(texts)} texts have more than max_length={self.max_length} tokens and were truncated", stacklevel=3)
            cut = self._tokenizer([prepared[index] for index in long], truncation=True, max_length=self.max_length, padding=False)["input_ids"]
            for index, one in zip(long, cut, strict=True):
                found[index] = one
        empty = [index for index, one in enumerate(found) if not one]
        if empty:
            raise ValueError(f"texts[{empty[0]}] has no token: the tokenizer of {self._head.folder} frames no text in special ones")
        return [np.array(one, dtype=np.int64) for one in found]

    def _embed(self, ids: np.ndarray) -> np.ndarray:
        """Observations (B, width) of ids (B, L)."""
        import torch

        with torch.inference_mode():
            tokens = torch.from_numpy(ids)
            hidden = self._model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state.numpy()  # (B, L, D)
        return self._head(hidden, self.normalise)


def _alike(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of one length each: there is no padding, so none can change a result."""
    for length in sorted(set(lengths)):
        same = [index for index, one in enumerate(lengths) if one == length]
        for start in range(0, len(same), batch_size):
            yield same[start : start + batch_size]


def _read(folder: Any) -> tuple[Any, Any]:
    """Model and tokenizer of a folder, from its files alone and with none of its weights missing but a pooler's, which is not used."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json, so it is no checkpoint that transformers reads")
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model, loading = AutoModel.from_pretrained(folder, config=config, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"transformers cannot read {folder}: {' '.join(str(error).split())[:300]}") from error
    if config.is_encoder_decoder:
        raise ValueError(f"{folder} holds a {config.model_type}, an encoder and a decoder; expected a transformer that reads a text alone")
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ValueError(f"the weights in {folder} lack {shorten(missing)}")
    return model.eval().float(), tokenizer


def _whole(name: str, value: int, most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
        raise ValueError(f"{name} must be an integer of at least 1{'' if most is None else f' and at most {most}'}, found {value!r}")
    return value
