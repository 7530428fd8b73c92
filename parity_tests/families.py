"""Which family of bugs `diagnose` ought to name first for each mutation of our models, by the name of the mutation.

The table was written before anything was measured. A mutation that no single repair of the reference can reproduce (two terms of a rule
exchanged, a loop in another order) stands with the family that a reader would call it, and counts as wrong when `diagnose` does not say it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from parity_tests.harness.mutate import Mutation

# pattern of the mutation's name -> families that are right, any of them
EXPECTED: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"kernel not transposed", ("transposed kernel",)),
    (r"missing bias", ("missing bias",)),
    (r"left at initialisation", ("initialisation",)),
    (r"\(1 \+ w\) for w", ("(1 + w) for w",)),
    (r"two heads swapped", ("permuted heads",)),
    (r"output x ", ("uniform slope",)),
    (r"one channel wrong", ("one channel",)),
    (r"last token wrong", ("last token",)),
    (r"shifted by one", ("shift in time",)),
    (r"averaged over the batch", ("averaged over the batch",)),
    (r"cast to |state in ", ("low precision",)),
    (r"extra stop_gradient|without gradient", ("gradient stopped",)),
    (r"epsilon ", ("epsilon",)),
    (r"one-pass variance", ("one-pass variance",)),
    (r"tanh gelu", ("gelu",)),
    (r"state dropped", ("state dropped",)),
    (r"state stale", ("state stale",)),
    (r"state taken before", ("state early",)),
    (r"tied weights untied", ("untied",)),
    (r"optimiser weight_decay", ("optimiser weight_decay",)),
    (r"optimiser eps", ("optimiser eps",)),
    (r"conv padded on the other side", ("padding side",)),
    # settings of GroundedMamba and of LAM
    (r"key not normalised|gate 0.5 for 0.7|hard clamp for smooth|retrieval heads|spectral bound|gain for bonus", ("setting",)),
    (r"single gelu|the inverse for", ("setting",)),
    # inside the rules of LAM
    (r"beta after chunking", ("missing factor", "order")),
    (r"flux after chunking", ("order",)),
    (r"gates on the state update", ("missing factor", "inverted gate", "order")),
    (r"missing cross update", ("missing term",)),
    (r"missing normalisation", ("missing division", "normalisation missing")),
    # inside WaveCore
    (r"states taken before clipping|clipped before", ("clamp missing", "setting")),
    (r"carry reshaped", ("axis",)),
    (r"dt without its minimum", ("missing term", "setting", "constant")),
    (r"gate inverted", ("inverted gate",)),
    (r"replaced by exp", ("activation",)),
    (r"y of the carry before the step", ("state stale", "state early")),
    (r"decay after the write", ("missing factor", "order")),
    (r"old row not decayed", ("missing factor",)),
    (r"last slot of a tie", ("tie",)),
    (r"slot chosen before the decay", ("missing factor", "order")),
    (r"closed gate writes", ("condition", "setting")),
    (r"wrong axis", ("axis",)),
    (r"scores not divided", ("missing division",)),
    (r"row written without the scale", ("missing division",)),
    (r"norms not folded", ("condition", "missing factor")),
    (r"scale forgotten", ("missing factor",)),
    (r"norm of the row not renewed", ("state stale",)),
)


def expected(name: str) -> tuple[str, ...]:
    """The families that are right for a mutation. Raises KeyError for one that the table does not know."""
    for pattern, families in EXPECTED:
        if re.search(pattern, name):
            return families
    raise KeyError(f"no family is written down for the mutation {name!r}")


def named(found: Iterable[Mutation]) -> tuple[int, list[str]]:
    """How many mutations were given the right family first, and one line for each of the others."""
    right, wrong = 0, []
    for item in found:
        family = item.diagnosis.family if item.diagnosis is not None else ""
        if family in expected(item.name):
            right += 1
        else:
            wrong.append(f"{item.name} [{item.expected}]: {family or 'nothing'} ({item.diagnosis}), expected {' or '.join(expected(item.name))}")
    return right, wrong
