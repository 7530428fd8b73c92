"""From the evidence of one call on both sides to one explanation: repairs are tried, the most particular that explains it all is spoken."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from . import repairs, tree
from .measure import MeasureError, relative_l2
from .symptoms import EPS, EXACT, FITTED, HINT, PART, PLACE, REPAIR, Axes, Finding, explains, size, symptoms

MAX_TRIALS = 800  # of one kind of repair
MAX_SECONDS = 20.0  # of computing, for one kind of repair: a large model is called less often, and on a busy machine no less


@dataclass(frozen=True)
class Diagnosis:
    """What a difference looks like. `family` is empty when no repair of `tried` explains it; `left` is the share that the repair leaves."""

    family: str
    phrase: str
    left: float
    tried: int

    def __str__(self) -> str:
        return f"looks like: {self.phrase}" if self.family else f"none of {self.tried} repairs reproduces it"


@dataclass
class Evidence:
    """The leaves of one call on both sides, and how to call the reference again."""

    expected: dict[str, np.ndarray]
    found: dict[str, np.ndarray]
    leaf: str
    axes: Axes
    dtype: str
    given: dict[str, np.ndarray] = field(default_factory=dict)
    subject: repairs.Subject | None = None

    @property
    def differing(self) -> list[str]:
        """Leaves that differ by more than the last digits of the precision, the checked one first."""
        names = [name for name in self.expected if name in self.found and self.expected[name].shape == self.found[name].shape]
        rounding = max(4096.0 * EPS[self.dtype], 1e-6 * self._apart(self.leaf) if self.leaf in names else 0.0)
        return sorted((name for name in names if name == self.leaf or self._apart(name) > rounding), key=lambda name: name != self.leaf)

    def _apart(self, name: str) -> float:
        try:
            return relative_l2(np.asarray(self.expected[name], np.float64), np.asarray(self.found[name], np.float64))
        except MeasureError:
            return math.inf

    def vector(self, outputs: Mapping[str, np.ndarray], names: list[str]) -> np.ndarray | None:
        """The differing leaves in one array, each divided by its own size; None when one is missing or misshapen."""
        parts = []
        for name in names:
            value = outputs.get(name)
            if value is None or np.shape(value) != self.expected[name].shape:
                return None
            parts.append(np.asarray(value, np.float64).ravel() / (size(np.asarray(self.expected[name], np.float64)) or 1.0))
        return np.concatenate(parts)


def explained(evidence: Evidence, *, rerun: bool = True, norm: Finding | None = None) -> Diagnosis:
    """The most particular explanation of the evidence, from what is cheapest to try to what is dearest."""
    found = [*([] if norm is None else [norm]), *read(evidence)]
    if any(item.rank <= EXACT for item in found) or not rerun or evidence.subject is None:
        return spoken(found, 0)
    total = 0
    for makes, before in (((repairs.weights, repairs.arguments), REPAIR), ((lambda s: repairs.variations(s, "settings"),), FITTED),
                          ((lambda s: repairs.variations(s, "functions"), lambda s: repairs.weights(s, inside=True)), FITTED),
                          ((lambda s: repairs.variations(s, "values"),), PLACE)):
        if before > REPAIR and any(item.rank < before for item in found):
            break
        for make in makes:
            more, count = tried(evidence, make(evidence.subject), sorted_by_rank=makes[0] not in (repairs.weights, repairs.arguments))
            found, total = found + more, total + count
        if any(item.rank <= REPAIR for item in found):
            break
    return spoken(found, total)


def spoken(findings: list[Finding], count: int) -> Diagnosis:
    """The most particular of the findings, after `count` repairs."""
    best = min(findings, key=lambda item: item.rank, default=None)
    return Diagnosis("", "", 1.0, count) if best is None else Diagnosis(best.family, best.phrase, best.left, count)


def read(evidence: Evidence) -> list[Finding]:
    """Symptoms of the checked leaf; those that the other leaves that differ do not show as well count less."""
    names = list(evidence.expected)
    shown = {name: symptoms(evidence.expected[name], evidence.found[name], evidence.axes, given=evidence.given, dtype=evidence.dtype,
                            place=names.index(name)) for name in evidence.differing}
    first, *others = evidence.differing
    families = [{item.family for item in shown[name]} for name in others]
    return [item if all(item.family in family for family in families) else
            replace(item, rank=HINT + item.rank, phrase=f"{item.phrase} (this output; {len(others)} more differ otherwise)") for item in shown[first]]


def tried(evidence: Evidence, trials: Iterator[repairs.Trial], sorted_by_rank: bool = False) -> tuple[list[Finding], int]:
    """Trials that explain every leaf that differs, and how many were made.

    The first particular one that explains it to the last digit ends the search; any does where the particular ones come first.
    """
    names = evidence.differing
    right = [name for name in evidence.expected if name in evidence.found and name not in names
             and evidence.expected[name].shape == evidence.found[name].shape and np.isfinite(evidence.expected[name]).all()]
    wanted, plain = evidence.vector(evidence.found, names), evidence.vector(evidence.expected, names)
    if wanted is None or plain is None or not np.isfinite(wanted).all() or not np.isfinite(plain).all() or np.array_equal(wanted, plain):
        return [], 0
    whole, kept, count = size(wanted - plain), [], 0

    def outputs(value: Any, names: list[str] = names) -> np.ndarray | None:
        made = evidence.vector({name: np.asarray(leaf) for name, leaf in tree.named(value).items()}, names)
        return made if made is not None and np.isfinite(made).all() else None

    def spares(value: Any) -> bool:
        """Whether the outputs that the two sides agree in stay as they are; a repair that runs fewer steps says nothing of them."""
        made, held = {name: np.asarray(leaf) for name, leaf in tree.named(value).items()}, evidence.vector(evidence.expected, right)
        if held is None or any(name in made and made[name].shape != evidence.expected[name].shape for name in right):
            return held is not None
        there = outputs(made, right)
        return there is not None and explains(size(there - held) / whole, whole / math.sqrt(len(names)), evidence.dtype)

    started = time.thread_time()
    for trial in islice(trials, MAX_TRIALS):
        if time.thread_time() - started > MAX_SECONDS:
            break
        count += 1
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                if trial.value is None:
                    computed, phrase = trial.compute(0.0), trial.phrase
                    made = outputs(computed)
                else:
                    ended = repairs.fitted(trial, outputs, wanted)
                    made, phrase = (None, "") if ended is None else (ended[1], trial.phrase.format(value=ended[0]))
                    computed = None if ended is None else trial.compute(ended[0])
        except Exception:  # a change that the module refuses is no explanation
            continue
        if made is None:
            continue
        share = size(wanted - made) / whole
        if explains(share, whole / math.sqrt(len(names)), evidence.dtype) and (not right or spares(computed)):
            kept.append(Finding(trial.family, phrase, share, trial.rank))
            if trial.rank <= (PART if sorted_by_rank else REPAIR) and share < 1e-6:
                break
    return kept, count
