"""The door to LAM's engine of `cython_ext`: NumPy arrays in, NumPy arrays out, no framework. Imported by `runtime.build` when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

import cython_ext
from conf.models import LamConfig

SIZES = ("heads", "depth", "chunk_size", "transform", "max_length", "gelu_repeats", "norm_eps", "rms_eps")  # the rest is in the arrays' shapes


class CythonLam:
    """LAM on the compiled engine; NumPy arrays alone, no gradients."""

    name = "lam"
    backend = "cython"

    def __init__(self, config: LamConfig, arrays: Mapping[str, np.ndarray], dtype: str, weights: str | None = None) -> None:
        """`arrays` complete and checked. weights: "bfloat16", with float32 alone, or None; raises ValueError for others."""
        self.config, self.dtype = config, dtype
        engine = cython_ext.kernel("lam_engine").LamEngine
        self.engine = engine(arrays, dtype=dtype, weights=weights, **{name: getattr(config, name) for name in SIZES})

    def arrays(self) -> dict[str, np.ndarray]:
        """Copies of all parameters, flat, under torch's names, as they were given."""
        return self.engine.arrays()

    def __call__(self, input_ids: Any, attention_mask: Any = None, output_hidden_states: bool = False) -> Any:
        """(B, L) ids, mask (B, L) or None -> LamOutput of arrays, as `torch_impl.lam.LAM.forward`; raises ValueError as that does."""
        return self.engine(input_ids, attention_mask, output_hidden_states)
