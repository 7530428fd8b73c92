"""The engine of GroundedMamba: against the torch module and the golden file, in any split, on any number of threads, in constant memory."""

from __future__ import annotations

import dataclasses
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cython_ext
import parity_tests
from conf.models import GroundedMambaConfig
from runtime import public, read_arrays
from runtime.init import init_arrays

for kernel in ("dense", "selective_scan", "wkv", "mamba_step"):
    pytest.importorskip(f"cython_ext.{kernel}")

from cython_ext import mamba_engine  # noqa: E402
from cython_ext.mamba_engine import GroundedMambaEngine, Sizes  # noqa: E402

NAME = "grounded_mamba"
GOLDEN = Path(parity_tests.__file__).parent / "golden" / "groundthink_small.npz"
TINY = GroundedMambaConfig(vocab_size=23, dim=12, depth=2, ssm_dim=5, rwkv_heads=2, memory_size=7, retrieval_heads=3, gate="learned")
SETTINGS = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def configs(draw):
    heads, width = draw(st.sampled_from([(1, 2), (2, 3), (3, 11), (2, 32), (4, 16)]))
    sizes = dict(
        vocab_size=draw(st.sampled_from([1, 15, 16, 67])), dim=heads * width, depth=draw(st.integers(1, 2)),
        ssm_dim=draw(st.sampled_from([4, 15, 16, 17])), rwkv_heads=heads)
    if draw(st.integers(0, 4)) == 0:
        return GroundedMambaConfig.groundthink(**sizes)
    return GroundedMambaConfig(
        **sizes, dt_bias=draw(st.sampled_from([(1.0,), (1.0, 0.5)])), dt_clamp=draw(st.sampled_from(["smooth", "hard"])), dt_min=0.01, dt_max=0.9,
        max_singular=draw(st.sampled_from([0.05, 0.99])), gate=draw(st.sampled_from(["fixed", "learned"])),
        gate_ssm=draw(st.sampled_from([0.2, 0.7])), decay=draw(st.sampled_from(["exp_exp", "direct"])),
        time_first=draw(st.sampled_from(["bonus", "gain"])), normalised_key=draw(st.booleans()), readout_norm=draw(st.booleans()),
        memory_size=draw(st.sampled_from([0, 1, 9, 70])), memory_alpha=draw(st.sampled_from([0.01, 0.5])),
        retrieval_heads=draw(st.sampled_from([1, heads])), norm_eps=draw(st.sampled_from([1e-5, 1e-2])))


def weights_of(config, seed=0, dtype="float64", occupied=None):
    """No leaf at zero or one, so that every one of them matters; `occupied` slots of the bank, by default most of them."""
    arrays, generator = init_arrays(NAME, config, seed), np.random.default_rng(seed)
    for key, value in arrays.items():
        if value.dtype == np.float64:
            value += 0.1 * generator.standard_normal(value.shape)
        elif key.endswith("memory_count"):
            used = (config.memory_size * 2 + 2) // 3 if occupied is None else occupied
            value[:used] = generator.integers(1, 9, used)
    arrays["lm_head.weight"] = arrays["embedding.weight"]
    return {key: value.astype(dtype) if value.dtype == np.float64 else value for key, value in arrays.items()}


def engine_of(config, weights, storage=None):
    sizes = {name: getattr(config, name) for name in Sizes._fields}
    return GroundedMambaEngine(weights, Sizes(**sizes), storage)


def ids_of(config, batch, length, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length))


def torch_results(config, weights, ids, states=None):
    torch = pytest.importorskip("torch")
    from torch_impl.grounded_mamba import GroundedMamba

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        module = GroundedMamba(config, impl="recurrent").to(getattr(torch, str(weights["embedding.weight"].dtype)))
        module.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()}, strict=True)
        if states is not None:
            states = [{key: torch.from_numpy(value) for key, value in state.items()} for state in states]
        logits, states = module(torch.from_numpy(ids), states)
    return logits.numpy(), [{key: value.numpy() for key, value in state.items()} for state in states]


def flat(results):
    logits, states = results
    return [logits, *(state[key] for state in states for key in ("ssm", "wkv"))]


def assert_close(found, expected, bound):
    for a, b in zip(flat(found), flat(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.linalg.norm(a - b) <= bound * np.linalg.norm(b)


@SETTINGS
@given(configs(), st.integers(0, 99), st.sampled_from([1, 3]), st.sampled_from([1, 2, 3, 37]))
def test_equals_the_torch_module(config, seed, batch, length):
    weights, ids = weights_of(config, seed), ids_of(config, batch, length, seed)
    generator, empty = np.random.default_rng(seed), engine_of(config, weights).init_states(batch)
    states = [{key: generator.standard_normal(value.shape) for key, value in state.items()} for state in empty]
    before = [value.copy() for value in flat((ids, states))]
    for given_states in (None, states):
        expected = torch_results(config, weights, ids, given_states)
        engine = engine_of(config, weights)
        assert_close(engine(ids, given_states), expected, 1e-11)
        last, after = engine.prefill(ids, given_states)
        assert_close((last, after), (expected[0][:, -1], expected[1]), 1e-11)
        moved = [{key: value[:1].copy() for key, value in state.items()} for state in given_states or empty]
        out = np.full((1, config.vocab_size), np.nan)
        for token in ids[0]:
            assert engine.decode(token[None], moved, out) is out
        first = [{key: value[:1] for key, value in state.items()} for state in expected[1]]
        assert_close((out, moved), (expected[0][:1, -1], first), 1e-11)
    assert all(np.array_equal(a, b) for a, b in zip(before, flat((ids, states)), strict=True))


@pytest.mark.parametrize("config", [TINY, GroundedMambaConfig.groundthink(vocab_size=67, dim=64, depth=2, ssm_dim=16, rwkv_heads=2)])
def test_float32(config):
    weights, ids = weights_of(config, 1), ids_of(config, 2, 70)
    expected = torch_results(config, weights, ids)
    single = {key: value.astype(np.float32) if value.dtype == np.float64 else value for key, value in weights.items()}
    logits, states = engine_of(config, single)(ids)
    assert all(value.dtype == np.float32 for value in flat((logits, states)))
    found = logits.astype(np.float64), [{key: value.astype(np.float64) for key, value in state.items()} for state in states]
    assert_close(found, expected, 1e-4)


def test_bfloat16_weights():
    config = dataclasses.replace(TINY, dim=96, vocab_size=100)
    weights, ids = weights_of(config, 2, "float32"), ids_of(config, 1, 40)
    expected, found = engine_of(config, weights)(ids)[0], engine_of(config, weights, "bfloat16")(ids)[0]
    cosine = (expected * found).sum() / np.linalg.norm(expected) / np.linalg.norm(found)
    assert 0.9999 < cosine < 1
    with pytest.raises(ValueError, match="weights must be"):
        engine_of(config, weights, "int8")


def test_the_golden_file():
    """The public code's own logits and states, within the bound of the other backends."""
    tree = {}
    for key, value in read_arrays(GOLDEN).items():
        group, _, name = key.partition("/")
        tree.setdefault(group, {})[name] = value
    config, weights = public.config(NAME, tree["weights"]), public.rename(NAME, tree["weights"])
    expected = tree["outputs"]["logits"], [
        {"ssm": tree["outputs"][f"ssm_state_{i}"], "wkv": tree["outputs"][f"wkv_state_{i}"]} for i in range(config.depth)]
    assert_close(engine_of(config, weights)(tree["inputs"]["input_ids"]), expected, 1e-11)


@pytest.mark.parametrize("config", [TINY, dataclasses.replace(TINY, gate="fixed", time_first="gain", memory_size=0)])
def test_streaming_in_any_split(config, monkeypatch):
    engine, ids = engine_of(config, weights_of(config)), ids_of(config, 2, 41)
    expected = engine(ids)
    generator = np.random.default_rng(0)
    for _ in range(6):
        cuts = np.sort(generator.choice(np.arange(1, 41), generator.integers(1, 8), replace=False))
        states, parts = None, []
        for part in np.split(ids, cuts, axis=1):
            logits, states = engine(part, states)
            parts.append(logits)
        assert_close((np.concatenate(parts, axis=1), states), expected, 1e-12)
    states = engine.init_states(2)
    parts = [engine.decode(token, states) for token in ids.T]
    assert_close((np.stack(parts, axis=1), states), expected, 1e-12)
    monkeypatch.setattr(mamba_engine, "TOKENS", 14)  # chunks of seven tokens
    assert_close(engine(ids), expected, 1e-12)
    logits, states = engine.prefill(ids)
    assert_close((logits, states), (expected[0][:, -1], expected[1]), 1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_threads_change_no_bit(dtype):
    config = GroundedMambaConfig(vocab_size=300, dim=128, depth=1, rwkv_heads=2, memory_size=70)
    weights, ids = weights_of(config, 3, dtype), ids_of(config, 2, 100)
    results = []
    try:
        for threads in (1, 2, 4):
            cython_ext.set_num_threads(threads)
            engine = engine_of(config, weights)
            logits, states = engine(ids)
            one = [{key: value[:1].copy() for key, value in state.items()} for state in states]
            results.append([*flat((engine.decode(ids[:, 0], states), states)), *flat((engine.decode(ids[:1, 0], one), one)), logits])
    finally:
        cython_ext.set_num_threads(None)
    for other in results[1:]:
        assert all(a.tobytes() == b.tobytes() for a, b in zip(results[0], other, strict=True))


def test_ten_thousand_steps_in_constant_memory():
    engine = engine_of(TINY, weights_of(TINY))
    for batch, steps in ((1, 10_000), (2, 1_000)):
        states, token = engine.init_states(batch), np.full(batch, 3)
        for _ in range(steps // 20):
            engine.decode(token, states)
        before = _resident()
        for _ in range(steps):
            logits = engine.decode(token, states)
        assert _resident() - before < 1 << 20
        assert np.isfinite(logits).all()


def test_two_python_threads_use_one_engine():
    engine, ids = engine_of(TINY, weights_of(TINY)), ids_of(TINY, 2, 200)

    def decoded(row):
        states = engine.init_states(1)
        return np.concatenate([engine.decode(token[None], states) for token in row])

    expected = [decoded(row) for row in ids]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(decoded, ids))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_no_framework_is_imported():
    code = (
        "import sys, numpy as np\n"
        "from cython_ext.mamba_engine import GroundedMambaEngine, Sizes\n"
        "from runtime.init import init_arrays\n"
        "from conf.models import GroundedMambaConfig\n"
        "c = GroundedMambaConfig(vocab_size=9, dim=8, depth=1, rwkv_heads=2, memory_size=3)\n"
        "e = GroundedMambaEngine(init_arrays('grounded_mamba', c), Sizes(9, 8, 1, 16, 2, memory_size=3))\n"
        "assert e.generate(np.array([[1, 2]]), 3).shape == (1, 5)\n"
        "print(sorted({'torch', 'jax', 'flax', 'transformers'} & set(sys.modules)))\n")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=GOLDEN.parents[2])
    assert result.stdout.strip() == "[]"


def test_generate_draws_what_torch_draws():
    torch = pytest.importorskip("torch")
    from torch_impl.grounded_mamba import GroundedMamba

    weights, ids = weights_of(TINY), ids_of(TINY, 2, 5)
    with torch.random.fork_rng(devices=[]):
        module = GroundedMamba(TINY).double()
    module.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    for options in ({}, {"temperature": 0.0}, {"temperature": 1.5, "top_k": 4, "seed": 7}):
        found = engine_of(TINY, weights).generate(ids, 9, **options)
        assert np.array_equal(found, module.generate(torch.from_numpy(ids), 9, **options).numpy())


def test_an_empty_bank_is_not_read():
    config = dataclasses.replace(TINY, memory_size=0)
    weights, ids = weights_of(TINY, occupied=0), ids_of(TINY, 1, 4)
    assert np.array_equal(engine_of(TINY, weights)(ids)[0], engine_of(config, weights)(ids)[0])


def test_bad_input():
    weights = weights_of(TINY)
    engine, ids = engine_of(TINY, weights), ids_of(TINY, 2, 3)
    for bad, words in (
        (np.array([[23]]), r"must lie in \[0, 23\), found 23"), (np.array([[-1]]), "found -1"), (np.zeros((1, 0), int), "neither of them 0"),
        (np.zeros((0, 1), int), "neither of them 0"), (np.zeros(3, int), r"found \(3,\)"), (np.zeros((1, 2)), "must be integers, found float64"),
    ):
        for call in (engine, engine.prefill):
            with pytest.raises(ValueError, match=words):
                call(bad)
    nan = engine.init_states(2)
    nan[1]["wkv"][0, 1, 2, 3] = np.nan
    wrong = engine.init_states(2)
    wrong[0]["ssm"] = wrong[0]["ssm"].astype(np.float32)
    for states, words in (
        (nan, r"states\[1\]\['wkv'\] \(2, 2, 6, 6\) must be finite, found NaN"), (wrong, r"states\[0\]\['ssm'\] must have dtype float64"),
        (engine.init_states(1), r"must have shape \(2, 5\), found \(1, 5\)"), (engine.init_states(2)[:1], "one entry per block, 2 in all, found 1"),
        ([{}, {}], r"keys \['ssm', 'wkv'\], found \[\]"), ("ab", "must be a list"),
    ):
        for call in (engine, engine.prefill, lambda ids, states: engine.decode(ids[:, 0], states)):
            with pytest.raises(ValueError, match=words):
                call(ids, states)
    strided = engine.init_states(2)
    strided[0]["wkv"] = strided[0]["wkv"].swapaxes(2, 3)
    with pytest.raises(ValueError, match=r"states\[0\]\['wkv'\] is overwritten and must be contiguous"):
        engine.decode(ids[:, 0], strided)
    assert engine(ids, strided)[0].shape == (2, 3, 23)
    for out in (np.empty((2, 22)), np.empty((2, 23), np.float32), np.empty((23, 2)).T, [0.0]):
        with pytest.raises(ValueError, match=r"^out must be a contiguous, writeable float64 array of shape \(2, 23\), found "):
            engine.decode(ids[:, 0], engine.init_states(2), out)
    with pytest.raises(ValueError, match=r"of one token must have shape \(batch,\), found \(2, 3\)"):
        engine.decode(ids, engine.init_states(2))


def test_bad_weights():
    weights = weights_of(TINY)
    for name, value, words in (
        ("blocks.1.ssm.A", None, r"'blocks.1.ssm.A'\] must be an array of shape \(5, 5\), found NoneType"),
        ("ln_out.bias", np.zeros(3), r"must have shape \(12,\) and dtype float64, found \(3,\) and float64"),
        ("blocks.0.rwkv.memory_count", np.zeros(7), "dtype int64"), ("blocks.0.ssm.dt_proj.weight", np.zeros((3, 12)), "first axis of 1 or 2"),
        ("embedding.weight", np.zeros((23, 12), np.float16), "must be float32 or float64, found float16"),
    ):
        with pytest.raises(ValueError, match=words):
            engine_of(TINY, {**weights, name: value})


def _resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
