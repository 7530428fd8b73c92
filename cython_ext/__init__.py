"""Compiled CPU kernels: NumPy arrays in, NumPy arrays out, no framework.

One module per operation, built from a .pyx of the same name, and the same functions in plain NumPy in `reference`. The package
imports without a compiled module; asking for a kernel that was not built raises an ImportError that says what to do.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from cython_ext.threads import get_num_threads, set_num_threads

KERNELS = ("selective_scan", "delta_rule", "dense", "wkv", "cms", "wave", "wavecore_engine", "lam_engine", "mamba_step", "xla_ffi")

__all__ = ["KERNELS", "get_num_threads", "is_built", "kernel", "set_num_threads"]


def is_built(name: str) -> bool:
    """Whether the kernel module `name` has been compiled for this interpreter; one that is there but broken counts as built."""
    _known(name)
    return importlib.util.find_spec(f"cython_ext.{name}") is not None


def kernel(name: str) -> ModuleType:
    """The compiled module `name`, one of KERNELS.

    Raises ValueError for an unknown name; ImportError, with what to do about it, when the module is absent or does not load.
    """
    _known(name)
    try:
        return importlib.import_module(f"cython_ext.{name}")
    except ImportError as error:
        state = "is built but does not load" if is_built(name) else "is not built"
        if "libgomp" in str(error):
            raise ImportError(
                f"the compiled kernel cython_ext.{name} {state} ({error}): gcc's OpenMP library is missing, which a build from source takes from "
                "the system (Debian, Ubuntu: apt-get install libgomp1; Fedora, RHEL: dnf install libgomp; Alpine: apk add libgomp)"
            ) from error
        raise ImportError(
            f"the compiled kernel cython_ext.{name} {state} ({error}). Build it with `pip install -e .` in the root of the repository, or "
            "`pip install .`; that needs gcc and the Python headers (Debian, Ubuntu: apt-get install gcc libc6-dev python3-dev). "
            "cython_ext.reference holds the same functions in plain NumPy."
        ) from error


def _known(name: str) -> None:
    if name not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(map(repr, KERNELS))}, found {name!r}")


def __getattr__(name: str) -> ModuleType:
    if name in KERNELS:
        return kernel(name)
    raise AttributeError(f"module 'cython_ext' has no attribute {name!r}")
