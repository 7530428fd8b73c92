"""The benchmark's pictures: what every contender reaches of what the machine allows, and cost against length and number of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from experiments.benchmarks.report import threads_of

COLOURS = {
    "engine": "#0b5394", "compiled kernel, NumPy": "#0b5394", "torch, compiled kernels": "#3d85c6", "torch, compiled kernel": "#3d85c6",
    "jax": "#6a9a2d", "jax, chunked": "#6a9a2d", "jax, lazy memory": "#6a9a2d", "jax, compiled kernels": "#b45f06",
    "MiniLM, transformers": "#a64d79", "torch, loop": "0.55", "torch, chunked": "0.3", "torch, eager": "0.3",
}
GROUPS = {"engine": "engine", "kernels in torch": "torch, compiled kernels", "kernels in JAX": "jax, compiled kernels", "JAX": "jax"}


def draw(held: dict[str, Any], folder: Path) -> list[Path]:
    """roofline.png and cost.png below `folder`; one without anything to show is not made."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [(folder / "roofline.png", rooflines(held)), (folder / "cost.png", costs(held))]
    for path, figure in drawn:
        if figure is not None:
            figure.savefig(path, dpi=110, metadata={"Software": None})
    return [path for path, figure in drawn if figure is not None]


def rooflines(held: dict[str, Any]) -> Figure | None:
    """One panel for each number of threads; every contender of every case that has a bound, at its operations per byte."""
    counts = [count for count in threads_of(held) if any(case["bound"] for case in held["runs"][count]["cases"].values())]
    if not counts:
        return None
    figure = Figure(figsize=(6.0 * len(counts) + 1.0, 6.4), layout="constrained")
    panels = figure.subplots(1, len(counts), squeeze=False)[0]
    for axes, count in zip(panels, counts, strict=True):
        roofline(axes, [case for case in held["runs"][count]["cases"].values() if case["bound"]])
        axes.set_title(f"{count} thread{'s' * (count != '1')}")
    entries = max((axes.get_legend_handles_labels() for axes in panels), key=lambda pair: len(pair[1]))
    figure.legend(*entries, loc="outside lower center", ncols=1 + len(counts), fontsize=8, frameon=False)
    return figure


def roofline(axes: Axes, cases: list[dict[str, Any]]) -> None:
    """Roofs: the fastest read and the fastest products measured in the run; points: operations per second of a contender."""
    reads = [case["bytes"] / case["timings"]["bound: bytes"]["median"] for case in cases if case["bound"] == "bound: bytes"]
    rates = [case["operations"] / timing["median"] for case in cases for name, timing in case["timings"].items()
             if name.startswith("bound: products")]
    spread = [case["operations"] / case["bytes"] for case in cases]
    ends = [min(spread) / 2, max(spread) * 2]
    if reads:
        turn = min(ends[1], max(rates) / max(reads)) if rates else ends[1]
        axes.plot([ends[0], turn], [max(reads) * end / 1e9 for end in (ends[0], turn)], color="0.35", lw=1)
        axes.annotate(f"reads, {max(reads) / 1e9:.0f} GB/s", (ends[0], max(reads) * ends[0] / 1e9), fontsize=8, color="0.35", va="top",
                      xytext=(8, -2), textcoords="offset points")
    if rates:
        axes.plot([max(rates) / max(reads) if reads else ends[0], ends[1]], [max(rates) / 1e9] * 2, color="0.35", lw=1)
        axes.annotate(f"products, {max(rates) / 1e9:.0f} GFLOP/s", (ends[1], max(rates) / 1e9), fontsize=8, color="0.35", va="bottom", ha="right")
    marks = "os^Dvp*XP<>"
    for case, mark in zip(cases, marks * (1 + len(cases) // len(marks)), strict=False):
        at = case["operations"] / case["bytes"]
        for name, timing in case["timings"].items():
            own = name.startswith("MiniLM") or "bfloat16" in name  # whose operations or bytes are not those of the case
            if not name.startswith("bound:") and not own:
                axes.plot(at, case["operations"] / timing["median"] / 1e9, mark, color=COLOURS.get(name, "0.75"), ms=7, mec="white", mew=0.6)
        axes.plot([], [], mark, color="0.3", ls="", label=case["title"])
    for label, name in GROUPS.items():
        axes.plot([], [], "o", color=COLOURS[name], ls="", label=label)
    axes.plot([], [], "o", color="0.75", ls="", label="others")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte of weights", ylabel="GFLOP/s")
    axes.grid(alpha=0.25, lw=0.4)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())


def costs(held: dict[str, Any]) -> Figure | None:
    """Seconds, and where the x axis is a length the memory added, of every curve; the most threads that were measured."""
    counts = [count for count in threads_of(held) if held["runs"][count]["curves"]]
    if not counts:
        return None
    found = list(held["runs"][counts[-1]]["curves"].values())
    figure = Figure(figsize=(4.6 * len(found), 7.0), layout="constrained")
    grid = figure.subplots(2, len(found), squeeze=False)
    for (above, below), curve in zip(grid.T, found, strict=True):
        for name, points in curve["series"].items():
            x, seconds, megabytes = zip(*points, strict=True)
            colour = COLOURS.get(name)
            above.plot(x, [1e3 * value for value in seconds], "o-", ms=3, lw=1.2, label=name, color=colour)
            below.plot(x, [max(value, 0.1) for value in megabytes], "o-", ms=3, lw=1.2, label=name, color=colour)
        above.set(title=f"{curve['title']}, {counts[-1]} thread{'s' * (counts[-1] != '1')}", ylabel="milliseconds")
        below.set(ylabel="memory that the call adds, MB", xlabel=curve["x"])
        for axes in (above, below):
            axes.set(xscale="log", yscale="log")
            axes.grid(alpha=0.25, lw=0.4)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_minor_formatter(NullFormatter())
        above.legend(fontsize=7)
    return figure
