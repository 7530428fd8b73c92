"""The page: nothing leaves it, its numbers are those of the JSON, failures come first, names are text and never markup."""

from __future__ import annotations

import json
import math
import re
import tomllib
from dataclasses import replace
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import pytest

from parity_tests.harness import charts, report, summaries
from parity_tests.harness.explain import Diagnosis
from parity_tests.harness.html import TEMPLATES, page
from parity_tests.harness.locate import number
from parity_tests.harness.mutate import Mutation
from parity_tests.harness.tests import synthetic

VOID = {"meta", "link", "wbr"}


class Page(HTMLParser):
    """Tags, attributes, and the cells of every table, read as a browser would; raises when elements do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.details: list[dict[str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "details":
            self.details.append({name: value or "" for name, value in attrs})

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if {"td", "th"} & set(self.open) and "title" not in self.open:
            self.tables[-1][-1][-1] += data

    def table(self, heading: str) -> dict[str, list[str]]:
        """Rows by their first cell, of the first table whose first heading is this one."""
        found = next(table for table in self.tables if " ".join(table[0][0].split()) == heading)
        return {" ".join(row[0].split()): [" ".join(cell.split()) for cell in row[1:]] for row in found[1:]}


@pytest.fixture(scope="module")
def pair() -> tuple[dict, Page, str]:
    """The JSON of two results, one of which fails at a layer, and the page made from it."""
    text = report.to_json([synthetic.result("healthy"), synthetic.result("broken", wrong="blocks.3.norm")])
    made = page(report.from_json(text))
    return json.loads(text), Page(made), made


def test_nothing_leaves_the_page(pair: tuple[dict, Page, str]) -> None:
    _, read, text = pair
    assert not re.search(r"https?:|//|url\(|@import|javascript:|<script|<iframe|<img|<object|<embed|<form", text)
    places = {value for _, name, value in read.attributes if name in ("href", "src", "srcset", "action", "xlink:href")}
    assert places == {"data:,", "#case-1", "#case-2"}
    assert not [name for _, name, _ in read.attributes if name.startswith("on")]
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in read.attributes


def of(record: dict, case: str, tier: str, where: str, dtype: str = "float64") -> list[dict]:
    """Checks in a parsed JSON."""
    tiers = next(item for item in record["cases"] if item["case"] == case)["tiers"]
    return [c for t in tiers if t["name"] == tier for c in t["checks"] if c["where"] == where and c["dtype"] == dtype]


def test_layers_hold_the_numbers_of_the_json(pair: tuple[dict, Page, str]) -> None:
    """The failing case is the first on the page, so the first tables are its own."""
    record, read, _ = pair
    heat, strips = read.table("module"), read.table("module, in run order")
    assert list(heat) == [*(f"blocks.{place}.norm" for place in range(5)), "(model)"]
    for path in list(heat)[:5]:
        forced, free = (max(c["value"] for c in of(record, "broken", tier, path)) for tier in ("forced", "free"))
        low = [max(of(record, "broken", "rounding", path, dtype), key=lambda c: c["value"] / c["allowed"]) for dtype in ("float32", "bfloat16")]
        gradient = max(c["value"] for c in of(record, "broken", "gradients", path))
        slopes = [abs(c["measure"]["slope"] - 1.0) for tier in ("forced", "free") for c in of(record, "broken", tier, path)]
        assert heat[path][:3] == [number(forced), number(free), number(max(slopes))]
        assert heat[path][5:] == [*(f"{c['value'] / c['own_error']:.2g} x" for c in low), number(gradient)]
        assert strips[path][-2:] == [number(forced), number(free)]
    marks = re.findall(r"<title>(?:candidate|own) (\S+)</title>", pair[2])
    assert {number(c["own_error"]) for c in of(record, "broken", "rounding", "blocks.1.norm", "float32")} & set(marks)


def test_gradients_tiers_and_policy_hold_the_numbers_of_the_json(pair: tuple[dict, Page, str]) -> None:
    record, read, _ = pair
    rows = read.table("gradient of")
    assert len(rows) == 10 and list(rows)[:2] == ["blocks.3.norm.weight", "blocks.3.norm.bias"]  # those that do not hold come first
    for leaf, (layer, whole, allowed, _, state) in rows.items():
        checks = of(record, "broken", "gradients", leaf.rpartition(".")[0])
        by_kind = {c["regime"]: c for c in checks if c["leaf"] == leaf}
        assert (layer, whole) == (number(by_kind["as is, layer"]["value"]), number(by_kind["as is, end to end"]["value"]))
        assert allowed == "1e-10" and state == ("failed" if leaf.startswith("blocks.3") else "held")
    tiers = read.table("tier")  # the first is of what failed
    assert tiers["forced"][0] == "blocks.3.norm" and tiers["forced"][3] == "1e-12"
    words = " ".join(" ".join(read.words).split())
    assert "ab12" * 10 in words and "torch 2.11.3" in words and "a note" in words and "not run" in words
    assert record["cases"][1]["totals"] in words and record["cases"][1]["sentence"] in words


def test_failures_come_first(pair: tuple[dict, Page, str]) -> None:
    record, read, _ = pair
    assert record["held"] is False and [case["held"] for case in record["cases"]] == [True, False]
    matrix = read.table("case")
    assert list(matrix) == ["broken", "healthy"] and matrix["broken"][0] == "does not hold" and matrix["broken"][2] == "8 failed"
    cases = [item for item in read.details if item.get("class") == "case"]
    assert ["open" in item for item in cases] == [True, False]
    headings = re.findall(r"<h3>([^<]*)", pair[2])
    assert headings[:3] == ["What failed", "Tiers", "Error of every layer"]
    assert "1 of 2 cases hold" in pair[2] and "<title>Parity report: does not hold</title>" in pair[2]


def test_a_hundred_layers_stay_below_two_megabytes() -> None:
    text = page([synthetic.result("deep", layers=100, wrong="blocks.50.norm"), synthetic.result("deep and healthy", layers=100)])
    assert len(text.encode()) < 2_000_000
    read = Page(text)
    assert len(read.table("module")) == 101 and len(read.table("gradient of")) == 200


def test_names_are_text() -> None:
    evil = '<script>alert("1")</script>&<b>'
    made = synthetic.result(evil, layers=2, regimes=(evil,))
    checks = [replace(c, where=evil, leaf=evil, detail=evil, reason=evil, held=False) for c in made.tiers[1].checks]
    made = replace(made, tiers=[replace(made.tiers[1], checks=checks, sentence=evil), *made.tiers[2:]], notes=[evil], lint=[evil], sentence=evil,
                   policy={evil: evil, "versions": {evil: evil}}, meta={"commit": evil, "time": evil, "seed": 0, "dtypes": [evil]},
                   series=[replace(line, where=evil, leaf=evil, regime=evil) for line in made.series])
    bug = Mutation(evil, evil, evil, True, evil, (evil,), 0.5, True, evil)
    text = page([made, replace(made, meta={**made.meta, "time": "earlier"})], {evil: [bug]}, title=evil)
    read = Page(text)
    assert "script" not in {tag for tag, _, _ in read.attributes} and "<script" not in text and "&<b>" not in text
    assert evil in "".join(read.words) and evil in read.table("case")


def test_the_same_report_gives_the_same_page() -> None:
    results = [synthetic.result("a"), synthetic.result("b", wrong="blocks.1.norm")]
    assert page(results) == page(report.from_json(report.to_json(results)))


def test_what_is_not_a_number_is_shown_and_breaks_nothing() -> None:
    made = synthetic.result("lost", layers=2)
    odd = [math.nan, math.inf, 0.0]
    for tier in made.tiers:
        tier.checks = [replace(c, value=odd[place % 3], allowed=odd[(place + 1) % 3], held=False, own_error=odd[place % 3],
                               measure=c.measure and replace(c.measure, slope=math.nan, cosine=math.nan, max_ulp=math.inf))
                       for place, c in enumerate(tier.checks)]
    made = replace(made, series=[replace(line, candidate=[math.nan, math.inf, 0.0], reference=[math.inf, math.nan, 1.0]) for line in made.series])
    text = page([made])
    paths = re.findall(r' d="([^"]*)"', text)
    assert Page(text).table("module")["blocks.0.norm"][3] == "nan" and paths and not any("nan" in path or "inf" in path for path in paths)
    only_nan = replace(made, series=[replace(line, candidate=[math.nan], reference=[math.nan]) for line in made.series])
    assert "<h3>Training</h3>" in page([only_nan]) and page([replace(made, tiers=[], series=[])])
    with pytest.raises(ValueError, match="at least one result or mutation"):
        page([])


def test_earlier_results_are_the_history_of_the_newest() -> None:
    old = synthetic.result("case", wrong="blocks.2.norm", time="2026-01-01T00:00:00+00:00", commit="0ld" * 13)
    new = synthetic.result("case", time="2026-02-01T00:00:00+00:00", commit="ne3" * 13 + "+")
    other = synthetic.result("case", seed=1)
    read = Page(page([new, other, old]))
    assert list(read.table("case")) == ["case, seed 0", "case, seed 1"]
    rows = read.table("time")
    assert list(rows) == ["2026-02-01T00:00:00+00:00", "2026-01-01T00:00:00+00:00"]
    assert [row[:2] for row in rows.values()] == [["ne3ne3ne3ne3+", "holds"], ["0ld0ld0ld0ld", "does not hold"]]
    assert rows["2026-01-01T00:00:00+00:00"][2] == number(summaries.by_tier(old)["forced"].value)


def test_injected_bugs_are_a_table() -> None:
    found = Mutation("gelu", "a.b", "a.b", True, "forced", ("2 meaning", "10 cosine"), 0.9, True, "",
                     diagnosis=Diagnosis("gelu", "tanh for erf", 0.0, 3), families=("gelu",))
    astray = Mutation("bias", "a.d", "a", True, "free", ("2 meaning",), 1.0, False, "", families=("missing bias",))
    missed = Mutation("eps", "a.c", "", False, "", (), 1.0, False, "")
    later = Mutation("later", "a.b", "a.b", True, "splits", ("5 splits",), 1.0, False, "", unseen=True)
    read = Page(page([], {"made": [found, astray, missed, later]}))
    rows = read.table("mutation")
    assert list(rows) == ["eps", "bias", "gelu"]  # survivors first, then what was located elsewhere
    assert rows["eps"][:3] == ["no", "-", "-"] and "blind" in rows["eps"] and rows["gelu"][-3:] == ["notices", "0.900000", "tanh for erf"]
    assert rows["bias"][1] == "a, expected a.d" and rows["bias"][-1] == "-, expected missing bias"
    marks = {name: [place + 1 for place, cell in enumerate(row[3:13]) if cell] for name, row in rows.items()}
    assert marks == {"eps": [], "bias": [2], "gelu": [2, 10]}
    words = " ".join(" ".join(read.words).split())
    assert "killed 2 of 3, located 1 of 3, named right 1 of 2; cosine >= 0.99 alone notices 1 of 3" in words
    apart = [table for table in read.tables if table[0][0] == "mutation"][1]
    assert [row[0] for row in apart[1:]] == ["later"] and words.count("Not seen while tuning killed 1 of 1") == 1


def test_the_templates_belong_to_the_package() -> None:
    """A wheel holds only what pyproject.toml names."""
    root = Path(__file__).resolve().parents[3]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["parity_tests"]
    files = [str(path.relative_to(root / "parity_tests")) for path in TEMPLATES.iterdir()]
    assert len(files) >= 2 and all(any(fnmatch(name, pattern) for pattern in patterns) for name in files)


@pytest.mark.parametrize(("values", "low", "high"), [([2e-15, 3e-7], -15, -6), ([0.0, math.inf, math.nan], -17, 0), ([1.0], -1, 1)])
def test_logarithmic_axes_have_whole_decades(values: list[float], low: int, high: int) -> None:
    axis = charts.log_axis(values)
    assert (axis.low, axis.high) == (low, high) and axis.at(0.0) == 0.0 and axis.at(math.inf) == 100.0 and axis.at(math.nan) is None
    assert all(0.0 <= at <= 100.0 for at, _ in axis.ticks) and 0 < len(axis.ticks) <= 7


@pytest.mark.parametrize(("values", "labels"), [
    ([0.0, 10.0], ["0", "2", "4", "6", "8", "10"]), ([5.0], ["4.8", "4.9", "5", "5.1", "5.2"]), ([], None),
])
def test_linear_axes_have_round_ticks(values: list[float], labels: list[str] | None) -> None:
    axis = charts.linear_axis(values)
    assert labels is None or [label for _, label in axis.ticks] == labels
    assert all("." not in label for _, label in charts.linear_axis([*values, 2.0], whole=True).ticks)


@pytest.mark.parametrize(("value", "allowed", "warmth"), [(0.0, 0.0, 0), (0.0, 1.0, 0), (1e-9, 1.0, 0), (5e-4, 1.0, 4), (0.5, 1.0, 7), (1.0, 1.0, 7),
                                                          (1.1, 1.0, 9), (math.nan, 1.0, 9), (1.0, 0.0, 9)])
def test_warmth_is_the_distance_from_what_is_allowed(value: float, allowed: float, warmth: int) -> None:
    assert charts.warmth(value, allowed) == warmth
