"""One door, several backends: the same arguments, the same structure, the same weights and numbers."""

import subprocess
import sys

import numpy as np
import pytest

import runtime
from conf.models import GroundedMambaConfig
from runtime.init import init_arrays

CONFIG = GroundedMambaConfig(
    vocab_size=23, dim=12, depth=2, ssm_dim=5, rwkv_heads=2, memory_size=7, memory_every=2, memory_writes=3, retrieval_heads=3, gate="learned"
)
NAME = "grounded_mamba"
BACKENDS = ("torch", "torch_compiled", "jax")


@pytest.fixture(params=BACKENDS)
def backend(request):
    needed = {"torch": ["torch"], "torch_compiled": ["torch", "cython_ext.selective_scan", "cython_ext.wkv"], "jax": ["jax", "flax"]}
    for package in needed[request.param]:
        pytest.importorskip(package)
    return request.param


def token_ids(batch=2, length=9, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (batch, length))


def randomised(seed=0):
    """No leaf at zero or one, so that every one of them matters."""
    arrays, generator = init_arrays(NAME, CONFIG, seed), np.random.default_rng(seed)
    for key, value in arrays.items():
        if value.dtype == np.float64 and "memory_keys" not in key and "memory_values" not in key:
            value += 0.1 * generator.standard_normal(value.shape)
    arrays["lm_head.weight"] = arrays["embedding.weight"]
    return arrays


def distance(a, b):
    return np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b))


def bits(arrays):
    return {key: (value.dtype, value.shape, value.tobytes()) for key, value in arrays.items()}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_same_seed_same_weights(backend, dtype):
    model = runtime.build(NAME, CONFIG, backend=backend, dtype=dtype, seed=6)
    expected = {k: v.astype(dtype) if v.dtype == np.float64 else v for k, v in init_arrays(NAME, CONFIG, 6).items()}
    assert list(model.arrays()) == list(expected)
    assert bits(model.arrays()) == bits(expected)
    assert model.config == CONFIG and model.dtype == dtype and model.backend == backend


def test_arrays_are_copies(backend):
    given = randomised()
    model = runtime.build(NAME, CONFIG, backend=backend, arrays=given, dtype="float64")
    before = bits(model.arrays())
    for value in (*given.values(), *model.arrays().values()):
        value[...] = 77
    assert bits(model.arrays()) == before


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numpy_in_numpy_out(backend, dtype):
    model = runtime.build(NAME, CONFIG, backend=backend, arrays=randomised(), dtype=dtype)
    ids = token_ids()
    logits, states, aux = model(ids, return_aux=True)
    assert isinstance(logits, np.ndarray) and logits.shape == (2, 9, 23) and logits.dtype == dtype
    assert [sorted(state) for state in states] == [["ssm", "wkv"]] * 2
    assert all(isinstance(value, np.ndarray) and value.dtype == dtype for state in states for value in state.values())
    assert states[1]["ssm"].shape == (2, 5) and states[1]["wkv"].shape == (2, 2, 6, 6)
    assert isinstance(aux["gate"], np.ndarray) and aux["gate"].shape == (2,)
    assert [keys.shape for keys, _ in aux["memory_rows"]] == [(3, 12)] * 2
    again, _ = model(ids.tolist(), model.init_states(2))
    assert isinstance(again, np.ndarray)
    # The same sums in another order: a few roundings of the model's dtype per layer.
    assert distance(again, logits) < 1e3 * np.finfo(dtype).eps
    first, carried = model(ids[:, :4])
    second, _ = model(ids[:, 4:].astype(np.int32), carried)
    assert distance(np.concatenate([first, second], 1), logits) < 1e3 * np.finfo(dtype).eps


def test_own_arrays_in_own_arrays_out(backend):
    model = runtime.build(NAME, CONFIG, backend=backend, arrays=randomised())
    ids = token_ids()
    if backend == "jax":
        import jax

        own, kind = jax.numpy.asarray(ids), jax.Array
    else:
        import torch

        own, kind = torch.from_numpy(ids), torch.Tensor
    logits, states, aux = model(own, model(ids)[1], return_aux=True)
    assert isinstance(logits, kind) and isinstance(states[0]["wkv"], kind) and isinstance(aux["memory_rows"][0][1], kind)
    tokens = model.generate(own, 3)
    assert isinstance(tokens, kind) and tuple(tokens.shape) == (2, 12)
    assert np.array_equal(np.asarray(tokens), model.generate(ids, 3))


def test_backends_agree_and_generate_the_same_tokens():
    for package in ("torch", "jax", "flax"):
        pytest.importorskip(package)
    models = [runtime.build(NAME, CONFIG, backend=backend, arrays=randomised(), dtype="float64") for backend in ("torch", "jax")]
    ids = token_ids()
    for step in range(5):
        (a, states_a, aux_a), (b, states_b, aux_b) = (model(token_ids(seed=step), return_aux=True) for model in models)
        # The bound that the project promises between two backends in float64, end to end.
        assert distance(b, a) < 1e-11
        assert all(distance(y[key], x[key]) < 1e-11 for x, y in zip(states_a, states_b, strict=True) for key in x)
        models[0].update_memory(aux_b)  # NumPy rows of the other backend
        models[1].update_memory(aux_a)
    held = [model.arrays() for model in models]
    assert held[0]["blocks.1.rwkv.writes"] == held[1]["blocks.1.rwkv.writes"] == 2
    for key in held[0]:
        assert held[0][key].dtype == held[1][key].dtype
        assert np.allclose(held[0][key], held[1][key], rtol=1e-11, atol=1e-13), key  # rows differ by rounding, of size about one
    for options in (dict(temperature=0.0), dict(temperature=0.7, top_k=5, seed=3), dict(seed=9)):
        first, second = (model.generate(ids, 11, **options) for model in models)
        assert first.dtype == ids.dtype and first.shape == (2, 20) and np.array_equal(first[:, :9], ids)
        assert np.array_equal(first, second)


def test_save_on_one_load_on_the_other(tmp_path, backend):
    pytest.importorskip("torch")
    pytest.importorskip("flax")
    for dtype in ("float32", "float64"):
        model = runtime.build(NAME, CONFIG, backend=backend, arrays=randomised(), dtype=dtype)
        for _ in range(3):
            model.update_memory(model(token_ids(), return_aux=True)[2])
        runtime.save(model, tmp_path / dtype)
        for other in ("torch", "jax"):
            loaded = runtime.load(tmp_path / dtype, backend=other)
            assert (loaded.backend, loaded.dtype, loaded.config) == (other, dtype, CONFIG)
            assert bits(loaded.arrays()) == bits(model.arrays())
            assert loaded.arrays()["blocks.0.rwkv.update_counter"] == 3
            assert distance(loaded(token_ids())[0], model(token_ids())[0]) < 1e3 * np.finfo(dtype).eps  # same weights, other sums
            runtime.save(loaded, tmp_path / other)
        written = [(tmp_path / name / "model.safetensors").read_bytes() for name in (dtype, "torch", "jax")]
        assert written[0] == written[1] == written[2]
    assert runtime.load(tmp_path / "float32", backend=backend, dtype="float64").arrays()["ln_out.bias"].dtype == np.float64


@pytest.mark.parametrize(
    "ids, states, message",
    [
        ([[3, 23]], None, r"input_ids .*\[0, 23\), found 23"),
        ([[3, -1]], None, r"input_ids .*\[0, 23\), found -1"),
        ([[3, 2**40]], None, r"input_ids .*\[0, 23\), found 1099511627776"),
        ([3, 4], None, r"input_ids must have shape \(batch, length\).*found \(2,\)"),
        (np.zeros((2, 0), dtype=int), None, r"input_ids must have shape .*found \(2, 0\)"),
        ([[0.5]], None, "input_ids must be int.*, found .*float64"),
        ([[3]], "batch", r"states\[0\]\['ssm'\] must have shape \(1, 5\), found \(2, 5\)"),
        ([[3]], "nan", r"states\[1\]\['wkv'\] .*found NaN"),
        ([[3]], "short", "states must be a list with one entry per block, 2 in all, found 1 entries"),
        ([[3]], "key", r"states\[0\] must be a dict with the keys \['ssm', 'wkv'\], found \['ssm'\]"),
        ([[3]], "dtype", r"states\[0\]\['ssm'\] must have dtype .*float32, found .*float64"),
    ],
)
def test_bad_input_is_one_clear_line_on_every_backend(backend, ids, states, message):
    model = runtime.build(NAME, CONFIG, backend=backend)
    if states is not None:
        kind, states = states, [{k: np.asarray(v).copy() for k, v in state.items()} for state in model.init_states(2 if states == "batch" else 1)]
        if kind == "nan":
            states[1]["wkv"][0, 1, 2, 3] = np.nan
        states = states[:1] if kind == "short" else states
        if kind == "key":
            del states[0]["wkv"]
        if kind == "dtype":
            states[0]["ssm"] = states[0]["ssm"].astype(np.float64)
    with pytest.raises(ValueError, match=message) as caught:
        model(ids, states)
    assert "\n" not in str(caught.value)


def test_strict_arrays(backend):
    arrays = randomised()
    del arrays["blocks.1.ssm.A"]
    arrays["extra"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"missing: blocks\.1\.ssm\.A; unused: extra"):
        runtime.build(NAME, CONFIG, backend=backend, arrays=arrays)


@pytest.mark.parametrize("backend_name", ["numpy", "tensorflow"])
def test_unknown_backend_names_those_there_are(backend_name):
    with pytest.raises(ValueError, match=f"must be one of 'torch', 'torch_compiled', 'jax', 'jax_compiled', 'cython', found '{backend_name}'"):
        runtime.build(NAME, CONFIG, backend=backend_name)


@pytest.mark.parametrize("backend_name, absent, extra", [("torch", "torch", "torch"), ("torch_compiled", "torch", "torch"), ("jax", "flax", "jax")])
def test_a_backend_that_is_not_installed(monkeypatch, backend_name, absent, extra):
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(ImportError, match=rf"'{backend_name}' needs {absent}: pip install 'groundwave\[{extra}\]'"):
        runtime.build(NAME, CONFIG, backend=backend_name)


@pytest.mark.parametrize("kernel", ["selective_scan", "wkv"])
def test_kernels_that_are_not_built(monkeypatch, kernel):
    pytest.importorskip("torch")
    monkeypatch.delenv("GROUNDWAVE_KERNELS", raising=False)
    monkeypatch.setitem(sys.modules, f"cython_ext.{kernel}", None)
    with pytest.raises(ImportError, match=rf"needs the compiled kernels: .*cython_ext\.{kernel}"):
        runtime.build(NAME, CONFIG, backend="torch_compiled")


def test_building_leaves_the_frameworks_as_they_were():
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    before = torch.random.get_rng_state(), jax.config.jax_enable_x64
    for backend_name in ("torch", "jax"):
        model = runtime.build(NAME, CONFIG, backend=backend_name, dtype="float64")
        model(token_ids())
    assert torch.equal(before[0], torch.random.get_rng_state()) and jax.config.jax_enable_x64 == before[1]
    assert torch.get_default_dtype() == torch.float32


def test_importing_runtime_imports_no_framework():
    code = (
        "import sys, runtime, runtime.public, runtime.checkpoint\n"
        "heavy = {'torch', 'jax', 'jaxlib', 'flax', 'optax', 'transformers', 'tokenizers', 'huggingface_hub', 'hydra', 'wandb'}\n"
        "print(sorted(heavy & set(sys.modules)), callable(runtime.build), callable(runtime.load))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[] True True"
