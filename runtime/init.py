"""Initial weights in NumPy, so that one seed gives the same model on every backend.

Each array has a generator of its own, `default_rng([seed, crc32(name)])`, and is drawn in float64: neither the order of creation nor the
presence of other arrays changes it. Distributions as in the models' specifications; letters as in `runtime.arrays`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from conf.baselines import GruConfig, TransformerConfig
from conf.models import DeltaNetConfig, GroundedMambaConfig, LamConfig, SizedWaveCoreConfig
from runtime.arrays import Entry, layout

_CUT_STD = 0.87962566103423978  # standard deviation of a standard normal that is cut at two


def init_arrays(name: str, config: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Initial arrays of model `name`: flat dict, torch names -> float64 arrays (int64 for counters), tied arrays included as copies.

    Raises ValueError for an unknown model or a negative seed.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"seed must be a non-negative integer, found {seed!r}")
    entries = layout(name, config)
    draw = _DRAWS[name]
    arrays = {
        key: np.asarray(draw(key, entry, config, np.random.default_rng([int(seed), zlib.crc32(key.encode())])), dtype=np.float64)
        for key, entry in entries.items()
        if entry.role in ("parameter", "buffer")
    }
    arrays |= {key: np.zeros(entry.shape, dtype=np.int64) for key, entry in entries.items() if entry.role == "counter"}
    arrays |= {key: arrays["embedding.weight"].copy() for key, entry in entries.items() if entry.role == "tied"}
    return {key: arrays[key] for key in entries}


def uniform_linear(shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Weight (outputs, inputs) of a linear layer, or (D, 1, K) of a depthwise convolution, uniform in +-1/sqrt(its last axis)."""
    bound = 1.0 / math.sqrt(shape[-1])
    return generator.uniform(-bound, bound, shape)


def _grounded_mamba(key: str, entry: Entry, config: GroundedMambaConfig, generator: np.random.Generator) -> np.ndarray:
    shape = entry.shape
    owner, _, leaf = key.rpartition(".")
    layer = owner.rpartition(".")[2]
    if entry.role == "buffer" or leaf == "memory_gate":
        return np.zeros(shape)
    if layer == "embedding":
        return 0.02 * generator.standard_normal(shape)
    if layer.startswith("ln_") or layer in ("state_norm", "readout_norm"):
        return np.ones(shape) if leaf == "weight" else np.zeros(shape)
    if leaf == "A":
        return -0.1 * np.eye(config.ssm_dim) + 0.01 * generator.standard_normal(shape)
    if leaf == "D":
        return np.ones(shape)
    if layer in ("B_proj", "C_proj"):
        return 0.01 * generator.standard_normal(shape)
    if layer == "dt_proj" and leaf == "bias":
        return np.array(config.dt_bias)
    if leaf == "time_decay":
        log_rate = -5.0 * np.arange(1, config.rwkv_heads + 1) / config.rwkv_heads
        return np.repeat((log_rate if config.decay == "exp_exp" else np.exp(log_rate))[:, None], config.head_dim, axis=1)
    if leaf == "time_first":
        return np.full(shape, 0.5)
    if layer == "gate_proj":
        half = 0.5 * math.log(config.gate_ssm / (1.0 - config.gate_ssm))
        return np.zeros(shape) if leaf == "weight" else np.array([half, -half])
    return uniform_linear(shape, generator)


def xavier(shape: tuple[int, ...], generator: np.random.Generator, gain: float) -> np.ndarray:
    """Weight (..., outputs, inputs), uniform in +-gain sqrt(6 / (inputs + outputs)); each matrix of a stack by itself."""
    bound = gain * math.sqrt(6.0 / (shape[-1] + shape[-2]))
    return generator.uniform(-bound, bound, shape)


def _delta(key: str, entry: Entry, config: DeltaNetConfig | LamConfig, generator: np.random.Generator) -> np.ndarray:
    """DeltaNetLM and LAM: the layer, the norms and the feed-forwards of both."""
    shape = entry.shape
    owner, _, leaf = key.rpartition(".")
    layer = owner.rpartition(".")[2]
    if layer.endswith(("embedding", "embeddings")):
        return 0.02 * generator.standard_normal(shape)
    if leaf == "gate" or (leaf == "weight" and "norm" in layer):
        return np.ones(shape)
    if leaf in ("fast_decay_bias", "slow_decay_bias"):
        return np.full(shape, math.log(0.3 if leaf == "fast_decay_bias" else 0.9))
    if leaf == "temp":
        return np.full(shape, math.sqrt(config.head_dim))
    if leaf == "bias":
        return np.zeros(shape)
    if leaf == "W_bilinear" or "_flux." in owner:
        return xavier(shape, generator, gain=0.1)
    return uniform_linear(shape, generator)


def _baseline(key: str, entry: Entry, config: TransformerConfig | GruConfig, generator: np.random.Generator) -> np.ndarray:
    """Transformer and GruLM: the embedding small, norms one, all else as torch draws its linear layers and its GRU, biases included."""
    shape, layer = entry.shape, key.rpartition(".")[0].rpartition(".")[2]
    if layer == "embedding":
        return 0.02 * generator.standard_normal(shape)
    if layer.startswith("norm"):
        return np.ones(shape)
    bound = 1.0 / math.sqrt(shape[-1] if len(shape) == 2 else config.dim)
    return generator.uniform(-bound, bound, shape)


def lecun(shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Weight (outputs, inputs), normal, cut at two standard deviations, of variance 1 / inputs once it is cut."""
    values = generator.standard_normal(shape)
    while (cut := np.abs(values) > 2.0).any():
        values[cut] = generator.standard_normal(int(cut.sum()))
    return values / (_CUT_STD * math.sqrt(shape[-1]))


def _wavecore(key: str, entry: Entry, config: SizedWaveCoreConfig, generator: np.random.Generator) -> np.ndarray:
    shape, leaf = entry.shape, key.rpartition(".")[2]
    if leaf in ("U_p", "U_w"):
        return xavier(shape, generator, gain=1.0)
    if leaf in ("a_raw", "B_base", "C_base"):
        return 0.02 * generator.standard_normal(shape)
    if leaf in ("A_U", "A_V"):
        return 0.01 * generator.standard_normal(shape)
    if leaf in ("bias", "D", "A_diag"):
        return np.zeros(shape)
    return lecun(shape, generator) if len(shape) == 2 else np.ones(shape)


_DRAWS: dict[str, Callable[[str, Entry, Any, np.random.Generator], np.ndarray]] = {
    "grounded_mamba": _grounded_mamba, "deltanet_lm": _delta, "transformer": _baseline, "gru": _baseline, "lam": _delta, "wavecore": _wavecore,
}
