"""`groundwave review [FOLDER ...]`: every W&B run below the folders in one `wandb leet`, or a list of them where there is no terminal.

`wandb leet` takes one folder that holds run folders, while each run of ours, and each job of a sweep, keeps its own below its folder. So
links to all of them are put into FOLDER/.review/wandb, made anew each time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from experiments import report
from experiments.errors import RunError
from experiments.folder import METRICS

FOLDERS = ("runs", "multirun", "outputs")
LINKS = ".review"


@dataclass(frozen=True)
class Logged:
    """One W&B folder and what the run's own files say of it."""

    folder: Path
    run: Path
    group: str
    model: str
    backend: str
    step: int | None
    bits: float | None
    finished: bool


def logged(folders: Sequence[Path]) -> list[Logged]:
    """Every W&B folder of a run below the folders, by run and time; a resumed run has several."""
    found = set()
    for folder in folders:
        for place in folder.glob("**/wandb/*run-*"):
            if place.is_dir() and not place.is_symlink() and LINKS not in place.parts and any(place.glob("*.wandb")):
                found.add(place)
    return [_described(place) for place in sorted(found, key=lambda place: (place.parent.parent.as_posix(), place.name))]


def _described(place: Path) -> Logged:
    run = place.parent.parent
    config, summary = _config(run / "config.yaml"), _summary(run / "summary.json")
    steps = [int(row["step"]) for row in report.read_metrics(run / METRICS) if "step" in row] if (run / METRICS).is_file() else []
    backend = config.get("backend")
    tracker = config.get("tracker")
    group = tracker.get("group") if isinstance(tracker, dict) else None
    bits = summary.get("validation_bits_per_byte")
    sweep = (run.parent / "multirun.yaml").is_file()
    return Logged(
        place, run, str(group or (run.parent.name if sweep else "")), str(config.get("architecture", "")),
        str(backend.get("name", "") if isinstance(backend, dict) else backend or ""), max(steps, default=None),
        float(bits) if bits is not None else None, bool(summary),
    )


def _config(path: Path) -> dict[str, Any]:
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, OmegaConfBaseException, YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _summary(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def link(runs: Sequence[Logged], root: Path) -> Path:
    """The folder for `wandb leet`: a link to each run, below `root`. Raises RunError if it cannot be written."""
    target = root / LINKS / "wandb"
    try:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for run in runs:
            (target / run.folder.name).symlink_to(run.folder.resolve(), target_is_directory=True)
    except OSError as error:
        raise RunError(f"review: cannot link the runs in {target}: {error.strerror or error}") from error
    return target


def lines(runs: Sequence[Logged]) -> list[str]:
    """A heading and a line for each run, in columns, however wide they get: this is what a pipe gets to see."""
    cells = [("run", "group", "model", "backend", "step", "bits per byte", "ended")]
    for run in runs:
        step, bits = "" if run.step is None else str(run.step), "" if run.bits is None else f"{run.bits:.4f}"
        cells.append((run.run.as_posix(), run.group, run.model, run.backend, step, bits, "yes" if run.finished else "no"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def main(arguments: Sequence[str] | None = None) -> int:
    """Open or list the runs. Returns the exit status of `wandb leet`. Raises RunError where there is no run."""
    parser = argparse.ArgumentParser(prog="groundwave review", description="every W&B run in one `wandb leet`")
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER", help=f"default: {', '.join(FOLDERS)}, as far as they are there")
    parser.add_argument("--list", action="store_true", help="list the runs, as where there is no terminal")
    chosen = parser.parse_args(arguments)
    folders = chosen.folders or [Path(name) for name in FOLDERS if Path(name).is_dir()]
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if missing:
        raise RunError(f"review: no folder {missing[0]}")
    runs = logged(folders)
    if not runs:
        where = ", ".join(map(str, folders)) or f"{', '.join(FOLDERS)} (none of them is here)"
        raise RunError(f"review: no W&B run below {where}; a run with tracker=wandb leaves one")
    target = link(runs, folders[0])
    if chosen.list or not (sys.stdin.isatty() and sys.stdout.isatty()):
        print("\n".join([f"{len(runs)} W&B runs", *lines(runs), f"in a terminal: wandb leet {target}"]))
        return 0
    return subprocess.run([sys.executable, "-m", "wandb", "leet", str(target)], check=False).returncode


if __name__ == "__main__":
    from experiments.cli import main as command

    sys.exit(command(["review", *sys.argv[1:]]))
