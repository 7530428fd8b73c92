"""GroundedMamba on the backend "cython": as on torch, loaded from disk, and one line for what it does not do."""

import subprocess
import sys

import numpy as np
import pytest

import runtime
from conf.models import GroundedMambaConfig
from runtime.init import init_arrays

for kernel in ("dense", "selective_scan", "wkv", "mamba_step"):
    pytest.importorskip(f"cython_ext.{kernel}")

NAME = "grounded_mamba"
CONFIG = GroundedMambaConfig(vocab_size=23, dim=12, depth=2, ssm_dim=5, rwkv_heads=2, memory_size=7, retrieval_heads=3, gate="learned")


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    arrays = init_arrays(NAME, CONFIG, 0)
    for key, value in arrays.items():
        if value.dtype == np.float64:
            value += 0.1 * generator.standard_normal(value.shape)
        elif key.endswith("memory_count"):
            value[:4] = [3, 1, 2, 5]
    arrays["lm_head.weight"] = arrays["embedding.weight"]
    return arrays


@pytest.fixture
def ids():
    return np.random.default_rng(1).integers(0, CONFIG.vocab_size, (2, 9))


def test_as_on_torch(arrays, ids):
    pytest.importorskip("torch")
    model, other = (runtime.build(NAME, CONFIG, backend=backend, arrays=arrays, dtype="float64") for backend in ("cython", "torch"))
    assert model.backend == "cython" and model.config == CONFIG and model.dtype == "float64"
    _, states = other(ids)
    for given in (None, states):
        (found, after), (expected, expected_after) = model(ids, given), other(ids, given)
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)
        for a, b in zip(after, expected_after, strict=True):
            assert a.keys() == b.keys()
            for key in a:
                np.testing.assert_allclose(a[key], b[key], rtol=1e-11, atol=1e-12)
    assert np.array_equal(model.generate(ids, 6, seed=3), other.generate(ids, 6, seed=3))
    assert [{key: value.shape for key, value in state.items()} for state in model.init_states(3)] == [{"ssm": (3, 5), "wkv": (3, 2, 6, 6)}] * 2


def test_arrays_are_copies_and_come_from_disk(arrays, ids, tmp_path):
    model = runtime.build(NAME, CONFIG, backend="cython", arrays=arrays)
    expected = model(ids)[0]
    runtime.save(model, tmp_path)
    for held in (arrays, model.arrays()):
        for value in held.values():
            value[...] = 0
    assert np.array_equal(model(ids)[0], expected)
    assert np.array_equal(runtime.load(tmp_path, backend="cython")(ids)[0], expected)


def test_bfloat16_weights_change_little(arrays, ids):
    full, half = (runtime.build(NAME, CONFIG, backend="cython", arrays=arrays, weights=weights)(ids)[0] for weights in (None, "bfloat16"))
    assert 0.999 < (full * half).sum() / np.linalg.norm(full) / np.linalg.norm(half) < 1


def test_what_training_needs_is_refused_in_one_line(arrays, ids):
    model = runtime.build(NAME, CONFIG, backend="cython", arrays=arrays)
    with pytest.raises(ValueError, match=r"^return_aux must be False on the backend 'cython', .*$"):
        model(ids, return_aux=True)
    with pytest.raises(NotImplementedError, match=r"^update_memory is not on the backend 'cython', .*$"):
        model.update_memory({})


@pytest.mark.parametrize("kernel", ["dense", "selective_scan", "wkv", "mamba_step"])
def test_kernels_that_are_not_built(monkeypatch, kernel):
    monkeypatch.setitem(sys.modules, f"cython_ext.{kernel}", None)
    with pytest.raises(ImportError, match=rf"'cython' needs the compiled kernels: .*cython_ext\.{kernel} .*pip install -e \."):
        runtime.build(NAME, CONFIG, backend="cython")


def test_no_framework_is_imported():
    code = (
        "import sys, runtime, numpy as np\n"
        "from conf.models import GroundedMambaConfig\n"
        "model = runtime.build('grounded_mamba', GroundedMambaConfig(vocab_size=9, dim=8, depth=1, rwkv_heads=2, memory_size=3), 'cython')\n"
        "model(np.array([[1, 2]]))\n"
        "print(sorted({'torch', 'jax', 'flax', 'transformers'} & set(sys.modules)))\n")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
