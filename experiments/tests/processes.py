"""Runs of several processes for `test_distributed`: `python -m experiments.tests.processes torch|jax ROOT TEXT` prints what became of them.

The processes of a run are forked from one that has imported the framework, so that it is imported once; each goes through the command line.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

STEPS = 8
MODEL = [
    "experiment=smoke", "tracker=none", "long_context=false", "data.validation_fraction=0.3", "backend.dtype=float64", "model.depth=1",
    f"training.steps={STEPS}", "training.batch_size=8", "training.accumulation=2", "training.monitor_every=4", "checkpoint.every=4",
    "evaluation.every=4", "evaluation.sample_tokens=0", "evaluation.tokens=51", "evaluation.final_tokens=51",
    "loss.state_penalty=[ssm,wkv]", "loss.state_norm=2.0", "loss.state_weight=0.3", "monitors.drift_tokens=2000000", "monitors.drift_chunk=1000000",
]
Fault = Callable[[int], None]  # of the number of the process, before its run


def launch(root: Path, name: str, arguments: Sequence[Sequence[str]], environment: dict[str, str], fault: Fault | None = None) -> dict[str, Any]:
    """One process for each list of arguments; exit codes, stdout and stderr of each, and the seconds until the last one ended."""
    started, children = time.monotonic(), []
    for rank, given in enumerate(arguments):
        children.append(os.fork())
        if children[-1] == 0:
            _child(root / f"{name}.{rank}", given, environment | {"RANK": str(rank), "WORLD_SIZE": str(len(arguments))}, rank, fault)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    written = {kind: [(root / f"{name}.{rank}.{kind}").read_text() for rank in range(len(children))] for kind in ("out", "err")}
    return {"codes": codes, "seconds": time.monotonic() - started, **written}


def _child(path: Path, arguments: Sequence[str], environment: dict[str, str], rank: int, fault: Fault | None) -> None:
    """The rest of a forked process."""
    for stream, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(path.with_name(f"{path.name}.{kind}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    code = 70
    try:
        os.environ.update(environment)
        from experiments import cli

        if fault is not None:
            fault(rank)
        code = cli.main(["train", *arguments])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 71
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def brief(rank: int) -> None:
    """The run ends with its last step."""
    from experiments import train

    train._conclude = lambda *_: {}  # type: ignore[assignment]


def poisoned(victim: int) -> Fault:
    """The loss of process `victim` is NaN in the first micro-batch of step 3."""

    def fault(rank: int) -> None:
        from experiments.steps import torch_step

        original, calls = torch_step.loss_parts, [0]

        def parts(logits: Any, *rest: Any) -> Any:
            calls[0] += 1
            return original(logits * float("nan") if calls[0] == 5 else logits, *rest)

        brief(rank)
        if rank == victim:
            torch_step.loss_parts = parts

    return fault


def killed(rank: int) -> None:
    """Process 1 ends at step 3, as one that is killed does."""
    from experiments.steps.base import TrainStep

    original, calls = TrainStep.step, [0]

    def step(self: TrainStep, *given: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            os._exit(9)
        return original(self, *given, **options)

    if rank == 1:
        TrainStep.step = step  # type: ignore[method-assign]


def with_torch(root: Path, model: list[str]) -> dict[str, Any]:
    """Eight steps of one process; the same by DDP, FSDP2 and one process in turn; a NaN in one process of two, and in the only one; a death."""
    import torch
    import torch.distributed.fsdp

    import runtime.torch_backend  # noqa: F401

    torch.set_num_threads(1)
    model = [*model, "backend=torch"]

    def group(kind: str, name: str, *more: str) -> list[list[str]]:
        return [[*model, f"distributed={kind}", f"distributed.address=file://{root}/{name}.meeting", "distributed.timeout=60", *more]] * 2

    poison = ["training.stop_at=4", "checkpoint.every=2", "recovery.patience=1"]  # the first step that is skipped goes back to a good state
    chain = f"output_dir={root}/chain"
    local = {"GLOO_SOCKET_IFNAME": "lo"}
    return {
        "one": launch(root, "one", [[*model, f"run_dir={root}/one"]], {}),
        "ddp": launch(root, "ddp", group("ddp", "ddp", chain, "training.stop_at=3"), local, brief),
        "fsdp2": launch(root, "fsdp2", group("fsdp2", "fsdp2", chain, "training.stop_at=6", "resume=auto"), local),
        "again": launch(root, "again", [[*model, chain, "resume=auto"]], {}),
        "poisoned": launch(root, "poisoned", group("fsdp2", "poisoned", f"run_dir={root}/poisoned", *poison), local, poisoned(1)),
        "one_poisoned": launch(root, "one_poisoned", [[*model, f"run_dir={root}/one_poisoned", *poison]], {}, poisoned(0)),
        "killed": launch(root, "killed", group("ddp", "killed", f"run_dir={root}/killed"), local, killed),
        "uneven": launch(root, "uneven", group("ddp", "uneven", f"run_dir={root}/uneven", "training.accumulation=8"), local),
    }


def with_jax(root: Path, model: list[str]) -> dict[str, Any]:
    """Eight steps: half of them by two processes of two devices each, the other half by one process of four."""

    import runtime.jax_backend  # noqa: F401

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = [*model, "backend=jax", "distributed=jax", "evaluation.every=100", f"output_dir={root}/mesh"]
    meeting = [f"distributed.address=127.0.0.1:{port}", "distributed.processes=2", "distributed.timeout=60", "training.stop_at=4"]
    return {
        "two": launch(root, "two", [[*model, *meeting, f"distributed.process={rank}"] for rank in range(2)], _devices(2), brief),
        "four": launch(root, "four", [[*model, "resume=auto"]], _devices(4), brief),
    }


def _devices(count: int) -> dict[str, str]:
    """So many devices on the CPU, and programs that are compiled quickly: these are run a few times."""
    flags = f"--xla_force_host_platform_device_count={count} --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    return {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


if __name__ == "__main__":
    framework, root, text = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    runs = {"torch": with_torch, "jax": with_jax}[framework]
    print(json.dumps(runs(root, [*MODEL, f"data.path={text}"])))
