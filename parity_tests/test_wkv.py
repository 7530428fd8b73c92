"""The WKV ops of both frameworks against the naive RWKV-5/6 recurrence, for every chunk size: values, last state and gradients.

Letters: B batch, L length, H heads, P head width.
"""

from functools import lru_cache, partial

import numpy as np
import pytest

from parity_tests import twins

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

from jax_impl.ops import wkv as jax_wkv  # noqa: E402
from torch_impl.ops import wkv as torch_wkv  # noqa: E402

BATCH, HEADS, WIDTH = 2, 3, 5
NAMES = ("r", "k", "v", "w", "u", "state")
# What `exp_exp` can give, and what only "direct" can: forgetting at once, a change of sign, growth, holding for ever.
DECAYS = {"exp_exp": (0.05, 0.4, 0.9, 0.99, 0.999), "direct": (0.0, -0.7, 1.03, 1.0, -1.01)}
# The bound of the project's acceptance. A sum of 100 products in float64 is off by about 100 eps = 2e-14; decays above one grow at most 20-fold.
BOUND = 1e-12
FORMS = [("recurrent", 64), ("chunked", 1), ("chunked", 7), ("chunked", 16), ("chunked", 64)]
LENGTHS = (1, 63, 100)


@lru_cache
def inputs(length, decays):
    """Arguments of the op by name, and the cotangents of its two results."""
    generator = np.random.default_rng([length, len(decays)])
    shape = (BATCH, length, HEADS, WIDTH)
    values = {name: generator.standard_normal(shape) for name in ("r", "k", "v")}
    values["w"] = np.array([np.roll(DECAYS[decays], head) for head in range(HEADS)])
    values["u"] = generator.standard_normal((HEADS, WIDTH))
    values["state"] = generator.standard_normal((BATCH, HEADS, WIDTH, WIDTH))
    return values, (generator.standard_normal(shape), generator.standard_normal(values["state"].shape))


def naive(values, time_first):
    recurrence = {"bonus": twins.wkv_bonus, "gain": twins.wkv_gain}[time_first]
    y = np.zeros(values["r"].shape, dtype=np.result_type(*values.values()))
    state = np.zeros(values["state"].shape, dtype=y.dtype)
    for b in range(BATCH):
        for h in range(HEADS):
            r, k, v = (values[name][b, :, h] for name in ("r", "k", "v"))
            y[b, :, h], state[b, h] = recurrence(r, k, v, values["w"][h], values["u"][h], values["state"][b, h])
    return y, state


@lru_cache
def truth(length, decays, time_first):
    """y, state, and for each argument a direction and the derivative along it of <y, cotangent> + <state, cotangent>."""
    values, cotangents = inputs(length, decays)
    slopes = {}
    for index, name in enumerate(NAMES):
        direction = np.random.default_rng([7, index]).standard_normal(values[name].shape)
        moved = naive({**values, name: values[name] + 1e-30j * direction}, time_first)
        slopes[name] = direction, sum((x.imag * c).sum() for x, c in zip(moved, cotangents, strict=True)) / 1e-30
    return *naive(values, time_first), slopes


def run_torch(length, decays, time_first, impl, chunk_size):
    values, cotangents = inputs(length, decays)
    leaves = [torch.tensor(values[name], requires_grad=True) for name in NAMES]
    results = torch_wkv.wkv(*leaves, time_first=time_first, impl=impl, chunk_size=chunk_size)
    torch.autograd.backward(results, [torch.from_numpy(c) for c in cotangents])
    return *(x.detach().numpy() for x in results), {name: leaf.grad.numpy() for name, leaf in zip(NAMES, leaves, strict=True)}


# Thirty functions are compiled here and each runs once, so compiling them halfway is faster; the models' tests run what XLA makes by default.
@partial(jax.jit, static_argnames=("time_first", "impl", "chunk_size"), compiler_options={"xla_backend_optimization_level": 0})
def _jax_op(leaves, cotangents, time_first, impl, chunk_size):
    op = partial(jax_wkv.wkv, time_first=time_first, impl=impl, chunk_size=chunk_size)
    results, back = jax.vjp(op, *leaves)
    return results, back(cotangents)


def run_jax(length, decays, time_first, impl, chunk_size):
    values, cotangents = inputs(length, decays)
    with jax.enable_x64(True):
        results, gradients = _jax_op([values[name] for name in NAMES], cotangents, time_first, impl, chunk_size)
        return *map(np.asarray, results), dict(zip(NAMES, map(np.asarray, gradients), strict=True))


def distance(a, b):
    assert a.dtype == b.dtype == np.float64 and a.shape == b.shape
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("run", [run_torch, run_jax])
@pytest.mark.parametrize("time_first", ["bonus", "gain"])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_form_is_the_naive_recurrence(run, time_first, length):
    for decays in DECAYS:
        y, state, slopes = truth(length, decays, time_first)
        first = None
        for impl, chunk_size in FORMS:
            at = f"{decays}, {impl}, chunks of {chunk_size}"
            found_y, found_state, gradients = run(length, decays, time_first, impl, chunk_size)
            assert distance(found_y, y) < BOUND, at
            assert distance(found_state, state) < BOUND, at
            for name, (direction, slope) in slopes.items():
                scale = np.linalg.norm(gradients[name]) * np.linalg.norm(direction)
                assert abs((gradients[name] * direction).sum() - slope) <= BOUND * scale, f"{at}, gradient of {name}"
            first = gradients if first is None else first
            for name, gradient in gradients.items():
                assert distance(gradient, first[name]) < BOUND, f"{at}, gradient of {name} against the recurrent form"


@pytest.mark.parametrize("run", [run_torch, run_jax])
def test_the_two_meanings_differ(run):
    bonus, gain = (run(63, "exp_exp", time_first, "chunked", 16) for time_first in ("bonus", "gain"))
    assert distance(bonus[0], gain[0]) > 0.1 and distance(bonus[1], gain[1]) > 0.1  # other functions, not other roundings


@pytest.mark.parametrize("run", [run_torch, run_jax])
def test_impossible_arguments(run):
    for arguments, message in (
        (("bonus", "fast", 7), "impl"),
        (("boost", "chunked", 7), "time_first must be 'bonus' or 'gain', found 'boost'"),
        (("bonus", "chunked", 0), "chunk_size must be at least 1, found 0"),
    ):
        with pytest.raises(ValueError, match=message):
            run(63, "exp_exp", *arguments)


def test_the_naive_recurrence_by_hand():
    """Two tokens, two channels, on paper: S_0 = 1, k v^T = [[2, 4], [3, 6]] then [[1, 0], [0, 0]]."""
    r, k, v = np.array([[1.0, 2.0], [3.0, 1.0]]), np.array([[2.0, 3.0], [1.0, 0.0]]), np.array([[1.0, 2.0], [1.0, 0.0]])
    w, u, s = np.array([0.5, -1.0]), np.array([10.0, 1.0]), np.ones((2, 2))
    y, last = twins.wkv_bonus(r, k, v, w, u, s)
    # Token 1 reads S_0 + diag(u) k v^T = [[21, 41], [4, 7]]; then S_1 = [[2.5, 4.5], [2, 5]].
    # Token 2 reads [[12.5, 4.5], [2, 5]]; then S_2 = [[2.25, 2.25], [-2, -5]].
    assert y.tolist() == [[29.0, 55.0], [39.5, 18.5]] and last.tolist() == [[2.25, 2.25], [-2.0, -5.0]]
    y, last = twins.wkv_gain(r, k, v, w, u, s)
    # S_1 = diag(w) + diag(u) k v^T = [[20.5, 40.5], [2, 5]]; S_2 = [[20.25, 20.25], [-2, -5]]; each token reads its own.
    assert y.tolist() == [[24.5, 50.5], [58.75, 55.75]] and last.tolist() == [[20.25, 20.25], [-2.0, -5.0]]
