"""Put every porting bug of our models into the ports and keep what became of each: `python -m parity_tests.calibrate`.

    mutations.json    a report (`parity report parity_tests/calibration/mutations.json --html page.html` shows it), and under "calibration"
                      the totals of every model, those of the bugs that were not seen while tuning apart, commit, time, seconds, and the
                      digests of the sources that decide the result; it is written after every model, and `--resume` goes on from there

`sources.changed` names those of these sources that are no longer what they were. Exit status 1 when a bug survives.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from parity_tests import sources
from parity_tests.harness import Case, Policy, kills, policy, provenance, records, report, run_mutations
from parity_tests.harness.mutate import Mutation

FILE = Path(__file__).parent / "calibration" / "mutations.json"
OWN = ("parity_tests/families.py", "parity_tests/mutants_*.py", "parity_tests/mutations*.py")


def digests() -> dict[str, str]:
    """Of the sources that decide the kill matrix."""
    return sources.digests(OWN)


def totals(found: Sequence[Mutation]) -> dict[str, dict[str, int]]:
    """Counts of the mutations that were seen while tuning and of those that were not."""
    split = {"seen": [item for item in found if not item.unseen], "unseen": [item for item in found if item.unseen]}
    return {name: dataclasses.asdict(kills.Kills.of(part)) for name, part in split.items()}


def run(model: str, cases: Sequence[Case], console: Console) -> tuple[dict[str, list[Mutation]], dict[str, Any]]:
    """Every mutation of the cases of a model by the case's name, and the record of the run."""
    found: dict[str, list[Mutation]] = {}
    record = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "commit": provenance.commit(Path(__file__).parent)}
    before, started = _cpu(), time.monotonic()
    for case in cases:
        with console.status(case.name, spinner="line") as status:
            found[case.name] = run_mutations(case, progress=_shown(case, status.update, console))
        console.print(f"injected bugs: {case.name}")
        report.mutations_table(found[case.name], console)
    own = [item for part in found.values() for item in part]
    seconds = {"seconds": round(time.monotonic() - started, 1), "cpu_seconds": round(_cpu() - before, 1)}
    for heading, part in kills.parts(own):
        console.print(f"{model}{f', {heading}' if heading else ''}: {kills.Kills.of(part)}, {seconds['cpu_seconds']} CPU seconds", soft_wrap=True)
    return found, {"cases": list(found), **totals(own), **record, **seconds}


def kept(path: Path, current: Mapping[str, str]) -> tuple[dict[str, list[Mutation]], dict[str, Any]]:
    """The mutations and the models' records of an earlier run over the same sources; empty when there is none."""
    if not path.is_file():
        return {}, {}
    text = path.read_text(encoding="utf-8")
    record = json.loads(text)["calibration"]
    if not record.get("sources") or sources.changed(record["sources"], current):
        return {}, {}
    return records.mutations_from_json(text), record["models"]


def _cpu() -> float:
    spent = os.times()
    return spent.user + spent.system


def _shown(case: Case, update: Callable[[str], None], console: Console) -> Callable[[str], None]:
    return lambda text: update(f"{case.name}: {text}") if console.is_terminal else None


def write(path: Path, found: Mapping[str, Sequence[Mutation]], record: Mapping[str, Any]) -> None:
    """The report with the record beside it, a bug to a line, under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = json.loads(report.to_json([], found))
    bugs = ",\n".join(f"  {json.dumps(name)}: [\n   " + ",\n   ".join(map(json.dumps, own)) + "\n  ]" for name, own in made.pop("mutations").items())
    head = "".join(f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in made.items())
    kept = json.dumps(records.plain(record), indent=1, allow_nan=False).replace("\n", "\n ")
    partial = path.with_suffix(".partial")
    partial.write_text(f'{{\n{head} "mutations": {{\n{bugs}\n }},\n "calibration": {kept}\n}}\n', encoding="utf-8")
    partial.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the result is the exit status."""
    parser = argparse.ArgumentParser(prog="python -m parity_tests.calibrate", description="Inject every porting bug and keep the result.")
    parser.add_argument("--output", type=Path, default=FILE, metavar="FILE", help="where the result is written (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="keep the models of an earlier run over the same sources")
    arguments = parser.parse_args(argv)
    from parity_tests import mutations  # builds the models' cases

    current = digests()
    found, models = kept(arguments.output, current) if arguments.resume else ({}, {})
    for model, cases in mutations.MODELS.items():
        if model not in models:
            own, models[model] = run(model, cases, Console(width=None if sys.stdout.isatty() else 160))
            found |= own
            if sources.changed(current, digests()):
                print(f"not written, sources changed meanwhile: {', '.join(sources.changed(current, digests()))}", file=sys.stderr)
                return 1
            write(arguments.output, found, {"policy": policy.described(Policy(), {"torch", "nnx"}, True), "models": models, "sources": current})
            print(f"{model} written to {arguments.output}", flush=True)
    return 0 if all(item.detected for own in found.values() for item in own) else 1


if __name__ == "__main__":
    sys.exit(main())
