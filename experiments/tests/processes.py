"""Runs of several processes for `test_distributed`: `python -m experiments.tests.processes torch|jax ROOT TEXT` prints what became of them.

The processes of a run are forked from one that has imported the framework and composed the configuration, so that both are done once.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from conf.schema import DistributedConfig, TrainConfig
from experiments import cli, distributed, train
from experiments.errors import RunError
from experiments.tests import process_steps

STEPS = 8
MODEL = [
    "experiment=smoke", "tracker=none", "long_context=false", "data.validation_fraction=0.3", "backend.dtype=float64", "model.depth=1",
    f"training.steps={STEPS}", "training.batch_size=8", "training.accumulation=2", "training.monitor_every=4", "checkpoint.every=4",
    "evaluation.every=4", "evaluation.sample_tokens=0", "evaluation.tokens=51", "evaluation.final_tokens=51",
    "loss.state_penalty=[ssm,wkv]", "loss.state_norm=2.0", "loss.state_weight=0.3", "monitors.drift_tokens=2000000", "monitors.drift_chunk=1000000",
]
Job = Callable[[], int]  # what a process does, and its exit code
Fault = Callable[[int], None]  # of the number of the process, before it


def launch(root: Path, name: str, jobs: Sequence[Job], environment: dict[str, str], fault: Fault | None = None) -> dict[str, Any]:
    """One process for each job; exit codes, stdout and stderr of each, and the seconds until the last one ended.

    A process that a fault stopped goes on when another one has ended.
    """
    started, children, ended = time.monotonic(), [], {}
    for rank, job in enumerate(jobs):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ.update(environment | {"RANK": str(rank), "WORLD_SIZE": str(len(jobs))})
            _child(root / f"{name}.{rank}", job, rank, fault)
    while len(ended) < len(children):
        child, status = os.wait()
        ended[child] = os.waitstatus_to_exitcode(status)
        for other in set(children) - ended.keys():
            os.kill(other, signal.SIGCONT)
    codes = [ended[child] for child in children]
    written = {kind: [(root / f"{name}.{rank}.{kind}").read_text() for rank in range(len(children))] for kind in ("out", "err")}
    return {"codes": codes, "seconds": time.monotonic() - started, **written}


def _child(path: Path, job: Job, rank: int, fault: Fault | None) -> None:
    """The rest of a forked process."""
    for stream, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(path.with_name(f"{path.name}.{kind}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    code = 70
    try:
        if fault is not None:
            fault(rank)
        code = job()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 71
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def command(arguments: list[str]) -> Job:
    """A run as the command line makes it."""
    return lambda: cli.main(["train", *arguments])


def run(config: TrainConfig, folder: Path, stop_at: int | None = None, *, on: bool = False, **sections: Any) -> Job:
    """A run in a folder that is known, as `command` makes it but for Hydra, which takes longer than the training does.

    `on`: in the same process another one goes on from where it stopped.
    """
    config = replace(config, **sections)
    runs = [replace(config, training=replace(config.training, stop_at=stop_at)), *([replace(config, resume="auto")] if on else [])]

    def job() -> int:
        try:
            for each in runs:
                train.run(each, folder)
            return 0
        except RunError as error:
            cli._say(error)
            return 2
        finally:
            distributed.close()

    return job


def brief(rank: int) -> None:
    """The run ends with its last step."""
    train._conclude = lambda *_: {}  # type: ignore[assignment]


def poisoned(victim: int) -> Fault:
    """The loss of the last two rows of the first micro-batch of step 3, which process `victim` has, is NaN."""

    def fault(rank: int) -> None:
        from experiments.steps import torch_step

        original, calls = torch_step.loss_parts, [0]

        def parts(logits: Any, *rest: Any) -> Any:
            calls[0] += 1
            if calls[0] == 5:
                logits = logits.clone()
                logits[-2:] *= float("nan")
            return original(logits, *rest)

        brief(rank)
        if rank == victim:
            torch_step.loss_parts = parts

    return fault


def struck(victim: int, by: signal.Signals) -> Fault:
    """Process `victim` is killed or stopped at the beginning of its step 6."""

    def fault(rank: int) -> None:
        from experiments.steps.base import TrainStep

        original, calls = TrainStep.step, [0]

        def step(self: TrainStep, *given: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == 6:
                os.kill(os.getpid(), by)
            return original(self, *given, **options)

        brief(rank)
        if rank == victim:
            TrainStep.step = step  # type: ignore[method-assign]

    return fault


def stopped(settings: DistributedConfig) -> Job:
    """Process 1 is stopped while process 0 waits for it."""

    def job() -> int:
        group = distributed.join(replace(process_steps.configuration(*process_steps.JAX[0]), distributed=settings))
        group.share(lambda: "all are here")
        if not group.main:
            os.kill(os.getpid(), signal.SIGSTOP)
        try:
            group.share(lambda: "all are still here")
        except RunError:  # of the one that was stopped, which finds itself alone if it is not aborted before
            return 2 if not group.main else 1
        return 0

    return job


def with_torch(root: Path, model: list[str]) -> dict[str, Any]:
    """Eight steps of one process; the same by DDP, FSDP2 and one process in turn; a NaN in one process of two, and in the only one.

    Eight by DDP, and the same where process 0 is killed at step 6 and two others go on; process 1 of FSDP2 stopped at step 6. Other models.
    """
    import torch

    import runtime.torch_backend  # noqa: F401

    torch.set_num_threads(1)
    model = [*model, "backend=torch"]
    base, local = cli.validate(cli.composed(model)), {"GLOO_SOCKET_IFNAME": "lo"}

    def meeting(kind: str, name: str, timeout: float = 600.0) -> DistributedConfig:
        return DistributedConfig(kind, address=f"file://{root}/{name}.meeting", timeout=timeout)

    def group(kind: str, folder: Path, stop_at: int | None = None, name: str = "", timeout: float = 600.0, **sections: Any) -> list[Job]:
        return [run(base, folder, stop_at, distributed=meeting(kind, name or folder.name, timeout), **sections)] * 2

    def models(kind: str) -> list[Job]:
        return [process_steps.job(root, kind, process_steps.TORCH, meeting(kind, f"models.{kind}"))] * 2

    asked = ["distributed=ddp", f"distributed.address=file://{root}/meeting", f"output_dir={root}/chain", "training.stop_at=3"]
    runs = {
        "one": launch(root, "one", [run(base, root / "one")], {}, brief),
        "ddp": launch(root, "ddp", [command([*model, *asked])] * 2, local, brief),
    }
    (chain,) = (root / "chain").iterdir()  # the two processes are in the same folder
    # The first step that is skipped goes back to a good state.
    poison = {"checkpoint": replace(base.checkpoint, every=2), "recovery": replace(base.recovery, patience=1)}
    return runs | {
        "fsdp2": launch(root, "fsdp2", group("fsdp2", chain, 6, resume="auto"), local),
        "again": launch(root, "again", [run(base, chain, resume="auto")], {}, brief),
        "poisoned": launch(root, "poisoned", group("fsdp2", root / "poisoned", 4, **poison), local, poisoned(1)),
        "one_poisoned": launch(root, "one_poisoned", [run(base, root / "one_poisoned", 4, **poison)], {}, poisoned(0)),
        "whole": launch(root, "whole", group("ddp", root / "whole"), local, brief),
        "killed": launch(root, "killed", group("ddp", root / "killed"), local, struck(0, signal.SIGKILL)),
        "resumed": launch(root, "resumed", group("ddp", root / "killed", name="resumed", resume="auto"), local, brief),
        "stopped": launch(root, "stopped", group("fsdp2", root / "stopped", timeout=5.0), local, struck(1, signal.SIGSTOP)),
        **{f"models.{kind}": launch(root, f"models.{kind}", models(kind), local) for kind in ("ddp", "fsdp2")},
    }


def with_jax(root: Path, model: list[str]) -> dict[str, Any]:
    """Eight steps: half of them by two processes of two devices each, of which process 0 is killed at step 6, the other half by one process of four.

    Process 1 of two stopped. Other models, by two processes.
    """
    import runtime.jax_backend  # noqa: F401

    def meeting(rank: int, port: int, timeout: float = 600.0) -> DistributedConfig:
        return DistributedConfig("jax", f"127.0.0.1:{port}", processes=2, process=rank, timeout=timeout)

    first, second, third = _ports(3)
    base = cli.validate(cli.composed([*model, "backend=jax", "distributed=jax", "evaluation.every=100"]))
    mesh = root / "mesh"
    two = [run(base, mesh, 4, on=True, distributed=meeting(rank, first)) for rank in range(2)]
    models = [process_steps.job(root, "jax", process_steps.JAX, meeting(rank, third)) for rank in range(2)]
    return {
        "two": launch(root, "two", two, _devices(2), struck(0, signal.SIGKILL)),
        "four": launch(root, "four", [run(base, mesh, resume="auto")], _devices(4), brief),
        "stopped": launch(root, "stopped", [stopped(meeting(rank, second, 5.0)) for rank in range(2)], _devices(1)),
        "models": launch(root, "models", models, _devices(1)),
    }


def _ports(count: int) -> list[int]:
    """Free ones, all different."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    found = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return found


def _devices(count: int) -> dict[str, str]:
    """So many devices on the CPU, and programs that are compiled quickly: these are run a few times."""
    flags = f"--xla_force_host_platform_device_count={count} --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    if metadata.version("jaxlib").startswith("0.10."):  # XLA aborts on flags that it does not know; this one is not for ever
        flags += " --xla_cpu_use_fusion_emitters=false"
    return {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


if __name__ == "__main__":
    framework, root, text = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    made = {"torch": with_torch, "jax": with_jax}[framework]
    print(json.dumps(made(root, [*MODEL, f"data.path={text}"])))
