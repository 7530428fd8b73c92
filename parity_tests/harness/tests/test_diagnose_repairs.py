"""Repairs that run the reference again: another axis or reduction, a missing mask, another value read, an index, a scale, a neighbour's weight."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from parity_tests.harness.adapters.callable_adapter import Engine
from parity_tests.harness.battery import Result, run_case
from parity_tests.harness.case import Case
from parity_tests.harness.compare import RULES, Check
from parity_tests.harness.locate import place, sentence

torch = pytest.importorskip("torch")

ROWS, WIDTH, LENGTH = 11, 5, 7


class Memory(torch.nn.Module):
    """Masked scores between embedded tokens, a decayed memory that one row is written to, and three parts joined."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.shares = torch.nn.Embedding(ROWS, WIDTH), (0.3, 0.7)
        self.one, self.two = (torch.nn.Parameter(torch.zeros(WIDTH, WIDTH)) for _ in range(2))
        self.decay = torch.nn.Parameter(torch.ones(WIDTH))

    def forward(self, ids: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.table(ids)  # (B, L, P)
        scores = ((x @ self.one) @ (x @ self.two).mT).tril()
        x = scores @ x / (x * x).sum(-1, keepdim=True).sqrt()
        kept = self.decay * memory  # (B, S, P)
        mixed = self.shares[0] * kept + self.shares[1] * x.mean(1, keepdim=True)
        row = torch.nn.functional.one_hot(kept.square().sum(-1).argmin(-1), memory.shape[1])[..., None]
        written = torch.where(row > 0, mixed, kept)
        return torch.cat([x, -x * x, x.amax(1, keepdim=True) - x], -1), written


def twin(bug: str) -> Callable[[], Engine]:
    """`Memory` in NumPy, with a bug."""
    def build(arrays: dict) -> Callable:
        def function(ids: np.ndarray, memory: np.ndarray) -> tuple[np.ndarray, ...]:
            table, one, two = (arrays[name] for name in ("table.weight", "one", "two"))
            x = table[np.minimum(ids, 8) if bug == "clamped" else ids - 1 if bug == "row" else ids]
            one, two = (two, one) if bug == "exchanged" else (one, two)
            scores = (x @ one) @ (x @ two).swapaxes(-1, -2)
            x = (scores if bug == "unmasked" else np.tril(scores)) @ x / np.sqrt(
                (x * x).sum(-2 if bug == "axis" else -1, keepdims=True) + (3e-6 if bug == "root" else 0.0))
            memory = 1.7 * memory if bug == "scaled" else memory
            kept = arrays["decay"] * memory
            old, new = (0.7, 0.3) if bug == "shares" else (0.3, 0.7)
            average = x.max(1, keepdims=True) if bug == "largest" else x.mean(1, keepdims=True)
            mixed = old * (memory if bug == "stale" else kept) + new * average
            norms = np.square(kept).sum(-1)
            row = np.arange(memory.shape[1]) == (norms.argmax(-1) if bug == "extreme" else norms.argmin(-1))[:, None]
            parts = [x, x * x if bug == "minus" else -x * x, x.max(1, keepdims=True) - x]
            parts = [parts[0], parts[2], parts[1]] if bug == "joined" else parts
            return np.concatenate(parts, -1), np.where(row[..., None], mixed, kept)

        return function

    shapes = {"table.weight": (ROWS, WIDTH), "one": (WIDTH, WIDTH), "two": (WIDTH, WIDTH), "decay": (WIDTH,)}
    return lambda: Engine(build, {name: np.zeros(shape) for name, shape in shapes.items()})


def outcome(bug: str) -> Result:
    def inputs(seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return {"ids": rng.integers(0, ROWS, (3, LENGTH)), "memory": rng.normal(size=(3, 13, WIDTH))}

    sizes = {"batch": 3, "length": LENGTH, "slots": 13, "width": WIDTH, "rows": ROWS}
    return run_case(Case("memory", Memory, twin(bug), inputs, regimes=("as is",), dtypes=("float64",), sizes=sizes, trajectory=None), tiers=["free"])


@pytest.mark.parametrize(("bug", "family", "words"), [
    ("clamped", "index clamped", "argument 0, an index, clamped at 8"), ("row", "shift in time", "rows of table.weight shifted by one"),
    ("exchanged", "swapped leaves", "one and two exchanged"), ("unmasked", "mask missing", "a missing tril in forward"),
    ("axis", "axis", "sum over axis 1 for axis 2"), ("root", "epsilon", "3e-06 added inside the root"),
    ("scaled", "scaled argument", "argument 1 times 1.7"), ("shares", "setting", "shares (0.7, 0.3) for (0.3, 0.7)"),
    ("largest", "reduction", "amax for mean"), ("stale", "missing factor", "mul reads the value from before mul in forward"),
    ("extreme", "extreme", "argmax for argmin"), ("minus", "sign", "a missing minus"), ("joined", "split order", "parts 1 and 2 of cat exchanged"),
])
def test_a_bug_in_the_middle_of_a_function_is_named(bug: str, family: str, words: str) -> None:
    result = outcome(bug)
    assert result.diagnosis is not None and result.diagnosis.family == family and words in result.diagnosis.phrase, result.sentence


def test_a_healthy_memory_is_not_diagnosed() -> None:
    assert outcome("none").held


def check(tier: str, where: str, held: bool) -> Check:
    value, allowed = (1e-3, 1e-9) if not held else (0.0, 1e-9)
    return Check(tier, 2, where, "0", "as is", "float64", held, value, allowed, RULES[2])


def test_what_a_module_is_handed_is_the_fault_of_the_model() -> None:
    alone = [check("forced", "norm", True), check("forced", "down", True)]
    handed = [*alone, check("free", "norm", False), check("free", "", False)]
    assert place(handed) == "" and "parts at norm" in sentence(handed, {"norm": 0.1})
    assert "is right by itself: what the model hands it is wrong" in sentence(handed, {"norm": 0.1})
    assert place([check("forced", "down", False), *handed]) == "down"  # what is wrong by itself comes first
    assert place(handed[2:]) == "norm"  # a module that was not compared by itself
    assert place([*alone, check("free", "", False)]) == "" and place(alone) == ""
