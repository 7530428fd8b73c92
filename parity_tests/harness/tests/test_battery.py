"""The battery on a healthy port holds in every tier; on sick ones each tier says what it is there to say; reports read back."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("flax")

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from rich.console import Console

from parity_tests.harness import ahead, report
from parity_tests.harness.battery import TIERS, Battery, Result, run_case
from parity_tests.harness.bounds import Bound
from parity_tests.harness.case import Case, CaseError, StateProtocol, Trajectory
from parity_tests.harness.tests import toy
from parity_tests.harness.tests.toy import CASE


@pytest.fixture(scope="module")
def healthy() -> Result:
    return run_case(CASE)


def test_a_healthy_port_holds(healthy: Result) -> None:
    assert healthy.held, healthy.sentence
    assert [tier.name for tier in healthy.tiers] == list(TIERS)
    assert [tier.name for tier in healthy.tiers if tier.skipped] == ["voting"]
    assert min(len(tier.checks) for tier in healthy.tiers if not tier.skipped) > 1


def test_what_the_next_tier_compiles_is_begun_once_and_used() -> None:
    """A run of several tiers compiles what each would by itself, the step of training included."""
    names = ("free", "splits", "optimiser")
    case = line(trajectory=Trajectory(steps=2), unobservable={})
    together, alone = Battery(case), Battery(case)
    assert together.run(names).held and all(alone.tier(name).held for name in names)
    counts = [battery.candidate.adapter("float64").programs.count for battery in (together, alone)]
    assert counts[0] == counts[1] > 5
    together.release()
    assert together.run(names).held and together.candidate.adapter("float64").programs.count == counts[0]  # a result that is there costs nothing
    begun = Battery(case)
    ahead.begin(begun, names)
    assert begun.candidate.adapter("float64").programs.count == counts[0] - 1  # a split from the beginning is not foreseen


def test_every_module_was_forced_under_every_regime(healthy: Result) -> None:
    seen = {(check.where, check.regime) for check in healthy.checks if check.tier == "forced"}
    paths = {path for path in healthy.order if path not in ("", "head")}
    assert len(paths) == 22 and "blocks.1.cell.norm" in paths
    assert seen == {(path, regime) for path in paths for regime in toy.FAST}


def test_modules_are_in_run_order(healthy: Result) -> None:
    order = healthy.order
    assert order["embedding"] < order["blocks.0.norm"] < order["blocks.0.cell.norm"] < order["blocks.0.cell"] < order["blocks.0"] < order[""]


def test_what_is_not_compared_is_said(healthy: Result) -> None:
    text = "\n".join(healthy.notes)
    assert "head: no partner, the candidate reuses its embedding" in text
    assert "blocks.0.cell.norm: 6 calls in the reference, 0 in the candidate, compared by force only" in text


def test_json_reads_back_as_it_was_written(healthy: Result) -> None:
    text = report.to_json([healthy])
    record = json.loads(text)
    assert record["schema"] == "parity-report/1" and record["held"] is True and record["cases"][0]["tiers"][0]["checks"][0]["held"] is True
    back = report.from_json(text)
    assert report.to_json(back) == text
    assert back[0].checks[0].measure == healthy.checks[0].measure and back[0].sentence == healthy.sentence and back[0].order == healthy.order
    with pytest.raises(ValueError, match="expected a report of schema"):
        report.from_json('{"schema": "other"}')


def test_the_report_gives_policy_and_versions(healthy: Result) -> None:
    assert healthy.policy["matmul"] == "highest" and healthy.policy["tf32"] is False and healthy.policy["threads"] >= 1
    assert {"numpy", "torch", "jax", "flax"} <= set(healthy.policy["versions"])


def test_the_terminal_report_has_verdict_table_and_totals(healthy: Result) -> None:
    console = Console(record=True, width=160, file=io.StringIO())
    report.terminal(healthy, console)
    lines = console.export_text().splitlines()
    assert lines[0] == "toy: parity holds"
    rows = [line.split()[0] for line in lines if line.startswith(("embedding", "blocks.", "norm_out"))]
    assert rows == [path for path in healthy.order if path not in ("", "head")]
    assert "0 failed" in lines[-1] and "checks in 10 tiers" in lines[-1]


class Line(torch.nn.Module):
    """y = x W^T + b, then a running sum along time that starts from the state."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.spare = torch.nn.Linear(5, 3), torch.nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.cumsum(self.proj(x), 1) + (0.0 if state is None else state[:, None])
        return y, y[:, -1]


class LineTwin(nnx.Module):
    """The twin of `Line`; `window` returns the state before the last token from that length on."""

    def __init__(self, window: int | None = None, detach: bool = False, trained: type = nnx.Param) -> None:
        self.proj = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
        self.spare = trained(np.ones(2, np.float32))
        self.window, self.detach = window, detach

    def __call__(self, x: object, state: object = None) -> tuple:
        y = jnp.cumsum(self.proj(x), 1)
        if state is not None:
            y = y + (jax.lax.stop_gradient(state) if self.detach else state)[:, None]
        return y, y[:, -1] if self.window is None or x.shape[1] < self.window else y[:, -2]


def line(name: str = "line", **changes: object) -> Case:
    def inputs(seed: int, batch: int | None = None, length: int | None = None) -> dict[str, np.ndarray]:
        return {"x": np.random.default_rng(seed).normal(size=(batch or 2, length or 6, 5))}

    return replace(Case(
        name=name, reference=Line, candidate=LineTwin, inputs=inputs, states=StateProtocol(split_length=5), trajectory=None,
        unobservable={"spare": "nothing reads it"}, regimes=("as is", "carried state"), dtypes=("float64",),
    ), **changes)


def test_float_inputs_a_state_with_gradients_and_a_spare_leaf() -> None:
    result = run_case(line())
    assert result.held, result.sentence
    names = {check.leaf for check in result.checks if check.tier == "gradients"}
    assert {"input.x", "state", "proj.weight", "args.0"} <= names
    assert {tier.name: tier.skipped for tier in result.tiers if tier.skipped} == {
        "voting": "the case names no further implementation", "rounding": "the case names no precision below float64",
        "optimiser": "the case names no trajectory"}


def test_an_unread_leaf_is_untested_unless_declared() -> None:
    result = run_case(line(unobservable={}), tiers=["observability"])
    assert not result.held
    assert result.sentence == ("parts at the whole model (spare): spare changes no output, state or gradient: it is untested; give inputs that "
                               "reach it, or a reason in unobservable={...} "
                               "[float64, observability, as is; rule 8 observability]")
    declared = run_case(line(unobservable={"*": "said too much here"}), tiers=["observability"])
    assert not declared.held and "is declared unobservable" in declared.sentence


def test_detachment_is_checked_both_ways() -> None:
    result = run_case(line(candidate=lambda: LineTwin(detach=True)), tiers=["gradients"])
    assert not result.held and "(state)" in result.sentence
    result = run_case(line(states=StateProtocol(detached=True, split_length=5)), tiers=["gradients"])
    assert not result.held and "largest gradient in the reference" in result.sentence and "rule 5" in result.sentence


def test_a_state_that_is_wrong_for_long_parts_only_is_found_by_the_splits() -> None:
    tier = Battery(line(candidate=lambda: LineTwin(window=4))).tier("splits")
    failed = {check.regime for check in tier.checks if not check.held}
    assert not tier.held and failed == {"split at 1 of 5 from a carried state", "split at 4 of 5 from a carried state"}


def test_a_leaf_trained_on_one_side_only() -> None:
    result = run_case(line(candidate=lambda: LineTwin(trained=nnx.Variable)), tiers=["coverage"])
    assert "spare is trained in the reference but not in the candidate" in result.sentence


def test_a_module_without_partner_has_to_be_declared() -> None:
    result = run_case(replace(CASE, unpaired={}), tiers=["coverage"])
    assert not result.held and "parts at head: the candidate has no module 'head'" in result.sentence


def test_weights_that_cannot_be_converted_end_the_run() -> None:
    result = run_case(replace(CASE, ties={}))
    assert not result.held and "tied but not declared: head.weight" in result.sentence
    assert {tier.skipped for tier in result.tiers[1:]} == {"the weights could not be converted"}
    assert "tied but not declared" in run_case(replace(CASE, ties={}), tiers=["free"]).sentence


def test_a_candidate_that_raises_is_a_failure_and_not_a_crash() -> None:
    class Broken(LineTwin):
        def __call__(self, x: object, state: object = None) -> tuple:
            raise RuntimeError("no such kernel")

    result = run_case(line(candidate=Broken), tiers=["free"])
    assert not result.held and "the candidate raised RuntimeError: no such kernel" in result.sentence


def test_outputs_of_another_structure_do_not_hold() -> None:
    class Longer(LineTwin):
        def __call__(self, x: object, state: object = None) -> tuple:
            return (*super().__call__(x, state), x)

    result = run_case(line(candidate=Longer), tiers=["free"])
    assert not result.held and "2 leaves in the reference, 3 in the candidate; unexpected '2'" in result.sentence


def test_a_candidate_that_writes_to_its_variables() -> None:
    class Counting(LineTwin):
        def __call__(self, x: object, state: object = None) -> tuple:
            self.spare.set_value(self.spare[...] + 1.0)
            return super().__call__(x, state)

    result = run_case(line(candidate=Counting), tiers=["effects"])
    assert not result.held and "candidate: variable spare changed during the call" in result.sentence


def test_a_reference_that_writes_to_its_input() -> None:
    class Writing(Line):
        def forward(self, x: torch.Tensor, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
            outputs = super().forward(x, state)
            x.mul_(2.0)
            return outputs

    result = run_case(line(reference=Writing), tiers=["effects"])
    assert not result.held and "reference: inputs changed during the call" in result.sentence


def test_a_reference_that_cannot_run_is_an_error_of_the_case() -> None:
    with pytest.raises(CaseError, match="the reference of case 'line' cannot be run"):
        run_case(line(inputs=lambda seed: {"x": np.ones((2, 6, 4))}))


def test_float32_errors_are_measured_against_the_references_own() -> None:
    class Coarse(LineTwin):
        def __call__(self, x: object, state: object = None) -> tuple:
            y, after = super().__call__(x, state)
            if str(y.dtype) == "float32":  # right in float64, three digits in float32
                y = y.astype("bfloat16").astype("float32")
            return y, after

    result = run_case(line(candidate=Coarse, dtypes=("float64", "float32")), tiers=["free", "rounding"])
    assert result.tiers[0].held and not result.tiers[1].held
    assert "rule 3 rounding (float32)" in result.sentence


def test_half_precision_runs() -> None:
    case = line(dtypes=("float64", "bfloat16"), bounds=[Bound(8.0, "sums along time are kept in bfloat16 in another order", on="half")])
    result = run_case(case, tiers=["rounding"])
    assert result.held, result.sentence
    assert {check.dtype for check in result.checks} == {"bfloat16"}


def test_the_first_divergence_is_one_sentence() -> None:
    def other_epsilon() -> object:
        model = toy.candidate()
        model.blocks[1].norm.epsilon = 1e-3
        return model

    result = run_case(replace(CASE, candidate=other_epsilon, regimes=("as is",)), tiers=["forced", "free"])
    assert re.fullmatch(r"parts at blocks\.1\.norm: relative L2 \S+ \(allowed 1e-12\) on an input that agrees to \d\S*e-1[5-7]; "
                        r"looks like: eps 0\.001 for 1e-05 "
                        r"\[float64, forced, as is; rules? 2 meaning \(float64\).*\]", result.sentence), result.sentence
    assert result.lint == ["blocks.1.norm: epsilon 0.001 in the candidate, 1e-05 in the reference (defaults: torch 1e-5, Flax 1e-6)",
                           "an id outside the table raises in torch's Embedding and gives NaN in Flax's Embed: check ids before the model"]


def test_unknown_tiers_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown tier 'backward'"):
        run_case(line(), tiers=["backward"])


def test_a_single_layer_is_compared_as_a_whole() -> None:
    """A first case is often one layer: it has nothing below it to force, which is no failure, and reasons are said once."""
    def inputs(seed: int) -> dict[str, np.ndarray]:
        return {"x": np.random.default_rng(seed).normal(size=(3, 7))}

    case = Case("linear", lambda: torch.nn.Linear(7, 5), lambda: nnx.Linear(7, 5, rngs=nnx.Rngs(0)), inputs)
    result = run_case(case)
    assert result.held, result.sentence
    assert next(tier for tier in result.tiers if tier.name == "forced").skipped.startswith("the model is a single layer")
    assert sum("inputs of the case take no length" in note for note in result.notes) == 1


def test_the_losses_of_both_sides_and_the_error_over_time_are_kept(healthy: Result) -> None:
    (trained,) = (line for line in healthy.series if line.kind == "training")
    assert len(trained.candidate) == len(trained.reference) == 10 and trained.candidate == pytest.approx(trained.reference, rel=1e-9)
    lengths = {(line.regime, len(line.candidate)) for line in healthy.series if line.kind == "time" and not line.where}
    assert lengths == {("as is", 6), ("carried state", 6), ("length 2", 2)}
    assert {"embedding", "blocks.0.cell", "norm_out"} <= {line.where for line in healthy.series}


def test_released_programs_are_given_back_and_made_again() -> None:
    battery = Battery(CASE)
    assert battery.tier("effects").held
    adapters = battery.candidate.adapters.values()
    assert any(adapter.programs.held for adapter in adapters)
    battery.release()
    assert not any(adapter.programs.held for adapter in adapters)
    assert battery.tier("gradients").held


def test_inputs_go_by_their_place_and_not_by_their_name() -> None:
    """`jit` sorts the keys of a dict: in training the second input of this pair once arrived as the first."""

    class Reference(torch.nn.Linear):
        def forward(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * a

    class Candidate(nnx.Linear):
        def __call__(self, x: jax.Array, a: jax.Array) -> jax.Array:
            return super().__call__(x) * a

    def inputs(seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return {"x": rng.normal(size=(3, 7)), "a": rng.normal(size=(3, 7))}

    case = Case("order", lambda: Reference(7, 7), lambda: Candidate(7, 7, rngs=nnx.Rngs(0)), inputs, regimes=("as is",))
    assert run_case(case, tiers=("optimiser",)).held


class TorchState(NamedTuple):
    h: Any
    past: tuple


class NNXState(NamedTuple):
    h: Any
    past: tuple


def insisting(initial: Callable[[int, int], Any] | None) -> Case:
    """A pair, time first, whose modules take no other state than a NamedTuple of their own."""

    class Reference(torch.nn.Linear):
        def forward(self, x: torch.Tensor, state: TorchState | None = None) -> tuple:
            state = TorchState(x.new_zeros(x.shape[1:]), (x.new_zeros(()),)) if state is None else state
            assert type(state) is TorchState
            h = x.cumsum(0) + state.h
            return super().forward(h), TorchState(h[-1], (state.past[0] + len(x),))

    class Candidate(nnx.Linear):
        def __call__(self, x: jax.Array, state: NNXState | None = None) -> tuple:
            state = NNXState(jnp.zeros(x.shape[1:], x.dtype), (jnp.zeros((), x.dtype),)) if state is None else state
            assert type(state) is NNXState
            h = x.cumsum(0) + state.h
            return super().__call__(h), NNXState(h[-1], (state.past[0] + len(x),))

    def inputs(seed: int, batch: int = 3, length: int = 5) -> dict[str, np.ndarray]:
        return {"x": np.random.default_rng(seed).normal(size=(length, batch, 7))}

    return Case("insisting", lambda: Reference(7, 11), lambda: Candidate(7, 11, rngs=nnx.Rngs(0)), inputs, regimes=("as is", "carried state"),
                states=StateProtocol(axis=0, initial=initial, split_length=3), trajectory=None)


@pytest.mark.parametrize("initial", [None, lambda seed, batch: {"h": np.full((batch, 7), 0.7), "past": [np.array(2.0)]}], ids=["own", "dict"])
def test_a_state_is_handed_over_in_the_containers_of_each_side(initial: Callable | None) -> None:
    """The state of the reference, or a plain dict, reaches a candidate that insists on a class of its own; the batch is no time axis."""
    result = run_case(insisting(initial))
    assert result.held, result.sentence
    assert {check.regime for check in result.checks if check.tier == "free"} == {"as is", "carried state"}
    assert [tier.name for tier in result.tiers if tier.skipped] == ["forced", "voting", "optimiser"]
