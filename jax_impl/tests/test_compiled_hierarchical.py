"""The compiled hierarchical delta rule as a JAX operation: the bits of the NumPy call, where the JAX form takes over, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")
for _kernel in ("delta_rule", "xla_ffi"):
    pytest.importorskip(f"cython_ext.{_kernel}")

import cython_ext  # noqa: E402
import runtime  # noqa: E402
from conf.models import LamConfig  # noqa: E402
from cython_ext.tests.examples import delta_arguments, relative  # noqa: E402
from jax_impl.ops import compiled  # noqa: E402
from jax_impl.ops.compiled_hierarchical import hierarchical_delta_rule  # noqa: E402


@pytest.fixture(autouse=True)
def kernels_or_nothing(monkeypatch):
    monkeypatch.setenv("GROUNDWAVE_KERNELS", "compiled")
    cython_ext.set_num_threads(2)
    yield
    cython_ext.set_num_threads(None)


def run(given, transform):
    arrays = {name: value for name, value in given.items() if name != "chunk_size"}
    with jax.enable_x64(given["q"].dtype == np.float64):
        o, states = jax.jit(lambda arrays: hierarchical_delta_rule(**arrays, chunk_size=given["chunk_size"], transform=transform))(arrays)
        return [np.asarray(x) for x in (o, *states)]


# (B, H, L, d, C): one token, one chunk and a token, chunks whose last is short, more chunks than a window holds; padded but for the first.
@pytest.mark.parametrize(("shape", "optional", "transform", "dtype"), [
    ((1, 1, 1, 5, 64), False, "lam", "float32"), ((2, 3, 65, 5, 64), True, "exact", "float32"), ((3, 2, 100, 6, 16), True, "lam", "float64"),
    ((2, 2, 700, 32, 64), False, "lam", "float32"),
])
def test_outputs_have_the_bits_of_the_numpy_call(shape, optional, transform, dtype):
    given = delta_arguments(shape, dtype, optional, optional)
    expected, states = cython_ext.delta_rule.hierarchical_forward(**given, transform=transform)
    compiled.reset_kernel_calls()
    found = run(given, transform)
    assert compiled.kernel_calls() == compiled.kernel_calls("hierarchical_delta_rule") == 1
    for a, b in zip(found, (expected, *states), strict=True):
        assert a.dtype == b.dtype == dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_a_row_without_a_valid_token_gives_zeros():
    given = {**delta_arguments((2, 2, 9, 4, 4), "float32", False), "mask": np.array([[True] * 9, [False] * 9])}
    o, fast, slow = run(given, "lam")
    assert np.isfinite(o).all() and o[0].any() and fast[0].any() and not o[1].any() and not fast[1].any() and not slow[1].any()


def test_gradients_are_the_jax_form_s_or_refused(monkeypatch):
    given = delta_arguments((1, 1, 3, 2, 4), "float32", True)
    rest = {name: value for name, value in given.items() if name not in ("v", "mask")}

    def gradient():
        return jax.jit(jax.grad(lambda v: hierarchical_delta_rule(v=v, **rest)[0].sum()))(given["v"])

    with pytest.raises(RuntimeError, match="the kernel hierarchical_delta_rule has no gradient and one is taken"):
        gradient()
    found = {}
    for mode in ("auto", "torch"):
        monkeypatch.setenv("GROUNDWAVE_KERNELS", mode)
        found[mode] = np.asarray(gradient())
    assert found["auto"].any() and found["auto"].tobytes() == found["torch"].tobytes()


@pytest.mark.parametrize("name", ["k", "beta", "slow_gate", "token_mlp", "chunk_mlp", "bilinear", "temp", "mask", "initial_state"])
def test_wrong_shapes_are_refused_by_name(name):
    given = delta_arguments((1, 2, 5, 3, 4), "float32", True)
    value = given[name]
    given[name] = (*value[:-1], value[-1][..., None]) if isinstance(value, tuple) else value[..., None]
    with pytest.raises(ValueError, match=rf"^(\w+ of )?{name} must have shape \(.*\) with no axis empty, found"):
        hierarchical_delta_rule(**given)


def test_lam_runs_it():
    config = LamConfig(vocab_size=31, dim=12, heads=3, depth=1, ffn_dim=17, max_positions=13, max_length=21, chunk_size=5)
    ids, mask = np.random.default_rng(0).integers(0, 31, (2, 13)), np.arange(13) < np.array([[13], [7]])
    expected, found = (runtime.build("lam", config, backend, dtype="float64") for backend in ("jax", "jax_compiled"))
    expected = expected(ids, mask).last_hidden_state
    compiled.reset_kernel_calls()
    found = found(ids, mask).last_hidden_state
    assert compiled.kernel_calls() == compiled.kernel_calls("hierarchical_delta_rule") == 1
    assert relative(found, expected) < 1e-11
