"""The door to `jax_impl`: one object per model, which takes JAX or NumPy arrays. Imported by `runtime.build` when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_impl.functional import DeltaNetModel, GroundedMambaModel, GruModel, LamModel, TransformerModel, WaveCoreModel
from jax_impl.generate import generate
from jax_impl.state import CoreState, check_core, check_mask, check_states, check_time, check_token_ids
from runtime import core_state
from runtime.arrays import layout

_OPTIONS: dict[str, dict[str, str]] = {"jax": {}, "jax_compiled": {"impl": "compiled"}}


class JaxModel:
    """What every model has: `model`, the functional object, and its `variables`; one compilation per configuration and shape of the input.

    Everything runs inside `jax.enable_x64(dtype == "float64")`, whatever the global setting.
    """

    name: str
    kind: Callable[..., Any]
    static: str | tuple[str, ...] = "return_aux"

    def __init__(self, config: Any, arrays: Mapping[str, np.ndarray], backend: str, dtype: str) -> None:
        """`arrays` complete and checked."""
        self.config, self.backend, self.dtype = config, backend, dtype
        with self._x64():
            self.model, self._apply = _compiled(self.kind, config, dtype, self.static, backend)
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

    def __init__(self, config: Any, arrays: Mapping[str, np.ndarray], backend: str, dtype: str) -> None:
        super().__init__(config, arrays, backend, dtype)
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


class JaxTransformer(JaxLanguageModel):
    """Transformer in JAX."""

    name = "transformer"
    kind = TransformerModel


class JaxGruLM(JaxLanguageModel):
    """GruLM in JAX."""

    name = "gru"
    kind = GruModel


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


def _functional_core(config: Any, dtype: str) -> WaveCoreModel:
    return WaveCoreModel(config, config.obs_dim, config.action_dim, config.output_dim, dtype=dtype)


class JaxWaveCore(JaxModel):
    """WaveCore in JAX; step, rollout and the call are each compiled once per shape of the input.

    What a method returns is NumPy where x_obs is; a state comes back as NumPy only where it was NumPy too, so that it stays on its device from
    step to step. No state that is given is donated. Raises ValueError, naming the argument, as the module does, values that are not finite
    included.
    """

    name = "wavecore"
    kind = staticmethod(_functional_core)
    static = ()

    def __call__(
        self, x_obs: Any, a_prev: Any, r_t: Any, s_prev: Any, w_prev: Any, p_prev: Any, cms_memories: Any, cms_keys: Any
    ) -> tuple[Any, dict[str, Any]]:
        """One step on a plain memory; see `WaveCore.__call__`."""
        with self._x64():
            inputs, states = (tuple(map(self._leaf, leaves)) for leaves in ((x_obs, a_prev, r_t), (s_prev, w_prev, p_prev)))
            held = (*states, *self._levels(cms_memories, cms_keys))
            check_core(self.config, inputs, held, np.dtype(self.dtype))
            results = self._apply(self.variables, *_own((*inputs, *held)))
        return results if isinstance(x_obs, jax.Array) else _to_numpy(results)

    def step(self, state: CoreState, x_obs: Any, a_prev: Any, r_t: Any) -> tuple[Any, CoreState, dict[str, Any]]:
        """One step from `state`; see `WaveCore.step`."""
        return self._advance("step", state, x_obs, a_prev, r_t)

    def rollout(self, state: CoreState, x_obs: Any, a_prev: Any, r_t: Any) -> tuple[Any, CoreState, dict[str, Any]]:
        """T steps from `state` in one scan, time first; see `WaveCore.rollout`."""
        return self._advance("rollout", state, x_obs, a_prev, r_t)

    def init_state(self, batch: int | None = None) -> CoreState:
        """Zeros, as JAX arrays: the state before the first step, for `batch` rows or without a batch axis."""
        with self._x64():
            return self.model.init_state(batch)

    def state(self, s: Any, w: Any, p: Any, cms_memories: Any, cms_keys: Any) -> CoreState:
        """The lazy state that holds given states and a plain memory. Raises ValueError for wrong levels or shapes and for NaN."""
        held = (*map(self._leaf, (s, w, p)), *self._levels(cms_memories, cms_keys))
        core_state.check_state(self.config, core_state.flatten(held), self.dtype, plain=True)
        with self._x64():
            state = self.model.state(*_own(held))
        return state if isinstance(s, jax.Array) else _to_numpy(state)

    def memories(self, state: CoreState) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The plain memories (B, n, d) and keys (B, n, d_k) of every level of a lazy state."""
        with self._x64():
            held = self.model.memories(_own(self._state(state)))
        return held if isinstance(state.s, jax.Array) else _to_numpy(held)

    def state_arrays(self, state: CoreState) -> dict[str, np.ndarray]:
        """Copies of a lazy state's arrays, flat: s, w, p, memories.l, keys.l, norms.l, scales.l."""
        return _to_numpy(core_state.flatten(core_state.parts(state)))

    def load_state(self, arrays: Mapping[str, Any]) -> CoreState:
        """The state, as JAX arrays, that `state_arrays` of any backend gave. Raises ValueError, naming what is wrong, for other arrays."""
        checked = core_state.check_state(self.config, arrays, self.dtype)
        with self._x64():
            return _own(CoreState(*core_state.nest(self.config, checked)))

    def _advance(self, name: str, state: CoreState, x_obs: Any, a_prev: Any, r_t: Any) -> tuple[Any, CoreState, dict[str, Any]]:
        native = isinstance(x_obs, jax.Array)
        with self._x64():
            held, inputs = self._state(state), tuple(map(self._leaf, (x_obs, a_prev, r_t)))
            if name == "rollout":
                check_time(*inputs)
            check_core(self.config, inputs, held, np.dtype(self.dtype), time=name == "rollout")
            y, after, info = _compiled_core(self.config, self.dtype, name)(self.variables, *_own((held, *inputs)))
        if native:
            return y, after, info
        return _to_numpy(y), after if isinstance(state.s, jax.Array) else _to_numpy(after), _to_numpy(info)

    def _state(self, state: Any) -> CoreState:
        return CoreState(*jax.tree.map(self._leaf, core_state.parts(state)))

    def _levels(self, memories: Any, keys: Any) -> tuple[tuple[Any, ...], ...]:
        named = (("cms_memories", memories), ("cms_keys", keys))
        return tuple(tuple(map(self._leaf, core_state.levels(name, value))) for name, value in named)

    def _leaf(self, value: Any) -> Any:
        """An array of its own dtype, JAX's or NumPy's; numbers and lists of them get the weights'."""
        return value if isinstance(value, jax.Array) else np.asarray(value, dtype=None if hasattr(value, "__array__") else self.dtype)


MODELS: dict[str, type[JaxModel]] = {model.name: model for model in (JaxGroundedMamba, JaxDeltaNetLM, JaxTransformer, JaxGruLM, JaxLam, JaxWaveCore)}


@lru_cache(maxsize=16)
def _compiled(
    kind: Callable[..., Any], config: Any, dtype: str, static: str | tuple[str, ...], backend: str = "jax"
) -> tuple[Any, Callable[..., Any]]:
    """The functional model, which holds no weights, and its jitted `apply`: a second model of the same sizes compiles nothing."""
    model = kind(config, dtype=dtype, **_OPTIONS[backend])
    return model, jax.jit(model.apply, static_argnames=static)


@lru_cache(maxsize=16)
def _compiled_update(config: Any, dtype: str) -> Callable[..., Any]:
    return jax.jit(_compiled(GroundedMambaModel, config, dtype, JaxGroundedMamba.static)[0].update_memory)


@lru_cache(maxsize=32)
def _compiled_core(config: Any, dtype: str, name: str) -> Callable[..., Any]:
    """The jitted "step" or "rollout" of the functional model."""
    return jax.jit(getattr(_compiled(JaxWaveCore.kind, config, dtype, JaxWaveCore.static)[0], name))


def _own(tree: Any) -> Any:
    """NumPy leaves as JAX arrays. Copied: JAX may read an array that it was given after the call returns."""
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jnp.array(leaf), tree)


def _to_numpy(tree: Any) -> Any:
    return jax.tree.map(np.array, tree)
