"""`debug=profiler`: some steps of training under the framework's own profiler, and a table of the operators that took longest.

torch: RUN/profile/trace.json, from torch.profiler. JAX: RUN/profile/plugins/profile/..., from jax.profiler. Both open in ui.perfetto.dev. The
table goes by time spent in an operator itself, without those that it calls: torch counts ATen's operators and ours, JAX the operations of the
compiled program by kind, after XLA has fused them. RUN/profile/operators.json holds all of its rows.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from conf.schema import TrainConfig

FOLDER = "profile"
OPERATORS = "operators.json"


@dataclass(frozen=True)
class Operator:
    """Calls of an operator and the seconds spent in it itself, over all profiled steps."""

    name: str
    calls: int
    seconds: float


class Profiler:
    """Profiles `debug.profile_steps` steps of a run, after `debug.profile_after` others have compiled and warmed what there is."""

    def __init__(self, config: TrainConfig, folder: Path, console: Console, start: int, main: bool = True) -> None:
        """`start`: number of steps done before. Of several processes the `main` one alone is profiled."""
        self._settings, self._folder, self._console = config.debug, folder / FOLDER, console
        self._first = start + config.debug.profile_after + 1
        self._end = min(self._first + config.debug.profile_steps, config.training.last_step + 1) if main else self._first
        self._trace = (_JaxTrace if config.backend.name in ("jax", "jax_compiled") else _TorchTrace)(self._folder)

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Around the step of that number."""
        if not self._first <= step < self._end:
            yield
            return
        if step == self._first:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._trace.start()
        try:
            yield
        except BaseException:
            self._trace.stop()
            raise
        if step == self._end - 1:
            self._trace.stop()
            operators = sorted(self._trace.operators(), key=lambda operator: -operator.seconds)
            lines = json.dumps([asdict(operator) for operator in operators], indent=1)
            (self._folder / OPERATORS).write_text(lines + "\n", encoding="utf-8")
            self._console.print(table(operators[: self._settings.operators], total=operators, steps=self._end - self._first))
            self._console.print(f"traces in {self._folder}; ui.perfetto.dev opens them", highlight=False)


class _TorchTrace:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._profile: Any = None

    def start(self) -> None:
        import torch

        self._profile = torch.profiler.profile()  # every kind of device that there is
        self._profile.start()

    def stop(self) -> None:
        self._profile.stop()
        self._profile.export_chrome_trace(str(self._folder / "trace.json"))

    def operators(self) -> list[Operator]:
        averages = self._profile.key_averages()
        return [Operator(each.key, each.count, max(each.self_cpu_time_total, each.self_device_time_total) / 1e6) for each in averages]


class _JaxTrace:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def start(self) -> None:
        import jax

        jax.profiler.start_trace(str(self._folder))

    def stop(self) -> None:
        import jax

        jax.profiler.stop_trace()

    def operators(self) -> list[Operator]:
        newest = max(self._folder.glob("plugins/profile/*/*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
        with gzip.open(newest, "rt", encoding="utf-8") as file:
            return own_time(json.load(file)["traceEvents"])


def own_time(events: Sequence[Mapping[str, Any]]) -> list[Operator]:
    """Operations of XLA in a Chrome trace (those that name their program), each without the time of those inside it on its thread.

    XLA numbers them; those of the same kind are one row.
    """
    chosen = [event for event in events if event.get("ph") == "X" and "hlo_op" in event.get("args", {})]
    own: dict[str, tuple[int, float]] = {}
    threads: dict[tuple[Any, Any], list[tuple[float, str]]] = {}
    for event in sorted(chosen, key=lambda event: (event["ts"], -event["dur"])):
        name, begin, length = re.sub(r"(\.\d+)+$", "", str(event["args"]["hlo_op"])), float(event["ts"]), float(event["dur"])
        open_events = threads.setdefault((event["pid"], event["tid"]), [])
        while open_events and open_events[-1][0] <= begin:
            open_events.pop()
        if open_events:
            calls, time = own[open_events[-1][1]]
            own[open_events[-1][1]] = (calls, time - length)
        calls, time = own.get(name, (0, 0.0))
        own[name] = (calls + 1, time + length)
        open_events.append((begin + length, name))
    return [Operator(name, calls, max(time, 0.0) / 1e6) for name, (calls, time) in own.items()]


def table(shown: Sequence[Operator], *, total: Sequence[Operator], steps: int) -> Table:
    """The heaviest operators, with their share of the time of all."""
    whole = sum(operator.seconds for operator in total) or 1.0
    made = Table(title=f"Operators that took longest, {steps} steps, time in each itself")
    made.add_column("operator", no_wrap=True, max_width=60)
    for name in ("calls", "ms per step", "share"):
        made.add_column(name, justify="right")
    for operator in shown:
        made.add_row(operator.name, str(operator.calls), f"{1e3 * operator.seconds / steps:.3f}", f"{100 * operator.seconds / whole:.1f} %")
    return made
