"""The door to `torch_impl`: one object per model, which takes tensors or NumPy arrays. Imported by `runtime.build` when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from runtime import core_state
from runtime.arrays import layout
from torch_impl.deltanet import DeltaNetLM
from torch_impl.grounded_mamba import GroundedMamba
from torch_impl.gru import GruLM
from torch_impl.lam import LAM
from torch_impl.state import CoreState
from torch_impl.transformer import Transformer
from torch_impl.wavecore import WaveCore

_IMPLS = {"torch": "chunked", "torch_compiled": "compiled"}


class TorchModel:
    """What every model has. `module` is the torch module, for training and for everything that is torch's own."""

    name: str
    kind: type[nn.Module]

    def __init__(self, config: Any, arrays: Mapping[str, np.ndarray], backend: str, dtype: str) -> None:
        """`arrays` complete and checked. The random numbers that the module's constructor draws do not advance torch's generator."""
        self.config, self.backend, self.dtype = config, backend, dtype
        with torch.random.fork_rng(devices=[]):
            self.module = self._make(config, backend).to(getattr(torch, dtype))
        self.module.load_state_dict({key: torch.from_numpy(value) for key, value in arrays.items()}, strict=True)

    def _make(self, config: Any, backend: str) -> nn.Module:
        return self.kind(config, impl=_IMPLS[backend])

    def arrays(self) -> dict[str, np.ndarray]:
        """Copies of all parameters and buffers, flat, under torch's names."""
        held = self.module.state_dict()
        return {key: held[key].detach().cpu().numpy().copy() for key in layout(self.name, self.config)}

    def _ids(self, input_ids: Any) -> torch.Tensor:
        ids = np.asarray(input_ids)
        return torch.as_tensor(ids.astype(np.int64) if ids.dtype.kind in "iu" else ids, device=self._device())

    def _tensors(self, tree: Any) -> Any:
        """NumPy arrays anywhere in `tree` as tensors on the module's device; what is a tensor or None stays."""
        return _map(lambda leaf: torch.as_tensor(leaf, device=self._device()) if isinstance(leaf, np.ndarray) else leaf, tree)

    def _device(self) -> torch.device:
        return next(self.module.parameters()).device


class TorchLanguageModel(TorchModel):
    """A causal language model with states: token ids in, logits and states out."""

    def __call__(self, input_ids: Any, states: Any = None, *, return_aux: bool = False) -> tuple[Any, ...]:
        """(B, L) ids -> logits (B, L, V), states[, aux] as the module's `forward`. NumPy ids: NumPy results, and no gradients."""
        if isinstance(input_ids, torch.Tensor):
            return self.module(input_ids, self._tensors(states), return_aux=return_aux)
        with torch.no_grad():
            return _to_numpy(self.module(self._ids(input_ids), self._tensors(states), return_aux=return_aux))

    def generate(self, input_ids: Any, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 0) -> Any:
        """Continue (B, L) ids by `max_new_tokens` sampled tokens: (B, L + max_new_tokens)."""
        if isinstance(input_ids, torch.Tensor):
            return self.module.generate(input_ids, max_new_tokens, temperature, top_k, seed)
        return _to_numpy(self.module.generate(self._ids(input_ids), max_new_tokens, temperature, top_k, seed))

    def init_states(self, batch_size: int) -> list[dict[str, torch.Tensor]]:
        """Zeros: the states before the first token."""
        return self.module.init_states(batch_size)


class TorchGroundedMamba(TorchLanguageModel):
    """GroundedMamba in torch."""

    name = "grounded_mamba"
    kind = GroundedMamba

    def update_memory(self, aux: Mapping[str, Any]) -> None:
        """Count one optimiser step and, when it is due, write the rows of `aux` into the memory banks."""
        self.module.update_memory(self._tensors(dict(aux)))


class TorchDeltaNetLM(TorchLanguageModel):
    """DeltaNetLM in torch."""

    name = "deltanet_lm"
    kind = DeltaNetLM


class TorchTransformer(TorchLanguageModel):
    """Transformer in torch."""

    name = "transformer"
    kind = Transformer

    def _make(self, config: Any, backend: str) -> nn.Module:
        return self.kind(config)


class TorchGruLM(TorchLanguageModel):
    """GruLM in torch."""

    name = "gru"
    kind = GruLM

    def _make(self, config: Any, backend: str) -> nn.Module:
        return self.kind(config)


class TorchLam(TorchModel):
    """LAM in torch."""

    name = "lam"
    kind = LAM

    def __call__(self, input_ids: Any, attention_mask: Any = None, output_hidden_states: bool = False) -> Any:
        """(B, L) ids, mask (B, L) or None -> LamOutput as `LAM.forward`. NumPy ids: NumPy results, and no gradients."""
        native = isinstance(input_ids, torch.Tensor)
        ids = input_ids if native else self._ids(input_ids)
        if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
            attention_mask = torch.as_tensor(np.asarray(attention_mask), device=self._device())
        with torch.set_grad_enabled(torch.is_grad_enabled() and native):
            output = self.module(ids, attention_mask, output_hidden_states)
        return output if native else _to_numpy(output)


class TorchWaveCore(TorchModel):
    """WaveCore in torch.

    What a method returns is NumPy, and without gradients, where x_obs is; a state comes back as NumPy only where it was NumPy too, so that it
    stays on its device from step to step. Raises ValueError, naming the argument, as the module does.
    """

    name = "wavecore"
    kind = WaveCore

    def __call__(
        self, x_obs: Any, a_prev: Any, r_t: Any, s_prev: Any, w_prev: Any, p_prev: Any, cms_memories: Any, cms_keys: Any
    ) -> tuple[Any, dict[str, Any]]:
        """One step on a plain memory; see `WaveCore.forward`."""
        native, levels = isinstance(x_obs, torch.Tensor), self._levels(cms_memories, cms_keys)
        inputs = map(self._leaf, (x_obs, a_prev, r_t, s_prev, w_prev, p_prev))
        with torch.set_grad_enabled(torch.is_grad_enabled() and native):
            results = self.module(*inputs, *levels)
        return results if native else _to_numpy(results)

    def step(self, state: CoreState, x_obs: Any, a_prev: Any, r_t: Any) -> tuple[Any, CoreState, dict[str, Any]]:
        """One step from `state`; see `WaveCore.step`."""
        return self._advance(self.module.step, state, x_obs, a_prev, r_t)

    def rollout(self, state: CoreState, x_obs: Any, a_prev: Any, r_t: Any) -> tuple[Any, CoreState, dict[str, Any]]:
        """T steps from `state`, time first; see `WaveCore.rollout`."""
        return self._advance(self.module.rollout, state, x_obs, a_prev, r_t)

    def init_state(self, batch: int | None = None) -> CoreState:
        """Zeros, as tensors: the state before the first step, for `batch` rows or without a batch axis."""
        return self.module.init_state(batch)

    def state(self, s: Any, w: Any, p: Any, cms_memories: Any, cms_keys: Any) -> CoreState:
        """The lazy state that holds given states and a plain memory. Raises ValueError for wrong levels or shapes and for NaN."""
        held = (*map(self._leaf, (s, w, p)), *self._levels(cms_memories, cms_keys))
        core_state.check_state(self.config, _to_numpy(core_state.flatten(held)), self.dtype, plain=True)
        state = self.module.state(*held)
        return state if isinstance(s, torch.Tensor) else _copied(state)

    def memories(self, state: CoreState) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The plain memories (B, n, d) and keys (B, n, d_k) of every level of a lazy state."""
        held = self.module.memories(self._state(state))
        return held if isinstance(state.s, torch.Tensor) else _to_numpy(held)

    def state_arrays(self, state: CoreState) -> dict[str, np.ndarray]:
        """Copies of a lazy state's arrays, flat: s, w, p, memories.l, keys.l, norms.l, scales.l."""
        return _copied(core_state.flatten(core_state.parts(state)))

    def load_state(self, arrays: Mapping[str, Any]) -> CoreState:
        """The state, as tensors, that `state_arrays` of any backend gave. Raises ValueError, naming what is wrong, for other arrays."""
        checked = core_state.check_state(self.config, arrays, self.dtype)
        return self._state(CoreState(*core_state.nest(self.config, checked)))

    def _make(self, config: Any, backend: str) -> nn.Module:
        return self.kind(config, config.obs_dim, config.action_dim, config.output_dim, "compiled" if backend == "torch_compiled" else "recurrent")

    def _advance(self, method: Any, state: CoreState, x_obs: Any, a_prev: Any, r_t: Any) -> tuple[Any, CoreState, dict[str, Any]]:
        native, held = isinstance(x_obs, torch.Tensor), self._state(state)
        with torch.set_grad_enabled(torch.is_grad_enabled() and native):
            y, after, info = method(held, *map(self._leaf, (x_obs, a_prev, r_t)))
        if native:
            return y, after, info
        return _to_numpy(y), after if isinstance(state.s, torch.Tensor) else _copied(after), _copied(info)

    def _state(self, state: Any) -> CoreState:
        return CoreState(*_map(self._leaf, core_state.parts(state)))

    def _levels(self, memories: Any, keys: Any) -> tuple[tuple[torch.Tensor, ...], ...]:
        named = (("cms_memories", memories), ("cms_keys", keys))
        return tuple(tuple(map(self._leaf, core_state.levels(name, value))) for name, value in named)

    def _leaf(self, value: Any) -> torch.Tensor:
        """A tensor on the module's device, of the array's own dtype; numbers and lists of them get the weights'."""
        if isinstance(value, torch.Tensor):
            return value
        array = np.asarray(value, dtype=None if hasattr(value, "__array__") else self.dtype)
        return torch.as_tensor(np.require(array, requirements=["C", "W"]), device=self._device())


MODELS: dict[str, type[TorchModel]] = {
    model.name: model for model in (TorchGroundedMamba, TorchDeltaNetLM, TorchTransformer, TorchGruLM, TorchLam, TorchWaveCore)
}


def _map(function: Any, tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _map(function, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        mapped = [_map(function, value) for value in tree]
        return type(tree)(*mapped) if hasattr(tree, "_fields") else type(tree)(mapped)
    return function(tree)


def _to_numpy(tree: Any) -> Any:
    return _map(lambda leaf: leaf.detach().cpu().numpy() if isinstance(leaf, torch.Tensor) else leaf, tree)


def _copied(tree: Any) -> Any:
    """NumPy arrays that share no memory with the tensors of `tree`."""
    return _map(np.array, _to_numpy(tree))
