"""Configurations composed and validated as Hydra would, before it runs a job with them.

A root is a YAML file with a schema: `train`, `distil`, `control`, `evaluate`, `parity`. Whatever is wrong with its fields is a RunError of one
line that names the field.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf import schema
from conf.control_schema import ControlConfig
from conf.distil_schema import DistilConfig, EvaluateConfig
from conf.models import WaveCoreConfig
from conf.parity_schema import ParityConfig
from experiments import refusals
from experiments.errors import RunError

ROOTS: dict[str, type] = {
    "train": schema.TrainConfig, "distil": DistilConfig, "control": ControlConfig, "evaluate": EvaluateConfig, "parity": ParityConfig,
}
MODULES = dict.fromkeys(ROOTS, "conf") | {"evaluate": "conf.commands.evaluate"}  # the package that holds the root's YAML
_NOISE = ("full_key:", "object_type=", "reference_type=", "See ", "To append", "Set the environment variable")
_COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, ValueError, TypeError, KeyError, AttributeError, AssertionError)


@functools.cache
def register() -> None:
    """Put the dataclass schemas into Hydra's store, once for a process, open to our own YAML (a frozen dataclass gives a read-only node)."""
    store = ConfigStore.instance()
    for name, kind in ROOTS.items():
        root = OmegaConf.structured(kind)
        _open(root)
        if name in ("train", "control"):
            root.model = "???"  # a group has to be chosen
        store.store(name=f"{name}_schema", node=root)
    for name, config in {**schema.MODELS, "wavecore": WaveCoreConfig}.items():
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
        text = " ".join(" ".join(kept).split()).split(" value: {")[0].rstrip(".")
        text = f"{key}: {text}" if key and key not in text else text
        if text and not any(text in part for part in parts):
            parts.append(text)
        here = here.__cause__
    return ": ".join(parts) or type(error).__name__


def validate(config: DictConfig, root: str = "train") -> Any:
    """Objects of a composed configuration: an instance of `ROOTS[root]`. Raises RunError naming the field that is impossible or unknown."""
    _known(config, "")
    try:
        if root == "train":
            _check_model(config.architecture, config.model)
        sections = {str(name): _object(config[name], str(name)) for name in config}
    except OmegaConfBaseException as error:
        raise RunError(one_line(error)) from error
    try:
        return ROOTS[root](**sections)
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
            raise RunError(f"{path}{name}: unknown field; {refusals.expected(str(name), map(str, names))}")
        child = None if OmegaConf.is_missing(node, name) else node._get_node(name)
        if isinstance(child, DictConfig):
            _known(child, f"{path}{name}.")


def _check_model(architecture: str, model: Any) -> None:
    if architecture not in schema.MODELS:
        raise RunError(f"architecture must be one of {', '.join(map(repr, schema.MODELS))}, found {architecture!r}")
    expected = schema.MODELS[architecture]
    if OmegaConf.get_type(model) is not expected:
        raise RunError(f"model must be a {expected.__name__} for architecture={architecture}; choose a group, as in model=grounded_mamba_tiny")


def composed(overrides: list[str], root: str = "train") -> DictConfig:
    """The configuration that Hydra would hand to a job with these overrides. Raises RunError."""
    GlobalHydra.instance().clear()
    register()
    try:
        with initialize_config_module(config_module=MODULES[root], version_base="1.3"):
            return compose(root, overrides=overrides)
    except _COMPOSE_ERRORS as error:
        missing = "; pip install 'groundwave[sweep]'" if "hydra/launcher/" in str(error) else ""
        raise RunError((refusals.sentence(error, overrides, root) or one_line(error)) + missing) from error


def jobs(overrides: list[str]) -> list[list[str]]:
    """The overrides of every job of a sweep, in Hydra's order (the last key varies fastest). Raises RunError."""
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except _COMPOSE_ERRORS as error:
        raise RunError(refusals.sentence(error, overrides, "train") or one_line(error)) from error
    choices = [
        [f"{item.get_key_element()}={text}" for text in item.sweep_string_iterator()] if item.is_sweep_override() else [item.input_line or ""]
        for item in parsed
    ]
    return [list(chosen) for chosen in itertools.product(*choices)]
