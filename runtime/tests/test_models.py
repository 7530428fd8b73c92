"""`deltanet_lm` and `lam` by the one door: the same arguments, structure, weights and numbers on every backend, and what is refused."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import runtime
from conf.models import DeltaNetConfig, GroundedMambaConfig, LamConfig, WaveCoreConfig
from runtime.arrays import layout, parameter_count
from runtime.init import init_arrays

LM = DeltaNetConfig(vocab_size=23, dim=12, depth=1, heads=3, ffn_dim=17, conv_kernel=5, chunk_size=5)
ENCODER = LamConfig(vocab_size=61, dim=30, heads=3, depth=1, ffn_dim=23, max_positions=13, max_length=21, chunk_size=5)
CONFIGS = {"deltanet_lm": LM, "lam": ENCODER}
BACKENDS = {"deltanet_lm": ("torch", "torch_compiled", "jax"), "lam": ("torch", "torch_compiled", "jax", "cython")}
NEEDED = {
    "torch": ["torch"], "torch_compiled": ["torch", "cython_ext.delta_rule"], "jax": ["jax", "flax"], "cython": ["cython_ext.lam_engine"],
}
PAIRS = [(name, backend) for name, backends in BACKENDS.items() for backend in backends]


@pytest.fixture
def installed(request):
    for package in NEEDED[request.node.callspec.params["backend"]]:
        pytest.importorskip(package)


def ids_and_mask():
    ids = np.random.default_rng(0).integers(0, 23, (2, 16))
    mask = np.ones((2, 16), dtype=np.int64)
    mask[1, 11:] = 0
    return ids, mask


def randomised(name):
    """No leaf at zero or one, so that every one of them matters."""
    arrays, generator = init_arrays(name, CONFIGS[name], 2), np.random.default_rng(2)
    arrays = {key: value + 0.1 * generator.standard_normal(value.shape) for key, value in arrays.items()}
    return arrays | ({"lm_head.weight": arrays["embedding.weight"]} if name == "deltanet_lm" else {})


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def bits(arrays):
    return {key: (value.dtype, value.shape, value.tobytes()) for key, value in arrays.items()}


@pytest.mark.parametrize("name, changes", [
    ("deltanet_lm", {}), ("deltanet_lm", dict(depth=3, heads=4, conv_kernel=2)),
    ("lam", {}), ("lam", dict(depth=2, heads=15)), ("lam", dict(heads=30)),  # heads of 2 and 1 channels: the fluxes keep one hidden unit
])
def test_the_layout_is_the_state_dict(name, changes):
    pytest.importorskip("torch")
    from torch_impl.deltanet import DeltaNetLM
    from torch_impl.lam import LAM

    config = replace(CONFIGS[name], **changes)
    held = {"deltanet_lm": DeltaNetLM, "lam": LAM}[name](config).state_dict()
    assert [(key, entry.shape) for key, entry in layout(name, config).items()] == [(key, tuple(value.shape)) for key, value in held.items()]


def test_parameter_counts():
    assert parameter_count("lam", LamConfig()) == 23_700_948
    assert parameter_count("lam", LamConfig()) + 384 * 384 + 384 == 23_848_788  # with BERT's pooler
    layer = 5 * 512**2 + 4 * 512 + 3 * (4 * 512 + 512) + 2 * 128  # projections, beta, convolutions, o_norm
    assert parameter_count("deltanet_lm", DeltaNetConfig()) == 10000 * 512 + 8 * (layer + 2 * 512 + 3 * 512 * 1408) + 512


@pytest.mark.parametrize("name, backend", PAIRS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_same_seed_same_weights(installed, name, backend, dtype):
    model = runtime.build(name, CONFIGS[name], backend=backend, dtype=dtype, seed=6)
    assert bits(model.arrays()) == bits({key: value.astype(dtype) for key, value in init_arrays(name, CONFIGS[name], 6).items()})
    assert (model.name, model.config, model.dtype, model.backend) == (name, CONFIGS[name], dtype, backend)


def test_language_models_agree_stream_and_generate_alike():
    for package in NEEDED["torch"] + NEEDED["jax"]:
        pytest.importorskip(package)
    ids = ids_and_mask()[0]
    models = [runtime.build("deltanet_lm", LM, backend, randomised("deltanet_lm"), "float64") for backend in BACKENDS["deltanet_lm"]]
    (a, states_a, aux_a), *others = (model(ids, return_aux=True) for model in models)
    for b, states_b, aux_b in others:
        assert isinstance(b, np.ndarray) and a.shape == b.shape == (2, 16, 23) and aux_a == aux_b == {}
        assert relative(b, a) < 1e-11  # what the project promises between two backends, end to end
        assert [sorted(state) for state in states_b] == [["S", "conv_k", "conv_q", "conv_v"]]
        assert all(isinstance(states_b[0][key], np.ndarray) and relative(states_b[0][key], value) < 1e-11 for key, value in states_a[0].items())
    for model in models[:2]:
        first, carried = model(ids[:, :9])
        second, _ = model(ids[:, 9:], [{key: np.asarray(value) for key, value in carried[0].items()}])
        assert relative(np.concatenate([first, second], 1), a) < 1e-13  # the same sums in another order
    options = dict(temperature=0.7, top_k=5, seed=3)
    tokens = [model.generate(ids[:1, :1], 6, **options) for model in models]
    assert tokens[0].shape == (1, 7) and all(np.array_equal(found, tokens[0]) for found in tokens)
    with pytest.raises(ValueError, match=r"states\[0\]\['conv_q'\] must have shape \(1, 4, 12\), found \(2, 4, 12\)"):
        models[-1](ids[:1], states_b)


def test_deltanet_lm_has_no_engine():
    message = r"backend of 'deltanet_lm' must be one of 'torch', 'torch_compiled', 'jax', 'jax_compiled', found 'cython'$"
    with pytest.raises(ValueError, match=message):
        runtime.build("deltanet_lm", LM, "cython")


def test_encoders_agree():
    for backend in BACKENDS["lam"]:
        for package in NEEDED[backend]:
            pytest.importorskip(package)
    ids, mask = ids_and_mask()
    models = [runtime.build("lam", ENCODER, backend, randomised("lam"), "float64") for backend in BACKENDS["lam"]]
    outputs = [model(ids, mask, output_hidden_states=True) for model in models]
    for output in outputs:
        assert output._fields == ("last_hidden_state", "embedding", "hidden_states")
        assert output.last_hidden_state.shape == (2, 16, 30) and output.embedding.shape == (2, 30)
        assert len(output.hidden_states) == 2 and not output.last_hidden_state[1, 11:].any()
        assert all(isinstance(leaf, np.ndarray) and leaf.dtype == np.float64 for leaf in (*output[:2], *output.hidden_states))
        assert np.array_equal(output.hidden_states[-1], output.last_hidden_state)
        assert relative(output.embedding, outputs[0].embedding) < 1e-11  # what the project promises, end to end
        assert all(relative(a, b) < 1e-11 for a, b in zip(output.hidden_states, outputs[0].hidden_states, strict=True))
    alone = models[0](ids[1:, :11].tolist())
    assert alone.hidden_states is None and relative(alone.embedding[0], outputs[0].embedding[1]) < 1e-13


@pytest.mark.parametrize("backend", BACKENDS["lam"])
def test_bad_input_is_one_clear_line_on_every_backend(installed, backend):
    model = runtime.build("lam", ENCODER, backend)
    ids, mask = ids_and_mask()
    hole, left, empty = mask.copy(), mask.copy(), mask.copy()
    hole[0, 7], left[1, :2], empty[1] = 0, 0, 0
    for bad_ids, bad_mask, message in (
        ([[3, 61]], None, r"input_ids .*\[0, 61\), found 61"),
        ([[3, 2**40]], None, r"input_ids .*\[0, 61\), found 1099511627776"),
        ([3, 4], None, r"input_ids must have shape \(batch, length\).*found \(2,\)"),
        ([[0.5]], None, r"input_ids must be int.*, found .*float64"),
        (np.zeros((1, 22), int), None, "at most max_length=21 tokens, found 22"),
        (ids, mask[:, :5], r"attention_mask must have the shape of input_ids, \(2, 16\), found \(2, 5\)"),
        (ids, hole, "attention_mask: row 0 has padding before a valid token"),
        (ids, left, "attention_mask: row 1 has padding before a valid token"),
        (ids, empty, "attention_mask: row 1 has no valid token"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            model(bad_ids, bad_mask)
        assert "\n" not in str(caught.value)


def test_own_arrays_and_gradients():
    torch = pytest.importorskip("torch")
    ids, mask = map(torch.from_numpy, ids_and_mask())
    model = runtime.build("lam", ENCODER)
    embedding = model(ids, mask).embedding
    embedding.sum().backward()
    assert model.module.blocks[0].delta.q_proj.weight.grad.any()
    assert torch.equal(model(ids, mask.numpy()).embedding, embedding)  # a mask of either kind


def test_the_compiled_backends_run_the_kernel(monkeypatch):
    for package in NEEDED["torch_compiled"]:
        pytest.importorskip(package)
    from torch_impl.ops import compiled

    monkeypatch.delenv("GROUNDWAVE_KERNELS", raising=False)
    for backend, runs in (("torch", False), ("torch_compiled", True)):
        compiled.reset_kernel_calls()
        runtime.build("lam", ENCODER, backend)(*ids_and_mask())
        assert bool(compiled.kernel_calls()) is runs
    for backend, runs in (("torch", 0), ("torch_compiled", 1)):
        compiled.reset_kernel_calls()
        runtime.build("deltanet_lm", LM, backend)(ids_and_mask()[0])
        assert compiled.kernel_calls() == compiled.kernel_calls("delta_rule") == runs


@pytest.mark.parametrize("name, backend", [(name, backend) for name, backend in PAIRS if backend != "torch_compiled"])
def test_save_on_one_load_on_the_other(tmp_path, installed, name, backend):
    pytest.importorskip("torch")
    model = runtime.build(name, CONFIGS[name], backend, randomised(name), "float64")
    runtime.save(model, tmp_path)
    loaded = runtime.load(tmp_path, backend="torch")
    assert (loaded.name, loaded.config, loaded.dtype) == (name, CONFIGS[name], "float64") and bits(loaded.arrays()) == bits(model.arrays())
    assert ("lm_head.weight" in loaded.arrays()) is (name == "deltanet_lm")  # tied: written once, there all the same
    assert (tmp_path / "model.safetensors").stat().st_size < 8 * parameter_count(name, CONFIGS[name]) + 12_000  # and the header
    assert bits(runtime.load(tmp_path, backend=backend, dtype="float32").arrays()) == bits(
        {key: value.astype(np.float32) for key, value in model.arrays().items()})


@pytest.mark.parametrize("backend, absent, message", [
    ("cython", "cython_ext.lam_engine", r"'cython' needs the compiled kernels: .*pip install -e \."),
    ("cython", "cython_ext.delta_rule", r"'cython' needs the compiled kernels: .*pip install -e \."),
    ("torch_compiled", "cython_ext.delta_rule", r"'torch_compiled' needs the compiled kernels: .*pip install -e \."),
    ("jax", "flax", r"'jax' needs flax: pip install 'groundwave\[jax\]'"),
])
def test_a_backend_that_is_not_there(monkeypatch, installed, backend, absent, message):
    monkeypatch.delenv("GROUNDWAVE_KERNELS", raising=False)
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(ImportError, match=message):
        runtime.build("lam", ENCODER, backend)


def test_the_engine_of_lam_needs_no_framework():
    pytest.importorskip("cython_ext.lam_engine")
    code = (
        "import sys\nfor name in ('torch', 'jax', 'flax'): sys.modules[name] = None\n"
        "import runtime\nfrom conf.models import LamConfig\n"
        "model = runtime.build('lam', LamConfig(vocab_size=61, dim=30, heads=3, depth=1, ffn_dim=23), 'cython')\n"
        "print(model([[3, 4, 5]], [[1, 1, 0]]).embedding.shape, model.backend, 'torch_impl' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(1, 30) cython False", done.stderr


def test_weights_of_lam_in_bfloat16():
    pytest.importorskip("cython_ext.lam_engine")
    arrays = {key: value.astype(np.float32) for key, value in randomised("lam").items()}
    full, half = (runtime.build("lam", ENCODER, "cython", arrays, weights=weights) for weights in (None, "bfloat16"))
    found, expected = (model([[3, 4, 5, 6]]).embedding[0] for model in (half, full))
    assert not np.array_equal(found, expected) and found @ expected > 0.9999  # the bound of the specification; unit vectors
    assert bits(half.arrays()) == bits(full.arrays()) == bits(arrays)
    with pytest.raises(ValueError, match="weights must be 'float32' or 'bfloat16', found 'int8'"):
        runtime.build("lam", ENCODER, "cython", weights="int8")
    with pytest.raises(ValueError, match="weights must be 'float64', found 'bfloat16'"):
        runtime.build("lam", ENCODER, "cython", dtype="float64", weights="bfloat16")


@pytest.mark.parametrize("weights", [None, "bfloat16"])
@pytest.mark.parametrize("name, config, widths", [
    ("lam", ENCODER, {}),
    ("grounded_mamba", GroundedMambaConfig(vocab_size=70, dim=36, depth=2, ssm_dim=18, rwkv_heads=2, memory_size=7, retrieval_heads=2), {}),
    ("wavecore", WaveCoreConfig.development(heads=("action", "value")), dict(obs_dim=19, action_dim=17, output_dim=22)),
    ("wavecore", WaveCoreConfig.development(use_mamba_wave=False), dict(obs_dim=19, action_dim=17, output_dim=22)),
])
def test_an_engine_gives_back_the_bits_that_it_was_given(name, config, widths, weights):
    """Most arrays are held once, packed for the kernels."""
    pytest.importorskip("cython_ext.lam_engine")
    generator = np.random.default_rng(3)
    for dtype in ("float32",) if weights else ("float32", "float64"):
        arrays = init_arrays(name, config.sized(**widths) if widths else config, 3)
        for key, value in arrays.items():
            if key.endswith("memory_count"):
                value[:4] = 3  # an occupied bank
            elif value.dtype == np.float64:
                arrays[key] = (value + 0.1 * generator.standard_normal(value.shape)).astype(dtype)
        if name == "grounded_mamba":
            arrays["lm_head.weight"] = arrays["embedding.weight"]
        model = runtime.build(name, config, "cython", arrays, dtype, weights=weights, **widths)
        found = model.arrays()
        assert list(found) == list(arrays) and bits(found) == bits(arrays)
        for value in found.values():
            value.fill(7)
        assert bits(model.arrays()) == bits(arrays)
