"""All porting bugs of our models as cases with injectors: `parity mutate parity_tests.mutations:CASES --unseen` shows what notices them.

A model has several cases where one would be dear: of a bug that shows only while training, everything before it is run first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from parity_tests import families, mutations_lam, mutations_mamba, mutations_wave
from parity_tests.harness import Case
from parity_tests.harness.mutate import Injector, unseen

Runs = Sequence[tuple[Case, Sequence[Injector]]]


def cases(runs: Runs, unseen_runs: Runs) -> tuple[Case, ...]:
    """Each case once, with the injectors of its runs and their families; those of `unseen_runs` are marked."""
    together: dict[int, tuple[Case, list[Injector]]] = {}
    for case, injectors in (*runs, *((case, unseen(*injectors)) for case, injectors in unseen_runs)):
        together.setdefault(id(case), (case, []))[1].extend(families.known(*injectors))
    return tuple(dataclasses.replace(case, injectors=tuple(injectors)) for case, injectors in together.values())


MODELS = {name: cases(own.RUNS, own.UNSEEN_RUNS) for name, own in (
    ("GroundedMamba", mutations_mamba), ("LAM", mutations_lam), ("WaveCore", mutations_wave))}
CASES = [case for model in MODELS.values() for case in model]
