"""The `groundwave` command: composes and validates a configuration before Hydra runs a job with it.

Whatever is wrong with the configuration is said in one line that names the field, with exit status 2; Hydra's own tracebacks
are never reached, because each job of a run or sweep is composed here first, by the same code.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from conf.control_schema import ControlConfig
from conf.distil_schema import DistilConfig, EvaluateConfig
from conf.parity_schema import ParityConfig
from conf.schema import TrainConfig
from experiments import distributed, launched, refusals
from experiments.checkpoint import check_run, newest_run
from experiments.compose import MODULES, composed, jobs, register, validate
from experiments.data.corpus import check_path
from experiments.errors import RunError
from experiments.lock import check_free
from runtime.build import check_backend

USAGE = """usage: groundwave train [OVERRIDE ...] [-m]
       groundwave distil [OVERRIDE ...] [-m]
       groundwave control [OVERRIDE ...] [-m]
       groundwave sweep FIELD=VALUES ... [OVERRIDE ...]
       groundwave evaluate task=sts path=CSV model=FOLDER|teacher [OVERRIDE ...] [-m]
       groundwave evaluate task=documents model=FOLDER [OVERRIDE ...] [-m]
       groundwave evaluate task=validate|checklist|long_context model=RUN [OVERRIDE ...] [-m]
       groundwave parity [OVERRIDE ...] [-m]
       groundwave compare RUN_A RUN_B [--band RUN_C ...] [--output FOLDER]
       groundwave report RUN [RUN ...] [--output FILE]
       groundwave review [FOLDER ...]

train     trains a language model; any field can be set, as in model.dim=96 backend=jax training.steps=300; -m sweeps over
          comma-separated values, launcher=joblib|slurm side by side; debug=overfit_batch|three_steps|profiler|find_rate look for
          what is wrong and for the learning rate; experiment=compare trains several models and compares them. `groundwave train --cfg job` prints
          every field, `--help` the groups.
sweep     searches the values of fields by optuna, as in optimiser.rate='tag(log,interval(1e-3,1e-1))' model.dim=96,128 sweep.trials=20;
          the same command with the same run_dir goes on with what is missing.
distil    trains the sentence encoder LAM to do as a BERT-like teacher does, as in data.sentences=FILE evaluation.sts=CSV.
control   trains the robot core WaveCore on episodes of a scripted expert and puts it into the environment, as in
          environment.name=Reacher-v5 backend=jax.
evaluate  measures a saved LAM: task=sts correlates cosines of embeddings with the scores of (sentence, sentence, score);
          task=documents gives time and memory of documents of lengths=[5000,10000,20000] tokens. Of a trained language model:
          task=validate measures what its states are good for, task=checklist what must hold before it is used, task=long_context
          perplexity and memory up to 16,384 tokens; the last two end with status 1 where something does not hold.
parity    runs the parity harness on cases, precisions and seeds, as in case=lam dtype=[float32,bfloat16] seed=0, and logs what it finds;
          case=my_port.py:case is a port of your own.
compare   compares the loss curves of two runs with what rounding alone does to a third.
report    writes one page about a run, or about several laid over one another: curves, states, events, long context, samples.
review    opens every run below runs/ and multirun/ in `wandb leet`, or lists them where there is no terminal.
"""


@dataclass(frozen=True)
class Command:
    """What is particular to a command with a configuration: `check` the files that it names, `label` its run, `run` it."""

    check: Callable[[Any], None]
    label: Callable[[Any], str]
    run: Callable[[Any, Path, str | None], int]
    interrupted: str = "interrupted"


def _train(config: TrainConfig, folder: Path, group: str | None) -> int:
    if config.comparison.models:
        from experiments import comparison

        comparison.run(config, folder)
        return 0
    if config.rate_finder.enabled:
        from experiments import rate_finder

        rate_finder.run(config, folder)
        return 0
    from experiments import train

    train.run(dataclasses.replace(config, resume="auto") if launched.restarted() else config, folder, group=group)
    return 0


def _label_train(config: TrainConfig) -> str:
    what = "compare" if config.comparison.models else "rates" if config.rate_finder.enabled else config.architecture
    return f"{what}-{config.backend.name}-seed{config.seed}"


def _check_train(config: TrainConfig) -> None:
    check_path(config.data)
    if config.comparison.models:
        from experiments import comparison

        return comparison.check(config)
    try:
        check_backend(config.architecture, config.backend.name)
    except (ValueError, ImportError) as error:
        raise RunError(f"backend: {error}") from error


def _check_distil(config: DistilConfig) -> None:
    from experiments.distillation import teacher, texts

    texts.check(config)
    teacher.locate(config.teacher)


def _distil(config: DistilConfig, folder: Path, group: str | None) -> int:
    from experiments import distil

    distil.run(config, folder, group=group)
    return 0


def _check_control(config: ControlConfig) -> None:
    from experiments.control import run as control

    control.check(config)


def _control(config: ControlConfig, folder: Path, group: str | None) -> int:
    from experiments.control import run as control

    control.run(config, folder, group=group)
    return 0


def _check_evaluate(config: EvaluateConfig) -> None:
    from experiments import evaluate

    evaluate.check(config)


def _evaluate(config: EvaluateConfig, folder: Path, group: str | None) -> int:
    from experiments import evaluate

    return evaluate.run(config, folder)


def _check_parity(config: ParityConfig) -> None:
    from experiments import parity

    parity.jobs(config)


def _parity(config: ParityConfig, folder: Path, group: str | None) -> int:
    from experiments import parity

    return parity.run(config, folder, group=group)


COMMANDS = {
    "train": Command(
        _check_train, _label_train, _train,
        "interrupted; resume=auto goes on from the newest checkpoint",
    ),
    "distil": Command(_check_distil, lambda config: f"distil-seed{config.seed}", _distil, "interrupted; saved models are in checkpoints/"),
    "control": Command(
        _check_control, lambda config: f"{config.environment.name.replace('/', '-')}-{config.backend.name}-seed{config.seed}", _control,
        "interrupted; saved cores are in checkpoints/",
    ),
    "parity": Command(
        _check_parity, lambda config: re.sub(r"[^\w.+-]+", "_", "-".join(["parity", *config.cases[:3]])), _parity,
        "interrupted; reports of the batteries that ended are in the run's folder",
    ),
    "evaluate": Command(_check_evaluate, lambda config: f"evaluate-{config.task}", _evaluate),
}

MODULES_OF_THEIR_OWN = {"compare": "compare", "report": "page", "review": "review", "sweep": "sweep"}


def prepare(arguments: list[str], root: str = "train") -> list[str]:
    """Validate the configuration of every job and return the arguments with the run folder filled in. Raises RunError."""
    parser = get_args_parser()

    def refuse(message: str) -> None:
        raise RunError(f"{message}; fields are given as KEY=VALUE, as in training.steps=300")

    parser.error = refuse  # type: ignore[assignment, method-assign]
    parsed = parser.parse_args(arguments)
    if parsed.config_path or parsed.config_dir or parsed.config_name:
        raise RunError("--config-path, --config-dir and --config-name are not supported; give overrides, or a file of data with data.path=...")
    if parsed.help or parsed.hydra_help:
        return arguments
    refused = refusals.twice(parsed.overrides) or refusals.foreign(parsed.overrides)
    if refused:
        raise RunError(refused)
    every = jobs(parsed.overrides)
    if len(every) > 1 and not parsed.multirun:
        raise RunError(f"{len(every)} jobs were asked for by a list of values; add -m to run them one after another")
    configs = [validate(composed(overrides, root), root) for overrides in every]
    first = configs[0]
    if parsed.cfg or parsed.info:
        return arguments
    for config in configs:
        COMMANDS[root].check(config)
    group = distributed.join(first) if root == "train" else distributed.ALONE

    def place() -> str:
        folder = Path(first.run_dir or _folder(first, root, sweep=parsed.multirun))
        if root == "train":
            if first.resume == "auto" and not parsed.multirun:
                check_run(folder)
            check_free(folder)
        writable(folder)
        return str(folder.absolute())

    folder = group.share(place)
    added = [f"run_dir={_quoted(folder)}"] if first.run_dir is None else []
    return [*arguments, *added, *([] if group.main else ["hydra.output_subdir=null"])]


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _folder(config: Any, root: str, *, sweep: bool) -> str:
    if root == "train" and config.resume == "auto" and not sweep:
        found = newest_run(Path(config.output_dir), config)
        if found is not None:
            return str(found)
    name = "sweep" if sweep else COMMANDS[root].label(config)
    return str(Path(config.output_dir) / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}")


def writable(folder: Path) -> None:
    """Make `folder` and write into it. Raises RunError naming it if that cannot be done."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise RunError(f"run_dir: cannot write into the output folder {folder}: {error.strerror or error}") from error


def _job(config: DictConfig, root: str) -> int:
    """One job, run by Hydra, and its exit status; errors leave as SystemExit, which Hydra does not dress up and which ends a sweep."""
    try:
        settings = HydraConfig.get()
        folder = Path(settings.runtime.output_dir)
        sweep = Path(settings.sweep.dir).name if settings.mode == RunMode.MULTIRUN else None
        return COMMANDS[root].run(validate(config, root), folder, sweep)
    except RunError as error:
        _say(error)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        _say(KeyboardInterrupt(COMMANDS[root].interrupted))
        raise SystemExit(130) from error
    except Exception as error:
        traceback.print_exc()
        raise SystemExit(1) from error


def run_root(root: str, arguments: list[str]) -> int:
    """A command of `COMMANDS`. Returns the exit status: of the jobs of a sweep, which all run, the worst."""
    if root != "train":
        distributed.alone(root)
    prepared = prepare(arguments, root)
    GlobalHydra.instance().clear()
    register()

    statuses, here = [0], os.getpid()

    def job(config: DictConfig) -> None:
        if os.getpid() == here:
            statuses.append(_job(config, root))
        else:
            launched.run(lambda: _job(config, root))

    jobs_elsewhere = launched.expected(prepared)
    saved = sys.argv
    sys.argv = [saved[0] if saved else "groundwave", *prepared]
    try:
        hydra.main(version_base="1.3", config_path=f"pkg://{MODULES[root]}", config_name=root)(job)()
    finally:
        sys.argv = saved
    if len(statuses) == 1 and jobs_elsewhere is not None:
        statuses += jobs_elsewhere.statuses()
    return max(statuses)


def _elsewhere(module: str, arguments: list[str]) -> int:
    """A command that is a module of its own, imported when it is asked for; its exit status."""
    return importlib.import_module(f"experiments.{module}").main(arguments)


def _say(error: RunError | KeyboardInterrupt) -> None:
    line = distributed.said(error) or distributed.second_word(error)
    if line is not None:
        print(f"groundwave: {line}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the `groundwave` command. Returns the exit status."""
    # Idle threads that spin cost a shared machine ten times the run's own work; read when torch's OpenMP loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.getLogger("jax").setLevel(logging.WARNING)  # JAX tells of every kind of device that is not there
    arguments = sys.argv[1:] if arguments is None else arguments
    commands: dict[str, Callable[[list[str]], int]] = {name: partial(run_root, name) for name in COMMANDS}
    commands |= {name: partial(_elsewhere, module) for name, module in MODULES_OF_THEIR_OWN.items()}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    try:
        if arguments[0] not in commands:
            raise RunError(f"unknown command {arguments[0]!r}; expected one of {', '.join(commands)}")
        return commands[arguments[0]](arguments[1:])
    except RunError as error:
        _say(error)
        return 2
    finally:
        distributed.close()


if __name__ == "__main__":
    sys.exit(main())
