"""Sampling from a language model that streams. Letters: B batch, L length."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cython_ext.sampling import sample_token


def generate(
    call: Any, input_ids: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 0
) -> Tensor:
    """Continue `input_ids` (B, L) with `call(ids, states) -> (logits, states)`; returns (B, L + max_new_tokens).

    Memory does not grow with the length. Sampling is NumPy's, so that every backend draws the same tokens.
    """
    rng = np.random.default_rng(seed)
    tokens, states = [input_ids], None
    for _ in range(max_new_tokens):
        logits, states = call(tokens[-1], states)
        drawn = sample_token(logits[:, -1].double().cpu().numpy(), temperature, top_k, rng)
        tokens.append(torch.from_numpy(drawn).to(input_ids)[:, None])
    return torch.cat(tokens, dim=1)
