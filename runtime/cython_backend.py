"""The door to the engines of `cython_ext`: NumPy arrays in, NumPy arrays out, no framework. Imported by `runtime.build` when it is asked for."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

import cython_ext
from conf.models import SizedWaveCoreConfig
from cython_ext.packing import unpacked
from cython_ext.wavecore_layout import Sizes
from runtime import core_state
from runtime.cython_lam import CythonLam
from runtime.cython_mamba import CythonGroundedMamba

ENGINES = 8  # batch sizes whose buffers are kept at a time


class CoreState(NamedTuple):
    """WaveCore between two steps. Level l of the memory is scales[l] * memories[l] and scales[l] * keys[l]; `norms` are those of `memories`."""

    s: np.ndarray  # (B, d_s)
    w: np.ndarray  # (B, d_w)
    p: np.ndarray  # (B, d_p)
    memories: tuple[np.ndarray, ...]  # (B, n, d) of every level
    keys: tuple[np.ndarray, ...]  # (B, n, d_k)
    norms: tuple[np.ndarray, ...]  # (B, n), squared
    scales: tuple[np.ndarray, ...]  # ()


class HeldState(CoreState):
    """A `CoreState` whose arrays are views of one, `held`, which an engine steps over as it is."""

    held: np.ndarray


class CythonWaveCore:
    """WaveCore on the compiled engine; NumPy arrays alone, no gradients.

    `step`, `rollout` and the call leave the state that they are given as it was and return new arrays, as on every backend; the copy of the
    memory that this costs is spared by `engine`, which steps over a state of its own. Raises ValueError, naming the argument, as the torch
    module does.
    """

    name = "wavecore"
    backend = "cython"

    def __init__(self, config: SizedWaveCoreConfig, arrays: Mapping[str, np.ndarray], dtype: str, weights: str | None = None) -> None:
        """`arrays` complete and checked."""
        self.config, self.dtype = config, dtype
        self._lock = threading.Lock()
        engine = cython_ext.kernel("wavecore_engine").WaveCoreEngine
        sizes = {field.name: getattr(config, field.name) for field in dataclasses.fields(Sizes)}
        self._engines = {None: engine(arrays, sizes, dtype, weights, None)}
        stored = self._engines[None].stored()
        self._arrays = {key: stored[key] if key in stored else value.copy() for key, value in arrays.items()}

    @property
    def weights(self) -> str:
        """How the weights are stored: "float32", "float64" or "bfloat16"."""
        return self._engines[None].weights

    def arrays(self) -> dict[str, np.ndarray]:
        """Copies of all parameters, flat, under torch's names, as they were given."""
        return {key: unpacked(value) for key, value in self._arrays.items()}

    def engine(self, batch: int | None = None) -> Any:
        """A new `WaveCoreEngine` of these weights, with a state and buffers of its own, for a loop that steps in place."""
        return self._engines[None].resized(batch)

    def __call__(
        self, x_obs: Any, a_prev: Any, r_t: Any, s_prev: Any, w_prev: Any, p_prev: Any, cms_memories: Any, cms_keys: Any
    ) -> tuple[Any, dict[str, Any]]:
        """One step on a plain memory; see `torch_impl.wavecore.WaveCore.forward`."""
        levels = tuple(
            tuple(map(self._leaf, core_state.levels(name, value))) for name, value in (("cms_memories", cms_memories), ("cms_keys", cms_keys)))
        inputs, held = tuple(map(self._leaf, (x_obs, a_prev, r_t))), (*map(self._leaf, (s_prev, w_prev, p_prev)), *levels)
        self._check(inputs, held, lazy=False)
        y, state, info = self._advance("step", _plain(*held), inputs)
        memories, keys = self.memories(state)
        return y, info | {"cms_memories": memories, "cms_keys": keys}

    def step(self, state: Any, x_obs: Any, a_prev: Any, r_t: Any) -> tuple[Any, CoreState, dict[str, Any]]:
        """One step from `state`; see `torch_impl.wavecore.WaveCore.step`."""
        inputs, held = tuple(map(self._leaf, (x_obs, a_prev, r_t))), self._state(state)
        self._check(inputs, tuple(held), lazy=True)
        return self._advance("step", held, inputs)

    def rollout(self, state: Any, x_obs: Any, a_prev: Any, r_t: Any) -> tuple[Any, CoreState, dict[str, Any]]:
        """T steps from `state`, time first; see `torch_impl.wavecore.WaveCore.rollout`."""
        inputs, held = tuple(map(self._leaf, (x_obs, a_prev, r_t))), self._state(state)
        steps = [value.shape[0] if value.ndim else 0 for value in inputs]
        if len(set(steps)) != 1 or steps[0] == 0:
            raise ValueError(f"x_obs, a_prev and r_t must have the same number of steps, at least 1, along their first axis, found {steps}")
        self._check(inputs, tuple(held), lazy=True, time=True)
        return self._advance("rollout", held, inputs)

    def init_state(self, batch: int | None = None) -> CoreState:
        """Zeros: the state before the first step, for `batch` rows or without a batch axis."""
        engine = self._engine(batch)
        return _held(engine, engine.new_state())

    def state(self, s: Any, w: Any, p: Any, cms_memories: Any, cms_keys: Any) -> CoreState:
        """The lazy state that holds given states and a plain memory. Raises ValueError for wrong levels or shapes and for NaN."""
        levels = (
            tuple(map(self._leaf, core_state.levels(name, value))) for name, value in (("cms_memories", cms_memories), ("cms_keys", cms_keys)))
        held = (*map(self._leaf, (s, w, p)), *levels)
        core_state.check_state(self.config, core_state.flatten(held), self.dtype, plain=True)
        return self._own(_plain(*held))

    def memories(self, state: CoreState) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """The plain memories (B, n, d) and keys (B, n, d_k) of every level of a lazy state."""
        held = self._state(state)
        return tuple(tuple(scale * part for scale, part in zip(held.scales, parts, strict=True)) for parts in (held.memories, held.keys))

    def state_arrays(self, state: CoreState) -> dict[str, np.ndarray]:
        """Copies of a lazy state's arrays, flat: s, w, p, memories.l, keys.l, norms.l, scales.l."""
        return {key: np.array(value) for key, value in core_state.flatten(tuple(self._state(state))).items()}

    def load_state(self, arrays: Mapping[str, Any]) -> CoreState:
        """The state that `state_arrays` of any backend gave. Raises ValueError, naming what is wrong, for other arrays."""
        checked = core_state.check_state(self.config, arrays, self.dtype)
        return self._own(CoreState(*core_state.nest(self.config, checked)))

    def _advance(self, method: str, state: CoreState, inputs: tuple[np.ndarray, ...]) -> tuple[Any, CoreState, dict[str, Any]]:
        with self._lock:
            engine = self._engine(state.s.shape[0] if state.s.ndim == 2 else None)
            after = self._own(state)
            engine.bind(after.held)
            y, info = getattr(engine, method)(*inputs)
            if method == "step":
                info = info | {"fast_state": after.s, "wave_state": after.w, "particle_state": after.p}
                y, info = _copied(y), _copied(info)
        return y, after, info

    def _own(self, state: CoreState) -> HeldState:
        """A state of its own arrays with the values of `state`."""
        engine = self._engine(state.s.shape[0] if state.s.ndim == 2 else None)
        if isinstance(state, HeldState) and state.s.base is getattr(state, "held", None) is not None:  # not one that `_replace` made
            return _held(engine, state.held.copy())
        held = engine.new_state()
        views = engine.views(held)
        for name, value in core_state.flatten(tuple(state)).items():
            views[name][...] = value
        return _held(engine, held)

    def _engine(self, batch: int | None) -> Any:
        if batch not in self._engines:
            if len(self._engines) > ENGINES:
                self._engines = {None: self._engines[None]}
            self._engines[batch] = self._engines[None].resized(batch)
        return self._engines[batch]

    def _state(self, state: Any) -> CoreState:
        parts = core_state.parts(state)
        return state if isinstance(state, HeldState) else CoreState(
            *(tuple(map(self._leaf, part)) if isinstance(part, (list, tuple)) else self._leaf(part) for part in parts))

    def _leaf(self, value: Any) -> np.ndarray:
        """An array of its own dtype; numbers and lists of them get the weights'."""
        return np.asarray(value, dtype=None if hasattr(value, "__array__") else self.dtype)

    def _check(self, inputs: tuple[np.ndarray, ...], held: tuple[Any, ...], *, lazy: bool, time: bool = False) -> None:
        """Hold inputs and state to the configuration, in the words of the torch module."""
        config = self.config
        owner = "state.{}" if lazy else "{}_prev"
        named = dict(zip(("x_obs", "a_prev", "r_t"), inputs, strict=True))
        states = {owner.format(name): value for name, value in zip("swp", held[:3], strict=True)}
        shapes = dict(zip([*named, *states], ((width,) for width in (
            config.obs_dim, config.action_dim, 1, config.d_s, config.d_w, config.d_p)), strict=True))
        memory, rows_of = {}, core_state.shapes(config, None)
        for kind, levels in zip(core_state.LEVELS, held[3:], strict=False):
            name = f"state.{kind}" if lazy else f"cms_{kind}"
            if not isinstance(levels, tuple) or len(levels) != config.num_levels:
                found = f"{len(levels)} levels" if isinstance(levels, tuple) else type(levels).__name__
                raise ValueError(f"{name} must be a tuple of {config.num_levels} levels, found {found}")
            memory |= {f"{name}[{level}]": value for level, value in enumerate(levels)}
            shapes |= {f"{name}[{level}]": rows_of[f"{kind}.{level}"] for level in range(config.num_levels)}
        first = inputs[0].shape[1:] if time else inputs[0].shape
        if len(first) not in (1, 2) or 0 in first or first[-1] != config.obs_dim:
            steps = "T, " if time else ""
            raise ValueError(
                f"x_obs must have shape ({steps}batch, {config.obs_dim}) or ({steps}{config.obs_dim},), none of them 0, found {inputs[0].shape}")
        for name, value in (named | states | memory).items():
            found = value.shape[1:] if time and name in named else value.shape
            expected = shapes[name] if name.startswith("state.scales") else (*first[:-1], *shapes[name])
            if found != expected:
                raise ValueError(f"{name} must have shape {expected} with x_obs {first}, found {found}")
            if value.dtype != self.dtype:
                raise ValueError(f"{name} must have dtype {self.dtype}, as the weights have, found {value.dtype}")
            if (name in named or name in states or not lazy) and not np.isfinite(value).all():
                raise ValueError(f"{name} {value.shape} must be finite, found NaN or infinity")


MODELS = {model.name: model for model in (CythonGroundedMamba, CythonLam, CythonWaveCore)}


def _held(engine: Any, held: np.ndarray) -> HeldState:
    parts = engine.views(held)
    levels = range(len(engine.sizes.cms_sizes))
    state = HeldState(
        *(parts[name] for name in core_state.STATES), *(tuple(parts[f"{kind}.{level}"] for level in levels) for kind in core_state.LEVELS))
    state.held = held
    return state


def _plain(s: Any, w: Any, p: Any, memories: tuple[np.ndarray, ...], keys: tuple[np.ndarray, ...]) -> CoreState:
    """The lazy state that holds a plain memory."""
    norms = tuple(np.square(memory).sum(-1) for memory in memories)
    return CoreState(s, w, p, memories, keys, norms, tuple(np.ones((), memory.dtype) for memory in memories))


def _copied(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _copied(value) for key, value in tree.items()}
    return tuple(map(_copied, tree)) if isinstance(tree, tuple) else None if tree is None else np.array(tree)
