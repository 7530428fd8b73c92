"""Sampling from a language model that streams. Letters: B batch, L length."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from cython_ext.sampling import sample_token


def generate(
    call: Any, input_ids: Array, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 0
) -> Array:
    """Continue `input_ids` (B, L) with `call(ids, states) -> (logits, states)`, a module or a jitted function of one.

    Returns (B, L + max_new_tokens). Memory does not grow with the length. Sampling is NumPy's, so that every backend draws the same tokens.
    """
    rng = np.random.default_rng(seed)
    tokens, states = [input_ids], None
    for _ in range(max_new_tokens):
        logits, states = call(tokens[-1], states)
        drawn = sample_token(np.asarray(logits[:, -1], np.float64), temperature, top_k, rng)
        tokens.append(jnp.asarray(drawn, input_ids.dtype)[:, None])
    return jnp.concatenate(tokens, axis=1)
