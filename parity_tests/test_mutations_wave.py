"""Porting bugs put into the healthy port of WaveCore, one at a time: each is noticed, and located at the module where it was put.

The bugs are in `mutations_wave`. Twelve run with the tests, the others with `--all-mutations` (`make mutations`), and so do those that
nothing was tuned on. A mutant without a bug is the port itself, so that what the harness notices is the bug.
"""

from __future__ import annotations

import dataclasses

from parity_tests import families
from parity_tests import mutants_wave as mutants
from parity_tests.harness.adapters.nnx_trace import Patch
from parity_tests.harness.bounds import Bounds
from parity_tests.harness.candidate import Candidate
from parity_tests.harness.compare import Place, exact
from parity_tests.harness.mutate import Mutation
from parity_tests.harness.plugin import mutation_tests, unseen_tests
from parity_tests.harness.recording import Recording
from parity_tests.mutations_wave import EPSILONS, FEW, LINEAR_STEP, ROLLOUT, RUNS, STEP, UNSEEN_RUNS

SHORT = {injector.name for _, own in FEW for injector in own}
MORE = tuple((case, tuple(injector for injector in own if injector.name not in SHORT)) for case, own in RUNS)
found, test_detected_and_located = mutation_tests(*FEW, more=MORE, healthy=(STEP,))
unseen, test_unseen_is_detected = unseen_tests(*UNSEEN_RUNS)

NEUTRAL = (
    (STEP, {"encoder": mutants.encoder, "core": mutants.core, "core.wave": mutants.wave, "core.wave.ssm": mutants.ssm, "cms_write": mutants.write,
            "cms_read": mutants.reading, "": mutants.stepped}),
    (LINEAR_STEP, {"core.wave": mutants.linear, "cms_write": mutants.write, "cms_read": mutants.read}),
    (ROLLOUT, {"cms_write": mutants.write_lazy, "cms_read": mutants.read}),
)


def test_the_diagnosis_names_the_family(found: dict[str, Mutation]) -> None:
    right, wrong = families.named(found.values())
    assert right >= 0.7 * len(found), wrong


def test_cosine_alone_misses_what_the_rules_find(found: dict[str, Mutation]) -> None:
    missed = {name for name, item in found.items() if not item.cosine_alone}
    assert {"dt without its minimum", "old row not decayed", "norms not folded", EPSILONS[1].name} <= missed
    hidden = {"clipped before U_p and U_w", "closed gate writes", *(item.name for item in EPSILONS)}
    assert hidden & found.keys() <= missed


def test_mutants_without_a_bug_are_the_port() -> None:
    for case, own in NEUTRAL:
        case = dataclasses.replace(case, jit=False)  # each program would run once
        recording = Recording(case)
        candidate = Candidate(case, recording)
        twin = candidate.mutated(candidate.weights, tuple(Patch(path, mutant(None)) for path, mutant in own.items()), None, None)
        bounds, checks = Bounds(case.bounds), []
        for regime in recording.plain():
            for layer in recording.forced(regime):
                if layer.path in own:
                    checks += exact(Place("forced", layer.path, regime.name, "float64"), layer.outputs, twin.call(layer, "float64"), bounds, "forced")
        if "" in own:
            regime = recording.plain()[0]
            outputs = twin.adapter("float64").run(recording.inputs(regime), None, tap=False).outputs
            checks += exact(Place("free", "", "as is", "float64"), recording.run(regime).outputs, outputs, bounds, "free")
        assert {check.where for check in checks} == set(own) and not [check for check in checks if not check.held]
