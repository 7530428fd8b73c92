"""What the language models share: states of constant size, generation, and the frame that those without auxiliary outputs stand in.

Letters: B batch, L length, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jax_impl.generate import generate
from jax_impl.state import State, check_states, check_token_ids


class StreamingLM(nnx.Module):
    """A causal language model that hands its states from call to call. It has an `embedding`, and says in `state_shapes` what it carries."""

    def state_shapes(self, batch_size: int) -> list[dict[str, tuple[int, ...]]]:
        """Shapes of the states for `batch_size` sequences, block by block."""
        raise NotImplementedError

    def init_states(self, batch_size: int) -> list[State]:
        """Zeros: the states before the first token."""
        dtype = self.embedding.embedding.dtype
        return [{name: jnp.zeros(shape, dtype) for name, shape in shapes.items()} for shapes in self.state_shapes(batch_size)]

    def check(self, input_ids: Array, states: list[State] | None) -> None:
        """Raise ValueError for ids out of range, empty input, and states of another shape or dtype or with NaN (values only outside `jit`)."""
        check_token_ids(input_ids, self.config.vocab_size)
        if states is not None:
            check_states(states, self.state_shapes(input_ids.shape[0]), self.embedding.embedding.dtype)

    def generate(
        self, input_ids: Array, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 0
    ) -> Array:
        """Continue `input_ids` (B, L) by `max_new_tokens` tokens; returns (B, L + max_new_tokens). See `jax_impl.generate`."""
        return generate(self, input_ids, max_new_tokens, temperature, top_k, seed)


class PreNormLM(StreamingLM):
    """embedding, `config.depth` blocks (x, state) -> (x, state), RMSNorm, and a head tied to the embedding.

    `remat` recomputes each block in the backward pass instead of keeping what it computed.
    """

    def __init__(self, config: Any, block: Callable[[], nnx.Module], *, remat: bool, rngs: nnx.Rngs) -> None:
        self.config = config
        self.remat = remat
        self.embedding = nnx.Embed(config.vocab_size, config.dim, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.embedding.dtype = None  # Flax fixes it to the dtype at construction, and would round float64 weights to float32
        self.blocks = nnx.List([block() for _ in range(config.depth)])
        self.norm = nnx.RMSNorm(config.dim, epsilon=config.norm_eps, use_fast_variance=False, rngs=rngs)

    def __call__(self, input_ids: Array, states: list[State] | None = None, *, return_aux: bool = False) -> tuple[Any, ...]:
        """input_ids (B, L) in [0, V). Returns logits (B, L, V) and the states to hand to the next call; with `return_aux` an empty dict.

        States passed in are detached (truncated backpropagation); those returned are not. Raises ValueError as `check` does.
        """
        self.check(input_ids, states)
        x = self.embedding(input_ids)  # (B, L, D)
        new_states = []
        for block, state in zip(self.blocks, states or self.init_states(input_ids.shape[0]), strict=True):
            x, state = (jax.checkpoint(block.__call__) if self.remat else block)(x, state)
            new_states.append(state)
        logits = self.embedding.attend(self.norm(x))  # (B, L, V)
        return (logits, new_states, {}) if return_aux else (logits, new_states)
