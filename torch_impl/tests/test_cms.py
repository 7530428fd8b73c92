"""The memory of WaveCore: which row is written, that the lazy decay is the full one, what a gradient sees, and health over many steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torch_impl.ops import cms

RULES = ("least_salient", "slot0")
SLOTS, WIDTH, KEY = 7, 5, 3


def drawn(steps: int, batch: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
    """value (steps, B, d), key (steps, B, d_k) and gate (steps, B, 1) in (0, 1), about half of them open."""
    rng = np.random.default_rng(seed)
    values, keys = (torch.from_numpy(rng.normal(size=(steps, batch, width))).to(dtype) for width in (WIDTH, KEY))
    return values, keys, torch.from_numpy(rng.uniform(0, 1, (steps, batch, 1))).to(dtype)


def filled(batch: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """A memory (B, n, d) and its keys (B, n, d_k)."""
    rng = np.random.default_rng(seed)
    memory, keys = (torch.from_numpy(rng.normal(size=(batch, SLOTS, width))) for width in (WIDTH, KEY))
    return memory, keys


def lazy(memory: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
    return memory, keys, memory.square().sum(-1), memory.new_ones(())


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("decay", [0.1, 0.01])
@pytest.mark.parametrize("rule", RULES)
def test_lazy_decay_is_the_full_one_over_a_thousand_steps_of_given_rows(rule: str, decay: float) -> None:
    """Also where the lazy memory is saved and loaded in the middle, with a scale that is not 1. The scale is folded 15 times or once."""
    full, held = filled(3), lazy(*filled(3))
    rows = torch.from_numpy(np.random.default_rng(2).integers(0, SLOTS, (1000, 3))) if rule == "least_salient" else torch.zeros(1000, 3).long()
    folds = 0
    for step, (value, key, gate, row) in enumerate(zip(*drawn(1000, 3), rows, strict=True)):
        chosen = (row, gate[:, 0] > 0.3 if rule == "least_salient" else torch.ones(3, dtype=torch.bool))
        full = cms.write(*full, value, key, gate, decay, rule=rule, threshold=0.3, chosen=chosen)
        held = cms.write_lazy(*held, value, key, gate, decay, rule=rule, threshold=0.3, chosen=chosen)
        folds += bool(held[3] == 1)
        assert held[3] >= cms.FOLD
        if step == 500:
            assert held[3] < 1
            held = tuple(torch.from_numpy(np.array(leaf.numpy())) for leaf in held)
        # a product of up to 690 factors 1 - decay, each rounded to 1e-16
        assert max(relative(held[3] * held[0], full[0]), relative(held[3] * held[1], full[1])) < 1e-11
        torch.testing.assert_close(held[2], held[0].square().sum(-1), rtol=1e-12, atol=0)
    assert folds == {0.1: 15, 0.01: 1}[decay]


@pytest.mark.parametrize("batch", [None, 3])
def test_an_empty_memory_fills_in_order_and_then_loses_its_smallest_row(batch: int | None) -> None:
    """On a tie the lowest row; what stands there shrinks before the next choice."""
    at = (lambda x: x[0]) if batch is None else (lambda x: x)
    memory, keys = (torch.zeros(batch or 1, SLOTS, width, dtype=torch.float64) for width in (WIDTH, KEY))
    full, held = (at(memory), at(keys)), lazy(at(memory), at(keys))
    values, new_keys, _ = drawn(SLOTS + 1, batch or 1)
    gate = at(torch.full((batch or 1, 1), 0.9, dtype=torch.float64))
    for step in range(SLOTS + 1):
        norms = full[0].square().sum(-1)
        row = norms.argmin(-1) if step == SLOTS else torch.full(norms.shape[:-1], step)
        old = (full[0] * 0.9).gather(-2, row[..., None, None].expand(*row.shape, 1, WIDTH))[..., 0, :]
        arguments = at(values[step]), at(new_keys[step]), gate, 0.1
        full = cms.write(*full, *arguments, rule="least_salient", threshold=0.5)
        held = cms.write_lazy(*held, *arguments, rule="least_salient", threshold=0.5)
        assert ((full[0] != 0).any(-1).sum(-1) == min(step + 1, SLOTS)).all()
        written = full[0].gather(-2, row[..., None, None].expand(*row.shape, 1, WIDTH))[..., 0, :]
        torch.testing.assert_close(written, 0.9 * at(values[step]) + 0.1 * old, rtol=1e-14, atol=0)
        torch.testing.assert_close(held[3] * held[0], full[0], rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(held[3] * held[1], full[1], rtol=1e-14, atol=1e-15)


def test_slot0_ignores_norms_and_threshold() -> None:
    full = filled(2)
    value, key, gate = (x[0] for x in drawn(1, 2))
    memory, keys = cms.write(*full, value, key, 0.01 * gate, 0.1, rule="slot0", threshold=0.9)
    torch.testing.assert_close(memory[:, 0], 0.01 * gate * value + (1 - 0.01 * gate) * 0.9 * full[0][:, 0], rtol=1e-14, atol=0)
    torch.testing.assert_close(keys[:, 0], 0.01 * gate * key + (1 - 0.01 * gate) * 0.9 * full[1][:, 0], rtol=1e-14, atol=0)
    assert torch.equal(memory[:, 1:], 0.9 * full[0][:, 1:]) and torch.equal(keys[:, 1:], 0.9 * full[1][:, 1:])


def test_a_gate_at_the_threshold_is_closed() -> None:
    value, key, _ = (x[0] for x in drawn(1, 3))
    gate = torch.tensor([[0.5], [np.nextafter(0.5, 1)], [np.nextafter(0.5, 0)]], dtype=torch.float64)
    memory, _ = cms.write(*filled(3), value, key, gate, 0.1, rule="least_salient", threshold=0.5)
    changed = (memory != 0.9 * filled(3)[0]).any(-1)
    assert changed.sum(-1).tolist() == [0, 1, 0]
    assert changed[1].int().argmax() == filled(3)[0][1].square().sum(-1).argmin()


@pytest.mark.parametrize("form", ["full", "lazy"])
def test_gradients_flow_through_gate_new_and_old_and_a_closed_gate_has_none(form: str) -> None:
    """Against the derivative written out: the written row is g v + (1 - g) (1 - decay) M_i, all others (1 - decay) M_j."""
    memory, keys = (x.requires_grad_() for x in filled(2))
    value, key, _ = (x[0].requires_grad_() for x in drawn(1, 2))
    gate = torch.tensor([[0.8], [0.3]], dtype=torch.float64, requires_grad=True)
    rng = np.random.default_rng(3)
    weights = torch.from_numpy(rng.normal(size=(2, SLOTS, WIDTH)))
    options = {"rule": "least_salient", "threshold": 0.5}
    if form == "full":
        after = cms.write(memory, keys, value, key, gate, 0.1, **options)[0]
    else:
        scale = torch.tensor(0.25, dtype=torch.float64)
        norms, scale_given = (memory.detach() / scale).square().sum(-1), scale.clone().requires_grad_()
        held = cms.write_lazy(memory / scale, keys / scale, norms, scale_given, value, key, gate, 0.1, **options)
        after = held[0] * held[3]
        assert not held[2].requires_grad and not held[3].requires_grad
    (after * weights).sum().backward()
    row = int(memory[0].detach().square().sum(-1).argmin())
    assert value.grad[1].abs().sum() == 0 and gate.grad[1] == 0
    torch.testing.assert_close(value.grad[0], 0.8 * weights[0, row], rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(gate.grad[0, 0], ((value[0] - 0.9 * memory[0, row]) * weights[0, row]).sum().detach(), rtol=1e-13, atol=0)
    expected = 0.9 * weights
    expected[0, row] *= 0.2
    torch.testing.assert_close(memory.grad, expected, rtol=1e-14, atol=1e-15)
    assert key.grad is None or key.grad.abs().sum() == 0


def test_a_gradient_goes_through_the_fold() -> None:
    memory, keys = (x.requires_grad_() for x in filled(2))
    value, key, gate = (x[0] for x in drawn(1, 2))
    scale = torch.tensor(1.05 * cms.FOLD, dtype=torch.float64)
    options = {"rule": "slot0", "threshold": 0.5}
    held = cms.write_lazy(memory, keys, memory.detach().square().sum(-1), scale, value, key, gate, 0.1, **options)
    assert held[3] == 1
    (held[0].sum() + held[1].sum()).backward()
    expected = torch.full_like(memory, 0.9 * float(scale))
    expected[:, 0] *= 1 - gate
    torch.testing.assert_close(memory.grad, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(keys.grad, expected[..., :KEY], rtol=1e-14, atol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("part", "bad"), [(0, torch.nan), (1, torch.inf), (2, torch.nan)])
def test_a_row_that_is_not_finite_is_not_written(part: int, bad: float, rule: str) -> None:
    new = [x[0] for x in drawn(1, 3)]
    new[2] = torch.full_like(new[2], 0.9)
    clean = cms.write(*filled(3), *new, 0.1, rule=rule, threshold=0.5)
    new[part] = new[part].clone()
    new[part][1, 0] = bad
    full = cms.write(*filled(3), *new, 0.1, rule=rule, threshold=0.5)
    held = cms.write_lazy(*lazy(*filled(3)), *new, 0.1, rule=rule, threshold=0.5)
    for found, expected, before in zip(full, clean, filled(3), strict=True):
        assert torch.equal(found[[0, 2]], expected[[0, 2]]) and torch.equal(found[1], 0.9 * before[1])
    for found, expected in zip((held[0] * held[3], held[1] * held[3]), full, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    assert all(leaf.isfinite().all() for leaf in held)
    for form, before in ((cms.write, filled(3)), (cms.write_lazy, lazy(*filled(3)))):
        given = [leaf.clone().requires_grad_() for leaf in (*before[:2], *new)]
        memory, keys, *_ = form(*given[:2], *before[2:], *given[2:], 0.1, rule=rule, threshold=0.5)
        (memory.sum() + keys.sum()).backward()
        assert all(leaf.grad.isfinite().all() for leaf in given)
        assert not any(leaf.grad[1].any() for leaf in given[2:])


def test_reading_a_lazy_memory_is_reading_the_plain_one() -> None:
    memory, keys = filled(3)
    query = drawn(1, 3)[1][0]
    attention, content = cms.read(query, memory, keys)
    weights = torch.softmax(torch.einsum("bnk,bk->bn", keys, query) / KEY**0.5, -1)
    torch.testing.assert_close(attention, weights, rtol=1e-14, atol=0)
    torch.testing.assert_close(content, torch.einsum("bn,bnd->bd", weights, memory), rtol=1e-13, atol=1e-15)
    scale = torch.tensor(0.3, dtype=torch.float64)
    for found, expected in zip(cms.read(query, memory / scale, keys / scale, scale), (attention, content), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)


def health(decay: float, steps: int) -> dict[str, Any]:
    """Float32 lazy writes that choose their own rows, and beside them the full rewrite in float64 of the same rows."""
    single = drawn(steps, 1, torch.float32)
    held = lazy(torch.zeros(1, SLOTS, WIDTH), torch.zeros(1, SLOTS, KEY))
    memory, keys = torch.zeros(1, SLOTS, WIDTH, dtype=torch.float64), torch.zeros(1, SLOTS, KEY, dtype=torch.float64)
    worst, sizes = 1.0, []
    with torch.inference_mode():
        for value, key, gate in zip(*single, strict=True):
            norms = memory.square().sum(-1)
            row = held[2].argmin(-1)
            if norms.min() > 0:
                worst = max(worst, float(norms[0, row] / norms.min()))
            chosen = row, gate[:, 0] > 0.5
            held = cms.write_lazy(*held, value, key, gate, decay, rule="least_salient", threshold=0.5)
            memory, keys = cms.write(
                memory, keys, value.double(), key.double(), gate.double(), decay, rule="least_salient", threshold=0.5, chosen=chosen)
            sizes.append(held[3] ** 2 * held[2].sum())
    return {"held": held, "memory": memory, "keys": keys, "worst": worst, "sizes": torch.stack(sizes)}


def test_float32_is_healthy_over_many_steps() -> None:
    """100,000 steps are run in JAX, where they take a second; here enough for 31 folds."""
    found = health(0.1, 2_000)
    memory, keys, norms, scale = found["held"]
    # row by row the float32 memory is a sum of a few roundings of 6e-8, each then shrinking
    assert relative(scale * memory, found["memory"]) < 1e-5 and relative(scale * keys, found["keys"]) < 1e-5
    torch.testing.assert_close(norms, memory.square().sum(-1), rtol=1e-6, atol=0)
    assert found["worst"] < 1 + 1e-5
    halves = found["sizes"].view(2, -1).mean(-1)
    assert 0.8 < halves[1] / halves[0] < 1.25  # a mean over 1,000 steps of a stationary process
