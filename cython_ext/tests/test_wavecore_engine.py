"""The engine of WaveCore: against the torch module on awkward sizes, in any split, and what a step leaves alone.

The golden file is in `parity_tests/test_golden_wave.py`, what the door to the engine promises in `runtime/tests`.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import cython_ext
from conf.models import TIER_SIZES, WaveCoreConfig
from cython_ext.tests.examples import relative
from cython_ext.tests.test_selective_scan import same_bits
from cython_ext.wavecore_layout import Sizes
from runtime.init import init_arrays

WaveCoreEngine = cython_ext.wavecore_engine.WaveCoreEngine

BASE = dict(
    d_s=13, d_w=21, d_p=9, d_e=11, d_k=5, d_c=15, num_levels=2, cms_sizes=(3, 6), cms_dims=(10, 14), cms_decays=(0.3, 0.2), mamba_state_dim=3,
    heads=("action", "value", "world_model"), salience_threshold=0.45,
)
# Sizes of 1, below, at and above a block of 64 or 32 columns; every wave, rule, head and output.
CONFIGS = [
    {},
    dict(use_mamba_wave=False, mamba_state_dim=1, output_type="discrete"),
    dict(cms_write="slot0", heads=("value",), state_saturation_limit=0.0, d_e=4),
    dict(d_s=70, d_w=66, d_p=65, d_e=64, d_k=17, d_c=129, mamba_state_dim=1, mamba_dt_min=0.01, mamba_dt_scale=0.3),
    dict(d_s=1, d_w=1, d_p=1, d_e=4, d_k=1, d_c=1, mamba_state_dim=1, num_levels=1, cms_sizes=(1,), cms_dims=(1,), cms_decays=(0.4,)),
    dict(d_s=63, d_w=100, d_p=3, d_e=257, d_k=63, d_c=100, use_mamba_wave=False, mamba_state_dim=1, heads=("world_model",), num_levels=4,
         cms_sizes=(1, 3, 63, 5), cms_dims=(100, 1, 3, 63), cms_decays=(0.5, 0.3, 0.3, 0.01)),
]
# The bound that the project promises between two backends in float64, end to end.
END_TO_END = 1e-11


def made(changes=None, widths=(19, 17, 22)):
    """A configuration and weights in which no leaf is zero or one."""
    config = WaveCoreConfig(**{**BASE, **(changes or {})}).sized(*widths)
    arrays, generator = init_arrays("wavecore", config, 4), np.random.default_rng(4)
    return config, {key: value + 0.1 * generator.standard_normal(value.shape) for key, value in arrays.items()}


def engine(config, arrays, *options, **named):
    return WaveCoreEngine(arrays, {field.name: getattr(config, field.name) for field in fields(Sizes)}, *options, **named)


def observed(steps, batch, dtype="float64", widths=(19, 17, 1)):
    generator = np.random.default_rng(5)
    return [generator.standard_normal((steps, *(() if batch is None else (batch,)), width)).astype(dtype) for width in widths]


def flat(info):
    return {key: value for key, value in info.items() if key != "attention_weights"} | dict(enumerate(info["attention_weights"]))


@pytest.fixture(autouse=True)
def default_threads():
    yield
    cython_ext.set_num_threads(None)


@pytest.mark.parametrize("changes", CONFIGS)
def test_a_rollout_is_that_of_the_torch_module(changes):
    torch = pytest.importorskip("torch")
    from torch_impl.wavecore import WaveCore

    config, arrays = made(changes)
    module = WaveCore(config, 19, 17, 22).double()
    module.load_state_dict({key: torch.as_tensor(value) for key, value in arrays.items()})
    for batch in (None, 1, 3):
        inputs, found = observed(8, batch), engine(config, arrays, "float64", batch=batch)
        with torch.no_grad():
            y, state, info = module.rollout(module.init_state(batch), *map(torch.as_tensor, inputs))
        outputs, values = found.rollout(*inputs)
        assert (outputs is None) == (y is None) and (y is None or relative(outputs, y.numpy()) < END_TO_END)
        expected = flat(info)
        assert values.keys() == info.keys()
        assert all(relative(value, expected[key].numpy()) < END_TO_END for key, value in flat(values).items())
        parts = found.state_arrays()
        for kind in ("memories", "keys", "norms", "scales"):
            assert all(relative(parts[f"{kind}.{level}"], part.numpy()) < END_TO_END for level, part in enumerate(getattr(state, kind)))


@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_any_split_of_a_rollout_gives_the_same_bits(dtype, batch):
    config, arrays = made()
    inputs = observed(9, batch, dtype)
    y, info = engine(config, arrays, dtype, batch=batch).rollout(*inputs)
    for cuts in ([1, 2], [4], list(range(1, 9))):
        split = engine(config, arrays, dtype, batch=batch)
        pieces = [split.rollout(*(value[low:high] for value in inputs)) for low, high in zip([0, *cuts], [*cuts, 9], strict=True)]
        assert same_bits([np.concatenate([piece[0] for piece in pieces])], [y])
        for key, value in flat(info).items():
            assert same_bits([np.concatenate([flat(piece[1])[key] for piece in pieces])], [value])
    stepped = engine(config, arrays, dtype, batch=batch)
    for t in range(9):
        out, now = stepped.step(*(value[t] for value in inputs))
        assert same_bits([out, *flat(now).values()], [y[t], *(flat(info)[key][t] for key in flat(now))])
        if t == 4:
            moved = engine(config, arrays, dtype, batch=batch)
            moved.load_state(stepped.state_arrays())
            stepped = moved
    stepped.reset()
    assert same_bits([stepped.rollout(*inputs)[0]], [y])


def test_float32_stays_by_float64():
    """A few steps from the same state: later, rounding chooses other rows. 40 roundings were the most seen."""
    config, arrays = made(dict(d_s=70, d_w=66, d_p=65, d_e=64, d_k=17, d_c=129, mamba_state_dim=1))
    arrays = {key: value.astype(np.float32) for key, value in arrays.items()}
    for batch in (1, 5):
        inputs = observed(2, batch, "float32")
        exact = engine(config, arrays, "float64", batch=batch).rollout(*(value.astype(np.float64) for value in inputs))
        found = engine(config, arrays, "float32", batch=batch).rollout(*inputs)
        assert found[0].dtype == np.float32 and relative(found[0], exact[0]) < 200 * 2.0**-24


@pytest.mark.parametrize("batch", [1, 4])
def test_bfloat16_weights_give_the_same_outputs_to_cosine(batch):
    """0.9999 is the bound of the specification."""
    config = WaveCoreConfig.tier("v2.0", heads=("action", "world_model")).sized(**TIER_SIZES["v2.0"])
    arrays = init_arrays("wavecore", config, 1)
    inputs = observed(1, batch, "float32", (768, 64, 1))
    (y, info), (narrow, other) = (engine(config, arrays, "float32", weights, batch).rollout(*inputs) for weights in (None, "bfloat16"))
    for found, expected in ((narrow, y), (other["next_obs"], info["next_obs"])):
        assert not np.array_equal(found, expected)
        assert (found * expected).sum() > 0.9999 * np.linalg.norm(found) * np.linalg.norm(expected)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("storage", ["float32", "float64", "bfloat16"])
def test_the_number_of_threads_changes_no_bit(storage, batch):
    config = WaveCoreConfig.tier("v2.0").sized(**TIER_SIZES["v2.0"])
    arrays, dtype = init_arrays("wavecore", config, 1), "float64" if storage == "float64" else "float32"
    inputs, results = observed(3, batch, dtype, (768, 64, 1)), []
    for threads in (1, 2, 4):
        cython_ext.set_num_threads(threads)
        found = engine(config, arrays, dtype, storage, batch)
        y, info = found.rollout(*inputs)
        results.append([y, *flat(info).values(), *found.state_arrays().values()])
    assert same_bits(results[1], results[0]) and same_bits(results[2], results[0])


def test_two_engines_in_two_python_threads():
    config, arrays = made(dict(d_s=70, d_w=66, d_p=65, d_e=64, mamba_state_dim=1))
    first = engine(config, arrays, "float32")
    inputs = {batch: observed(20, batch, "float32") for batch in (1, 3)}
    expected = {batch: first.resized(batch).rollout(*inputs[batch])[0] for batch in (1, 3)}
    with ThreadPoolExecutor(2) as pool:
        futures = [(batch, pool.submit(first.resized(batch).rollout, *inputs[batch])) for batch in (1, 3) * 4]
        assert all(same_bits([future.result()[0]], [expected[batch]]) for batch, future in futures)


def test_ten_thousand_steps_need_no_more_memory():
    config, arrays = made()
    found, now = engine(config, arrays, "float32"), [value[0] for value in observed(1, 1, "float32")]
    for _ in range(500):
        found.step(*now)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    buffers = [found.step(*now)[0] for _ in range(2)]
    for _ in range(10_000):
        found.step(*now)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024  # KB
    assert buffers[0] is buffers[1] and np.isfinite(buffers[0]).all()


def test_twenty_thousand_steps_stay_sound():
    config, arrays = made(dict(d_s=5, d_w=6, d_p=4, d_e=4, d_k=3, d_c=5))
    found, (x, a, r) = engine(config, arrays, "float32"), observed(200, 1, "float32")
    for t in range(20_000):
        found.step(x[t % 200], a[t % 200], r[t % 200])
    parts = found.state_arrays()
    assert all(np.isfinite(part).all() for part in parts.values())
    for level in range(2):
        assert 2.0**-10 <= parts[f"scales.{level}"] <= 1
        assert relative(parts[f"norms.{level}"], np.square(parts[f"memories.{level}"]).sum(-1)) < 1e-5


@pytest.mark.parametrize(("place", "value"), [(0, np.nan), (1, np.inf), (2, -np.inf)])
def test_what_is_not_finite_is_refused_and_leaves_no_trace(place, value):
    config, arrays = made()
    found, inputs = engine(config, arrays, "float64", batch=2), observed(3, 2)
    found.step(*(part[0] for part in inputs))
    before = found.state_arrays()
    spoilt = [part.copy() for part in inputs]
    spoilt[place][1, 1, -1] = value
    name = ("x_obs", "a_prev", "r_t")[place]
    with pytest.raises(ValueError, match=rf"{name} \(2, \d+\) must be finite, found NaN or infinity"):
        found.step(*(part[1] for part in spoilt))
    with pytest.raises(ValueError, match=rf"{name} \(3, 2, \d+\) must be finite, found NaN or infinity"):
        found.rollout(*spoilt)
    after = found.state_arrays()
    assert same_bits(after.values(), before.values())


def test_buffers_are_written_before_they_are_read(monkeypatch):
    empty, poisoned = np.empty, []

    def poison(*arguments, **options):
        array = empty(*arguments, **options)
        if array.dtype.kind == "f":
            array.fill(np.nan)
            poisoned.append(array)
        return array

    for changes in CONFIGS[:3]:
        config, arrays = made(changes)
        for batch in (1, 3):
            inputs = observed(2, batch)
            y, info = engine(config, arrays, "float64", batch=batch).rollout(*inputs)
            with monkeypatch.context() as patch:
                patch.setattr(np, "empty", poison)
                again, other = engine(config, arrays, "float64", batch=batch).rollout(*inputs)
            assert y is None or same_bits([again], [y])
            assert same_bits(flat(other).values(), flat(info).values())
    assert len(poisoned) >= 12


def test_no_framework_comes_into_the_process():
    code = (
        "import sys, dataclasses, numpy as np, runtime\n"
        "from conf.models import WaveCoreConfig\n"
        "model = runtime.build('wavecore', WaveCoreConfig.development(), 'cython', obs_dim=5, action_dim=3, output_dim=3)\n"
        "y, state, info = model.step(model.init_state(2), np.ones((2, 5), 'f'), np.ones((2, 3), 'f'), np.ones((2, 1), 'f'))\n"
        "print(y.shape, sorted({'torch', 'jax', 'jaxlib', 'flax'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "(2, 3) []", done.stderr


@pytest.mark.parametrize(("change", "error", "message"), [
    (dict(dtype="float16"), ValueError, "dtype must be 'float32' or 'float64', found 'float16'"),
    (dict(dtype="float64", weights="bfloat16"), ValueError, "weights must be 'float64', found 'bfloat16'"),
    (dict(weights="int8"), ValueError, "weights must be 'float32' or 'bfloat16', found 'int8'"),
    (dict(batch=0), ValueError, "batch must be an integer of at least 1, or None, found 0"),
])
def test_an_engine_that_cannot_be(change, error, message):
    config, arrays = made()
    with pytest.raises(error, match=message):
        engine(config, arrays, **change)


def test_arrays_and_sizes_that_do_not_fit():
    config, arrays = made()
    sizes = {field.name: getattr(config, field.name) for field in fields(Sizes)}
    wrong = {key: value for key, value in arrays.items() if key != "core.U_p"} | {"extra": np.ones(2), "core.U_w": np.ones((13, 2))}
    with pytest.raises(ValueError, match=r"missing core\.U_p; unused extra; core\.U_w is \(13, 2\), expected \(13, 21\)"):
        WaveCoreEngine(wrong, sizes)
    for change, message in (
        (dict(d_e=3), "d_e must be at least 4, found 3"), (dict(d_s=0), "d_s must be an integer of at least 1, found 0"),
        (dict(mamba_state_dim=2), "d_w must be divisible by mamba_state_dim"), (dict(cms_decays=(0.1,)), "one entry per level"),
        (dict(cms_write="first"), "cms_write must be 'slot0' or 'least_salient', found 'first'"), (dict(heads=()), "heads must name some of"),
    ):
        with pytest.raises(ValueError, match=message):
            WaveCoreEngine(arrays, sizes | change)
    with pytest.raises(TypeError, match="d_x"):
        WaveCoreEngine(arrays, sizes | dict(d_x=3))


@pytest.mark.parametrize(("change", "message"), [
    (lambda v: v[:1], r"x_obs must have shape \(2, 19\), found \(1, 19\)"),
    (lambda v: v.astype(np.float32), "x_obs must be an array of float64, as the engine is, found float32"),
    (lambda v: v.tolist(), "x_obs must be an array of float64, as the engine is, found list"),
    (lambda v: v[:, :3], r"x_obs must have shape \(2, 19\), found \(2, 3\)"),
])
def test_bad_inputs(change, message):
    config, arrays = made()
    found, (x, a, r) = engine(config, arrays, "float64", batch=2), (part[0] for part in observed(1, 2))
    with pytest.raises(ValueError, match=message):
        found.step(change(x), a, r)


def test_strided_and_read_only_inputs():
    config, arrays = made()
    found, inputs = engine(config, arrays, "float64", batch=2), [part[0] for part in observed(1, 2)]
    y = found.step(*inputs)[0].copy()
    laid = [np.repeat(part, 2, axis=1)[:, ::2] for part in inputs]
    for part in laid:
        part.flags.writeable = False
    found.reset()
    assert same_bits([found.step(*laid)[0]], [y])


def test_states_that_do_not_fit():
    config, arrays = made()
    found = engine(config, arrays, "float64", batch=2)
    with pytest.raises(ValueError, match=r"missing s; unused t; w is float32 \(2, 21\), expected float64 \(2, 21\)"):
        parts = found.state_arrays()
        found.load_state({key: value for key, value in parts.items() if key != "s"} | {"t": 1, "w": parts["w"].astype(np.float32)})
    with pytest.raises(ValueError, match="state must be one contiguous, writeable array of"):
        found.bind(np.zeros(3))
