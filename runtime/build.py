"""`build`: a model by name, on a backend by name, from given or initial arrays."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from runtime.arrays import check, check_config, check_dtype
from runtime.init import init_arrays

# Backend -> what it imports and the extra that installs it.
BACKENDS = {
    "torch": (("torch",), "groundwave[torch]"),
    "torch_compiled": (("torch",), "groundwave[torch]"),
    "jax": (("jax", "flax"), "groundwave[jax]"),
    "cython": (("torch",), "groundwave[torch]"),  # LAM: the dense products are still torch's
}

# Model -> backends, each with the compiled kernel that it runs, or None.
MODELS: dict[str, dict[str, str | None]] = {
    "grounded_mamba": {"torch": None, "torch_compiled": "selective_scan", "jax": None},
    "deltanet_lm": {"torch": None, "jax": None},
    "lam": {"torch": None, "torch_compiled": "delta_rule", "jax": None, "cython": "delta_rule"},
}
_REFUSED = {("deltanet_lm", "torch_compiled"): ": the plain delta rule has no compiled kernel"}


def build(
    name: str,
    config: Any,
    backend: str = "torch",
    arrays: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    seed: int = 0,
) -> Any:
    """A model that is called alike on every backend.

    name: "grounded_mamba" or "deltanet_lm", `model(input_ids, states=None, return_aux=False)`, or "lam",
    `model(input_ids, attention_mask=None, output_hidden_states=False)`. config: its dataclass of `conf.models`. backend: "torch",
    "torch_compiled" (the same modules over compiled kernels; not for "deltanet_lm"), "jax" or, for "lam", "cython" (compiled, no
    gradients). arrays: flat dict, torch names -> NumPy arrays, copied; initial weights from `seed` when None. dtype: "float32" or
    "float64". The model has `.config`, `.arrays()`, and `.module` (torch) or `.model` and `.variables` (JAX); a language model
    `.generate` and `.init_states` besides, GroundedMamba `.update_memory`.

    Raises ValueError for an unknown name, backend or dtype and for missing, unused or misshapen arrays (all in one), TypeError for the
    configuration of another model, ImportError, saying what to install, for a backend that is not there.
    """
    check_config(name, config)
    check_dtype(dtype)
    check_backend(name, backend)
    checked = check(name, config, init_arrays(name, config, seed) if arrays is None else arrays, dtype)
    if backend == "jax":
        from runtime import jax_backend

        return jax_backend.MODELS[name](config, checked, dtype)
    from runtime import torch_backend

    return torch_backend.MODELS[name](config, checked, backend, dtype)


def check_backend(name: str, backend: str) -> None:
    """Raise ValueError for a backend that model `name` does not have, ImportError, saying what to install or build, for one that is not there."""
    kernels = MODELS[name]
    if backend not in kernels:
        reason = _REFUSED.get((name, backend), "")
        raise ValueError(f"backend of {name!r} must be one of {', '.join(map(repr, kernels))}, found {backend!r}{reason}")
    packages, extra = BACKENDS[backend]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"backend {backend!r} needs {' and '.join(missing)}: pip install '{extra}'")
    if kernels[backend] is not None and os.environ.get("GROUNDWAVE_KERNELS") != "torch":
        import cython_ext

        try:
            cython_ext.kernel(kernels[backend])
        except ImportError as error:
            raise ImportError(f"backend {backend!r} needs the compiled kernels: {error}") from error
