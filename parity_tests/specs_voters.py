"""Further implementations of our models for the vote: the Cython engines in float64, the NumPy twins.

Each takes the reference's weights by name, and gives what the reference gives, leaf by leaf. `specs.py` and `specs_wavecore.py` hand them to
`Case.also`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import cython_ext
from conf.models import GroundedMambaConfig, LamConfig, SizedWaveCoreConfig
from cython_ext.wavecore_layout import Sizes
from parity_tests.harness import Engine
from parity_tests.twins import GroundedMambaTwin
from parity_tests.twins_wave import WaveCoreTwin
from runtime.cython_lam import CythonLam
from runtime.cython_mamba import CythonGroundedMamba
from runtime.init import init_arrays

KERNELS = ("dense", "selective_scan", "wkv", "mamba_step")
Arrays = Mapping[str, np.ndarray]


def _engine(build: Callable[[Arrays], Callable[..., Any]], shapes: Arrays, without: tuple[str, ...] = ()) -> Callable[[], Engine]:
    return lambda: Engine(build, {name: value for name, value in shapes.items() if name not in without})


def _with_engine(kernels: tuple[str, ...], made: dict[str, Callable[[], Engine]]) -> dict[str, Callable[[], Engine]]:
    """Without the compiled kernels there is no engine to vote."""
    return made if all(map(cython_ext.is_built, kernels)) else {name: value for name, value in made.items() if name != "cython"}


def grounded_mamba(config: GroundedMambaConfig) -> dict[str, Callable[[], Engine]]:
    """The Cython engine and the NumPy twin: ids (B, L) and states or None -> logits and states."""
    shapes = init_arrays("grounded_mamba", config)

    def engine(arrays: Arrays) -> Callable[..., Any]:
        made = CythonGroundedMamba(config, {**arrays, "lm_head.weight": arrays["embedding.weight"]}, "float64")
        return lambda ids, states=None: made(ids, states)

    def twin(arrays: Arrays) -> Callable[..., Any]:
        def forward(ids: np.ndarray, states: Any = None) -> tuple[np.ndarray, list]:
            out = GroundedMambaTwin(config, arrays).forward(ids, states)
            return out["logits"], out["states"]

        return forward

    tied = ("lm_head.weight",)
    return _with_engine(KERNELS, {"cython": _engine(engine, shapes, tied), "NumPy twin": _engine(twin, shapes, tied)})


def lam(config: LamConfig) -> dict[str, Callable[[], Engine]]:
    """The Cython engine: ids and mask (B, L) -> the fields of a LamOutput."""
    return _with_engine(("lam_engine",), {"cython": _engine(lambda arrays: CythonLam(config, arrays, "float64"), init_arrays("lam", config))})


def wavecore_step(config: SizedWaveCoreConfig) -> dict[str, Callable[[], Engine]]:
    """The Cython engine and the NumPy twin over one step on a plain memory, with what `specs_wavecore.stepped` gives."""
    levels, shapes = range(config.num_levels), init_arrays("wavecore", config)

    def told(given: tuple, y: Any, info: dict[str, Any], memories: Any, keys: Any) -> tuple[Any, dict[str, Any]]:
        old = given[6:6 + config.num_levels]
        written = [(new != (1 - decay) * held).any(-1) for new, held, decay in zip(memories, old, config.cms_decays, strict=True)]
        return y, info | {"cms_memories": tuple(memories), "cms_keys": tuple(keys), "written": written}

    def engine(arrays: Arrays) -> Callable[..., Any]:
        from cython_ext.wavecore_engine import WaveCoreEngine

        sizes = {field.name: getattr(config, field.name) for field in dataclasses.fields(Sizes)}

        def step(*given: np.ndarray) -> tuple[Any, dict[str, Any]]:
            made = WaveCoreEngine(arrays, sizes, "float64", batch=len(given[0]))
            state = made.state_arrays() | dict(zip("swp", given[3:6], strict=True))  # its scales are one
            for level in levels:
                rows = given[6 + level]
                state |= {f"memories.{level}": rows, f"keys.{level}": given[6 + config.num_levels + level], f"norms.{level}": np.square(rows).sum(-1)}
            made.load_state(state)
            y, info = made.step(*given[:3])
            after = made.state_arrays()
            info = info | {name: after[key] for name, key in (("fast_state", "s"), ("wave_state", "w"), ("particle_state", "p"))}
            return told(given, y, info, *made.memories())

        return step

    def twin(arrays: Arrays) -> Callable[..., Any]:
        def step(*given: np.ndarray) -> tuple[Any, dict[str, Any]]:
            state = dict(zip("swp", given[3:6], strict=True)) | {"memories": given[6:6 + config.num_levels], "keys": given[6 + config.num_levels:]}
            out, after = WaveCoreTwin(config, arrays).step(state, *given[:3])
            info = {name: value for name, value in out.items() if name not in ("unclipped", "rows", "open", "action")}
            info["attention_weights"] = tuple(info["attention_weights"])
            return told(given, out.get("action"), info, after["memories"], after["keys"])

        return step

    return _with_engine(("wavecore_engine",), {"cython": _engine(engine, shapes), "NumPy twin": _engine(twin, shapes)})
