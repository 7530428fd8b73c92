"""WaveCore with no framework: the whole core over its own state and buffers.

    engine = WaveCoreEngine(arrays, sizes, "float32", weights="bfloat16")
    y, info = engine.step(x_obs, a_prev, r_t)

A step is `wavecore_step.pyx`, allocates no array and reads every weight once, from one end of an array to the other.
Letters: B batch, T time, n slots and d width of a level.
"""

import numpy as np

from cython_ext.algebra cimport real
from cython_ext.dense cimport HALF, WIDTH, Linear, described
from cython_ext.wavecore_step cimport Core, Level, Norm, run

from cython_ext.checks_wavecore import RULES
from cython_ext.threads import one_blas_thread, threads_for
from cython_ext.wavecore_layout import Sizes, place, prepare, state_shapes, stored, work_shapes


cdef bint take(const real[::1] x, void* out) noexcept nogil:
    """Copy an input into its buffer; whether all of it is finite."""
    cdef Py_ssize_t i
    cdef bint spoilt = False
    # out[:] = x; np.isfinite(x).all()
    for i in range(x.shape[0]):
        (<real*> out)[i] = x[i]
        spoilt |= not x[i] - x[i] == 0
    return not spoilt


cdef void* address(array):
    return <void*> <size_t> array.__array_interface__["data"][0]


cdef class WaveCoreEngine:
    """A WaveCore that steps over its own state and buffers. Not for two threads at once; two engines are."""

    cdef Core core
    cdef object _levels, _work, _private, _offsets, _info, _inputs, _weights, _named, _arena
    cdef Py_ssize_t _work_count
    cdef readonly object sizes, dtype, weights, batch
    cdef bint _single

    def __init__(self, arrays, sizes, dtype="float32", weights=None, batch=1):
        """arrays: flat dict, torch names -> NumPy arrays, which are copied. sizes: dict of the fields of `WaveCoreConfig` that
        `wavecore_layout.Sizes` lists, obs_dim, action_dim and output_dim among them. dtype: "float32" or "float64", of the arithmetic and of
        the state. weights: "bfloat16" stores those of every layer of 16 outputs or more in half the bytes, with float32 alone; None: as dtype.
        batch: rows of every input, None for no batch axis.

        Raises ValueError for sizes that cannot be built, missing, unused or misshapen arrays, a dtype or weights that are none, a batch below 1;
        TypeError for sizes with an unknown or a missing entry.
        """
        if dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be 'float32' or 'float64', found {dtype!r}")
        if weights is not None and weights != dtype and not (weights == "bfloat16" and dtype == "float32"):
            raise ValueError(f"weights must be {dtype!r}{' or ' + repr('bfloat16') if dtype == 'float32' else ''}, found {weights!r}")
        sizes = Sizes(**sizes)
        self._set_up(sizes, np.dtype(dtype), weights or dtype, prepare(sizes, arrays, np.dtype(dtype), weights), batch)

    def resized(self, batch):
        """An engine of the same weights, which are shared, for another batch, at the initial state."""
        cdef WaveCoreEngine other = WaveCoreEngine.__new__(WaveCoreEngine)
        other._set_up(self.sizes, self.dtype, self.weights, self._weights, batch)
        return other

    cdef _set_up(self, sizes, dtype, weights, prepared, batch):
        if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
            raise ValueError(f"batch must be an integer of at least 1, or None, found {batch!r}")
        self.sizes, self.dtype, self.weights, self.batch, self._weights = sizes, dtype, weights, batch, prepared
        self._single = dtype == np.float32
        self._named = state_shapes(sizes, () if batch is None else (batch,))
        self._offsets, _ = place(self._named, dtype)
        rows = batch or 1
        shapes = work_shapes(sizes, rows)
        offsets, entries = place(shapes, dtype)
        held = np.empty(entries, dtype)
        self._work = {name: held[at : at + np.prod(shapes[name])].reshape(shapes[name]) for name, at in offsets.items()}
        self._levels = np.zeros(len(sizes.cms_sizes) * sizeof(Level), np.uint8)
        most = max(packed.inputs for packed, _ in prepared[0].values())
        wide = rows > 1 and any(packed.storage == HALF for packed, _ in prepared[0].values())
        self.core.private_step = max(shapes["hidden"][1], most * WIDTH if wide else 0) + 16
        self._private = np.empty(self.core.private_step, dtype)
        self._work_count = rows * sum(packed.inputs * packed.outputs for packed, _ in prepared[0].values())
        self._point(sizes, rows)
        self.bind(self.new_state())
        work, axis = self._work, (lambda value: value) if batch is not None else (lambda value: value[0])
        at = sizes.d_s + sizes.d_e
        self._info = {"query": axis(work["query"]), "context": axis(work["sec"][:, at:])}
        self._info["attention_weights"] = tuple(axis(work[f"attention.{level}"]) for level in range(len(sizes.cms_sizes)))
        for head, name in (("value", "value"), ("world_model", "next_obs")):
            if head in sizes.heads:
                self._info[name] = axis(work[name])
        self._inputs = tuple((name, axis(work[name]).shape) for name in ("x_obs", "a_prev", "r_t"))

    def stored(self):
        """The arrays that the engine holds as they were given, packed or not, under torch's names: whoever needs them again needs no copy."""
        return stored(self.sizes, *self._weights)

    cdef Linear _layer(self, name):
        if name not in self._weights[0]:
            return Linear(NULL, NULL, 0, 0, 0)
        packed, bias = self._weights[0][name]
        return described(packed, bias)

    cdef Norm _norm(self, name):
        cdef Norm norm
        norm.weight, norm.bias = address(self._weights[1][name + ".weight"]), address(self._weights[1][name + ".bias"])
        return norm

    cdef _point(self, sizes, rows):
        """Every field of the struct, from the sizes, the weights and the buffers."""
        cdef Core* e = &self.core
        cdef Level* level
        work, vectors, offsets = self._work, self._weights[1], self._offsets
        e.batch, e.levels, e.joined = rows, len(sizes.cms_sizes), work["joined"].shape[1]
        e.d_s, e.d_w, e.d_p, e.d_e, e.d_k, e.d_c = sizes.d_s, sizes.d_w, sizes.d_p, sizes.d_e, sizes.d_k, sizes.d_c
        e.inner, e.states, e.fresh, e.decoded = sizes.inner, sizes.mamba_state_dim, work["new"].shape[1], work["decoded"].shape[1]
        e.obs_dim, e.output_dim = sizes.obs_dim, sizes.output_dim
        e.s, e.w, e.p = offsets["s"], offsets["w"], offsets["p"]
        e.rule, e.selective, e.continuous = RULES.index(sizes.cms_write), sizes.use_mamba_wave, sizes.output_type == "continuous"
        e.action_head, e.value_head, e.world_head = "action" in sizes.heads, "value" in sizes.heads, "world_model" in sizes.heads
        e.threshold, e.limit = sizes.salience_threshold, sizes.state_saturation_limit
        e.dt_scale, e.dt_min = sizes.mamba_dt_scale, sizes.mamba_dt_min
        e.obs_in, e.obs_out = self._layer("encoder.obs_in"), self._layer("encoder.obs_out")
        e.action, e.reward = self._layer("encoder.action"), self._layer("encoder.reward")
        e.join_in, e.join_out = self._layer("encoder.join_in"), self._layer("encoder.join_out")
        e.query_in, e.query_out = self._layer("cms_read.query_in"), self._layer("cms_read.query_out")
        e.mixing, e.z_proj, e.gate = self._layer("cms_read.mixing"), self._layer("core.z_proj"), self._layer("core.gate")
        e.particle_in, e.particle_out = self._layer("core.particle_in"), self._layer("core.particle_out")
        e.u_p, e.u_w = self._layer("core.U_p"), self._layer("core.U_w")
        e.wave_in, e.wave_gate = self._layer("core.wave.wave_in"), self._layer("core.wave.gate_proj")
        e.dt_proj, e.b_proj = self._layer("core.wave.ssm.dt_proj"), self._layer("core.wave.ssm.b_proj")
        e.c_proj, e.wave_out = self._layer("core.wave.ssm.c_proj"), self._layer("core.wave.wave_out")
        e.modulation, e.b_net = self._layer("core.wave.A_modulation"), self._layer("core.wave.B_net")
        e.a_u, e.a_v = self._layer("core.wave.A_U"), self._layer("core.wave.A_V")
        e.new, e.hidden_in, e.hidden_out = self._layer("cms_write.new"), self._layer("decoder.hidden_in"), self._layer("decoder.hidden_out")
        e.action_out, e.value_out = self._layer("decoder.action"), self._layer("decoder.value")
        e.world_out = self._layer("decoder.world_model")
        e.obs_norm, e.join_norm, e.norm = self._norm("encoder.obs_norm"), self._norm("encoder.join_norm"), self._norm("encoder.norm")
        e.query_norm, e.particle_norm = self._norm("cms_read.query_norm"), self._norm("core.particle_norm")
        e.hidden_norm = self._norm("decoder.hidden_norm")
        if e.selective:
            e.a, e.d = address(vectors["core.wave.ssm.a_raw"]), address(vectors["core.wave.ssm.D"])
            e.b_base, e.c_base = address(vectors["core.wave.ssm.B_base"]), address(vectors["core.wave.ssm.C_base"])
        else:
            e.diagonal = address(vectors["core.wave.A_diag"])
        e.private, e.x_obs, e.a_prev, e.r_t = address(self._private), address(work["x_obs"]), address(work["a_prev"]), address(work["r_t"])
        e.hidden, e.joined_row, e.encoded = address(work["hidden"]), address(work["joined"]), address(work["encoded"])
        e.sec, e.zc, e.pc, e.ser, e.sc = (
            address(work["sec"]), address(work["zc"]), address(work["pc"]), address(work["ser"]), address(work["sc"]))
        e.query, e.answers, e.mix, e.gated = address(work["query"]), address(work["answers"]), address(work["mix"]), address(work["gate"])
        e.channels, e.carry, e.wave, e.particle = (
            address(work["inner"]), address(work["carry"]), address(work["wave"]), address(work["particle"]))
        e.from_p, e.from_w, e.modulated = address(work["from_p"]), address(work["from_w"]), address(work["modulation"])
        e.low, e.lifted, e.fresh_row, e.open = address(work["low"]), address(work["lifted"]), address(work["new"]), address(work["open"])
        e.decoded_row, e.y, e.value, e.next_obs = address(work["decoded"]), address(work["y"]), address(work["value"]), address(work["next_obs"])
        e.level = <Level*> address(self._levels)
        value, key = 0, sum(sizes.cms_dims)
        for index, (slots, width, decay) in enumerate(zip(sizes.cms_sizes, sizes.cms_dims, sizes.cms_decays, strict=True)):
            level = &e.level[index]
            level.project, level.gate = self._layer(f"cms_read.level_proj.{index}.weight"), self._layer(f"cms_write.gate.{index}")
            level.slots, level.width, level.value, level.key, level.keep = slots, width, value, key, 1.0 - decay
            level.memory, level.keys = offsets[f"memories.{index}"], offsets[f"keys.{index}"]
            level.norms, level.scale = offsets[f"norms.{index}"], offsets[f"scales.{index}"]
            level.attention, level.content = address(work[f"attention.{index}"]), address(work[f"content.{index}"])
            value, key = value + width, key + sizes.d_k

    def new_state(self):
        """The state before the first step, as one array; `views` gives its parts."""
        _, entries = place(self._named, self.dtype)
        state = np.zeros(entries, self.dtype)
        for name, part in self.views(state).items():
            if name.startswith("scales"):
                part[...] = 1
        return state

    def views(self, state):
        """The parts of a state by name, s, w, p, memories.l, keys.l, norms.l and scales.l, as views of it."""
        return {name: state[at : at + int(np.prod(self._named[name]))].reshape(self._named[name]) for name, at in self._offsets.items()}

    def bind(self, state):
        """Step over `state`, an array as `new_state` makes it, in place from now on. Raises ValueError for any other."""
        _, entries = place(self._named, self.dtype)
        if not isinstance(state, np.ndarray) or state.dtype != self.dtype or state.shape != (entries,) or not state.flags.carray:
            raise ValueError(f"state must be one contiguous, writeable array of {entries} {self.dtype}, as new_state makes it")
        self._arena = state
        self.core.state = address(state)

    @property
    def state(self):
        """The state that the engine steps over, as one array."""
        return self._arena

    def reset(self):
        """Go back to the state before the first step."""
        self._arena[...] = self.new_state()

    def state_arrays(self):
        """Copies of the parts of the state by name."""
        return {name: part.copy() for name, part in self.views(self._arena).items()}

    def load_state(self, arrays):
        """Take over a state that `state_arrays` gave. Raises ValueError for missing, unused or misshapen arrays and other dtypes."""
        problems = [f"missing {name}" for name in self._named if name not in arrays]
        problems += [f"unused {name}" for name in arrays if name not in self._named]
        for name, shape in self._named.items():
            if name in arrays and (np.shape(arrays[name]) != shape or np.asarray(arrays[name]).dtype != self.dtype):
                problems.append(f"{name} is {np.asarray(arrays[name]).dtype} {np.shape(arrays[name])}, expected {self.dtype} {shape}")
        if problems:
            raise ValueError(f"arrays do not fit the state of this engine: {'; '.join(problems)}")
        for name, part in self.views(self._arena).items():
            part[...] = arrays[name]

    def memories(self):
        """The plain memories and keys of every level: new arrays."""
        parts, levels = self.views(self._arena), range(len(self.sizes.cms_sizes))
        return tuple(tuple(parts[f"scales.{level}"] * parts[f"{kind}.{level}"] for level in levels) for kind in ("memories", "keys"))

    cdef _take(self, values):
        """Copy the inputs of a step into their buffers."""
        cdef void* out
        for (name, shape), value in zip(self._inputs, values, strict=True):
            if not isinstance(value, np.ndarray) or value.dtype != self.dtype:
                raise ValueError(f"{name} must be an array of {self.dtype}, as the engine is, found {getattr(value, 'dtype', type(value).__name__)}")
            if value.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, found {value.shape}")
            out = self.core.x_obs if name == "x_obs" else self.core.a_prev if name == "a_prev" else self.core.r_t
            flat = value.reshape(-1)
            if not (flat.flags.c_contiguous and flat.flags.aligned):
                flat = flat.copy()
            finite = take[float](flat, out) if self._single else take[double](flat, out)
            if not finite:
                raise ValueError(f"{name} {shape} must be finite, found NaN or infinity")

    cdef _run(self):
        cdef int threads = threads_for(64, self._work_count)
        if self._private.size < threads * self.core.private_step:
            self._private = np.empty(threads * self.core.private_step, self.dtype)
            self.core.private = address(self._private)
        if self.core.batch == 1:
            with nogil:
                run(&self.core, self._single, threads)
        else:
            with one_blas_thread(), nogil:
                run(&self.core, self._single, threads)

    def step(self, x_obs, a_prev, r_t):
        """One step on x_obs (B, obs), a_prev (B, action), r_t (B, 1), all of the engine's dtype and finite.

        Returns y (B, output), None without the action head, and info: query, context, attention_weights (one per level), and value (B, 1) and
        next_obs (B, obs) where those heads are on. All of them are views of the engine's buffers, which the next step writes over; `views` of
        `state` shows the state. Raises ValueError, by name, for another shape, another dtype and values that are not finite; the state is then
        what it was.
        """
        self._take((x_obs, a_prev, r_t))
        self._run()
        return self._y(), self._info

    cdef _y(self):
        if not self.core.action_head:
            return None
        return self._work["y"] if self.batch is not None else self._work["y"][0]

    def rollout(self, x_obs, a_prev, r_t):
        """T steps: x_obs (T, B, obs), a_prev (T, B, action), r_t (T, B, 1).

        Returns as `step`, in new arrays with T in front, and fast_state, wave_state and particle_state after every step among the info; the
        bits are those of T calls of `step`. Raises ValueError as `step` does, before the first step, and for times that differ or are none.
        """
        given = dict(zip(("x_obs", "a_prev", "r_t"), (x_obs, a_prev, r_t), strict=True))
        for name, shape in self._inputs:
            value = given[name]
            if not isinstance(value, np.ndarray) or value.dtype != self.dtype:
                raise ValueError(f"{name} must be an array of {self.dtype}, as the engine is, found {getattr(value, 'dtype', type(value).__name__)}")
            if value.ndim == 0 or value.shape[1:] != shape:
                raise ValueError(f"{name} must have shape (T, {', '.join(map(str, shape))}), found {value.shape}")
            if not np.isfinite(value).all():
                raise ValueError(f"{name} {value.shape} must be finite, found NaN or infinity")
        times = [value.shape[0] for value in given.values()]
        if len(set(times)) != 1 or times[0] == 0:
            raise ValueError(f"x_obs, a_prev and r_t must have the same number of steps, at least 1, along their first axis, found {times}")
        parts = self.views(self._arena)
        sources = {**self._info, **{name: parts[key] for name, key in (("fast_state", "s"), ("wave_state", "w"), ("particle_state", "p"))}}
        attention = sources.pop("attention_weights")
        y = self._y()
        flat = [*sources.values(), *attention] + ([] if y is None else [y])
        stacked = [np.empty((times[0], *value.shape), self.dtype) for value in flat]
        pairs = list(zip(stacked, flat, strict=True))
        for t in range(times[0]):
            self._take((x_obs[t], a_prev[t], r_t[t]))
            self._run()
            for out, value in pairs:
                out[t] = value
        info = dict(zip(sources, stacked))
        info["attention_weights"] = tuple(stacked[len(sources) : len(sources) + len(attention)])
        return None if y is None else stacked[len(flat) - 1], info
