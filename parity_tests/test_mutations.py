"""Porting bugs put into the healthy port of GroundedMamba, one at a time: each is noticed, and located at the module where it was put.

Bugs inside a module come from mutants: the module or one of its functions again in JAX, with every bug as a branch. Without a bug each of
them is the port itself, which a test asserts, so that what the harness notices is the bug. Twelve bugs run with the tests, the others with
`--all-mutations` (`make mutations`), and so do those that nothing was tuned on.
"""

from __future__ import annotations

from parity_tests import families
from parity_tests import mutants_mamba as mutants
from parity_tests.harness.adapters import nnx_injectors as bugs
from parity_tests.harness.adapters.nnx_trace import Patch
from parity_tests.harness.bounds import Bounds
from parity_tests.harness.candidate import Candidate
from parity_tests.harness.compare import Place, exact
from parity_tests.harness.mutate import Mutation
from parity_tests.harness.plugin import mutation_tests, unseen_tests
from parity_tests.harness.recording import Recording
from parity_tests.mutations_mamba import FEW, LATE, RUNS, UNSEEN_RUNS

# the toy port has these three too, which take half of the time here: cheaper bugs run in their place
DEAR = {bugs.fast_variance("blocks.1.ln_ssm").name, bugs.extra_stop_gradient("blocks.0.rwkv.receptance_proj").name,
        bugs.optimiser_setting(weight_decay=1e-4).name}
INSTEAD = {"gate inverted", "bank read without its de-biasing", "hard clamp for smooth"}
SHORT = {injector.name for _, own in FEW for injector in own} - DEAR | INSTEAD
CHOSEN, REST = (
    tuple((case, tuple(injector for injector in own if (injector.name in SHORT) is short)) for case, own in RUNS) for short in (True, False))
found, test_detected_and_located = mutation_tests(*CHOSEN, more=REST)
unseen, test_unseen_is_detected = unseen_tests(*UNSEEN_RUNS)


def test_cosine_alone_misses_what_the_rules_find(found: dict[str, Mutation]) -> None:
    missed = {name for name, item in found.items() if not item.cosine_alone}
    assert {bugs.dropped_state("blocks.1.ssm").name, bugs.untied("embedding").name, bugs.epsilon("blocks.0.ln_rwkv").name} <= missed


def test_the_diagnosis_names_the_family(found: dict[str, Mutation]) -> None:
    right, wrong = families.named(found.values())
    assert right >= 0.7 * len(found), wrong


def test_mutants_without_a_bug_are_the_port() -> None:
    recording, checks = Recording(LATE), []
    candidate = Candidate(LATE, recording)
    ssm, memory, block = "blocks.0.ssm", "blocks.0.rwkv", "blocks.0"
    for group in ({ssm: mutants.scan, memory: mutants.memory}, {memory: mutants.bank, block: mutants.block}, {memory: mutants.rwkv}):
        twin = candidate.mutated(candidate.weights, tuple(Patch(path, mutant(None)) for path, mutant in group.items()), None, None)
        for layer in recording.forced(recording.plain()[1]):
            if layer.path in group:
                found = exact(Place("forced", layer.path, "carried state", "float64"), layer.outputs, twin.call(layer, "float64"),
                              Bounds(LATE.bounds), "forced")
                checks.append((layer.path, [check for check in found if not check.held]))
    assert checks == [(ssm, []), (memory, []), (memory, []), (block, []), (memory, [])]
