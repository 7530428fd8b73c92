"""Public checkpoints: from their names to ours and back, and the sizes read off the shapes.

GroundThink (`grounded_mamba`): a state dict of the public GroundedMamba. The names are ours; `lm_head.weight`, tied to the embedding, may be
missing, and wrappers may have left `module.` or `_orig_mod.` in front.

LAM (`lam`): `deltanet_layers.i.*` and, as the embeddings, feed-forwards and norms are BERT's, `teacher_model.*`, wrapped or not. The teacher's
attention and pooler, which LAM does not use, may be there and are dropped. The public code applies gelu twice; names cannot say otherwise, so
a model with `gelu_repeats=1` is another model once exported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from conf.models import GroundedMambaConfig, LamConfig
from runtime.arrays import check, check_name, layout, shorten

_WRAPPERS = re.compile(r"(module\.|_orig_mod\.)+")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")

TEACHER = "teacher_model."
_LAM_EMBEDDINGS = {"embeddings.LayerNorm": "embedding_norm"} | {
    f"embeddings.{kind}_embeddings": f"{kind}_embeddings" for kind in ("word", "position", "token_type")
}
_LAM_LAYER = {
    "attention.output.LayerNorm": "norm_delta", "intermediate.dense": "ffn_in", "output.dense": "ffn_out", "output.LayerNorm": "norm_ffn",
}
_LAM_DELTA = {f"{name}_conv1d.conv": f"{name}_conv1d" for name in "qkv"} | {
    "resonance_flux.token_flux_proj.0": "rule.token_flux.hidden",
    "resonance_flux.token_flux_proj.2": "rule.token_flux.out",
    "resonance_flux.flux_net.0": "rule.chunk_flux.hidden",
    "resonance_flux.flux_net.2": "rule.chunk_flux.out",
    "resonance_flux": "rule",
}
LAM_UNUSED = re.compile(
    r"teacher_model\.(pooler\.dense\.(weight|bias)|embeddings\.position_ids"
    r"|encoder\.layer\.\d+\.attention\.(self\.(query|key|value)|output\.dense)\.(weight|bias))"
)


class _Public(NamedTuple):
    rename: Callable[[Mapping[str, Any]], dict[str, np.ndarray]]
    config: Callable[[Mapping[str, np.ndarray]], Any]
    export: Callable[[Mapping[str, Any]], dict[str, np.ndarray]]


def rename(model: str, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays of a public checkpoint under our names. Raises ValueError for names that the public code does not have, or lacks."""
    return _public(model).rename(arrays)


def config(model: str, arrays: Mapping[str, Any]) -> Any:
    """The configuration under which `arrays`, in public names or ours, compute what the public code computes.

    Raises ValueError where the shapes contradict one another or the public code has no such model.
    """
    return _public(model).config(arrays)


def export(model: str, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `rename`: our arrays under the public names, complete. Raises ValueError where the public code has no place for one."""
    return _public(model).export(arrays)


def _public(model: str) -> _Public:
    check_name(model)
    if model not in _PUBLIC:
        raise ValueError(f"there is no public checkpoint of {model!r}, only of {', '.join(map(repr, _PUBLIC))}")
    return _PUBLIC[model]


def _unwrapped(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    plain: dict[str, np.ndarray] = {}
    for key, value in arrays.items():
        name = _WRAPPERS.sub("", key, count=1) if _WRAPPERS.match(key) else key
        if name in plain:
            raise ValueError(f"two arrays are named {name} once wrapper prefixes are taken off")
        plain[name] = np.asarray(value)
    return plain


def _dtype(arrays: Mapping[str, np.ndarray]) -> str:
    return "float64" if any(value.dtype == np.float64 for value in arrays.values()) else "float32"


def _groundthink_config(arrays: Mapping[str, Any]) -> GroundedMambaConfig:
    plain = _unwrapped(arrays)
    needed = {"embedding.weight": 2, "blocks.0.ssm.A": 2, "blocks.0.rwkv.time_decay": 2}
    wrong = [
        f"{name} ({'missing' if name not in plain else f'shape {plain[name].shape}'})"
        for name, axes in needed.items()
        if name not in plain or plain[name].ndim != axes
    ]
    if wrong:
        raise ValueError(f"no GroundThink state dict: expected matrices under {', '.join(needed)}, found {', '.join(wrong)}")
    vocab_size, dim = plain["embedding.weight"].shape
    heads, head_dim = plain["blocks.0.rwkv.time_decay"].shape
    if heads * head_dim != dim:
        raise ValueError(f"blocks.0.rwkv.time_decay is {(heads, head_dim)}, which does not multiply to the width {dim} of embedding.weight")
    depth = len({match[1] for match in map(_BLOCK.fullmatch, plain) if match})
    return GroundedMambaConfig.groundthink(
        vocab_size=vocab_size, dim=dim, depth=depth, ssm_dim=plain["blocks.0.ssm.A"].shape[0], rwkv_heads=heads
    )


def _groundthink_rename(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    plain = _unwrapped(arrays)
    return check("grounded_mamba", _groundthink_config(plain), plain, _dtype(plain))


def lam_name(name: str) -> str:
    """The public name of one of LAM's arrays."""
    block = _BLOCK.fullmatch(name)
    module, _, leaf = (block[2] if block else name).rpartition(".")
    if block and module.partition(".")[0] == "delta":
        inner = f"{module}.{leaf}".removeprefix("delta.")
        renamed = next((public + inner[len(ours) :] for public, ours in _LAM_DELTA.items() if inner.startswith(f"{ours}.")), inner)
        return f"deltanet_layers.{block[1]}.{renamed}"
    table, place = (_LAM_LAYER, f"encoder.layer.{block[1]}.") if block else (_LAM_EMBEDDINGS, "")
    return f"{TEACHER}{place}{next(public for public, ours in table.items() if ours == module)}.{leaf}"


def _lam_config(arrays: Mapping[str, Any]) -> LamConfig:
    """Off the shapes, under public names or ours."""
    plain = _unwrapped(arrays)
    shapes = {}
    needed = {"word_embeddings.weight": 2, "position_embeddings.weight": 2, "blocks.0.delta.rule.W_bilinear": 3, "blocks.0.ffn_in.weight": 2}
    wrong = []
    for name, axes in needed.items():
        found = plain.get(lam_name(name), plain.get(name))
        if found is None or found.ndim != axes:
            wrong.append(f"{lam_name(name)} ({'missing' if found is None else f'shape {found.shape}'})")
        else:
            shapes[name] = found.shape
    if wrong:
        raise ValueError(f"no LAM checkpoint: expected arrays under {', '.join(map(lam_name, needed))}, found {', '.join(wrong)}")
    (vocab_size, dim), (positions, _), (heads, width, _), (ffn_dim, _) = (shapes[name] for name in needed)
    if heads * width != dim:
        raise ValueError(f"resonance_flux.W_bilinear is {(heads, width, width)}, which does not multiply to the width {dim} of word_embeddings")
    depth = len({match[1] for match in (re.match(r"(?:deltanet_layers|blocks)\.(\d+)\.", name) for name in plain) if match})
    return LamConfig(
        vocab_size=vocab_size, dim=dim, heads=heads, depth=depth, ffn_dim=ffn_dim, max_positions=positions, transform="lam", gelu_repeats=2
    )


def _lam_rename(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    plain = _unwrapped(arrays)
    config = _lam_config(plain)
    names = {lam_name(name): name for name in layout("lam", config)}
    missing = [public for public in names if public not in plain]
    unmapped = [key for key in plain if key not in names and not LAM_UNUSED.fullmatch(key)]
    if missing or unmapped:
        problems = (f"{label}: {shorten(items)}" for label, items in (("missing", missing), ("unmapped", unmapped)) if items)
        raise ValueError("arrays do not fit the public LAM: " + "; ".join(problems))
    kept = {ours: plain[public] for public, ours in names.items()}
    return check("lam", config, kept, _dtype(kept))


def _lam_export(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    plain = _unwrapped(arrays)
    return {lam_name(name): value for name, value in check("lam", _lam_config(plain), plain, _dtype(plain)).items()}


_PUBLIC = {
    "grounded_mamba": _Public(_groundthink_rename, _groundthink_config, _groundthink_rename),
    "lam": _Public(_lam_rename, _lam_config, _lam_export),
}
