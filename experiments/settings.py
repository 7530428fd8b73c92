"""The configuration of a run as it is shown at its start: every field by section, and what differs from the default run.

The default is the schema's, which `train.yaml` repeats, and for the model the tiny one of its architecture.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

import conf
from conf.schema import MODELS, TrainConfig
from experiments.folder import plain

# Places of a run, and sections that `experiment=compare` and `groundwave sweep` alone read.
_LEFT_OUT = ("run_dir", "output_dir", "comparison", "sweep")


def show(console: Console, config: TrainConfig) -> None:
    """Print the sections, fields that differ from the default run in bold and in a line of their own."""
    fields, changed = flat(plain(config)), differences(config)
    sections: dict[str, Text] = {}
    for name, value in fields.items():
        section, _, field = name.rpartition(".") if name.count(".") < 2 else (name.split(".")[0], "", name.split(".", 1)[1])
        line = sections.setdefault(section or "run", Text())
        line.append(" " if line else "")
        line.append(f"{field or name}={said(value)}", style="bold yellow" if name in changed else "dim")
    table = Table.grid(padding=(0, 2))
    for section, line in sections.items():
        table.add_row(section, line)
    console.print(table)
    if changed:
        listed = ", ".join(f"{name}={said(fields.get(name))} ({said(before)})" for name, before in changed.items())
        console.print(f"differs from the default run, whose value is in brackets: {listed}", markup=False, highlight=False)


def differences(config: TrainConfig) -> dict[str, Any]:
    """Fields that differ from the default run, with the default's value; None for a field that the default does not have."""
    default, here = flat(plain(defaults(config))) | {"architecture": TrainConfig().architecture}, flat(plain(config))
    return {name: default.get(name) for name in here if here[name] != default.get(name)}


def defaults(config: TrainConfig) -> TrainConfig:
    """The default run of the configuration's architecture."""
    path = importlib.resources.files(conf) / "model" / f"{config.architecture}_tiny.yaml"
    written = OmegaConf.create(path.read_text(encoding="utf-8"))
    sizes = OmegaConf.to_container(written.model, resolve=False)
    sizes["vocab_size"] = config.data.vocab_size  # an interpolation there
    base = TrainConfig()
    model = MODELS[config.architecture](**sizes)
    penalty = OmegaConf.select(written, "loss.state_penalty")
    loss = base.loss if penalty is None else replace(base.loss, state_penalty=list(penalty))
    return replace(base, architecture=config.architecture, model=model, loss=loss)


def flat(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Fields by their full names."""
    fields: dict[str, Any] = {}
    for name, value in tree.items():
        if path or name not in _LEFT_OUT:
            fields |= flat(value, f"{path}{name}.") if isinstance(value, Mapping) else {f"{path}{name}": value}
    return fields


def said(value: Any) -> str:
    """A value as one would write it in an override."""
    return value if isinstance(value, str) and value.isprintable() and " " not in value else json.dumps(value, separators=(",", ":"))
