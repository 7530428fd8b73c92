"""GroundedMamba, LAM and DeltaNet in torch against their NNX ports: every tier of every model is a test of its own.

The variants of GroundedMamba run the tiers that compare one layer or one model with another. `parity run` has the others too, and the
calibration went through them with these choices at a hundred random sizes.
"""

from __future__ import annotations

from parity_tests.harness.plugin import TierTest, parity_case
from parity_tests.specs import LANGUAGE, VARIANTS

LAYERS = ("conversion", "coverage", "forced", "free", "gradients")
FEWER = [case for case in LANGUAGE if case.name in VARIANTS and case.name not in ("grounded_mamba", "groundthink")]


@parity_case(*(case for case in LANGUAGE if case not in FEWER))
def test_port(parity: TierTest) -> None: ...


@parity_case(*FEWER, tiers=LAYERS)
def test_variant(parity: TierTest) -> None: ...
