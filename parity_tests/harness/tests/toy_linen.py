"""The twin of `toy_torch` in Flax Linen: layers of a setup and compact layers, a list of blocks, a head that reuses the embedding.

B batch, L length, D width 15, H heads 3, P head width 5, N state 7, V vocabulary 11.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

NAMES = {  # the torch module's paths where those of Linen differ
    "blocks.*": "blocks_*", "blocks.*.up": "blocks_*.Dense_0", "blocks.*.down": "blocks_*.Dense_1",
}


class Cell(nn.Module):
    """h_t = norm(decay * h_{t-1} + step * write(x_t)), the norm called step by step; the state passed in is detached."""

    dim: int
    state: int

    def setup(self) -> None:
        self.write, self.read = nn.Dense(self.state, use_bias=False), nn.Dense(self.dim, use_bias=False)
        self.decay = self.param("decay", nn.initializers.zeros, (self.state,))
        self.step = self.variable("frozen", "step", jnp.ones, (self.state,))
        self.norm = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False)

    def __call__(self, x: jax.Array, state: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        h = jnp.zeros((x.shape[0], self.state), x.dtype) if state is None else jax.lax.stop_gradient(state)
        update, out = self.write(x) * self.step.value, []
        for t in range(x.shape[1]):
            h = self.norm(jax.nn.sigmoid(self.decay) * h + update[:, t])
            out.append(h)
        return self.read(jnp.stack(out, 1)), h


class Heads(nn.Module):
    """Channels in heads, each with its own gain and a softmax over its channels."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gain = self.param("gain", nn.initializers.ones, (self.heads, x.shape[-1] // self.heads))
        y = nn.Dense(x.shape[-1], name="project")(x).reshape(*x.shape[:-1], *gain.shape)
        return (jax.nn.softmax(y, -1) * gain).reshape(x.shape)


class Block(nn.Module):
    """x + cell(norm(x)) + heads(norm(x)) + down(gelu(up(norm(x)))), computed in `dtype`, float32 as usual in Linen."""

    state: int
    heads: int
    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, state: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        dim = x.shape[-1]
        a = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=self.dtype, name="norm")(x)
        y, state = Cell(dim, self.state, name="cell")(a, state)
        y = x + y + Heads(self.heads, name="heads")(a)
        up = nn.Dense(self.hidden, dtype=self.dtype)(a)
        return y + nn.Dense(dim, dtype=self.dtype)(jax.nn.gelu(up, approximate=False)), state


class Head(nn.Module):
    """The tied head: an embedding that it was given, used backwards."""

    embedding: nn.Embed

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.embedding.attend(x)


class Toy(nn.Module):
    """logits (B, L, V), states = model(ids (B, L), states); states is a list of {"h": (B, N)}."""

    vocab: int = 11
    dim: int = 15
    heads: int = 3
    state: int = 7
    hidden: int = 21
    depth: int = 2
    epsilon: float = 1e-5

    def setup(self) -> None:
        self.embedding = nn.Embed(self.vocab, self.dim)
        self.blocks = [Block(self.state, self.heads, self.hidden) for _ in range(self.depth)]
        self.norm_out = nn.LayerNorm(epsilon=self.epsilon, use_fast_variance=False)
        self.head = Head(self.embedding)
        self.calls = self.variable("frozen", "calls", jnp.asarray, 3)

    def __call__(self, ids: jax.Array, states: list | None = None) -> tuple[jax.Array, list]:
        x, after = self.embedding(ids), []
        for block, state in zip(self.blocks, states or [None] * len(self.blocks), strict=True):
            x, h = block(x, None if state is None else state["h"])
            after.append({"h": h})
        return self.head(self.norm_out(x)), after
