"""Inputs that the tests of the kernels share. Letters: B batch, L length, N state."""

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
