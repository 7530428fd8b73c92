"""The `groundwave` command: composes and validates a configuration before Hydra runs a job with it.

Whatever is wrong with the configuration is said in one line that names the field, with exit status 2; Hydra's own tracebacks
are never reached, because each job of a run or sweep is composed here first, by the same code.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_module
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf import schema
from experiments.checkpoint import newest_run
from experiments.data.corpus import check_path
from experiments.errors import RunError

USAGE = """usage: groundwave train [OVERRIDE ...] [-m]
       groundwave compare RUN_A RUN_B [--band RUN_C ...] [--output FOLDER]

train     trains a language model; any field can be set, as in model.dim=96 backend=jax training.steps=300; -m sweeps over
          comma-separated values. `groundwave train --cfg job` prints every field, `--help` the groups.
compare   compares the loss curves of two runs with what rounding alone does to a third.
"""
_NOISE = ("full_key:", "object_type=", "reference_type=", "See ", "To append", "Set the environment variable")
_COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, ValueError, TypeError, KeyError, AttributeError, AssertionError)


def register() -> None:
    """Put the dataclass schemas into Hydra's store, open to our own YAML (a frozen dataclass gives a read-only node)."""
    store = ConfigStore.instance()
    sections = {field.name: field for field in dataclasses.fields(schema.TrainConfig)}
    root = OmegaConf.structured(schema.TrainConfig)
    OmegaConf.set_readonly(root, None)
    for name in sections:
        node = root._get_node(name)
        _open(node)
    root.model = "???"
    store.store(name="train_schema", node=root)
    for name, config in schema.MODELS.items():
        node = OmegaConf.structured(config)
        _open(node)
        store.store(group="schema", name=name, node=node)


def _open(node: Any) -> None:
    if isinstance(node, DictConfig):
        OmegaConf.set_readonly(node, None)
        for name in node:
            _open(node._get_node(name))


def one_line(error: BaseException) -> str:
    """The message of an error and of what caused it, without line breaks, search paths or type references."""
    parts: list[str] = []
    here: BaseException | None = error
    while here is not None:
        text = str(here).split("Config search path:")[0]
        key = next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.strip().startswith("full_key:")), "")
        kept = [line.strip() for line in text.splitlines() if not line.strip().startswith(_NOISE)]
        text = " ".join(" ".join(kept).split()).rstrip(".")
        text = f"{key}: {text}" if key and key not in text else text
        if text and not any(text in part for part in parts):
            parts.append(text)
        here = here.__cause__
    return ": ".join(parts) or type(error).__name__


def validate(config: DictConfig) -> schema.TrainConfig:
    """Objects of a composed configuration. Raises RunError naming the field that is impossible or unknown."""
    _known(config, "")
    try:
        _check_model(config.architecture, config.model)
        sections = {str(name): _object(config[name], str(name)) for name in config}
    except OmegaConfBaseException as error:
        raise RunError(one_line(error)) from error
    try:
        return schema.TrainConfig(**sections)
    except (ValueError, TypeError) as error:
        raise RunError(one_line(error)) from error


def _object(value: Any, path: str) -> Any:
    """The object of a node, its inner ones made first so that an error names its own section."""
    if not isinstance(value, DictConfig):
        return OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
    for name in value:
        if isinstance(value[name], DictConfig):
            _object(value[name], f"{path}.{name}")
    try:
        return OmegaConf.to_object(value)
    except (ValueError, TypeError) as error:
        raise RunError(f"{path}.{one_line(error)}") from error


def _known(node: DictConfig, path: str) -> None:
    """Raise RunError for a key that a dataclass does not have (Hydra lets `+key=value` add one)."""
    kind = OmegaConf.get_type(node)
    names = [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else list(node)
    for name in node:
        if name not in names:
            raise RunError(f"{path}{name}: unknown field; expected one of {', '.join(map(str, names))}")
        child = None if OmegaConf.is_missing(node, name) else node._get_node(name)
        if isinstance(child, DictConfig):
            _known(child, f"{path}{name}.")


def _check_model(architecture: str, model: Any) -> None:
    if architecture not in schema.MODELS:
        raise RunError(f"architecture must be one of {', '.join(map(repr, schema.MODELS))}, found {architecture!r}")
    expected = schema.MODELS[architecture]
    if OmegaConf.get_type(model) is not expected:
        raise RunError(f"model must be a {expected.__name__} for architecture={architecture}; choose a group, as in model=grounded_mamba_tiny")


def composed(overrides: list[str]) -> DictConfig:
    """The configuration that Hydra would hand to a job with these overrides. Raises RunError."""
    GlobalHydra.instance().clear()
    register()
    try:
        with initialize_config_module(config_module="conf", version_base="1.3"):
            return compose("train", overrides=overrides)
    except _COMPOSE_ERRORS as error:
        raise RunError(one_line(error)) from error


def jobs(overrides: list[str]) -> list[list[str]]:
    """The overrides of every job of a sweep, in Hydra's order (the last key varies fastest). Raises RunError."""
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except _COMPOSE_ERRORS as error:
        raise RunError(one_line(error)) from error
    choices = [
        [f"{item.get_key_element()}={text}" for text in item.sweep_string_iterator()] if item.is_sweep_override() else [item.input_line or ""]
        for item in parsed
    ]
    return [list(chosen) for chosen in itertools.product(*choices)]


def prepare(arguments: list[str]) -> list[str]:
    """Validate the configuration of every job and return the arguments with the run folder filled in. Raises RunError."""
    parser = get_args_parser()

    def refuse(message: str) -> None:
        raise RunError(message)

    parser.error = refuse  # type: ignore[assignment, method-assign]
    parsed = parser.parse_args(arguments)
    if parsed.config_path or parsed.config_dir or parsed.config_name:
        raise RunError("--config-path, --config-dir and --config-name are not supported; give overrides, or a file of data with data.path=...")
    if parsed.help or parsed.hydra_help:
        return arguments
    every = jobs(parsed.overrides)
    if len(every) > 1 and not parsed.multirun:
        raise RunError(f"{len(every)} jobs were asked for by a list of values; add -m to run them one after another")
    configs = [validate(composed(overrides)) for overrides in every]
    first = configs[0]
    if parsed.cfg or parsed.info:
        return arguments
    for config in configs:
        check_path(config.data)
    folder = first.run_dir or _folder(first, sweep=parsed.multirun, overrides=parsed.overrides)
    writable(Path(folder))
    absolute = Path(folder).absolute()
    return [*arguments, f"run_dir={_quoted(str(absolute))}"] if first.run_dir is None else arguments


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _folder(config: schema.TrainConfig, *, sweep: bool, overrides: list[str]) -> str:
    if config.resume == "auto" and not sweep:
        found = newest_run(Path(config.output_dir), config)
        if found is not None:
            return str(found)
    name = "sweep" if sweep else f"{config.architecture}-{config.backend.name}-seed{config.seed}"
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


def _job(config: DictConfig) -> None:
    """One job, run by Hydra; errors leave as SystemExit, which Hydra does not dress up."""
    from experiments import train

    try:
        settings = HydraConfig.get()
        folder = Path(settings.runtime.output_dir)
        sweep = Path(settings.sweep.dir).name if settings.mode == RunMode.MULTIRUN else None
        train.run(validate(config), folder, group=sweep)
    except RunError as error:
        print(f"groundwave: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        print("groundwave: interrupted; resume=auto goes on from the newest checkpoint", file=sys.stderr)
        raise SystemExit(130) from error
    except Exception as error:
        traceback.print_exc()
        raise SystemExit(1) from error


def run_train(arguments: list[str]) -> int:
    """`groundwave train`. Returns the exit status."""
    prepared = prepare(arguments)
    GlobalHydra.instance().clear()
    register()
    saved = sys.argv
    sys.argv = [saved[0] if saved else "groundwave", *prepared]
    try:
        hydra.main(version_base="1.3", config_path="pkg://conf", config_name="train")(_job)()
    finally:
        sys.argv = saved
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the `groundwave` command. Returns the exit status."""
    # Idle threads that spin cost a shared machine ten times the run's own work; read when torch's OpenMP loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.getLogger("jax").setLevel(logging.WARNING)  # JAX tells of every kind of device that is not there
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"train": run_train, "compare": run_compare}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    try:
        if arguments[0] not in commands:
            raise RunError(f"unknown command {arguments[0]!r}; expected one of {', '.join(commands)}")
        return commands[arguments[0]](arguments[1:])
    except RunError as error:
        print(f"groundwave: {error}", file=sys.stderr)
        return 2


def run_compare(arguments: list[str]) -> int:
    """`groundwave compare`. Returns 0 if the curves agree within the band, 1 if they do not."""
    from experiments.compare import main as compare

    return compare(arguments)


if __name__ == "__main__":
    sys.exit(main())
