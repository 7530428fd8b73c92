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
    # inside the rules, layers and blocks of LAM
    (r"beta doubled|queries scaled by", ("uniform slope", "scaled argument")),
    (r"share 0.10 for 0.05|0.2 for 0.3 in alpha", ("constant",)),
    (r"queries not normalised|states read as they are|embedding not normalised", ("normalisation missing", "missing division")),
    (r"psi and 1 - psi exchanged", ("inverted gate",)),
    (r"silu gate for sigmoid|silu missing behind|gelu for silu|gelu for relu", ("activation",)),
    (r"norm of the state over its rows|norm over all heads|heads split in the other order", ("axis",)),
    (r"scores times temp|scores summed over the chunk", ("missing division",)),
    (r"padding counted|mask ignored", ("condition",)),
    (r"padding not zeroed", ("missing factor", "condition")),
    (r"N with the other sign", ("sign",)),
    (r"N N for N N\^T", ("transposed kernel",)),
    (r"missing second order|residual of the feed-forward|missing skip", ("missing term", "leaf unused")),
    (r"scores not causal|N with its diagonal", ("mask missing", "mask off by one")),
    (r"flux not clamped|w not clipped", ("clamp missing", "setting")),
    (r"l2norm eps", ("epsilon",)),
    (r"chunks of 7 for 6", ("setting",)),
    (r"chunks counted from the end", ("order", "first steps")),
    (r"last ragged chunk", ("last chunk", "condition")),
    (r"fast and slow decays exchanged", ("swapped arguments",)),
    (r"gate before the norm|norm before the residual|slow learns from the new|read before the write", ("order", "stale value", "state early")),
    (r"two weights exchanged|loaded twice", ("swapped leaves", "loaded twice")),
    (r"convolution flipped", ("flipped convolution",)),
    (r"convolution shifted|positions from one|cache off by one", ("shift in time",)),
    (r"index clamped|positions clamped", ("index clamped",)),
    (r"first token for the mean|largest value for the mean", ("reduction",)),
    (r"stretched over the padded length", ("condition",)),
    (r"position rounded down", ("missing term",)),
    (r"beta on the write only", ("missing factor",)),
    (r"variance with ddof", ("ddof",)),
    # inside WaveCore
    (r"p before its step|from s before the step|reads s before the step", ("stale value", "state stale", "state early")),
    (r"g for 1 - g", ("inverted gate",)),
    (r"input not times dt|wave state and output added|keys not decayed|keys not folded|diagonal without its", ("missing factor",)),
    (r"dt without its scale", ("missing factor", "setting")),
    (r"silu gate in the wave|mixing by a sigmoid|modulation without its tanh", ("activation",)),
    (r"tanh of a discrete", ("setting", "activation")),
    (r"slot of the largest norm", ("extreme",)),
    (r"slot 0 for the least|threshold 0.4|decays of the levels in the other|limit 10 for none", ("setting",)),
    (r"before s in the query|before the action|before context in B_net", ("split order",)),
    (r"in TF32", ("low precision",)),
    (r"row that is not finite", ("NaN made", "condition")),
    (r"U V exchanged", ("swapped leaves",)),
    (r"optimiser decay before the moments", ("optimiser weight_decay",)),
    (r"s without its past", ("missing term",)),
    (r"row overwritten", ("missing factor", "condition", "order")),
    (r"levels averaged for mixed", ("averaged over the levels", "averaged over channel")),
    (r"relu before the norm", ("order",)),
    (r"columns modulated for rows", ("axis", "order")),
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
    (r"error along the wrong axis", ("transposed kernel", "axis")),
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
