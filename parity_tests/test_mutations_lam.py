"""Porting bugs put into the healthy ports of LAM and DeltaNet, one at a time: each is noticed, and located at the module where it was put.

The bugs are in `mutations_lam`. Twelve run with the tests, the others with `--all-mutations` (`make mutations`), and so do those that
nothing was tuned on. A mutant without a bug is the port itself, so that what the harness notices is the bug.
"""

from __future__ import annotations

import dataclasses

from parity_tests import families
from parity_tests import mutants_lam as mutants
from parity_tests.harness.adapters.nnx_trace import Patch
from parity_tests.harness.bounds import Bounds
from parity_tests.harness.candidate import Candidate
from parity_tests.harness.compare import Place, exact
from parity_tests.harness.mutate import Mutation
from parity_tests.harness.plugin import mutation_tests, unseen_tests
from parity_tests.harness.recording import Recording
from parity_tests.mutations_lam import CASE, CAUSAL, FEW, INJECTORS, LONG, RUNS, UNSEEN_RUNS

MORE = tuple((case, tuple(injector for injector in own if injector not in INJECTORS)) for case, own in RUNS)
found, test_detected_and_located = mutation_tests(*FEW, more=MORE)
unseen, test_unseen_is_detected = unseen_tests(*UNSEEN_RUNS)

NEUTRAL = (
    (CASE, (Patch("blocks.0.delta.rule", mutants.whole(None)), Patch("blocks.1.delta.rule", mutants.parts(None)),
            Patch("blocks.0.delta.o_norm", mutants.output_norm(None)), Patch("blocks.0.delta", mutants.heads(None), method="_heads"),
            Patch("blocks.1.delta", mutants.layer(None)), Patch("blocks.0", mutants.block(None)), Patch("", mutants.pooled(None)))),
    (LONG, (Patch("blocks.0.delta.rule", mutants.given(None)), Patch("", mutants.positions(None), method="positions"))),
    (CAUSAL, (Patch("blocks.0.delta.rule", mutants.plain(None)),)),
)


def test_the_diagnosis_names_the_family(found: dict[str, Mutation]) -> None:
    right, wrong = families.named(found.values())
    assert right >= 0.7 * len(found), wrong


def test_cosine_alone_misses_most_of_what_the_rule_hides(found: dict[str, Mutation]) -> None:
    missed = {name for name, item in found.items() if not item.cosine_alone}
    assert {"missing cross update", "psi averaged over the batch"} <= missed


def test_mutants_without_a_bug_are_the_port() -> None:
    for case, patches in NEUTRAL:
        case = dataclasses.replace(case, jit=False)  # each program would run once
        recording = Recording(case)
        candidate = Candidate(case, recording)
        twin = candidate.mutated(candidate.weights, patches, None, None)
        regime, bounds, checks = recording.plain()[0], Bounds(case.bounds), []
        for layer in recording.forced(regime):
            if layer.path in {patch.path for patch in patches}:
                checks += exact(Place("forced", layer.path, "as is", "float64"), layer.outputs, twin.call(layer, "float64"), bounds, "forced")
        if "" in {patch.path for patch in patches}:
            outputs = twin.adapter("float64").run(recording.inputs(regime), None, tap=False).outputs
            checks += exact(Place("free", "", "as is", "float64"), recording.run(regime).outputs, outputs, bounds, "free")
        assert {check.where for check in checks} == {patch.path for patch in patches} and not [check for check in checks if not check.held]
