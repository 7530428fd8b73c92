"""The compiled plain delta rule, its NumPy twin, and what both promise about gradients, splits, odd inputs, NaN and threads."""

from __future__ import annotations

import inspect
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import cython_ext
from cython_ext import plain_delta, reference
from cython_ext.tests.examples import PLAIN_SHAPES, plain_arguments, plain_cotangents, poisoned_buffers, relative
from cython_ext.tests.test_selective_scan import LAYOUTS, same_bits
from cython_ext.threads import threads_for

KERNEL = cython_ext.delta_rule
TWIN = reference.delta_rule
BOTH = pytest.mark.parametrize("rule", [KERNEL, TWIN], ids=["kernel", "reference"])
STATES = pytest.mark.parametrize("initial_state", [True, False])
OUTPUTS = ("o", "state", "grad_q", "grad_k", "grad_v", "grad_beta", "grad_initial_state")
SEQUENCES = ("q", "k", "v", "beta")

# Two float64 forms of one formula differ by rounding alone, some ten roundings of 1e-16 as in float32 below; a difference of meaning is far
# above this.
FLOAT64 = 1e-12
# A rounding of float32 is 2**-24. 6 of them were the most seen, in the kernel and in NumPy alike, but where a result is one number, what a
# sum of either sign leaves: 31.
FLOAT32 = 64 * 2.0**-24


def run(rule, arguments, cotangents):
    return [*rule.forward(**arguments), *rule.backward(*cotangents, **arguments)]


def far(found, expected, bound):
    """Names and distances of the outputs that are not within `bound`."""
    pairs = [(name, a, b) for name, a, b in zip(OUTPUTS, found, expected, strict=True) if a is not None or b is not None]
    distances = {name: relative(a, b) for name, a, b in pairs}
    return {name: distance for name, distance in distances.items() if not distance < bound}


def tokens(arguments, cut):
    return {name: array[:, :, cut] if name in SEQUENCES else array for name, array in arguments.items()}


@pytest.fixture(autouse=True)
def default_threads():
    yield
    cython_ext.set_num_threads(None)


@STATES
@pytest.mark.parametrize("shape", PLAIN_SHAPES)
def test_kernel_equals_reference_in_float64(shape, initial_state):
    arguments, cotangents = plain_arguments(shape, "float64", initial_state), plain_cotangents(shape)
    found, expected = run(KERNEL, arguments, cotangents), run(TWIN, arguments, cotangents)
    assert [a if a is None else (a.shape, a.dtype) for a in found] == [a if a is None else (a.shape, a.dtype) for a in expected]
    assert (found[-1] is None) is not initial_state
    assert not far(found, expected, FLOAT64)


@BOTH
@STATES
@pytest.mark.parametrize("shape", PLAIN_SHAPES)
def test_float32_stays_in_its_band(rule, shape, initial_state):
    single, cotangents = plain_arguments(shape, "float32", initial_state), plain_cotangents(shape, "float32")
    double = {name: array if array is None else array.astype(np.float64) for name, array in single.items()}
    found, exact = run(rule, single, cotangents), run(TWIN, double, [array.astype(np.float64) for array in cotangents])
    assert all(array is None or array.dtype == np.float32 for array in found)
    assert not far(found, exact, FLOAT32)


@BOTH
def test_the_equation_by_hand(rule):
    arguments = plain_arguments((2, 3, 35, 5))
    o, last = rule.forward(**arguments)
    for b, h in np.ndindex(2, 3):
        state = arguments["initial_state"][b, h]
        for t in range(35):
            q, k, v, beta = (arguments[name][b, h, t] for name in SEQUENCES)
            state = state + beta * np.outer(k, v - state.T @ k)
            assert relative(o[b, h, t], state.T @ q) < FLOAT64
        assert relative(last[b, h], state) < FLOAT64


@BOTH
@STATES
@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 1, 3, 2), (1, 2, 19, 4)])
def test_gradients_equal_finite_differences(rule, shape, initial_state):
    """Along three random directions of every argument; the rule is a polynomial of low degree, so a step of 1e-5 leaves some 1e-10."""
    arguments, (grad_o, grad_state) = plain_arguments(shape, "float64", initial_state), plain_cotangents(shape)
    rng = np.random.default_rng(5)

    def loss(**changed):
        o, state = rule.forward(**{**arguments, **changed})
        return (o * grad_o).sum() + (state * grad_state).sum()

    gradients = rule.backward(grad_o, grad_state, **arguments)
    for (name, array), gradient in zip(arguments.items(), gradients, strict=True):
        if array is None:
            continue
        for _ in range(3):
            step = rng.normal(size=array.shape)
            step *= 1e-5 / np.linalg.norm(step)
            slope = (loss(**{name: array + step}) - loss(**{name: array - step})) / 2e-5
            assert abs((gradient * step).sum() / 1e-5 - slope) < 1e-8 * np.linalg.norm(gradient), name


@pytest.mark.parametrize("size", [1, 3, 16, 17, 63, 64, 100, 300])
def test_the_size_of_a_chunk_changes_rounding_alone(monkeypatch, size):
    shape = (2, 1, 100, 33)
    arguments, cotangents = plain_arguments(shape), plain_cotangents(shape)
    monkeypatch.setattr(plain_delta, "chunk_tokens", lambda d: size)
    assert not far(run(KERNEL, arguments, cotangents), run(TWIN, arguments, cotangents), FLOAT64)


@BOTH
@pytest.mark.parametrize("cuts", [(1,), (16,), (99,), (3, 66), (1, 2, 3), (63, 64, 80)])
def test_a_stream_in_pieces_is_the_whole(rule, cuts):
    """Forward with the state handed on, backward with the gradient of the state handed back."""
    shape = (2, 3, 100, 9)
    arguments, (grad_o, grad_state) = plain_arguments(shape), plain_cotangents(shape)
    whole = run(rule, arguments, (grad_o, grad_state))
    bounds = [slice(a, b) for a, b in zip((0, *cuts), (*cuts, 100), strict=True)]
    state, starts, outputs, gradients = arguments["initial_state"], [], [], []
    for cut in bounds:
        starts.append(state)
        o, state = rule.forward(**{**tokens(arguments, cut), "initial_state": state})
        outputs.append(o)
    last = state
    for cut, start in zip(reversed(bounds), reversed(starts), strict=True):
        *found, grad_state = rule.backward(grad_o[:, :, cut], grad_state, **{**tokens(arguments, cut), "initial_state": start})
        gradients.insert(0, found)
    joined = [np.concatenate(parts, axis=2) for parts in (outputs, *zip(*gradients, strict=True))]
    assert not far([joined[0], last, *joined[1:], grad_state], whole, FLOAT64)
    if rule is TWIN or all(cut % 16 == 0 for cut in cuts):
        assert same_bits([*outputs, last], [whole[0][:, :, cut] for cut in bounds] + [whole[1]])


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_head_does_not_depend_on_the_heads_beside_it(rule, dtype):
    arguments, cotangents = plain_arguments((3, 2, 37, 20), dtype), plain_cotangents((3, 2, 37, 20), dtype)
    whole = run(rule, arguments, cotangents)
    alone = {name: array[1:2, 1:] for name, array in arguments.items()}
    assert same_bits(run(rule, alone, [array[1:2, 1:] for array in cotangents]), [array[1:2, 1:] for array in whole])


@BOTH
def test_no_initial_state_is_one_of_zeros(rule):
    arguments, cotangents = plain_arguments((2, 3, 40, 5), initial_state=False), plain_cotangents((2, 3, 40, 5))
    zeros = {**arguments, "initial_state": np.zeros((2, 3, 5, 5))}
    assert same_bits(run(rule, arguments, cotangents)[:-1], run(rule, zeros, cotangents)[:-1])


@BOTH
def test_a_beta_of_zero_writes_nothing_and_one_of_one_replaces(rule):
    arguments, cotangents = plain_arguments((2, 1, 20, 5)), plain_cotangents((2, 1, 20, 5))
    arguments["beta"][:] = 0
    assert same_bits([rule.forward(**arguments)[1]], [arguments["initial_state"]])
    assert not far(run(rule, arguments, cotangents), run(TWIN, arguments, cotangents), FLOAT64)
    arguments["beta"][:] = 1
    arguments["q"] = arguments["k"]
    assert relative(rule.forward(**arguments)[0], arguments["v"]) < FLOAT64  # what was written is read


def test_twins_share_signature_and_docstring():
    for name in ("forward", "backward"):
        kernel, twin = getattr(KERNEL, name), getattr(TWIN, name)
        assert inspect.getdoc(kernel) == inspect.getdoc(twin)
        assert str(inspect.signature(kernel)) == str(inspect.signature(twin))


# (argument, what becomes of its good value, error, words of the message); B = 3, H = 2, L = 8, d = 5
BAD = [
    ("q", lambda a: a.tolist(), TypeError, ["q must be a NumPy array", "found list"]),
    ("q", lambda a: a.astype(np.float16), TypeError, ["q must be float32 or float64", "found float16"]),
    ("q", lambda a: a.astype(">f8"), TypeError, ["q", "found >f8"]),
    ("q", lambda a: np.ma.masked_array(a), TypeError, ["q", "found MaskedArray"]),
    ("q", lambda a: a[0], ValueError, ["q must have shape (B, H, L, d)", "found (2, 8, 5)"]),
    ("q", lambda a: a[:0], ValueError, ["q", "no axis empty", "found (0, 2, 8, 5)"]),
    ("q", lambda a: a[:, :0], ValueError, ["q", "no axis empty", "found (3, 0, 8, 5)"]),
    ("q", lambda a: a[:, :, :0], ValueError, ["q", "no axis empty", "found (3, 2, 0, 5)"]),
    ("q", lambda a: a[..., :0], ValueError, ["q", "no axis empty", "found (3, 2, 8, 0)"]),
    ("q", lambda a: a.astype(np.float32), TypeError, ["k must be float32", "found float64"]),
    ("k", lambda a: a[:, :1], ValueError, ["k must have shape (B, H, L, d) = (3, 2, 8, 5)", "found (3, 1, 8, 5)"]),
    ("v", lambda a: a[..., :4], ValueError, ["v must have shape (B, H, L, d) = (3, 2, 8, 5)", "found (3, 2, 8, 4)"]),
    ("v", lambda a: None, TypeError, ["v must be a NumPy array", "found NoneType"]),
    ("beta", lambda a: a[..., None], ValueError, ["beta must have shape (B, H, L) = (3, 2, 8)", "found (3, 2, 8, 1)"]),
    ("beta", lambda a: a.astype(np.float32), TypeError, ["beta must be float64", "found float32"]),
    ("initial_state", lambda a: a[:1], ValueError, ["initial_state must have shape (B, H, d, d) = (3, 2, 5, 5)", "found (1, 2, 5, 5)"]),
    ("initial_state", lambda a: (a, a), TypeError, ["initial_state must be a NumPy array", "found tuple"]),
    ("grad_o", lambda a: a[:, :, :7], ValueError, ["grad_o must have shape (B, H, L, d) = (3, 2, 8, 5)", "found (3, 2, 7, 5)"]),
    ("grad_state", lambda a: a[0], ValueError, ["grad_state must have shape (B, H, d, d) = (3, 2, 5, 5)", "found (2, 5, 5)"]),
    ("grad_state", lambda a: None, TypeError, ["grad_state must be a NumPy array", "found NoneType"]),
]


@BOTH
@pytest.mark.parametrize(("name", "spoil", "error", "words"), BAD)
def test_bad_input_is_refused_by_name(rule, name, spoil, error, words):
    arguments = plain_arguments((3, 2, 8, 5))
    everything = {**dict(zip(("grad_o", "grad_state"), plain_cotangents((3, 2, 8, 5)), strict=True), **arguments)}
    functions = [(rule.backward, everything)] + [(rule.forward, arguments)] * (name in arguments)
    for function, given in functions:
        with pytest.raises(error) as caught:
            function(**{**given, name: spoil(given[name])})
        assert all(word in str(caught.value) for word in words), str(caught.value)


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_bits_and_stays_as_it_was(rule, layout, dtype):
    arguments, cotangents = plain_arguments((3, 2, 19, 5), dtype), plain_cotangents((3, 2, 19, 5), dtype)
    expected = run(rule, arguments, cotangents)
    laid, laid_cotangents = {name: LAYOUTS[layout](array) for name, array in arguments.items()}, list(map(LAYOUTS[layout], cotangents))
    assert same_bits(run(rule, laid, laid_cotangents), expected)
    after = [np.ascontiguousarray(array) for array in (*laid.values(), *laid_cotangents)]
    assert same_bits(after, [*arguments.values(), *cotangents])


@BOTH
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", SEQUENCES)
def test_nan_propagates_forward_and_to_no_earlier_token(rule, name, value):
    arguments = plain_arguments((3, 2, 37, 20))
    clean = rule.forward(**arguments)
    arguments[name][1, 0, 21] = value
    with np.errstate(invalid="ignore"):
        o, state = rule.forward(**arguments)
    after = slice(21, 22 if name == "q" else None)  # a query is read and not remembered
    spread = np.isnan if np.isnan(value) else lambda x: ~np.isfinite(x)
    assert spread(o[1, 0, after]).all()
    spoilt = np.zeros(o.shape, bool)
    spoilt[1, 0, after] = True
    assert same_bits([o[~spoilt]], [clean[0][~spoilt]])
    if name != "q":
        assert spread(state[1, 0]).all()
        state[1, 0] = clean[1][1, 0]
    assert same_bits([state], [clean[1]])


@STATES
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nothing_is_read_from_a_buffer_before_it_is_written(monkeypatch, dtype, initial_state):
    """Two strips in a chunk, the last of either short."""
    shape = (3, 2, 60, 70)
    arguments, cotangents = plain_arguments(shape, dtype, initial_state), plain_cotangents(shape, dtype)
    expected = run(KERNEL, arguments, cotangents)
    poisoned = poisoned_buffers(monkeypatch)
    found = run(KERNEL, arguments, cotangents)
    assert len(poisoned) == 14  # o and three buffers; four gradients and six buffers
    assert same_bits(found, expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_number_of_threads_changes_no_bit(dtype):
    shape = (5, 3, 130, 20)
    arguments, cotangents = plain_arguments(shape, dtype), plain_cotangents(shape, dtype)
    results = []
    for threads in (1, 2, 4):
        cython_ext.set_num_threads(threads)
        assert threads_for(15, 15 * 130 * 20 * (3 * 20 + 2 * 16)) == threads  # else the test would compare one thread with itself
        results.append(run(KERNEL, arguments, cotangents))
    assert all(same_bits(result, results[0]) for result in results[1:])


def test_two_python_threads_at_once():
    cython_ext.set_num_threads(2)
    cases = [(plain_arguments(shape, "float32"), plain_cotangents(shape, "float32")) for shape in ((3, 2, 100, 16), (2, 3, 100, 17))]
    expected = [run(KERNEL, *case) for case in cases]
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(run, KERNEL, *cases[i % 2]) for i in range(40)]
        assert all(same_bits(future.result(), expected[i % 2]) for i, future in enumerate(futures))
