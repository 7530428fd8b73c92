"""`build`: a model by name, on a backend by name, from given or initial arrays."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from runtime.arrays import check, check_config, check_dtype
from runtime.init import init_arrays

# Backend -> what it imports and the extra that installs it. Engines without a framework ("cython") come model by model.
BACKENDS = {
    "torch": (("torch",), "groundwave[torch]"),
    "torch_compiled": (("torch",), "groundwave[torch]"),
    "jax": (("jax", "flax"), "groundwave[jax]"),
}


def build(
    name: str,
    config: Any,
    backend: str = "torch",
    arrays: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    seed: int = 0,
) -> Any:
    """A model that is called alike on every backend: `model(input_ids, states=None, return_aux=False)`.

    name: "grounded_mamba". config: its dataclass of `conf.models`. backend: "torch", "torch_compiled" (the same modules over compiled
    kernels) or "jax". arrays: flat dict, torch names -> NumPy arrays, copied; initial weights from `seed` when None. dtype: "float32" or
    "float64". The model has `.config`, `.arrays()`, `.generate`, `.init_states`, `.update_memory`, and `.module` (torch) or `.model` and
    `.variables` (JAX).

    Raises ValueError for an unknown name, backend or dtype and for missing, unused or misshapen arrays (all in one), TypeError for the
    configuration of another model, ImportError, saying what to install, for a backend that is not there.
    """
    check_config(name, config)
    check_dtype(dtype)
    if backend not in BACKENDS:
        raise ValueError(f"backend of {name!r} must be one of {', '.join(map(repr, BACKENDS))}, found {backend!r}")
    _check_installed(backend)
    checked = check(name, config, init_arrays(name, config, seed) if arrays is None else arrays, dtype)
    if backend == "jax":
        from runtime.jax_backend import JaxGroundedMamba

        return JaxGroundedMamba(config, checked, dtype)
    from runtime.torch_backend import TorchGroundedMamba

    return TorchGroundedMamba(config, checked, backend, dtype)


def _check_installed(backend: str) -> None:
    packages, extra = BACKENDS[backend]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"backend {backend!r} needs {' and '.join(missing)}: pip install '{extra}'")
    wants_kernels = backend == "torch_compiled" and os.environ.get("GROUNDWAVE_KERNELS") != "torch"
    if wants_kernels and importlib.util.find_spec("cython_ext.selective_scan") is None:
        raise ImportError("backend 'torch_compiled' needs the compiled kernels: pip install -e . (with a C compiler) builds them")
