"""pytest: every tier of every case is a test with an id of its own, and a failure says where the two part.

    from parity_tests.harness.plugin import parity_case

    @parity_case(case, other_case)
    def test_port(parity):              # ids port[case-forced], port[case-free], ...
        parity.check()

The function may be a bare `...`: `check` is called after it. As a plugin (entry point `parity`, loaded by itself) the module
adds `--parity-json FILE`, one report of every case that ran, and `--all-mutations`, which runs those too that a test file keeps for it.
A case runs tier by tier as its tests do, over one recorded reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .battery import TIERS, Battery, TierResult
from .case import Case, CaseError
from .mutate import Injector, Mutation, run_mutations

ALL_MUTATIONS = "--all-mutations"

_batteries: dict[int, tuple[Case, Battery]] = {}


def _battery(case: Case) -> Battery:
    # keyed by identity, with the case kept so that its id stays its own
    if id(case) not in _batteries:
        for _, other in _batteries.values():
            other.release()
        _batteries[id(case)] = (case, Battery(case))
    return _batteries[id(case)][1]


@dataclass
class TierTest:
    """One tier of one case, run when it is asked for."""

    case: Case
    tier: str
    checked: bool = False

    def result(self) -> TierResult:
        """The tier's result, computed once."""
        return _battery(self.case).tier(self.tier)

    def check(self) -> None:
        """Fail with the sentence of the first divergence, or skip with the reason why the tier does not apply."""
        __tracebackhide__ = True
        self.checked = True
        result = self.result()
        if not result.held:
            pytest.fail(f"{self.case.name}, {self.tier}: {result.sentence}", pytrace=False)
        if result.skipped:
            pytest.skip(f"{self.case.name}, {self.tier}: {result.skipped}")


def parity_case(*cases: Case | Callable[[], Case | Sequence[Case]], tiers: Sequence[str] | None = None) -> Callable:
    """Parametrise a test function, whose argument is `parity`, over the tiers of cases (or of functions that make them).

    Raises CaseError when there is no case or a tier is unknown, so that a test of nothing cannot pass.
    """
    found: list[Case] = []
    for entry in cases:
        made = entry() if callable(entry) and not isinstance(entry, Case) else entry
        found += [made] if isinstance(made, Case) else list(made)
    if not found or not all(isinstance(case, Case) for case in found):
        raise CaseError(f"parity_case needs at least one Case, found {found}")
    unknown = [name for name in tiers or () if name not in TIERS]
    if unknown:
        raise CaseError(f"unknown tier {unknown[0]!r}, expected {', '.join(TIERS)}")
    items = [(case, tier) for case in found for tier in (tiers or TIERS) if tiers or tier != "voting" or case.also]

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def test(parity: TierTest, *args: Any, **kwargs: Any) -> None:
            __tracebackhide__ = True
            function(parity, *args, **kwargs)
            if not parity.checked:
                parity.check()

        parameters = [pytest.param(TierTest(case, tier), id=f"{case.name}-{tier}") for case, tier in items]
        return pytest.mark.parametrize("parity", parameters)(test)

    return decorate


def mutation_tests(
    *runs: tuple[Case, Sequence[Injector]], more: Sequence[tuple[Case, Sequence[Injector]]] = (), healthy: Sequence[Case] = ()
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Every injected bug as a test: it has to be noticed, and located at the module where it was put.

        found, test_detected_and_located = mutation_tests((case, injectors), (other_case, other_injectors), more=[(case, more_injectors)])

    `found` is the fixture that the test needs, the mutations of the module by name. Those of `more` run with `--all-mutations` only, which is
    an option of this module as a plugin. Those of the cases that are in `healthy` have to hold without a bug first; the others have tests of
    their own for that. Raises CaseError when two injectors have one name, or when there is none without `more`.
    """
    few = [injector for _, own in runs for injector in own]
    names = [injector.name for _, own in (*runs, *more) for injector in own]
    if not few or len(set(names)) != len(names):
        raise CaseError(f"mutation_tests needs injectors with names of their own, found {names}")

    @pytest.fixture(scope="module")
    def found(request: pytest.FixtureRequest) -> dict[str, Mutation]:
        together: dict[int, tuple[Case, list[Injector]]] = {}  # by identity, so that a case is recorded once
        for case, own in (*runs, *(more if request.config.getoption(ALL_MUTATIONS) else ())):
            together.setdefault(id(case), (case, []))[1].extend(own)
        return {item.name: item for case, own in together.values() for item in run_mutations(case, own, healthy=case in healthy)}

    def test(found: dict[str, Mutation], injector: Injector) -> None:
        mutation = found[injector.name]
        assert mutation.detected, "the harness did not notice"
        assert mutation.located == injector.where, mutation.sentence

    test.injectors = {False: few, True: [*few, *(injector for _, own in more for injector in own)]}
    return found, test


def unseen_tests(*runs: tuple[Case, Sequence[Injector]]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The bugs that nothing was tuned on, as tests that run with `--all-mutations` only: each has to be noticed.

        unseen, test_unseen = unseen_tests((case, injectors), (other_case, other_injectors))

    Where it was located and what it was called are properties of the test in a JUnit report, and no condition.
    """

    @pytest.fixture(scope="module")
    def unseen() -> dict[str, Mutation]:
        return {item.name: item for case, own in runs for item in run_mutations(case, own, healthy=False)}

    def test(unseen: dict[str, Mutation], injector: Injector, record_property: Callable[[str, Any], None]) -> None:
        mutation = unseen[injector.name]
        record_property("located", mutation.held)
        record_property("sentence", mutation.sentence)
        assert mutation.detected, "the harness did not notice"

    test.injectors = {False: [], True: [injector for _, own in runs for injector in own]}
    return unseen, test


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each injected bug, with `--all-mutations` for those too that are kept for it."""
    injectors = getattr(metafunc.function, "injectors", None)
    if injectors is not None:
        chosen = injectors[bool(metafunc.config.getoption(ALL_MUTATIONS))]
        metafunc.parametrize("injector", chosen, ids=[injector.name.replace(" ", "_") for injector in chosen])


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--parity-json FILE`, `--all-mutations`."""
    group = parser.getgroup("parity")
    group.addoption("--parity-json", metavar="FILE", default=None, help="write one JSON report of every parity case that ran")
    group.addoption(ALL_MUTATIONS, action="store_true", help="inject every porting bug, not only those of each test file's short list")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the report, of the tiers that ran."""
    path = session.config.getoption("--parity-json", default=None)
    if path is None or not _batteries:
        return
    from .report import to_json

    results = [battery.run([name for name in TIERS if name in battery.done()]) for _, battery in _batteries.values() if battery.done()]
    Path(path).write_text(to_json(results))
