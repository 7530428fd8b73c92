"""GroundedMamba, LAM and DeltaNet in torch against their NNX ports: every tier of every model is a test of its own.

GroundedMamba and LAM run every tier. Their variants, and DeltaNet, of which LAM is made, run those that compare one layer or one model with
another. `parity run` has the others too, and the calibration went through them with these choices at a hundred random sizes.
"""

from __future__ import annotations

from parity_tests.harness.plugin import TierTest, parity_case
from parity_tests.specs import LANGUAGE

LAYERS = ("conversion", "coverage", "forced", "free", "gradients")
WHOLE = ("grounded_mamba", "lam")
CAUSAL = ("deltanet_lm",)  # DeltaNet's own streaming: LAM reads whole sentences


@parity_case(*(case for case in LANGUAGE if case.name in WHOLE))
def test_port(parity: TierTest) -> None: ...


@parity_case(*(case for case in LANGUAGE if case.name in CAUSAL), tiers=(*LAYERS, "splits"))
def test_stream(parity: TierTest) -> None: ...


@parity_case(*(case for case in LANGUAGE if case.name not in (*WHOLE, *CAUSAL)), tiers=LAYERS)
def test_variant(parity: TierTest) -> None: ...
