"""The toy case that the harness tests itself on. Frameworks are imported when a model is made."""

from __future__ import annotations

import numpy as np

from parity_tests.harness.bounds import Bound
from parity_tests.harness.case import Case, StateProtocol, Trajectory

VOCAB = 11


def inputs(seed: int, batch: int | None = None, length: int | None = None) -> dict[str, np.ndarray]:
    """ids (B, L), three sequences of six tokens unless said otherwise."""
    return {"ids": np.random.default_rng(seed).integers(0, VOCAB, (batch or 3, length or 6))}


def reference() -> object:
    from parity_tests.harness.tests.toy_torch import Toy

    return Toy()


def candidate() -> object:
    from parity_tests.harness.tests.toy_nnx import Toy

    return Toy()


FAST = ("as is", "carried state", "x 1e-3", "+ 100", "length 2")  # one regime of each kind, for tests of the harness itself

CASE = Case(
    name="toy", reference=reference, candidate=candidate, inputs=inputs,
    ties={"head.weight": "embedding.weight"},
    states=StateProtocol(detached=True, split_length=5),
    trajectory=Trajectory(length=5, steps=10),
    bounds=(
        Bound(1e-12, "two layers of width 15: measured 3e-16 to 3e-15, float64 rounding of such sums", on="forced"),
        Bound(1e-11, "end to end through two layers one digit is lost", on="free"),
        Bound(1e-10, "the acceptance bound for gradients", on="gradients"),
    ),
    regimes=FAST,
    unpaired={"head": "the candidate reuses its embedding for the tied head"},
    sizes={"batch": 3, "length": 6, "vocabulary": VOCAB, "width": 15, "heads x": 5, "state": 7, "hidden": 21},
)
