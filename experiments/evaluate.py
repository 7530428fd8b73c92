"""Score a model on a task: `python -m experiments.evaluate task=sts path=CSV model=FOLDER|teacher [backend=jax ...]`, or task=documents.

Those of a language model (validate, checklist, long_context) are in `experiments.evaluate_language`.

`TASKS` is the registry: a task checks what its configuration names, then runs in a folder and gives numbers and an exit status.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import runtime
from conf.distil_schema import LAM_TASKS, EvaluateConfig
from experiments import environment, opened, report, trackers
from experiments import evaluate_language as language
from experiments.distillation.teacher import Teacher, embeddings, locate
from experiments.errors import RunError
from experiments.folder import threads
from experiments.tasks import documents, sts
from experiments.trackers import Tracker

RESULT = "result.json"
TEACHER, ENGINE = "teacher", "cython"
DOCUMENTS = [5000, 10000, 20000]  # tokens


@dataclass(frozen=True)
class Task:
    """`check` raises RunError for what the configuration names and is not there; `run` returns numbers by name and an exit status."""

    check: Callable[[EvaluateConfig], None]
    run: Callable[[EvaluateConfig, Console, Path, Tracker], tuple[dict[str, Any], int]]


def check(config: EvaluateConfig) -> None:
    """Raise RunError for what the configuration names and is not there."""
    TASKS[config.task].check(config)


def run(config: EvaluateConfig, folder: Path) -> int:
    """Run the task and write its numbers into `folder`. Returns the exit status. Raises RunError for what the user can put right."""
    console = Console(soft_wrap=True)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"groundwave: {message}", file=sys.stderr)
        started = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        group = opened.group(str(config.model)) if config.tracker.name != "none" and config.task not in LAM_TASKS else None
        tracker = trackers.make(
            config.tracker, folder, settings=dataclasses.asdict(config), name=folder.name, group=group, tags=["evaluate", config.task], run_id=None,
        )
        try:
            values, status = TASKS[config.task].run(config, console, folder, tracker)
        finally:
            tracker.finish()
    found = {
        "task": config.task, "config": dataclasses.asdict(config), **values, "seconds": time.perf_counter() - started,
        "environment": environment.describe(),
    }
    (folder / RESULT).write_text(json.dumps(report.finite(found), indent=1) + "\n", encoding="utf-8")
    console.print(f"numbers: {folder / RESULT}", highlight=False, markup=False)
    return status


def _check_sts(config: EvaluateConfig) -> None:
    sts.read_pairs(Path(str(config.path)))
    if config.model == TEACHER:
        locate(config.teacher)
    else:
        _check_saved(config)


def _check_saved(config: EvaluateConfig) -> None:
    if not Path(str(config.model)).is_dir():
        raise RunError(f"model: no folder {config.model}; expected that of a saved LAM, or model=teacher")


def _run_sts(config: EvaluateConfig, console: Console, folder: Path, tracker: Tracker) -> tuple[dict[str, Any], int]:
    pairs = sts.read_pairs(Path(str(config.path)))
    encode, backend = _encoder(config)
    scores = sts.evaluate(encode, pairs)
    table = Table(title=f"STS: {scores.pairs} pairs of {Path(str(config.path)).name}")
    for name in ("model", "backend", "Spearman", "Pearson"):
        table.add_column(name, justify="right" if name in ("Spearman", "Pearson") else "left")
    table.add_row(str(config.model), backend, f"{scores.spearman:.4f}", f"{scores.pearson:.4f}")
    console.print(table)
    tracker.summary({"sts/spearman": scores.spearman, "sts/pearson": scores.pearson})
    return dataclasses.asdict(scores) | {"backend": backend}, 0


def _encoder(config: EvaluateConfig) -> tuple[Callable[[list[str]], np.ndarray], str]:
    """What embeds sentences, and the backend that it ran on."""
    if config.threads is not None:
        threads(config.threads)
    if config.model == TEACHER:
        teacher = Teacher(locate(config.teacher), min(config.max_tokens, config.teacher.max_tokens))
        return lambda texts: embeddings(teacher.embed, teacher.ids(texts), teacher.padding, config.batch_size), "transformers"
    lam = _saved(config)
    return lambda texts: lam.encode(texts, batch_size=config.batch_size, max_length=config.max_tokens), lam.backend


def _saved(config: EvaluateConfig) -> runtime.LAM:
    try:
        return runtime.LAM.from_pretrained(str(config.model), backend=config.backend or ENGINE)
    except (OSError, ValueError, ImportError) as error:
        raise RunError(f"model: {' '.join(str(error).split())}") from error


def _check_documents(config: EvaluateConfig) -> None:
    if config.model == TEACHER:
        raise RunError("model: task=documents needs the folder of a saved LAM; the teacher's positions end at 512 tokens")
    _check_saved(config)


def _run_documents(config: EvaluateConfig, console: Console, folder: Path, tracker: Tracker) -> tuple[dict[str, Any], int]:
    if config.threads is not None:
        threads(config.threads)
    lam = _saved(config)
    lengths = config.lengths or DOCUMENTS
    longest = max(lengths)
    if longest > lam.config.max_length:
        raise RunError(f"lengths: the model takes at most {lam.config.max_length} tokens, {longest} were asked for")
    rows = documents.run(lam, lengths)
    table = Table(title=f"Documents: {config.model} on {lam.backend}")
    for name in ("tokens", "seconds", "tokens/s", "memory, MB"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(f"{row.tokens}", f"{row.seconds:.2f}", f"{row.tokens_per_second:.0f}", f"{row.megabytes_above:.0f}")
    console.print(table)
    columns = [field.name for field in dataclasses.fields(documents.Row)]
    tracker.table("documents/table", columns, [list(dataclasses.astuple(row)) for row in rows], 0)
    return {"documents": [dataclasses.asdict(row) for row in rows], "backend": lam.backend}, 0


TASKS = {
    "sts": Task(_check_sts, _run_sts), "documents": Task(_check_documents, _run_documents),
    "validate": Task(language.check, language.validate), "checklist": Task(language.check, language.inspect),
    "long_context": Task(language.check, language.stream),
}


if __name__ == "__main__":
    from experiments.cli import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
