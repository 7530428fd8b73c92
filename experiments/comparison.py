"""Several models on the same text, tokens and budget, with several seeds: `groundwave train experiment=compare`.

    RUN/pilot/LABEL-rateX/                  short runs, one for each learning rate that is tried
    RUN/LABEL-seedN/                        a run as `groundwave train` makes it, and measured.json with what was measured of it
    RUN/speeds.json                         tokens per second of all, measured in turns when all are trained
    RUN/comparison.{json,md,svg,png}        the table: mean and standard deviation over the seeds

Whatever is there of the same configuration is kept: a comparison that was stopped goes on with what is missing, from the newest checkpoint
of the run in which it was. Every run is one of the tracker, in one group, and the table is another.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from conf.comparison_schema import ComparisonConfig
from conf.schema import CheckpointConfig, TrackerConfig, TrainConfig
from experiments import checkpoint, comparison_speed, comparison_table, environment, report, trackers, train
from experiments.comparison_measure import measure
from experiments.compose import composed, validate
from experiments.errors import RunError
from experiments.folder import plain
from experiments.tasks import reasoning
from runtime.build import MODELS, check_backend

MEASURED, SPEEDS = "measured.json", "speeds.json"
# What decides about the numbers of a run that is trained already.
_MEASURES = ("memory_tokens", "puzzles", "puzzle_steps", "puzzle_batch")


@dataclass(frozen=True)
class Member:
    """One model: its label and the configuration of its runs, with the seed of the first."""

    label: str
    config: TrainConfig


def members(config: TrainConfig) -> list[Member]:
    """The models of `config.comparison`, each with all else as it is in `config`. Raises RunError for one that cannot be."""
    found = []
    for text in config.comparison.models:
        label, *fields = text.split()
        data = [f"data.tokenizer={config.data.tokenizer}", f"data.vocab_size={config.data.vocab_size}"]
        try:
            chosen = validate(composed([f"model={label}", "backend=torch", *data, *fields]))
            name = backend(chosen.architecture, config.backend.name)
            check_backend(chosen.architecture, name)
        except (RunError, ValueError, ImportError) as error:
            raise RunError(f"comparison.models: {text}: {error}") from error
        found.append(Member(label, replace(
            config, architecture=chosen.architecture, model=chosen.model, backend=replace(config.backend, name=name),
            loss=replace(config.loss, state_penalty=chosen.loss.state_penalty), seed=config.comparison.seeds[0],
        )))
    return found


def backend(architecture: str, wanted: str) -> str:
    """`wanted`, or the same framework without our kernels for a model that has none: its layers are the framework's own."""
    return wanted if wanted in MODELS[architecture] else wanted.removesuffix("_compiled")


def run(config: TrainConfig, folder: Path) -> list[dict[str, Any]]:
    """Train and measure what is missing in `folder`, and write the table. Returns the results of all runs. Raises RunError."""
    console = Console(soft_wrap=True)
    results = []
    for member in members(config):
        rate = _pilot(member, folder, console)
        for seed in config.comparison.seeds:
            own = replace(member.config, seed=seed, optimiser=replace(member.config.optimiser, rate=rate))
            results.append(_result(member.label, own, folder, console))
    _add_speeds(results, config, folder)
    _conclude(results, config, folder, console)
    return results


def _pilot(member: Member, folder: Path, console: Console) -> float:
    """The rate of `pilot_rates` with the fewest bits per byte after `pilot_steps` steps; a run that does not stay finite is none of them."""
    config = member.config
    rates = config.comparison.pilot_rates
    if len(rates) < 2:
        return rates[0] if rates else config.optimiser.rate
    found = {}
    for rate in rates:
        short = replace(
            config, seed=max(config.comparison.seeds) + 1, optimiser=replace(config.optimiser, rate=rate), long_context=False,
            training=replace(config.training, steps=config.comparison.pilot_steps, stop_at=None), tracker=TrackerConfig(name="none"),
            evaluation=replace(config.evaluation, sample_tokens=0, final_tokens=config.evaluation.tokens), checkpoint=CheckpointConfig(every=10**9),
        )
        try:
            found[rate] = _trained(short, folder / "pilot" / f"{member.label}-rate{rate:g}", None)["validation_bits_per_byte"]
        except RunError as error:
            if not str(error).startswith("training:"):
                raise
            found[rate] = math.inf
    best = min(found, key=found.__getitem__)
    if not math.isfinite(found[best]):
        raise RunError(f"comparison.pilot_rates: {member.label} does not stay finite at any of {', '.join(f'{rate:g}' for rate in rates)}")
    tried = ", ".join(f"{rate:g}: {bits:.3f}" for rate, bits in found.items())
    console.print(f"{member.label}: rate {best:g}, the best of {tried} bits per byte", highlight=False)
    return best


def _trained(config: TrainConfig, run: Path, group: str | None) -> dict[str, Any]:
    """The summary of a run, trained to its end if it is not yet. Raises RunError where another configuration was trained."""
    summary = run / "summary.json"
    own = replace(config, comparison=ComparisonConfig(), resume="none", run_dir=None)
    saved = checkpoint.newest(run)
    if saved is not None:
        different = checkpoint.config_differences(saved.description.get("config", {}), own)
        if different:
            raise RunError(f"run_dir: {run} is of another configuration: {'; '.join(different)}; choose another run_dir")
        if saved.step == own.training.last_step and summary.is_file():
            return json.loads(summary.read_text(encoding="utf-8"))
        own = replace(own, resume="auto")
    return train.run(own, run, group=group)


def _result(label: str, config: TrainConfig, folder: Path, console: Console) -> dict[str, Any]:
    """The numbers of one run: from its file, if it was measured in the same way, else trained and measured."""
    run = folder / f"{label}-seed{config.seed}"
    summary = _trained(config, run, folder.name)
    settings = {name: getattr(config.comparison, name) for name in _MEASURES} | {"chunk": config.evaluation.chunk}
    held = _read(run / MEASURED)
    if not settings.items() <= held.get("settings", {}).items():
        numbers = measure(_model(run), config, memory=config.seed == config.comparison.seeds[0])
        held = {"settings": settings, "numbers": numbers}
        _write(run / MEASURED, json.dumps(report.finite(held), indent=1) + "\n")
    result = {"label": label, "seed": config.seed, "architecture": config.architecture, "backend": config.backend.name, "rate": config.optimiser.rate,
              **summary, **held["numbers"]}
    shares = ", ".join(f"{name} {100 * result[name]['accuracy']:.1f} %" for name in reasoning.TASKS)
    console.print(f"{label}, seed {config.seed}: {result['validation_bits_per_byte']:.4f} bits per byte, {shares}", highlight=False)
    return result


def _model(run: Path) -> Path:
    return max((run / checkpoint.FOLDER).glob("step-*")) / "model"


def _add_speeds(results: list[dict[str, Any]], config: TrainConfig, folder: Path) -> None:
    """Give each result its speeds: those of the file, if they were measured in the same way, else those of the runs of its seed, in turns."""
    settings = comparison_speed.settings(config)
    held = _read(folder / SPEEDS)
    seeds = held["seeds"] if held.get("settings") == settings else {}
    configs = {member.label: member.config for member in members(config)}
    for seed in config.comparison.seeds:
        own = [result for result in results if result["seed"] == seed]
        if not {result["label"] for result in own} <= seeds.get(str(seed), {}).keys():
            models = {}
            for result in own:
                label, rated = result["label"], replace(config.optimiser, rate=result["rate"])
                models[label] = _model(folder / f"{label}-seed{seed}"), replace(configs[label], optimiser=rated)
            seeds[str(seed)] = comparison_speed.speeds(models)
            _write(folder / SPEEDS, json.dumps({"settings": settings, "seeds": seeds}, indent=1) + "\n")
        for result in own:
            result.update(seeds[str(seed)][result["label"]])


def _conclude(results: list[dict[str, Any]], config: TrainConfig, folder: Path, console: Console) -> None:
    """comparison.json, .md, .svg and .png, the terminal's table, and the tracker's run of the whole."""
    described = environment.describe()
    data = json.loads((folder / f"{results[0]['label']}-seed{results[0]['seed']}" / "data.json").read_text(encoding="utf-8"))
    chances = {name: 1.0 / reasoning.OPTIONS for name in reasoning.TASKS}
    settings = {
        "steps": config.training.last_step, "tokens": config.training.last_step * config.training.batch_size * config.training.context,
        "data": data["sha256"], "dtype": config.backend.dtype, "threads": config.backend.threads or "all", "chances": chances,
        "machine": described.get("processor", ""), "memory_tokens": config.comparison.memory_tokens, "chunk": config.evaluation.chunk,
        "puzzle_steps": config.comparison.puzzle_steps,
    }
    page = comparison_table.markdown(results, settings)
    names = comparison_table.labels(results)
    table = {
        label: {path: {"mean": spread.mean, "standard_deviation": spread.deviation, "values": list(spread.values)} for path, spread in row.items()}
        for label, row in ((label, comparison_table.spreads(results, label)) for label in names)
    }
    whole = {"settings": settings, "table": table, "runs": results, "config": plain(config), "environment": described}
    _write(folder / "comparison.json", json.dumps(report.finite(whole), indent=1) + "\n")
    _write(folder / "comparison.md", page)
    picture = report.save(comparison_table.figure(results, chances), folder / "comparison")
    _print(results, console)
    place = folder / "table"
    place.mkdir(exist_ok=True)
    tracker = trackers.make(
        config.tracker, place, settings=plain(config), name=f"{folder.name}-table", group=folder.name, tags=["comparison", config.backend.name],
        run_id=None,
    )
    try:
        paths = [column.path for column in comparison_table.COLUMNS]
        rows = [[result["label"], result["seed"], *(comparison_table.number(result, path) for path in paths)] for result in results]
        tracker.table("comparison/runs", ["model", "seed", *paths], rows, 0)
        tracker.image("comparison/picture", picture, 0)
        tracker.summary({f"{label}/{path}": row["mean"] for label, found in table.items() for path, row in found.items()})
    finally:
        tracker.finish()
    console.print(f"table: {folder / 'comparison.md'}, numbers: {folder / 'comparison.json'}, picture: {picture}", highlight=False, markup=False)
    if tracker.folder is not None:
        console.print(f"W&B, here: wandb leet {tracker.folder.parent}", highlight=False, markup=False)


def _print(results: list[dict[str, Any]], console: Console) -> None:
    shown = Table(title="Comparison: mean ± standard deviation over the seeds")
    names = comparison_table.labels(results)
    shown.add_column("")
    for label in names:
        shown.add_column(label, justify="right")
    rows = {label: comparison_table.spreads(results, label) for label in names}
    for column in comparison_table.COLUMNS:
        cells = [rows[label][column.path].text(column) if column.path in rows[label] else "" for label in names]
        if any(cells):
            shown.add_row(column.title, *cells)
    console.print(shown)


def _read(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file; empty where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, text: str) -> None:
    """Under another name, then renamed."""
    temporary = path.with_name(f".writing-{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"comparison: cannot write {path}: {error.strerror or error}") from error


def check(config: TrainConfig) -> None:
    """Raise RunError for a model or backend that cannot be; nothing is trained."""
    members(config)
