"""A report as one HTML page that needs nothing else: no script, no request, SVG inline, legible in light and dark, on paper and on a phone.

The page is made from what the JSON holds, so it can be made again from a file: `parity report FILE ... --html PAGE`. Numbers are those of the
JSON, printed as the terminal prints them. Failures come first: cases that do not hold, then what failed in them, then everything else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from . import charts, kills, summaries
from .battery import TIERS, Result
from .charts import Axis, Chart, Data
from .compare import RULES, Check
from .locate import number
from .mutate import Mutation
from .records import SCHEMA
from .report import totals, worst
from .series import TIME, TRAINING, Series

TEMPLATES = Path(__file__).parent / "templates"
FIRST, FAILURES, LINES = 12, 60, 6  # rows of failures that are shown, that can be unfolded; layers in the chart over time


def page(results: Sequence[Result], mutations: Mapping[str, Sequence[Mutation]] | None = None, title: str = "Parity report") -> str:
    """The page of results and of the mutations of cases by name; of several results of one question the newest, the others as its history.

    Raises ValueError when there is neither.
    """
    if not results and not mutations:
        raise ValueError("a report needs at least one result or mutation, found none")
    groups = summaries.histories(results)
    newest = [group[-1] for group in groups]
    cases = [_case(result, label, group) for result, label, group in zip(newest, summaries.labels(newest), groups, strict=True)]
    cases.sort(key=lambda case: case["held"])
    for place, case in enumerate(cases):
        case["id"] = f"case-{place + 1}"
    tiers = [name for name in TIERS if any(name in case["tiers"] for case in cases)]
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
                                     trim_blocks=True, lstrip_blocks=True)
    environment.filters["path"] = lambda value: Markup(escape(value).replace(".", Markup(".<wbr>")))
    environment.filters["number"] = lambda value: "" if value is None else number(value)
    injected = [(name, [(heading, kills.Kills.of(part), kills.matrix(part)) for heading, part in kills.parts(found)])
                for name, found in (mutations or {}).items()]
    held = all(case["held"] for case in cases) and all(item.held for found in (mutations or {}).values() for item in found)
    return environment.get_template("report.html.j2").render(
        title=title, cases=cases, tiers=tiers, held=held, mutations=injected, policies=_policies(cases), schema=SCHEMA, rules=RULES)


def _case(result: Result, label: str, group: Sequence[Result]) -> dict[str, Any]:
    failed = summaries.failures(result)
    gradients = summaries.gradients(result)
    return {
        "label": label, "held": result.held, "sentence": result.sentence, "totals": totals(result), "result": result, "meta": result.meta,
        "about": _about(result.meta),
        "tiers": {tier.name: tier for tier in result.tiers},
        "worst": {tier.name: worst(check for check in tier.checks if check.allowed > 0.0) for tier in result.tiers},
        "failures": (failed[:FIRST], failed[FIRST:FAILURES]), "hidden": sum(item.count for item in failed[FAILURES:]),
        "layers": _layers(result), "heat": _heat(result), "regimes": _regimes(result), "time": _over_time(result), "splits": _splits(result),
        "gradients": [item for item in gradients if item.parameter], "inputs": [item for item in gradients if not item.parameter],
        "training": _training(result), "history": _history(group),
    }


def _about(meta: Mapping[str, Any]) -> list[str]:
    """What was chosen and when, as far as the report says."""
    found = [f"seed {meta['seed']}"] if "seed" in meta else []
    found += [", ".join(map(str, meta["dtypes"]))] if meta.get("dtypes") else []
    found += [f"under {', '.join(map(str, meta['regimes']))}"] if meta.get("regimes") else []
    return found + ([str(meta["time"])] if meta.get("time") else [])


@dataclass(frozen=True)
class Mark:
    """A mark of a strip: where it stands (per cent), what it is, and its number."""

    at: float
    kind: str
    text: str


@dataclass(frozen=True)
class Layers:
    """Strips of every layer on common axes: the first in float64, one more for every lower precision."""

    names: tuple[str, ...]
    axes: tuple[Axis, ...]
    rows: tuple[tuple[summaries.Layer, tuple[tuple[Mark, ...], ...]], ...]


def _layers(result: Result) -> Layers | None:
    rows = summaries.layers(result)
    dtypes = list(dict.fromkeys(dtype for row in rows for dtype in row.rounding))
    strips = []  # by row: by strip: (kind, value)
    for row in rows:
        exact = [(kind, check.value) for kind, check in (("forced", row.forced), ("free", row.free)) if _number(check)]
        exact += [(f"allowed {kind}", check.allowed) for kind, check in (("forced", row.forced), ("free", row.free)) if _number(check)]
        low = []
        for dtype in dtypes:
            check = row.rounding.get(dtype)
            low.append([("candidate", check.value), ("own", check.own_error or 0.0), ("allowed", check.allowed)] if _number(check) else [])
        strips.append([exact, *low])
    if not rows:
        return None
    axes = tuple(charts.log_axis((value for row in strips for _, value in row[place]), most=3) for place in range(1 + len(dtypes)))
    marked = tuple(
        (row, tuple(tuple(Mark(axis.at(value), kind, f"{kind} {number(value)}") for kind, value in strip if axis.at(value) is not None)
                    for axis, strip in zip(axes, own, strict=True)))
        for row, own in zip(rows, strips, strict=True))
    return Layers(("float64", *dtypes), axes, marked)


def _number(check: Check | None) -> bool:
    """Whether a check is a distance that belongs on an axis with its allowed value."""
    return check is not None and 0.0 < check.allowed < math.inf and check.quantity not in ("cosine", "slope - 1")


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map: the number, how warm it is, and what it is a number of."""

    text: str
    warmth: int | None
    title: str


def _cell(check: Check | None) -> Cell:
    if check is None:
        return Cell("", None, "")
    text = number(check.value) if math.isfinite(check.value) else "x"
    warm: int | None = 9
    if check.held:
        text = number(check.value)
        warm = min(7, charts.warmth(check.value, check.allowed)) if math.isfinite(check.allowed) and check.quantity != "cosine" else None
    return Cell(text, warm, f"{check.quantity} {number(check.value)}, allowed {number(check.allowed)}")


def _heat(result: Result) -> tuple[list[str], list[tuple[str, list[Cell]]]]:
    rows = summaries.layers(result)
    dtypes = list(dict.fromkeys(dtype for row in rows for dtype in row.rounding))
    names = ["forced", "free", "slope - 1", "1 - cosine", "ulp", *(f"{dtype} / own" for dtype in dtypes), "gradients"]
    table = []
    for row in rows:
        cells = [_cell(row.forced), _cell(row.free)]
        for value, allowed, what in ((row.slope, 1e-9, "slope - 1"), (_short_of_one(row.cosine), 0.01, "1 - cosine")):
            cells.append(Cell("", None, "") if value is None else Cell(number(value), charts.warmth(value, allowed), f"{what} {number(value)}"))
        cells.append(Cell("", None, "") if row.ulp is None else Cell(f"{row.ulp:.0f}" if row.ulp < 1e5 else number(row.ulp), None, "float64, worst"))
        for dtype in dtypes:
            check = row.rounding.get(dtype)
            if check is None or not check.own_error:
                cells.append(_cell(check))
                continue
            times = check.value / check.own_error if math.isfinite(check.own_error) else math.nan
            cells.append(Cell(f"{times:.2g} x" if times < 1e3 else f"{number(times)} x", _cell(check).warmth, _cell(check).title))
        table.append((row.path, [*cells, _cell(row.gradients)]))
    return names, table


def _short_of_one(cosine: float | None) -> float | None:
    return cosine if cosine is None else (0.0 if cosine > 1.0 else 1.0 - cosine)


def _regimes(result: Result) -> tuple[list[str], list[tuple[str, list[Cell]]]]:
    found = summaries.regimes(result)
    columns = list(dict.fromkeys(column for _, cells in found for column in cells))
    return columns, [(name, [_cell(cells.get(column)) for column in columns]) for name, cells in found]


def _over_time(result: Result) -> list[Chart]:
    lines = [item for item in result.series if item.kind == TIME]
    whole = [item for item in lines if not item.where and item.dtype == "float64"]
    inner = sorted((item for item in lines if item.where), key=_peak, reverse=True)[:LINES]
    inner.sort(key=lambda item: result.order.get(item.where, 0))
    found = [charts.chart("the whole model, float64", "time step", [_data(item, f"{item.regime}{_leaf(item)}") for item in whole]),
             charts.chart("the layers with the largest errors, as is, float64", "time step", [_data(i, f"{i.where}{_leaf(i)}") for i in inner])]
    for dtype in dict.fromkeys(item.dtype for item in lines if item.reference):
        data = []
        for item in (item for item in lines if item.dtype == dtype):
            name = f"{item.regime}{_leaf(item)}"
            data += [_data(item, f"{name}: candidate"), Data(f"{name}: the reference's own", _points(item.reference, item.stride), True, True)]
        found.append(charts.chart(f"the whole model, {dtype} against float64", "time step", data))
    return [drawn for drawn in found if drawn is not None]


def _peak(item: Series) -> float:
    return max((value if not math.isnan(value) else math.inf for value in item.candidate), default=0.0)


def _leaf(item: Series) -> str:
    return f", {item.leaf}" if item.leaf not in ("", "0") else ""


def _points(values: Sequence[float], stride: int = 1) -> list[tuple[float, float]]:
    return [(float(place * stride), value) for place, value in enumerate(values)]


def _data(item: Series, label: str) -> Data:
    return Data(label, _points(item.candidate, item.stride))


def _splits(result: Result) -> Chart | None:
    """The error of a split against the place of the split, candidate and reference; of all leaves the worst."""
    found: dict[str, dict[int, float]] = {}
    for check in result.checks:
        if check.tier == "splits" and check.quantity == "relative L2":
            side = "reference" if check.regime.endswith(", reference") else "candidate"
            start = "from a carried state" if "carried" in check.regime else "from the beginning"
            places = found.setdefault(f"{side}, {start}", {})
            places[check.order] = max(check.value, places.get(check.order, 0.0))
    level = max((check.allowed for check in result.checks if check.tier == "splits"), default=0.0)
    data = [Data(name, sorted(values.items())) for name, values in found.items()]
    return charts.chart("splits with carried state", "length of the first part", data, level=level or None, level_label=f"allowed {number(level)}")


def _training(result: Result) -> dict[str, Any] | None:
    lines = [item for item in result.series if item.kind == TRAINING]
    checks = [check for check in result.checks if check.tier == "optimiser"]
    if not lines and not checks:
        return None
    found: list[Chart | None] = []
    for item in lines:
        both = [Data("reference", _points(item.reference)), Data("candidate", _points(item.candidate), True)]
        found.append(charts.chart("loss", "optimiser step", both, log=False))
        apart = [abs(a - b) / abs(b) if b else abs(a - b) for a, b in zip(item.candidate, item.reference, strict=True)]
        found.append(charts.chart("relative difference of the loss", "optimiser step", [Data("candidate", _points(apart))]))
    last = sorted(checks, key=lambda check: (check.held, -summaries.ratio(check)))
    return {"charts": [drawn for drawn in found if drawn is not None], "checks": last[:10], "count": len(checks)}


def _history(group: Sequence[Result]) -> dict[str, Any] | None:
    """Earlier results of the same question: a table, and the worst check of every tier in multiples of what it is allowed."""
    if len(group) < 2:
        return None
    rows = [(result, summaries.by_tier(result)) for result in group]
    tiers = list(dict.fromkeys(name for _, worst in rows for name in worst))
    data = [Data(name, [(float(place), summaries.ratio(worst[name])) for place, (_, worst) in enumerate(rows) if name in worst]) for name in tiers]
    drawn = charts.chart("worst check of each tier, in multiples of what is allowed", "result, oldest first", data, level=1.0, level_label="allowed")
    return {"tiers": tiers, "chart": drawn, "rows": [(result, [_cell(worst.get(name)) for name in tiers]) for result, worst in reversed(rows)]}


def _policies(cases: Sequence[Mapping[str, Any]]) -> list[tuple[list[str], dict]]:
    """Commit, policy and versions of the cases; cases of which they are the same share a block."""
    blocks: list[tuple[list[str], dict]] = []
    for case in cases:
        block = {**{name: case["meta"][name] for name in ("commit",) if name in case["meta"]}, **case["result"].policy}
        names = next((names for names, other in blocks if other == block), None)
        if names is None:
            blocks.append(([case["label"]], block))
        else:
            names.append(case["label"])
    return blocks
