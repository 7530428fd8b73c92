"""GroundedMamba in torch against its NNX port: every tier of every variant is a test of its own."""

from __future__ import annotations

from parity_tests.harness.plugin import parity_case
from parity_tests.specs import CASES


@parity_case(*CASES)
def test_port(parity): ...
