"""Production checklist: what must hold of a language model before anything relies on it. Each item can fail, and says by how much.

    reset         no states are the zero states, reading other text in between changes nothing, and states that are given change what follows
    streaming     any partition of a text with the states handed on gives the logits of the whole
    memory        states after four times the text take as many bytes, and streaming it takes no more of the process
    stable        the same call, many times: standard deviation of every logit
    states        norms after a long stream (`experiments.monitors.health`)
    leaks         resident memory over repeated calls (`experiments.monitors.leak`)
    edges         one token, padding alone, one row of a batch; empty input, ids out of range, states of another shape or not finite are refused
    reproducible  generation with one seed twice gives the same tokens, with other seeds others; the model built again from its arrays is the same

Tolerances are shares of the standard deviation of the logits, for float32 and float64. `Subject` is what an item sees of a model: what
`runtime.build` makes on any backend, the engine without a framework included. Letters: B rows, L tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from conf.schema import MonitorsConfig
from experiments.data.tokens import END, PADDING
from experiments.monitors.health import state_health
from experiments.monitors.leak import check_leak
from experiments.monitors.memory import peak_bytes, reset_peak

LENGTH, LONG, CHUNK = 48, 2048, 256
SAME = {"float32": 1e-3, "float64": 1e-8}  # sums in another order, over some hundred steps of a recurrence
RESET = {"float32": 1e-4, "float64": 1e-9}  # sums of the same shapes, which XLA may still take in another order where a state is not given
STILL = {"float32": 1e-6, "float64": 1e-14}  # the same sums in the same order
GROWTH = 16.0  # megabytes that four times the text may take more, and that repeated calls may keep
LEAK = 2.0
States = Sequence[Mapping[str, Any]]


class Subject(Protocol):
    """A language model of `runtime.build`."""

    config: Any
    dtype: str

    def __call__(self, input_ids: np.ndarray, states: Any = None) -> tuple[np.ndarray, Any]: ...
    def init_states(self, batch_size: int) -> Any: ...
    def generate(self, input_ids: np.ndarray, max_new_tokens: int, temperature: float, top_k: int | None, seed: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Item:
    """One line of the list."""

    name: str
    held: bool
    text: str


@dataclass
class Inspection:
    """A model, text to read (n,), how often a call is repeated, and how to build the model again from what is saved of it."""

    model: Subject
    text: np.ndarray
    repeats: int
    again: Callable[[], Subject]
    monitors: MonitorsConfig

    def read(self, start: int, length: int, rows: int = 1) -> np.ndarray:
        """ids (rows, length) from `start` of the text, which begins anew where it ends."""
        places = start + np.arange(rows)[:, None] * length + np.arange(length)
        return self.text[places % len(self.text)].astype(np.int64)

    def logits(self, ids: np.ndarray, states: Any = None) -> tuple[np.ndarray, Any]:
        """(B, L, V) float64 and the states after them."""
        found, after = self.model(ids, states)
        return np.asarray(found, dtype=np.float64), after

    def apart(self, first: np.ndarray, second: np.ndarray) -> float:
        """Largest difference of two sets of logits as a share of their standard deviation; infinite where one is not finite."""
        if not (np.isfinite(first).all() and np.isfinite(second).all()):
            return math.inf
        return float(np.abs(first - second).max() / max(float(first.std()), 1e-12))


def reset(seen: Inspection) -> Item:
    ids, other, allowed = seen.read(0, LENGTH), seen.read(7 * LENGTH, LENGTH), RESET[seen.model.dtype]
    plain, _ = seen.logits(ids)
    zeros, _ = seen.logits(ids, seen.model.init_states(1))
    _, states = seen.logits(other)
    after, _ = seen.logits(ids)
    carried, _ = seen.logits(ids, states)
    apart = max(seen.apart(plain, zeros), seen.apart(plain, after))
    moved = seen.apart(plain, carried)
    text = f"from no states, zero states and after other text logits differ by {apart:.1e} (allowed {allowed:.0e}); states move them by {moved:.1e}"
    return Item("reset", apart <= allowed < moved, text)


def streaming(seen: Inspection) -> Item:
    ids, allowed, worst = seen.read(3, 4 * LENGTH, 2), SAME[seen.model.dtype], 0.0
    whole, _ = seen.logits(ids)
    for cuts in ([1], [LENGTH, LENGTH + 1, 3 * LENGTH], list(range(7, 4 * LENGTH, 7))):
        parts, states = [], None
        for part in np.split(ids, cuts, axis=1):
            logits, states = seen.logits(np.ascontiguousarray(part), states)
            parts.append(logits)
        worst = max(worst, seen.apart(whole, np.concatenate(parts, axis=1)))
    text = f"three partitions of {4 * LENGTH} tokens differ from the whole by {worst:.1e} (allowed {allowed:.0e})"
    return Item("streaming", worst <= allowed, text)


def memory(seen: Inspection) -> Item:
    sizes, peaks = [], []
    _stream(seen, CHUNK, CHUNK)
    for length in (LONG // 4, LONG):
        reset_peak()
        sizes.append(_bytes(_stream(seen, length, CHUNK)))
        peaks.append(peak_bytes())
    grown = (peaks[1] - peaks[0]) / 2**20
    text = f"states take {sizes[0]:,} bytes after {LONG // 4} tokens and {sizes[1]:,} after {LONG}; the process takes {grown:+.1f} MB more"
    return Item("memory", sizes[0] == sizes[1] and grown <= GROWTH, f"{text} (allowed {GROWTH:g})")


def _stream(seen: Inspection, length: int, chunk: int) -> Any:
    states = None
    for start in range(0, length, chunk):
        _, states = seen.model(seen.read(start, chunk), states)
    return states


def _bytes(states: States) -> int:
    return sum(np.asarray(value).nbytes for state in states for value in state.values())


def stable(seen: Inspection) -> Item:
    ids, allowed = seen.read(11, LENGTH), STILL[seen.model.dtype]
    mean, squares = np.zeros(1), np.zeros(1)
    for number in range(1, seen.repeats + 1):
        logits, _ = seen.logits(ids)
        before = logits - mean
        mean = mean + before / number
        squares = squares + before * (logits - mean)
    spread = float(np.sqrt(squares / (seen.repeats - 1)).max() / max(float(mean.std()), 1e-12))
    held = math.isfinite(spread) and spread <= allowed
    return Item("stable", held, f"{seen.repeats} runs: largest standard deviation of a logit {spread:.1e} of the logits' own (allowed {allowed:.0e})")


def states(seen: Inspection) -> Item:
    after = [{kind: np.asarray(value) for kind, value in state.items()} for state in _stream(seen, LONG, CHUNK)]
    found = [finding.message for finding in state_health(after, seen.monitors) if finding.level != "notice"]
    return Item("states", not found, "; ".join(found[:3]) or f"norms after {LONG} tokens are below {seen.monitors.state_warn:g} and finite")


def leaks(seen: Inspection) -> Item:
    ids = seen.read(0, LENGTH, 4)
    grown = check_leak(lambda: seen.model(ids), max(seen.repeats // 2, 18), LEAK)
    text = f"memory rose by {grown:.1f} MB in a third of the calls" if grown else f"repeated calls keep no more than {LEAK:g} MB"
    return Item("leaks", grown is None, text)


def edges(seen: Inspection) -> Item:
    size, wrong = seen.model.config.vocab_size, []
    for name, ids in (
        ("one token", np.array([[END]])), ("padding alone", np.full((2, LENGTH), PADDING)), ("an odd length", seen.read(0, 2 * CHUNK + 1)),
        ("the lowest and the highest id", np.array([[0, size - 1]])),
    ):
        logits, _ = seen.logits(ids)
        if logits.shape != (*ids.shape, size) or not np.isfinite(logits).all():
            wrong.append(f"{name}: logits {logits.shape}, {'finite' if np.isfinite(logits).all() else 'not finite'}")
    batch = seen.read(5, LENGTH, 3)
    apart = seen.apart(seen.logits(batch)[0][1:2], seen.logits(batch[1:2])[0])
    if not apart <= SAME[seen.model.dtype]:
        wrong.append(f"a row of a batch differs by {apart:.1e} from itself alone")
    _, after = seen.model(seen.read(0, LENGTH, 2), None)
    spoilt = [{kind: np.full_like(np.asarray(value), np.nan) for kind, value in state.items()} for state in after]
    fewer = [{kind: np.asarray(value)[:1] for kind, value in state.items()} for state in after]
    cases: list[tuple[str, np.ndarray, Any]] = [
        ("an empty text", np.zeros((1, 0), dtype=np.int64), None), ("no row", np.zeros((0, 3), dtype=np.int64), None),
        ("an id below 0", np.array([[1, -1]]), None), (f"the id {size} of {size}", np.array([[1, size]]), None),
        ("ids that are no integers", np.array([[0.5]]), None), ("states of fewer rows", seen.read(0, 3, 2), fewer),
        ("states that are NaN", seen.read(0, 3, 2), spoilt), ("states of fewer layers", seen.read(0, 3, 2), list(after)[:-1]),
    ]
    for name, ids, given in cases:
        try:
            seen.model(ids, given)
        except (ValueError, TypeError) as error:
            if not str(error).strip():
                wrong.append(f"{name}: refused without a word")
            continue
        wrong.append(f"{name}: taken")
    return Item("edges", not wrong, "; ".join(wrong) or f"{4 + 1} unusual inputs work, {len(cases)} impossible ones are refused with a ValueError")


def reproducible(seen: Inspection) -> Item:
    prompt = seen.read(0, 9)
    tokens = [np.asarray(seen.model.generate(prompt, 24, 1.0, None, seed)).tolist() for seed in (5, 5, 6, 7)]
    ids, allowed = seen.read(1, LENGTH), SAME[seen.model.dtype]
    apart = seen.apart(seen.logits(ids)[0], np.asarray(seen.again()(ids)[0], dtype=np.float64))
    wrong = [] if tokens[0] == tokens[1] else ["one seed gave two texts"]
    wrong += ["three seeds gave one text"] if tokens[0] == tokens[2] == tokens[3] else []
    wrong += [f"the model built again differs by {apart:.1e} (allowed {allowed:.0e})"] if not apart <= allowed else []
    return Item("reproducible", not wrong, "; ".join(wrong) or f"one seed gives one text; the model built again differs by {apart:.1e}")


ITEMS: dict[str, Callable[[Inspection], Item]] = {
    each.__name__: each for each in (reset, streaming, memory, stable, states, leaks, edges, reproducible)
}


def run(seen: Inspection) -> list[Item]:
    """Every item; one that cannot be tried for an error of the model has failed."""
    found = []
    for name, item in ITEMS.items():
        try:
            found.append(item(seen))
        except Exception as error:  # a model may fail in any way: that is what is asked
            found.append(Item(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))
    return found
