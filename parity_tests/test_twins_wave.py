"""WaveCore in torch and JAX against its independent NumPy twin, over every field of the configuration, in float64.

What the golden vectors do not reach is proved here: the write to the least salient row, the linear wave, several states to a channel, two
and four levels, every head, discrete outputs, a clip that bites between p~ and U_p. Gradients are in `test_twins_wave_gradients.py`.
Letters: B batch, T time, n slots of a level, d width of a level.
"""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest

from conf.models import WaveCoreConfig
from parity_tests.twins_wave import WaveCoreTwin

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

from jax_impl.functional import WaveCoreModel  # noqa: E402
from parity_tests.harness.adapters.nnx_trace import quick_options  # noqa: E402
from torch_impl.wavecore import WaveCore  # noqa: E402

# The project's bound between two implementations over a rollout: a dozen steps of some 1e3 roundings of 1e-16 each.
BOUND = 1e-11
STEPS, BATCH = 13, 3  # more steps than the smallest level has slots
OBS, ACTION, OUTPUT = 11, 5, 19
SEED = 3  # with which every level of every variant is written and kept, see `test_the_runs_reach_what_they_are_for`
BASE = WaveCoreConfig(
    d_s=13, d_w=21, d_p=10, d_e=15, d_k=6, d_c=14, num_levels=3, cms_sizes=(5, 7, 12), cms_dims=(10, 17, 22), cms_decays=(0.2, 0.07, 0.03),
)
TWO = dict(num_levels=2, cms_sizes=(7, 5), cms_dims=(17, 10), cms_decays=(0.11, 0.11))
FOUR = dict(num_levels=4, cms_sizes=(5, 7, 12, 3), cms_dims=(10, 17, 22, 6), cms_decays=(0.2, 0.07, 0.07, 0.03))
ALL = ("action", "value", "world_model")
VARIANTS = {
    "default": {},
    "slot0": {"cms_write": "slot0"},
    "three states to a channel, two levels": {"mamba_state_dim": 3, **TWO},
    "step size": {"mamba_dt_min": 0.3, "mamba_dt_scale": 0.6},
    "linear wave, four levels, discrete": {"use_mamba_wave": False, "output_type": "discrete", **FOUR},
    "linear wave, slot0, all heads": {"use_mamba_wave": False, "cms_write": "slot0", "heads": ALL},
    "one level, value alone": {"num_levels": 1, "cms_sizes": (5,), "cms_dims": (10,), "cms_decays": (0.2,), "heads": ("value",)},
    "no limit": {"state_saturation_limit": 0.0, "heads": ("world_model", "action")},
    "low limit": {"state_saturation_limit": 0.7},
    "threshold": {"salience_threshold": 0.62},
    "many at once": {
        "mamba_state_dim": 3, "salience_threshold": 0.4, "state_saturation_limit": 3.0, "heads": ALL, "mamba_dt_min": 0.01, **FOUR,
        "cms_decays": (0.95, 0.9, 0.07, 0.03),  # the lazy scale of two levels is folded into the memory within four steps
    },
}
# In JAX each takes seconds to compile; these use every line of the model but the choice of heads.
IN_JAX = ("default", "three states to a channel, two levels", "linear wave, four levels, discrete", "no limit", "many at once")


def config_of(variant):
    return replace(BASE, **VARIANTS[variant])


def randomised(config):
    """Every leaf away from zero and one, kernels of unit gain, under torch's names."""
    generator = np.random.default_rng([1, SEED])
    arrays = {}
    for name, value in WaveCore(config, OBS, ACTION, OUTPUT).state_dict().items():
        noise = generator.standard_normal(tuple(value.shape))
        if "norm.weight" in name:
            arrays[name] = 1.0 + 0.2 * noise
        else:
            arrays[name] = noise * (value.shape[1] ** -0.5 if value.ndim == 2 and not name.endswith(("_raw", "_base")) else 0.3)
    return arrays


def start(config, batch=BATCH, near=9.5):
    """States of size one but for p, whose entries lie between `near` and near + 0.5 in size; a memory that is not empty."""
    generator = np.random.default_rng([2, SEED])
    state = WaveCoreTwin(config, {}).init_state(batch)
    for name in "sw":
        state[name] += generator.standard_normal(state[name].shape)
    state["p"] += generator.choice([-1.0, 1.0], state["p"].shape) * generator.uniform(near, near + 0.5, state["p"].shape)
    for name in ("memories", "keys"):
        state[name] = [generator.standard_normal(level.shape) for level in state[name]]
    return state


def inputs(steps=STEPS, batch=BATCH):
    generator = np.random.default_rng([3, SEED])
    return tuple(generator.standard_normal((steps, batch, width)) for width in (OBS, ACTION, 1))


def held_of(state):
    """States and plain memory as the eight-argument call takes them."""
    return state["s"], state["w"], state["p"], tuple(state["memories"]), tuple(state["keys"])


def by_call(module, held, x_obs, a_prev, r_t):
    """One step of a module of either framework; info, with "action" for y, and what the next step takes."""
    y, info = module(x_obs, a_prev, r_t, *held)
    held = tuple(info[name] for name in ("fast_state", "wave_state", "particle_state", "cms_memories", "cms_keys"))
    return info | ({} if y is None else {"action": y}), held


def by_step(module, held, x_obs, a_prev, r_t):
    """As `by_call`; the first `held` is plain, the next ones are lazy states."""
    y, state, info = module.step(held if hasattr(held, "scales") else module.state(*held), x_obs, a_prev, r_t)
    memories, keys = module.memories(state)
    return info | {"cms_memories": memories, "cms_keys": keys} | ({} if y is None else {"action": y}), state


def by_rollout(module, held, x_obs, a_prev, r_t):
    """All steps: info with T in front, but the last memory alone."""
    y, state, info = module.rollout(module.state(*held), x_obs, a_prev, r_t)
    memories, keys = module.memories(state)
    return info | {"cms_memories": memories, "cms_keys": keys} | ({} if y is None else {"action": y}), state


class Torch:
    """The module in float64, on trees of NumPy arrays."""

    def __init__(self, config, arrays):
        self.module = WaveCore(config, OBS, ACTION, OUTPUT).double()
        self.module.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()}, strict=True)

    def run(self, function, *arguments):
        """function(module, *arguments)."""
        with torch.no_grad():
            return function(self.module, *jax.tree.map(torch.as_tensor, arguments))

    def gradients(self, loss, *arguments):
        """Of loss(module, *arguments): to the parameters, by name, and to the arguments."""
        arguments = jax.tree.map(lambda leaf: torch.tensor(leaf, requires_grad=True), arguments)
        loss(self.module, *arguments).backward()
        slopes = {name: value.grad.numpy() for name, value in self.module.named_parameters()}
        return slopes, jax.tree.map(lambda leaf: leaf.grad.numpy(), arguments)


class Jax:
    """As `Torch`, jitted."""

    def __init__(self, config, arrays):
        self.model, self.programs = WaveCoreModel(config, OBS, ACTION, OUTPUT, dtype="float64"), {}
        with jax.enable_x64(True):
            self.variables = self.model.variables(arrays)

    def run(self, function, *arguments):
        with jax.enable_x64(True):
            if function not in self.programs:
                self.programs[function] = quickly(lambda variables, *rest: function(self.model.merge(variables), *rest))
            return self.programs[function](self.variables, *jax.tree.map(jax.numpy.asarray, arguments))

    def gradients(self, loss, *arguments):
        with jax.enable_x64(True):
            arguments = self.variables, *jax.tree.map(jax.numpy.asarray, arguments)
            every = tuple(range(len(arguments)))
            slopes = jax.grad(lambda variables, *rest: loss(self.model.merge(variables), *rest), argnums=every)
            found, *rest = quickly(slopes)(*arguments)
            return self.model.arrays(found), jax.tree.map(np.asarray, tuple(rest))


def quickly(function):
    """`function` jitted in a third of the usual time: it runs a few times only."""
    return jax.jit(function, compiler_options=quick_options())


BACKENDS = {"torch": Torch, "jax": Jax}


def assert_close(found, expected, what):
    found = np.asarray(found)
    assert found.dtype == expected.dtype == np.float64 and found.shape == expected.shape, what
    assert np.isfinite(expected).all() and np.linalg.norm(found - expected) <= BOUND * np.linalg.norm(expected), what


def assert_same_step(info, out, state, where):
    """Everything that a step says, and the memory where it is there."""
    expected = {name: value for name, value in out.items() if name not in ("unclipped", "rows", "open")}
    assert info.keys() - {"cms_memories", "cms_keys"} == expected.keys(), where
    expected |= {name: state[name[4:]] for name in ("cms_memories", "cms_keys") if name in info}
    for name, value in expected.items():
        if not isinstance(value, list):
            assert_close(info[name], value, f"{name} {where}")
            continue
        assert len(info[name]) == len(value), f"{name} {where}"
        for level, one in enumerate(value):
            assert_close(info[name][level], one, f"{name} of level {level} {where}")


def assert_same_run(model, twin, state, sequence, by):
    """Every step of a run, by the eight-argument call, by step, or by rollout."""
    held, expected = held_of(state), state
    if by == "rollout":
        info = model.run(by_rollout, held, *sequence)[0]
        memory = {name: info.pop(name) for name in ("cms_memories", "cms_keys")}
    for t, step in enumerate(zip(*sequence, strict=True)):
        out, expected = twin.step(expected, *step)
        if by == "rollout":
            one = jax.tree.map(lambda leaf, t=t: leaf[t], info) | (memory if t == len(sequence[0]) - 1 else {})
        else:
            one, held = model.run({"call": by_call, "step": by_step}[by], held, *step)
        assert_same_step(one, out, expected, f"after step {t}")


@pytest.mark.parametrize(
    ("backend", "by", "variant"),
    [("torch", by, variant) for by in ("call", "rollout") for variant in VARIANTS] + [("torch", "step", "default")]
    + [("jax", "rollout", variant) for variant in IN_JAX] + [("jax", "call", "default")],
)
def test_every_step(backend, by, variant):
    config = config_of(variant)
    arrays = randomised(config)
    assert_same_run(BACKENDS[backend](config, arrays), WaveCoreTwin(config, arrays), start(config), inputs(), by)


@lru_cache
def told(variant):
    """What the twin says of every step of a variant."""
    config = config_of(variant)
    return WaveCoreTwin(config, randomised(config)).rollout(start(config), *inputs())[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_runs_reach_what_they_are_for(variant):
    """Both sides of every choice; a clip that changes p~ in the first step already, so that U_p must see it before."""
    config, steps = config_of(variant), told(variant)
    rows, is_open = (np.array([out[name] for out in steps]) for name in ("rows", "open"))  # (T, B, levels)
    beyond = np.abs(steps[0]["unclipped"][:, -config.d_p :]) > 10.0
    assert beyond.any()
    if config.state_saturation_limit == 10.0:
        assert not beyond.all()
    if config.cms_write == "slot0":
        assert not rows.any() and is_open.all()
        return
    for level in range(config.num_levels):
        assert len(np.unique(rows[:, :, level])) > 2 and 0 < is_open[:, :, level].mean() < 1
    assert (rows[:, 0] != rows[:, 1]).any()  # each element of the batch has its own row


def test_every_variant_is_another_function():
    """Otherwise a field that nobody reads would pass."""
    last = {variant: told(variant)[-1] for variant in VARIANTS}
    names = list(last)
    for i, first in enumerate(names):
        for second in names[:i]:
            gap = last[first]["wave_state"] - last[second]["wave_state"]
            assert np.linalg.norm(gap) > 1e-3 * np.linalg.norm(last[second]["wave_state"]), (first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_memory_fills_in_order(backend):
    """Empty rows are a tie, which the lowest wins: 0, 1, 2, ..., in every level, until it is full."""
    config = config_of("default")
    arrays = randomised(config)
    for level in range(config.num_levels):
        arrays[f"cms_write.gate.{level}.weight"] *= 0.05
        arrays[f"cms_write.gate.{level}.bias"][:] = 3.0  # every gate is open, and none at one
    model, twin = BACKENDS[backend](config, arrays), WaveCoreTwin(config, arrays)
    state = start(config) | {name: twin.init_state(BATCH)[name] for name in ("memories", "keys")}
    held, expected = held_of(state), state
    for t, step in enumerate(zip(*inputs(), strict=True)):
        out, expected = twin.step(expected, *step)
        info, held = model.run(by_step, held, *step)
        assert_same_step(info, out, expected, f"after step {t}")
        for name in ("cms_memories", "cms_keys"):
            for level, size in enumerate(config.cms_sizes):
                filled = np.asarray(info[name][level]).any(-1)  # (B, n)
                assert (filled == (np.arange(size) <= t)).all(), (name, level, t)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by", [by_call, by_step])
def test_a_gate_at_the_threshold_is_closed(backend, by):
    """Strictly greater: a gate of exactly 1/2 keeps the row, one of 1/2 + 2.5e-13 writes it, one of 1/2 - 2.5e-13 keeps it."""
    config = config_of("default")
    arrays = randomised(config)
    for level, logit in enumerate((0.0, 1e-12, -1e-12)):
        arrays[f"cms_write.gate.{level}.weight"][:] = 0.0
        arrays[f"cms_write.gate.{level}.bias"][:] = logit
    step = tuple(x[0] for x in inputs())
    out, expected = WaveCoreTwin(config, arrays).step(start(config), *step)
    assert out["open"].tolist() == [[False, True, False]] * BATCH
    info, _ = BACKENDS[backend](config, arrays).run(by, held_of(start(config)), *step)
    assert_same_step(info, out, expected, "after the step")
    before = start(config)
    for level, decay in enumerate(config.cms_decays):
        kept = [np.abs(np.asarray(info["cms_" + name][level]) / ((1 - decay) * before[name][level]) - 1) < 1e-12 for name in ("memories", "keys")]
        assert all(one.all() for one in kept) == (level != 1)
