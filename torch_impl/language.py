"""What the language models share: states of constant size, generation, and the frame that those without auxiliary outputs stand in.

Letters: B batch, L length, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torch_impl.generate import generate
from torch_impl.state import State, check_states, check_token_ids


class StreamingLM(nn.Module):
    """A causal language model that hands its states from call to call. It has an `embedding`, and says in `state_shapes` what it carries."""

    def state_shapes(self, batch_size: int) -> list[dict[str, tuple[int, ...]]]:
        """Shapes of the states for `batch_size` sequences, block by block."""
        raise NotImplementedError

    def init_states(self, batch_size: int) -> list[State]:
        """Zeros: the states before the first token."""
        new_zeros = self.embedding.weight.new_zeros
        return [{name: new_zeros(shape) for name, shape in shapes.items()} for shapes in self.state_shapes(batch_size)]

    def check(self, input_ids: Tensor, states: list[State] | None) -> None:
        """Raise ValueError for ids out of range, empty input, and states of another shape or dtype or with NaN."""
        check_token_ids(input_ids, self.config.vocab_size)
        if states is not None:
            check_states(states, self.state_shapes(input_ids.shape[0]), self.embedding.weight.dtype)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 0
    ) -> Tensor:
        """Continue `input_ids` (B, L) by `max_new_tokens` tokens; returns (B, L + max_new_tokens). See `torch_impl.generate`."""
        return generate(self, input_ids, max_new_tokens, temperature, top_k, seed)


class PreNormLM(StreamingLM):
    """embedding, `config.depth` blocks (x, state) -> (x, state), RMSNorm, and a head tied to the embedding."""

    def __init__(self, config: Any, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(block() for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.lm_head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, states: list[State] | None = None, *, return_aux: bool = False) -> tuple[Any, ...]:
        """input_ids (B, L) in [0, V). Returns logits (B, L, V) and the states to hand to the next call; with `return_aux` an empty dict.

        States passed in are detached (truncated backpropagation); those returned are not. Raises ValueError as `check` does.
        """
        self.check(input_ids, states)
        x = self.embedding(input_ids)  # (B, L, D)
        new_states = []
        for block, state in zip(self.blocks, states or self.init_states(input_ids.shape[0]), strict=True):
            x, state = block(x, state)
            new_states.append(state)
        logits = self.lm_head(self.norm(x))  # (B, L, V)
        return (logits, new_states, {}) if return_aux else (logits, new_states)
