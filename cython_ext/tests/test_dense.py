"""The dense kernels and their NumPy twins: sizes, odd inputs, NaN, bfloat16, and the number of threads."""

from __future__ import annotations

import inspect
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import cython_ext
from cython_ext import reference
from cython_ext.checks_dense import ACTIVATIONS
from cython_ext.packing import bfloat16, pack
from cython_ext.tests.examples import relative
from cython_ext.tests.test_selective_scan import LAYOUTS, same_bits
from cython_ext.threads import threads_for

KERNEL, TWIN = cython_ext.dense, reference.dense
BOTH = pytest.mark.parametrize("dense", [KERNEL, TWIN], ids=["kernel", "reference"])
FUNCTIONS = ("linear", "layer_norm", "rms_norm", "gelu", "l2norm", "masked_mean", "depthwise_conv")
AWKWARD = (1, 3, 63, 100, 257)
# Two float64 forms of one formula differ by rounding alone.
FLOAT64 = 1e-12
# A rounding of float32 is 2**-24; in a sum of a few hundred terms one meets about their square root. 8 of them were the most seen.
FLOAT32 = 24 * 2.0**-24


def drawn(*shape, dtype="float64", seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


def calls(dtype="float64", rows=(2, 7), width=63):
    """Arguments of every function, by name."""
    x = drawn(*rows, width, dtype=dtype)
    weight, bias = 1 + drawn(width, dtype=dtype, seed=1) / 4, drawn(width, dtype=dtype, seed=2)
    mask = np.arange(rows[1]) < np.array([rows[1], 3] + [1] * (rows[0] - 2))[: rows[0], None]
    return {
        "linear": dict(x=x, weight=drawn(100, width, dtype=dtype), bias=drawn(100, dtype=dtype), activation="gelu"),
        "layer_norm": dict(x=x, weight=weight, bias=bias, eps=1e-6),
        "rms_norm": dict(x=x, weight=weight, eps=1e-5),
        "gelu": dict(x=x),
        "l2norm": dict(x=x),
        "masked_mean": dict(x=x, mask=mask),
        "depthwise_conv": dict(x=x, weight=drawn(width, 1, 4, dtype=dtype), bias=bias, left=2, activation="silu"),
    }


@pytest.fixture(autouse=True)
def default_threads():
    yield
    cython_ext.set_num_threads(None)


@pytest.mark.parametrize("outputs", [*AWKWARD, 15, 16, 64])
@pytest.mark.parametrize("inputs", AWKWARD)
def test_linear_equals_reference(inputs, outputs):
    """One row, few rows and many take three ways through the kernel; 257 rows leave one for a tile of its own."""
    for rows in (1, 3, 5, 63, 100, 257):
        x, weight, bias = drawn(rows, inputs), drawn(outputs, inputs, seed=1), drawn(outputs, seed=2)
        expected = TWIN.linear(x, weight, bias)
        assert relative(KERNEL.linear(x, weight, bias), expected) < FLOAT64
        found = KERNEL.linear(*(value.astype(np.float32) for value in (x, weight, bias)))
        assert found.dtype == np.float32 and relative(found, expected) < FLOAT32


@pytest.mark.parametrize("storage", ["float32", "float64", "bfloat16"])
def test_every_processor_gives_the_same_product(storage):
    """AVX-512 and AVX2 the same bits, BLAS the same values; a row its own bits whatever stands beside it. 1024 columns share a set of the cache."""
    best, order = KERNEL.instructions(), ("avx512", "avx2", "blas")
    dtype, kinds = "float64" if storage == "float64" else "float32", order[order.index(best) :]
    try:
        for inputs, outputs in ((63, 100), (1024, 17), (512, 257), (1, 64), (300, 16)):
            packed, rows = pack(drawn(outputs, inputs, dtype=dtype), storage), drawn(43, inputs, dtype=dtype)
            bias, found = drawn(outputs, dtype=dtype), {}
            for kind in kinds:
                assert KERNEL.instructions(kind) == kind
                found[kind] = [KERNEL.linear(rows[:count], packed, bias, "silu") for count in range(2, 44)]
            expected = TWIN.linear(rows.astype(np.float64), packed.matrix().astype(np.float64), bias.astype(np.float64), "silu")
            for kind, values in found.items():
                assert all(relative(value, expected[: len(value)]) < (FLOAT64 if dtype == "float64" else FLOAT32) for value in values), kind
                if kind != "blas":
                    assert same_bits(values, found[best]) and same_bits(values, [values[-1][: len(value)] for value in values]), kind
        with pytest.raises(ValueError, match=r"instructions must be one of 'blas'.*, found 'neon'"):
            KERNEL.instructions("neon")
    finally:
        KERNEL.instructions(best)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    x = np.concatenate([np.linspace(-12, 12, 5001), np.linspace(-1, 1, 999), [0.0, -0.0, 1e-30, -88.0, 95.0, -700.0]])[:, None]
    one = np.ones((1, 1))
    expected = TWIN.linear(x, one, activation=activation)
    assert relative(KERNEL.linear(x, one, activation=activation), expected) < FLOAT64
    single = x.astype(np.float32)
    expected = TWIN.linear(single.astype(np.float64), one, activation=activation)
    for dense in (KERNEL, TWIN):
        found = dense.linear(single, one.astype(np.float32), activation=activation)
        scale = np.maximum(np.abs(expected), np.abs(x) * 2.0**-2)  # gelu cancels for negative x, in every form of it
        normal = np.abs(expected) > 2.0**-126
        assert (np.abs(found - expected) / np.maximum(scale, 1e-38))[normal].max() < 8 * 2.0**-24
        assert np.isfinite(found).all()


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_activations_at_infinity_and_nan(dense, dtype):
    x, one = np.array([[np.inf], [-np.inf], [np.nan]], dtype), np.ones((1, 1), dtype)
    expected = {
        "none": [np.inf, -np.inf], "relu": [np.inf, 0], "tanh": [1, -1], "sigmoid": [1, 0], "gelu": [np.inf, np.nan],
        "softplus": [np.inf, 0], "silu": [np.inf, np.nan],
    }
    with np.errstate(invalid="ignore"):
        for activation, ends in expected.items():
            assert np.array_equal(dense.linear(x, one, activation=activation)[:, 0], np.array([*ends, np.nan], dtype), equal_nan=True)


@pytest.mark.parametrize("name", FUNCTIONS[1:])
@pytest.mark.parametrize("width", AWKWARD)
def test_rows_equal_reference(name, width):
    for rows in ((1, 1), (3, 100)):
        arguments = calls("float64", rows, width)[name]
        expected = getattr(TWIN, name)(**arguments)
        found = getattr(KERNEL, name)(**arguments)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype) and relative(found, expected) < FLOAT64
        if width > 1 or "norm" not in name:  # one channel less its mean is nothing but rounding
            single = {key: value.astype(np.float32) if getattr(value, "dtype", None) == np.float64 else value for key, value in arguments.items()}
            found = getattr(KERNEL, name)(**single)
            assert found.dtype == np.float32 and relative(found, expected) < FLOAT32


def test_the_equations_against_torch():
    torch = pytest.importorskip("torch")
    from torch_impl.ops.normalise import layer_norm, rms_norm
    from torch_impl.ops.short_conv import short_conv

    given = {name: {key: torch.as_tensor(value) if isinstance(value, np.ndarray) else value for key, value in arguments.items()}
             for name, arguments in calls().items()}
    functional = torch.nn.functional
    mask = given["masked_mean"]["mask"]
    expected = {
        "linear": functional.gelu(functional.linear(given["linear"]["x"], given["linear"]["weight"], given["linear"]["bias"])),
        "layer_norm": layer_norm(**given["layer_norm"]),
        "rms_norm": rms_norm(**given["rms_norm"]),
        "gelu": functional.gelu(given["gelu"]["x"]),
        "l2norm": functional.normalize(given["l2norm"]["x"], dim=-1),
        "masked_mean": (given["masked_mean"]["x"] * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
        "depthwise_conv": functional.silu(short_conv(*(given["depthwise_conv"][key] for key in ("x", "weight", "bias", "left")))),
    }
    for name, arguments in calls().items():
        for dense in (KERNEL, TWIN):
            assert relative(getattr(dense, name)(**arguments), expected[name].numpy()) < FLOAT64, name


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("shape", [(100, 63), (64, 257), (16, 1), (15, 9)])
def test_bfloat16_weights(shape, rows):
    weight, x = drawn(*shape, dtype="float32"), drawn(rows, shape[1], dtype="float32")
    packed = pack(weight, "bfloat16")
    rounded = packed.matrix()
    assert relative(rounded, weight) < 2.0**-8 and (np.array_equal(rounded, weight) == (shape[0] < 16))
    assert packed.weight.nbytes == (weight.nbytes if shape[0] < 16 else -(-shape[0] // 64) * 128 * shape[1])
    for dense in (KERNEL, TWIN):
        assert relative(dense.linear(x, packed), x.astype(np.float64) @ rounded.T.astype(np.float64)) < FLOAT32


def test_rounding_to_bfloat16():
    torch = pytest.importorskip("torch")
    ties_and_ends = np.array([0.0, -0.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 3.4e38, 1e-40, np.inf, -np.inf], np.float32)
    x = np.concatenate([drawn(1000, dtype="float32"), ties_and_ends])
    assert np.array_equal(bfloat16(x), torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16))
    assert np.isnan((bfloat16(np.array([np.nan], np.float32)).astype(np.uint32) << 16).view(np.float32)).all()


@BOTH
def test_packed_once_gives_the_same_bits(dense):
    for outputs in (3, 100):
        x, weight = drawn(5, 63), drawn(outputs, 63, seed=1)
        assert same_bits([dense.linear(x, pack(weight))], [dense.linear(x, weight)])
        assert same_bits([pack(weight).matrix()], [weight])


def test_twins_share_signature_and_docstring():
    for name in FUNCTIONS:
        kernel, twin = getattr(KERNEL, name), getattr(TWIN, name)
        assert inspect.getdoc(kernel) == inspect.getdoc(twin)
        assert str(inspect.signature(kernel)) == str(inspect.signature(twin))


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_bits_and_stays_as_it_was(dense, layout, dtype):
    for name, arguments in calls(dtype).items():
        laid = {key: LAYOUTS[layout](value) if isinstance(value, np.ndarray) and value.dtype != bool else value for key, value in arguments.items()}
        assert same_bits([getattr(dense, name)(**laid)], [getattr(dense, name)(**arguments)]), name
        assert all(np.array_equal(laid[key], value) for key, value in arguments.items())


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nan_stays_in_its_row(dense, dtype):
    for rows in ((2, 1), (2, 7)):
        for name, arguments in calls(dtype, rows).items():
            clean = getattr(dense, name)(**arguments)
            arguments["x"] = arguments["x"].copy()
            arguments["x"][0, 0, 5] = np.nan
            found = getattr(dense, name)(**arguments)
            assert same_bits([found[1]], [clean[1]]), name
            spoilt = found[0, 5] if name == "masked_mean" else found[0, 0, 5]
            assert np.isnan(spoilt), name


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nothing_is_read_from_an_output_before_it_is_written(monkeypatch, dtype):
    given = calls(dtype)
    expected = [getattr(KERNEL, name)(**arguments) for name, arguments in given.items()]
    empty, poisoned = np.empty, []

    def poison(*arguments, **options):
        poisoned.append(empty(*arguments, **options))
        poisoned[-1].fill(np.nan)
        return poisoned[-1]

    monkeypatch.setattr(np, "empty", poison)
    assert same_bits([getattr(KERNEL, name)(**arguments) for name, arguments in given.items()], expected)
    assert len(poisoned) >= 6


@pytest.mark.parametrize("rows", [1, 3, 300])
@pytest.mark.parametrize("storage", ["float32", "float64", "bfloat16"])
def test_the_number_of_threads_changes_no_bit(storage, rows):
    dtype = "float64" if storage == "float64" else "float32"
    x, packed = drawn(rows, 600, dtype=dtype), pack(drawn(700, 600, dtype=dtype, seed=1), storage)
    results = []
    for threads in (1, 2, 4):
        cython_ext.set_num_threads(threads)
        assert threads_for(700, rows * 600 * 700) == threads
        results.append(KERNEL.linear(x, packed, activation="tanh"))
    assert same_bits(results[1:], [results[0]] * 2)


def test_two_python_threads_at_once():
    cython_ext.set_num_threads(2)
    cases = [(drawn(rows, 600), pack(drawn(700, 600, seed=1))) for rows in (1, 20)]
    expected = [KERNEL.linear(*case) for case in cases]
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(KERNEL.linear, *cases[i % 2]) for i in range(20)]
        assert all(same_bits([future.result()], [expected[i % 2]]) for i, future in enumerate(futures))


# (function, argument, what becomes of its good value, error, words of the message)
BAD = [
    ("linear", "x", lambda a: a.tolist(), TypeError, "x must be a NumPy array without a mask, found list"),
    ("linear", "x", lambda a: a.astype(np.float16), TypeError, "x must be float32 or float64, found float16"),
    ("linear", "x", lambda a: a[:0], ValueError, r"x must have shape \(..., I\) with no axis empty, found \(0, 7, 63\)"),
    ("linear", "x", lambda a: a[..., :0], ValueError, "x must have shape .* no axis empty"),
    ("linear", "weight", lambda a: a[:, :60], ValueError, r"weight must have shape \(O, I\) = \(100, 63\), found \(100, 60\)"),
    ("linear", "weight", lambda a: a[:0], ValueError, r"weight must have shape \(O, I\) with no axis empty, found \(0, 63\)"),
    ("linear", "weight", lambda a: a.astype(np.float32), TypeError, "weight must be float64, found float32"),
    ("linear", "weight", lambda a: pack(a.astype(np.float32)), TypeError, "weight must be packed for float64, found one for float32"),
    ("linear", "weight", lambda a: pack(a[:, :60]), ValueError, "weight must have I = 63 inputs, found 60"),
    ("linear", "bias", lambda a: a[:9], ValueError, r"bias must have shape \(O\) = \(100,\), found \(9,\)"),
    ("linear", "activation", lambda a: "swish", ValueError, "activation must be one of 'none', .*, found 'swish'"),
    ("layer_norm", "weight", lambda a: a[:9], ValueError, r"weight must have shape \(D\) = \(63,\), found \(9,\)"),
    ("layer_norm", "eps", lambda a: 0.0, ValueError, "eps must be a positive finite number, found 0.0"),
    ("rms_norm", "x", lambda a: a.astype(np.int64), TypeError, "x must be float32 or float64, found int64"),
    ("gelu", "x", lambda a: np.float64(3), TypeError, "x must be a NumPy array"),
    ("l2norm", "x", lambda a: a[:, :0], ValueError, "x must have shape .* no axis empty"),
    ("masked_mean", "mask", lambda a: a[:, ::-1], ValueError, "mask must pad on the right only, found a hole in row 1"),
    ("masked_mean", "mask", lambda a: a & False, ValueError, "mask must leave a valid token in every row, found none in row 0"),
    ("masked_mean", "x", lambda a: a[0], ValueError, r"x must have shape \(B, L, D\) with no axis empty, found \(7, 63\)"),
    ("depthwise_conv", "weight", lambda a: a[:, 0], ValueError, r"weight must have shape \(D, 1, K\) with no axis empty, found \(63, 4\)"),
    ("depthwise_conv", "left", lambda a: 4, ValueError, "left must lie between 0 and K - 1 = 3, found 4"),
    ("depthwise_conv", "left", lambda a: 1.0, TypeError, "left must be an integer, found 1.0"),
]


@BOTH
@pytest.mark.parametrize(("name", "argument", "spoil", "error", "message"), BAD)
def test_bad_input_is_refused_by_name(dense, name, argument, spoil, error, message):
    arguments = calls()[name]
    with pytest.raises(error, match=message):
        getattr(dense, name)(**{**arguments, argument: spoil(arguments[argument])})


@pytest.mark.parametrize(("weight", "weights", "error", "message"), [
    ([[1.0]], None, TypeError, "weight must be a NumPy array without a mask, found list"),
    (np.ones((2, 2), int), None, TypeError, "weight must be float32 or float64, found int64"),
    (np.ones(3), None, ValueError, r"weight must have shape \(O, I\) with no axis empty, found \(3,\)"),
    (np.ones((2, 2)), "bfloat16", ValueError, "weights must be 'float64' for a weight of float64, found 'bfloat16'"),
    (np.ones((2, 2), np.float32), "float16", ValueError, "weights must be 'float32' or 'bfloat16' for a weight of float32, found 'float16'"),
])
def test_weights_that_cannot_be_packed(weight, weights, error, message):
    with pytest.raises(error, match=message):
        pack(weight, weights)
