"""The twin of `toy_torch` in Flax NNX: the same names; the recurrence is a scan, the head reuses the embedding.

B batch, L length, D width 15, H heads 3, P head width 5, N state 7, V vocabulary 11.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


class Frozen(nnx.Variable):
    """A leaf that is not trained."""


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + eps) * scale + bias


class Cell(nnx.Module):
    """h_t = norm(decay * h_{t-1} + step * write(x_t)); the state passed in is detached."""

    def __init__(self, dim: int, state: int, rngs: nnx.Rngs) -> None:
        self.write = nnx.Linear(dim, state, use_bias=False, rngs=rngs)
        self.read = nnx.Linear(state, dim, use_bias=False, rngs=rngs)
        self.decay = nnx.Param(jnp.zeros(state))
        self.norm = nnx.LayerNorm(state, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.step = Frozen(jnp.ones(state))

    def __call__(self, x: jax.Array, state: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        start = jnp.zeros((x.shape[0], self.decay.shape[0]), x.dtype) if state is None else jax.lax.stop_gradient(state)
        decay, scale, bias, eps = jax.nn.sigmoid(self.decay[...]), self.norm.scale[...], self.norm.bias[...], self.norm.epsilon

        def step(h: jax.Array, update: jax.Array) -> tuple[jax.Array, jax.Array]:
            h = layer_norm(decay * h + update, scale, bias, eps)
            return h, h

        final, out = jax.lax.scan(step, start, jnp.swapaxes(self.write(x) * self.step[...], 0, 1))
        return self.read(jnp.swapaxes(out, 0, 1)), final


class Heads(nnx.Module):
    """Channels in heads, each with its own gain and a softmax over its channels."""

    def __init__(self, dim: int, heads: int, rngs: nnx.Rngs) -> None:
        self.project, self.gain = nnx.Linear(dim, dim, rngs=rngs), nnx.Param(jnp.ones((heads, dim // heads)))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.project(x).reshape(*x.shape[:-1], *self.gain.shape)
        return (jax.nn.softmax(y, -1) * self.gain[...]).reshape(x.shape)


class Block(nnx.Module):
    """x + cell(norm(x)) + heads(norm(x)) + down(gelu(up(norm(x))))."""

    def __init__(self, dim: int, heads: int, state: int, hidden: int, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(dim, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.cell, self.heads = Cell(dim, state, rngs), Heads(dim, heads, rngs)
        self.up, self.down = nnx.Linear(dim, hidden, rngs=rngs), nnx.Linear(hidden, dim, rngs=rngs)

    def __call__(self, x: jax.Array, state: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        a = self.norm(x)
        y, state = self.cell(a, state)
        return x + y + self.heads(a) + self.down(jax.nn.gelu(self.up(a), approximate=False)), state


class Toy(nnx.Module):
    """logits (B, L, V), states = model(ids (B, L), states); states is a list of {"h": (B, N)}."""

    def __init__(self, vocab: int = 11, dim: int = 15, heads: int = 3, state: int = 7, hidden: int = 21, depth: int = 2) -> None:
        rngs = nnx.Rngs(0)
        self.embedding = nnx.Embed(vocab, dim, rngs=rngs)
        self.blocks = nnx.List([Block(dim, heads, state, hidden, rngs) for _ in range(depth)])
        self.norm_out = nnx.LayerNorm(dim, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.calls = Frozen(jnp.asarray(3))

    def __call__(self, ids: jax.Array, states: list | None = None) -> tuple[jax.Array, list]:
        x, after = self.embedding(ids), []
        for block, state in zip(self.blocks, states or [None] * len(self.blocks), strict=True):
            x, h = block(x, None if state is None else state["h"])
            after.append({"h": h})
        return self.embedding.attend(self.norm_out(x)), after
