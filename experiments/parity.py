"""Parity as a run: `python -m experiments.parity [case=lam dtype=bfloat16 seed=[0,1] ...] [-m]`, the same as `groundwave parity`.

One battery for every case, precision and seed. Each writes its report into a folder of its own and is a run of the tracker, all of them in one
group; `parity.html` beside them shows them on one page, with earlier results of the same question as its history.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from conf.parity_schema import ALL, ParityConfig
from experiments import environment, parity_board, trackers
from experiments.errors import RunError
from experiments.folder import describe, how_to_look, plain
from experiments.trackers import Tracker
from parity_tests.harness import formats, html, loading, report, shown, summaries
from parity_tests.harness.battery import TIERS, Battery, Result
from parity_tests.harness.case import Case, CaseError
from parity_tests.harness.policy import Policy
from parity_tests.harness.records import ReportError

REPORT, PAGE = "parity.json", "parity.html"


@dataclass(frozen=True)
class Job:
    """One battery: what to call it and its folder, and the case with its precision and seed."""

    name: str
    case: Case
    dtype: str


def jobs(config: ParityConfig) -> list[Job]:
    """The batteries of a configuration, cases outermost. Raises RunError for a case, tier or regime that does not exist."""
    unknown = [name for name in config.tiers if name not in TIERS]
    if unknown:
        raise RunError(f"tiers: unknown tier {unknown[0]!r}; expected {', '.join(TIERS)}")
    found: list[Job] = []
    for case in _cases(config):
        for dtype in config.dtypes:
            for seed in config.seeds:
                try:
                    made = replace(case, dtypes=tuple(dict.fromkeys(("float64", dtype))), seed=seed, jit=config.jit and case.jit,
                                   regimes=tuple(config.regimes) or case.regimes)
                except ValueError as error:
                    raise RunError(f"regimes: {error}") from error
                name = re.sub(r"[^\w.+-]+", "_", f"{case.name}-{dtype}-seed{seed}")
                same = sum(other.name.partition("~")[0] == name for other in found)
                found.append(Job(f"{name}~{same + 1}" if same else name, made, dtype))
    return found


def _cases(config: ParityConfig) -> list[Case]:
    try:
        others = [case for name in config.cases if ":" in name for case in loading.load(name)]
        names = [name for name in config.cases if ":" not in name]
        known = {case.name: case for case in loading.load(config.source)} if names else {}
    except CaseError as error:
        raise RunError(f"case: {error}") from error
    if names == [ALL]:
        return list(known.values())
    missing = [name for name in names if name not in known]
    if missing:
        raise RunError(f"case: {config.source} has no {missing[0]!r}; expected {ALL}, file.py:name, or of {', '.join(known)}")
    return [*(known[name] for name in names), *others]


def earlier(config: ParityConfig, folder: Path) -> list[Result]:
    """Results in the reports below `history`, whoever wrote them, those of this run left out; a report that cannot be read is said in a line."""
    if config.history is None or not Path(config.history).is_dir():
        return []
    files = [path for path in Path(config.history).rglob("*.json") if folder.resolve() not in path.resolve().parents and _is_report(path)]
    files.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    found: dict[tuple, Result] = {}  # a copy of a report is no other result
    for path in files[:config.history_files]:
        try:
            found |= {(summaries.key(result), result.meta.get("time", str(path))): result for result in shown.read([path])[0]}
        except ReportError as error:
            print(f"groundwave: left out of the history: {error}", file=sys.stderr)
    return list(found.values())


def _is_report(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return b'"parity-report/' in file.read(64)
    except OSError:
        return False


def run(config: ParityConfig, folder: Path, *, group: str | None = None) -> int:
    """Run every battery, log it and write its report. Returns 0 if everything held, else 1. Raises RunError."""
    console = Console(soft_wrap=True)
    todo = jobs(config)
    describe(folder, config, environment.describe(), {"source": config.source, "batteries": [job.name for job in todo]})
    before = earlier(config, folder)
    results: list[Result] = []
    tracked: Path | None = None
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"groundwave: {message}", file=sys.stderr)
        for job in todo:
            if len(todo) > 1:
                console.print(f"\n{job.name}", highlight=False, markup=False)
            result = _battery(job, config, console)
            results.append(result)
            report.terminal(result, console, table=len(todo) == 1)
            place = folder / job.name
            write(place / REPORT, report.to_json([result]))
            past = [other for other in before if summaries.key(other) == summaries.key(result)]
            tracked = _logged(job, config, result, past, place, group or folder.name) or tracked
    shown.total(results, console)
    write(folder / PAGE, html.page([*_same(before, results), *results]))
    places = [("page", str(folder / PAGE)), ("reports", f"{folder}/*/{REPORT}")]
    if group is not None:
        places.insert(0, ("all so far", str(_page_of_sweep(folder.parent))))
    if tracked is not None:
        places += [("W&B, here", f"wandb leet {tracked}"), ("W&B, upload", f"wandb sync {tracked}/offline-run-*")]
    how_to_look(console, Tracker(), places)
    return 0 if all(result.held for result in results) else 1


def _battery(job: Job, config: ParityConfig, console: Console) -> Result:
    with console.status(job.name, spinner="line") as status:
        def progress(text: str) -> None:
            if console.is_terminal:
                status.update(f"{job.name}: {text}".replace("[", "\\["))

        try:
            battery = Battery(job.case, policy=Policy(threads=config.threads), progress=progress)
            result = battery.run(config.tiers or None)
        except CaseError as error:
            raise RunError(f"case: {' '.join(str(error).split())}") from error
        battery.release()
        return result


def _logged(job: Job, config: ParityConfig, result: Result, past: Sequence[Result], place: Path, group: str) -> Path | None:
    """Log a result as a run of its own; the folder of the tracker's runs, where it has one."""
    settings = plain(config) | {"case": job.case.name, "dtype": job.dtype, "seed": job.case.seed, "policy": result.policy, "meta": result.meta}
    tracker = trackers.make(config.tracker, place.parent, settings=settings, name=job.name, group=group,
                            tags=["parity", job.case.name, job.dtype, "held" if result.held else "failed"], run_id=None)
    try:
        parity_board.log(tracker, result, past, place)
        if config.tracker.artifacts != "none":
            tracker.artifact(f"parity-{job.name.replace('~', '-')}", place / REPORT, "parity-report", {"held": result.held, **result.meta})
    finally:
        tracker.finish()
    return None if tracker.folder is None else tracker.folder.parent


def _same(before: Sequence[Result], results: Sequence[Result]) -> Iterator[Result]:
    """Earlier results of the questions that were asked again."""
    asked = {summaries.key(result) for result in results}
    return (result for result in before if summaries.key(result) in asked)


def _page_of_sweep(folder: Path) -> Path:
    """One page of every job of a sweep that has ended so far."""
    results, _ = shown.read(sorted(folder.glob(f"*/*/{REPORT}")))
    return write(folder / PAGE, html.page(results))


def write(path: Path, text: str) -> Path:
    """Write a file, whole or not at all, in a folder that is made for it. Raises RunError if that cannot be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        formats.write_text(path, text)
    except OSError as error:
        raise RunError(f"run_dir: cannot write {path}: {error.strerror or error}") from error
    return path


if __name__ == "__main__":
    from experiments.cli import main

    sys.exit(main(["parity", *sys.argv[1:]]))
