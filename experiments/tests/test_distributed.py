"""Several processes or devices train as one does: the same curve, the same checkpoints, one voice, and none is left waiting."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.schema import DistributedConfig, TrainingConfig
from experiments import checkpoint, cli, distributed, report
from experiments.distributed.group import Group
from experiments.errors import EchoError, RunError
from experiments.tests import process_steps, tiny
from experiments.tests.processes import STEPS

LEFT_OUT = ("time/", "memory/", "leak/")  # of a process, not of what it trains


def processes(framework: str, root: Path, text: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "experiments.tests.processes", framework, str(root), str(text)], capture_output=True, text=True, timeout=900,
        check=False, cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def torch_runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("torch")
    return root, processes("torch", root, text)


@pytest.fixture(scope="module")
def jax_runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("jax")
    return root, processes("jax", root, text)


def same_run(found: Path, expected: Path, bound: float, steps: int = STEPS, updates: int = STEPS) -> None:
    """Every number that was logged, and the newest checkpoint, to `bound` relative to the larger of it and one."""
    rows = [
        {(row["step"], name): value for row in report.read_metrics(folder / "metrics.jsonl") for name, value in row.items() if kept(name)}
        for folder in (found, expected)
    ]
    assert len([key for key in rows[1] if key[1] == "train/loss"]) == steps
    # Runs that are stopped end with a validation of their own, in another place than one that is not.
    logged = {key for key in rows[1] if not key[1].startswith(("final/", "validation/", "drift/"))}
    assert logged <= rows[0].keys()
    for key in logged:
        assert rows[0][key] == (None if rows[1][key] is None else pytest.approx(rows[1][key], rel=bound, abs=bound)), key
    first, second = checkpoint.newest(found), checkpoint.newest(expected)
    assert first is not None and second is not None and (first.step, first.updates) == (second.step, second.updates) == (steps, updates)
    for kind in ("arrays", "optimiser", "states"):
        mine, other = getattr(first, kind), getattr(second, kind)
        assert mine.keys() == other.keys()
        for name in other:
            np.testing.assert_allclose(mine[name], other[name], rtol=bound, atol=bound, err_msg=name)
    assert second.arrays["blocks.0.rwkv.writes"] == updates // 2  # the bank was written, and has been read


def kept(name: str) -> bool:
    return not name.startswith(LEFT_OUT) and name != "step"


def test_ddp_fsdp2_and_one_process_go_on_from_each_other(torch_runs: tuple[Path, dict[str, Any]]) -> None:
    """Steps 1 to 3 by DDP, 4 to 6 by FSDP2, the rest by one process: as one process from the start. float64 parts only what differs in meaning."""
    root, runs = torch_runs
    for name in ("one", "ddp", "fsdp2", "again"):
        assert set(runs[name]["codes"]) == {0}, (name, runs[name]["err"])
    (folder,) = (root / "chain").iterdir()  # processes 0 and 1 agree on where they are, and so do the runs that go on
    same_run(folder, root / "one", 1e-11)
    assert json.loads((folder / "summary.json").read_text())["steps"] == 6  # of the FSDP2 run, whose conclusion is process 0's alone
    assert "group was 2 processes, ddp, is 2 processes, fsdp2" in runs["fsdp2"]["err"][0]
    assert "group was 2 processes, fsdp2, is one process" in runs["again"]["err"][0]


def test_only_process_0_speaks(torch_runs: tuple[Path, dict[str, Any]]) -> None:
    _, runs = torch_runs
    assert "bits per byte" in runs["fsdp2"]["out"][0]
    for name in ("ddp", "fsdp2"):
        assert "How to look at this" in runs[name]["out"][0]
        assert (runs[name]["out"][1], runs[name]["err"][1]) == ("", "")
    assert runs["ddp"]["err"][0] == ""


def test_loss_that_is_nan_in_one_process_is_skipped_by_all_and_they_go_back_together(torch_runs: tuple[Path, dict[str, Any]]) -> None:
    """As one process does whose loss is NaN in the same micro-batch."""
    root, runs = torch_runs
    assert runs["poisoned"]["codes"] == [0, 0] and runs["one_poisoned"]["codes"] == [0], (runs["poisoned"]["err"], runs["one_poisoned"]["err"])
    events = [json.loads(line) for line in (root / "poisoned" / "events.jsonl").read_text().splitlines()]
    assert [(event["step"], event["kind"], event.get("back_to")) for event in events] == [(3, "nonfinite_loss", None), (3, "explosion", 2)]
    same_run(root / "poisoned", root / "one_poisoned", 1e-11, steps=4, updates=3)


def one_line(runs: dict[str, Any], name: str, begins: str, rank: int = 0) -> None:
    """What process `rank` said on stderr."""
    (line,) = runs[name]["err"][rank].strip().splitlines()
    assert line.startswith(f"groundwave: {begins}"), line


def test_process_that_is_killed_ends_the_other_with_one_line_and_two_others_go_on_to_the_same_bits(
    torch_runs: tuple[Path, dict[str, Any]]
) -> None:
    root, runs = torch_runs
    assert runs["killed"]["codes"] == [-9, 2], runs["killed"]["err"]
    one_line(runs, "killed", "process 1: distributed: another of the 2 processes ended or did not answer in time: ", rank=1)
    assert runs["killed"]["seconds"] < 300  # of a timeout of 600
    assert runs["whole"]["codes"] == runs["resumed"]["codes"] == [0, 0], runs["resumed"]["err"]
    assert "went on from the checkpoint of step 4" in runs["resumed"]["out"][0]
    same_run(root / "killed", root / "whole", 0.0)


def test_process_that_hangs_ends_the_other_with_one_line(torch_runs: tuple[Path, dict[str, Any]]) -> None:
    root, runs = torch_runs
    assert runs["stopped"]["codes"] == [2, 2], runs["stopped"]["err"]
    for rank, speaker in enumerate(("", "process 1: ")):
        one_line(runs, "stopped", f"{speaker}distributed: another of the 2 processes ended or did not answer in time: ", rank)
    assert "5000ms" in runs["stopped"]["err"][0] and runs["stopped"]["seconds"] < 300
    found = checkpoint.newest(root / "stopped")
    assert found is not None and found.step == 4


def test_jax_process_that_hangs_ends_the_other_with_one_line(jax_runs: tuple[Path, dict[str, Any]]) -> None:
    _, runs = jax_runs
    assert runs["stopped"]["codes"][0] == 2 and runs["stopped"]["codes"][1] in (0, 2), runs["stopped"]["err"]
    one_line(runs, "stopped", "distributed: aborted by JAX, as where another of the 2 processes ended or did not answer in time")
    assert runs["stopped"]["seconds"] < 300


def test_two_jax_processes_and_four_devices_train_as_one_process_of_torch(
    jax_runs: tuple[Path, dict[str, Any]], torch_runs: tuple[Path, dict[str, Any]]
) -> None:
    """Steps 1 to 4 by two processes with two devices each, process 0 killed at step 6, steps 5 to the last by one process with four."""
    root, runs = jax_runs
    assert runs["two"]["codes"] == [-9, 2] and runs["four"]["codes"] == [0], (runs["two"]["err"], runs["four"]["err"])
    assert all(line.startswith("[Gloo]") for line in runs["two"]["out"][1].splitlines()) and runs["two"]["err"][0] == ""
    assert runs["two"]["out"][0].count("How to look at this") == 1
    one_line(runs, "two", "process 1: distributed: a", rank=1)  # of another that ended, or aborted by JAX, whichever is noticed first
    assert "group was 2 processes, 4 devices, jax, is one process, 4 devices, jax" in runs["four"]["err"][0]
    assert "went on from the checkpoint of step 4" in runs["four"]["out"][0]
    same_run(root / "mesh", torch_runs[0] / "one", 1e-9)  # as the frameworks agree in `test_steps`


@pytest.mark.parametrize(("model", "backend"), [*process_steps.TORCH, *process_steps.JAX])
def test_other_models_train_as_in_one_process(model: str, backend: str, request: pytest.FixtureRequest) -> None:
    """Losses, parameters, moments and carried states of two steps, in every process, by DDP and FSDP2, or by two processes of JAX."""
    framework, kinds, bound = ("jax", ("jax",), 1e-9) if backend == "jax" else ("torch", ("ddp", "fsdp2"), 1e-12)
    root, runs = request.getfixturevalue(f"{framework}_runs")
    expected = process_steps.trained(model, "torch")
    for kind in kinds:
        run = runs["models" if kind == "jax" else f"models.{kind}"]
        assert run["codes"] == [0, 0], run["err"]
        for rank in range(2):
            with np.load(root / f"{kind}.{model}.{backend}.{rank}.npz") as found:
                assert set(found.files) == expected.keys()
                for name, value in expected.items():
                    np.testing.assert_allclose(found[name], value, rtol=bound, atol=bound, err_msg=f"{kind} {rank} {name}")


class Told(Group):
    """Process 1, which is told what process 0 sends."""

    rank, size, parts = 1, 2, 2

    def __init__(self, message: bytes) -> None:
        self._message = message

    def _send(self, message: bytes | None) -> bytes:
        if not self._message:
            raise RuntimeError("Connection closed by peer")
        return self._message

    def _lost(self, error: RuntimeError) -> str | None:
        return str(error) if "closed" in str(error) else None


class Telling(Told):
    """Process 0, whose messages are kept."""

    rank = 0

    def _send(self, message: bytes | None) -> bytes:
        self._message = message or b""
        return self._message


def test_what_process_0_finds_or_cannot_do_is_shared() -> None:
    first = Telling(b"")
    assert first.share(lambda: {"a": 1}) == {"a": 1} and Told(first._message).share(lambda: 1 / 0) == {"a": 1}
    with pytest.raises(RunError, match="no such folder"):
        first.share(failing)
    with pytest.raises(EchoError, match="no such folder"):
        Told(first._message).share(lambda: None)
    with pytest.raises(RunError, match=r"another of the 2 processes ended .*: Connection closed by peer"):
        Told(b"").share(lambda: None)
    first.same("the text", "abc")
    Told(first._message).same("the text", "abc")
    with pytest.raises(RunError, match="the text is xyz here, abc in process 0"):
        Told(first._message).same("the text", "xyz")
    assert not first.broken
    with pytest.raises(RuntimeError, match="something else"), first.watched():
        raise RuntimeError("something else")
    assert first.broken


def test_what_goes_wrong_in_every_process_is_process_0s_and_breaks_no_group() -> None:
    first, second = Telling(b""), Told(b"")
    for group, kind in ((first, RunError), (second, EchoError)):
        with pytest.raises(RunError, match="no such folder") as found, group.watched(), group.alike():
            failing()
        assert type(found.value) is kind and not group.broken
    with pytest.raises(RunError, match="no such folder"), first.watched():
        first.share(failing)
    assert not first.broken
    with pytest.raises(RunError, match="no such folder") as alone, second.watched():
        failing()
    assert type(alone.value) is RunError and second.broken


def test_what_gloo_says_through_jax_is_a_lost_process_whatever_the_error() -> None:
    group = Told(b"")
    for error in (RuntimeError("connection closed"), ValueError("UNKNOWN: Gloo AllGather failed: connection closed")):
        with pytest.raises(RunError, match=r"another of the 2 processes ended .*: .*connection closed"), group.watched():
            raise error
    with pytest.raises(ValueError, match=r"^the shop is closed$"), group.watched():
        raise ValueError("the shop is closed")


def failing() -> None:
    raise RunError("no such folder")


def test_who_says_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.said(RunError("a")) == "a" and distributed.said(EchoError("a")) is None
    monkeypatch.setenv("RANK", "1")  # before the group is joined
    assert distributed.said(RunError("a")) is None
    monkeypatch.setattr(distributed, "_joined", [Told(b"")])
    assert distributed.said(RunError("a")) == "process 1: a" and distributed.said(KeyboardInterrupt("a")) is None


def test_who_is_silent_under_torchrun_waits_to_be_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(distributed.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    assert distributed.second_word(RunError("a")) is None and not waited  # not under torchrun
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert distributed.second_word(KeyboardInterrupt("a")) is None and not waited
    assert distributed.second_word(RunError("a")) == "process 1: a" and distributed.second_word(EchoError("a")) is None
    assert len(waited) == 2 and min(waited) > 5
    monkeypatch.setenv("RANK", "0")
    assert distributed.second_word(RunError("a")) is None and len(waited) == 2


@pytest.mark.parametrize(("name", "advice"), [("none", "add distributed=ddp"), ("jax", "start each without torchrun.* distributed.processes=2 ")])
def test_under_torchrun_only_what_torchrun_can_join(name: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match=rf"distributed.name='{name}': torchrun started 2 processes, and each would train alone; {advice}"):
        distributed.join(tiny.config("jax" if name == "jax" else "torch", distributed=DistributedConfig(name=name)))


@pytest.mark.parametrize("command", sorted(cli.COMMANDS.keys() - {"train"}))
def test_commands_that_are_for_one_process_refuse_those_of_torchrun(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main([command, f"output_dir={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"groundwave: {command} runs in one process: torchrun started 2, and each would do all of it; start it without torchrun"
    assert not list(tmp_path.iterdir())


def test_batch_is_held_to_the_number_of_parts() -> None:
    group = Told(b"")
    group.check(TrainingConfig(batch_size=8, accumulation=2))
    with pytest.raises(RunError, match="found batch_size=9 and accumulation=3"):
        group.check(TrainingConfig(batch_size=9, accumulation=3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "horovod"}, "name must be one of 'none', 'ddp', 'fsdp2', 'jax'"),
        ({"name": "ddp", "processes": 2}, "processes and process must be given together"),
        ({"name": "ddp", "processes": 2, "process": 2}, r"process must lie in \[0, processes\)"),
        ({"name": "fsdp2", "address": "here"}, "address of fsdp2 must be file:///FOLDER/FILE or tcp://HOST:PORT, found 'here'"),
        ({"name": "jax", "address": "here"}, "address of jax must be HOST:PORT or auto, found 'here'"),
        ({"name": "jax", "address": "here:80"}, "processes and process must be given with address='here:80'"),
        ({"name": "jax", "timeout": 0.0}, "timeout must lie in"),
    ],
)
def test_impossible_sections(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistributedConfig(**fields)


def test_group_is_joined_once_and_needs_to_be_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.join(tiny.config()) is distributed.ALONE
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RunError, match=r"the environment lacks RANK, .*; start with torchrun --nproc-per-node=2 .* distributed=ddp"):
        distributed.join(tiny.config(distributed=DistributedConfig(name="ddp")))
    monkeypatch.setattr(distributed, "_joined", [Told(b"")])
    with pytest.raises(RunError, match="in a group of 'none' already and cannot join one of 'ddp'"):
        distributed.join(tiny.config(distributed=DistributedConfig(name="ddp")))
