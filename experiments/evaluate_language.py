"""Tasks of a language model: `python -m experiments.evaluate task=validate|checklist|long_context model=RUN [backend=jax ...]`.

Each prints a table, gives its numbers, and leaves them in the run's own folder too (RUN/evaluation/TASK.json), where its report finds them.
`checklist` and `long_context` end with status 1 if something does not hold, `validate` if a number is not finite.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

from conf.distil_schema import EvaluateConfig
from conf.schema import DataConfig
from experiments import folder as folders
from experiments import report
from experiments.comparison_measure import process
from experiments.data import batches
from experiments.data.corpus import check_path
from experiments.opened import Opened, keep, open_model
from experiments.opened import check as check_model
from experiments.tasks import checklist, long_context
from experiments.tasks import validate as validation
from experiments.trackers import Tracker
from runtime.build import ENGINES, check_backend


def check(config: EvaluateConfig) -> None:
    """Raise RunError for what the configuration names and is not there."""
    check_model(str(config.model), config.backend)
    if config.path is not None:
        check_path(DataConfig(path=config.path), "path")


def open_for(config: EvaluateConfig) -> Opened:
    """The model that the configuration names, with as many threads as it says. Raises RunError."""
    opened = open_model(str(config.model), config.backend, config.path)
    threads = config.threads or opened.config.backend.threads
    if threads is not None:
        folders.threads(threads)
    return opened


def validate(config: EvaluateConfig, console: Console, folder: Path, tracker: Tracker) -> tuple[dict[str, Any], int]:
    """Numbers of `experiments.tasks.validate`."""
    opened = open_for(config)
    settings = opened.config
    lanes = batches.lanes(opened.held_out, config.tokens, settings.evaluation.batch_size)
    found = validation.run(
        opened.step(), lanes, opened.held_out, opened.tokenizer, settings.training.context, config.puzzles, settings.monitors
    )
    report.print_validation(console, found.rows())
    tracker.log(found.statistics(), 0)
    tracker.table("validate/table", ["measure", "figures", "says"], [list(row) for row in found.rows()], 0)
    values = {"validate": dataclasses.asdict(found), "rows": [list(row) for row in found.rows()], "backend": settings.backend.name}
    keep(opened.run, "validate", values)
    return values, 0 if found.finite else 1


def inspect(config: EvaluateConfig, console: Console, folder: Path, tracker: Tracker) -> tuple[dict[str, Any], int]:
    """The items of `experiments.tasks.checklist`, on the backend that was asked for, or the engine where there is one."""
    opened = open_for(config)
    name = config.backend or _engine(opened)
    seen = checklist.Inspection(
        opened.load(name), opened.held_out, config.repeats, lambda: opened.load(name), opened.config.monitors,
    )
    items = checklist.run(seen)
    report.print_checklist(console, [(item.name, item.held, item.text) for item in items], f"Production checklist: {config.model} on {name}")
    tracker.log({f"checklist/{item.name}": float(item.held) for item in items}, 0)
    tracker.table("checklist/table", ["item", "held", "figures"], [[item.name, item.held, item.text] for item in items], 0)
    values = {"checklist": [dataclasses.asdict(item) for item in items], "backend": name}
    keep(opened.run, "checklist", values)
    return values, 0 if all(item.held for item in items) else 1


def stream(config: EvaluateConfig, console: Console, folder: Path, tracker: Tracker) -> tuple[dict[str, Any], int]:
    """Rows and verdicts of `experiments.tasks.long_context`; the memory of each length is that of a process of its own."""
    opened = open_for(config)
    settings = opened.config.evaluation
    lengths = long_context.fitting(opened.held_out, config.lengths or settings.lengths)
    rows = long_context.run(opened.step(), opened.held_out, lengths, settings.chunk, settings.streams)
    name, threads = _engine(opened), config.threads or opened.config.backend.threads
    memory = {length: process(opened.model, name, length, settings.chunk, threads)["memory_megabytes"] for length in lengths}
    verdicts = long_context.verdicts(rows, settings.chunk, memory)
    report.print_long_context(console, rows)
    report.print_checklist(console, [(each.name, each.held, each.text) for each in verdicts], f"Long context: {config.model}")
    folder.mkdir(parents=True, exist_ok=True)
    picture = report.save(report.long_context_figure(rows), folder / "long_context")
    tracker.table("long_context/table", rows[0].columns(), [row.values() for row in rows], 0)
    tracker.table("long_context/verdicts", ["verdict", "held", "figures"], [[each.name, each.held, each.text] for each in verdicts], 0)
    tracker.image("long_context/plot", picture, 0)
    values = {
        "long_context": [dataclasses.asdict(row) for row in rows], "engine_megabytes": {str(length): value for length, value in memory.items()},
        "engine": name, "verdicts": [dataclasses.asdict(each) for each in verdicts], "backend": opened.config.backend.name,
    }
    keep(opened.run, "long_context", values)
    return values, 0 if all(each.held for each in verdicts) else 1


def _engine(opened: Opened) -> str:
    """The backend without a framework where the model has one and its kernels are built, else that of the run."""
    name = opened.config.architecture
    if (name, "cython") not in ENGINES:
        return opened.config.backend.name
    try:
        check_backend(name, "cython")
    except ImportError:
        return opened.config.backend.name
    return "cython"
