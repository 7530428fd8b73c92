"""The compiled WKV memory, its NumPy twin, and what both promise about lengths, decays, odd inputs, NaN and threads."""

from __future__ import annotations

import inspect
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest

import cython_ext
from cython_ext import reference
from cython_ext.tests.examples import WKV_NAMES, WKV_SHAPES, central_differences, poisoned_buffers, relative, wkv_arguments, wkv_cotangents
from cython_ext.tests.test_selective_scan import LAYOUTS, same_bits
from cython_ext.threads import threads_for

KERNEL = cython_ext.wkv
TWIN = reference.wkv
BOTH = pytest.mark.parametrize("wkv", [KERNEL, TWIN], ids=["kernel", "reference"])
TIME_FIRSTS = pytest.mark.parametrize("time_first", ["bonus", "gain"])
DECAYS = pytest.mark.parametrize("decay", ["exp_exp", "direct"])
OUTPUTS = ("y", "state", *(f"gradient of {name}" for name in WKV_NAMES))

# Two float64 forms of one formula differ by rounding alone, 35 roundings of 2**-53 at most in these examples; a difference of meaning is
# far above this.
FLOAT64 = 1e-12
# A rounding of float32 is 2**-24; with a decay near 1 every token carries those of all before it. 12 of them were the most seen in the
# kernel, 22 in NumPy, which takes all tokens one after another.
FLOAT32 = 45 * 2.0**-24


def run(wkv, inputs, gradients, time_first="bonus"):
    return [*wkv.forward(**inputs, time_first=time_first), *wkv.backward(*gradients, **inputs, time_first=time_first)]


def far(found, expected, bound):
    """Names and distances of the outputs that are not within `bound`."""
    distances = {}
    for name, a, b in zip(OUTPUTS, found, expected, strict=True):
        if a is None or b is None:
            assert a is None and b is None, name
            continue
        assert a.shape == b.shape, name
        distances[name] = relative(a, b)
    return {name: distance for name, distance in distances.items() if not distance < bound}


@pytest.fixture(autouse=True)
def default_threads():
    yield
    cython_ext.set_num_threads(None)


@DECAYS
@TIME_FIRSTS
@pytest.mark.parametrize("shape", WKV_SHAPES)
def test_kernel_equals_reference_in_float64(shape, time_first, decay):
    for initial_state in (True, False):
        inputs, gradients = wkv_arguments(shape, "float64", initial_state, decay), wkv_cotangents(shape)
        found, expected = run(KERNEL, inputs, gradients, time_first), run(TWIN, inputs, gradients, time_first)
        assert all(array is None or array.dtype == np.float64 for array in (*found, *expected))
        assert not far(found, expected, FLOAT64)


@BOTH
@DECAYS
@TIME_FIRSTS
@pytest.mark.parametrize("shape", WKV_SHAPES)
def test_float32_stays_in_its_band(wkv, shape, time_first, decay):
    single, gradients = wkv_arguments(shape, "float32", decay=decay), wkv_cotangents(shape, "float32")
    double = {name: array.astype(np.float64) for name, array in single.items()}
    found, exact = run(wkv, single, gradients, time_first), run(TWIN, double, [part.astype(np.float64) for part in gradients], time_first)
    assert all(array.dtype == np.float32 for array in found)
    assert not far(found, exact, FLOAT32)


@BOTH
@TIME_FIRSTS
@pytest.mark.parametrize(("shape", "initial_state"), [((2, 3, 2, 3), True), ((1, 10, 1, 2), False), ((1, 10, 1, 2), True)])
def test_gradients_equal_finite_differences(wkv, shape, initial_state, time_first):
    inputs, gradients = wkv_arguments(shape, "float64", initial_state, "direct"), wkv_cotangents(shape)
    found = dict(zip(WKV_NAMES, run(wkv, inputs, gradients, time_first)[2:], strict=True))

    def scalar(arrays):
        outputs = wkv.forward(**arrays, time_first=time_first)
        return sum((part * gradient).sum() for part, gradient in zip(outputs, gradients, strict=True))

    for name, array in inputs.items():
        if array is None:
            assert found[name] is None
        else:
            assert relative(found[name], central_differences(scalar, inputs, name)) < 1e-7, name


@BOTH
@TIME_FIRSTS
def test_the_equations_by_hand(wkv, time_first):
    """Twelve tokens of one head, written out with nothing but products and sums."""
    inputs = wkv_arguments((1, 12, 1, 3), decay="direct")
    w, u, state = inputs["w"][0], inputs["u"][0], inputs["initial_state"][0, 0]
    y, last = wkv.forward(**inputs, time_first=time_first)
    for t in range(12):
        r, k, v = (inputs[name][0, t, 0] for name in "rkv")
        write = [[k[i] * v[j] for j in range(3)] for i in range(3)]
        if time_first == "bonus":
            read = [[state[i][j] + u[i] * write[i][j] for j in range(3)] for i in range(3)]
            state = [[w[i] * state[i][j] + write[i][j] for j in range(3)] for i in range(3)]
        else:
            read = state = [[w[i] * state[i][j] + u[i] * write[i][j] for j in range(3)] for i in range(3)]
        assert relative(y[0, t, 0], [sum(read[i][j] * r[i] for i in range(3)) for j in range(3)]) < FLOAT64, t
    assert relative(last[0, 0], state) < FLOAT64


@TIME_FIRSTS
@pytest.mark.parametrize("chunk", [1, 3, 8, 16, 50, 64, 1000])
def test_the_size_of_a_chunk_is_rounding_alone(monkeypatch, chunk, time_first):
    inputs, gradients = wkv_arguments((2, 50, 2, 5), decay="direct"), wkv_cotangents((2, 50, 2, 5))
    expected = run(TWIN, inputs, gradients, time_first)
    monkeypatch.setattr(KERNEL, "SHORT", 0)
    monkeypatch.setattr(KERNEL, "CHUNK", chunk)
    assert not far(run(KERNEL, inputs, gradients, time_first), expected, FLOAT64)


@DECAYS
@TIME_FIRSTS
def test_a_split_sequence_gives_the_same_numbers(decay, time_first):
    """Pieces of any length, one token at a time by `step` at the end; chunks fall elsewhere, so not the same bits."""
    shape = (2, 100, 2, 7)
    inputs = wkv_arguments(shape, decay=decay)
    whole = KERNEL.forward(**inputs, time_first=time_first)
    for cuts in ((0, 1, 32, 33, 97), (0, 63, 80, 97), (0, 97)):
        parts, state = [], inputs["initial_state"]
        for start, stop in pairwise(cuts):
            piece = {**inputs, **{name: inputs[name][:, start:stop] for name in "rkv"}, "initial_state": state}
            y, state = KERNEL.forward(**piece, time_first=time_first)
            parts.append(y)
        for t in range(97, 100):
            parts.append(KERNEL.step(*(inputs[name][:, t] for name in "rkv"), inputs["w"], inputs["u"], state, time_first)[:, None])
        assert relative(np.concatenate(parts, axis=1), whole[0]) < FLOAT64 and relative(state, whole[1]) < FLOAT64


@BOTH
@TIME_FIRSTS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_step_is_a_forward_of_one_token_in_place(wkv, dtype, time_first):
    inputs = wkv_arguments((3, 1, 2, 17), dtype)
    y, last = wkv.forward(**inputs, time_first=time_first)
    for out in (None, np.full((3, 2, 17), np.nan, dtype)):
        state = inputs["initial_state"].copy()
        found = wkv.step(*(inputs[name][:, 0] for name in "rkv"), inputs["w"], inputs["u"], state, time_first, out)
        assert out is None or found is out
        assert same_bits([found, state], [y[:, 0], last])


def test_a_step_allocates_no_array():
    inputs = wkv_arguments((32, 1, 4, 128), "float32")
    given = [*(np.ascontiguousarray(inputs[name][:, 0]) for name in "rkv"), inputs["w"], inputs["u"], inputs["initial_state"]]
    out = np.empty((32, 4, 128), np.float32)
    KERNEL.step(*given, "bonus", out)
    tracemalloc.start()
    try:
        for _ in range(3):
            KERNEL.step(*given, "bonus", out)
        assert tracemalloc.get_traced_memory()[1] < out.nbytes // 3  # views and lists; the smallest array's data would be all of it
    finally:
        tracemalloc.stop()


@BOTH
@TIME_FIRSTS
def test_no_initial_state_is_one_of_zeros(wkv, time_first):
    inputs, gradients = wkv_arguments((2, 40, 3, 5), initial_state=False), wkv_cotangents((2, 40, 3, 5))
    without = run(wkv, inputs, gradients, time_first)
    with_zeros = run(wkv, {**inputs, "initial_state": np.zeros((2, 3, 5, 5))}, gradients, time_first)
    assert without[-1] is None and with_zeros[-1].any()
    assert not far([*without[:-1], with_zeros[-1]], with_zeros, FLOAT64)
    silent = [gradients[0], np.zeros_like(gradients[1])]
    assert not far(run(wkv, inputs, [gradients[0], None], time_first), run(wkv, inputs, silent, time_first), FLOAT64)


@BOTH
@TIME_FIRSTS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_strong_decays_over_a_long_sequence(wkv, dtype, time_first):
    """Powers that underflow to zero are zeros: nothing infinite, and the first tokens leave nothing but their own reads."""
    inputs, gradients = wkv_arguments((1, 257, 2, 8), dtype), wkv_cotangents((1, 257, 2, 8), dtype)
    inputs["w"] = np.geomspace(1e-30, 0.5, 16).reshape(2, 8).astype(dtype)
    found = run(wkv, inputs, gradients, time_first)
    assert all(np.isfinite(array).all() for array in found)
    double = {name: array.astype(np.float64) for name, array in inputs.items()}
    exact = run(TWIN, double, [part.astype(np.float64) for part in gradients], time_first)
    assert not far([*found[:-1], None], [*exact[:-1], None], FLOAT64 if dtype == "float64" else FLOAT32)


def test_twins_share_signature_and_docstring():
    for name in ("forward", "backward", "step"):
        kernel, twin = getattr(KERNEL, name), getattr(TWIN, name)
        assert inspect.getdoc(kernel) == inspect.getdoc(twin)
        assert str(inspect.signature(kernel)) == str(inspect.signature(twin))


def frozen(array):
    array = array.copy()
    array.flags.writeable = False
    return array


# (argument, what becomes of its good value, error, words of the message); B = 3, L = 9, H = 2, P = 5
BAD = [
    ("r", lambda a: a.tolist(), TypeError, ["r must be a NumPy array", "found list"]),
    ("r", lambda a: a.astype(np.float16), TypeError, ["r must be float32 or float64", "found float16"]),
    ("r", lambda a: np.ma.masked_array(a), TypeError, ["r", "found MaskedArray"]),
    ("r", lambda a: a[0], ValueError, ["r must have shape (B, L, H, P)", "found (9, 2, 5)"]),
    *(("r", lambda a, cut=cut: a[cut], ValueError, ["r must have shape (B, L, H, P) with no axis empty"]) for cut in [
        (slice(None),) * axis + (slice(0),) for axis in range(4)]),
    ("k", lambda a: a[:, :8], ValueError, ["k must have shape (B, L, H, P) = (3, 9, 2, 5)", "found (3, 8, 2, 5)"]),
    ("k", lambda a: a[:1], ValueError, ["k", "found (1, 9, 2, 5)"]),
    ("v", lambda a: a.astype(np.float32), TypeError, ["v must be float64", "found float32"]),
    ("v", lambda a: None, TypeError, ["v must be a NumPy array", "found NoneType"]),
    ("w", lambda a: a[0], ValueError, ["w must have shape (H, P) = (2, 5)", "found (5,)"]),
    ("w", lambda a: a.astype(np.float32), TypeError, ["w must be float64"]),
    ("u", lambda a: a[:, :1], ValueError, ["u must have shape (H, P) = (2, 5)", "found (2, 1)"]),
    ("initial_state", lambda a: a[:1], ValueError, ["initial_state must have shape (B, H, P, P) = (3, 2, 5, 5)", "found (1, 2, 5, 5)"]),
    ("initial_state", lambda a: a.astype(np.float32), TypeError, ["initial_state must be float64"]),
    ("time_first", lambda a: "both", ValueError, ["time_first must be 'bonus' or 'gain', found 'both'"]),
    ("grad_y", lambda a: a[:, :1], ValueError, ["grad_y must have shape (B, L, H, P) = (3, 9, 2, 5)", "found (3, 1, 2, 5)"]),
    ("grad_y", lambda a: None, TypeError, ["grad_y must be a NumPy array", "found NoneType"]),
    ("grad_state", lambda a: a[..., :1], ValueError, ["grad_state must have shape (B, H, P, P)", "found (3, 2, 5, 1)"]),
]


@BOTH
@pytest.mark.parametrize(("name", "spoil", "error", "words"), BAD)
def test_bad_input_is_refused_by_name(wkv, name, spoil, error, words):
    grad_y, grad_state = wkv_cotangents((3, 9, 2, 5))
    inputs = {**wkv_arguments((3, 9, 2, 5)), "time_first": "bonus"}
    everything = {**inputs, "grad_y": grad_y, "grad_state": grad_state}
    calls = [(wkv.backward, everything)] + ([(wkv.forward, inputs)] if name in inputs else [])
    for function, given in calls:
        with pytest.raises(error) as caught:
            function(**{**given, name: spoil(given[name])})
        assert all(word in str(caught.value) for word in words), str(caught.value)


@BOTH
@pytest.mark.parametrize(("name", "spoil", "error", "words"), [
    ("r", lambda a: a[:0], ValueError, ["r must have shape (B, H, P) with no axis empty, found (0, 2, 5)"]),
    ("k", lambda a: a[:, :1], ValueError, ["k must have shape (B, H, P) = (3, 2, 5), found (3, 1, 5)"]),
    ("u", lambda a: a.astype(np.float32), TypeError, ["u must be float64, found float32"]),
    ("state", lambda a: None, TypeError, ["state must be a NumPy array"]),
    ("state", lambda a: a[:1], ValueError, ["state must have shape (B, H, P, P) = (3, 2, 5, 5), found (1, 2, 5, 5)"]),
    ("state", frozen, ValueError, ["state is overwritten and must be C-contiguous, aligned and writeable"]),
    ("state", lambda a: a.swapaxes(2, 3), ValueError, ["state is overwritten and must be C-contiguous"]),
    ("out", lambda a: a[:, :1], ValueError, ["out must have shape (B, H, P) = (3, 2, 5), found (3, 1, 5)"]),
    ("out", frozen, ValueError, ["out is overwritten and must be C-contiguous, aligned and writeable"]),
    ("time_first", lambda a: None, ValueError, ["time_first must be 'bonus' or 'gain', found None"]),
])
def test_a_step_refuses_what_it_cannot_take_and_changes_nothing(wkv, name, spoil, error, words):
    inputs = wkv_arguments((3, 1, 2, 5))
    given = {
        **{name: inputs[name][:, 0] for name in "rkv"}, "w": inputs["w"], "u": inputs["u"], "state": inputs["initial_state"].copy(),
        "time_first": "bonus", "out": np.zeros((3, 2, 5)),
    }
    with pytest.raises(error) as caught:
        wkv.step(**{**given, name: spoil(given[name])})
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert same_bits([given["state"], given["out"]], [inputs["initial_state"], np.zeros((3, 2, 5))])


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_bits_and_stays_as_it_was(wkv, layout, dtype):
    for length in (2, 40):
        shape = (3, length, 2, 5)
        inputs, gradients = wkv_arguments(shape, dtype), wkv_cotangents(shape, dtype)
        laid, gradients_laid = {name: LAYOUTS[layout](array) for name, array in inputs.items()}, [LAYOUTS[layout](part) for part in gradients]
        assert same_bits(run(wkv, laid, gradients_laid), run(wkv, inputs, gradients))
        assert same_bits([np.ascontiguousarray(array) for array in (*laid.values(), *gradients_laid)], [*inputs.values(), *gradients])


@BOTH
@TIME_FIRSTS
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nan_stays_in_its_head_and_out_of_the_past(wkv, dtype, value, time_first):
    """Inside a chunk and a block of it too, where a product with a masked score would let it through."""
    shape = (2, 45, 2, 9)
    inputs, gradients = wkv_arguments(shape, dtype), wkv_cotangents(shape, dtype)
    clean = run(wkv, inputs, gradients, time_first)
    for name in "kv":
        spoilt = {**inputs, name: inputs[name].copy()}
        spoilt[name][1, 36, 1, 2] = value
        with np.errstate(invalid="ignore"):
            found = run(wkv, spoilt, gradients, time_first)
        assert same_bits([found[0][1, :36]], [clean[0][1, :36]])
        spread = ~np.isfinite(found[0][1, 36:, 1])
        assert spread.all() if name == "k" else spread[:, 2].all() and not np.delete(spread, 2, axis=1).any()
        for a, b in zip(found[:5], clean[:5], strict=True):
            assert same_bits([a[0]], [b[0]])  # the other sample
        for a, b in zip((found[0], *found[2:5]), (clean[0], *clean[2:5]), strict=True):
            assert same_bits([a[1, :, 0]], [b[1, :, 0]])  # the other head
        assert same_bits([found[1][1, 0]], [clean[1][1, 0]])
        assert not np.isfinite(found[5][1]).all() and same_bits([found[5][0]], [clean[5][0]])  # the gradient of w hides nothing
    spoilt = gradients[0].copy()
    spoilt[1, 20, 1, 2] = value
    with np.errstate(invalid="ignore"):
        found = run(wkv, inputs, [spoilt, gradients[1]], time_first)
    for a, b in zip(found[3:5], clean[3:5], strict=True):
        assert same_bits([a[1, 21:]], [b[1, 21:]])  # later keys and values do not feel an earlier token's gradient


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("length", [2, 75])
def test_nothing_is_read_from_an_output_before_it_is_written(monkeypatch, length, dtype):
    cases = [(wkv_arguments((3, length, 2, 9), dtype, initial_state), wkv_cotangents((3, length, 2, 9), dtype)) for initial_state in (True, False)]
    expected = [run(KERNEL, *case, time_first) for case in cases for time_first in ("bonus", "gain")]
    poisoned = poisoned_buffers(monkeypatch)
    found = [run(KERNEL, *case, time_first) for case in cases for time_first in ("bonus", "gain")]
    assert len(poisoned) >= 4 * 17  # y, and every gradient and buffer of the way back
    assert all(map(same_bits, found, expected))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(3, 2, 2, 128), (3, 100, 2, 17)])
def test_the_number_of_threads_changes_no_bit(shape, dtype):
    inputs, gradients = wkv_arguments(shape, dtype), wkv_cotangents(shape, dtype)
    results = []
    for threads in (1, 2, 4):
        cython_ext.set_num_threads(threads)
        assert threads_for(6, 3 * 6 * shape[1] * shape[3]**2) == threads  # else the test would compare one thread with itself
        results.append(run(KERNEL, inputs, gradients))
    assert same_bits(results[1], results[0]) and same_bits(results[2], results[0])


def test_a_sample_does_not_depend_on_those_beside_it():
    inputs, gradients = wkv_arguments((5, 63, 2, 7)), wkv_cotangents((5, 63, 2, 7))
    whole = run(KERNEL, inputs, gradients)
    alone = {name: array if name in "wu" else array[3:4] for name, array in inputs.items()}
    found = run(KERNEL, alone, [part[3:4] for part in gradients])
    for index in (0, 1, 2, 3, 4, 7):
        assert same_bits([found[index]], [whole[index][3:4]])


def test_two_python_threads_at_once():
    cython_ext.set_num_threads(2)
    cases = [(wkv_arguments((2, 60, 2, p), "float32"), wkv_cotangents((2, 60, 2, p), "float32")) for p in (33, 40)]
    assert threads_for(4, 3 * 4 * 60 * 33 * 33) == 2  # both levels of threads at once
    expected = [run(KERNEL, *case) for case in cases]
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(run, KERNEL, *cases[i % 2]) for i in range(20)]
        assert all(same_bits(future.result(), expected[i % 2]) for i, future in enumerate(futures))
