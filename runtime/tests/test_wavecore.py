"""WaveCore by the one door: counts, the same numbers on every backend, the state that can be saved in the middle, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest

import runtime
from conf.models import TIER_SIZES, GroundedMambaConfig, WaveCoreConfig
from runtime import core_state
from runtime.arrays import layout, parameter_count
from runtime.files import write_arrays
from runtime.init import init_arrays

NAME = "wavecore"
WIDTHS = dict(obs_dim=19, action_dim=17, output_dim=22)
COUNTS = {"v2.0": 954_697, "v3.0": 3_408_521, "v4.0": 12_813_577}
NEEDED = {"torch": ["torch"], "torch_compiled": ["torch", "cython_ext.cms"], "jax": ["jax", "flax"], "cython": ["cython_ext.wavecore_engine"]}
# The bound that the project promises between two backends in float64, end to end.
END_TO_END = 1e-11


@pytest.fixture(scope="module")
def cores(core_config, core_arrays):
    """A float64 model on each backend that is there, of the same weights."""
    for packages in NEEDED.values():
        for package in packages:
            pytest.importorskip(package)
    return {backend: runtime.build(NAME, core_config, backend, core_arrays, "float64") for backend in NEEDED}


@pytest.fixture(params=NEEDED)
def core(request, cores):
    return cores[request.param]


def inputs(steps=20, batch=3, seed=1):
    """x_obs, a_prev, r_t, time first; `batch` None for none, `steps` None for one step."""
    generator = np.random.default_rng(seed)
    axes = (() if steps is None else (steps,)) + (() if batch is None else (batch,))
    return tuple(generator.standard_normal((*axes, width)) for width in (19, 17, 1))


def plain(batch=3, seed=2):
    """s, w, p, memories and keys, none of them zero."""
    generator = np.random.default_rng(seed)
    s, w, p = (generator.standard_normal((batch, width)) for width in (13, 21, 9))
    memories = tuple(generator.standard_normal((batch, *level)) for level in ((3, 10), (6, 14)))
    return s, w, p, memories, tuple(generator.standard_normal((batch, size, 5)) for size in (3, 6))


def native(core, value):
    if core.backend == "jax":
        import jax

        with jax.enable_x64(True):
            return jax.numpy.asarray(value)
    if core.backend == "cython":
        return np.array(value)
    import torch

    return torch.as_tensor(value)


def leaves(tree):
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in leaves(tree[key])]
    return [leaf for value in tree for leaf in leaves(value)] if isinstance(tree, tuple) else [tree]


def distance(found, expected):
    """The largest relative distance of the leaves of two trees of the same structure."""
    pairs = list(zip(leaves(found), leaves(expected), strict=True))
    return max(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)) for a, b in pairs)


def bits(arrays):
    return {key: (value.dtype, value.shape, value.tobytes()) for key, value in arrays.items()}


@pytest.mark.parametrize("changes", [
    {}, dict(use_mamba_wave=False), dict(heads=("world_model",)), dict(heads=("value", "action"), mamba_state_dim=7),
    dict(num_levels=3, cms_sizes=(3, 6, 7), cms_dims=(10, 14, 12), cms_decays=(0.3, 0.2, 0.1)),
])
def test_the_layout_is_the_state_dict(core_config, changes):
    pytest.importorskip("torch")
    from torch_impl.wavecore import WaveCore

    config = replace(core_config, **changes)
    held = WaveCore(config, **WIDTHS).state_dict()
    assert [(key, entry.shape) for key, entry in layout(NAME, config).items()] == [(key, tuple(value.shape)) for key, value in held.items()]


def test_the_published_parameter_counts():
    for tier, count in COUNTS.items():
        assert parameter_count(NAME, WaveCoreConfig.tier(tier).sized(**TIER_SIZES[tier])) == count
    assert sum(value.size for value in init_arrays(NAME, WaveCoreConfig.pi5_optimized().sized(768, 64, 64)).values()) == COUNTS["v2.0"]


def test_the_published_parameter_counts_in_torch():
    torch = pytest.importorskip("torch")
    from torch_impl.wavecore import WaveCore

    for tier, count in COUNTS.items():
        with torch.device("meta"):
            assert sum(value.numel() for value in WaveCore(WaveCoreConfig.tier(tier), **TIER_SIZES[tier]).parameters()) == count
    model = runtime.build(NAME, WaveCoreConfig.tier("v2.0"), "torch", **TIER_SIZES["v2.0"])
    assert sum(value.numel() for value in model.module.parameters()) == COUNTS["v2.0"]


def test_the_published_parameter_counts_in_jax():
    jax, nnx = pytest.importorskip("jax"), pytest.importorskip("flax.nnx")
    from jax_impl.wavecore import WaveCore

    for tier, count in COUNTS.items():
        shapes = nnx.eval_shape(lambda tier=tier: WaveCore(WaveCoreConfig.tier(tier), **TIER_SIZES[tier], rngs=nnx.Rngs(0)))
        assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(shapes, nnx.Param))) == count
    model = runtime.build(NAME, WaveCoreConfig.tier("v2.0"), "jax", **TIER_SIZES["v2.0"])
    assert model.variables.keys() == {"params"}
    assert sum(leaf.size for leaf in jax.tree.leaves(model.variables)) == COUNTS["v2.0"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("backend", NEEDED)
def test_same_seed_same_weights(core_config, backend, dtype):
    for package in NEEDED[backend]:
        pytest.importorskip(package)
    config = WaveCoreConfig(**{name: getattr(core_config, name) for name in WaveCoreConfig.__dataclass_fields__})
    model = runtime.build(NAME, config, backend, dtype=dtype, seed=6, **WIDTHS)
    assert bits(model.arrays()) == bits({key: value.astype(dtype) for key, value in init_arrays(NAME, core_config, 6).items()})
    assert (model.name, model.config, model.dtype, model.backend) == (NAME, core_config, dtype, backend)
    state = model.init_state(3)
    assert {key: value.shape for key, value in model.state_arrays(state).items()} == core_state.shapes(core_config, 3)
    assert all(value.dtype == dtype and value.any() == key.startswith("scales") for key, value in model.state_arrays(state).items())


def test_backends_agree_over_a_rollout_and_over_its_steps(cores):
    x, a, r = inputs()
    results = {backend: model.rollout(model.state(*plain()), x, a, r) for backend, model in cores.items()}
    y, state, info = results["torch"]
    assert y.shape == (20, 3, 22) and info["next_obs"].shape == (20, 3, 19) and info["attention_weights"][1].shape == (20, 3, 6)
    assert all(isinstance(leaf, np.ndarray) and leaf.dtype == np.float64 for result in results.values() for leaf in leaves(result))
    for backend in ("jax", "cython"):
        assert results[backend][2].keys() == info.keys()
        assert distance(results[backend], results["torch"]) < END_TO_END
    assert 0.8**20 < 1.01 * state.scales[1] < 0.8**19  # lazy to the end, while the other level was folded
    assert state.scales[0] == 1
    for model in cores.values():
        state, outputs = model.state(*plain()), []
        for now in zip(x, a, r, strict=True):
            out, state, _ = model.step(state, *now)
            outputs.append(out)
        assert distance((np.stack(outputs), tuple(state)), (y, tuple(results["torch"][1]))) < END_TO_END


def test_the_call_on_a_plain_memory_is_the_step(cores):
    now, held = inputs(None), plain()
    results = {backend: model(*now, *held) for backend, model in cores.items()}
    for backend in ("jax", "cython"):
        assert distance(results[backend], results["torch"]) < END_TO_END
    for backend, model in cores.items():
        y, state, info = model.step(model.state(*held), *now)
        expected, carried = results[backend]
        assert distance((y, *model.memories(state)), (expected, carried["cms_memories"], carried["cms_keys"])) < END_TO_END
        assert carried.keys() == info.keys() | {"cms_memories", "cms_keys"} and info.keys() >= {"query", "context", "value", "next_obs"}


def test_results_are_of_the_kind_of_what_they_come_from(core):
    own, now = type(native(core, np.zeros(2))), inputs(None)
    given, held = [native(core, value) for value in now], core.init_state(3)
    kinds = {isinstance(leaf, own) for leaf in leaves(tuple(held))}
    assert kinds == {True}
    for observed, start, out, carried in (
        (now, held, np.ndarray, own), (given, held, own, own), (given, core.step(held, *now)[1], own, own),
        (now, core.state(*plain()), np.ndarray, np.ndarray), (given, core.state(*plain()), own, own),
    ):
        y, state, info = core.step(start, *observed)
        assert isinstance(y, out) and all(isinstance(leaf, out) for leaf in leaves(info))
        assert all(isinstance(leaf, carried) for leaf in leaves(tuple(state))) and state._fields == held._fields
        assert isinstance(core.memories(state)[1][0], carried)
    y, info = core(*given, *plain())
    assert isinstance(y, own) and isinstance(info["cms_keys"][1], own)


def test_without_a_batch_axis_and_from_lists(core):
    now, held = inputs(None, None), core.init_state()
    y, state, info = core.step(held, *now)
    assert y.shape == (22,) and state.s.shape == (13,) and info["value"].shape == (1,) and info["attention_weights"][0].shape == (3,)
    again, after, _ = core.step(held, *(value.tolist() for value in now))
    assert np.array_equal(again, y) and bits(core.state_arrays(after)) == bits(core.state_arrays(state))


def test_numpy_results_share_no_memory_with_the_state(core):
    held = plain()
    given = core.state(*held)
    before = bits(core.state_arrays(given))
    held[0][...], held[3][1][...] = 7, 7
    _, state, info = core.step(given, *inputs(None))
    assert bits(core.state_arrays(given)) == before
    after = bits(core.state_arrays(state))
    info["fast_state"][...] = 7
    assert bits(core.state_arrays(state)) == after
    core.state_arrays(state)["s"][...] = 7
    assert bits(core.state_arrays(state)) == after


def test_gradients_pass_through_the_torch_door(cores):
    import torch

    model, x = cores["torch"], [torch.as_tensor(value) for value in inputs(4)]
    y, state, _ = model.rollout(model.init_state(3), *x)
    (y.square().sum() + state.memories[1].square().sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for key, parameter in model.module.named_parameters() if "decoder" not in key)
    model.module.zero_grad()
    y, state, _ = model.rollout(state, *inputs(4))
    assert isinstance(y, np.ndarray) and not state.s.requires_grad and torch.is_grad_enabled()


def test_a_second_model_and_a_second_step_compile_nothing(cores, core_config):
    from runtime import jax_backend

    other = runtime.build(NAME, core_config, "jax", dtype="float64", seed=9)
    for name, now in (("step", inputs(None)), ("rollout", inputs())):
        compiled = jax_backend._compiled_core(core_config, "float64", name)
        getattr(other, name)(other.init_state(3), *now)
        count = compiled._cache_size()
        for model in (cores["jax"], other):
            _, state, _ = getattr(model, name)(model.init_state(3), *now)
            getattr(model, name)(state, *now)
        assert compiled._cache_size() == count


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_a_state_saved_in_the_middle_goes_on_to_the_same_bits(core, tmp_path, ending):
    x, a, r = inputs(24)
    state, path = core.state(*plain()), tmp_path / f"state.{ending}"
    for step, now in enumerate(zip(x, a, r, strict=True)):
        if step == 11:
            arrays = core.state_arrays(state)
            assert 2.0**-10 < arrays["scales.0"] < 1  # in the middle of a lazy decay
            np.savez(path, **arrays) if ending == "npz" else write_arrays(path, arrays)
        y, state, _ = core.step(state, *now)
    assert core.state_arrays(state)["scales.0"] > 0.7**24  # and folded since
    resumed = core.load_state(runtime.read_arrays(path))
    assert bits(core.state_arrays(resumed)) == bits(arrays)
    for now in zip(x[11:], a[11:], r[11:], strict=True):
        again, resumed, _ = core.step(resumed, *now)
    assert np.array_equal(again, y) and bits(core.state_arrays(resumed)) == bits(core.state_arrays(state))


@pytest.mark.parametrize("pair", [("torch", "jax"), ("torch", "cython"), ("cython", "torch"), ("cython", "jax")])
def test_a_state_of_one_backend_goes_on_in_the_other(cores, pair):
    (first, second), now = (cores[name] for name in pair), inputs()
    _, state, _ = first.rollout(first.state(*plain()), *now)
    moved = second.load_state(first.state_arrays(state))
    assert distance(second.rollout(moved, *now), first.rollout(state, *now)) < END_TO_END
    assert distance(second.rollout(state, *now), first.rollout(state, *now)) < END_TO_END  # NumPy arrays in the other's CoreState


@pytest.mark.parametrize("change, message", [
    (lambda a: a.pop("norms.1"), r"missing: norms\.1$"),
    (lambda a: a.update({"memories.2": a["memories.1"], "keys.2": a["keys.1"]}), r"with 2 levels: unused: memories\.2, keys\.2$"),
    (lambda a: a.update({"memories.0": a["memories.1"]}), r"wrong shape: memories\.0 is \(3, 6, 14\), expected \(3, 3, 10\)$"),
    (lambda a: a.update({"w": a["w"][:2]}), r"wrong shape: w is \(2, 21\), expected \(3, 21\)$"),
    (lambda a: a.update({"s": a["s"][0]}), r"wrong shape: s is .*|wrong shape: w is \(3, 21\), expected \(21,\)"),
    (lambda a: a.update({"scales.0": np.ones(3)}), r"wrong shape: scales\.0 is \(3,\), expected \(\)$"),
    (lambda a: a.update({"p": a["p"].astype(np.float32)}), r"wrong dtype: p is float32, expected float64$"),
    (lambda a: a["keys.1"].__setitem__((1, 2, 3), np.nan), r"wrong values: keys\.1 holds NaN or infinity$"),
    (lambda a: a.update({"scales.1": np.array(0.0)}), r"wrong values: scales\.1 is 0\.0, expected a scale in \(0, 1\]$"),
    (lambda a: a["norms.0"].__setitem__((0, 0), -1.0), r"wrong values: norms\.0 has a squared norm of -1\.0, expected none below 0$"),
])
def test_a_state_that_does_not_fit(core, change, message):
    arrays = core.state_arrays(core.init_state(3))
    change(arrays)
    with pytest.raises(ValueError, match=message) as caught:
        core.load_state(arrays)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change, message", [
    (dict(x_obs=np.zeros((3, 18))), r"x_obs must have shape \(batch, 19\) or \(19,\), none of them 0, found \(3, 18\)"),
    (dict(x_obs=np.zeros((0, 19))), r"x_obs must have shape .*found \(0, 19\)"),
    (dict(a_prev=np.zeros((3, 16))), r"a_prev must have shape \(3, 17\) with x_obs \(3, 19\), found \(3, 16\)"),
    (dict(r_t=np.zeros(3)), r"r_t must have shape \(3, 1\) with x_obs \(3, 19\), found \(3,\)"),
    (dict(x_obs=np.full((3, 19), np.nan)), r"x_obs \(3, 19\) must be finite, found NaN or infinity"),
    (dict(a_prev=np.zeros((3, 17), np.float32)), r"a_prev must have dtype .*float64, as the weights have, found .*float32"),
    (dict(x_obs=np.zeros((2, 19)), a_prev=np.zeros((2, 17)), r_t=np.zeros((2, 1))), r"state\.s must have shape \(2, 13\) .*found \(3, 13\)"),
    (dict(x_obs=np.zeros(19), a_prev=np.zeros(17), r_t=np.zeros(1)), r"state\.s must have shape \(13,\) .*found \(3, 13\)"),
    (dict(memories=1), r"state\.memories must be a tuple of 2 levels, found 1 levels"),
    (dict(state={}), r"state must be a CoreState, .*found dict"),
])
def test_bad_input_is_one_clear_line_on_every_backend(core, change, message):
    named, state = dict(zip(("x_obs", "a_prev", "r_t"), inputs(None), strict=True)), core.init_state(3)
    before, change = bits(core.state_arrays(state)), dict(change)
    levels, given = change.pop("memories", None), change.pop("state", state)
    given = given if levels is None else given._replace(memories=given.memories[:levels])
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        core.step(given, **named | change)
    assert "\n" not in str(caught.value)
    assert bits(core.state_arrays(state)) == before  # nothing of it reaches the memory


def test_bad_memories_and_bad_times(core):
    now, (s, w, p, memories, keys) = inputs(None), plain()
    for held, message in (
        ((s, w, p, memories[:1], keys), r"cms_memories must be a tuple of 2 levels, found 1 levels"),
        ((s, w, p, memories[0], keys), "cms_memories must be a tuple with one array per level, found ndarray"),
        ((s, w, p, memories, keys[::-1]), r"cms_keys\[0\] must have shape \(3, 3, 5\) .*found \(3, 6, 5\)"),
        ((s, w, p, memories, (keys[0] * np.inf, keys[1])), r"cms_keys\[0\] \(3, 3, 5\) must be finite, found NaN or infinity"),
        ((s[:2], w, p, memories, keys), r"s_prev must have shape \(3, 13\) .*found \(2, 13\)"),
    ):
        with pytest.raises(ValueError, match=message):
            core(*now, *held)
    with pytest.raises(ValueError, match=r"missing: memories\.1$"):
        core.state(s, w, p, memories[:1], keys)
    with pytest.raises(ValueError, match=r"memories\.1 holds NaN or infinity"):
        core.state(s, w, p, (memories[0], memories[1] * np.nan), keys)
    with pytest.raises(ValueError, match=r"wrong dtype: w is float32, expected float64"):
        core.state(s, w.astype(np.float32), p, memories, keys)
    x, a, r = inputs(4)
    with pytest.raises(ValueError, match=r"same number of steps, at least 1, along their first axis, found \[4, 3, 4\]"):
        core.rollout(core.init_state(3), x, a[:3], r)


@pytest.mark.parametrize("widths, message", [
    ({}, "'wavecore' needs the widths obs_dim, action_dim, output_dim; missing: obs_dim, action_dim, output_dim$"),
    (dict(obs_dim=19, output_dim=3), "missing: action_dim$"),
    (dict(WIDTHS, obs_dim=0), "obs_dim must be an integer of at least 1, found 0$"),
    (dict(WIDTHS, action_dim="17"), "action_dim must be an integer of at least 1, found '17'$"),
])
def test_widths_that_are_missing_or_wrong(widths, message):
    with pytest.raises(ValueError, match=message):
        runtime.build(NAME, WaveCoreConfig.development(), **widths)


def test_configurations_and_widths_that_do_not_belong(core_config):
    with pytest.raises(ValueError, match=r"contradict its configuration: obs_dim=18 where the configuration has 19$"):
        runtime.build(NAME, core_config, obs_dim=18, action_dim=17)
    with pytest.raises(TypeError, match=r"config of 'wavecore' must be a WaveCoreConfig, found GroundedMambaConfig"):
        runtime.build(NAME, GroundedMambaConfig(), **WIDTHS)
    with pytest.raises(ValueError, match=r"obs_dim, output_dim: only 'wavecore' takes widths, found them with 'grounded_mamba'"):
        runtime.build("grounded_mamba", GroundedMambaConfig(), obs_dim=3, output_dim=2)
    with pytest.raises(ValueError, match=r"missing: core\.U_p; wrong shape: decoder\.value\.bias is \(2,\), expected \(1,\)"):
        arrays = init_arrays(NAME, core_config) | {"decoder.value.bias": np.ones(2)}
        runtime.build(NAME, core_config, arrays={key: value for key, value in arrays.items() if key != "core.U_p"})


def test_torch_compiled_runs_kernels_forward_and_back_and_torch_runs_none(cores):
    import torch

    from torch_impl.ops import compiled

    tensors = [native(cores["torch"], value) for value in inputs()]
    found = {}
    for backend in ("torch", "torch_compiled"):
        compiled.reset_kernel_calls()
        module = cores[backend].module
        y, state, _ = module.rollout(module.init_state(3), *tensors)
        gradients = torch.autograd.grad(y.square().sum() + state.memories[1].sum(), list(module.parameters()), materialize_grads=True)
        names = ("cms_read", "cms_write_lazy", "cms_read_backward", "cms_write_lazy_backward")
        found[backend] = [compiled.kernel_calls(name) for name in names], tuple(part.numpy() for part in gradients)
    assert found["torch"][0] == [0, 0, 0, 0] and min(found["torch_compiled"][0]) >= 38
    assert all(np.linalg.norm(a - b) <= 1e-10 * np.linalg.norm(b) for a, b in zip(found["torch_compiled"][1], found["torch"][1], strict=True))
