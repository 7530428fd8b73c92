"""The compiled kernels as JAX operations: the bits of the NumPy call, gradients, transforms, other platforms, and what the switch says."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax")
for _kernel in ("selective_scan", "wkv", "delta_rule", "xla_ffi"):
    pytest.importorskip(f"cython_ext.{_kernel}")

import jax.numpy as jnp  # noqa: E402

import cython_ext  # noqa: E402
from cython_ext.tests.examples import (  # noqa: E402
    arguments,
    cotangent,
    plain_arguments,
    plain_cotangents,
    relative,
    wkv_arguments,
    wkv_cotangents,
)
from jax_impl.ops import compiled  # noqa: E402
from jax_impl.ops import delta_rule as rule_form  # noqa: E402
from jax_impl.ops import selective_scan as scan_form  # noqa: E402
from jax_impl.ops import wkv as wkv_form  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def kernels_or_nothing(monkeypatch):
    monkeypatch.setenv("GROUNDWAVE_KERNELS", "compiled")


@pytest.fixture
def threads():
    yield cython_ext.set_num_threads
    cython_ext.set_num_threads(None)


def scan_case(shape, dtype, optional):
    given = list(arguments(shape, dtype, optional, optional).values())
    return compiled.selective_scan, given, cotangent(shape, dtype), {}, (shape,)


def wkv_case(shape, dtype, optional):
    given = list(wkv_arguments(shape, dtype, optional, "direct").values())
    return compiled.wkv, given, wkv_cotangents(shape, dtype), {"time_first": "gain" if optional else "bonus"}, (shape,)


def rule_case(shape, dtype, optional):
    return compiled.delta_rule, list(plain_arguments(shape, dtype, optional).values()), plain_cotangents(shape, dtype), {}, (shape,)


def by_numpy(case):
    """Outputs and gradients of the same kernels called with NumPy arrays."""
    op, given, pulled, options, _ = case
    if op is compiled.selective_scan:
        states = cython_ext.selective_scan.forward(*given)
        return [states], cython_ext.selective_scan.backward(pulled, *given, states, 1e-5)
    module = cython_ext.wkv if op is compiled.wkv else cython_ext.delta_rule
    return list(module.forward(*given, *options.values())), module.backward(*pulled, *given, *options.values())


def by_jax(case):
    op, given, pulled, options, _ = case

    def run(given):
        found = op(*given, **options)
        return found[0] if op is compiled.selective_scan else found

    def both(given, pulled):
        outputs, pull = jax.vjp(run, given)
        return outputs, pull(pulled)[0]

    with jax.enable_x64(given[0].dtype == np.float64):
        outputs, gradients = jax.jit(both)(given, pulled)
        return [np.asarray(x) for x in jax.tree.leaves(outputs)], [None if x is None else np.asarray(x) for x in gradients]


# Single tokens, lengths about a chunk, several chunks; widths about the 16 lanes and the 4 rows of a group; work enough for several threads.
CASES = [
    *((scan_case, shape) for shape in ((1, 1, 4), (3, 63, 16), (2, 100, 33))),
    *((wkv_case, shape) for shape in ((1, 2, 2, 16), (2, 63, 3, 7), (1, 65, 2, 128))),
    *((rule_case, shape) for shape in ((1, 1, 1, 3), (2, 3, 63, 33), (1, 2, 257, 64))),
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize(("make", "shape"), CASES)
def test_outputs_and_gradients_have_the_bits_of_the_numpy_call(make, shape, optional, dtype, threads):
    case = make(shape, dtype, optional)
    expected, expected_gradients = by_numpy(case)
    compiled.reset_kernel_calls()
    threads(2)
    found, gradients = by_jax(case)
    assert compiled.kernel_calls() == 2
    for a, b in zip([*found, *gradients], [*expected, *expected_gradients], strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype == dtype and a.shape == b.shape and a.tobytes() == b.tobytes())


FORMS = {
    compiled.selective_scan: scan_form.selective_scan, compiled.wkv: partial(wkv_form.wkv, impl="recurrent"),
    compiled.delta_rule: partial(rule_form.delta_rule, impl="recurrent"),
}
SMALL = [(scan_case, (2, 9, 5)), (wkv_case, (2, 9, 2, 3)), (rule_case, (2, 2, 9, 3))]


@pytest.mark.parametrize(("make", "shape"), SMALL)
def test_the_gradient_of_a_loss_is_that_of_the_recurrent_form_mapped_and_recomputed_too(make, shape):
    """Each is a sum of some hundred rounded terms: 1e-12 is what the kernels themselves are held to."""
    op, given, _, options, _ = make(shape, "float64", True)

    def loss(op, given):
        return sum(jnp.sin(x).sum() for x in op(*given, **options))

    with jax.enable_x64(True):
        expected = jax.jit(jax.grad(partial(loss, FORMS[op])))(given)
        recomputed = jax.jit(jax.grad(jax.checkpoint(partial(loss, op))))(given)
        stacked = [jnp.stack([x, x[::-1]]) if x.ndim > 2 else jnp.stack([x, x]) for x in given]
        mapped = jax.jit(jax.vmap(jax.grad(partial(loss, op))))(stacked)
        other = jax.jit(jax.grad(partial(loss, FORMS[op])))([x[1] for x in stacked])
    for i, gradient in enumerate(expected):
        assert max(relative(recomputed[i], gradient), relative(mapped[i][0], gradient), relative(mapped[i][1], other[i])) < 1e-12


@pytest.mark.parametrize(("make", "shape"), SMALL)
def test_a_second_gradient_is_refused_by_name(make, shape):
    op, given, _, options, _ = make(shape, "float32", True)

    def slope(first):
        return jax.grad(lambda first: op(first, *given[1:], **options)[0].sum())(first).sum()

    with pytest.raises(NotImplementedError, match=r"the compiled \w+ has no second-order gradients; the JAX form has"):
        jax.grad(slope)(given[0])


def test_numbers_below_the_normal_range_are_kept_and_xla_gets_its_own_setting_back():
    """XLA's threads take them for zero."""
    given = [np.full((1, 4, 1, 1), 1e-22, np.float32)] * 3 + [np.full((1, 1), 0.9, np.float32), np.ones((1, 1), np.float32)]
    (_, state), (_, expected) = compiled.wkv(*given), cython_ext.wkv.forward(*given)
    assert expected[0, 0, 0, 0] != 0 and np.asarray(state).tobytes() == expected.tobytes()
    one, tiny = np.float32(1), np.float32(1e-38)

    def product(kernel, one, tiny):
        zero = compiled.wkv(*given)[1].ravel()[0] * 0 if kernel else 0
        return (one + zero) * tiny * 0.1

    after, alone = (np.asarray(jax.jit(partial(product, kernel))(one, tiny)) for kernel in (True, False))
    assert after.tobytes() == alone.tobytes()


@pytest.mark.parametrize(("make", "shape"), SMALL)
def test_on_auto_a_program_for_another_platform_holds_the_jax_form(monkeypatch, make, shape):
    op, given, _, options, _ = make(shape, "float32", True)

    def program(platform):
        gradient = jax.jit(jax.grad(lambda given: op(*given, **options)[0].sum()))
        checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in re.findall(r"groundwave_\w+", gradient.lower(given).as_text())]
        return jax.export.export(gradient, platforms=[platform], disabled_checks=checks)(given).mlir_module()

    monkeypatch.setenv("GROUNDWAVE_KERNELS", "auto")
    assert {platform: "groundwave_" in program(platform) for platform in ("cpu", "cuda", "tpu")} == {"cpu": True, "cuda": False, "tpu": False}


@pytest.mark.parametrize(("make", "shape"), SMALL)
def test_the_switch(monkeypatch, make, shape):
    op, given, _, options, _ = make(shape, "float32", True)
    half = [x.astype(jnp.float16) for x in given]
    compiled.reset_kernel_calls()
    for mode, arrays, calls in (("torch", given, 0), ("auto", half, 0), ("auto", given, 1), ("compiled", given, 2), ("", given, 3)):
        monkeypatch.setenv("GROUNDWAVE_KERNELS", mode)
        jax.block_until_ready(jax.jit(lambda *arrays: op(*arrays, **options))(*arrays))
        assert compiled.kernel_calls() == calls, mode
    monkeypatch.setenv("GROUNDWAVE_KERNELS", "compiled")
    with pytest.raises(RuntimeError, match=r"the kernel \w+ needs arrays all float32 or all float64, found float16"):
        op(*half, **options)
    with pytest.raises(RuntimeError, match=r"needs arrays all float32 or all float64, found float16 and float32"):
        op(half[0], *given[1:], **options)
    monkeypatch.setenv("GROUNDWAVE_KERNELS", "jax")
    with pytest.raises(ValueError, match="GROUNDWAVE_KERNELS must be one of auto, compiled, torch, found 'jax'"):
        op(*given, **options)


def test_what_a_kernel_cannot_do_is_the_jax_form_s_or_refused(monkeypatch):
    wide = list(arguments((1, 2, 257), "float32").values())
    rule = list(plain_arguments((1, 1, 5, 3), "float32").values())
    for call, words in ((lambda: compiled.selective_scan(*wide), "needs N of at most 256, found 257"),
                        (lambda: compiled.delta_rule(*rule, transform="lam"), "has transform 'exact' alone, found 'lam'")):
        monkeypatch.setenv("GROUNDWAVE_KERNELS", "compiled")
        with pytest.raises(RuntimeError, match=words):
            call()
        monkeypatch.setenv("GROUNDWAVE_KERNELS", "auto")
        compiled.reset_kernel_calls()
        jax.block_until_ready(jax.jit(call)())
        assert compiled.kernel_calls() == 0


def test_without_the_extension_the_jax_form_runs_with_a_warning(monkeypatch):
    given = list(arguments((1, 2, 3), "float32").values())
    compiled._unregistered.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(cython_ext, "is_built", lambda name: False)
        with pytest.raises(RuntimeError, match=r"the kernel selective_scan is not built: run `pip install -e \.`"):
            compiled.selective_scan(*given)
        patch.setenv("GROUNDWAVE_KERNELS", "auto")
        with pytest.warns(RuntimeWarning, match="the slower JAX form runs instead"):
            states, _ = compiled.selective_scan(*given)
    compiled._unregistered.cache_clear()
    np.testing.assert_allclose(states, scan_form.selective_scan(*given)[0], rtol=0, atol=0)


@pytest.mark.parametrize(("make", "shape"), SMALL)
def test_wrong_shapes_are_refused_by_name(make, shape):
    op, given, _, options, _ = make(shape, "float32", True)
    with pytest.raises(ValueError, match=r"must have shape \(B, .*\) with no axis empty, found"):
        op(given[0][:, :0], *given[1:], **options)
    for i in range(1, len(given)):
        wrong = [*given[:i], np.zeros((*given[i].shape, 1), np.float32), *given[i + 1:]]
        with pytest.raises(ValueError, match=r"^\w+ must have shape \(.*\) = \(.*\), found \("):
            op(*wrong, **options)
    if op is not compiled.selective_scan:
        with pytest.raises(ValueError, match="chunk_size must be at least 1, found 0"):
            op(*given, chunk_size=0)


def test_a_program_under_way_does_not_keep_python_from_its_end():
    """XLA runs the kernels while the interpreter ends and holds the GIL: a handler that took it would wait for ever."""
    code = (
        "import os\nos.environ['GROUNDWAVE_KERNELS'] = 'compiled'\n"
        "import jax, jax.numpy as jnp\nfrom jax_impl.ops import compiled\n"
        "r, w = jnp.full((1, 64, 2, 32), 0.1), jnp.full((2, 32), 0.5)\n"
        "def many(r):\n    return jax.lax.scan(lambda r, _: (compiled.wkv(r, r, r, w, w)[0], None), r, None, length=1500)[0]\n"
        "jax.jit(many)(r)\nprint('under way')")
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "under way\n"), ended.stderr


def test_the_binary_interface_is_the_one_that_jaxlib_has():
    header = (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()
    found = [int(re.search(rf"#define XLA_FFI_API_{part} (\d+)", header)[1]) for part in ("MAJOR", "MINOR")]
    assert found[0] == 0 and found[1] >= 3
