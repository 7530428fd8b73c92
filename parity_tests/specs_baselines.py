"""The baselines of the comparison as cases of the harness: torch's own attention and GRU against Flax's.

Tiny models whose axes all have different sizes, none a power of two or a square. The window is shorter than the sequence, and the carried
state of one row holds fewer tokens than the window: both ends of the mask are in use.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import nnx

from conf.baselines import GruConfig, TransformerConfig
from jax_impl.gru import GruLM as JaxGruLM
from jax_impl.transformer import Transformer as JaxTransformer
from parity_tests.harness import Bound, Case, Rule, StateProtocol, Trajectory, Transpose
from torch_impl.gru import GruLM as TorchGruLM
from torch_impl.transformer import Transformer as TorchTransformer

BATCH, LENGTH, VOCABULARY = 3, 19, 29
TRANSFORMER = TransformerConfig(vocab_size=VOCABULARY, dim=42, depth=1, heads=7, ffn_dim=31, window=5)
GRU = GruConfig(vocab_size=VOCABULARY, dim=35, depth=1)
REGIMES = ("as is", "carried state")
BOUNDS = (
    Bound(1e-12, "one layer on equal input: float64 rounding of a port that computes in another order", on="forced"),
    Bound(1e-11, "two blocks on top of each other lose one digit more", on="free"),
    Bound(1e-11, "a split only changes the order of float64 sums", on="splits"),
    Bound(1e-10, "the way back through 19 tokens loses another digit", on="gradients"),
)
TURN = (Transpose((1, 0)),)
CELL = [  # the leaves of nn.GRU in Flax's cell, block by block
    rule for block in range(GRU.depth) for rule in (
        Rule(f"blocks.{block}.gru.weight_ih_l0", f"blocks.{block}.gru.dense_i.kernel", TURN),
        Rule(f"blocks.{block}.gru.weight_hh_l0", f"blocks.{block}.gru.dense_h.kernel", TURN),
        Rule(f"blocks.{block}.gru.bias_ih_l0", f"blocks.{block}.gru.dense_i.bias"),
        Rule(f"blocks.{block}.gru.bias_hh_l0", f"blocks.{block}.gru.dense_h.bias"),
    )
]


def inputs(seed: int, batch: int | None = None, length: int | None = None) -> dict[str, np.ndarray]:
    """Random token ids (B, L)."""
    shape = (BATCH if batch is None else batch, LENGTH if length is None else length)
    return {"input_ids": np.random.default_rng(seed).integers(0, VOCABULARY, shape)}


def held(seed: int, batch: int) -> list[dict[str, np.ndarray]]:
    """Random keys and values; row after row with one token fewer in the window, down to none."""
    rng, shape = np.random.default_rng(seed), (batch, TRANSFORMER.heads, TRANSFORMER.window, TRANSFORMER.head_dim)
    seen = np.maximum(TRANSFORMER.window - np.arange(batch), 0.0)[:, None]
    return [{"k": rng.normal(size=shape), "v": rng.normal(size=shape), "seen": seen.copy()} for _ in range(TRANSFORMER.depth)]


def hidden(seed: int, batch: int) -> list[dict[str, np.ndarray]]:
    """Random hidden states."""
    rng = np.random.default_rng(seed)
    return [{"h": rng.uniform(-1.0, 1.0, (batch, GRU.dim))} for _ in range(GRU.depth)]


def baseline(name: str, reference: Any, candidate: Any, initial: Any, sizes: dict[str, int], loss: tuple[Any, Any], **more: Any) -> Case:
    """A causal language model with carried states, split anywhere."""
    return Case(
        name=name, reference=reference, candidate=candidate, inputs=inputs, ties={"lm_head.weight": "embedding.weight"}, regimes=REGIMES,
        states=StateProtocol(initial=initial, detached=True, split_length=6), trajectory=Trajectory(lr=3e-3), loss=loss,
        bounds=BOUNDS, unpaired={"lm_head": "the port ties its head by attending to the embedding"},
        sizes={"batch": BATCH, "length": LENGTH, "vocab": VOCABULARY, **sizes}, **more,
    )


def cases(loss: tuple[Any, Any]) -> list[Case]:
    """Both cases under the loss of the language models of `specs`."""
    shape = TRANSFORMER
    sizes = {"dim": shape.dim, "heads": shape.heads, "head_dim": shape.head_dim, "ffn": shape.ffn_dim, "window": shape.window}
    return [
        baseline("transformer", lambda: TorchTransformer(TRANSFORMER), lambda: JaxTransformer(TRANSFORMER, rngs=nnx.Rngs(0)), held, sizes, loss),
        baseline("gru", lambda: TorchGruLM(GRU), lambda: JaxGruLM(GRU, rngs=nnx.Rngs(0)), hidden, {"dim": GRU.dim}, loss, weights=CELL),
    ]
