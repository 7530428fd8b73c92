"""Porting bugs put into the healthy ports of LAM and DeltaNet, one at a time: each is noticed, and located at the module where it was put.

The bugs are in `mutations_lam`. Twelve run with the tests, the others with `--all-mutations` (`make mutations`), and so do those that
nothing was tuned on. A mutant without a bug is the port itself, so that what the harness notices is the bug.
"""

from __future__ import annotations

from parity_tests import families
from parity_tests import mutants_lam as mutants
from parity_tests.harness.adapters import nnx_injectors as bugs
from parity_tests.harness.adapters.nnx_trace import Patch
from parity_tests.harness.bounds import Bounds
from parity_tests.harness.candidate import Candidate
from parity_tests.harness.compare import Place, exact
from parity_tests.harness.mutate import Mutation
from parity_tests.harness.plugin import mutation_tests, unseen_tests
from parity_tests.harness.recording import Recording
from parity_tests.mutations_lam import CASE, CAUSAL, INJECTORS, LONG, RUNS, UNSEEN_RUNS

# those that write the whole rule again, and one that takes long to explain, which the toy port has too: cheaper ones run in their place
DEAR = {"beta after chunking", "gates on the state update", bugs.tanh_gelu("blocks.0").name}
INSTEAD = {"output gate inverted", "norm over all heads", "positions from one"}
SHORT = {injector.name for injector in INJECTORS} - DEAR | INSTEAD
CHOSEN = ((CASE, tuple(injector for injector in RUNS[0][1] if injector.name in SHORT)),)
MORE = tuple((case, tuple(injector for injector in own if injector.name not in SHORT)) for case, own in RUNS)
found, test_detected_and_located = mutation_tests(*CHOSEN, more=MORE)
unseen, test_unseen_is_detected = unseen_tests(*UNSEEN_RUNS)


def test_the_diagnosis_names_the_family(found: dict[str, Mutation]) -> None:
    right, wrong = families.named(found.values())
    assert right >= 0.7 * len(found), wrong


def test_cosine_alone_misses_most_of_what_the_rule_hides(found: dict[str, Mutation]) -> None:
    missed = {name for name, item in found.items() if not item.cosine_alone}
    assert {"missing cross update", "psi averaged over the batch"} <= missed


def test_mutants_without_a_bug_are_the_port() -> None:
    patches = (
        Patch("blocks.0.delta.rule", mutants.whole(None)), Patch("blocks.1.delta.rule", mutants.parts(None)),
        Patch("blocks.1.delta.rule", mutants.given(None)), Patch("blocks.0.delta.o_norm", mutants.output_norm(None)),
        Patch("blocks.0.delta", mutants.heads(None), method="_heads"), Patch("blocks.1.delta", mutants.layer(None)),
        Patch("blocks.0", mutants.block(None)), Patch("", mutants.positions(None), method="positions"), Patch("", mutants.pooled(None)))
    recording = Recording(LONG)
    candidate = Candidate(LONG, recording)
    regime = recording.plain()[0]
    outputs = candidate.mutated(candidate.weights, patches, None, None).adapter("float64").run(recording.inputs(regime), None, tap=False).outputs
    checks = exact(Place("free", "", regime.name, "float64"), recording.run(regime).outputs, outputs, Bounds(LONG.bounds), "free")
    assert len(checks) == 2 and not [check for check in checks if not check.held]


def test_the_causal_mutant_without_a_bug_is_the_port() -> None:
    recording = Recording(CAUSAL)
    candidate = Candidate(CAUSAL, recording)
    twin = candidate.mutated(candidate.weights, (Patch("blocks.0.delta.rule", mutants.plain(None)),), None, None)
    layer = next(layer for layer in recording.forced(recording.plain()[1]) if layer.path == "blocks.0.delta.rule")
    place = Place("forced", layer.path, "carried state", "float64")
    checks = exact(place, layer.outputs, twin.call(layer, "float64"), Bounds(CAUSAL.bounds), "forced")
    assert len(checks) == 2 and not [check for check in checks if not check.held]
