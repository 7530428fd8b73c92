"""Reports: a terminal table in run order with the verdict first and one line of totals, and JSON (`records`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from . import kills, records
from .battery import Result
from .compare import Check
from .locate import number
from .mutate import Mutation
from .records import SCHEMA, ReportError, from_json, mutations_from_json

__all__ = ["SCHEMA", "ReportError", "from_json", "mutations_from_json", "mutations_table", "terminal", "to_json", "totals", "worst"]


def worst(checks: Iterable[Check]) -> Check | None:
    """The check that stands worst against what it is allowed; failures first."""
    def ratio(check: Check) -> tuple:
        value = check.value / check.allowed if check.allowed > 0.0 else (math.inf if check.value > 0.0 else 0.0)
        return (not check.held, math.inf if math.isnan(value) else value)

    return max(checks, key=ratio, default=None)


def totals(result: Result) -> str:
    """One line: tiers, checks, leaves, seconds, the worst float64 number, the least cosine."""
    checks = result.checks
    failed = sum(not check.held for check in checks)
    meaning = worst(check for check in checks if check.quantity == "relative L2" and check.dtype == "float64" and check.rule == 2)
    cosines = [check.measure.cosine for check in checks if check.measure is not None and check.tier in ("forced", "free")]
    parts = [f"{len(checks)} checks in {sum(not tier.skipped for tier in result.tiers)} tiers", f"{failed} failed", f"{result.leaves} leaves"]
    if meaning is not None:
        parts.append(f"worst float64 {number(meaning.value)} of {number(meaning.allowed)}")
    if cosines:
        parts.append(f"least cosine {'nan' if any(map(math.isnan, cosines)) else f'{min(cosines):.9f}'}")
    return ", ".join([*parts, f"{sum(tier.seconds for tier in result.tiers):.1f} s"])


def _cell(checks: Sequence[Check]) -> str:
    check = worst(checks)
    if check is None:
        return "[dim]-[/]"
    text = number(check.value) if math.isfinite(check.value) else "x"
    return text if check.held else f"[bold red]{text}[/]"


def _rows(result: Result) -> list[tuple[str, dict[str, list[Check]]]]:
    rows: dict[str, dict[str, list[Check]]] = {}
    for check in result.checks:
        if check.tier in ("forced", "free", "rounding", "gradients"):
            rows.setdefault(check.where, {}).setdefault(check.tier, []).append(check)
    return sorted(rows.items(), key=lambda item: (item[0] == "", result.order.get(item[0], len(result.order)), item[0]))


def terminal(result: Result, console: Console, *, table: bool = True) -> None:
    """Print the verdict, the layers in run order, the tiers, notes and lint, and one line of totals."""
    verdict = "[bold green]parity holds[/]" if result.held else "[bold red]parity does not hold[/]"
    console.print(f"{escape(result.case)}: {verdict}" + (f": {escape(result.sentence)}" if result.sentence else ""), soft_wrap=True)
    if table:
        layers = Table(Column("module", overflow="fold"), "forced", "free", "float32 / allowed", "gradients", "cosine", box=None, pad_edge=False)
        for path, cells in _rows(result):
            band = worst(cells.get("rounding", ()))
            rounded = "[dim]-[/]" if band is None else f"{_cell(cells['rounding'])} / {number(band.allowed)}"
            cosines = [check.measure.cosine for group in ("forced", "free") for check in cells.get(group, ()) if check.measure is not None]
            least = "[dim]-[/]" if not cosines else ("[bold red]nan[/]" if any(map(math.isnan, cosines)) else f"{min(cosines):.6f}")
            layers.add_row(escape(path or "(model)"), _cell(cells.get("forced", ())), _cell(cells.get("free", ())), rounded,
                           _cell(cells.get("gradients", ())), least)
        if layers.row_count:
            console.print(layers)
    for tier in result.tiers:
        state = f"[yellow]not run[/]: {escape(tier.skipped)}" if tier.skipped else ("[green]held[/]" if tier.held else "[red]failed[/]")
        failures = sum(not check.held for check in tier.checks)
        count = "" if tier.skipped else f", {len(tier.checks)} checks" + (f", {failures} failed" if failures else "")
        console.print(f"  {tier.name}: {state}{count}, {tier.seconds:.1f} s", soft_wrap=True)
        if tier.sentence and tier.sentence != result.sentence:
            console.print(f"    {escape(tier.sentence)}", soft_wrap=True)
    for label, lines in (("lint", result.lint), ("note", result.notes)):
        for line in lines:
            console.print(f"  [dim]{label}: {escape(line)}[/]", soft_wrap=True)
    console.print(totals(result), soft_wrap=True)


def mutations_table(found: Sequence[Mutation], console: Console) -> None:
    """Print the kill matrix, what was not seen while tuning apart, each with its totals."""
    for heading, part in kills.parts(found):
        if heading:
            console.print(heading)
        table = Table(Column("mutation", overflow="fold"), "noticed", Column("located at", overflow="fold"), "by", "rules", "cosine alone",
                      Column("looks like", overflow="fold"), box=None, pad_edge=False)
        for row in kills.matrix(part):
            item, place = row.item, escape(row.item.located or "(model)")
            where = f"[green]{place}[/]" if item.held else f"[red]{place}, expected {escape(item.expected or '(model)')}[/]"
            family = escape(item.diagnosis.family if item.diagnosis is not None else "") or "-"
            table.add_row(escape(item.name), "yes" if item.detected else "[bold red]no[/]", where if item.detected else "-", escape(item.tier) or "-",
                          row.numbers or "-", f"{'notices' if item.cosine_alone else 'blind'} {item.cosine:.6f}",
                          family if item.named is not False else f"[yellow]{family}[/], expected {escape(' or '.join(item.families))}")
        console.print(table)
        console.print(str(kills.Kills.of(part)), soft_wrap=True)


def to_json(results: Sequence[Result], mutations: Mapping[str, Sequence[Mutation]] | None = None) -> str:
    """Results, and the mutations of cases by name, as JSON of the schema that `records` describes."""
    return records.to_json(results, [totals(result) for result in results], mutations)
