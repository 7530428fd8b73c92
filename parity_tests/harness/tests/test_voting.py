"""Of three or more implementations the odd one out is named, whichever it is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from parity_tests.harness.adapters.callable_adapter import Engine
from parity_tests.harness.battery import Result, run_case
from parity_tests.harness.case import Case, CaseError
from parity_tests.harness.voting import spoken, tally


def engine(bug: float = 0.0, dtype: str | None = None, order: int = 1, names: tuple[str, ...] = ("w",)) -> Callable[[], Engine]:
    """tanh(x W + bug), and which channel is the largest; the sum is made in another order for -1."""
    def build(arrays: dict) -> Callable:
        def function(x: np.ndarray) -> dict[str, np.ndarray]:
            if bug == np.inf:
                raise FloatingPointError("out of range")
            kind = dtype or x.dtype
            y = np.tanh(x.astype(kind)[..., ::order] @ arrays["w"].astype(kind)[::order] + np.asarray(bug, kind))
            return {"y": y, "largest": y.argmax(-1)}

        return function

    return lambda: Engine(build, {name: np.ones((5, 3)) for name in names})


GOOD, OTHER = engine(), engine(order=-1)


def vote(reference: Callable = GOOD, candidate: Callable = OTHER, **also: object) -> Result:
    def inputs(seed: int) -> dict[str, np.ndarray]:
        return {"x": np.random.default_rng(seed).normal(size=(2, 7, 5))}

    return run_case(Case("vote", reference, candidate, inputs, also=also, regimes=("as is",), trajectory=None), tiers=["free", "voting"])


def test_implementations_that_agree_hold() -> None:
    result = vote(numpy=engine(), float32=engine(dtype="float32"))
    assert result.held and result.tiers[1].checks[0].detail.startswith("4 implementations agree to")


@pytest.mark.parametrize(("changes", "words"), [
    ({"numpy": engine(1e-6)}, "the odd one out of 3 is numpy: the reference (callable) and the candidate (callable) agree to"),
    ({"candidate": engine(1e-6), "numpy": engine()}, "the odd one out of 3 is the candidate (callable)"),
    ({"reference": engine(1e-6), "numpy": engine()}, "the odd one out of 3 is the reference (callable)"),
    ({"numpy": engine(), "other": engine(1e-3, dtype="float32")}, "the odd one out of 4 is other"),
    ({"numpy": engine(1e-6), "other": engine(1e-6)}, "4 implementations are split"),
    ({"candidate": engine(1e-6), "numpy": engine(2e-6)}, "no two of 3 implementations agree"),
    ({"numpy": engine(np.inf)}, "numpy raised FloatingPointError: out of range"),
    ({"numpy": lambda: Engine(lambda arrays: lambda x: x)}, "cannot have the reference's weights"),
])
def test_the_odd_one_out_is_named(changes: dict, words: str) -> None:
    if "cannot" in words:
        with pytest.raises(CaseError, match=words):
            vote(**changes)
        return
    result = vote(**changes)
    assert not result.held and words in result.tiers[1].checks[0].detail
    if "candidate" in changes and "odd" in words:
        assert f"; {words} [" in result.sentence  # the free tier speaks first, and says whose fault it is


def test_a_vote_needs_a_majority() -> None:
    x = {"": np.linspace(0.1, 1.0, 7)}
    odd = {"": x[""] + 1e-3}
    assert tally({"a": x, "b": x, "c": odd}, 1e-9).majority == ("a", "b")
    assert tally({"a": x, "b": odd}, 1e-9).majority == () and tally({"a": x, "b": x, "c": odd, "d": odd}, 1e-9).majority == ()
    assert tally({"a": x, "b": x, "c": {"": x[""][:3]}}, 1e-9).apart["a", "c"] == np.inf
    assert "the odd ones out of 5 are d and e" in spoken(tally({"a": x, "b": x, "c": x, "d": odd, "e": {}}, 1e-9))


@pytest.mark.parametrize("entry", [3, (engine(), 3), (engine(),)])
def test_a_further_implementation_that_is_none_is_refused(entry: object) -> None:
    with pytest.raises(CaseError, match="must be a factory or a pair"):
        vote(numpy=entry)
