"""The benchmark's figures as JSON that is kept and as tables that are read; see `case.Result` and `scaling.Curve` for what a figure is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VERSIONS = ("python", "numpy", "scipy", "torch", "jax", "processor", "commit")


def write(path: Path, text: str) -> None:
    """Write under another name and rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def add(held: dict[str, Any], run: dict[str, Any]) -> None:
    """Put a group's results into {"runs": {"1": {"cases": {name: result}, "curves": {name: curve}}, ...}}, each with what it was measured on."""
    described = {name: value for name, value in run["environment"].items() if name != "threads"}
    place = held["runs"].setdefault(str(run["threads"]), {"cases": {}, "curves": {}})
    for result in run["results"]:
        place["curves" if "series" in result else "cases"][result["name"]] = result | {"environment": described}


def markdown(held: dict[str, Any]) -> str:
    """Targets, times, curves and who is missing."""
    parts = [described(held), targets(held), times(held), curves(held), "\n".join(missing(held))]
    return "\n\n".join(part for part in parts if part) + "\n"


def described(held: dict[str, Any]) -> str:
    """Versions, processor and commit, each that there was."""
    places = [result["environment"] for run in held["runs"].values() for kind in run.values() for result in kind.values()]
    found = {name: sorted({short(place[name]) for place in places if name in place}) for name in VERSIONS}
    return ", ".join(f"{name} {' and '.join(values)}" for name, values in found.items() if values)


def short(value: str) -> str:
    """A commit by its first ten digits, with the "+" of a changed tree; anything else as it is."""
    commit = value.rstrip("+")
    return commit[:10] + value[len(commit) :] if len(commit) == 40 and " " not in commit else value


def threads_of(held: dict[str, Any]) -> list[str]:
    return sorted(held["runs"], key=int)


def heading(held: dict[str, Any], *columns: str) -> list[str]:
    """The first two lines of a table whose last columns are the numbers of threads."""
    names = [*columns, *(f"{count} thread{'s' * (count != '1')}" for count in threads_of(held))]
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def merged(held: dict[str, Any], kind: str) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """(name, {threads: result}) of every case or curve, in the order in which they ran."""
    for name in dict.fromkeys(name for run in held["runs"].values() for name in run[kind]):
        yield name, {count: held["runs"][count][kind][name] for count in threads_of(held) if name in held["runs"][count][kind]}


def first(found: dict[str, Any]) -> Any:
    return next(iter(found.values()))


def targets(held: dict[str, Any]) -> str:
    """Median of the ratio, its quartiles, and whether it is what was asked for."""
    lines = heading(held, "case", "ratio", "asked for")
    for _, found in merged(held, "cases"):
        for text, target in {met["target"]["text"]: met["target"] for result in found.values() for met in result["targets"]}.items():
            cells = [cell(next((met for met in found[count]["targets"] if met["target"]["text"] == text), None) if count in found else None)
                     for count in threads_of(held)]
            lines.append(f"| {first(found)['title']} | {text} | {asked(target)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def asked(target: dict[str, Any]) -> str:
    """What a target demands."""
    if target["slow"] == "bound":
        return f"{target['least']:.0%} of the bound"
    return f"at least {target['least']:g}" if target["most"] is None else f"at most {target['most']:g}"


def cell(met: dict[str, Any] | None) -> str:
    """A ratio with its quartiles; one that falls short is marked."""
    if met is None:
        return ""
    shown = "{:.0%}" if met["target"]["slow"] == "bound" else "{:.2f}"
    median, lower, upper = (shown.format(met["found"][name]) for name in ("median", "lower_quartile", "upper_quartile"))
    return (median if lower == upper else f"{median} ({lower} to {upper})") + ("" if met["held"] else ", missed")


def times(held: dict[str, Any]) -> str:
    """Median milliseconds of every contender, and the share of its bound."""
    lines = heading(held, "case", "by", )
    for _, found in merged(held, "cases"):
        for name in dict.fromkeys(name for result in found.values() for name in result["timings"]):
            cells = []
            for count in threads_of(held):
                timing = found[count]["timings"].get(name) if count in found else None
                share = found[count]["shares"].get(name) if count in found else None
                of_bound = f", {share['median']:.0%} of bound" if share else ""
                cells.append(f"{milliseconds(timing['median'])} ms{of_bound}" if timing else "")
            lines.append(f"| {first(found)['title']} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def milliseconds(seconds: float) -> str:
    """Three digits."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def curves(held: dict[str, Any]) -> str:
    """The ends of every curve: milliseconds, and the memory that the call added."""
    lines = heading(held, "cost of", "by")
    for _, found in merged(held, "curves"):
        for name in dict.fromkeys(name for curve in found.values() for name in curve["series"]):
            cells = []
            for count in threads_of(held):
                points = found[count]["series"].get(name, []) if count in found else []
                ends = [points[0], points[-1]] if points else []
                cells.append("; ".join(f"{x:,}: {milliseconds(seconds)} ms, {megabytes:.0f} MB" for x, seconds, megabytes in ends))
            lines.append(f"| {first(found)['title']}, {first(found)['x']} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def missing(held: dict[str, Any]) -> Iterator[str]:
    """Peers that could not be timed, each with what kept it out."""
    for _, found in merged(held, "cases"):
        for name, why in {name: why for result in found.values() for name, why in result["left_out"].items()}.items():
            yield f"- Not in \"{first(found)['title']}\": {name}. {why}"
