"""`build`: a model by name, on a backend by name, from given or initial arrays."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from conf.models import SizedWaveCoreConfig, WaveCoreConfig
from runtime.arrays import check, check_config, check_dtype
from runtime.init import init_arrays

# Backend -> what it imports and the extra that installs it.
BACKENDS = {
    "torch": (("torch",), "groundwave[torch]"),
    "torch_compiled": (("torch",), "groundwave[torch]"),
    "jax": (("jax", "flax"), "groundwave[jax]"),
    "jax_compiled": (("jax", "flax"), "groundwave[jax]"),
    "cython": ((), "groundwave"),
}

# Model -> backends, each with the compiled kernels that it runs.
MODELS: dict[str, dict[str, tuple[str, ...]]] = {
    "grounded_mamba": {
        "torch": (), "torch_compiled": ("selective_scan", "wkv"), "jax": (), "jax_compiled": ("selective_scan", "wkv", "xla_ffi"),
        "cython": ("dense", "selective_scan", "wkv", "mamba_step"),
    },
    "deltanet_lm": {"torch": (), "torch_compiled": ("delta_rule",), "jax": (), "jax_compiled": ("delta_rule", "xla_ffi")},
    "transformer": {"torch": (), "jax": ()},
    "gru": {"torch": (), "jax": ()},
    "lam": {
        "torch": (), "torch_compiled": ("delta_rule",), "jax": (), "jax_compiled": ("delta_rule", "xla_ffi"),
        "cython": ("delta_rule", "dense", "lam_engine"),
    },
    "wavecore": {"torch": (), "torch_compiled": ("cms",), "jax": (), "cython": ("wavecore_engine",)},
}
ENGINES = {("grounded_mamba", "cython"), ("lam", "cython"), ("wavecore", "cython")}  # what runs with no framework in the process


def build(
    name: str,
    config: Any,
    backend: str = "torch",
    arrays: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    seed: int = 0,
    *,
    obs_dim: int | None = None,
    action_dim: int | None = None,
    output_dim: int | None = None,
    weights: str | None = None,
) -> Any:
    """A model that is called alike on every backend.

    name: "grounded_mamba", "deltanet_lm", "transformer" or "gru", `model(input_ids, states=None, return_aux=False)`, "lam",
    `model(input_ids, attention_mask=None, output_hidden_states=False)`, or "wavecore", called as `torch_impl.wavecore.WaveCore`.
    config: its dataclass of `conf.models`. backend: "torch", "torch_compiled" (the same modules over compiled kernels), "jax", "jax_compiled"
    (likewise, on a CPU; not for "wavecore") or, for "grounded_mamba", "lam" and "wavecore", "cython" (a compiled engine without a
    framework: NumPy, no gradients); "transformer" and "gru", whose layers are the frameworks' own, have "torch" and "jax" alone.
    arrays: flat dict, torch names -> NumPy arrays, copied; initial weights from `seed` when None.
    dtype: "float32" or "float64". obs_dim, action_dim, output_dim: the widths of a WaveCore, needed unless its configuration is sized, and
    of no other model. weights: "bfloat16" for an engine that stores its weights so and computes in float32.

    The model has `.config` (a WaveCore's is sized), `.arrays()`, and `.module` (torch) or `.model` and `.variables` (JAX); a language model
    `.generate` and `.init_states` besides, GroundedMamba `.update_memory` (not on "cython"), WaveCore `.step`, `.rollout`, `.init_state`,
    `.state`, `.memories`, `.state_arrays` and `.load_state`.

    Raises ValueError for an unknown name, backend or dtype, for missing, unused or misshapen arrays (all in one) and for widths that are
    missing, wrong or not the model's, TypeError for the configuration of another model, ImportError, saying what to install, for a backend
    that is not there.
    """
    config = _sized(name, config, dict(obs_dim=obs_dim, action_dim=action_dim, output_dim=output_dim))
    check_config(name, config)
    check_dtype(dtype)
    check_backend(name, backend)
    if weights is not None and (name, backend) not in ENGINES:
        raise ValueError(f"weights={weights!r}: only an engine without a framework takes weights, which {name!r} on {backend!r} is not")
    checked = check(name, config, init_arrays(name, config, seed) if arrays is None else arrays, dtype)
    if backend in ("jax", "jax_compiled"):
        from runtime import jax_backend

        return jax_backend.MODELS[name](config, checked, backend, dtype)
    if (name, backend) in ENGINES:
        from runtime import cython_backend

        return cython_backend.MODELS[name](config, checked, dtype, weights)
    from runtime import torch_backend

    return torch_backend.MODELS[name](config, checked, backend, dtype)


def check_backend(name: str, backend: str) -> None:
    """Raise ValueError for a backend that model `name` does not have, ImportError, saying what to install or build, for one that is not there."""
    kernels = MODELS[name]
    if backend not in kernels:
        raise ValueError(f"backend of {name!r} must be one of {', '.join(map(repr, kernels))}, found {backend!r}")
    alone = (name, backend) in ENGINES
    packages, extra = BACKENDS[backend]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"backend {backend!r} needs {' and '.join(missing)}: pip install '{extra}'")
    if kernels[backend] and (alone or os.environ.get("GROUNDWAVE_KERNELS") != "torch"):
        import cython_ext

        try:
            for kernel in kernels[backend]:
                cython_ext.kernel(kernel)
        except ImportError as error:
            raise ImportError(f"backend {backend!r} needs the compiled kernels: {error}") from error


def _sized(name: str, config: Any, widths: Mapping[str, int | None]) -> Any:
    """`config` with the widths of a WaveCore; as it is for every other model, which must be given none."""
    given = {key: value for key, value in widths.items() if value is not None}
    if name != "wavecore":
        if given:
            raise ValueError(f"{', '.join(given)}: only 'wavecore' takes widths, found them with {name!r}")
        return config
    if isinstance(config, SizedWaveCoreConfig):
        other = {key: value for key, value in given.items() if value != getattr(config, key)}
        if other:
            words = ", ".join(f"{key}={value} where the configuration has {getattr(config, key)}" for key, value in other.items())
            raise ValueError(f"widths of 'wavecore' contradict its configuration: {words}")
        return dataclasses.replace(config, **given)
    if not isinstance(config, WaveCoreConfig):
        raise TypeError(f"config of 'wavecore' must be a WaveCoreConfig, found {type(config).__name__}")
    missing = [key for key in widths if key not in given]
    if missing:
        raise ValueError(f"'wavecore' needs the widths {', '.join(widths)}; missing: {', '.join(missing)}")
    return config.sized(**given)
