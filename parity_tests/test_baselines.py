"""The Transformer and the GRU of the comparison in torch against their NNX ports: every tier of either is a test of its own."""

from __future__ import annotations

from parity_tests.harness.plugin import parity_case
from parity_tests.specs import BASELINES


@parity_case(*BASELINES)
def test_port(parity): ...
