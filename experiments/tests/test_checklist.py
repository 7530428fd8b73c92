"""The production checklist: a trained model passes on the engine and on torch; models broken on purpose fail one item each, and no other."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import runtime
from conf.schema import MonitorsConfig
from experiments.steps import make
from experiments.tasks import checklist
from experiments.tests import tiny
from experiments.tests.faults import advance

TEXT = np.random.default_rng(9).integers(97, 123, size=3001)


@pytest.fixture(scope="module")
def trained() -> tuple[Any, dict[str, np.ndarray]]:
    """Configuration and arrays of a model of one block after twenty steps."""
    settings = tiny.config("torch_compiled", "float32")
    settings = replace(settings, model=replace(settings.model, depth=1))
    step = make(runtime.build("grounded_mamba", settings.model, "torch_compiled"), settings)
    advance(step, 1, 20)
    return settings.model, step.arrays()


def inspect(build: Callable[[], Any], repeats: int = 12) -> dict[str, checklist.Item]:
    found = checklist.run(checklist.Inspection(build(), TEXT, repeats, build, MonitorsConfig()))
    return {item.name: item for item in found}


class Wrapped:
    """A model that does as the one inside; what is broken is a subclass."""

    def __init__(self, inside: Any) -> None:
        self.inside, self.config, self.dtype = inside, inside.config, inside.dtype
        self.init_states = inside.init_states

    def __call__(self, ids: np.ndarray, states: Any = None) -> tuple[np.ndarray, Any]:
        return self.inside(ids, states)

    def generate(self, *arguments: Any) -> np.ndarray:
        return self.inside.generate(*arguments)


class NeverFresh(Wrapped):
    """What begins without states does not begin at zero."""

    def __call__(self, ids: np.ndarray, states: Any = None) -> tuple[np.ndarray, Any]:
        if states is None and np.ndim(ids) == 2 and len(ids):
            states = [
                {kind: np.broadcast_to(np.linspace(-1, 1, value.shape[-1], dtype=np.float32), value.shape).copy() for kind, value in state.items()}
                for state in self.init_states(len(ids))
            ]
        return self.inside(ids, states)


class Forgetful(Wrapped):
    """States are not taken at all."""

    def __call__(self, ids: np.ndarray, states: Any = None) -> tuple[np.ndarray, Any]:
        logits, after = self.inside(ids, states)
        return (logits if states is None else self.inside(ids, None)[0]), after


class LosesAtSingleTokens(Wrapped):
    """A call with one token forgets the WKV memory."""

    def __call__(self, ids: np.ndarray, states: Any = None) -> tuple[np.ndarray, Any]:
        if states is not None and ids.shape[1] == 1:
            states = [{kind: np.zeros_like(value) if kind == "wkv" else value for kind, value in state.items()} for state in states]
        return self.inside(ids, states)


class KeepsTheText(Wrapped):
    """States grow with every token."""

    def __call__(self, ids: np.ndarray, states: Any = None) -> tuple[np.ndarray, Any]:
        own = None if states is None else [{kind: value for kind, value in state.items() if kind != "read"} for state in states]
        logits, after = self.inside(ids, own)
        before = states[0]["read"].shape[1] if states is not None and "read" in states[0] else 0
        return logits, [{**state, "read": np.zeros((len(ids), before + ids.shape[1]), np.float32)} for state in after]


class Noisy(Wrapped):
    """As with dropout left on, but little of it."""

    rng = np.random.default_rng(0)

    def __call__(self, ids: np.ndarray, states: Any = None) -> tuple[np.ndarray, Any]:
        logits, after = self.inside(ids, states)
        return logits + (4e-6 * logits.std() * self.rng.standard_normal(logits.shape)).astype(logits.dtype), after


class Leaking(Wrapped):
    """Every call keeps a megabyte, of the system itself: an allocator may have many from before, and then the process does not grow."""

    def __init__(self, inside: Any) -> None:
        super().__init__(inside)
        self.held: list[mmap.mmap] = []

    def __call__(self, ids: np.ndarray, states: Any = None) -> tuple[np.ndarray, Any]:
        self.held.append(mmap.mmap(-1, 2**20))
        self.held[-1].write(b"1" * 2**20)
        return self.inside(ids, states)


class Clips(Wrapped):
    """Ids that are not there are taken for others."""

    def __call__(self, ids: np.ndarray, states: Any = None) -> tuple[np.ndarray, Any]:
        return self.inside(np.clip(ids, 0, self.config.vocab_size - 1), states)


class IgnoresTheSeed(Wrapped):
    calls = 0

    def generate(self, ids: np.ndarray, count: int, temperature: float, top_k: int | None, seed: int) -> np.ndarray:
        IgnoresTheSeed.calls += 1
        return self.inside.generate(ids, count, temperature, top_k, IgnoresTheSeed.calls)


BROKEN = {
    "never fresh": (NeverFresh, "reset"), "loses at single tokens": (LosesAtSingleTokens, "streaming"), "keeps the text": (KeepsTheText, "memory"),
    "noisy": (Noisy, "stable"), "leaking": (Leaking, "leaks"), "clips": (Clips, "edges"), "ignores the seed": (IgnoresTheSeed, "reproducible"),
}


@pytest.mark.parametrize("backend", ["cython", "torch_compiled"])
def test_a_trained_model_passes(backend: str, trained: tuple[Any, dict[str, np.ndarray]]) -> None:
    found = inspect(lambda: runtime.build("grounded_mamba", trained[0], backend, arrays=trained[1]), 100 if backend == "cython" else 12)
    assert list(found) == list(checklist.ITEMS) and all(item.held for item in found.values()), found
    assert "100 runs" in found["stable"].text or backend != "cython"


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_model_fails_its_item_and_no_other(case: str, trained: tuple[Any, dict[str, np.ndarray]]) -> None:
    kind, item = BROKEN[case]
    found = inspect(lambda: kind(runtime.build("grounded_mamba", trained[0], "cython", arrays=trained[1])))
    assert [name for name, each in found.items() if not each.held] == [item], found


def test_states_that_grow_without_bound_fail_their_item(trained: tuple[Any, dict[str, np.ndarray]]) -> None:
    """A decay just above one, nothing normalised: 2,048 tokens on the memory is beyond its bound, while logits are still finite."""
    model = replace(trained[0], decay="direct", normalised_key=False, readout_norm=False)
    arrays = {name: value for name, value in trained[1].items() if "readout_norm" not in name}
    arrays |= {name: np.full_like(value, 1.005) for name, value in arrays.items() if name.endswith("time_decay")}
    found = inspect(lambda: runtime.build("grounded_mamba", model, "cython", arrays=arrays))
    assert [name for name, each in found.items() if not each.held] == ["states"], found
    assert "is above 100" in found["states"].text


def test_states_without_effect_and_errors_fail(trained: tuple[Any, dict[str, np.ndarray]]) -> None:
    found = inspect(lambda: Forgetful(runtime.build("grounded_mamba", trained[0], "cython", arrays=trained[1])))
    assert [name for name, each in found.items() if not each.held] == ["reset", "streaming"]

    class Broken(Wrapped):
        def __call__(self, ids: np.ndarray, states: Any = None) -> tuple[np.ndarray, Any]:
            raise MemoryError("no room")

    found = inspect(lambda: Broken(runtime.build("grounded_mamba", trained[0], "cython", arrays=trained[1])))
    assert not any(item.held for item in found.values()) and "MemoryError: no room" in found["stable"].text
