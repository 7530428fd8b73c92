"""The door to the GroundedMamba engine of `cython_ext`: NumPy arrays in, NumPy arrays out, no framework. Imported by `runtime.build` when asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from conf.models import GroundedMambaConfig
from cython_ext.mamba_engine import GroundedMambaEngine, Sizes
from cython_ext.packing import unpacked

State = dict[str, np.ndarray]


class CythonGroundedMamba:
    """GroundedMamba on the compiled engine; NumPy arrays alone, no gradients and nothing that training needs.

    A call leaves the states that it is given as they were and returns new ones, as on every backend; `engine` has besides a prompt in constant
    memory (`prefill`) and a token that moves its states on in place (`decode`). Raises ValueError, naming the argument, as the torch module does.
    """

    name = "grounded_mamba"
    backend = "cython"

    def __init__(self, config: GroundedMambaConfig, arrays: Mapping[str, np.ndarray], dtype: str, weights: str | None = None) -> None:
        """`arrays` complete and checked. weights: "bfloat16" or None."""
        self.config, self.dtype = config, dtype
        self.engine = GroundedMambaEngine(arrays, Sizes(**{name: getattr(config, name) for name in Sizes._fields}), weights)
        stored = self.engine.stored()
        if np.array_equal(arrays["lm_head.weight"], arrays["embedding.weight"]):  # tied
            stored["lm_head.weight"] = stored["embedding.weight"]
        self._arrays = {key: stored[key] if key in stored else value.copy() for key, value in arrays.items()}

    def arrays(self) -> dict[str, np.ndarray]:
        """Copies of all parameters and buffers, flat, under torch's names, as they were given."""
        return {key: unpacked(value) for key, value in self._arrays.items()}

    def __call__(self, input_ids: Any, states: list[State] | None = None, *, return_aux: bool = False) -> tuple[np.ndarray, list[State]]:
        """(B, L) ids -> logits (B, L, V), states."""
        if return_aux:
            raise ValueError("return_aux must be False on the backend 'cython', which does not train: build with 'torch', 'torch_compiled' or 'jax'")
        return self.engine(input_ids, states)

    def generate(self, input_ids: Any, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 0) -> np.ndarray:
        """Continue (B, L) ids by `max_new_tokens` sampled tokens: (B, L + max_new_tokens)."""
        return self.engine.generate(input_ids, max_new_tokens, temperature, top_k, seed)

    def init_states(self, batch_size: int) -> list[State]:
        """Zeros: the states before the first token."""
        return self.engine.init_states(batch_size)

    def update_memory(self, aux: Mapping[str, Any]) -> None:
        """Refused: it belongs to training. Raises NotImplementedError."""
        raise NotImplementedError("update_memory is not on the backend 'cython', which does not train: build with 'torch', 'torch_compiled' or 'jax'")
