"""What every run writes into its folder, shows while it goes, and says at its end."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import report
from experiments.errors import RunError
from experiments.trackers import Tracker

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"


def progress_bar(console: Console) -> Progress:
    """A bar with the task's `figures` behind it, where the console is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))
    return Progress(*columns, console=console, disable=not console.is_terminal)


def plain(config: Any) -> dict[str, Any]:
    """A configuration as dicts, lists, strings and numbers."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def describe(folder: Path, config: Any, described: Mapping[str, str], data: Mapping[str, Any]) -> None:
    """Write config.yaml, environment.json and data.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(plain(config))), encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    (folder / "data.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def log(metrics: TextIO, tracker: Tracker, step: int, values: Mapping[str, float]) -> None:
    """A line of the metrics file, and the same numbers to the tracker. A full disk never stops a run: it is warned of once."""
    try:
        line = json.dumps(report.finite({"step": step, **values})) + "\n"
        os.write(metrics.fileno(), line.encode())  # past the file's buffer, which would keep what could not be written and fail on closing
    except OSError as error:
        warnings.warn(f"numbers could not be written to {metrics.name}: {error.strerror or error}", RuntimeWarning, stacklevel=2)
    tracker.log(values, step)


def checkpoint(folder: Path, step: int, keep: int, save: Callable[[Path], None]) -> None:
    """A saved model of `step` under the run's folder; all but the newest `keep` are dropped. Raises RunError if that fails."""
    root = folder / CHECKPOINTS
    whole(root / f"step-{step:08d}", save)
    for old in sorted(root.glob("step-*"))[:-keep]:
        try:
            shutil.rmtree(old)
        except OSError as error:
            raise RunError(f"checkpoint: cannot drop {old}: {error.strerror or error}") from error


def whole(target: Path, save: Callable[[Path], None]) -> None:
    """The folder `target`, written by `save` under another name, then renamed. Raises RunError if it cannot be written."""
    temporary = target.with_name(f".writing-{target.name}")
    try:
        target.parent.mkdir(exist_ok=True)
        save(temporary)
        os.rename(temporary, target)
    except OSError as error:
        raise RunError(f"checkpoint: cannot write {target}: {error.strerror or error}") from error


def whole_file(target: Path, text: str) -> None:
    """The file `target`, written under another name, then renamed. Raises RunError if it cannot be written."""
    temporary = target.with_name(f".writing-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        raise RunError(f"cannot write {target}: {error.strerror or error}") from error


def threads(count: int) -> None:
    """Threads of the kernels, and of torch where it is installed."""
    import cython_ext

    cython_ext.set_num_threads(count)
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(count)


def how_to_look(console: Console, tracker: Tracker, places: Sequence[tuple[str, str]]) -> None:
    """Print where things are: (what, where), and how to look at the tracker's own."""
    lines = ["How to look at this:", *(f"  {what:<13} {where}" for what, where in places)]
    if tracker.folder is not None:
        lines += [f"  {'W&B, here':<13} wandb leet {tracker.folder.parent}", f"  {'W&B, upload':<13} wandb sync {tracker.folder}"]
    console.print("\n".join(lines), highlight=False, markup=False)
