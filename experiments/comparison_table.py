"""The comparison's numbers as one table: for each model mean and standard deviation over its seeds, as Markdown and as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Column:
    """A number of a run: `path` into its results, `digits` behind the point, `better` "low" or "high" (none: neither)."""

    title: str
    path: str
    digits: int = 0
    better: str = ""
    share: bool = False  # of right answers, written in per cent

    @property
    def factor(self) -> float:
        """From the number as it is held to the number as it is written."""
        return 100.0 if self.share else 1.0


COLUMNS = (
    Column("bits per byte", "validation_bits_per_byte", 3, "low"),
    Column("training, tokens/s", "training_tokens_per_second", 0, "high"),
    Column("generation, tokens/s", "generated_tokens_per_second", 0, "high"),
    Column("memory, MB", "memory_megabytes", 1, "low"),
    Column("state, kB", "state_kilobytes", 1, "low"),
    Column("induction, %", "induction.accuracy", 1, "high", share=True),
    Column("recall, %", "recall.accuracy", 1, "high", share=True),
    Column("induction when trained on it, %", "induction_trained.accuracy", 1, "high", share=True),
    Column("recall when trained on it, %", "recall_trained.accuracy", 1, "high", share=True),
)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (NaN for one value) of `values`."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / len(self.values)

    @property
    def deviation(self) -> float:
        if len(self.values) < 2:
            return math.nan
        return math.sqrt(math.fsum((value - self.mean) ** 2 for value in self.values) / (len(self.values) - 1))

    def text(self, column: Column) -> str:
        """As in "1.234 ± 0.005"; without a spread the value alone."""
        shown = f"{self.mean * column.factor:,.{column.digits}f}"
        return shown if math.isnan(self.deviation) else f"{shown} ± {self.deviation * column.factor:,.{column.digits}f}"


def number(result: Mapping[str, Any], path: str) -> float | None:
    """The number at a dotted path of a run's results; None where it is not there or was no number."""
    value: Any = result
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def spreads(results: Sequence[Mapping[str, Any]], label: str) -> dict[str, Spread]:
    """Of one model, by the path of each column that any of its runs has."""
    table = {}
    for column in COLUMNS:
        values = [number(result, column.path) for result in results if result["label"] == label]
        values = [value for value in values if value is not None]
        if values:
            table[column.path] = Spread(tuple(values))
    return table


def labels(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Models in the order in which they were given."""
    return list(dict.fromkeys(result["label"] for result in results))


def markdown(results: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """The table with a line on what it shows. `settings`: steps, tokens, machine, data, memory_tokens, chunk, puzzle_steps, chances."""
    table = {label: spreads(results, label) for label in labels(results)}
    columns = [column for column in COLUMNS if any(column.path in row for row in table.values())]
    lines = ["| model | parameters | backend | rate | " + " | ".join(column.title for column in columns) + " |"]
    lines.append("|---|---|---|---|" + "---:|" * len(columns))
    for label, row in table.items():
        first = next(result for result in results if result["label"] == label)
        cells = [row[column.path].text(column) if column.path in row else "" for column in columns]
        lines.append(f"| {label} | {first['parameters']:,} | {first['backend']} | {first['rate']:g} | " + " | ".join(cells) + " |")
    seeds = sorted({result["seed"] for result in results})
    shares = [column.path.replace("accuracy", "error") for column in COLUMNS if column.share]
    errors = [error for result in results for error in (number(result, path) for path in shares) if error is not None]
    chance = ", ".join(f"{name} {100 * value:.1f} %" for name, value in settings["chances"].items())
    notes = [
        f"Mean ± standard deviation over seeds {', '.join(map(str, seeds))}; each run {settings['steps']:,} steps, {settings['tokens']:,} tokens "
        f"of the same text (sha256 {settings['data'][:12]}), {settings['dtype']}, threads: {settings['threads']}, {settings['machine']}.",
        f"Memory: peak of a process that streams {settings['memory_tokens']:,} tokens in chunks of {settings['chunk']}, above what it holds after "
        "two; one seed. State: what is carried from chunk to chunk. Tokens/s: all models in turns when all were trained, each a median over rounds.",
        f"Chance: {chance}; the standard error of one run is at most {100 * max(errors, default=math.nan):.1f} %. "
        f"Trained on it: {settings['puzzle_steps']} further steps on other puzzles of that kind.",
    ]
    return "\n".join(lines) + "\n\n" + "\n".join(notes) + "\n"


def figure(results: Sequence[Mapping[str, Any]], chances: Mapping[str, float]) -> Figure:
    """One panel for each column: every seed a point, with its standard error where it is a share of puzzles; the mean a line, chance dashed."""
    names = labels(results)
    table = {label: spreads(results, label) for label in names}
    columns = [column for column in COLUMNS if any(column.path in row for row in table.values())]
    across = 3
    down = -(-len(columns) // across)
    drawn = Figure(figsize=(3.4 * across, 2.3 * down), layout="constrained")
    for index, column in enumerate(columns):
        axes = drawn.add_subplot(down, across, index + 1)
        for place, label in enumerate(names):
            if column.path in table[label]:
                found = table[label][column.path]
                errors = [number(result, column.path.replace("accuracy", "error")) for result in results if result["label"] == label]
                bars = [error * column.factor for error in errors if error is not None] if column.share else []
                places = [place + 0.08 * (i - (len(found.values) - 1) / 2) for i in range(len(found.values))]
                values = [value * column.factor for value in found.values]
                axes.errorbar(
                    places, values, yerr=bars if len(bars) == len(values) else None, fmt="o", markersize=3.5, linewidth=0.8, color=f"C{place}")
                axes.plot([place - 0.25, place + 0.25], [found.mean * column.factor] * 2, color=f"C{place}", linewidth=1.4)
        task = column.path.split(".")[0].removesuffix("_trained")
        if task in chances:
            axes.axhline(chances[task] * column.factor, linestyle="--", linewidth=0.8, color="0.4")
        axes.set_title(column.title, fontsize=9)
        axes.set_xticks(range(len(names)), names, fontsize=7, rotation=20, ha="right")
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.margins(y=0.2)
        axes.grid(axis="y", alpha=0.3)
    return drawn
