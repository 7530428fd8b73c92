"""What a battery shows in the tracker: layers, error against depth, time steps, training, failures, history over commits, summary, the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments import report as pictures
from experiments.trackers import Tracker
from parity_tests.harness import html, summaries
from parity_tests.harness.battery import Result
from parity_tests.harness.compare import Check
from parity_tests.harness.regimes import AS_IS
from parity_tests.harness.series import TIME, TRAINING

FAILURES = 100  # rows of the table of failures
SMALLEST = 1e-17  # where zero is drawn on a logarithmic axis


def log(tracker: Tracker, result: Result, past: Sequence[Result], folder: Path) -> None:
    """Log a result; `past` are earlier results of the same question, `folder` takes the pictures.

    The steps of the run are positions: `depth/*` by module in run order, `time/*` by time step, `training/*` by optimiser step. Errors are
    given as log10: on the linear axes of a dashboard 1e-16 and 1e-9 are the same line.
    """
    lines = positions(result)
    for step, values in enumerate(lines):
        tracker.log(values, step)
    last = len(lines)
    history = summaries.histories([*past, result])[0]
    for name, (columns, rows) in {"layers": layers(result), "tiers": tiers(result), "failures": failures(result), "history": over(history)}.items():
        if rows:
            tracker.table(name, columns, rows, last)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in {"error_against_depth": depth_figure(result), "history_plot": history_figure(history)}.items():
        if figure is not None:
            tracker.image(name, pictures.save(figure, folder / name), last)
    tracker.html("report", html.page(history), last)
    tracker.summary(summary(result))


def positions(result: Result) -> list[dict[str, float]]:
    """Numbers by position: those of the layer, the time step and the optimiser step that have it."""
    found: list[dict[str, float]] = []

    def put(place: int, name: str, value: float | None) -> None:
        if value is None or place < 0:
            return
        found.extend({} for _ in range(place + 1 - len(found)))
        found[place][name] = value

    def error(place: int, name: str, value: float | None) -> None:
        put(place, f"{name}_log10", None if value is None else math.log10(max(value, SMALLEST)))

    for place, layer in enumerate(summaries.layers(result)):
        for name, check in _checks(layer).items():
            error(place, f"depth/{name}", _value(check))
        for dtype, check in layer.rounding.items():
            error(place, f"depth/{dtype}_own", check.own_error)
    for item in result.series:
        if item.kind == TIME and not item.where and item.regime == AS_IS:
            for place, value in enumerate(item.candidate):
                error(place * item.stride, f"time/{item.dtype}_{item.leaf or 'output'}", value)
            for place, value in enumerate(item.reference):
                error(place * item.stride, f"time/{item.dtype}_{item.leaf or 'output'}_own", value)
        if item.kind == TRAINING:
            for place, (reference, candidate) in enumerate(zip(item.reference, item.candidate, strict=True)):
                put(place, "training/reference", reference)
                put(place, "training/candidate", candidate)
                error(place, "training/difference", abs(candidate - reference))
    return found


def _checks(layer: summaries.Layer) -> dict[str, Check | None]:
    return {"forced": layer.forced, "free": layer.free, **layer.rounding, "gradients": layer.gradients}


def _value(check: Check | None) -> float | None:
    return None if check is None else check.value


def layers(result: Result) -> tuple[list[str], list[list[Any]]]:
    """A row for every module in run order: position, errors, what is allowed, the reference's own error, gradients, cosine, slope."""
    rows = summaries.layers(result)
    dtypes = list(dict.fromkeys(dtype for row in rows for dtype in row.rounding))
    columns = ["position", "module", "held", "forced", "forced allowed", "free", "free allowed",
               *(f"{dtype}{what}" for dtype in dtypes for what in ("", " own", " allowed")), "gradients", "gradients allowed", "cosine", "slope - 1"]
    table = []
    for place, row in enumerate(rows):
        low = [(row.rounding[dtype].value, row.rounding[dtype].own_error, row.rounding[dtype].allowed) if dtype in row.rounding else (None,) * 3
               for dtype in dtypes]
        held = all(check.held for check in _checks(row).values() if check is not None)
        pairs = [(_value(check), None if check is None else check.allowed) for check in (row.forced, row.free, row.gradients)]
        table.append([place, row.path or "(model)", held, *pairs[0], *pairs[1], *(value for three in low for value in three), *pairs[2], row.cosine,
                      row.slope])
    return columns, table


def tiers(result: Result) -> tuple[list[str], list[list[Any]]]:
    """A row for every tier."""
    return ["tier", "state", "checks", "failed", "seconds", "sentence"], [
        [tier.name, "not run" if tier.skipped else "held" if tier.held else "failed", len(tier.checks), sum(not check.held for check in tier.checks),
         round(tier.seconds, 2), tier.sentence or tier.skipped] for tier in result.tiers]


def failures(result: Result) -> tuple[list[str], list[list[Any]]]:
    """What did not hold, the most telling first."""
    return ["tier", "module", "what", "found", "allowed", "checks", "regimes", "leaves"], [
        [item.check.tier, item.check.where or "(model)", item.check.detail or item.check.quantity, item.check.value, item.check.allowed, item.count,
         "; ".join(item.regimes), "; ".join(item.leaves)] for item in summaries.failures(result)[:FAILURES]]


def over(history: Sequence[Result]) -> tuple[list[str], list[list[Any]]]:
    """A row for every result of the same question, oldest first: when, which commit, and the worst check of each tier over what it is allowed."""
    worst = [summaries.by_tier(result) for result in history]
    names = list(dict.fromkeys(name for checks in worst for name in checks))
    rows = [[result.meta.get("time", ""), result.meta.get("commit", ""), result.held,
             *(summaries.ratio(checks[name]) if name in checks else None for name in names)] for result, checks in zip(history, worst, strict=True)]
    return ["time", "commit", "held", *names], rows


def summary(result: Result) -> dict[str, Any]:
    """Flat numbers about a battery."""
    checks = result.checks
    cosines = [check.measure.cosine for check in checks if check.measure is not None and check.tier in ("forced", "free")]
    found = {
        "held": result.held, "checks": len(checks), "failed": sum(not check.held for check in checks), "leaves": result.leaves,
        "seconds": round(sum(tier.seconds for tier in result.tiers), 2), "sentence": result.sentence, "commit": result.meta.get("commit", ""),
    }
    if cosines:
        found["least_cosine"] = math.nan if any(map(math.isnan, cosines)) else min(cosines)
    for name, check in summaries.by_tier(result).items():
        found[f"worst/{name}"] = check.value
        found[f"worst_of_allowed/{name}"] = summaries.ratio(check)
    return found


def depth_figure(result: Result) -> Figure | None:
    """Error of every module in run order, in float64 and in low precision, with the reference's own."""
    rows = summaries.layers(result)
    if len(rows) < 2:
        return None
    figure = Figure(figsize=(max(7.2, 0.22 * len(rows)), 4.8), layout="constrained")
    axes = figure.add_subplot()
    lines: dict[str, list[float]] = {}
    for place, row in enumerate(rows):
        own = {f"{dtype}, the reference's own": check.own_error for dtype, check in row.rounding.items()}
        for name, value in ({name: _value(check) for name, check in _checks(row).items()} | own).items():
            lines.setdefault(name, [math.nan] * len(rows))[place] = math.nan if value is None else max(value, SMALLEST)
    for name, values in lines.items():
        if not any(map(math.isfinite, values)):
            continue
        axes.plot(range(len(rows)), values, marker="o", markersize=3, linewidth=1, linestyle="--" if name.endswith("own") else "-", label=name)
    axes.set_yscale("log")
    axes.set_xticks(range(len(rows)), [row.path or "(model)" for row in rows], rotation=90, fontsize=7)
    axes.set_ylabel("relative error")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return figure


def history_figure(history: Sequence[Result]) -> Figure | None:
    """The worst check of each tier over what it is allowed, by commit; None for a single result."""
    if len(history) < 2:
        return None
    columns, rows = over(history)
    figure = Figure(figsize=(max(7.2, 0.5 * len(rows)), 4.2), layout="constrained")
    axes = figure.add_subplot()
    for place, name in enumerate(columns[3:], start=3):
        values = [math.nan if row[place] is None else max(row[place], SMALLEST) for row in rows]
        axes.plot(range(len(rows)), values, marker="o", markersize=3, label=name)
    axes.axhline(1.0, color="tab:red", linestyle="--", linewidth=1)
    axes.set_yscale("log")
    axes.set_xticks(range(len(rows)), [f"{row[1][:8] or '-'}\n{row[0][5:16]}" for row in rows], rotation=90, fontsize=7)
    axes.set_ylabel("worst check, in multiples of what is allowed")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return figure
