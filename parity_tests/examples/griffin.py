"""recurrentgemma's torch and Linen Griffin. `whole`: one document. `resets`: a document begins within the last 3 tokens of one row.

Needs `pip install recurrentgemma` (extra `third-party`). Both sides compute the scan and the softmax, and torch the rotary angles, in float32
whatever the precision of the weights; that is what the bounds allow.
"""
from dataclasses import replace
from functools import partial
from importlib import import_module

import numpy as np

from parity_tests.harness import Bound, Case, Trajectory

FIXED = "float32 inside both implementations: scan, softmax, rotary angles"


def griffin(module: str) -> object:
    common = import_module("recurrentgemma.common")
    kinds = common.TemporalBlockType
    config = common.GriffinConfig(
        vocab_size=13, width=12, mlp_expanded_width=11, num_heads=3, lru_width=18, block_types=(kinds.RECURRENT, kinds.ATTENTION),
        embeddings_scale_by_sqrt_dim=True, attention_window_size=7, logits_soft_cap=30.0)
    return import_module(f"recurrentgemma.{module}.griffin").Griffin(config, gradient_checkpointing=False)


def inputs(seed: int, batch: int = 3, length: int = 10, reset: int | None = None) -> dict[str, np.ndarray]:
    position = np.tile(np.arange(length), (batch, 1))
    if reset is not None:
        position[-1, -reset:] = np.arange(reset)
    return {"tokens": np.random.default_rng(seed).integers(0, 13, (batch, length)), "segment_pos": position}


whole = Case(
    "griffin", partial(griffin, "torch"), partial(griffin, "jax"), inputs,
    bounds=[Bound(1e-6, FIXED, on=on) for on in ("forced", "free", "gradients", "slope", "optimiser")],
    trajectory=Trajectory(steps=5), regimes=("as is", "x 1e-3", "length 2", "batch 1"),
    sizes={"batch": 3, "length": 10, "vocabulary": 13, "width": 12, "expanded": 11, "lru": 18, "window": 7})
resets = replace(whole, name="griffin, resets", inputs=partial(inputs, reset=2))
