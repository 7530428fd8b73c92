"""Porting bugs put into the healthy port of GroundedMamba, one at a time: each is noticed, and located at the module where it was put.

Twelve of every kind run with the tests, the others with `--all-mutations` (`make mutations`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from parity_tests import families
from parity_tests.harness.adapters import nnx_injectors as bugs
from parity_tests.harness.adapters.nnx_trace import Patch
from parity_tests.harness.mutate import Injector, Mutation
from parity_tests.harness.plugin import mutation_tests
from parity_tests.specs import DEFAULT, grounded_mamba

# the regimes that the bugs below need: the state handed on, the offset that breaks a one-pass variance, more than one chunk
CASE = grounded_mamba("grounded_mamba", DEFAULT, regimes=("as is", "carried state", "+ 100"))

# What no forward pass shows is found after it, so on one block, in float64 and with few splits, each of which compiles: test_grounded_mamba
# has the other tiers.
LATE = grounded_mamba("grounded_mamba_late", dataclasses.replace(DEFAULT, depth=1), regimes=("as is",), split=3)
LATE = dataclasses.replace(LATE, dtypes=("float64",))


def misread(name: str, path: str, **fields: Any) -> Injector:
    """A module that was ported with another value of some fields of its config."""
    return Injector(name, path, patches=(Patch(path, prepare=lambda m: setattr(m, "config", dataclasses.replace(m.config, **fields))),))


INJECTORS = (
    bugs.transposed("blocks.1.rwkv.key_proj"),
    bugs.epsilon("blocks.0.ln_rwkv"),
    bugs.fast_variance("blocks.1.ln_ssm"),
    bugs.missing_bias("blocks.1.ssm.dt_proj"),
    bugs.left_at_initialisation("blocks.1.rwkv.memory_gate"),
    bugs.swapped_heads("blocks.0.rwkv.time_first", heads=DEFAULT.rwkv_heads),
    bugs.dropped_state("blocks.1.ssm"),
    bugs.early_state("blocks.1.rwkv"),
    misread("key not normalised", "blocks.0.rwkv", normalised_key=False),
)
LATE_INJECTORS = (
    bugs.extra_stop_gradient("blocks.0.rwkv.receptance_proj"),
    bugs.untied("embedding"),
    bugs.optimiser_setting(weight_decay=1e-4),
)
MORE = (
    bugs.plus_one("ln_out"),
    bugs.scaled_output("blocks.0.ssm"),
    bugs.wrong_last_token("blocks.1.rwkv.output_proj"),
    bugs.averaged_over_batch("blocks.0.rwkv.readout_norm"),
    bugs.stale_state("blocks.0.rwkv"),
    bugs.state_in_low_precision("blocks.0.rwkv"),
    misread("decay of the write: gain for bonus", "blocks.1.rwkv", time_first="gain"),
    misread("gate 0.5 for 0.7", "blocks.0", gate_ssm=0.5),
    misread("hard clamp for smooth", "blocks.1.ssm", dt_clamp="hard"),
    misread("retrieval heads 7 for 14", "blocks.1.rwkv", retrieval_heads=7),
    misread("spectral bound 1 for 0.99", "blocks.0.ssm", max_singular=1.0),
)
MORE_LATE = (bugs.optimiser_setting(eps=1e-6),)

found, test_detected_and_located = mutation_tests((CASE, INJECTORS), (LATE, LATE_INJECTORS), more=((CASE, MORE), (LATE, MORE_LATE)))


def test_cosine_alone_misses_what_the_rules_find(found: dict[str, Mutation]) -> None:
    missed = {name for name, item in found.items() if not item.cosine_alone}
    assert {bugs.dropped_state("blocks.1.ssm").name, bugs.untied("embedding").name, bugs.epsilon("blocks.0.ln_rwkv").name} <= missed


def test_the_diagnosis_names_the_family(found: dict[str, Mutation]) -> None:
    right, wrong = families.named(found.values())
    assert right >= 0.7 * len(found), wrong
