"""The compiled selective scan, its NumPy twin, and what both promise about odd inputs, NaN and threads."""

from __future__ import annotations

import inspect
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import cython_ext
from cython_ext import reference
from cython_ext.checks import MAX_STATE
from cython_ext.tests.examples import NAMES, OPTIONS, SHAPES, arguments, central_differences, cotangent, differences, poisoned_buffers, relative
from cython_ext.threads import threads_for

KERNEL = cython_ext.selective_scan
TWIN = reference.selective_scan
BOTH = pytest.mark.parametrize("scan", [KERNEL, TWIN], ids=["kernel", "reference"])
EPS = 1e-5

# Two float64 forms of one formula differ by rounding alone, some tens of roundings of 1e-16 as in float32 below; a difference of meaning is
# far above this.
FLOAT64 = 1e-12
# A rounding of float32 is 2**-24; a state carries those of the ten or so tokens that it remembers, and so does the way back. 30 to 35 of
# them were the most seen, in the kernel and in NumPy alike.
FLOAT32 = 70 * 2.0**-24


def run(scan, inputs, grad):
    states = scan.forward(**inputs, eps=EPS)
    return [states, *scan.backward(grad, *inputs.values(), states, EPS)]


def same_bits(found, expected):
    return all((a is None and b is None) or np.array_equal(a.view(f"u{a.itemsize}"), b.view(f"u{b.itemsize}"))
               for a, b in zip(found, expected, strict=True))


@pytest.fixture(autouse=True)
def default_threads():
    yield
    cython_ext.set_num_threads(None)


@pytest.mark.parametrize(("dt_b", "initial_state"), OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_equals_reference_in_float64(shape, dt_b, initial_state):
    inputs, grad = arguments(shape, "float64", dt_b, initial_state), cotangent(shape)
    kernel, twin = run(KERNEL, inputs, grad), run(TWIN, inputs, grad)
    assert [None if array is None else array.dtype for array in kernel] == [None if array is None else array.dtype for array in twin]
    far = {name: distance for name, distance in differences(kernel, twin, inputs).items() if not distance < FLOAT64}
    assert not far


@BOTH
@pytest.mark.parametrize(("dt_b", "initial_state"), OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_stays_in_its_band(scan, shape, dt_b, initial_state):
    single, grad = arguments(shape, "float32", dt_b, initial_state), cotangent(shape, "float32")
    double = {name: None if array is None else array.astype(np.float64) for name, array in single.items()}
    found, exact = run(scan, single, grad), run(TWIN, double, grad.astype(np.float64))
    assert all(array is None or array.dtype == np.float32 for array in found)
    far = {name: distance for name, distance in differences(found, exact, double).items() if not distance < FLOAT32}
    assert not far


@BOTH
@pytest.mark.parametrize(("dt_b", "initial_state"), OPTIONS)
@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 2, 16)])
def test_gradients_equal_finite_differences(scan, shape, dt_b, initial_state):
    inputs, grad = arguments(shape, "float64", dt_b, initial_state), cotangent(shape)
    gradients = dict(zip(NAMES, run(scan, inputs, grad)[1:], strict=True))

    def scalar(arrays):
        return (scan.forward(**arrays, eps=EPS) * grad).sum()

    for name, array in inputs.items():
        if array is None:
            assert gradients[name] is None
        else:
            assert relative(gradients[name], central_differences(scalar, inputs, name)) < 1e-7, name


def test_the_equation_by_hand():
    """Two tokens of one row, written out with nothing but products and sums."""
    inputs = arguments((1, 2, 5))
    h = inputs["initial_state"][0]
    for t in range(2):
        a, b, u = inputs["dt_a"][0, t], inputs["dt_b"][0, t], inputs["update"][0, t]
        pre = [h[i] + a * sum(inputs["transition"][i, j] * h[j] for j in range(5)) + b * u[i] for i in range(5)]
        mean = sum(pre) / 5
        deviation = (sum((x - mean) ** 2 for x in pre) / 5 + EPS) ** 0.5
        h = [(pre[i] - mean) / deviation * inputs["weight"][i] + inputs["bias"][i] for i in range(5)]
        for scan in (KERNEL, TWIN):
            assert relative(scan.forward(**inputs)[0, t], h) < FLOAT64


@BOTH
def test_a_split_sequence_gives_the_same_bits(scan):
    inputs = arguments((3, 17, 7))
    whole = scan.forward(**inputs)
    for cut in (1, 8, 16):
        first = {name: array[:, :cut] if name in ("update", "dt_a", "dt_b") else array for name, array in inputs.items()}
        second = {name: array[:, cut:] if name in ("update", "dt_a", "dt_b") else array for name, array in inputs.items()}
        head = scan.forward(**first)
        tail = scan.forward(**{**second, "initial_state": head[:, -1]})
        assert same_bits([np.concatenate([head, tail], axis=1)], [whole])


def test_twins_share_signature_and_docstring():
    for name in ("forward", "backward"):
        kernel, twin = getattr(KERNEL, name), getattr(TWIN, name)
        assert inspect.getdoc(kernel) == inspect.getdoc(twin)
        assert str(inspect.signature(kernel)) == str(inspect.signature(twin))


# (argument, what becomes of its good value, error, words of the message)
BAD = [
    ("update", lambda a: a.tolist(), TypeError, ["update", "NumPy array", "found list"]),
    ("update", lambda a: a.astype(np.float16), TypeError, ["update", "float32 or float64", "found float16"]),
    ("update", lambda a: a.astype(np.int64), TypeError, ["update", "found int64"]),
    ("update", lambda a: a.astype(">f8"), TypeError, ["update", "found >f8"]),
    ("update", lambda a: np.ma.masked_array(a), TypeError, ["update", "found MaskedArray"]),
    ("update", lambda a: a[0], ValueError, ["update", "(B, L, N)", "found (7, 5)"]),
    ("update", lambda a: a[:0], ValueError, ["update", "no axis empty", "found (0, 7, 5)"]),
    ("update", lambda a: a[:, :0], ValueError, ["update", "no axis empty", "found (3, 0, 5)"]),
    ("update", lambda a: a[..., :0], ValueError, ["update", "no axis empty", "found (3, 7, 0)"]),
    ("update", lambda a: np.zeros((3, 7, MAX_STATE + 1)), ValueError, ["update", "at most 256", "found shape (3, 7, 257)"]),
    ("dt_a", lambda a: a[:, :6], ValueError, ["dt_a", "(B, L) = (3, 7)", "found (3, 6)"]),
    ("dt_a", lambda a: a[:1], ValueError, ["dt_a", "(3, 7)", "found (1, 7)"]),
    ("dt_a", lambda a: a.astype(np.float32), TypeError, ["dt_a", "float64", "found float32"]),
    ("dt_a", lambda a: None, TypeError, ["dt_a", "found NoneType"]),
    ("dt_b", lambda a: a[..., None], ValueError, ["dt_b", "(3, 7)", "found (3, 7, 1)"]),
    ("transition", lambda a: a[:, :4], ValueError, ["transition", "(N, N) = (5, 5)", "found (5, 4)"]),
    ("weight", lambda a: a[:4], ValueError, ["weight", "(N) = (5,)", "found (4,)"]),
    ("bias", lambda a: a.astype(np.float32), TypeError, ["bias", "float64", "found float32"]),
    ("initial_state", lambda a: a[:2], ValueError, ["initial_state", "(B, N) = (3, 5)", "found (2, 5)"]),
    ("eps", lambda a: 0.0, ValueError, ["eps", "positive", "found 0.0"]),
    ("eps", lambda a: float("nan"), ValueError, ["eps", "positive", "found nan"]),
    ("eps", lambda a: "1e-5", ValueError, ["eps", "found '1e-5'"]),
    ("grad_states", lambda a: a[:, :6], ValueError, ["grad_states", "(B, L, N) = (3, 7, 5)", "found (3, 6, 5)"]),
    ("states", lambda a: a.astype(np.float32), TypeError, ["states", "float64", "found float32"]),
]


@BOTH
@pytest.mark.parametrize(("name", "spoil", "error", "words"), BAD)
def test_bad_input_is_refused_by_name(scan, name, spoil, error, words):
    inputs = {**arguments((3, 7, 5)), "eps": EPS}
    both = {"grad_states": cotangent((3, 7, 5)), "states": scan.forward(**inputs)}
    if name in inputs:
        with pytest.raises(error) as caught:
            scan.forward(**{**inputs, name: spoil(inputs[name])})
        assert all(word in str(caught.value) for word in words), str(caught.value)
    everything = {**inputs, **both}
    with pytest.raises(error) as caught:
        scan.backward(**{**everything, name: spoil(everything[name])})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def strided(array):
    wide = np.full((*array.shape[:-1], 2 * array.shape[-1]), np.nan, array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def unaligned(array):
    raw = np.zeros(array.nbytes + 1, np.uint8)
    view = raw[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    assert not view.flags.aligned
    return view


LAYOUTS = {
    "strided": strided, "fortran": np.asfortranarray, "read_only": read_only, "unaligned": unaligned,
    "reversed": lambda array: array[::-1].copy()[::-1],
}


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_bits_and_stays_as_it_was(scan, layout, dtype):
    shape = (3, 7, 5)
    inputs, grad = arguments(shape, dtype), cotangent(shape, dtype)
    expected = run(scan, inputs, grad)
    laid = {name: LAYOUTS[layout](array) for name, array in inputs.items()}
    grad_laid = LAYOUTS[layout](grad)
    states = scan.forward(**laid, eps=EPS)
    found = [states, *scan.backward(grad_laid, *laid.values(), LAYOUTS[layout](states), EPS)]
    assert same_bits(found, expected)
    assert same_bits([np.ascontiguousarray(array) for array in (*laid.values(), grad_laid)], [*inputs.values(), grad])


@BOTH
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [7, 16])
def test_nan_propagates_and_stays_in_its_row(scan, n, dtype, value):
    shape = (3, 9, n)
    inputs, grad = arguments(shape, dtype), cotangent(shape, dtype)
    clean = run(scan, inputs, grad)
    inputs["update"] = inputs["update"].copy()
    inputs["update"][1, 4, 2] = value
    with np.errstate(invalid="ignore"):
        states, d_update, d_dt_a, d_dt_b, d_transition, d_weight, d_bias, d_initial = run(scan, inputs, grad)
    assert np.isnan(states[1, 4:]).all()
    assert same_bits([states[1, :4]], [clean[0][1, :4]])
    assert np.isnan(d_update[1]).all() and np.isnan(d_dt_a[1]).all() and np.isnan(d_dt_b[1]).all() and np.isnan(d_initial[1]).all()
    rest = [0, 2]
    for found, expected in zip((states, d_update, d_dt_a, d_dt_b, d_initial), (*clean[:4], clean[7]), strict=True):
        assert same_bits([found[rest]], [expected[rest]])
    assert np.isnan(d_transition).all() and np.isnan(d_weight).all() and np.isnan(d_bias).all()  # a sum over all rows hides nothing


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [7, 16])
def test_nothing_is_read_from_an_output_before_it_is_written(monkeypatch, n, dtype):
    inputs, grad = arguments((3, 9, n), dtype), cotangent((3, 9, n), dtype)
    expected = run(KERNEL, inputs, grad)
    poisoned = poisoned_buffers(monkeypatch)
    found = run(KERNEL, inputs, grad)
    assert len(poisoned) >= 5  # states, and the gradients of update, dt_a, dt_b and initial_state
    assert same_bits(found, expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [16, 17])
def test_the_number_of_threads_changes_no_bit(n, dtype):
    shape = (5, 250, n)
    inputs, grad = arguments(shape, dtype), cotangent(shape, dtype)
    results = []
    for threads in (1, 2, 4):
        cython_ext.set_num_threads(threads)
        assert threads_for(5, 5 * 250 * n * n) == threads  # else the test would compare one thread with itself
        results.append(run(KERNEL, inputs, grad))
    assert same_bits(results[1], results[0]) and same_bits(results[2], results[0])


def test_a_row_does_not_depend_on_the_rows_beside_it():
    inputs, grad = arguments((5, 63, 17)), cotangent((5, 63, 17))
    whole = run(KERNEL, inputs, grad)
    alone = {name: array[3:4] if name in ("update", "dt_a", "dt_b", "initial_state") else array for name, array in inputs.items()}
    found = run(KERNEL, alone, grad[3:4])
    for index in (0, 1, 2, 3, 7):
        assert same_bits([found[index]], [whole[index][3:4]])


def test_two_python_threads_at_once():
    cython_ext.set_num_threads(2)
    cases = [(arguments((3, 100, n), "float32"), cotangent((3, 100, n), "float32")) for n in (33, 40)]
    assert threads_for(3, 3 * 100 * 33 * 33) == 2  # both levels of threads at once
    expected = [run(KERNEL, *case) for case in cases]
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(run, KERNEL, *cases[i % 2]) for i in range(40)]
        assert all(same_bits(future.result(), expected[i % 2]) for i, future in enumerate(futures))
