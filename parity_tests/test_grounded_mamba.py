"""GroundedMamba in torch against its NNX port: every tier of every variant is a test of its own."""

from __future__ import annotations

from parity_tests.harness.plugin import parity_case
from parity_tests.specs import LANGUAGE


@parity_case(*LANGUAGE)
def test_port(parity): ...
