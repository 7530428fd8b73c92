"""The compiled hierarchical delta rule, its NumPy twin, and what both promise about masks, chunks, odd inputs, NaN and threads."""

from __future__ import annotations

import inspect
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import cython_ext
from cython_ext import reference
from cython_ext.tests.examples import DELTA_SHAPES, converted, delta_arguments, lengths_of, poisoned_buffers, relative
from cython_ext.tests.test_selective_scan import LAYOUTS, same_bits
from cython_ext.threads import threads_for

KERNEL = cython_ext.delta_rule.hierarchical_forward
TWIN = reference.delta_rule.hierarchical_forward
BOTH = pytest.mark.parametrize("rule", [KERNEL, TWIN], ids=["kernel", "reference"])
TRANSFORMS = pytest.mark.parametrize("transform", ["lam", "exact"])
SEQUENCES = ("q", "k", "v", "beta", "fast_decay", "slow_decay", "fast_gate", "slow_gate")

# Two float64 forms of one formula differ by rounding alone, some tens of roundings of 1e-16 as in float32 below; a difference of meaning is
# far above this.
FLOAT64 = 1e-12
# A rounding of float32 is 2**-24; an output carries those of sums over a chunk and of the transform, and little from before, for a state is
# normalised in every chunk. 7 of them were the most seen, in the kernel and in NumPy alike.
FLOAT32 = 21 * 2.0**-24


def run(rule, arguments, **changes):
    o, (fast, slow) = rule(**{**arguments, **changes})
    return [o, fast, slow]


def far(found, expected, bound):
    """Names and distances of the outputs that are not within `bound`."""
    distances = {name: relative(a, b) for name, a, b in zip(("o", "S_fast", "S_slow"), found, expected, strict=True)}
    return {name: distance for name, distance in distances.items() if not distance < bound}


def rows(arguments, batch=slice(None), tokens=slice(None)):
    """The samples `batch` and the tokens `tokens` of `arguments`."""
    cut = {name: arguments[name][batch, :, tokens] for name in SEQUENCES}
    mask, states = arguments["mask"], arguments["initial_state"]
    cut["mask"] = None if mask is None else mask[batch, tokens]
    cut["initial_state"] = None if states is None else tuple(state[batch] for state in states)
    return {**arguments, **cut}


@pytest.fixture(autouse=True)
def default_threads():
    yield
    cython_ext.set_num_threads(None)


@TRANSFORMS
@pytest.mark.parametrize("initial_state", [True, False])
@pytest.mark.parametrize("shape", DELTA_SHAPES)
def test_kernel_equals_reference_in_float64(shape, initial_state, transform):
    for masked in (True, False) if shape[0] > 1 else (False,):
        arguments = delta_arguments(shape, "float64", initial_state, masked)
        found, expected = run(KERNEL, arguments, transform=transform), run(TWIN, arguments, transform=transform)
        assert [(array.shape, array.dtype) for array in found] == [(array.shape, array.dtype) for array in expected]
        assert not far(found, expected, FLOAT64)


@BOTH
@TRANSFORMS
@pytest.mark.parametrize("initial_state", [True, False])
@pytest.mark.parametrize("shape", DELTA_SHAPES)
def test_float32_stays_in_its_band(rule, shape, initial_state, transform):
    single = delta_arguments(shape, "float32", initial_state)
    double = converted(lambda array: array if array.dtype == bool else array.astype(np.float64), single)
    found, exact = run(rule, single, transform=transform), run(TWIN, double, transform=transform)
    assert all(array.dtype == np.float32 for array in found)
    assert not far(found, exact, FLOAT32)


def silu(x):
    return x / (1 + np.exp(-x))


@BOTH
def test_one_exact_chunk_is_the_plain_recurrence(rule):
    """From zero states nothing but the plain rule is read: S_t = S_{t-1} + beta k (v - S_{t-1}^T k)^T, o_t = S_t^T q, then the gates."""
    arguments = delta_arguments((2, 3, 11, 5, 64), initial_state=False, masked=False)
    o = run(rule, arguments, transform="exact")[0]
    w0, b0, w2, b2 = arguments["token_mlp"]
    for b, h in np.ndindex(2, 3):
        state = np.zeros((5, 5))
        for t in range(11):
            q, k, v, beta, _, _, fast_gate, slow_gate = (arguments[name][b, h, t] for name in SEQUENCES)
            q, k = q / np.linalg.norm(q), k / np.linalg.norm(k)
            state = state + beta * np.outer(k, v - state.T @ k)
            phi = 1 / (1 + np.exp(-(w2[0] @ silu(w0 @ np.append(beta * k, beta * v) + b0) + b2[0])))
            alpha = 0.5 + 0.3 * min(max(phi, 0.01), 0.99)
            assert relative(o[b, h, t], (alpha * fast_gate + (1 - alpha) * slow_gate) * (state.T @ q)) < FLOAT64


@BOTH
def test_the_steps_between_chunks_by_hand(rule):
    """One token in a chunk: T is 1, U = beta v and W = beta k, so step 6 can be written out with vectors, one head beside the other."""
    arguments = delta_arguments((1, 2, 4, 3, 1), masked=False)
    w0, b0, w2, b2 = arguments["chunk_mlp"]
    states = [[state[0, h] for state in arguments["initial_state"]] for h in range(2)]
    token = {**arguments, "initial_state": None}  # alpha (gates) of every token, read off the o of a fresh state
    o, found = run(rule, arguments)[0], run(rule, arguments)[1:]
    for t in range(4):
        values, psi = [], []
        for h in range(2):
            q, k, v, beta, *rest = (arguments[name][0, h, t] for name in SEQUENCES)
            q, k = q / np.linalg.norm(q), k / np.linalg.norm(k)
            u, w = beta * v, beta * k
            s = (k @ arguments["bilinear"][h]) @ u / arguments["temp"][h]
            flux = 1 / (1 + np.exp(-(w2[0] @ silu(w0 @ np.concatenate([k, u, [s]]) + b0) + b2[0])))
            psi.append(min(max(flux, 0.01), 0.99))
            values.append((q, k, u, w, rest))
        mix = 0.05 + 0.1 * (psi[0] + psi[1]) / 2
        for h, (q, k, u, w, (fast_decay, slow_decay, fast_gate, slow_gate)) in enumerate(values):
            kept = [states[h][0] * fast_decay * (1 - 0.1 * psi[h]), states[h][1] * slow_decay * (1 - 0.05 * psi[h])]
            read = [state / (np.linalg.norm(state) + 1e-8) for state in kept]
            own = [u - read[x].T @ w for x in range(2)]
            recalled = [read[x].T @ q + (q @ k) * own[x] for x in range(2)]
            alone = run(rule, rows(token, tokens=slice(t, t + 1)))[0][0, h, 0] @ u / (u @ u) / (q @ k)  # alpha gate + (1 - alpha) gate
            alpha = (alone - slow_gate) / (fast_gate - slow_gate)
            assert relative(o[0, h, t], alpha * fast_gate * recalled[0] + (1 - alpha) * slow_gate * recalled[1]) < 1e-11  # alpha divides by its own
            fast, slow = (kept[x] + np.outer(k, own[x]) for x in range(2))
            fast, slow = fast + mix * psi[h] * slow, slow + mix * (1 - psi[h]) * fast
            states[h] = [fast / (np.linalg.norm(fast) + 1e-8), slow / (np.linalg.norm(slow) + 1e-8)]
    for x in range(2):
        assert relative(found[x][0], [states[h][x] for h in range(2)]) < FLOAT64


@pytest.mark.parametrize("name", [*SEQUENCES, "token_mlp", "chunk_mlp", "bilinear", "temp", "mask", "initial_state", "chunk_size", "transform"])
def test_every_argument_reaches_an_output(name):
    """Decays and chunk flux hardly do, so the comparisons above are worth as much as this difference."""
    arguments = {**delta_arguments((2, 3, 65, 5, 16)), "transform": "lam"}
    changed = {
        "mask": np.arange(65) < np.array([[65], [20]]), "chunk_size": 17, "transform": "exact",
        **{n: tuple(1.1 * part for part in arguments[n]) for n in ("token_mlp", "chunk_mlp")},
        "initial_state": tuple(1.1 + state for state in arguments["initial_state"]),
    }.get(name)
    if changed is None:
        changed = arguments[name].copy()
        changed[..., -1 - 40 * (changed.ndim == 3 and name != "bilinear"):] *= 1.1
    found, expected = run(KERNEL, arguments, **{name: changed}), run(KERNEL, arguments)
    assert relative(found[0], expected[0]) > 1000 * FLOAT64


@BOTH
@TRANSFORMS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_row_is_the_same_alone_in_a_batch_and_under_padding(rule, dtype, transform):
    """To the bit: every chunk has the size that it has. What stands at padded positions is not looked at, be it NaN."""
    shape = (4, 3, 65, 5, 16)
    arguments = delta_arguments(shape, dtype)
    whole = run(rule, arguments, transform=transform)
    spoilt = {name: np.where(arguments["mask"].reshape(4, 1, 65, *[1] * (array.ndim - 3)), array, np.nan).astype(dtype)
              for name in SEQUENCES for array in [arguments[name]]}
    assert same_bits(run(rule, {**arguments, **spoilt}, transform=transform), whole)
    for row, length in enumerate(lengths_of(4, 65)):
        assert not whole[0][row, :, length:].any()
        alone = run(rule, {**rows(arguments, slice(row, row + 1), slice(length)), "mask": None}, transform=transform)
        assert same_bits(alone, [whole[0][row:row + 1, :, :length], *(state[row:row + 1] for state in whole[1:])])


@BOTH
@TRANSFORMS
def test_a_sequence_split_between_chunks_gives_the_same_bits(rule, transform):
    arguments = delta_arguments((2, 3, 60, 5, 7), masked=False)
    whole = run(rule, arguments, transform=transform)
    for cut in (7, 35, 56):
        head = run(rule, rows(arguments, tokens=slice(cut)), transform=transform)
        tail = run(rule, rows(arguments, tokens=slice(cut, None)), transform=transform, initial_state=tuple(head[1:]))
        assert same_bits([np.concatenate([head[0], tail[0]], axis=2), *tail[1:]], whole)


@BOTH
@TRANSFORMS
def test_no_initial_state_is_one_of_zeros(rule, transform):
    arguments = delta_arguments((2, 3, 40, 5, 16), initial_state=False)
    zeros = np.zeros((2, 3, 5, 5))
    assert not far(run(rule, arguments, transform=transform, initial_state=(zeros, zeros)), run(rule, arguments, transform=transform), FLOAT64)


@BOTH
@TRANSFORMS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_zero_rows_of_keys_and_queries_stay_zero(rule, dtype, transform):
    arguments = delta_arguments((2, 3, 40, 5, 16), dtype, masked=False)
    arguments["q"][:, :, [3, 30]] = 0
    arguments["k"][:, :, [3, 17, 18]] = 0
    arguments["k"][1] = 0
    found = run(rule, arguments, transform=transform)
    assert all(np.isfinite(array).all() for array in found)
    assert not found[0][:, :, [3, 30]].any() and found[0][:, :, 4].all()
    assert not far(found, run(TWIN, arguments, transform=transform), FLOAT64 if dtype == "float64" else 2 * FLOAT32)


@BOTH
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_saturated_fluxes_are_clamped(rule, dtype, sign):
    """Both fluxes at one end whatever the input: all chunks alike, so the output is that of any other saturated weights."""
    def flux(inputs, size):
        w2, b2 = np.zeros((1, 2), dtype), np.array([sign * size], dtype)
        return np.full((2, inputs), -1e3, dtype), np.zeros(2, dtype), w2, b2

    arguments = delta_arguments((2, 3, 40, 5, 7), dtype)
    mild, wild = (run(rule, arguments, token_mlp=flux(10, size), chunk_mlp=flux(11, size)) for size in (9, 1e5))
    assert all(np.isfinite(array).all() for array in wild)
    assert same_bits(mild, wild)


def test_twins_share_signature_and_docstring():
    assert inspect.getdoc(KERNEL) == inspect.getdoc(TWIN)
    assert str(inspect.signature(KERNEL)) == str(inspect.signature(TWIN))


def replaced(index, change):
    return lambda parts: tuple(change(part) if i == index else part for i, part in enumerate(parts))


def hole(mask):
    mask = mask.copy()
    mask[1] = True
    mask[1, 4] = False
    return mask


# (argument, what becomes of its good value, error, words of the message); B = 3, H = 2, L = 8, d = 5
BAD = [
    ("q", lambda a: a.tolist(), TypeError, ["q must be a NumPy array", "found list"]),
    ("q", lambda a: a.astype(np.float16), TypeError, ["q must be float32 or float64", "found float16"]),
    ("q", lambda a: a.astype(np.int64), TypeError, ["q", "found int64"]),
    ("q", lambda a: np.ma.masked_array(a), TypeError, ["q", "found MaskedArray"]),
    ("q", lambda a: a[0], ValueError, ["q must have shape (B, H, L, d)", "found (2, 8, 5)"]),
    *(("q", lambda a, cut=cut: a[cut], ValueError, ["q", "no axis empty"]) for cut in np.index_exp[:0] + tuple(
        (slice(None),) * axis + (slice(0),) for axis in (1, 2, 3))),
    ("q", lambda a: a.astype(np.float32), TypeError, ["k must be float32", "found float64"]),
    ("k", lambda a: a[:, :1], ValueError, ["k must have shape (B, H, L, d) = (3, 2, 8, 5)", "found (3, 1, 8, 5)"]),
    ("v", lambda a: a.astype(np.float32), TypeError, ["v must be float64", "found float32"]),
    ("v", lambda a: None, TypeError, ["v must be a NumPy array", "found NoneType"]),
    ("beta", lambda a: a[..., None], ValueError, ["beta must have shape (B, H, L) = (3, 2, 8)", "found (3, 2, 8, 1)"]),
    ("fast_decay", lambda a: a[:1], ValueError, ["fast_decay", "(3, 2, 8)", "found (1, 2, 8)"]),
    ("slow_decay", lambda a: a[:, :, :7], ValueError, ["slow_decay", "found (3, 2, 7)"]),
    ("fast_gate", lambda a: a.astype(np.float32), TypeError, ["fast_gate", "float64", "found float32"]),
    ("slow_gate", lambda a: a[0], ValueError, ["slow_gate", "found (2, 8)"]),
    ("token_mlp", lambda a: a[:3], TypeError, ["token_mlp must be a tuple of four arrays (w0, b0, w2, b2)", "found tuple of 3"]),
    ("token_mlp", lambda a: a[0], TypeError, ["token_mlp", "found ndarray"]),
    ("token_mlp", replaced(0, lambda a: a[:, :9]), ValueError, ["w0 of token_mlp must have shape (m, 2d) = (2, 10)", "found (2, 9)"]),
    ("token_mlp", replaced(0, lambda a: a[:0]), ValueError, ["w0 of token_mlp", "m of at least 1 and 2d = 10", "found (0, 10)"]),
    ("token_mlp", replaced(1, lambda a: a[:1]), ValueError, ["b0 of token_mlp must have shape (m) = (2,)", "found (1,)"]),
    ("chunk_mlp", replaced(0, lambda a: a[:, :10]), ValueError, ["w0 of chunk_mlp must have shape (m, 2d + 1) = (2, 11)", "found (2, 10)"]),
    ("chunk_mlp", replaced(2, lambda a: a[0]), ValueError, ["w2 of chunk_mlp must have shape (1, m) = (1, 2)", "found (2,)"]),
    ("chunk_mlp", replaced(3, lambda a: a.astype(np.float32)), TypeError, ["b2 of chunk_mlp must be float64", "found float32"]),
    ("bilinear", lambda a: a[:, :4], ValueError, ["bilinear must have shape (H, d, d) = (2, 5, 5)", "found (2, 4, 5)"]),
    ("temp", lambda a: a[0], TypeError, ["temp must be a NumPy array", "found float64"]),
    ("temp", lambda a: a[:1], ValueError, ["temp must have shape (H) = (2,)", "found (1,)"]),
    ("mask", lambda a: a.astype(np.int64), TypeError, ["mask must be bool", "found int64"]),
    ("mask", lambda a: a[:, :7], ValueError, ["mask must have shape (B, L) = (3, 8)", "found (3, 7)"]),
    ("mask", hole, ValueError, ["mask", "right", "hole in row 1 at token 4"]),
    ("mask", lambda a: a[:, ::-1], ValueError, ["mask", "right", "hole in row 1 at token 0"]),
    ("mask", lambda a: a & (np.arange(3) < 2)[:, None], ValueError, ["mask", "valid token", "none in row 2"]),
    ("initial_state", lambda a: a[0], TypeError, ["initial_state must be a pair (S_fast, S_slow)", "found ndarray"]),
    ("initial_state", lambda a: a[:1], TypeError, ["initial_state", "found tuple of 1"]),
    ("initial_state", replaced(1, lambda a: a[:2]), ValueError, ["S_slow of initial_state", "(B, H, d, d) = (3, 2, 5, 5)", "found (2, 2, 5, 5)"]),
    ("initial_state", replaced(0, lambda a: a.astype(np.float32)), TypeError, ["S_fast of initial_state must be float64", "found float32"]),
    ("chunk_size", lambda a: 0, ValueError, ["chunk_size must be at least 1", "found 0"]),
    ("chunk_size", lambda a: 4.0, TypeError, ["chunk_size must be an integer of at least 1", "found 4.0"]),
    ("chunk_size", lambda a: True, TypeError, ["chunk_size", "found True"]),
    ("transform", lambda a: "solve", ValueError, ["transform must be 'lam' or 'exact'", "found 'solve'"]),
]


@BOTH
@pytest.mark.parametrize(("name", "spoil", "error", "words"), BAD)
def test_bad_input_is_refused_by_name(rule, name, spoil, error, words):
    arguments = {**delta_arguments((3, 2, 8, 5, 4)), "transform": "lam"}
    with pytest.raises(error) as caught:
        rule(**{**arguments, name: spoil(arguments[name])})
    assert all(word in str(caught.value) for word in words), str(caught.value)


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_bits_and_stays_as_it_was(rule, layout, dtype):
    arguments = delta_arguments((3, 2, 19, 5, 7), dtype)
    expected = run(rule, arguments)
    laid = converted(lambda array: array if array.itemsize == 1 and layout == "unaligned" else LAYOUTS[layout](array), arguments)
    assert same_bits(run(rule, laid), expected)
    before, after = [], []
    converted(before.append, arguments)
    converted(lambda array: after.append(np.ascontiguousarray(array)), laid)
    assert same_bits(after, before)


@BOTH
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "beta"])
def test_nan_propagates_and_stays_in_its_sample(rule, name, value):
    arguments = delta_arguments((3, 2, 19, 5, 7), masked=False)
    clean = run(rule, arguments)
    arguments[name][1, 0, 9] = value
    with np.errstate(invalid="ignore"):
        found = run(rule, arguments)
    assert np.isnan(found[0][1, 0, 9]).all() and same_bits([found[0][1, :, :7]], [clean[0][1, :, :7]])
    if name != "q":  # a query is read and not remembered
        assert all(np.isnan(state[1]).all() for state in found[1:])  # of every head: psi is averaged over them
    assert same_bits([array[::2] for array in found], [array[::2] for array in clean])


@TRANSFORMS
@pytest.mark.parametrize("initial_state", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nothing_is_read_from_a_buffer_before_it_is_written(monkeypatch, dtype, initial_state, transform):
    arguments = delta_arguments((3, 2, 40, 6, 16), dtype, initial_state)
    expected = run(KERNEL, arguments, transform=transform)
    poisoned = poisoned_buffers(monkeypatch)
    found = run(KERNEL, arguments, transform=transform)
    assert len(poisoned) >= 10  # o and the states among them
    assert same_bits(found, expected)


@TRANSFORMS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_neither_threads_nor_windows_change_a_bit(monkeypatch, dtype, transform):
    arguments = delta_arguments((5, 3, 130, 9, 16), dtype)
    results = []
    for threads, window in ((1, 1 << 30), (2, 1 << 30), (4, 1 << 30), (1, 1), (4, 200_000)):
        cython_ext.set_num_threads(threads)
        monkeypatch.setattr(cython_ext.delta_rule, "WINDOW_BYTES", window)
        assert threads_for(15 * 9, 5 * 3 * 130 * 9 * (3 * 16 + 4 * 9)) == threads  # else the test would compare one thread with itself
        results.append(run(KERNEL, arguments, transform=transform))
    assert all(same_bits(result, results[0]) for result in results[1:])


def test_buffers_do_not_grow_with_the_length():
    extra = {}
    for length in (700, 2100):
        arguments = delta_arguments((1, 5, length, 33, 32), "float32", masked=False)
        KERNEL(**arguments)
        tracemalloc.start()
        found = run(KERNEL, arguments)
        extra[length] = tracemalloc.get_traced_memory()[1] - sum(array.nbytes for array in found)
        tracemalloc.stop()
    assert extra[700] > cython_ext.delta_rule.WINDOW_BYTES // 2  # the buffers of a window are seen at all
    assert extra[2100] < 1.05 * extra[700]  # equal, but for what Python itself holds


def test_two_python_threads_at_once():
    cython_ext.set_num_threads(2)
    cases = [delta_arguments((3, 2, 100, d, 16), "float32") for d in (16, 17)]
    assert threads_for(42, 3 * 2 * 100 * 16 * (3 * 16 + 4 * 16)) == 2  # both levels of threads at once
    expected = [run(KERNEL, case) for case in cases]
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(run, KERNEL, cases[i % 2]) for i in range(40)]
        assert all(same_bits(future.result(), expected[i % 2]) for i, future in enumerate(futures))
