"""What a control run leaves to look at: curves, forecasts by horizon, and the tables of the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from experiments.control.evaluation import STATES, Forecast
from experiments.report import curve

_PARTS = {"action": "tab:blue", "value": "tab:green", "world_model": "tab:orange"}


def curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Parts of the training loss (thin) and of the validation loss (dots) by step, and the share of units at the limit."""
    drawn = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = drawn.subplots(1, 2)
    for part, colour in _PARTS.items():
        left.plot(*curve(rows, f"train/{part}"), linewidth=0.8, alpha=0.6, color=colour)
        left.plot(*curve(rows, f"validation/{part}"), marker="o", markersize=3, linewidth=1, color=colour, label=part.replace("_", " "))
    left.set_yscale("log")
    left.set_ylabel("loss (thin: training, dots: validation)")
    for name in STATES:
        steps, shares = curve(rows, f"saturated/{name}")
        right.plot(steps, [100 * share for share in shares], linewidth=1, label=name)
    right.set_ylabel("units at the limit (%)")
    right.set_ylim(-2, 102)
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    return drawn


def forecasts(before: Forecast, after: Forecast) -> Figure:
    """Errors of the open loop by horizon, untrained and trained, beside persistence from the trained policy's starts."""
    drawn = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = drawn.subplots()
    horizons = np.arange(1, len(after.model) + 1)
    axes.plot(horizons, before.model, color="tab:gray", linewidth=1, label=f"untrained core, mean {before.model.mean():.2f}")
    axes.plot(horizons, after.persistence, color="tab:red", linestyle="--", label=f"persistence, mean {after.persistence.mean():.2f}")
    axes.plot(horizons, after.model, color="tab:blue", label=f"trained core, mean {after.model.mean():.2f}")
    axes.set_xlabel("steps ahead, nothing seen")
    axes.set_ylabel("RMSE (standard deviations)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return drawn


def show(console: Console, found: Mapping[str, Any]) -> None:
    """Tables of a run's summary."""
    returns = found["returns"]
    table = Table(title=f"{found['environment']}: return over {returns['episodes']} seeded episodes")
    for name in ("random", "untrained core", "trained core", "expert", "way from random to expert"):
        table.add_column(name, justify="right")
    table.add_row(*(f"{returns[name]:.1f}" for name in ("random", "untrained", "policy", "expert")), f"{100 * returns['fraction']:.1f} %")
    console.print(table)
    table = Table(title="Before and after training")
    for name in ("measure", "before", "after"):
        table.add_column(name, justify="left" if name == "measure" else "right")
    for key, label in _rows(found):
        before, after = found["before"].get(key), found["after"].get(key)
        table.add_row(label, *("-" if value is None or math.isnan(value) else f"{value:.4g}" for value in (before, after)))
    console.print(table)
    console.print(
        f"{found['steps']} steps, {found['training_seconds']:.0f} s of training, {found['seconds']:.0f} s in all, peak memory "
        f"{found['peak_megabytes']:.0f} MB",
        highlight=False,
    )


def _rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    horizon = found["horizon"]
    rows = [(f"validation/{part}", f"validation loss, {part.replace('_', ' ')}") for part in _PARTS]
    rows += [
        ("forecast/one_step", "world model, one step ahead, RMSE"),
        ("forecast/one_step_persistence", "persistence, one step ahead, RMSE"),
        ("forecast/open_loop", f"world model, open loop, mean RMSE of 1 to {horizon} steps"),
        ("forecast/open_loop_persistence", f"persistence, mean RMSE of 1 to {horizon} steps"),
        ("forecast/ratio", "ratio of the two"),
    ]
    rows += [(f"saturated/{name}", f"share of {name} at the limit after 100 steps") for name in STATES]
    return [*rows, ("lyapunov/episodes", "Lyapunov exponent over its episodes, nats per step"), ("lyapunov/held", "and over one long episode")]
