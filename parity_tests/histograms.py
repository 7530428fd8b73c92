"""What `clean.json` says, for people: a table (README.md) and a picture (clean.png) of how near clean pairs come to what is allowed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FACTORS = {"float32": 16.0, "bfloat16": 2.0}  # of the harness's defaults: what the multiples may be
STEPS = (1.0, 2.0, 4.0, 8.0, 16.0)


def share(counts: Mapping[str, int], limit: float) -> float:
    """Share of the multiples below `limit`, a power of two; NaN of none."""
    total = sum(counts.values())
    return sum(count for low, count in counts.items() if 2.0 ** ((int(low) + 1) / 2) <= limit * 1.0001) / total if total else float("nan")


def text(record: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    models = record["models"]
    lines = [
        "# Calibration on clean pairs", "",
        f"Written by `python -m parity_tests.clean` on {record['time'][:10]} at commit `{record['commit'][:12] or 'unknown'}`: random configurations",
        f"of our models in which nothing is wrong, {record['draws']} draws of weights, inputs and regimes for every draw of sizes and choices. "
        "An alarm would be",
        "a false one, or a bug of the model.", "",
        "| model | configurations | checks | alarms | CPU seconds |", "| --- | --: | --: | --: | --: |",
        *(f"| {name} | {found['configurations']} | {found['checks']:,} | {found['alarms']} | {found['cpu_seconds']:,.0f} |"
          for name, found in models.items()),
        "", "## Rounding: the error in multiples of the reference's own", "",
        "Of the leaves whose error lies above the floor (4 eps x RMS, which is always allowed), the share that stays below a multiple of the",
        "reference's own error in the same precision on the same input. The verdict allows 16 in float32 and 2 in half precision.", "",
        "| model | precision | under the floor | above it | " + " | ".join(f"< {step:g}" for step in STEPS) + " | largest | allowed |",
        "| --- | --- | --: | --: | " + " | ".join("--:" for _ in STEPS) + " | --: | --: |",
    ]
    for name, found in models.items():
        for dtype, factor in FACTORS.items():
            under, counts = found["under_floor"].get(dtype, 0), found["multiples"].get(dtype, {})
            if under or counts:
                largest = max((entry["worst_multiple"][dtype] for entry in record["configurations"]
                               if entry["model"] == name and dtype in entry.get("worst_multiple", {})), default=float("nan"))
                shares = " | ".join(f"{share(counts, step):.2%}" if counts else "-" for step in STEPS)
                shown = f"{largest:.3g}" if counts else "-"
                lines.append(f"| {name} | {dtype} | {under:,} | {sum(counts.values()):,} | {shares} | {shown} | {factor:g} |")
    lines += ["", "![How often an error is which multiple of the reference's own](clean.png)", "",
              "## Every rule: the largest found / allowed", "",
              "| model | rule, precision, tier | found / allowed | where |", "| --- | --- | --: | --- |"]
    lines += [f"| {name} | {rule} | {ratio:.3g} | {place} |" for name, found in models.items() for rule, (ratio, place) in found["worst"].items()]
    return "\n".join(lines) + "\n"


def picture(record: Mapping[str, Any], path: Path) -> None:
    """Histograms of the multiples, one row for each model and precision: all leaves above the floor, and the worst of every configuration."""
    from matplotlib.figure import Figure

    rows = [(name, dtype) for name, found in record["models"].items() for dtype in FACTORS if found["multiples"].get(dtype)]
    figure = Figure(figsize=(11, 2.1 * len(rows) + 0.6))
    axes = figure.subplots(len(rows), 2, squeeze=False, sharex=True)
    for line, (name, dtype) in zip(axes, rows, strict=True):
        for axis, kind, colour in zip(line, ("multiples", "worst_multiples"), ("#3b6ea5", "#8a5a9e"), strict=True):
            counts = {int(low) / 2: count for low, count in record["models"][name][kind][dtype].items()}
            axis.bar([max(low, -6.0) for low in counts], list(counts.values()), width=0.46, align="edge", color=colour)
            axis.axvline(math.log2(FACTORS[dtype]), color="#b03030")
            axis.set_xlim(-6, 6)
            axis.set_xticks(range(-6, 7, 2), [f"{2.0**n:g}" for n in range(-6, 7, 2)])
            if kind == "multiples":
                axis.set_yscale("log")
            axis.set_title(f"{name}, {dtype}: {'every leaf' if kind == 'multiples' else 'worst leaf of a configuration'}", fontsize=9)
            axis.tick_params(labelsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("error / the reference's own error; the line is what is allowed", fontsize=8)
    figure.tight_layout()
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, dpi=110, format="png", metadata={"Software": None})
    partial.replace(path)


def save(record: Mapping[str, Any], path: Path) -> None:
    """README.md and the picture beside a `clean.json`."""
    picture(record, path.with_suffix(".png"))
    partial = path.with_name(".README.md")
    partial.write_text(text(record), encoding="utf-8")
    partial.replace(path.parent / "README.md")
