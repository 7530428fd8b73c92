"""`python -m experiments.report RUN [RUN ...]`: one page that needs nothing else, about a run or about several laid over one another.

It is made from the files of the runs alone (config.yaml, environment.json, metrics.jsonl, events.jsonl, summary.json, sample.txt and
evaluation/), so it can be made while a run goes on, and again. Charts are inline SVG of `parity_tests.harness.charts`; no script, no request.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from experiments import report
from experiments.errors import RunError
from experiments.events import EVENTS
from experiments.folder import METRICS, whole_file
from experiments.opened import EVALUATIONS
from parity_tests.harness.charts import Chart, Data, chart

PAGE = "report.html"
MOST_EVENTS, MOST_POINTS, MOST_LINES = 200, 600, 8
_COLUMNS = {
    "tokens": "tokens", "perplexity": "perplexity", "second_half_perplexity": "2nd half", "reset_perplexity": "reset",
    "tokens_per_second": "tokens/s", "ssm_rms": "SSM RMS", "autocorrelation": "lag 256", "matrix_largest": "entry",
    "largest_norm": "norm", "unhealthy": "warnings", "peak_megabytes": "peak MB", "engine": "engine MB",
}


@dataclass
class Run:
    """What the files of a run say; everything that is not there is empty."""

    name: str
    config: dict[str, Any]
    machine: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    events: list[dict[str, Any]]
    sample: str
    validation: list[list[str]] = field(default_factory=list)
    checklist: list[dict[str, Any]] = field(default_factory=list)
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    lengths: list[dict[str, Any]] = field(default_factory=list)  # rows of the long-context task
    long_context: list[dict[str, str]] = field(default_factory=list)  # the same, to be shown

    @property
    def counts(self) -> dict[str, int]:
        """Events by kind."""
        return dict(sorted(Counter(str(event.get("kind")) for event in self.events).items()))

    def curve(self, name: str) -> list[tuple[float, float]]:
        """Points (step, value), thinned where there are very many."""
        points = [(float(row["step"]), float(row[name])) for row in self.rows if row.get(name) is not None]
        return points[:: -(-len(points) // MOST_POINTS)] if points else []

    def numbered(self, before: str, after: str = "") -> list[str]:
        """Names of metrics BEFORE0AFTER, BEFORE1AFTER, ... in order of the number."""
        names = {name for row in self.rows for name in row if name.startswith(before) and name.endswith(after)}
        found = [(name[len(before) : len(name) - len(after)], name) for name in names]
        return [name for number, name in sorted(((int(number), name) for number, name in found if number.isdigit()))]


def read(folder: Path, name: str | None = None) -> Run:
    """The files of a run. Raises RunError for a folder that holds none."""
    if not (folder / METRICS).is_file():
        raise RunError(f"report: {folder} holds no {METRICS}, so it is no run of groundwave train")
    try:
        config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")) if (folder / "config.yaml").is_file() else {}
    except (OSError, OmegaConfBaseException, YAMLError) as error:
        raise RunError(f"report: {folder / 'config.yaml'} cannot be read: {' '.join(str(error).split())}") from error
    summary = _json(folder / "summary.json")
    lengths = _json(folder / EVALUATIONS / "long_context.json")
    rows = lengths.get("long_context") or summary.get("long_context") or []
    events = report.read_metrics(folder / EVENTS) if (folder / EVENTS).is_file() else []
    sample = folder / "sample.txt"
    return Run(
        name or folder.name, config if isinstance(config, dict) else {}, _json(folder / "environment.json"), report.read_metrics(folder / METRICS),
        summary, events, sample.read_text(encoding="utf-8", errors="replace") if sample.is_file() else "",
        _json(folder / EVALUATIONS / "validate.json").get("rows", []), _json(folder / EVALUATIONS / "checklist.json").get("checklist", []),
        lengths.get("verdicts", []), rows, [_shown(row, lengths.get("engine_megabytes", {})) for row in rows],
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _shown(row: Mapping[str, Any], engine: Mapping[str, float]) -> dict[str, str]:
    whole = {**row, "engine": engine.get(str(row.get("tokens")))}
    return {title: number(whole[name]) for name, title in _COLUMNS.items() if whole.get(name) is not None}


def number(value: Any) -> str:
    """A figure with four or five significant places; whole numbers as they are."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e9):
        return f"{int(value):,}"
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.5g}"


def page(runs: Sequence[Run], title: str | None = None) -> str:
    """The page of the runs, in the order given; the first of them is what the second is compared with."""
    groups = {"curves": curves(runs), "states and gates": states(runs)}
    there = {
        "events": True, "long context": any(run.long_context for run in runs), "validation": any(run.validation for run in runs),
        "checklist": any(run.checklist for run in runs), "samples": any(run.sample for run in runs), "configuration": True,
    }
    sections = [name for name, group in groups.items() if group] + [name for name, held in there.items() if held]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("run.html.j2").render(
        title=title or (f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs"), runs=runs, charts=groups, sections=sections,
        facts=[facts(run) for run in runs], long_charts=lengths(runs), fields=_fields([_flat(run.config) for run in runs]),
        machine=_fields([_flat(run.machine) for run in runs]), most=MOST_EVENTS,
    )


def facts(run: Run) -> dict[str, str]:
    """What the first table says of a run; the same columns for every run."""
    config, summary = run.config, run.summary
    backend = config.get("backend", {})
    steps = summary.get("steps", max((int(row["step"]) for row in run.rows), default=0))
    held = [value for _, value in run.curve("validation/bits_per_byte")]
    return {
        "run": run.name, "model": str(config.get("architecture", "")), "parameters": number(summary.get("parameters")),
        "backend": f"{backend.get('name', '')} {backend.get('dtype', '')}", "seed": number(config.get("seed")), "steps": number(steps),
        "bits per byte": number(summary.get("validation_bits_per_byte", held[-1] if held else None)),
        "trigram": number(summary.get("trigram_bits_per_byte")), "tokens/s": number(round(float(summary.get("tokens_per_second") or 0)) or None),
        "peak MB": number(round(float(summary.get("peak_megabytes") or 0)) or None), "events": number(len(run.events)),
    }


def curves(runs: Sequence[Run]) -> list[Chart]:
    """Loss and its parts, validation, rates, gradient norm, speed and memory."""
    single = len(runs) == 1
    trigram = runs[0].summary.get("trigram_bits_per_byte")
    drawn = [
        chart("Training loss", "step", _each(runs, "train/loss"), log=False),
        chart("Validation, bits per byte", "step", _each(runs, "validation/bits_per_byte"), log=False, level=trigram,
              level_label="" if trigram is None else f"byte trigram, {trigram:.3f}"),
        _difference(runs),
    ]
    if single:
        names = {"cross-entropy": "train/cross_entropy", "state penalty": "train/state_penalty", "smoothness": "train/smoothness"}
        drawn.append(chart("Parts of the loss", "step", [Data(label, runs[0].curve(name)) for label, name in names.items()]))
        groups = ("ssm", "rwkv", "norm", "other")
        drawn.append(chart("Learning rates", "step", [Data(group, runs[0].curve(f"rate/{group}")) for group in groups]))
    else:
        drawn += [
            chart("Cross-entropy, nats", "step", _each(runs, "train/cross_entropy"), log=False),
            chart("State penalty", "step", _each(runs, "train/state_penalty")), chart("Smoothness", "step", _each(runs, "train/smoothness")),
            chart("Learning rate of the group other", "step", _each(runs, "rate/other")),
        ]
    drawn += [
        chart("Norm of the gradient", "step", _each(runs, "gradient/norm")),
        chart("Tokens per second", "step", _each(runs, "time/tokens_per_second"), log=False),
        chart("Peak memory, MB", "step", [Data(run.name, [(step, value / 2**20) for step, value in run.curve("memory/peak_bytes")]) for run in runs],
              log=False),
        chart("Gradient pathology, score", "step", _each(runs, "pathology/score"), log=False),
    ]
    return [each for each in drawn if each is not None]


def _each(runs: Sequence[Run], name: str) -> list[Data]:
    return [Data(run.name, run.curve(name)) for run in runs]


def _difference(runs: Sequence[Run]) -> Chart | None:
    """How far the losses of the others are from the first's."""
    first = dict(runs[0].curve("train/loss"))
    lines = []
    for run in runs[1:]:
        other = dict(run.curve("train/loss"))
        lines.append(Data(f"{run.name} and {runs[0].name}", [(step, abs(first[step] - other[step])) for step in sorted(first.keys() & other.keys())]))
    return chart("Difference of the training loss", "step", lines) if lines else None


def states(runs: Sequence[Run]) -> list[Chart]:
    """Norms, autocorrelation and largest entry of every layer's states, the gate's history, drift."""
    kinds = sorted({name.split("/")[2] for run in runs for row in run.rows for name in row if name.startswith("state/") and name.count("/") == 3})
    drawn = []
    for kind in kinds:
        for quantity, words in (("norm", "norm"), ("largest", "largest entry"), ("autocorrelation_64", "autocorrelation at lag 64")):
            drawn.append(_layers(runs, f"{kind} state: {words}", "state/", f"/{kind}/{quantity}", log=quantity != "autocorrelation_64"))
    drawn.append(_layers(runs, "Mean gate: share of the SSM branch", "gate/", "", log=False))
    lines = _each(runs, "drift/excess_nats")
    drawn.append(chart("Drift: nats per token that carried states cost", "step", lines, log=False, level=0.0, level_label="nothing"))
    return [each for each in drawn if each is not None]


def _layers(runs: Sequence[Run], title: str, before: str, after: str, *, log: bool) -> Chart | None:
    """A line for each layer; of two runs the second dashed; of more, or of very many layers, the mean over the layers."""
    names = [run.numbered(before, after) for run in runs]
    if len(runs) > 2 or max(map(len, names), default=0) > MOST_LINES:
        means = [Data(run.name, _mean(run, own)) for run, own in zip(runs, names, strict=True)]
        return chart(f"{title}, mean over the layers", "step", means, log=log)
    lines = []
    for layer in range(max(map(len, names), default=0)):
        for place, (run, own) in enumerate(zip(runs, names, strict=True)):
            if layer < len(own):
                label = f"layer {layer}" + (f", {run.name}" if len(runs) > 1 else "")
                lines.append(Data(label, run.curve(own[layer]), dashed=place > 0, paired=place > 0))
    return chart(title, "step", lines, log=log)


def _mean(run: Run, names: Sequence[str]) -> list[tuple[float, float]]:
    columns = [dict(run.curve(name)) for name in names]
    steps = sorted(set.intersection(*map(set, columns))) if columns else []
    return [(step, sum(column[step] for column in columns) / len(columns)) for step in steps]


def lengths(runs: Sequence[Run]) -> list[Chart]:
    """Perplexity with carried and with reset states, and speed, by length."""
    perplexity, speed = [], []
    for run in runs:
        def points(name: str, rows: Sequence[Mapping[str, Any]] = run.lengths) -> list[tuple[float, float]]:
            return [(float(row["tokens"]), math.nan if row.get(name) is None else float(row[name])) for row in rows]

        of = f", {run.name}" if len(runs) > 1 else ""
        perplexity += [Data(f"carried{of}", points("perplexity")), Data(f"reset{of}", points("reset_perplexity"), dashed=True, paired=True)]
        speed.append(Data(run.name, points("tokens_per_second")))
    drawn = [chart("Perplexity by length", "tokens", perplexity, log=False), chart("Tokens per second", "tokens", speed, log=False)]
    return [each for each in drawn if each is not None]


def _flat(tree: Mapping[str, Any], path: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{path}{name}.") if isinstance(value, Mapping) else {f"{path}{name}": "null" if value is None else str(value)}
    return found


def _fields(columns: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Rows of a table of fields by run; those that differ come first."""
    names = sorted({name for column in columns for name in column})
    rows = [{"name": name, "values": [column.get(name, "") for column in columns]} for name in names]
    marked = [{**row, "differs": len(set(row["values"])) > 1} for row in rows]
    return sorted(marked, key=lambda row: not row["differs"])


def main(arguments: Sequence[str] | None = None) -> int:
    """`groundwave report RUN [RUN ...] [--output FILE]`. Raises RunError."""
    parser = argparse.ArgumentParser(prog="groundwave report", description="one page about a run, or about several laid over one another")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"default: {PAGE} in the folder of the last run")
    chosen = parser.parse_args(arguments)
    several = len({run.name for run in chosen.runs}) < len(chosen.runs)  # runs of the same name in different folders
    runs = [read(folder, f"{folder.absolute().parent.name}/{folder.name}" if several else None) for folder in chosen.runs]
    target = chosen.output or chosen.runs[-1] / PAGE
    whole_file(target, page(runs))
    print(target)
    return 0
