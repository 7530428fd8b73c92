"""What a run leaves to look at: curves as SVG and PNG, the long-context plot, tables for the terminal.

`python -m experiments.report RUN [RUN ...]` makes one page of it: `experiments.page`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from experiments.tasks.long_context import LAG, Row

_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "groundwave"}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file; one that a kill cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def finite(value: Any) -> Any:
    """JSON has no NaN: None in its place."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def curve(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where it was finite."""
    points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def loss_figure(rows: Sequence[Mapping[str, Any]], trigram: float | None) -> Figure:
    """Training loss in bits per token and validation bits per byte by step, with the trigram's line."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*curve(rows, "train/bits_per_token"), linewidth=1, color="tab:gray", label="training, bits per token")
    steps, values = curve(rows, "validation/bits_per_byte")
    axes.plot(steps, values, marker="o", markersize=3, color="tab:blue", label="validation, bits per byte")
    axes.plot(*curve(rows, "final/bits_per_byte"), marker="s", linestyle="none", color="tab:blue", label="validation at the end, on more bytes")
    if trigram is not None:
        label = f"byte trigram, validation at the end, {trigram:.3f}"
        axes.axhline(trigram, linestyle="--", linewidth=1, color="tab:red", label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("bits")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def long_context_figure(rows: Sequence[Row]) -> Figure:
    """Perplexity, speed, state health and peak memory by length."""
    figure = Figure(figsize=(8.4, 5.6), layout="constrained")
    panels = (
        ("perplexity", ("perplexity", "second_half_perplexity", "reset_perplexity")), ("tokens per second", ("tokens_per_second",)),
        ("SSM state", ("ssm_rms", "autocorrelation")), ("largest entry of the matrix state", ("matrix_largest",)),
        ("peak memory, MB", ("peak_megabytes",)),
    )
    for index, (title, names) in enumerate(panels):
        axes = figure.add_subplot(2, 3, index + 1)
        for name in names:
            axes.plot([row.tokens for row in rows], [getattr(row, name) for row in rows], marker="o", markersize=3, label=name.replace("_", " "))
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(frameon=False, fontsize=8)
        else:
            axes.set_ylim(0, 1.15 * max((value for value in axes.lines[0].get_ydata() if math.isfinite(value) and value > 0), default=1.0))
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write `path`.svg and `path`.png without a date, so that the same numbers give the same bytes. Returns the PNG."""
    with matplotlib.rc_context(_STYLE):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=130)
    return path.with_suffix(".png")


def print_long_context(console: Console, rows: Sequence[Row]) -> None:
    """The table of `experiments.tasks.long_context`."""
    table = Table(title=f"Long context: held-out text streamed with carried states; perplexity over {rows[0].streams} streams")
    for name in ("tokens", "ppl", "2nd half", "ppl, reset", "tokens/s", "SSM RMS", f"corr. {LAG}", "max state", "peak MB"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row.tokens}", f"{row.perplexity:.3f}", f"{row.second_half_perplexity:.3f}", f"{row.reset_perplexity:.3f}",
            f"{row.tokens_per_second:.0f}", f"{row.ssm_rms:.3f}", f"{row.autocorrelation:.4f}", f"{row.matrix_largest:.3g}",
            f"{row.peak_megabytes:.0f}",
        )
    console.print(table)


def print_validation(console: Console, rows: Sequence[tuple[str, str, str]]) -> None:
    """The table of `experiments.tasks.validate`."""
    table = Table(title="Validation")
    for name in ("measure", "figures", "says"):
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    console.print(table, markup=False)


def print_checklist(console: Console, items: Sequence[tuple[str, bool, str]], title: str) -> None:
    """Lines that hold or do not: name, whether, figures."""
    table = Table(title=title)
    for name in ("item", "holds", "figures"):
        table.add_column(name)
    for name, held, text in items:
        table.add_row(name, "yes" if held else "NO", text)
    console.print(table, markup=False)


def print_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """Validation bits per byte and the trigram's, side by side, and the run's other numbers."""
    table = Table(title="Validation, bits per byte (cross-entropy only)")
    table.add_column("model", justify="right")
    table.add_column("interpolated byte trigram, fitted on the bytes seen", justify="right")
    table.add_row(f"{summary['validation_bits_per_byte']:.4f}", f"{summary['trigram_bits_per_byte']:.4f}")
    console.print(table)
    console.print(
        f"{summary['steps']} steps, {summary['bytes_seen']:,} bytes seen, {summary['parameters']:,} parameters, {summary['training_seconds']:.0f} s "
        f"of training at {summary['tokens_per_second']:.0f} tokens/s, peak memory {summary['peak_megabytes']:.0f} MB",
        highlight=False,
    )
    if summary["events"]:
        counted = ", ".join(f"{count} x {kind}" for kind, count in summary["events"].items())
        console.print(f"events: {counted}; learning rate at the end x {summary['rate_factor']:.4g}", highlight=False)


if __name__ == "__main__":
    import sys

    from experiments.cli import main

    sys.exit(main(["report", *sys.argv[1:]]))
