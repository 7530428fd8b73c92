"""Which family of bugs `diagnose` ought to name first for each mutation of our models, by the name of the mutation.

The table was written before anything was measured. A mutation that no single repair of the reference can reproduce (two terms of a rule
exchanged, a loop in another order) stands with the family that a reader would call it, and counts as wrong when `diagnose` does not say it.
Without a family stand those of which the failed check itself says what is wrong.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from parity_tests.harness.mutate import Injector, Mutation

# pattern of the mutation's name -> families that are right, any of them
EXPECTED: tuple[tuple[str, tuple[str, ...]], ...] = (
    # injectors for any candidate whose names hold a word of a pattern below
    (r"epsilon outside the root", ("epsilon", "order")),
    (r"embedding scale in ", ("uniform slope", "low precision")),
    (r"embedding x sqrt", ("uniform slope",)),
    (r"optimiser decay before the moments", ("optimiser weight_decay",)),
    (r"optimiser clip", ("optimiser clip",)),
    (r"optimiser betas|without bias correction", ("optimiser betas",)),
    (r"optimiser lr", ("optimiser lr",)),
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
    (r"convolution flipped", ("flipped convolution",)),
    (r"convolution shifted", ("shift in time",)),
    (r"cache off by one", ("shift in time",)),
    (r"index clamped", ("index clamped", "clamp missing")),
    (r"two weights exchanged", ("swapped leaves",)),
    (r"loaded twice", ("loaded twice", "swapped leaves")),
    (r"one weight row wrong", ("one weight row", "one row")),
    (r"one head wrong", ("one head",)),
    (r"one row wrong", ("one row",)),
    (r"matmul in TF32", ("low precision",)),
    (r"ddof 1", ("ddof",)),
    (r"dropout .* left on", ("dropout",)),
    (r"NaN replaced by 0", ("NaN replaced",)),
    (r"written in place", ()),
    (r"token dropped from a ragged chunk", ("last token", "last chunk")),
    (r"bias outside the gate", ("order", "missing bias")),
    (r"missing stop_gradient", ("gradient let through",)),
    # settings of GroundedMamba and of LAM
    (r"key not normalised|gate 0.5 for 0.7|hard clamp for smooth|retrieval heads|spectral bound|gain for bonus", ("setting",)),
    (r"single gelu|the inverse for", ("setting",)),
    # inside GroundedMamba
    (r"spectral bound (missing|by)", ("setting", "missing factor", "clamp missing")),
    (r"transition not transposed", ("transposed kernel",)),
    (r"skip missing", ("missing term", "leaf unused")),
    (r"the two step sizes exchanged", ("permuted channels", "split order")),
    (r"decay as sigmoid", ("decay", "activation")),
    (r"input of the state without its step size", ("missing factor",)),
    (r"norm on the old state", ("order",)),
    (r"transition after the write", ("order",)),
    (r"identity missing", ("missing term",)),
    (r"output of the state before its update", ("state early", "state stale", "shift in time")),
    (r"last state returned before its norm", ("normalisation missing", "state early")),
    (r"gate on the state instead", ("missing factor", "order")),
    (r"bonus missing", ("missing term", "leaf unused")),
    (r"state read after its update", ("order", "shift in time")),
    (r"decay before the read", ("extra factor", "order")),
    (r"(state read along|bank over) the wrong axis", ("axis", "transposed kernel")),
    (r"key and value exchanged", ("swapped leaves", "transposed")),
    (r"ragged chunk (decays|starts)", ("last chunk", "last token", "order")),
    (r"without its de-biasing", ("missing division",)),
    (r"empty slots attended", ("condition",)),
    (r"bank added before the norm", ("order",)),
    (r"rows of the bank taken from", ("setting", "missing term")),
    (r"one norm for both|bank read by the key", ("swapped leaves", "loaded twice")),
    (r"norm behind the residual|each branch normalised", ("order",)),
    (r"residual missing", ("missing term",)),
    (r"first state carried", ("state early", "state stale")),
    (r"states of the blocks exchanged", ("swapped arguments", "order")),
    (r"states of another row", ("permuted rows",)),
    (r"tanh for the sigmoid", ("activation",)),
    (r"key normalised by the decay", ("inverted gate",)),
    (r"heads joined in the other order", ("axis",)),
    (r"decay of the next head", ("permuted heads",)),
    (r"bank written every", ("setting",)),
    (r"nearest slot by", ("missing division", "normalisation missing")),
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
    (r"scores not causal|N with its diagonal|not masked", ("mask missing", "mask off by one")),
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
    (r"outer product the other way", ("transposed kernel", "axis")),
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
    (r"y averaged over the state", ("reduction",)),
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
    """The families that are right for a mutation, none where there is nothing to name. Raises KeyError for one that the table does not know."""
    for pattern, families in EXPECTED:
        if re.search(pattern, name):
            return families
    raise KeyError(f"no family is written down for the mutation {name!r}")


def known(*injectors: Injector) -> tuple[Injector, ...]:
    """The same injectors with the families that are right for them."""
    return tuple(dataclasses.replace(injector, families=expected(injector.name)) for injector in injectors)


def named(found: Iterable[Mutation]) -> tuple[int, list[str]]:
    """How many mutations were given the right family first, and one line for each of the others; those with nothing to name are left out."""
    right, wrong = 0, []
    for item in found:
        family = item.diagnosis.family if item.diagnosis is not None else ""
        if family in expected(item.name):
            right += 1
        elif expected(item.name):
            wrong.append(f"{item.name} [{item.expected}]: {family or 'nothing'} ({item.diagnosis}), expected {' or '.join(expected(item.name))}")
    return right, wrong
