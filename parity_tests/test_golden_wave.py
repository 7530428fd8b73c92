"""WaveCore against ContinuonBrain's JAX code: outputs, states and contexts after each of 4 steps, and the memory after the last, in float64.

The vectors come from that code itself (`golden/wavecore_small.npz`: mamba wave, writes to slot 0). What they do not reach is in
`test_twins_wave.py`. Letters: B batch, T time.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from conf.models import WaveCoreConfig
from parity_tests.twins_wave import WaveCoreTwin
from runtime import build, public, read_arrays

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

from jax_impl.functional import WaveCoreModel  # noqa: E402
from parity_tests.harness.adapters.nnx_trace import quick_options  # noqa: E402
from torch_impl.wavecore import WaveCore  # noqa: E402

# The bound of the project's acceptance; four steps are met to some 1e-15.
BOUND = 1e-10
LEVELS = range(3)
PER_STEP = ("y", "context", "fast_state", "wave_state", "particle_state")


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    """{"inputs": {...}, "weights": {...}, "outputs": {...}, and "config", "cms_sizes", "cms_dims", "cms_decays"}."""
    tree: dict[str, Any] = {}
    for key, value in read_arrays(Path(__file__).parent / "golden" / "wavecore_small.npz").items():
        group, _, rest = key.partition("/")
        if rest:
            tree.setdefault(group, {})[rest] = value
        else:
            tree[group] = value
    return tree


def config_of(golden: dict[str, Any]) -> tuple[WaveCoreConfig, tuple[int, int, int]]:
    """The configuration, and the widths of observation, action and output; the file says them."""
    names = ("d_s", "d_w", "d_p", "d_e", "d_k", "d_c", "mamba_state_dim")
    sizes = [int(size) for size in golden["config"]]
    cms = {name: golden[name].tolist() for name in ("cms_sizes", "cms_dims", "cms_decays")}
    return WaveCoreConfig(**dict(zip(names, sizes[:7], strict=True)), **cms, cms_write="slot0"), tuple(sizes[7:])


def held_of(golden: dict[str, Any]) -> tuple[Any, ...]:
    inputs = golden["inputs"]
    return inputs["s"], inputs["w"], inputs["p"], *(tuple(inputs[f"cms_{kind}_{level}"] for level in LEVELS) for kind in ("memory", "key"))


def steps(call: Any, module: Any, held: tuple[Any, ...], sequence: tuple[Any, ...], by: str) -> dict[str, Any]:
    """What a core of either framework says, under the golden file's names: lists over steps, or arrays with the step in front."""
    if by == "rollout":
        y, state, info = module.rollout(module.state(*held), *sequence)
        return {"y": y} | {name: info[name] for name in PER_STEP if name != "y"} | named(*module.memories(state))
    found: dict[str, Any] = {name: [] for name in PER_STEP}
    state = module.state(*held)
    for x_obs, a_prev, r_t in zip(*sequence, strict=True):
        if by == "step":
            y, state, info = module.step(state, x_obs, a_prev, r_t)
        else:
            y, info = call(x_obs, a_prev, r_t, *held)
            held = tuple(info[name] for name in ("fast_state", "wave_state", "particle_state", "cms_memories", "cms_keys"))
        for name, values in found.items():
            values.append(y if name == "y" else info[name])
    return found | named(*(module.memories(state) if by == "step" else held[3:]))


def named(memories: Any, keys: Any) -> dict[str, Any]:
    return {f"cms_{kind}_{level}": value for kind, levels in (("memory", memories), ("key", keys)) for level, value in enumerate(levels)}


def run_torch(golden: dict[str, Any], arrays: dict[str, np.ndarray], by: str) -> dict[str, Any]:
    config, sizes = config_of(golden)
    module = WaveCore(config, *sizes).double()
    module.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()}, strict=True)
    with torch.no_grad():
        return steps(module, module, *jax.tree.map(torch.from_numpy, (held_of(golden), sequence_of(golden))), by)


def run_jax(golden: dict[str, Any], arrays: dict[str, np.ndarray], by: str) -> dict[str, Any]:
    config, sizes = config_of(golden)
    model = WaveCoreModel(config, *sizes, dtype="float64")
    with jax.enable_x64(True):
        variables = model.variables(arrays)
        call, step, rollout = (
            jax.jit(partial(function, variables), compiler_options=quick_options()) for function in (model.apply, model.step, model.rollout)
        )
        bound = SimpleNamespace(step=step, rollout=rollout, state=model.state, memories=model.memories)
        return steps(call, bound, *jax.tree.map(jax.numpy.asarray, (held_of(golden), sequence_of(golden))), by)


def run_cython(golden: dict[str, Any], arrays: dict[str, np.ndarray], by: str) -> dict[str, Any]:
    pytest.importorskip("cython_ext.wavecore_engine")
    config, sizes = config_of(golden)
    model = build("wavecore", config.sized(*sizes), "cython", arrays, "float64")
    return steps(model, model, held_of(golden), sequence_of(golden), by)


def run_twin(golden: dict[str, Any], arrays: dict[str, np.ndarray], by: str) -> dict[str, Any]:
    state = dict(zip(("s", "w", "p", "memories", "keys"), held_of(golden), strict=True))
    outs, last = WaveCoreTwin(config_of(golden)[0], arrays).rollout(state, *sequence_of(golden))
    return {name: [out["action" if name == "y" else name] for out in outs] for name in PER_STEP} | named(last["memories"], last["keys"])


def sequence_of(golden: dict[str, Any]) -> tuple[np.ndarray, ...]:
    return tuple(golden["inputs"][name] for name in ("x_obs", "a_prev", "r_t"))


def assert_same(found: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    """Every array within BOUND relative L2, every step by itself, and none missing on either side."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        one = np.stack([np.asarray(step) for step in found[key]])
        assert one.dtype == np.float64 and one.shape == value.shape, key
        for t, (mine, theirs) in enumerate(zip(one, value, strict=True) if key in PER_STEP else [(one, value)]):
            assert np.linalg.norm(mine - theirs) <= BOUND * np.linalg.norm(theirs), (key, t)


RUNS = {"torch": run_torch, "jax": run_jax, "cython": run_cython, "twin": run_twin}


@pytest.mark.parametrize(
    ("backend", "by"), [(backend, by) for backend in ("torch", "jax", "cython") for by in ("call", "step", "rollout")] + [("twin", "step")]
)
def test_every_vector(backend: str, by: str, golden: dict[str, Any]) -> None:
    assert_same(RUNS[backend](golden, public.rename("wavecore", golden["weights"]), by), golden["outputs"])


@pytest.mark.parametrize(("leaf", "entry"), [("core.wave.ssm.a_raw", (3, 0)), ("cms_write.key.2.weight", (5, 7)), ("decoder.action.bias", (4,))])
def test_a_changed_weight_is_noticed(leaf: str, entry: tuple[int, ...], golden: dict[str, Any]) -> None:
    """The bound can fail: one entry, changed by 1e-6."""
    arrays = public.rename("wavecore", golden["weights"])
    arrays[leaf] = arrays[leaf].copy()
    arrays[leaf][entry] += 1e-6
    with pytest.raises(AssertionError):
        assert_same(run_torch(golden, arrays, "rollout"), golden["outputs"])
