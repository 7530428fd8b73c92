"""No false alarms: the battery on random clean configurations of our models, and how near each comes to what is allowed.

    python -m parity_tests.clean [--count 100] [--model NAME] [--output F] [--resume]

`--draws` configurations (5) share their sizes and choices, which cost a compilation, and differ in weights, inputs and regimes. Every one runs
conversion, coverage, the layers by force, the model end to end, and rounding, and one group of the other tiers (LATE) in turn, so that five draws
go through all of them. `--thorough` runs all on each. Exit status 1 when anything does not hold: on a clean pair that is a false alarm, or a bug of
the model.

What is kept of a configuration, beside what it is: the worst ratio found / allowed of every rule, and for rules 3 and 4 the error of every leaf in
multiples of the reference's own error, counted in bins of log2, where that multiple decides (the error is above the floor of 4 eps x RMS).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from parity_tests import sources
from parity_tests.clean_cases import MODELS, made
from parity_tests.harness import Battery, Case, locate, provenance, tiers_more
from parity_tests.harness.candidate import Candidate
from parity_tests.harness.case import raised
from parity_tests.harness.compare import EPS, Check
from parity_tests.harness.policy import applied
from parity_tests.harness.recording import Recording

FOLDER = Path(__file__).parent / "calibration"
OWN = ("parity_tests/clean*.py",)
SCHEMA = "parity-clean/1"
FIRST, DRAWS = 1000, 5  # seed of the first configuration (the tests use others), and configurations of one seed
CORE = ("conversion", "coverage", "forced", "free", "rounding")
LATE: Sequence[tuple[str, ...]] = (("whole gradients",), ("layer gradients",), ("splits", "effects"), ("optimiser",), ("observability",))
GRADIENTS: dict[str, Callable[[Battery], list[Check]]] = {
    "whole gradients": tiers_more.whole_gradients, "layer gradients": tiers_more.layer_gradients,
}


class CleanError(ValueError):
    """A file that cannot be gone on with."""


def late(number: int, thorough: bool) -> tuple[str, ...]:
    """The further tiers of a configuration."""
    return tuple(name for group in LATE for name in group) if thorough else LATE[number % len(LATE)]


def checks_of(battery: Battery, tiers: Iterable[str]) -> list[Check]:
    """Every check of the named tiers, or of one half of the gradients."""
    checks: list[Check] = []
    for name in tiers:
        if name in GRADIENTS:
            with applied(battery.policy, battery.kinds):
                checks += GRADIENTS[name](battery)
        else:
            checks += battery.tier(name).checks
    return checks


class Examined:
    """Configurations one after another; those of one seed share what was compiled for them."""

    def __init__(self, first: int = FIRST, draws: int = DRAWS, thorough: bool = False) -> None:
        self.first, self.draws, self.thorough = first, draws, thorough
        self.held: tuple[Any, Candidate] | None = None

    def entry(self, model: str, number: int) -> dict[str, Any]:
        """One configuration: what it is, what it took, its alarms, and how near it came to what is allowed."""
        before, started = _cpu(), time.monotonic()
        seed, draw = self.first + number // self.draws, number % self.draws
        entry: dict[str, Any] = {"model": model, "number": number, "seed": seed, "draw": draw}
        try:
            case, entry["configuration"] = made(model, seed, draw)
            battery = self.battery(case, (model, seed))
            checks = checks_of(battery, (*CORE, *late(number, self.thorough)))
            failed = [check for check in checks if not check.held]
            entry |= {"regimes": [regime.name for regime in battery.recording.regimes], "checks": len(checks), "failed": len(failed),
                      "dtypes": list(case.dtypes), "rules": sorted({check.rule for check in checks})}
            entry |= {"alarm": locate.sentence(checks, battery.input_errors) if failed else "", **measured(checks)}
        except Exception as error:  # a configuration that cannot be run is an alarm like any other, and the next one is independent of it
            entry |= {"checks": 0, "failed": 1, "alarm": raised(error)}
        return entry | {"cpu_seconds": round(_cpu() - before, 2), "seconds": round(time.monotonic() - started, 2)}

    def battery(self, case: Case, key: Any) -> Battery:
        """The battery of a case, over a candidate that shares the compiled programs of the last one if that had the same key."""
        if self.held is None or self.held[0] != key:
            self.release()
            battery = Battery(case)
        else:
            recording = Recording(case)
            battery = Battery(case, recording=recording, candidate=self.held[1].beside(recording))
        if battery.candidate is not None:
            self.held = (key, battery.candidate)
        return battery

    def release(self) -> None:
        """Give back what was compiled."""
        if self.held is not None:
            self.held[1].release()
            self.held = None
            jax.clear_caches()


def measured(checks: Iterable[Check]) -> dict[str, Any]:
    """`worst`: rule and precision -> largest found / allowed, with its place; `multiples`: precision -> log2 bin -> leaves whose error is that
    many times the reference's own; `under_floor`: precision -> leaves whose error the floor allows by itself; `worst_multiple`: precision ->
    largest multiple above the floor."""
    worst: dict[str, list] = {}
    multiples: dict[str, Counter] = {}
    under: Counter = Counter()
    largest: dict[str, float] = {}
    for check in checks:
        if check.measure is None or not check.allowed > 0.0 or check.quantity in ("cosine", "slope - 1"):
            continue
        if check.held and check.value > check.allowed:  # by another bound: a gradient that is zero but for rounding
            continue
        ratio, key = check.value / check.allowed, f"{check.rule}, {check.dtype}, {check.tier}"
        if key not in worst or ratio > worst[key][0]:
            worst[key] = [float(f"{ratio:.3g}"), f"{check.where or 'the whole model'} ({check.leaf or 'output'}), {check.regime}"]
        if check.own_error is None:
            continue
        if check.value <= 4.0 * EPS[check.dtype]:
            under[check.dtype] += 1
            continue
        multiple = check.value / check.own_error if check.own_error > 0.0 and math.isfinite(check.value) else math.inf
        largest[check.dtype] = max(float(f"{multiple:.4g}"), largest.get(check.dtype, 0.0))
        multiples.setdefault(check.dtype, Counter())[bin_of(multiple)] += 1
    return {"worst": worst, "multiples": {dtype: {str(low): found[low] for low in sorted(found)} for dtype, found in multiples.items()},
            "under_floor": dict(under), "worst_multiple": largest}


def bin_of(multiple: float) -> int:
    """The half octave n that holds a multiple: 2^(n/2) <= multiple < 2^((n+1)/2), at most 40."""
    return 40 if math.isinf(multiple) else min(40, math.floor(2.0 * math.log2(multiple)))


def _cpu() -> float:
    spent = os.times()
    return spent.user + spent.system


def opened(path: Path, digests: dict[str, str], draws: int, resume: bool) -> list[dict[str, Any]]:
    """The configurations of a file to go on with. Raises CleanError when they were computed otherwise."""
    if not resume or not path.exists():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    for name, expected in (("schema", SCHEMA), ("draws", draws)):
        if record.get(name) != expected:
            raise CleanError(f"{path} has {name} {record.get(name)!r}, expected {expected!r}: run it without --resume")
    changed = sources.changed(record["sources"], digests)
    if changed:
        raise CleanError(f"{path} was computed from other sources ({', '.join(changed[:5])}{', ...' if len(changed) > 5 else ''}): run it "
                         "without --resume")
    return record["configurations"]


def record_of(entries: Sequence[dict[str, Any]], digests: dict[str, str], draws: int) -> dict[str, Any]:
    """The file: totals and histograms of every model in front, then one line for each configuration."""
    models: dict[str, Any] = {}
    for model in dict.fromkeys(entry["model"] for entry in entries):
        own = [entry for entry in entries if entry["model"] == model]
        worst: dict[str, list] = {}
        multiples: dict[str, Counter] = {}
        each: dict[str, Counter] = {}
        for entry in own:
            for key, (ratio, place) in entry.get("worst", {}).items():
                if key not in worst or ratio > worst[key][0]:
                    worst[key] = [ratio, f"seed {entry['seed']}.{entry['draw']}: {place}"]
            for dtype, found in entry.get("multiples", {}).items():
                multiples.setdefault(dtype, Counter()).update({int(low): count for low, count in found.items()})
            for dtype, multiple in entry.get("worst_multiple", {}).items():
                each.setdefault(dtype, Counter())[bin_of(multiple)] += 1
        models[model] = {
            "configurations": len(own), "checks": sum(entry["checks"] for entry in own), "failed": sum(entry["failed"] for entry in own),
            "alarms": sum(bool(entry["alarm"]) for entry in own), "cpu_seconds": round(sum(entry["cpu_seconds"] for entry in own), 1),
            "worst": dict(sorted(worst.items())),
            "under_floor": dict(sum((Counter(entry.get("under_floor", {})) for entry in own), Counter())),
            "multiples": {dtype: {str(low): found[low] for low in sorted(found)} for dtype, found in multiples.items()},
            "worst_multiples": {dtype: {str(low): found[low] for low in sorted(found)} for dtype, found in each.items()},
        }
    return {"schema": SCHEMA, "commit": provenance.commit(Path(__file__).parent), "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "bins": "n counts multiples of the reference's own error in [2^(n/2), 2^((n+1)/2)), above the floor of 4 eps x RMS",
            "draws": draws, "models": models, "sources": digests, "configurations": list(entries)}


def write(path: Path, record: dict[str, Any]) -> None:
    """Under a temporary name first; a line for each configuration, so that a change of one is a change of one line."""
    front = json.dumps({key: value for key, value in record.items() if key != "configurations"}, indent=1)
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in record["configurations"])
    partial = path.with_suffix(".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(f'{front[:-2]},\n "configurations": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    partial.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the result is the exit status."""
    parser = argparse.ArgumentParser(prog="python -m parity_tests.clean", description="The battery on random clean configurations of our models.")
    parser.add_argument("--count", type=int, default=100, help="configurations of each model (default 100)")
    parser.add_argument("--model", action="append", choices=list(MODELS), help="this model only (may be repeated)")
    parser.add_argument("--output", type=Path, default=FOLDER / "clean.json", metavar="F", help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="go on with what the file holds already")
    parser.add_argument("--draws", type=int, default=DRAWS, help="configurations that share their sizes (default %(default)s)")
    parser.add_argument("--thorough", action="store_true", help="every tier on every configuration")
    arguments = parser.parse_args(argv)
    if arguments.count < 1 or arguments.draws < 1:
        parser.error("--count and --draws must be at least 1")
    digests, console = sources.digests(OWN), Console(width=None if sys.stdout.isatty() else 160)
    try:
        entries = opened(arguments.output, digests, arguments.draws, arguments.resume)
    except CleanError as error:
        print(f"clean: {error}", file=sys.stderr)
        return 2
    done, examined = {(entry["model"], entry["number"]) for entry in entries}, Examined(draws=arguments.draws, thorough=arguments.thorough)
    # all draws of one seed of each model in turn, so that a run that is stopped has seen every model
    wanted = [(model, number) for start in range(0, arguments.count, arguments.draws) for model in arguments.model or MODELS
              for number in range(start, min(start + arguments.draws, arguments.count))]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("clean configurations", total=len(wanted), completed=len(done & set(wanted)))
        for model, number in (pair for pair in wanted if pair not in done):
            progress.update(task, description=f"{model} {number}")
            entries.append(examined.entry(model, number))
            if entries[-1]["alarm"]:
                console.print(f"{model} {number}: {entries[-1]['alarm']}", soft_wrap=True, markup=False)
            write(arguments.output, record_of(entries, digests, arguments.draws))
            progress.advance(task)
    record = record_of(entries, digests, arguments.draws)
    for model, found in record["models"].items():
        console.print(f"{model}: {found['configurations']} configurations, {found['checks']} checks, {found['alarms']} alarms, "
                      f"{found['cpu_seconds']} CPU seconds", markup=False)
    write(arguments.output, record)
    from parity_tests import histograms  # with matplotlib, which a single configuration need not wait for

    histograms.save(record, arguments.output)
    console.print(f"written to {arguments.output}", markup=False, soft_wrap=True)
    return 1 if any(entry["alarm"] for entry in entries) else 0


if __name__ == "__main__":
    sys.exit(main())
