"""The benchmark: turns and ratios, gates that keep figures back, bounds, tables and pictures. No test asserts how long anything takes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import bench
from experiments.benchmarks import bounds, case, gate, measure, pictures, report
from experiments.benchmarks.case import BOUND, PRODUCTS, STREAM, Case, Target
from experiments.benchmarks.scaling import Curve


def simple(**fields: object) -> Case:
    """A case of two contenders that do nothing."""
    given = dict(name="nothing", title="nothing at all", contenders={"loop": lambda: None, "engine": lambda: None}, bounds={}, targets=[], checks=[],
                 rounds=3)
    return Case(**{**given, **fields})


def test_turns_go_to_and_fro(monkeypatch):
    order: list[str] = []
    contenders = {name: (lambda name=name: order.append(name)) for name in "abc"}
    monkeypatch.setattr(measure, "calls_for", lambda call: 1)
    monkeypatch.setattr(measure, "sample", lambda call, calls: call() or 1.0)
    found = measure.take_turns(contenders, rounds=3)
    assert "".join(order) == "abccbaabc"
    assert all(len(timing.samples) == 3 for timing in found.values())


def test_rounds_end_with_the_budget_but_not_before_there_are_enough(monkeypatch):
    clock = iter(range(1_000))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(measure, "calls_for", lambda call: 1)
    monkeypatch.setattr(measure, "sample", lambda call, calls: 1.0)
    assert len(measure.take_turns({"a": lambda: None}, rounds=50, budget=0.5)["a"].samples) == measure.FEWEST


def test_a_long_call_is_its_own_sample_and_a_short_one_is_warmed_first(monkeypatch):
    now, made = [0.0], []

    def call(seconds: float) -> None:
        made.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    assert measure.sample(lambda: call(5.0), 1) == 5.0 and len(made) == 1
    assert measure.sample(lambda: call(0.01), 3) == pytest.approx(0.01) and len(made) == 5


def test_a_ratio_is_taken_inside_each_round():
    """A machine that becomes four times as slow leaves it alone; the ratio of medians of other rounds would not."""
    slow, fast = measure.timing([1.0, 2.0, 4.0, 8.0], 1), measure.timing([0.5, 1.0, 2.0, 4.0], 1)
    assert measure.ratio(slow, fast) == measure.Ratio(2.0, 2.0, 2.0)


@pytest.mark.parametrize("found", [2e-10, float("nan")])
def test_a_red_gate_keeps_every_figure_back(found):
    def never() -> None:
        raise AssertionError("a contender was timed behind a red gate")

    with pytest.raises(gate.GateError, match=r"gate of nothing is red.*engine in float64: .* where 1e-10 is allowed"):
        case.measure(simple(contenders={"engine": never}, checks=[gate.Check("engine in float64", found, 1e-10)]))


def test_agreement_finds_a_wrong_contender_and_passes_a_right_one():
    truth = np.random.default_rng(0).normal(size=(3, 7))
    loop = truth * (1 + 1e-7)
    single = {"loop": loop, "close": truth - 5e-7, "far": truth + 1e-4}
    checks = gate.agreement(truth, {"right": truth * (1 + 1e-12), "wrong": truth + 1e-6}, single, "loop")
    assert [check.held for check in checks] == [True, False, True, True, False]
    with pytest.raises(gate.GateError, match="shapes differ"):
        gate.distance(truth, truth[0])


def test_rows_on_small_weights_are_held_to_the_worst_cosine():
    truth = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert gate.alike("engine", truth, truth + 1e-4).held
    assert not gate.alike("engine", truth, np.array([[1.0, 0.0], [0.1, 1.0]])).held


def test_targets_of_ratios_and_of_bounds(monkeypatch):
    seconds = {"loop": 6.0, "engine": 2.0, PRODUCTS: 1.0, STREAM: 0.5}
    monkeypatch.setattr(case, "take_turns", lambda contenders, *_: {name: measure.timing([seconds[name]] * 3, 1) for name in contenders})
    targets = [Target("fast", "loop", "engine", least=4), Target("flat", "loop", "engine", most=3.5), Target("near", BOUND, "engine", least=0.5),
               Target("of a peer that is not here", "peer", "engine", least=1)]
    found = case.measure(simple(bounds={PRODUCTS: lambda: None, STREAM: lambda: None}, targets=targets))
    assert found.bound == PRODUCTS  # the longer of the two
    of = [(met.target.text, met.found.median, met.held) for met in found.targets]
    assert of == [("fast", 3.0, False), ("flat", 3.0, True), ("near", 0.5, True)]
    assert set(found.shares) == {"loop", "engine"}


def test_a_peer_that_is_not_there_is_named_and_another_error_is_not_hidden():
    def absent() -> None:
        raise ImportError("no module named onnxruntime")

    def wrong() -> None:
        raise TypeError("a bug")

    made = simple()
    made.peer("ONNX Runtime", absent)
    made.peer("torch.compile", lambda: lambda: None)
    assert made.left_out == {"ONNX Runtime": "ImportError: no module named onnxruntime"}
    assert list(made.contenders) == ["loop", "engine", "torch.compile"]
    with pytest.raises(TypeError):
        made.peer("broken", wrong)


def test_products_are_those_of_the_linear_layers():
    module = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    found = bounds.linear_products(module, lambda: module(torch.zeros(2, 11, 5)))
    assert found == [bounds.Product(22, 5, 7), bounds.Product(22, 7, 3)]
    assert [p.operations for p in found] == [2 * 22 * 5 * 7, 2 * 22 * 7 * 3]
    assert sum(p.operations for p in bounds.with_gradients(found)) == 3 * sum(p.operations for p in found)
    assert not any(layer._forward_hooks for layer in module)
    bounds.products(found)()
    bounds.stream(3_000)()
    bounds.batched_products(3, 2, 5, 7)()


def measured() -> dict:
    """What a run with two counts of threads holds, the peer missing from one of them."""
    def result(threads: int) -> dict:
        scale = 1.0 / threads
        timings = {"loop": 6.0, "engine": 2.0, PRODUCTS: 1.0, STREAM: 0.5} | ({"peer": 3.0} if threads == 1 else {})
        shares = {name: measure.Ratio(1 / value, 1 / value, 1 / value) for name, value in timings.items() if name in ("loop", "engine", "peer")}
        met = [case.Met(Target("fast", "loop", "engine", least=4), measure.Ratio(3.0, 2.9, 3.1), False),
               case.Met(Target("near", BOUND, "engine", least=0.4), measure.Ratio(0.5, 0.5, 0.5), True)]
        return case.Result("nothing", "nothing at all", {name: measure.timing([value * scale] * 3, 1) for name, value in timings.items()}, PRODUCTS,
                           shares, met, [], 3e9, 2e8, {} if threads == 1 else {"peer": "ImportError: not here"}).to_json()

    curve = Curve("lengths", "a prompt", "tokens", {"engine": [(16, 0.001, 0.0), (64, 0.004, 1.5)]}).to_json()
    held: dict = {"runs": {}}
    for count in (1, 2):
        report.add(held, {"threads": count, "environment": {"python": f"3.1{count}", "threads": str(count)}, "results": [result(count), curve]})
    return json.loads(json.dumps(held))


def first(held: dict) -> dict:
    return held["runs"]["1"]["cases"]["nothing"]


def test_tables_say_what_was_found_what_was_asked_for_and_who_is_missing():
    text = report.markdown(measured())
    assert text.startswith("python 3.11 and 3.12\n")
    assert "| nothing at all | fast | at least 4 | 3.00 (2.90 to 3.10), missed | 3.00 (2.90 to 3.10), missed |" in text
    assert "| nothing at all | near | 40% of the bound | 50% | 50% |" in text
    assert "| nothing at all | engine | 2000 ms, 50% of bound | 1000 ms, 50% of bound |" in text
    assert "| nothing at all | peer | 3000 ms, 33% of bound |  |" in text
    assert "| a prompt, tokens | engine | 16: 1.00 ms, 0 MB; 64: 4.00 ms, 2 MB |" in text
    assert '- Not in "nothing at all": peer. ImportError: not here' in text


@pytest.mark.usefixtures("drawn")
def test_pictures_are_drawn_of_what_there_is(tmp_path):
    held = measured()
    assert [path.name for path in pictures.draw(held, tmp_path)] == ["roofline.png", "cost.png"]
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    pictures.draw(held, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    for run in held["runs"].values():
        run["cases"]["nothing"]["bound"], run["curves"] = None, {}
    assert pictures.draw(held, tmp_path / "none") == []


def test_a_real_case_is_measured_and_survives_json():
    from experiments.benchmarks import wavecore

    found = case.measure(dataclasses.replace(wavecore.write(1), rounds=3))
    held = json.loads(json.dumps(found.to_json()))
    assert set(held["timings"]) == {wavecore.KERNEL_FULL, wavecore.KERNEL_LAZY}
    assert all(0 < timing["shortest"] <= timing["median"] for timing in held["timings"].values())


def test_groups_run_apart_and_a_red_one_is_told(monkeypatch, tmp_path, capfd):
    commands = []

    def run(command: list[str], env: dict[str, str], check: bool) -> subprocess.CompletedProcess:
        commands.append((command[command.index("--group") + 1], env["OMP_NUM_THREADS"]))
        place = Path(command[command.index("--result") + 1])
        if "delta" in command:
            return subprocess.CompletedProcess(command, -9)
        count, group = int(env["OMP_NUM_THREADS"]), command[command.index("--group") + 1]
        case = {**first(measured()), "name": group, "title": f"{group} {len(commands)}"}
        place.write_text(json.dumps({"threads": count, "environment": {"python": "3.11"}, "results": [case]}))
        return subprocess.CompletedProcess(command, bench.RED if "lam" in command else 0)

    monkeypatch.setattr(bench.subprocess, "run", run)
    assert bench.run(["mamba"], [1], tmp_path) == 0
    assert bench.run(["mamba", "lam", "delta"], [1], tmp_path) == 1
    assert commands == [("mamba", "1"), ("mamba", "1"), ("lam", "1"), ("delta", "1")]
    assert "delta ended with status -9 and without a result" in capfd.readouterr().err
    assert bench.run(["delta"], [1], tmp_path) == 1
    assert bench.run(["lam", "memory"], [1, 2], tmp_path) == 1
    assert commands[5:] == [("lam", "1"), ("lam", "2"), ("memory", "2")]
    held = json.loads((tmp_path / "bench.json").read_text())["runs"]
    titles = {count: {name: case["title"] for name, case in run["cases"].items()} for count, run in held.items()}
    assert titles == {"1": {"mamba": "mamba 2", "lam": "lam 6"}, "2": {"lam": "lam 7", "memory": "memory 8"}}  # the newest of each


def test_an_output_that_cannot_be_written_is_refused_before_anything_runs(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert bench.run(["mamba"], [1], tmp_path / "file" / "below") == 2
    assert "--output: cannot write into" in capsys.readouterr().err


def test_another_file_of_that_name_is_left_alone(tmp_path, capsys):
    (tmp_path / "bench.json").write_text("[1, 2]")
    assert bench.run(["mamba"], [1], tmp_path) == 2
    assert "is no result of this benchmark" in capsys.readouterr().err and (tmp_path / "bench.json").read_text() == "[1, 2]"


@pytest.mark.parametrize("arguments, expected", [
    (["mumba"], "GROUP must be one of mamba, lam"), (["--threads", "0"], "--threads must lie between 1 and"),
])
def test_a_wrong_command_line_is_refused(arguments, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2 and expected in capsys.readouterr().err
