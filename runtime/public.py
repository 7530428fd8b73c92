"""Public checkpoints: from their names to ours and back, and the sizes read off the shapes.

GroundThink (`grounded_mamba`): a state dict of the public GroundedMamba. The names are ours; `lm_head.weight`, tied to the embedding, may be
missing, and wrappers may have left `module.` or `_orig_mod.` in front.

LAM (`lam`): `deltanet_layers.i.*` and, as the embeddings, feed-forwards and norms are BERT's, `teacher_model.*`, wrapped or not. The teacher's
attention and pooler, which LAM does not use, may be there and are dropped. The public code applies gelu twice; names cannot say otherwise, so
a model with `gelu_repeats=1` is another model once exported.

ContinuonBrain (`wavecore`): the parameter tree of its CoreModel, flat, with `/` between the parts and `params/` in front or not; Dense kernels
are (in, out), U_p and U_w as they are used. The value and world-model heads, `decoder/value` and `decoder/world_model`, are ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from conf.models import HEADS, GroundedMambaConfig, LamConfig, SizedWaveCoreConfig
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

_CORE = {
    "encoder": {
        "obs_in": "Dense_0", "obs_norm": "LayerNorm_0", "obs_out": "Dense_1", "action": "Dense_2", "reward": "Dense_3",
        "join_in": "Dense_4", "join_norm": "LayerNorm_1", "join_out": "Dense_5", "norm": "LayerNorm_2",
    },
    "cms_read": {
        "query_in": "query_net/Dense_0", "query_norm": "query_net/LayerNorm_0", "query_out": "query_net/Dense_1", "mixing": "mixing_net",
    },
    "core": {
        "z_proj": "z_projection", "particle_in": "particle/Dense_0", "particle_norm": "particle/LayerNorm_0", "particle_out": "particle/Dense_1",
        "gate": "gate_net",
    },
    "decoder": {"hidden_in": "Dense_0", "hidden_norm": "LayerNorm_0", "hidden_out": "Dense_1", "action": "Dense_2"},
}
_CORE_LEVELS = {"cms_read.level_proj": "level_proj", **{f"cms_write.{name}": f"write_{name}" for name in ("value", "key", "gate")}}
_CORE_LEVEL = re.compile(r"cms_read(?:/level_proj_|\.level_proj\.)(\d+)(?:/kernel|\.weight)")
_CORE_DECAYS = {1: (0.1,), 2: (0.1, 0.05), 3: (0.1, 0.05, 0.01), 4: (0.1, 0.05, 0.02, 0.01)}  # of the presets; a fifth level as the fourth
_LINEAR_WAVE = ("A_diag", "A_U", "A_V", "A_modulation", "B_net")


class _Public(NamedTuple):
    rename: Callable[[Mapping[str, Any]], dict[str, np.ndarray]]
    config: Callable[[Mapping[str, np.ndarray]], Any]
    export: Callable[[Mapping[str, Any]], dict[str, np.ndarray]]


def rename(model: str, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays of a public checkpoint under our names. Raises ValueError for names that the public code does not have, or lacks."""
    return _public(model).rename(arrays)


def config(model: str, arrays: Mapping[str, Any]) -> Any:
    """The configuration under which `arrays`, in public names or ours, compute what the public code computes.

    A WaveCore's is sized. No array shows `cms_sizes` and `cms_decays`: they are half of `cms_dims` and the decays of the preset with as many
    levels, to be changed with `dataclasses.replace` where the checkpoint says otherwise; so are the clip, `mamba_dt_min`, `mamba_dt_scale` and
    `output_type`, which are the defaults. `cms_write` is "slot0", as in the public code; `output_dim` is `action_dim` without an action head.

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


def core_name(name: str) -> str:
    """The public name of one of WaveCore's arrays."""
    owner, _, leaf = name.rpartition(".")
    room, _, module = owner.partition(".")
    public_room, (base, _, level) = "hope_core" if room == "core" else room, owner.rpartition(".")
    if base in _CORE_LEVELS:
        path = f"{room}/{_CORE_LEVELS[base]}_{level}"
    elif module.partition(".")[0] == "wave":
        inner = module.split(".")[1:]
        path = "/".join([public_room, "wave" if (inner or [leaf])[0] in _LINEAR_WAVE else "mamba_wave", *inner])
    else:
        path = f"{public_room}/{_CORE[room].get(module, module)}" if module else public_room
    return f"{path}/{('scale' if module.endswith('norm') else 'kernel') if leaf == 'weight' else leaf}"


def _core_plain(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return _unwrapped({key.removeprefix("params/"): value for key, value in arrays.items()})


def _core_config(arrays: Mapping[str, Any]) -> SizedWaveCoreConfig:
    """Off the shapes, under public names or ours."""
    plain = _core_plain(arrays)
    levels = len({match[1] for match in map(_CORE_LEVEL.fullmatch, plain) if match})

    def shape(name: str) -> tuple[int, ...] | None:
        found = plain.get(core_name(name))
        if found is not None:
            return found.shape[::-1] if name.endswith(".weight") else found.shape
        return None if name not in plain else plain[name].shape

    linear = ["encoder.obs_in", "encoder.obs_out", "encoder.action", "cms_read.query_out"]
    linear += [f"cms_read.level_proj.{level}" for level in range(max(levels, 1))]
    needed = [*(f"{name}.weight" for name in linear), "core.U_p", "core.U_w"]
    shapes = [shape(name) for name in needed]
    wrong = [
        f"{core_name(name)} ({'missing' if found is None else f'shape {found}'})"
        for name, found in zip(needed, shapes, strict=True) if found is None or len(found) != 2
    ]
    if wrong:
        raise ValueError(f"no WaveCore checkpoint: expected matrices under {', '.join(map(core_name, needed))}, found {', '.join(wrong)}")
    (_, obs_dim), (d_e, _), (_, action_dim), (d_k, _), *projections, (d_s, d_p), (_, d_w) = shapes
    dims, state, action = tuple(size for _, size in projections), shape("core.wave.ssm.a_raw"), shape("decoder.action.weight")
    return SizedWaveCoreConfig(
        d_s=d_s, d_w=d_w, d_p=d_p, d_e=d_e, d_k=d_k, d_c=projections[0][0], num_levels=levels, cms_sizes=tuple(max(size // 2, 1) for size in dims),
        cms_dims=dims, cms_decays=_CORE_DECAYS.get(levels, _CORE_DECAYS[4] + (0.01,) * (levels - 4)),
        use_mamba_wave=state is not None, mamba_state_dim=1 if state is None else state[-1], cms_write="slot0",
        heads=tuple(head for head in HEADS if shape(f"decoder.{head}.weight") is not None),
        obs_dim=obs_dim, action_dim=action_dim, output_dim=action_dim if action is None else action[0],
    )


def _core_rename(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    plain = _core_plain(arrays)
    names = {core_name(name): name for name in layout("wavecore", _core_config(plain))}
    missing = [public for public in names if public not in plain]
    unmapped = [key for key in plain if key not in names]
    if missing or unmapped:
        problems = (f"{label}: {shorten(items)}" for label, items in (("missing", missing), ("unmapped", unmapped)) if items)
        raise ValueError("arrays do not fit the public WaveCore: " + "; ".join(problems))
    kept = {ours: plain[public].T if public.endswith("/kernel") else plain[public] for public, ours in names.items()}
    return check("wavecore", _core_config(plain), kept, _dtype(kept))


def _core_export(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    plain = _core_plain(arrays)
    named = {core_name(name): value for name, value in check("wavecore", _core_config(plain), plain, _dtype(plain)).items()}
    return {key: np.ascontiguousarray(value.T) if key.endswith("/kernel") else value for key, value in named.items()}


_PUBLIC = {
    "grounded_mamba": _Public(_groundthink_rename, _groundthink_config, _groundthink_rename),
    "lam": _Public(_lam_rename, _lam_config, _lam_export),
    "wavecore": _Public(_core_rename, _core_config, _core_export),
}
