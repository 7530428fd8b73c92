"""`groundwave sweep`: a search over values by optuna, which a stopped sweep goes on with.

    groundwave sweep optimiser.rate='tag(log,interval(1e-3,1e-1))' model.dim=96,128 training.steps=300 sweep.trials=20 run_dir=runs/rates

Values are Hydra's own: `a,b,c` and `choice(...)` choose, `range(...)` counts, `interval(low,high)` draws real numbers and
`int(interval(low,high))` whole ones; `tag(log,...)` draws them by their logarithm. Validation bits per byte are minimised. Each trial has a
folder of its own, all are in one group of the tracker. RUN/journal.log is optuna's; a trial counts once its value is in it. One that was killed
goes on from its own newest checkpoint, and the sampler's random numbers are a function of sweep.seed and the trial's number, so that a sweep
that was stopped tries what an uninterrupted one tries.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from rich.console import Console
from rich.table import Table

from conf.schema import TrainConfig
from experiments import checkpoint, report, train
from experiments.compose import composed, one_line, validate
from experiments.errors import RunError
from experiments.lock import RunLock

JOURNAL = "journal.log"
SWEEP = "sweep.json"
_MEASURE = "validation_bits_per_byte"
_FREE = ("sweep.trials=", "run_dir=", "output_dir=", "tracker")  # overrides that a sweep may go on with others of


def main(arguments: Sequence[str]) -> int:
    """Run what is missing of the sweep. Returns the exit status. Raises RunError for what the user can put right."""
    parser = argparse.ArgumentParser(prog="groundwave sweep", description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as for groundwave train; those with several values are searched")
    overrides = parser.parse_args(list(arguments)).overrides
    space, fixed = searched(overrides)
    first = configured(fixed, {name: _some(distribution) for name, distribution in space.items()})
    folder = Path(first.run_dir or Path(first.output_dir) / f"{time.strftime('%Y%m%d-%H%M%S')}-search")
    from experiments.cli import COMMANDS, writable

    if first.distributed.name != "none":
        raise RunError(f"sweep: trials run in one process, found distributed.name={first.distributed.name}")
    COMMANDS["train"].check(first)
    writable(folder)
    try:
        return 0 if run(space, fixed, folder, first) else 1
    except KeyboardInterrupt:
        print(f"groundwave: interrupted; the same command with run_dir={folder} goes on", file=sys.stderr)
        return 130


def run(space: Mapping[str, Any], fixed: Sequence[str], folder: Path, config: TrainConfig) -> dict[str, Any] | None:
    """Run the trials that are missing in `folder`; the best one, or None if none gave a value."""
    optuna = _optuna()
    with RunLock(folder):
        (folder / f"{JOURNAL}.lock").unlink(missing_ok=True)  # of a killed process: nobody else is at work here
        described = {"fixed": [text for text in fixed if not text.startswith(_FREE)], "space": {name: str(each) for name, each in space.items()}}
        _same(folder, described)
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / JOURNAL)))
        study = optuna.create_study(storage=storage, study_name="sweep", direction="minimize", load_if_exists=True)
        _write(folder, described, study)
        while True:
            number, params = _next(study, space, config)
            if number is None:
                break
            print(f"groundwave: trial {number}: {', '.join(f'{name}={value}' for name, value in params.items())}", file=sys.stderr)
            try:
                place = folder / _trial(number)
                trial = replace(configured(fixed, params), resume="auto" if (place / checkpoint.FOLDER).exists() else "none")
                value = float(train.run(trial, place, group=folder.name)[_MEASURE])
            except RunError as error:
                print(f"groundwave: trial {number} failed: {error}", file=sys.stderr)
                value = math.nan
            if math.isfinite(value):
                study.tell(number, value)
            else:
                study.tell(number, state=optuna.trial.TrialState.FAIL)
            _write(folder, described, study)
        written = json.loads((folder / SWEEP).read_text(encoding="utf-8"))
        _print(written, folder)
    return written["best"]


def searched(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Distributions of the fields with several values, and the other overrides. Raises RunError for what cannot be searched."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise RunError(one_line(error)) from error
    space = {item.get_key_element(): _distribution(item) for item in parsed if item.is_sweep_override()}
    if not space:
        raise RunError("sweep: no field has several values; give one as in optimiser.rate='tag(log,interval(1e-3,1e-1))' or model.dim=96,128")
    return space, [item.input_line or "" for item in parsed if not item.is_sweep_override()]


def _distribution(item: Override) -> Any:
    distributions, name = _optuna().distributions, item.get_key_element()
    if item.is_interval_sweep():
        sweep: Any = item.value()
        low, high, log = sweep.start, sweep.end, "log" in sweep.tags
        if not low < high or (log and low <= 0):
            raise RunError(f"{name}: interval({low},{high}) must grow{', from above zero for its logarithm' if log else ''}")
        whole = isinstance(low, int) and isinstance(high, int)
        return distributions.IntDistribution(low, high, log=log) if whole else distributions.FloatDistribution(float(low), float(high), log=log)
    if item.value_type in (ValueType.CHOICE_SWEEP, ValueType.SIMPLE_CHOICE_SWEEP, ValueType.RANGE_SWEEP):
        return distributions.CategoricalDistribution(list(item.sweep_string_iterator()))
    raise RunError(f"{name}: must be a,b,c or choice, range or interval, found {item.input_line}")


def _some(distribution: Any) -> Any:
    """A value of the distribution, to see whether there is such a configuration at all."""
    return distribution.choices[0] if hasattr(distribution, "choices") else distribution.low


def configured(fixed: Sequence[str], params: Mapping[str, Any]) -> TrainConfig:
    """The configuration of a trial. Raises RunError naming the field that is impossible."""
    return validate(composed([*fixed, *(f"{name}={value}" for name, value in params.items())]))


def _next(study: Any, space: Mapping[str, Any], config: TrainConfig) -> tuple[int | None, dict[str, Any]]:
    """Number and values of the trial to run: one that was stopped, else a new one, or no number if there are enough."""
    optuna = _optuna()
    trials = study.get_trials(deepcopy=False)
    for trial in trials:
        if trial.state == optuna.trial.TrialState.RUNNING and trial.params.keys() == space.keys():
            return trial.number, dict(trial.params)
        if not trial.state.is_finished():
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # killed while its values were drawn
    settings = config.sweep
    if sum(trial.params.keys() == space.keys() for trial in trials) >= settings.trials:
        return None, {}
    seed = int(np.random.SeedSequence([settings.seed, len(trials)]).generate_state(1)[0])
    if settings.sampler == "random":
        study.sampler = optuna.samplers.RandomSampler(seed)
    else:
        study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=settings.startup)
    asked = study.ask(dict(space))
    return asked.number, dict(asked.params)


def _same(folder: Path, described: Mapping[str, Any]) -> None:
    """Raise RunError where the folder holds a sweep of other overrides."""
    if not (folder / SWEEP).exists():
        return
    before = json.loads((folder / SWEEP).read_text(encoding="utf-8"))
    for what in ("fixed", "space"):
        if before[what] != described[what]:
            raise RunError(f"run_dir: {folder} holds a sweep with {what} {before[what]}, found {described[what]}; choose another folder")


def _write(folder: Path, described: Mapping[str, Any], study: Any) -> None:
    trials = [
        {"number": each.number, "state": each.state.name.lower(), "value": each.value, "folder": _trial(each.number), "params": each.params}
        for each in study.get_trials(deepcopy=False)
    ]
    best = min((trial for trial in trials if trial["state"] == "complete"), key=lambda trial: trial["value"], default=None)
    temporary = folder / f".{SWEEP}"
    written = report.finite({**described, "measure": _MEASURE, "trials": trials, "best": best})
    temporary.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / SWEEP)


def _trial(number: int) -> str:
    return f"trial-{number:04d}"


def _print(written: Mapping[str, Any], folder: Path) -> None:
    table = Table(title=f"Trials by {_MEASURE.replace('_', ' ')}")
    names = list(written["space"])
    for name in ("trial", *names, "value"):
        table.add_column(name, justify="right")
    for trial in sorted(written["trials"], key=lambda trial: (trial["value"] is None, trial["value"] or 0.0)):
        value = trial["state"] if trial["value"] is None else f"{trial['value']:.4f}"
        shown = [f"{each:.4g}" if isinstance(each, float) else str(each) for each in (trial["params"].get(name, "") for name in names)]
        table.add_row(str(trial["number"]), *shown, value)
    console = Console(soft_wrap=True)
    console.print(table)
    best = f"; the best run is {folder / written['best']['folder']}" if written["best"] else ""
    console.print(f"{folder / SWEEP}{best}", highlight=False)


def _optuna() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import optuna
    except ImportError as error:
        raise RunError("sweep: optuna is not installed: pip install 'groundwave[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
