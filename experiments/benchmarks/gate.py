"""No figure for what is not proved: what has to hold before a model is timed.

The harness compares torch with the NNX port on a tiny configuration; then every contender computes, at the very size that is timed, what the loop
form in float64 computes: its own float64 form to a relative L2 of 1e-10, its float32 form within 16 times the float32 error of torch's loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from parity_tests.harness import Case, run_case

DOUBLE = 1e-10  # rounding of float64 through some hundreds of steps in another order; a wrong term shows at 1e-4 and more
BAND = 16.0  # times the rounding of the loop form in float32: what the harness allows a port
COSINE = 0.9999  # of outputs where weights are stored in bfloat16
TIERS = ("conversion", "forced", "free", "rounding")


class GateError(Exception):
    """A gate is red: there is no figure."""


@dataclass(frozen=True)
class Check:
    """One thing that had to hold: `found` is at most `allowed`."""

    name: str
    found: float
    allowed: float

    @property
    def held(self) -> bool:
        return bool(self.found <= self.allowed)  # NaN is not


def battery(case: Case) -> Check:
    """The harness's verdict on a parity case, layer by layer and end to end in both precisions: how many of its checks did not hold."""
    result = run_case(replace(case, regimes=("as is",), dtypes=("float64", "float32")), tiers=TIERS)
    failed = sum(not check.held for check in result.checks) if result.checks else 1
    return Check(f"parity of {case.name}, failures in {len(result.checks)} checks", failed, 0)


def agreement(truth: np.ndarray, float64: Mapping[str, np.ndarray], float32: Mapping[str, np.ndarray], loop: str) -> list[Check]:
    """Outputs of every contender in both precisions against the loop form's in float64; `loop` names the loop form in `float32`."""
    scale = distance(truth, float32[loop])
    return [Check(f"{name} in float64", distance(truth, value), DOUBLE) for name, value in float64.items()] + [
        Check(f"{name} in float32", distance(truth, value), BAND * scale) for name, value in float32.items()]


def alike(name: str, truth: np.ndarray, found: np.ndarray) -> Check:
    """Rows whose weights are bfloat16: one minus the smallest cosine."""
    a, b = (np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in (truth, found))
    cosine = (a * b).sum(-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-300)
    return Check(f"{name}, 1 - cosine", float(1 - cosine.min()), 1 - COSINE)


def distance(truth: np.ndarray, found: np.ndarray) -> float:
    """Relative L2."""
    a, b = np.asarray(truth, np.float64), np.asarray(found, np.float64)
    if a.shape != b.shape:
        raise GateError(f"shapes differ: {a.shape} expected, {b.shape} found")
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


def demand(model: str, checks: Iterable[Check]) -> None:
    """Raise GateError, naming what failed, unless everything held."""
    red = [f"{check.name}: {check.found:.3g} where {check.allowed:.3g} is allowed" for check in checks if not check.held]
    if red:
        raise GateError(f"the gate of {model} is red, so that nothing is timed: " + "; ".join(red))
