"""Configurations small enough for tests: no two axes equal, none a power of two."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from conf.baselines import GruConfig, TransformerConfig
from conf.models import DeltaNetConfig, GroundedMambaConfig
from conf.schema import BackendConfig, DataConfig, LossConfig, OptimiserConfig, TrainConfig, TrainingConfig
from experiments.data.batches import Stream

VOCABULARY = 258


def config(backend: str = "torch", dtype: str = "float64", **sections: Any) -> TrainConfig:
    """A model of a few thousand parameters; `sections` replace whole sections or fields of the root."""
    model = GroundedMambaConfig(
        vocab_size=VOCABULARY, dim=12, depth=2, ssm_dim=5, rwkv_heads=3, retrieval_heads=2, memory_size=7, memory_writes=3, memory_every=10
    )
    base = TrainConfig(
        model=model, backend=BackendConfig(name=backend, dtype=dtype), data=DataConfig(), optimiser=OptimiserConfig(rate=1e-2, warmup=7),
        training=TrainingConfig(steps=50, batch_size=3, context=11),
        loss=LossConfig(state_penalty=["ssm", "wkv"], state_weight=0.3, state_norm=2.0, smooth_weight=0.07),
    )
    return replace(base, **sections)


def deltanet(backend: str = "torch", dtype: str = "float64") -> TrainConfig:
    """DeltaNetLM of a few thousand parameters, with a penalty on its state; chunks of 7 in contexts of 11."""
    model = DeltaNetConfig(vocab_size=VOCABULARY, dim=15, depth=2, heads=3, ffn_dim=13, chunk_size=7)
    loss = LossConfig(state_penalty=["S"], state_weight=0.3, state_norm=0.7, smooth_weight=0.07)
    return config(backend, dtype, architecture="deltanet_lm", model=model, loss=loss)


def transformer(backend: str = "torch", dtype: str = "float64") -> TrainConfig:
    """Transformer of a few thousand parameters; its window is shorter than the context of 11."""
    model = TransformerConfig(vocab_size=VOCABULARY, dim=18, depth=2, heads=3, ffn_dim=13, window=7)
    return config(backend, dtype, architecture="transformer", model=model, loss=LossConfig(state_penalty=[], smooth_weight=0.07))


def gru(backend: str = "torch", dtype: str = "float64") -> TrainConfig:
    """GruLM of a few thousand parameters, with a penalty on its state."""
    model = GruConfig(vocab_size=VOCABULARY, dim=15, depth=2)
    loss = LossConfig(state_penalty=["h"], state_weight=0.3, state_norm=0.7, smooth_weight=0.07)
    return config(backend, dtype, architecture="gru", model=model, loss=loss)


def stream(settings: TrainConfig, documents: int = 9) -> Stream:
    """Random documents of awkward lengths."""
    rng = np.random.default_rng(3)
    texts = [rng.integers(97, 123, size=int(size)).astype(np.int32) for size in rng.integers(40, 400, size=documents)]
    return Stream(texts, settings.training.batch_size, settings.training.context, settings.seed)
