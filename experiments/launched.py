"""Jobs of a sweep that run in other processes (`launcher=joblib`, `launcher=slurm`): what each ended with, for the command to end with the worst.

A launcher pickles the function of a job, so nothing that a job appends to is seen here. Each leaves its exit status in its own folder instead.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser

from experiments.compose import jobs

STATUS = "status.json"


@dataclass(frozen=True)
class Expected:
    """How many jobs a sweep has, and the folder that theirs are in."""

    folder: Path
    count: int

    def statuses(self) -> list[int]:
        """The exit status of every job; 1, said in a line, for those that left none."""
        found = [int(json.loads(path.read_text(encoding="utf-8"))["status"]) for path in sorted(self.folder.glob(f"*/{STATUS}"))]
        lost = self.count - len(found)
        if lost > 0:
            print(f"groundwave: {lost} of {self.count} jobs below {self.folder} ended without a word", file=sys.stderr)
        return found + [1] * max(lost, 0)


def expected(arguments: Sequence[str]) -> Expected | None:
    """The jobs of a sweep with a run_dir, statuses of an earlier sweep in its folder removed; None for a single job."""
    parsed = get_args_parser().parse_args(list(arguments))
    if not parsed.multirun or parsed.help or parsed.hydra_help or parsed.cfg or parsed.info:
        return None
    overrides = OverridesParser.create().parse_overrides(parsed.overrides)
    folder = next((Path(str(item.value())) for item in overrides if item.get_key_element() == "run_dir"), None)
    if folder is None:
        return None
    for path in folder.glob(f"*/{STATUS}"):
        path.unlink()
    return Expected(folder, len(jobs(parsed.overrides)))


def restarted() -> bool:
    """Whether SLURM runs this job again, which it stopped before: what the job left is its own."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def run(job: Callable[[], int]) -> None:
    """Run a job in this process, which is not the command's, and write its status. A job that fails does not end the others."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        status = job()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    temporary = folder / f".{STATUS}"
    temporary.write_text(json.dumps({"status": status, "pid": os.getpid()}) + "\n", encoding="utf-8")
    os.replace(temporary, folder / STATUS)
