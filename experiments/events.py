"""Events of a run: one line each in RUN/events.jsonl, in the terminal and in the tracker.

The file is only ever appended to: a run that is killed and goes on keeps the lines of the steps that are done again, below a line that
says where it went on. How many events of a kind led to a state of the run is in its checkpoints.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import report
from experiments.trackers import Tracker

EVENTS = "events.jsonl"


class Events:
    """`counts`: events by kind that led to the present state of the run."""

    def __init__(
        self, folder: Path, console: Console, tracker: Tracker, counts: Mapping[str, int] | None = None, *, writes: bool = True
    ) -> None:
        """`writes`: whether this process is the one of its group that writes."""
        self.path = folder / EVENTS
        self._console, self._tracker, self._writes = console, tracker, writes
        self.counts = dict(counts or {})

    def add(self, step: int, kind: str, message: str, *, level: str = "warning", counted: bool = True, **details: Any) -> None:
        """Write an event. `counted`: whether doing the same steps again would bring it about again, so that checkpoints count it."""
        if counted:
            self.counts[kind] = self.counts.get(kind, 0) + 1
        self.note(step, kind, message, level=level, **details)
        self._console.print(f"step {step}: {kind}: {message}", markup=False, highlight=False)
        self._tracker.log({f"event/{kind}": float(self.counts.get(kind, 1))}, step)

    def note(self, step: int, kind: str, message: str, *, level: str = "warning", **details: Any) -> None:
        """Write a line to the file alone, about what was shown already."""
        line = {"step": step, "kind": kind, "level": level, "message": message, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **details}
        if self._writes:
            self._write(json.dumps(report.finite(line)))

    def _write(self, line: str) -> None:
        try:
            with open(self.path, "ab+", buffering=0) as file:
                whole = True
                if file.tell():
                    file.seek(-1, 2)
                    whole = file.read(1) == b"\n"  # a kill may have cut the last line short
                file.write((("" if whole else "\n") + line + "\n").encode())
        except OSError as error:
            warnings.warn(f"an event could not be written to {self.path}: {error.strerror or error}", RuntimeWarning, stacklevel=3)
