"""What Hydra and OmegaConf refuse, said in one line: the field, what was found there, and what may stand there.

Their own messages name a class, a search path or a place in a grammar. What a user can act on is in the exceptions: the field, the
dataclass that it is missing from or the type that it must have, the names of a group.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

import conf

_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
_PLURALS = {int: "integers, as in [1,2]", float: "numbers, as in [0.1,0.2]", str: "names, as in [a,b]"}
_KEYS = (ConfigKeyError, ConfigAttributeError)
_OWN = {"control": ("model=wavecore",)}  # roots that take the names of a group that begin so; others take the rest


def groups() -> list[str]:
    """Names of the config groups."""
    return sorted(folder.name for folder in Path(conf.__file__).parent.iterdir() if folder.is_dir() and any(folder.glob("*.yaml")))


def sentence(error: BaseException, overrides: Sequence[str], root: str) -> str | None:
    """One line for what `overrides` of the configuration `root` got wrong; None where the exceptions do not say more than their message."""
    for override in overrides:
        wrong = malformed(override)
        if wrong:
            return wrong
    here: BaseException | None = error
    while here is not None:
        found = _choice(here, root) if isinstance(here, MissingConfigException) else _field(here, overrides)
        if found:
            return found
        here = here.__cause__
    return None


def malformed(override: str) -> str | None:
    """One line for an override that is not one; None for one that is."""
    key, equals, value = override.partition("=")
    if not key.strip("+~ ") or (not equals and not key.startswith("~")):
        return f"{override}: expected KEY=VALUE, as in training.steps=300"
    try:
        OverridesParser.create().parse_override(override)
    except (HydraException, OmegaConfBaseException):
        if " " in value and "=" in value:
            return f"{key}: expected one KEY=VALUE in each argument, found {override!r}"
        return f"{key}: cannot read the value {value!r}; put what is not a plain word or number in quotes, as in \"{key.lstrip('+~')}='...'\""
    return None


def twice(overrides: Sequence[str]) -> str | None:
    """One line for a key to which two overrides give different values; None where there is none. Hydra would take the last."""
    values: dict[str, str] = {}
    for override in overrides:
        key, _, value = override.partition("=")
        key = key.lstrip("+")
        if values.setdefault(key, value) != value:
            return f"{key} is given twice, as {values[key]} and as {value}; give one of them"
    return None


def foreign(overrides: Sequence[str]) -> str | None:
    """One line for an override of where Hydra itself puts a run: the lock, the checkpoints and resuming go by `run_dir`."""
    for override in overrides:
        key, _, value = override.partition("=")
        if key.lstrip("+") in ("hydra.run.dir", "hydra.sweep.dir"):
            return f"{key}: the folder of a run is run_dir; give run_dir={value or 'FOLDER'}"
    return None


def _choice(error: MissingConfigException, root: str) -> str | None:
    if not error.missing_cfg_file or not error.options:
        return None
    group, _, name = error.missing_cfg_file.rpartition("/")
    begin = _OWN.get(root, ())
    others = [each for each in error.options if not any(f"{group}={each}".startswith(own) for owns in _OWN.values() for own in owns)]
    own = [each for each in error.options if any(f"{group}={each}".startswith(first) for first in begin)]
    options = own or others or list(error.options)
    return f"{group}={name}: no such choice of {group}; {expected(name, options)}"


def expected(found: str, options: Iterable[str]) -> str:
    """"expected one of ...", with the one that was probably meant in front."""
    options = list(options)
    swapped = [option for option in options if sorted(option) == sorted(found)]
    close = swapped or difflib.get_close_matches(found, options, n=1, cutoff=0.7)
    return (f"did you mean {close[0]}? " if close else "") + f"expected one of {', '.join(options)}"


def _field(error: BaseException, overrides: Sequence[str]) -> str | None:
    if not isinstance(error, OmegaConfBaseException) or not error.full_key:
        return None
    path, kind = error.full_key, error.object_type
    if isinstance(error.parent_node, ListConfig):  # an entry of a list, which is a field of what it stands in
        above = error.parent_node._get_parent()
        kind = OmegaConf.get_type(above) if isinstance(above, DictConfig) else None
    if not dataclasses.is_dataclass(kind):
        return None
    name = path.split("[")[0].rsplit(".", 1)[-1]
    fields = {field.name for field in dataclasses.fields(kind)}
    if isinstance(error, _KEYS) and name not in fields:
        names = [field.name for field in dataclasses.fields(kind)]
        return f"{path}: no such field; {expected(name, names if '.' in path else [*names, *(set(groups()) - set(names))])}"
    path = path.split("[")[0]
    if any(override.startswith(f"~{path}") for override in overrides):
        return f"{path}: a field cannot be taken away, only given another value"
    given = next((override.partition("=")[2] for override in reversed(overrides) if override.lstrip("+").startswith(f"{path}=")), None)
    if not isinstance(error, (ValidationError, *_KEYS)) or given is None or name not in fields:
        return None
    hint = typing.get_type_hints(kind)[name]
    return f"{path} must be {words(hint, path)}, found {given or 'nothing'}"


def words(hint: Any, path: str = "") -> str:
    """What a type allows: "an integer or null", "a list of names, as in [a,b]"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if each is type(None) else words(each, path) for each in arguments)
    if origin in (list, tuple):
        return f"a list of {_PLURALS.get(arguments[0], 'values')}"
    if dataclasses.is_dataclass(hint):
        first = dataclasses.fields(hint)[0].name
        return f"a section with fields of its own ({', '.join(field.name for field in dataclasses.fields(hint))}), as in {path}.{first}=..."
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))
