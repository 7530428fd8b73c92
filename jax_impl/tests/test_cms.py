"""The memory of WaveCore: which row is written, that the lazy decay is the full one, what a gradient sees, and health over many steps."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from scipy import special

from jax_impl.ops import cms
from parity_tests.harness.adapters.nnx_trace import quick_options

RULES = ("least_salient", "slot0")
SLOTS, WIDTH, KEY = 7, 5, 3


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def quick(function: Any, **options: Any) -> Any:
    """`function` with these keywords, jitted by what compiles fastest; the arithmetic is tiny."""
    return jax.jit(functools.partial(function, **options), compiler_options=quick_options())


def drawn(steps: int, batch: int, dtype: Any = np.float64, seed: int = 0) -> tuple[np.ndarray, ...]:
    """value (steps, B, d), key (steps, B, d_k) and gate (steps, B, 1) in (0, 1), about half of them open."""
    rng = np.random.default_rng(seed)
    values, keys = (rng.normal(size=(steps, batch, width)).astype(dtype) for width in (WIDTH, KEY))
    return values, keys, rng.uniform(0, 1, (steps, batch, 1)).astype(dtype)


def filled(batch: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """A memory (B, n, d) and its keys (B, n, d_k)."""
    rng = np.random.default_rng(seed)
    memory, keys = (rng.normal(size=(batch, SLOTS, width)) for width in (WIDTH, KEY))
    return memory, keys


def lazy(memory: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, ...]:
    return memory, keys, np.square(memory).sum(-1), np.ones((), memory.dtype)


def relative(found: Array, expected: Array) -> Array:
    return jnp.linalg.norm((found - expected).ravel()) / jnp.linalg.norm(expected.ravel())


def close(found: Any, expected: Any, rtol: float, atol: float = 0.0) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=rtol, atol=atol)


@pytest.mark.parametrize("decay", [0.1, 0.01])
@pytest.mark.parametrize("rule", RULES)
def test_lazy_decay_is_the_full_one_over_a_thousand_steps_of_given_rows(rule: str, decay: float) -> None:
    """Also where the lazy memory is saved and loaded in the middle, with a scale that is not 1. The scale is folded 15 times or once."""
    options = {"rule": rule, "threshold": 0.3}

    def step(both: Any, now: tuple[Array, ...]) -> tuple[Any, tuple[Array, ...]]:
        full, held = both
        value, key, gate, row = now
        chosen = (row, gate[:, 0] > 0.3) if rule == "least_salient" else (jnp.zeros_like(row), row >= 0)
        full = cms.write(*full, value, key, gate, decay, **options, chosen=chosen)
        held = cms.write_lazy(*held, value, key, gate, decay, **options, chosen=chosen)
        off = jnp.maximum(relative(held[3] * held[0], full[0]), relative(held[3] * held[1], full[1]))
        return (full, held), (off, relative(held[2], jnp.square(held[0]).sum(-1)), held[3])

    inputs = (*drawn(1000, 3), np.random.default_rng(2).integers(0, SLOTS, (1000, 3)))
    run = quick(jax.lax.scan, f=step)
    (full, held), first = run(init=(filled(3), lazy(*filled(3))), xs=tuple(x[:500] for x in inputs))
    assert held[3] < 1
    held = tuple(np.array(leaf) for leaf in held)
    _, second = run(init=(full, held), xs=tuple(x[500:] for x in inputs))
    off, norms_off, scales = (np.concatenate(parts) for parts in zip(first, second, strict=True))
    # a product of up to 690 factors 1 - decay, each rounded to 1e-16
    assert off.max() < 1e-11 and norms_off.max() < 1e-12
    assert (scales >= cms.FOLD).all() and (scales == 1).sum() == {0.1: 15, 0.01: 1}[decay]


@pytest.mark.parametrize("batch", [None, 3])
def test_an_empty_memory_fills_in_order_and_then_loses_its_smallest_row(batch: int | None) -> None:
    """On a tie the lowest row; what stands there shrinks before the next choice."""
    at = (lambda x: x[0]) if batch is None else (lambda x: x)
    memory, keys = (np.zeros((batch or 1, SLOTS, width)) for width in (WIDTH, KEY))
    full, held = (at(memory), at(keys)), lazy(at(memory), at(keys))
    values, new_keys, _ = drawn(SLOTS + 1, batch or 1)
    gate = at(np.full((batch or 1, 1), 0.9))
    write, write_lazy = (quick(f, decay=0.1, rule="least_salient", threshold=0.5) for f in (cms.write, cms.write_lazy))
    for step in range(SLOTS + 1):
        norms, old = np.square(full[0]).sum(-1), full[0]
        row = norms.argmin(-1) if step == SLOTS else np.full(norms.shape[:-1], step)
        row = row[..., None, None]
        arguments = at(values[step]), at(new_keys[step]), gate
        full, held = ([np.asarray(leaf) for leaf in f(*state, *arguments)] for f, state in ((write, full), (write_lazy, held)))
        assert ((full[0] != 0).any(-1).sum(-1) == min(step + 1, SLOTS)).all()
        expected = 0.9 * at(values[step]) + 0.1 * 0.9 * np.take_along_axis(old, row, -2)[..., 0, :]
        close(np.take_along_axis(full[0], row, -2)[..., 0, :], expected, 1e-14, 1e-15)
        close(held[3] * held[0], full[0], 1e-14, 1e-15)
        close(held[3] * held[1], full[1], 1e-14, 1e-15)


def test_slot0_ignores_norms_and_threshold() -> None:
    full = filled(2)
    value, key, gate = (x[0] for x in drawn(1, 2))
    gate = 0.01 * gate
    after = quick(cms.write, decay=0.1, rule="slot0", threshold=0.9)(*full, value, key, gate)
    for found, old, new in zip(after, full, (value, key), strict=True):
        close(found[:, 0], gate * new + (1 - gate) * 0.9 * old[:, 0], 1e-14)
        close(found[:, 1:], 0.9 * old[:, 1:], 0)


def test_a_gate_at_the_threshold_is_closed() -> None:
    value, key, _ = (x[0] for x in drawn(1, 3))
    gate = np.array([[0.5], [np.nextafter(0.5, 1)], [np.nextafter(0.5, 0)]])
    memory, _ = quick(cms.write, decay=0.1, rule="least_salient", threshold=0.5)(*filled(3), value, key, gate)
    changed = (np.asarray(memory) != 0.9 * filled(3)[0]).any(-1)
    assert changed.sum(-1).tolist() == [0, 1, 0]
    assert changed[1].argmax() == np.square(filled(3)[0][1]).sum(-1).argmin()


@pytest.mark.parametrize("form", ["full", "lazy"])
def test_gradients_flow_through_gate_new_and_old_and_a_closed_gate_has_none(form: str) -> None:
    """Against the derivative written out: the written row is g v + (1 - g) (1 - decay) M_i, all others (1 - decay) M_j."""
    weights = np.random.default_rng(3).normal(size=(2, SLOTS, WIDTH))
    options = {"rule": "least_salient", "threshold": 0.5}

    def weighed(memory: Array, keys: Array, value: Array, key: Array, gate: Array, scale: Array) -> Array:
        if form == "full":
            return (cms.write(memory, keys, value, key, gate, 0.1, **options)[0] * weights).sum()
        norms = jax.lax.stop_gradient(jnp.square(memory / 0.25).sum(-1))
        held = cms.write_lazy(memory / 0.25, keys / 0.25, norms, scale, value, key, gate, 0.1, **options)
        return (held[0] * held[3] * weights).sum()

    (memory, keys), (value, key, _), gate = filled(2), (x[0] for x in drawn(1, 2)), np.array([[0.8], [0.3]])
    gradient = [np.asarray(x) for x in quick(jax.grad(weighed, argnums=range(6)))(memory, keys, value, key, gate, np.array(0.25))]
    row = int(np.square(memory[0]).sum(-1).argmin())
    expected = 0.9 * weights
    expected[0, row] *= 0.2
    assert not gradient[2][1].any() and gradient[4][1, 0] == 0 and not gradient[3].any() and gradient[5] == 0
    close(gradient[2][0], 0.8 * weights[0, row], 1e-14)
    close(gradient[4][0, 0], ((value[0] - 0.9 * memory[0, row]) * weights[0, row]).sum(), 1e-13)
    close(gradient[0], expected, 1e-14)


@pytest.mark.parametrize("folds", [True, False])
def test_a_gradient_goes_through_the_fold(folds: bool) -> None:
    """Forwards and backwards."""
    value, key, gate = (x[0] for x in drawn(1, 2))
    scale = (1.05 if folds else 1.2) * cms.FOLD

    def after(memory: Array, keys: Array) -> tuple[Array, ...]:
        norms = jax.lax.stop_gradient(jnp.square(memory).sum(-1))
        return cms.write_lazy(memory, keys, norms, jnp.asarray(scale), value, key, gate, 0.1, rule="slot0", threshold=0.5)

    def both(*given: Array) -> tuple[Any, ...]:
        gradients = jax.grad(lambda *given: sum(x.sum() for x in after(*given)[:2]), argnums=(0, 1))(*given)
        return *jax.jvp(after, given, tuple(map(jnp.ones_like, given))), gradients

    held, pushed, gradients = quick(both)(*filled(2))
    assert (held[3] == 1) == folds
    expected = np.full((2, SLOTS, WIDTH), 0.9 * scale if folds else 1.0)
    expected[:, 0] *= 1 - gate
    for found in (pushed, gradients):
        close(found[0], expected, 1e-14)
        close(found[1], expected[..., :KEY], 1e-14)
    assert not np.asarray(pushed[2]).any() and pushed[3] == 0


@pytest.mark.parametrize("rule", RULES)
def test_a_row_that_is_not_finite_is_not_written(rule: str) -> None:
    write, write_lazy = (quick(f, decay=0.1, rule=rule, threshold=0.5) for f in (cms.write, cms.write_lazy))
    before, rows = filled(3), np.array([0, 2])

    @quick
    def gradients(before, held, new):
        def written(new):
            forms = cms.write(*before, *new, 0.1, rule=rule, threshold=0.5), cms.write_lazy(*held, *new, 0.1, rule=rule, threshold=0.5)
            return sum(leaf.sum() for form in forms for leaf in form[:2])

        return jax.grad(written)(new)

    for part, bad in ((0, np.nan), (1, np.inf), (2, np.nan)):
        new = [np.array(x[0]) for x in drawn(1, 3)]
        new[2][:] = 0.9
        clean = [np.asarray(leaf) for leaf in write(*before, *new)]
        new[part][1, 0] = bad
        full, held = ([np.asarray(leaf) for leaf in f(*state, *new)] for f, state in ((write, before), (write_lazy, lazy(*before))))
        for found, expected, old in zip(full, clean, before, strict=True):
            close(found[rows], expected[rows], 0)
            close(found[1], 0.9 * old[1], 0)
        for found, expected in zip((held[0] * held[3], held[1] * held[3]), full, strict=True):
            close(found, expected, 1e-14, 1e-15)
        assert all(np.isfinite(leaf).all() for leaf in held)
        for gradient in gradients(before, lazy(*before), new):
            assert np.isfinite(gradient).all() and not gradient[1].any()


def test_reading_a_lazy_memory_is_reading_the_plain_one() -> None:
    (memory, keys), query = filled(3), drawn(1, 3)[1][0]
    attention, content = quick(cms.read)(query, memory, keys)
    weights = special.softmax(np.einsum("bnk,bk->bn", keys, query) / KEY**0.5, -1)
    close(attention, weights, 1e-13)
    close(content, np.einsum("bn,bnd->bd", weights, memory), 1e-13, 1e-15)
    for found, expected in zip(quick(cms.read)(query, memory / 0.3, keys / 0.3, np.array(0.3)), (attention, content), strict=True):
        close(found, expected, 1e-13, 1e-15)


@pytest.mark.parametrize("decay", [0.1, 0.01])
def test_float32_is_healthy_over_100_000_steps(decay: float) -> None:
    """Float32 lazy writes that choose their own rows, and beside them the full rewrite in float64 of the same rows."""
    options = {"rule": "least_salient", "threshold": 0.5}

    def step(both: Any, now: tuple[Array, ...]) -> tuple[Any, tuple[Array, ...]]:
        held, full = both
        norms, row = jnp.square(full[0]).sum(-1), held[2].argmin(-1)
        chosen = jnp.where(norms.min() > 0, norms[0, row[0]] / norms.min(), 1.0)
        held = cms.write_lazy(*held, *now, decay, **options)
        full = cms.write(*full, *(x.astype(jnp.float64) for x in now), decay, **options, chosen=(row, now[2][:, 0] > 0.5))
        return (held, full), (chosen, jnp.square(held[3]) * held[2].sum(), held[3])

    zeros = [tuple(np.zeros((1, SLOTS, width), dtype) for width in (WIDTH, KEY)) for dtype in (np.float32, np.float64)]
    found = quick(jax.lax.scan, f=step)(init=(lazy(*zeros[0]), zeros[1]), xs=drawn(100_000, 1, np.float32))
    (held, full), (chosen, sizes, scales) = jax.tree.map(np.asarray, found)
    memory, keys, norms, scale = held
    assert all(leaf.dtype == np.float32 and np.isfinite(leaf).all() for leaf in held)
    # a row is a sum of a few values, rounded to 6e-8 when written and at every fold, and the scale a product of up to 690 factors
    assert relative(scale * memory, full[0]) < 1e-5 and relative(scale * keys, full[1]) < 1e-5
    close(norms, np.square(memory).sum(-1), 1e-6)
    assert chosen.max() < 1 + 1e-4  # the row with the smallest norm in float64, or one as small to 700 roundings
    assert scales.min() >= cms.FOLD and scales.max() <= 1
    halves = sizes.reshape(2, -1).mean(-1)
    assert 0.95 < halves[1] / halves[0] < 1.05  # a mean over 50,000 steps of a stationary process
