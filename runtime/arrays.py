"""What a model's arrays are: the name, shape and role of each, read off the configuration, and the check that holds a dict of arrays to it.

A model is a flat dict, torch's parameter names -> NumPy arrays, whatever the backend. Letters in the shapes: D width, N state, H heads,
P head width (d in the delta rule), V vocabulary, M slots of the memory bank, K kernel of a convolution. WaveCore's widths have the names
of its configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from conf.baselines import GruConfig, TransformerConfig
from conf.models import DeltaNetConfig, GroundedMambaConfig, LamConfig, SizedWaveCoreConfig

NAMES = {
    "grounded_mamba": GroundedMambaConfig, "deltanet_lm": DeltaNetConfig, "transformer": TransformerConfig, "gru": GruConfig, "lam": LamConfig,
    "wavecore": SizedWaveCoreConfig,
}
DTYPES = ("float32", "float64")
LAM_KERNEL = 4  # of the public LAM's convolutions; no field of its configuration


class Entry(NamedTuple):
    """One array of a model. `role`: "parameter", "tied" (another name's array again), "buffer" (floats), "counter" (int64)."""

    shape: tuple[int, ...]
    role: str = "parameter"


def _linear(name: str, outputs: int, inputs: int) -> dict[str, Entry]:
    return {f"{name}.weight": Entry((outputs, inputs))}


def _affine(name: str, size: int) -> dict[str, Entry]:
    return {f"{name}.weight": Entry((size,)), f"{name}.bias": Entry((size,))}


def _linear_bias(name: str, outputs: int, inputs: int) -> dict[str, Entry]:
    return {**_linear(name, outputs, inputs), f"{name}.bias": Entry((outputs,))}


def _repeated(block: Mapping[str, Entry], depth: int) -> dict[str, Entry]:
    return {f"blocks.{index}.{name}": entry for index in range(depth) for name, entry in block.items()}


def _grounded_mamba(config: GroundedMambaConfig) -> dict[str, Entry]:
    dim, state, slots, heads = config.dim, config.ssm_dim, config.memory_size, (config.rwkv_heads, config.head_dim)
    steps = len(config.dt_bias)
    block: dict[str, Entry] = {
        **_affine("ln_ssm", dim),
        **_affine("ln_rwkv", dim),
        "ssm.A": Entry((state, state)),
        "ssm.D": Entry((dim,)),
        **_linear("ssm.B_proj", state, dim),
        **_linear("ssm.C_proj", dim, state),
        **_linear("ssm.dt_proj", steps, dim),
        "ssm.dt_proj.bias": Entry((steps,)),
        **_affine("ssm.state_norm", state),
        "rwkv.time_decay": Entry(heads),
        "rwkv.time_first": Entry(heads),
    }
    for name in ("key_proj", "value_proj", "receptance_proj", "output_proj"):
        block.update(_linear(f"rwkv.{name}", dim, dim))
    if config.readout_norm:
        block.update(_affine("rwkv.readout_norm", dim))
    if slots:
        block.update(_linear("rwkv.memory_query", dim, dim))
        block["rwkv.memory_gate"] = Entry((dim,))
        block["rwkv.memory_keys"] = block["rwkv.memory_values"] = Entry((slots, dim), "buffer")
        block["rwkv.memory_count"] = Entry((slots,), "counter")
        block["rwkv.update_counter"] = block["rwkv.writes"] = Entry((), "counter")
    block.update(_linear("gate_proj", 2, dim))
    block["gate_proj.bias"] = Entry((2,))
    block.update(_affine("ln_out", dim))
    table = (config.vocab_size, dim)
    return {"embedding.weight": Entry(table), **_repeated(block, config.depth), **_affine("ln_out", dim), "lm_head.weight": Entry(table, "tied")}


def _delta(dim: int, heads: int, kernel: int, hierarchical: bool) -> dict[str, Entry]:
    """DeltaNetLayer with an output gate, under `delta`."""
    layer: dict[str, Entry] = {}
    if hierarchical:
        layer |= {"fast_decay_bias": Entry((heads,)), "slow_decay_bias": Entry((heads,))}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "g_proj"):
        layer |= _linear(name, dim, dim)
    layer |= _linear("b_proj", heads, dim)
    for name in ("q_conv1d", "k_conv1d", "v_conv1d"):
        layer |= {f"{name}.weight": Entry((dim, 1, kernel)), f"{name}.bias": Entry((dim,))}
    width = dim // heads
    if hierarchical:
        hidden = max(width // 2, 1)
        layer |= {**_linear_bias("fast_decay_proj", heads, dim), **_linear_bias("slow_decay_proj", heads, dim)}
        layer |= {**_linear("fast_gate_proj", heads, dim), **_linear("slow_gate_proj", heads, dim)}
        layer |= {"rule.W_bilinear": Entry((heads, width, width)), "rule.temp": Entry((heads,))}
        layer |= {**_linear_bias("rule.token_flux.hidden", hidden, 2 * width), **_linear_bias("rule.token_flux.out", 1, hidden)}
        layer |= {**_linear_bias("rule.chunk_flux.hidden", hidden, 2 * width + 1), **_linear_bias("rule.chunk_flux.out", 1, hidden)}
    layer |= {"o_norm.weight": Entry((width,)), "o_norm.gate": Entry((width,))}
    return {f"delta.{name}": entry for name, entry in layer.items()}


def _deltanet_lm(config: DeltaNetConfig) -> dict[str, Entry]:
    dim = config.dim
    block = {"norm_delta.weight": Entry((dim,)), **_delta(dim, config.heads, config.conv_kernel, hierarchical=False)}
    return _language_model({**block, **_gated_ffn(dim, config.ffn_dim)}, config)


def _gated_ffn(dim: int, ffn: int) -> dict[str, Entry]:
    return {"norm_ffn.weight": Entry((dim,)), **_linear("w1", ffn, dim), **_linear("w3", ffn, dim), **_linear("w2", dim, ffn)}


def _language_model(block: Mapping[str, Entry], config: DeltaNetConfig | TransformerConfig | GruConfig) -> dict[str, Entry]:
    """Blocks between an embedding and, behind an RMSNorm, the head tied to it."""
    table = (config.vocab_size, config.dim)
    head = {"norm.weight": Entry((config.dim,)), "lm_head.weight": Entry(table, "tied")}
    return {"embedding.weight": Entry(table), **_repeated(block, config.depth), **head}


def _transformer(config: TransformerConfig) -> dict[str, Entry]:
    dim = config.dim
    block = {"norm_attention.weight": Entry((dim,))}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        block |= _linear(f"attention.{name}", dim, dim)
    return _language_model({**block, **_gated_ffn(dim, config.ffn_dim)}, config)


def _gru(config: GruConfig) -> dict[str, Entry]:
    dim = config.dim
    block = {"norm_gru.weight": Entry((dim,)), "gru.weight_ih_l0": Entry((3 * dim, dim)), "gru.weight_hh_l0": Entry((3 * dim, dim))}
    return _language_model({**block, "gru.bias_ih_l0": Entry((3 * dim,)), "gru.bias_hh_l0": Entry((3 * dim,))}, config)


def _lam(config: LamConfig) -> dict[str, Entry]:
    dim = config.dim
    tables = {"word": config.vocab_size, "position": config.max_positions, "token_type": 2}
    block = {
        **_delta(dim, config.heads, LAM_KERNEL, hierarchical=True),
        **_affine("norm_delta", dim),
        **_linear_bias("ffn_in", config.ffn_dim, dim),
        **_linear_bias("ffn_out", dim, config.ffn_dim),
        **_affine("norm_ffn", dim),
    }
    embeddings = {f"{kind}_embeddings.weight": Entry((rows, dim)) for kind, rows in tables.items()}
    return {**embeddings, **_affine("embedding_norm", dim), **_repeated(block, config.depth)}


def _under(owner: str, *parts: Mapping[str, Entry]) -> dict[str, Entry]:
    return {f"{owner}.{name}": entry for part in parts for name, entry in part.items()}


def _wavecore(config: SizedWaveCoreConfig) -> dict[str, Entry]:
    fast, wave, particle, encoded, key, context = config.d_s, config.d_w, config.d_p, config.d_e, config.d_k, config.d_c
    dims, inner = list(enumerate(config.cms_dims)), config.d_w // config.mamba_state_dim
    core: dict[str, Entry] = {"U_p": Entry((fast, particle)), "U_w": Entry((fast, wave)), **_linear_bias("z_proj", particle, encoded)}
    core |= {**_linear_bias("particle_in", particle + context, particle + context), **_affine("particle_norm", particle + context)}
    core |= {**_linear_bias("particle_out", particle, particle + context), **_linear_bias("gate", fast, fast + encoded + context)}
    if config.use_mamba_wave:
        for name, outputs, inputs in (("wave_in", inner, particle + context), ("gate_proj", inner, particle + context), ("wave_out", wave, inner)):
            core |= _under("wave", _linear_bias(name, outputs, inputs))
        core |= {f"wave.ssm.{name}": Entry((inner, config.mamba_state_dim)) for name in ("a_raw", "B_base", "C_base")}
        core |= _under("wave.ssm", {"D": Entry((inner,))}, *(_linear_bias(f"{name}_proj", inner, inner) for name in ("dt", "b", "c")))
    else:
        factor = Entry((wave, wave // 4))
        core |= {"wave.A_diag": Entry((wave,)), "wave.A_U": factor, "wave.A_V": factor}
        core |= _under("wave", _linear_bias("A_modulation", wave, context), _linear_bias("B_net", wave, context + particle))
    heads = {"action": config.output_dim, "value": 1, "world_model": config.obs_dim}
    hidden = (fast + context) // 2
    return {
        **_under(
            "encoder",
            *(_linear_bias("obs_in", 2 * encoded, config.obs_dim), _affine("obs_norm", 2 * encoded), _linear_bias("obs_out", encoded, 2 * encoded)),
            *(_linear_bias("action", encoded // 2, config.action_dim), _linear_bias("reward", encoded // 4, 1)),
            *(_linear_bias("join_in", 2 * encoded, encoded + encoded // 2 + encoded // 4), _affine("join_norm", 2 * encoded)),
            *(_linear_bias("join_out", encoded, 2 * encoded), _affine("norm", encoded)),
        ),
        **_under(
            "cms_read",
            *(_linear_bias("query_in", fast + encoded, fast + encoded), _affine("query_norm", fast + encoded)),
            _linear_bias("query_out", key, fast + encoded),
            *(_linear(f"level_proj.{level}", context, size) for level, size in dims),
            _linear_bias("mixing", config.num_levels, config.num_levels * context),
        ),
        **_under("core", core),
        **_under(
            "cms_write",
            *(_linear_bias(f"value.{level}", size, fast + encoded) for level, size in dims),
            *(_linear_bias(f"key.{level}", key, fast + encoded) for level, _ in dims),
            *(_linear_bias(f"gate.{level}", 1, fast + encoded + 1) for level, _ in dims),
        ),
        **_under(
            "decoder",
            *(_linear_bias("hidden_in", fast + context, fast + context), _affine("hidden_norm", fast + context)),
            _linear_bias("hidden_out", hidden, fast + context),
            *(_linear_bias(name, outputs, hidden) for name, outputs in heads.items() if name in config.heads),
        ),
    }


_LAYOUTS: dict[str, Callable[[Any], dict[str, Entry]]] = {
    "grounded_mamba": _grounded_mamba, "deltanet_lm": _deltanet_lm, "transformer": _transformer, "gru": _gru, "lam": _lam, "wavecore": _wavecore,
}
_TIES = {"lm_head.weight": "embedding.weight"}


def check_name(name: str) -> None:
    """Raise ValueError unless `name` is a model that runtime knows."""
    if name not in NAMES:
        raise ValueError(f"model must be one of {', '.join(map(repr, NAMES))}, found {name!r}")


def check_config(name: str, config: Any) -> None:
    """Raise ValueError for an unknown model, TypeError for a configuration of another model."""
    check_name(name)
    if not isinstance(config, NAMES[name]):
        raise TypeError(f"config of {name!r} must be a {NAMES[name].__name__}, found {type(config).__name__}")


def check_dtype(dtype: str) -> None:
    """Raise ValueError unless `dtype` is "float32" or "float64"."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be 'float32' or 'float64', found {dtype!r}")


def layout(name: str, config: Any) -> dict[str, Entry]:
    """Every array of model `name` under `config`, in the order in which they are written."""
    check_config(name, config)
    return _LAYOUTS[name](config)


def parameter_count(name: str, config: Any) -> int:
    """Number of parameters: those frozen by the configuration included, a tied array counted once, buffers left out."""
    return sum(math.prod(entry.shape) for entry in layout(name, config).values() if entry.role == "parameter")


def check_shapes(name: str, config: Any, found: Mapping[str, tuple[tuple[int, ...], str]], what: str = "arrays") -> None:
    """Hold names, shapes and kinds to the layout; nothing is read or allocated. A tied array may be left out.

    `found`: name -> (shape, kind), kind "float", "int" or the spelling of any other dtype. `what` names the source in the error.
    Raises ValueError, one for all that is wrong: missing, unused and misshapen names, and wrong kinds.
    """
    entries = layout(name, config)
    missing = [key for key, entry in entries.items() if key not in found and entry.role != "tied"]
    unused = [key for key in found if key not in entries]
    misshapen, kinds = [], []
    for key, entry in entries.items():
        if key not in found:
            continue
        shape, kind = found[key]
        expected = "int" if entry.role == "counter" else "float"
        if tuple(shape) != entry.shape:
            misshapen.append(f"{key} is {tuple(shape)}, expected {entry.shape}")
        if kind != expected:
            kinds.append(f"{key} is {kind}, expected {expected}")
    problems = [
        f"{label}: {shorten(items)}"
        for label, items in (("missing", missing), ("unused", unused), ("wrong shape", misshapen), ("wrong dtype", kinds))
        if items
    ]
    if problems:
        raise ValueError(f"{what} do not fit {name}: " + "; ".join(problems))


def check(name: str, config: Any, arrays: Mapping[str, Any], dtype: str = "float64") -> dict[str, np.ndarray]:
    """A full dict of C-contiguous arrays in layout order, floats as `dtype`, counters as int64, tied arrays filled in.

    The result never shares memory with `arrays`. Raises ValueError as `check_shapes`, and for a tied array that differs from its twin.
    """
    check_dtype(dtype)
    given = {key: np.asarray(value) for key, value in arrays.items()}
    check_shapes(name, config, {key: (value.shape, dtype_kind(value.dtype)) for key, value in given.items()})
    for tied, source in _TIES.items():
        if tied in given and not np.array_equal(given[tied], given[source], equal_nan=True):
            raise ValueError(f"{tied} is tied to {source} in {name}, but the two arrays differ")
    checked = {}
    for key, entry in layout(name, config).items():
        source = _TIES[key] if entry.role == "tied" else key
        checked[key] = np.array(given[source], dtype=np.int64 if entry.role == "counter" else dtype, order="C")
    return checked


def dtype_kind(dtype: np.dtype) -> str:
    """ "float", "int", or the dtype's own name where it is neither."""
    return {"f": "float", "i": "int"}.get(dtype.kind, str(dtype))


def shorten(items: Iterable[str], most: int = 8) -> str:
    """The first `most` names and how many more there are."""
    items = list(items)
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
