"""The pytest plugin: one test id for every tier of every case, and the first-divergence sentence as the text of a failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from parity_tests.harness.battery import TIERS
from parity_tests.harness.case import CaseError
from parity_tests.harness.plugin import mutation_tests, parity_case
from parity_tests.harness.report import from_json
from parity_tests.harness.tests.test_cli import CASES

pytest_plugins = ["pytester"]

TEST = CASES + '''
from parity_tests.harness.plugin import parity_case

@parity_case(good, lambda: bad)
def test_port(parity):
    ...
'''


def test_ids_failures_and_report(pytester: pytest.Pytester) -> None:
    path = pytester.makepyfile(test_port=TEST)
    result = pytester.runpytest_inprocess("-v", "-p", "no:cacheprovider", "--parity-json=report.json", path)
    outcomes = result.parseoutcomes()
    text = result.stdout.str()
    # free and rounding fail; the others of the bad case and all of the good one hold or do not apply; float64 sees 1e-6, so does float32
    assert "test_port[good-free] PASSED" in text and "test_port[good-splits] SKIPPED" in text and "test_port[bad-free] FAILED" in text
    assert "bad, free: parts at the whole model: relative L2" in text
    assert sum(outcomes.get(key, 0) for key in ("passed", "failed", "skipped")) == 2 * (len(TIERS) - 1)  # neither case has a vote
    results = from_json((Path(pytester.path) / "report.json").read_text())
    own = [(item.case, item.held) for item in results if item.case in ("good", "bad")]  # other files may have run cases before
    assert own == [("good", True), ("bad", False)]


def test_a_test_of_nothing_is_refused() -> None:
    with pytest.raises(CaseError, match="at least one Case"):
        parity_case()
    with pytest.raises(CaseError, match="unknown tier"):
        from parity_tests.harness.tests.toy import CASE

        parity_case(CASE, tiers=["backward"])
    with pytest.raises(CaseError, match="needs injectors"):
        mutation_tests((CASE, ()))
