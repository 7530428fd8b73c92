"""Inputs that the tests of the kernels share.

Letters: B batch, L length, N state; of WKV H heads, P head width; of the delta rule H heads, d head width, C chunk.
"""

from __future__ import annotations

import numpy as np

# Every B, L and N that is awkward: single tokens, one below a power of two, one above, N below, at and above the 16 lanes of a sum and the
# 4 rows of a product, and the N = 16 that has a body of its own.
SHAPES = [(1, 1, 4), (3, 1, 7), (1, 3, 5), (3, 63, 16), (1, 100, 33), (3, 257, 5), (3, 100, 4), (1, 257, 16), (2, 5, 17), (3, 2, 255)]

# None or an array for dt_b and for initial_state.
OPTIONS = [(True, True), (True, False), (False, True), (False, False)]

NAMES = ("update", "dt_a", "dt_b", "transition", "weight", "bias", "initial_state")


def arguments(shape, dtype="float64", dt_b=True, initial_state=True, seed=0):
    """The array arguments of `selective_scan.forward`, by name: random, with steps up to 0.1 as the models take them."""
    batch, length, n = shape
    rng = np.random.default_rng([seed, *shape])
    drawn = {
        "update": rng.normal(size=shape),
        "dt_a": rng.uniform(0.001, 0.1, (batch, length)),
        "dt_b": rng.uniform(0.01, 1.0, (batch, length)) if dt_b else None,
        "transition": rng.normal(size=(n, n)) / np.sqrt(n),
        "weight": rng.normal(1.0, 0.2, n),
        "bias": rng.normal(0.0, 0.2, n),
        "initial_state": rng.normal(size=(batch, n)) if initial_state else None,
    }
    return {name: None if array is None else array.astype(dtype) for name, array in drawn.items()}


def cotangent(shape, dtype="float64", seed=1):
    """A gradient of the states (B, L, N)."""
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


def relative(found, expected):
    """Relative L2 distance; absolute where the expected array is zero."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / (np.linalg.norm(expected) or 1.0)


def differences(found, expected, inputs):
    """{name: relative L2 distance} of the states and of every gradient, in the order of a call of forward and one of backward.

    A token that starts from a zero state does not feel the length of its update, so its gradient of dt_b is a sum of terms that cancel
    down to eps: rounding can only be measured against those terms.
    """
    distances = {}
    for name, a, b in zip(("states", *NAMES), found, expected, strict=True):
        if (a is None) != (b is None) or (a is not None and a.shape != b.shape):
            distances[name] = np.inf
        elif a is not None:
            distances[name] = relative(a, b)
    if inputs["dt_b"] is not None:
        terms = (np.abs(expected[1]) * np.abs(inputs["update"])).sum(-1) / inputs["dt_b"]
        distances["dt_b"] *= np.linalg.norm(expected[3]) / np.linalg.norm(terms)
    return distances


# (B, L, H, P): single tokens, as many as are taken one after another and one more, chunks short, full and one token over, P below, at and
# above the 16 lanes of a sum, a single channel, and the P = 128 of the default sizes.
WKV_SHAPES = [
    (1, 1, 1, 1), (1, 2, 2, 16), (2, 3, 2, 5), (2, 9, 1, 7), (1, 32, 3, 17), (2, 63, 3, 7), (1, 64, 2, 128), (1, 65, 2, 33), (2, 100, 3, 1),
    (2, 257, 2, 16),
]
WKV_NAMES = ("r", "k", "v", "w", "u", "initial_state")


def wkv_arguments(shape, dtype="float64", initial_state=True, decay="exp_exp", seed=0):
    """The arguments of `wkv.forward` but time_first, by name, random: decays in (0, 1), with "direct" some that are zero, negative, above
    one, or so small that their powers vanish."""
    batch, _, heads, p = shape
    rng = np.random.default_rng([seed, *shape])
    drawn = dict(zip("rkv", rng.normal(size=(3, *shape)), strict=True))
    drawn["w"] = np.exp(-np.exp(rng.uniform(-5.0, 1.5, (heads, p))))
    drawn["u"] = rng.normal(size=(heads, p))
    if decay == "direct":
        few = np.array([0.0, -0.7, 1.01, 1e-30, -1.0, 1.0])[:p]
        drawn["w"][0, :len(few)] = few
    drawn["initial_state"] = rng.normal(size=(batch, heads, p, p)) if initial_state else None
    return {name: None if array is None else array.astype(dtype) for name, array in drawn.items()}


def wkv_cotangents(shape, dtype="float64", seed=1):
    """Gradients of y (B, L, H, P) and of the last state (B, H, P, P)."""
    batch, _, heads, p = shape
    rng = np.random.default_rng([seed, *shape])
    return rng.normal(size=shape).astype(dtype), rng.normal(size=(batch, heads, p, p)).astype(dtype)


# (B, H, L, d, C): single tokens, chunks one token short, full and one token over, many small chunks, a chunk above L, one head, one channel,
# and the d = 32, C = 64 of LAM; past the second chunk decays and the flux of chunks reach an output.
DELTA_SHAPES = [
    (1, 1, 1, 5, 64), (3, 2, 3, 6, 7), (2, 3, 63, 5, 64), (1, 2, 64, 7, 64), (2, 3, 65, 5, 64), (3, 2, 100, 6, 16), (1, 3, 130, 33, 64),
    (2, 3, 257, 5, 7), (3, 1, 257, 32, 64), (1, 2, 40, 1, 16), (2, 1, 19, 9, 1), (1, 2, 100, 5, 10**9),
]


def lengths_of(batch, length):
    """Valid tokens of every row of a batch: all, then fewer and fewer, down to rows whose last chunks are empty."""
    return [max(1, length // (1 + 2 * row)) for row in range(batch)]


def delta_arguments(shape, dtype="float64", initial_state=True, masked=True, seed=0):
    """The arguments of `delta_rule.hierarchical_forward` but the transform, by name: random, fluxes away from their clamps, decays and
    gates anywhere in (0, 1)."""
    batch, heads, length, d, chunk = shape
    hidden = max(d // 2, 1)
    rng = np.random.default_rng([seed, *shape])

    def cast(*arrays):
        return tuple(array.astype(dtype) for array in arrays)

    def flux(inputs):
        w0, b0 = rng.normal(size=(hidden, inputs)) / np.sqrt(inputs), rng.normal(0.0, 0.3, hidden)
        return cast(w0, b0, rng.normal(size=(1, hidden)), rng.normal(size=1))

    drawn = dict(zip("qkv", cast(*rng.normal(size=(3, batch, heads, length, d))), strict=True))
    for name in ("beta", "fast_decay", "slow_decay", "fast_gate", "slow_gate"):
        drawn[name], = cast(rng.uniform(0.05, 0.95, (batch, heads, length)))
    return {
        **drawn,
        "token_mlp": flux(2 * d),
        "chunk_mlp": flux(2 * d + 1),
        "bilinear": cast(rng.normal(size=(heads, d, d)))[0],
        "temp": cast(rng.uniform(1.0, 3.0, heads))[0],
        "mask": np.arange(length) < np.array(lengths_of(batch, length))[:, None] if masked else None,
        "initial_state": cast(*rng.normal(size=(2, batch, heads, d, d)) / d) if initial_state else None,
        "chunk_size": chunk,
    }


# (B, H, L, d): single tokens, strips of 16 tokens and their chunks (16, 32, 48 and 64 tokens as d grows) one short, full and one over, many
# chunks, one channel, loops of 32 columns with and without a rest.
PLAIN_SHAPES = [
    (1, 1, 1, 5), (3, 2, 3, 7), (2, 3, 15, 16), (1, 2, 16, 32), (2, 1, 17, 33), (2, 3, 63, 5), (3, 2, 100, 16), (1, 2, 100, 65), (1, 1, 97, 129),
    (2, 1, 257, 64), (1, 1, 257, 200), (1, 2, 40, 1), (2, 3, 257, 6),
]


def plain_arguments(shape, dtype="float64", initial_state=True, seed=0):
    """The arguments of `delta_rule.forward`, by name: keys and queries of length one, as the models have them, and beta in (0, 1)."""
    batch, heads, length, d = shape
    rng = np.random.default_rng([seed, *shape])
    q, k, v = rng.normal(size=(3, *shape))
    drawn = {
        "q": q / np.linalg.norm(q, axis=-1, keepdims=True),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": v,
        "beta": rng.uniform(0.05, 0.95, (batch, heads, length)),
        "initial_state": rng.normal(size=(batch, heads, d, d)) / d if initial_state else None,
    }
    return {name: None if array is None else array.astype(dtype) for name, array in drawn.items()}


def plain_cotangents(shape, dtype="float64", seed=1):
    """Gradients of o (B, H, L, d) and of the last state (B, H, d, d)."""
    rng = np.random.default_rng([seed, *shape])
    return rng.normal(size=shape).astype(dtype), rng.normal(size=(*shape[:2], shape[3], shape[3])).astype(dtype)


def converted(function, arguments):
    """`arguments`, a dict as of `delta_arguments`, with `function` applied to every array, those in tuples too."""
    def convert(value):
        if isinstance(value, tuple):
            return tuple(map(convert, value))
        return function(value) if isinstance(value, np.ndarray) else value

    return {name: convert(value) for name, value in arguments.items()}


def poisoned_buffers(monkeypatch):
    """From here on every buffer that NumPy gives uninitialised is full of NaN; they are listed in what is returned."""
    poisoned = []

    def poison(array):
        array.fill(np.nan)
        poisoned.append(array)
        return array

    empty, empty_like = np.empty, np.empty_like
    monkeypatch.setattr(np, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(np, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    return poisoned


def central_differences(scalar, inputs, name):
    """The gradient of `scalar(inputs)` by one array of the dict, by central differences.

    The error is step**2 times a third derivative of order 1, and rounding / step: both near 1e-10.
    """
    step, array = 1e-5, inputs[name]
    numeric = np.empty_like(array)
    for index in np.ndindex(array.shape):
        ends = []
        for sign in (1, -1):
            moved = array.copy()
            moved[index] += sign * step
            ends.append(scalar({**inputs, name: moved}))
        numeric[index] = (ends[0] - ends[1]) / (2 * step)
    return numeric
