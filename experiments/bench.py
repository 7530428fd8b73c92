"""The benchmark: `make bench`, or `python -m experiments.bench`.

Every group of cases runs in a process of its own, on as many processors as it may use threads, so that all frameworks see the same machine and
none starts with the memory of another. A case is timed only when its gate holds. What comes out: bench.json with every sample, bench.md with the
tables, pictures of the rooflines and of the cost against length and rows. They are written after every group, and a group that is measured again
takes the place of what bench.json held of it. Exit status 0; 1 where a gate was red or a group failed, and 2 for a wrong command line. A missed
target is a figure like any other.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GROUPS = ("mamba", "lam", "wavecore", "delta", "memory", "scaling")
ONCE = ("memory", "scaling")  # on the most threads alone
ALONE = ("memory",)  # with no framework in the process
RED = 3  # exit status of a group with a red gate


def usable() -> list[int]:
    """Processors that this process may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def run_group(group: str, threads: int, result: Path) -> int:
    """Measure the cases of one group in this process and write them to `result`. The frameworks are imported only now, on fewer processors."""
    processors = usable()[-threads:]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, processors)
    import cython_ext
    from experiments import environment
    from experiments.benchmarks.case import Case, measure
    from experiments.benchmarks.gate import GateError

    if group not in ALONE:
        import torch

        torch.set_num_threads(threads)
    cython_ext.set_num_threads(threads)
    found: list[dict[str, Any]] = []
    red = False
    for make in importlib.import_module(f"experiments.benchmarks.{group}").CASES:
        started = time.perf_counter()
        try:
            made = make(threads)
            measured = measure(made) if isinstance(made, Case) else made
        except GateError as error:
            print(f"  {error}", file=sys.stderr, flush=True)
            red = True
            continue
        print(f"  {measured.title}: {time.perf_counter() - started:.0f} s", flush=True)
        found.append(measured.to_json())
    described = environment.describe() | {"threads": str(threads)}
    result.write_text(json.dumps({"threads": threads, "environment": described, "results": found}))
    return RED if red else 0


def run(groups: Sequence[str], threads: Sequence[int], output: Path) -> int:
    """Run all groups, then write everything below `output`. Returns the exit status."""
    from experiments.benchmarks import pictures, report

    kept = output / "bench.json"
    try:  # now, not after half an hour
        report.write(output / ".probe", "")
        (output / ".probe").unlink()
    except OSError as error:
        print(f"--output: cannot write into {output}: {error.strerror or error}", file=sys.stderr)
        return 2
    try:
        held = json.loads(kept.read_text()) if kept.exists() else {"runs": {}}
        held["runs"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"{kept} is no result of this benchmark ({type(error).__name__}): move it away or choose another --output", file=sys.stderr)
        return 2
    status, done = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for count in threads:
            for group in (group for group in groups if group not in ONCE or count == max(threads)):
                print(f"{group}, {count} thread{'s' * (count > 1)}", flush=True)
                result = Path(folder) / f"{group}-{count}.json"
                command = [sys.executable, "-m", "experiments.bench", "--group", group, "--threads", str(count), "--result", str(result)]
                settings = {name: str(count) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
                ended = subprocess.run(command, env={**os.environ, **settings}, check=False).returncode
                status = max(status, 1 if ended else 0)
                if not result.exists():
                    print(f"  {group} ended with status {ended} and without a result", file=sys.stderr, flush=True)
                    continue
                report.add(held, json.loads(result.read_text()))
                report.write(kept, json.dumps(held, indent=1) + "\n")
                report.write(output / "bench.md", report.markdown(held))
                drawn, done = pictures.draw(held, output), done + 1
    if not done:
        return 1
    print("\n" + report.markdown(held))
    print("\n".join(str(path) for path in (kept, output / "bench.md", *drawn)))
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the benchmark. Returns the exit status."""
    every = len(usable())
    parser = argparse.ArgumentParser(prog="python -m experiments.bench", description="Times every model against what else its users could run.")
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"{', '.join(GROUPS)}; default: all")
    parser.add_argument("--threads", type=int, action="append", help=f"threads, and processors, of a run; may be repeated (default: 1 and {every})")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: runs/bench-TIME")
    parser.add_argument("--group", choices=GROUPS, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    threads = list(dict.fromkeys(chosen.threads or [1, every]))
    if unknown := [group for group in chosen.groups if group not in GROUPS]:
        parser.error(f"GROUP must be one of {', '.join(GROUPS)}, found {', '.join(unknown)}")
    if wrong := [count for count in threads if not 1 <= count <= every]:
        parser.error(f"--threads must lie between 1 and the {every} processors that this process may use, found {', '.join(map(str, wrong))}")
    if chosen.group:
        return run_group(chosen.group, threads[0], chosen.result)
    return run(chosen.groups or GROUPS, threads, chosen.output or Path("runs") / time.strftime("bench-%Y%m%d-%H%M%S"))


if __name__ == "__main__":
    sys.exit(main())
