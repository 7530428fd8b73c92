"""Porting bugs for LAM, and for the causal DeltaNet what LAM does not have: states, caches, a tied head, an optimiser.

INJECTORS run with the tests, but for the dearest, which `test_mutations_lam` exchanges; RUNS with `--all-mutations`. UNSEEN_RUNS were
written before the harness was shown any of them and are reported apart. `mutants_lam` has the bugs inside the models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from parity_tests import mutants_lam as mutants
from parity_tests.harness import Case
from parity_tests.harness.adapters import nnx_injectors as bugs
from parity_tests.harness.adapters import nnx_injectors_more as more
from parity_tests.harness.adapters.nnx_trace import Patch
from parity_tests.harness.mutate import Injector
from parity_tests.specs import LAM, deltanet_lm, encoder, sentences

STRETCHED = 26  # tokens, three more than there are positions; the other sentences of the batch have 18 and 9


# test_delta_rule has the other regimes and precisions, which none of the bugs below needs
CASE = dataclasses.replace(encoder("lam", regimes=("as is",)), dtypes=("float64",), trajectory=None)
LONG = dataclasses.replace(CASE, name="lam_stretched", inputs=sentences(LAM, length=STRETCHED), sizes={**CASE.sizes, "length": STRETCHED})
CAUSAL = deltanet_lm("deltanet_lm", regimes=("as is", "carried state"))
CAUSAL = dataclasses.replace(CAUSAL, dtypes=("float64",), trajectory=dataclasses.replace(CAUSAL.trajectory, steps=8))


def inside(bug: str, path: str, mutant: Callable[[str | None], Callable], method: str = "__call__") -> Injector:
    return Injector(bug, path, patches=(Patch(path, mutant(bug), method=method),))


def rule(bug: str, number: int, mutant: Callable[[str | None], Callable] = mutants.parts) -> Injector:
    return inside(bug, f"blocks.{number}.delta.rule", mutant)


def field(name: str, path: str, leaf: str, value: Any) -> Injector:
    """A module that was ported with another value of one attribute."""
    return Injector(name, path, patches=(Patch(path, prepare=lambda module: setattr(module, leaf, value)),))


INJECTORS = (
    rule("beta after chunking", 0, mutants.whole),
    rule("gates on the state update", 1, mutants.whole),
    rule("missing cross update", 1),
    rule("psi averaged over the batch", 1),
    field("single gelu", "blocks.1", "repeats", 1),
    bugs.tanh_gelu("blocks.0"),
    Injector("conv padded on the other side", "blocks.0.delta.k_conv1d", patches=(Patch("blocks.0.delta.k_conv1d", mutants.same_other_side),)),
    bugs.transposed("blocks.1.delta.q_proj"),
    bugs.epsilon("blocks.0.norm_delta", value=1e-6),
    bugs.left_at_initialisation("blocks.1.delta.slow_decay_bias", where="blocks.1.delta"),
    bugs.swapped_heads("blocks.0.delta.rule.W_bilinear", heads=LAM.heads),
    bugs.averaged_over_batch("blocks.1.delta.o_norm"),
)
MORE = (
    rule("flux after chunking", 0, mutants.whole),
    rule("share 0.10 for 0.05 in the slow decay", 1, mutants.whole),
    rule("decay after the write, in a chunk", 0, mutants.whole),
    rule("queries not normalised", 1, mutants.whole),
    rule("missing normalisation", 0),
    rule("psi and 1 - psi exchanged", 0),
    rule("norm of the state over its rows", 1),
    rule("states read as they are", 0),
    rule("scores times temp", 1),
    rule("padding counted in the means", 0),
    rule("N with the other sign", 1),
    rule("N N for N N^T", 0),
    rule("missing second order", 1),
    rule("scores not causal", 0),
    rule("gelu for silu in the flux", 1),
    rule("0.2 for 0.3 in alpha", 0),
    rule("flux not clamped", 0),
    rule("l2norm eps 1e-6 in the root", 1),
    rule("chunks counted from the end", 0),
    rule("fast and slow decays exchanged", 1, mutants.given),
    rule("mask ignored by the rule", 0, mutants.given),
    rule("beta doubled", 1, mutants.given),
    field("the inverse for N N^T", "blocks.0.delta.rule", "transform", "exact"),
    field("chunks of 7 for 6", "blocks.1.delta.rule", "chunk_size", 7),
    inside("output gate inverted", "blocks.0.delta.o_norm", mutants.output_norm),
    inside("norm over all heads", "blocks.1.delta.o_norm", mutants.output_norm),
    inside("gate before the norm", "blocks.1.delta.o_norm", mutants.output_norm),
    field("RMSNorm epsilon 1e-05", "blocks.0.delta.o_norm", "eps", 1e-5),
    inside("heads split in the other order", "blocks.1.delta", mutants.heads, "_heads"),
    inside("silu missing behind the convolutions", "blocks.0.delta", mutants.layer),
    more.exchanged("blocks.0.delta.q_proj.kernel", "blocks.0.delta.k_proj.kernel"),
    more.flipped_taps("blocks.0.delta.q_conv1d"),
    more.shifted_taps("blocks.1.delta.v_conv1d"),
    bugs.missing_bias("blocks.0.delta.v_conv1d"),
    more.loaded_twice("blocks.1.delta.v_proj.kernel", "blocks.1.delta.k_proj.kernel"),
    inside("padding not zeroed after the block", "blocks.1", mutants.block),
    inside("residual of the feed-forward missing", "blocks.0", mutants.block),
    more.clamped_index("word_embeddings", LAM.vocab_size - 4),
    inside("positions from one", "", mutants.positions, "positions"),
    inside("first token for the mean", "", mutants.pooled),
    inside("embedding not normalised", "", mutants.pooled),
    bugs.swapped_heads("token_type_embeddings.embedding", heads=2, where=""),
)
ON_LONG = (
    inside("positions clamped at the end of the table", "", mutants.positions, "positions"),
    inside("stretched over the padded length", "", mutants.positions, "positions"),
    inside("position rounded down", "", mutants.positions, "positions"),
)
ON_CAUSAL = (
    rule("error along the wrong axis", 0, mutants.plain),
    rule("beta on the write only", 1, mutants.plain),
    rule("queries scaled by 1 / sqrt(d)", 0, mutants.plain),
    bugs.dropped_state("blocks.1.delta.rule", argument=4),
    bugs.stale_state("blocks.0.delta.rule", argument=4),
    more.cache_off_by_one("blocks.0.delta.q_conv1d"),
    bugs.plus_one("blocks.1.norm_ffn"),
    more.exchanged("blocks.0.w1.kernel", "blocks.0.w3.kernel"),
    bugs.untied("embedding"),
    bugs.optimiser_setting(weight_decay=1e-4),
)
UNSEEN = (
    rule("last ragged chunk writes nothing", 1, mutants.whole),
    rule("slow learns from the new fast state", 0),
    rule("N with its diagonal", 1),
    rule("scores summed over the chunk", 0),
    inside("silu gate for sigmoid", "blocks.0.delta.o_norm", mutants.output_norm),
    inside("norm before the residual", "blocks.1", mutants.block),
    rule("N N^T not masked", 1),
    inside("largest value for the mean", "", mutants.pooled),
)
UNSEEN_ON_CAUSAL = (
    rule("read before the write", 0, mutants.plain),
    rule("outer product the other way round", 1, mutants.plain),
)

FEW: tuple[tuple[Case, tuple[Injector, ...]], ...] = ((CASE, INJECTORS),)
RUNS = ((CASE, (*INJECTORS, *MORE)), (LONG, ON_LONG), (CAUSAL, ON_CAUSAL))
UNSEEN_RUNS = ((CASE, UNSEEN), (CAUSAL, UNSEEN_ON_CAUSAL))
