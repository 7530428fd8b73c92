"""The door to `jax_impl`: one object per model, which takes JAX or NumPy arrays. Imported by `runtime.build` when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_impl.functional import DeltaNetModel, GroundedMambaModel, LamModel
from jax_impl.generate import generate
from jax_impl.state import check_mask, check_states, check_token_ids
from runtime.arrays import layout


class JaxModel:
    """What every model has: `model`, the functional object, and its `variables`; one compilation per configuration and shape of the input.

    Everything runs inside `jax.enable_x64(dtype == "float64")`, whatever the global setting.
    """

    name: str
    kind: type[Any]
    static = "return_aux"
    backend = "jax"

    def __init__(self, config: Any, arrays: Mapping[str, np.ndarray], dtype: str) -> None:
        """`arrays` complete and checked."""
        self.config, self.dtype = config, dtype
        with self._x64():
            self.model, self._apply = _compiled(self.kind, config, dtype, self.static)
            self.variables = self.model.variables(dict(arrays))

    def arrays(self) -> dict[str, np.ndarray]:
        """Copies of all parameters and buffers, flat, under torch's names."""
        held = self.model.arrays(self.variables)
        return {key: held[key] for key in layout(self.name, self.config)}

    def _ids(self, input_ids: Any) -> Any:
        """Checked ids, NumPy ones as int64: under 32 bits JAX would wrap what does not fit before anyone could refuse it."""
        ids = input_ids if isinstance(input_ids, jax.Array) else np.asarray(input_ids)
        check_token_ids(ids, self.config.vocab_size)
        return ids if isinstance(ids, jax.Array) else ids.astype(np.int64)

    def _x64(self) -> Any:
        return jax.enable_x64(self.dtype == "float64")


class JaxLanguageModel(JaxModel):
    """A causal language model with states: token ids in, logits and states out."""

    def __init__(self, config: Any, arrays: Mapping[str, np.ndarray], dtype: str) -> None:
        super().__init__(config, arrays, dtype)
        with self._x64():
            self._shapes = self.model.merge(self.variables).state_shapes

    def __call__(self, input_ids: Any, states: Any = None, *, return_aux: bool = False) -> tuple[Any, ...]:
        """(B, L) ids -> logits (B, L, V), states[, aux]. NumPy ids: NumPy results. Raises ValueError for bad ids or states."""
        ids = self._ids(input_ids)
        with self._x64():
            if states is not None:
                check_states(states, self._shapes(ids.shape[0]), np.dtype(self.dtype))
                states = jax.tree.map(jnp.asarray, states)
            results = self._apply(self.variables, jnp.asarray(ids), states, return_aux=return_aux)
        return results if isinstance(input_ids, jax.Array) else _to_numpy(results)

    def generate(self, input_ids: Any, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 0) -> Any:
        """Continue (B, L) ids by `max_new_tokens` sampled tokens: (B, L + max_new_tokens)."""
        ids = self._ids(input_ids)
        with self._x64():
            tokens = generate(lambda *inputs: self._apply(self.variables, *inputs), jnp.asarray(ids), max_new_tokens, temperature, top_k, seed)
        return tokens if isinstance(input_ids, jax.Array) else np.array(tokens, dtype=ids.dtype)

    def init_states(self, batch_size: int) -> list[dict[str, jax.Array]]:
        """Zeros: the states before the first token."""
        with self._x64():
            return self.model.init_states(batch_size)


class JaxGroundedMamba(JaxLanguageModel):
    """GroundedMamba in JAX."""

    name = "grounded_mamba"
    kind = GroundedMambaModel

    def update_memory(self, aux: Mapping[str, Any]) -> None:
        """Count one optimiser step and, when it is due, write the rows of `aux` into the memory banks. Replaces `variables`."""
        with self._x64():
            update = _compiled_update(self.config, self.dtype)
            self.variables = update(self.variables, {"memory_rows": jax.tree.map(jnp.asarray, aux["memory_rows"])})


class JaxDeltaNetLM(JaxLanguageModel):
    """DeltaNetLM in JAX."""

    name = "deltanet_lm"
    kind = DeltaNetModel


class JaxLam(JaxModel):
    """LAM in JAX."""

    name = "lam"
    kind = LamModel
    static = "output_hidden_states"

    def __call__(self, input_ids: Any, attention_mask: Any = None, output_hidden_states: bool = False) -> Any:
        """(B, L) ids, mask (B, L) or None -> LamOutput. NumPy ids: NumPy results. Raises ValueError for bad ids or a bad mask."""
        ids = self._ids(input_ids)
        if attention_mask is not None:
            attention_mask = attention_mask if isinstance(attention_mask, jax.Array) else np.asarray(attention_mask)
            check_mask(attention_mask, ids.shape)
        with self._x64():
            mask = None if attention_mask is None else jnp.asarray(attention_mask)
            output = self._apply(self.variables, jnp.asarray(ids), mask, output_hidden_states=output_hidden_states)
        return output if isinstance(input_ids, jax.Array) else _to_numpy(output)


MODELS: dict[str, type[JaxModel]] = {model.name: model for model in (JaxGroundedMamba, JaxDeltaNetLM, JaxLam)}


@lru_cache(maxsize=16)
def _compiled(kind: type[Any], config: Any, dtype: str, static: str) -> tuple[Any, Callable[..., Any]]:
    """The functional model, which holds no weights, and its jitted `apply`: a second model of the same sizes compiles nothing."""
    model = kind(config, dtype=dtype)
    return model, jax.jit(model.apply, static_argnames=static)


@lru_cache(maxsize=16)
def _compiled_update(config: Any, dtype: str) -> Callable[..., Any]:
    return jax.jit(_compiled(GroundedMambaModel, config, dtype, JaxGroundedMamba.static)[0].update_memory)


def _to_numpy(tree: Any) -> Any:
    return jax.tree.map(np.array, tree)
