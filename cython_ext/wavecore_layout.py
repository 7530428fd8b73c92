"""What a WaveCore engine is made of: its linear layers, its vectors, and where each part of its state and of its buffers lies.

The names of the arrays are those of the torch modules. Letters: B batch, n slots and d width of a level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray

from cython_ext.checks_wavecore import RULES
from cython_ext.packing import HALF, LINE, Packed, pack, together

HEADS = ("action", "value", "world_model")
OUTPUT_TYPES = ("continuous", "discrete")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes and choices of a WaveCore, as `WaveCoreConfig` names them. Raises ValueError for what cannot be built."""

    obs_dim: int
    action_dim: int
    output_dim: int
    d_s: int
    d_w: int
    d_p: int
    d_e: int
    d_k: int
    d_c: int
    cms_sizes: tuple[int, ...]
    cms_dims: tuple[int, ...]
    cms_decays: tuple[float, ...]
    use_mamba_wave: bool = True
    mamba_state_dim: int = 1
    mamba_dt_min: float = 1e-4
    mamba_dt_scale: float = 1.0
    state_saturation_limit: float = 10.0
    cms_write: str = "least_salient"
    salience_threshold: float = 0.5
    heads: tuple[str, ...] = ("action",)
    output_type: str = "continuous"

    def __post_init__(self) -> None:
        for name in ("cms_sizes", "cms_dims", "cms_decays", "heads"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        whole = ("obs_dim", "action_dim", "output_dim", "d_s", "d_w", "d_p", "d_e", "d_k", "d_c", "mamba_state_dim")
        for name in whole:
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer of at least 1, found {getattr(self, name)!r}")
        if self.d_e < 4:
            raise ValueError(f"d_e must be at least 4, found {self.d_e}")
        if self.d_w % self.mamba_state_dim or (not self.use_mamba_wave and self.d_w < 4):
            raise ValueError(f"d_w must be divisible by mamba_state_dim, and at least 4 for the linear wave, found {self.d_w}")
        if not self.cms_sizes or len({len(self.cms_sizes), len(self.cms_dims), len(self.cms_decays)}) != 1:
            found = f"{self.cms_sizes}, {self.cms_dims}, {self.cms_decays}"
            raise ValueError(f"cms_sizes, cms_dims and cms_decays must have one entry per level, found {found}")
        if not all(isinstance(value, int) and value > 0 for value in (*self.cms_sizes, *self.cms_dims)):
            raise ValueError(f"cms_sizes and cms_dims must hold integers of at least 1, found {self.cms_sizes}, {self.cms_dims}")
        if not all(0.0 < value < 1.0 for value in self.cms_decays):
            raise ValueError(f"cms_decays must lie in (0, 1), found {self.cms_decays}")
        if not 0.0 <= self.state_saturation_limit < math.inf:
            raise ValueError(f"state_saturation_limit must be finite and not negative, found {self.state_saturation_limit!r}")
        for name, value, allowed in (("cms_write", self.cms_write, RULES), ("output_type", self.output_type, OUTPUT_TYPES)):
            if value not in allowed:
                raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, found {value!r}")
        if not self.heads or not set(self.heads) <= set(HEADS):
            raise ValueError(f"heads must name some of {', '.join(map(repr, HEADS))}, found {list(self.heads)}")

    @property
    def inner(self) -> int:
        """Channels of the selective wave."""
        return self.d_w // self.mamba_state_dim


def linear_shapes(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """Layer -> (outputs, inputs), of every linear layer with a bias, in torch's names and order of inputs."""
    fast, wave, particle, encoded, key, context, inner = (
        getattr(sizes, name) for name in ("d_s", "d_w", "d_p", "d_e", "d_k", "d_c", "inner"))
    joined, hidden, levels = encoded + encoded // 2 + encoded // 4, (fast + context) // 2, list(enumerate(sizes.cms_dims))
    layers = {
        "encoder.obs_in": (2 * encoded, sizes.obs_dim), "encoder.obs_out": (encoded, 2 * encoded), "encoder.action": (encoded // 2, sizes.action_dim),
        "encoder.reward": (encoded // 4, 1), "encoder.join_in": (2 * encoded, joined), "encoder.join_out": (encoded, 2 * encoded),
        "cms_read.query_in": (fast + encoded, fast + encoded), "cms_read.query_out": (key, fast + encoded),
        "cms_read.mixing": (len(levels), len(levels) * context), "core.z_proj": (particle, encoded),
        "core.particle_in": (particle + context, particle + context), "core.particle_out": (particle, particle + context),
        "core.gate": (fast, fast + encoded + context),
    }
    if sizes.use_mamba_wave:
        layers |= {"core.wave.wave_in": (inner, particle + context), "core.wave.gate_proj": (inner, particle + context)}
        layers |= {f"core.wave.ssm.{name}_proj": (inner, inner) for name in ("dt", "b", "c")} | {"core.wave.wave_out": (wave, inner)}
    else:
        layers |= {"core.wave.A_modulation": (wave, context), "core.wave.B_net": (wave, context + particle)}
    layers |= {f"cms_write.value.{level}": (width, fast + encoded) for level, width in levels}
    layers |= {f"cms_write.key.{level}": (key, fast + encoded) for level, _ in levels}
    layers |= {f"cms_write.gate.{level}": (1, fast + encoded + 1) for level, _ in levels}
    layers |= {"decoder.hidden_in": (fast + context, fast + context), "decoder.hidden_out": (hidden, fast + context)}
    outputs = {"action": sizes.output_dim, "value": 1, "world_model": sizes.obs_dim}
    return layers | {f"decoder.{name}": (outputs[name], hidden) for name in HEADS if name in sizes.heads}


def matrix_shapes(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """Name -> (outputs, inputs) of the matrices without a bias."""
    wave = sizes.d_w
    matrices = {"core.U_p": (sizes.d_s, sizes.d_p), "core.U_w": (sizes.d_s, wave)}
    matrices |= {f"cms_read.level_proj.{level}.weight": (sizes.d_c, width) for level, width in enumerate(sizes.cms_dims)}
    return matrices if sizes.use_mamba_wave else matrices | {"core.wave.A_U": (wave, wave // 4), "core.wave.A_V": (wave, wave // 4)}


def vector_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all that is neither a linear layer nor a matrix."""
    norms = {
        "encoder.obs_norm": 2 * sizes.d_e, "encoder.join_norm": 2 * sizes.d_e, "encoder.norm": sizes.d_e,
        "cms_read.query_norm": sizes.d_s + sizes.d_e, "core.particle_norm": sizes.d_p + sizes.d_c, "decoder.hidden_norm": sizes.d_s + sizes.d_c,
    }
    vectors: dict[str, tuple[int, ...]] = {f"{name}.{part}": (width,) for name, width in norms.items() for part in ("weight", "bias")}
    if sizes.use_mamba_wave:
        vectors |= {f"core.wave.ssm.{name}": (sizes.inner, sizes.mamba_state_dim) for name in ("a_raw", "B_base", "C_base")}
        return vectors | {"core.wave.ssm.D": (sizes.inner,)}
    return vectors | {"core.wave.A_diag": (sizes.d_w,)}


def prepare(
    sizes: Sizes, arrays: Mapping[str, Any], dtype: np.dtype, weights: str | None
) -> tuple[dict[str, tuple[Packed, ndarray | None]], dict[str, ndarray]]:
    """Layers, each packed with its bias or None, and vectors, as the engine reads them.

    Raises ValueError, one for all that is wrong, for missing, unused and misshapen arrays.
    """
    layers, matrices, vectors = linear_shapes(sizes), matrix_shapes(sizes), vector_shapes(sizes)
    shapes: dict[str, tuple[int, ...]] = matrices | vectors
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    found = {name: np.shape(value) for name, value in arrays.items()}
    problems = [f"missing {name}" for name in shapes if name not in found] + [f"unused {name}" for name in found if name not in shapes]
    problems += [f"{name} is {found[name]}, expected {shape}" for name, shape in shapes.items() if found.get(name, shape) != shape]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"arrays do not fit this WaveCore: {'; '.join(problems[:8])}{more}")
    held = {name: np.array(arrays[name], dtype=dtype, order="C") for name in shapes}
    if not sizes.use_mamba_wave:
        # the engine keeps z before c, and multiplies by A_V from the right
        held["core.wave.B_net.weight"] = np.roll(held["core.wave.B_net.weight"], -sizes.d_c, axis=1)
        held["core.wave.A_V"] = np.ascontiguousarray(held["core.wave.A_V"].T)
        held["core.wave.A_diag"] = dtype.type(0.9) * np.tanh(held["core.wave.A_diag"])
    else:
        held["core.wave.ssm.a_raw"] = -np.logaddexp(held["core.wave.ssm.a_raw"], dtype.type(0))
    new = [f"cms_write.{kind}.{level}" for kind in ("value", "key") for level in range(len(sizes.cms_dims))]  # read the same input: one layer
    for part in ("weight", "bias"):
        held[f"cms_write.new.{part}"] = np.concatenate([held[f"{name}.{part}"] for name in new])
    packed = {name: pack(held[f"{name}.weight"], weights) for name in [*layers, "cms_write.new"] if name not in new}
    packed = together(packed | {name: pack(held[name], weights) for name in matrices})
    return {name: (layer, held.get(f"{name}.bias")) for name, layer in packed.items()}, {name: held[name] for name in vectors}


def stored(sizes: Sizes, layers: Mapping[str, tuple[Packed, ndarray | None]], vectors: Mapping[str, ndarray]) -> dict[str, ndarray | Packed]:
    """Of what `prepare` made, the arrays that are as they were given, neither turned nor joined nor rounded, under torch's names."""
    found: dict[str, ndarray | Packed] = {name: layers[name][0] for name in matrix_shapes(sizes)} | dict(vectors)
    for name in linear_shapes(sizes):
        if name in layers:
            weight, bias = layers[name]
            found |= {f"{name}.weight": weight} | ({} if bias is None else {f"{name}.bias": bias})
    changed = ("core.wave.ssm.a_raw",) if sizes.use_mamba_wave else ("core.wave.B_net.weight", "core.wave.A_V", "core.wave.A_diag")
    return {name: value for name, value in found.items() if name not in changed and not (isinstance(value, Packed) and value.storage == HALF)}


def place(shapes: Mapping[str, Sequence[int]], dtype: np.dtype) -> tuple[dict[str, int], int]:
    """Name -> offset, in entries, in one array that holds them all, each on a cache line of its own; and the entries of that array."""
    step, offsets, end = LINE // dtype.itemsize, {}, 0
    for name, shape in shapes.items():
        offsets[name] = end
        end += -(-math.prod(shape) // step) * step
    return offsets, end


def state_shapes(sizes: Sizes, rows: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the parts of a state; `rows` is () or (B,)."""
    shapes: dict[str, tuple[int, ...]] = {"s": (*rows, sizes.d_s), "w": (*rows, sizes.d_w), "p": (*rows, sizes.d_p)}
    levels = list(enumerate(zip(sizes.cms_sizes, sizes.cms_dims, strict=True)))
    shapes |= {f"memories.{level}": (*rows, *size) for level, size in levels}
    shapes |= {f"keys.{level}": (*rows, size[0], sizes.d_k) for level, size in levels}
    shapes |= {f"norms.{level}": (*rows, size[0]) for level, size in levels}
    return shapes | {f"scales.{level}": () for level, _ in levels}


def work_shapes(sizes: Sizes, batch: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the buffers of a step; vectors that a layer reads side by side share one row."""
    fast, wave, particle, encoded, context = sizes.d_s, sizes.d_w, sizes.d_p, sizes.d_e, sizes.d_c
    levels = list(enumerate(zip(sizes.cms_sizes, sizes.cms_dims, strict=True)))
    widths = {
        "x_obs": sizes.obs_dim, "a_prev": sizes.action_dim, "r_t": 1, "hidden": max(2 * encoded, fast + encoded, particle + context, fast + context),
        "joined": encoded + encoded // 2 + encoded // 4, "sec": fast + encoded + context, "zc": particle + context, "pc": particle + context,
        "encoded": encoded, "query": sizes.d_k, "answers": len(levels) * context, "mix": len(levels), "gate": fast, "inner": 6 * sizes.inner,
        "carry": wave, "wave": wave, "particle": particle, "from_p": fast, "from_w": fast, "modulation": wave, "low": max(wave // 4, 1),
        "lifted": wave,
        "ser": fast + encoded + 1, "sc": fast + context, "new": sum(sizes.cms_dims) + len(levels) * sizes.d_k, "open": len(levels),
        "decoded": (fast + context) // 2, "y": sizes.output_dim, "value": 1, "next_obs": sizes.obs_dim,
    }
    for level, (slots, width) in levels:
        widths |= {f"attention.{level}": slots, f"content.{level}": width}
    return {name: (batch, width) for name, width in widths.items()}
