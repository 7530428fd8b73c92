"""The functional face of the NNX models: `model` is static, `variables` is a nested dict, `apply` is pure.

    model = GroundedMambaModel(config)
    variables = model.init(seed=0)                                  {"params": ..., "buffers": ...}
    logits, states = jax.jit(model.apply)(variables, ids, states)

`params` are trained; `buffers` hold frozen weights and the memory banks. Both are plain nested dicts whose paths spell torch's
names. `nnx.merge` inside `jax.jit` costs one trace; calling an `nnx.jit` function costs milliseconds every time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from conf.baselines import GruConfig, TransformerConfig
from conf.models import DeltaNetConfig, GroundedMambaConfig, LamConfig, WaveCoreConfig
from jax_impl import weights
from jax_impl.deltanet import DeltaNetLM
from jax_impl.grounded_mamba import GroundedMamba
from jax_impl.gru import GruLM
from jax_impl.lam import LAM, LamOutput
from jax_impl.state import CoreState, State
from jax_impl.transformer import Transformer
from jax_impl.wavecore import Info, Levels, WaveCore

Variables = dict[str, Any]


class FunctionalModel:
    """An NNX module as a function of its variables: what the models of this file share.

    `dtype` is that of parameters and arithmetic; float64 needs `jax.enable_x64(True)` around every call, else ValueError.
    """

    def __init__(self, config: Any, build: Callable[[nnx.Rngs], nnx.Module], dtype: str) -> None:
        """`build` makes the module of `config`, its weights drawn from the given generators."""
        self.config, self.dtype = config, np.dtype(dtype)
        self._build = build
        shapes = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
        self._graph, params, buffers = nnx.split(shapes, nnx.Param, ...)
        self._template = _collections(params, buffers)

    def init(self, seed: int | Array = 0) -> Variables:
        """Variables drawn with JAX's generator, from a seed or a key."""
        _, params, buffers = nnx.split(self._build(nnx.Rngs(seed)), nnx.Param, ...)
        return self._cast(_collections(params, buffers))

    def merge(self, variables: Variables) -> Any:
        """The NNX module that holds `variables`."""
        return nnx.merge(self._graph, variables["params"], variables.get("buffers", {}))

    def variables(self, arrays: dict[str, np.ndarray]) -> Variables:
        """Variables from a flat dict of torch names; ValueError names what is missing, unused or misshapen."""
        return weights.to_variables(arrays, self._cast(self._template))

    def arrays(self, variables: Variables) -> dict[str, np.ndarray]:
        """Flat dict of torch names, tied names included."""
        return weights.to_arrays(variables)

    def _cast(self, variables: Variables) -> Variables:
        """`variables` with floating leaves (or shapes) in the model's dtype and integer leaves as wide as JAX allows."""
        integer = jax.dtypes.canonicalize_dtype(np.int64)
        if jax.dtypes.canonicalize_dtype(self.dtype) != self.dtype:
            raise ValueError(f"a model in {self.dtype} must be used inside jax.enable_x64(True)")

        def cast(leaf: Any) -> Any:
            dtype = self.dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else integer
            return jax.ShapeDtypeStruct(leaf.shape, dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf.astype(dtype)

        return jax.tree.map(cast, variables)


def _collections(params: nnx.State, buffers: nnx.State) -> Variables:
    """Both as plain nested dicts; a model without buffers has no such collection, so that {"params": ...} is all of it."""
    held = nnx.to_pure_dict(buffers)
    return {"params": nnx.to_pure_dict(params)} | ({"buffers": held} if held else {})


class LanguageModel(FunctionalModel):
    """A causal language model, which streams: ids and states to logits and states."""

    def apply(
        self, variables: Variables, input_ids: Array, states: list[State] | None = None, *, return_aux: bool = False
    ) -> tuple[Any, ...]:
        """Logits (B, L, V), states and, with `return_aux`, the auxiliary dict; see the module's `__call__`. Pure and jittable."""
        return self.merge(variables)(input_ids, states, return_aux=return_aux)

    def init_states(self, batch_size: int) -> list[State]:
        """Zeros: the states before the first token."""
        shapes = self.merge(self._template).state_shapes(batch_size)
        return [{name: jnp.zeros(shape, self.dtype) for name, shape in one.items()} for one in shapes]


class GroundedMambaModel(LanguageModel):
    """GroundedMamba as a function of its variables. Options as the module's; `dtype` as `FunctionalModel`'s."""

    def __init__(
        self, config: GroundedMambaConfig | None = None, *, impl: str = "chunked", chunk_size: int = 32, remat: bool = False, dtype: str = "float32"
    ) -> None:
        config = GroundedMambaConfig.of(config)
        super().__init__(config, lambda rngs: GroundedMamba(config, impl=impl, chunk_size=chunk_size, remat=remat, rngs=rngs), dtype)

    def update_memory(self, variables: Variables, aux: dict[str, Any]) -> Variables:
        """Variables after one optimiser step's update of the memory banks. Pure and jittable."""
        module = self.merge(variables)
        module.update_memory(aux)
        return {**variables, "buffers": nnx.to_pure_dict(nnx.split(module, nnx.Param, ...)[2])}


class DeltaNetModel(LanguageModel):
    """DeltaNetLM as a function of its variables. Options as the module's; `dtype` as `FunctionalModel`'s."""

    def __init__(self, config: DeltaNetConfig | None = None, *, impl: str = "chunked", remat: bool = False, dtype: str = "float32") -> None:
        config = DeltaNetConfig() if config is None else config
        super().__init__(config, lambda rngs: DeltaNetLM(config, impl=impl, remat=remat, rngs=rngs), dtype)


class TransformerModel(LanguageModel):
    """Transformer as a function of its variables. Options as the module's; `dtype` as `FunctionalModel`'s."""

    def __init__(self, config: TransformerConfig | None = None, *, remat: bool = False, dtype: str = "float32") -> None:
        config = TransformerConfig() if config is None else config
        super().__init__(config, lambda rngs: Transformer(config, remat=remat, rngs=rngs), dtype)


class GruModel(LanguageModel):
    """GruLM as a function of its variables. Options as the module's; `dtype` as `FunctionalModel`'s."""

    def __init__(self, config: GruConfig | None = None, *, remat: bool = False, dtype: str = "float32") -> None:
        config = GruConfig() if config is None else config
        super().__init__(config, lambda rngs: GruLM(config, remat=remat, rngs=rngs), dtype)


class LamModel(FunctionalModel):
    """LAM as a function of its variables. Options as the module's; `dtype` as `FunctionalModel`'s."""

    def __init__(self, config: LamConfig | None = None, *, impl: str = "chunked", remat: bool = False, dtype: str = "float32") -> None:
        config = LamConfig() if config is None else config
        super().__init__(config, lambda rngs: LAM(config, impl=impl, remat=remat, rngs=rngs), dtype)

    def apply(
        self, variables: Variables, input_ids: Array, attention_mask: Array | None = None, output_hidden_states: bool = False
    ) -> LamOutput:
        """See `LAM.__call__`. Pure and jittable, `output_hidden_states` static."""
        return self.merge(variables)(input_ids, attention_mask, output_hidden_states)


class WaveCoreModel(FunctionalModel):
    """WaveCore as a function of its variables, which are {"params": ...} alone. `dtype` as `FunctionalModel`'s; the rest as the module's."""

    def __init__(self, config: WaveCoreConfig, obs_dim: int, action_dim: int, output_dim: int, *, dtype: str = "float32") -> None:
        sized = config.sized(obs_dim, action_dim, output_dim)
        super().__init__(sized, lambda rngs: WaveCore(config, obs_dim, action_dim, output_dim, rngs=rngs), dtype)

    def apply(
        self, variables: Variables, x_obs: Array, a_prev: Array, r_t: Array, s_prev: Array, w_prev: Array, p_prev: Array,
        cms_memories: Levels, cms_keys: Levels,
    ) -> tuple[Array | None, Info]:
        """One step on a plain memory; see `WaveCore.__call__`. Pure and jittable."""
        return self.merge(variables)(x_obs, a_prev, r_t, s_prev, w_prev, p_prev, cms_memories, cms_keys)

    def step(self, variables: Variables, state: CoreState, x_obs: Array, a_prev: Array, r_t: Array) -> tuple[Array | None, CoreState, Info]:
        """One step from a state; see `WaveCore.step`. Pure and jittable; the state's buffers may be donated."""
        return self.merge(variables).step(state, x_obs, a_prev, r_t)

    def rollout(self, variables: Variables, state: CoreState, x_obs: Array, a_prev: Array, r_t: Array) -> tuple[Array | None, CoreState, Info]:
        """T steps from a state in one scan; see `WaveCore.rollout`. Pure and jittable."""
        return self.merge(variables).rollout(state, x_obs, a_prev, r_t)

    def init_state(self, batch: int | None = None) -> CoreState:
        """Zeros: the state before the first step, for `batch` rows or without a batch axis."""
        return self.merge(self._cast(self._template)).init_state(batch)

    def state(self, s: Array, w: Array, p: Array, cms_memories: Levels, cms_keys: Levels) -> CoreState:
        """The lazy state that holds given states and a plain memory."""
        return self.merge(self._template).state(s, w, p, cms_memories, cms_keys)

    def memories(self, state: CoreState) -> tuple[Levels, Levels]:
        """The plain memories and keys of every level of a lazy state."""
        return self.merge(self._template).memories(state)


def make_core_model(
    rng_key: Array, obs_dim: int, action_dim: int, output_dim: int, config: WaveCoreConfig | None = None, dtype: str = "float32"
) -> tuple[WaveCoreModel, Variables]:
    """A WaveCore and its variables {"params": ...}, drawn with `rng_key`; the default configuration when `config` is None."""
    model = WaveCoreModel(WaveCoreConfig() if config is None else config, obs_dim, action_dim, output_dim, dtype=dtype)
    return model, model.init(rng_key)
