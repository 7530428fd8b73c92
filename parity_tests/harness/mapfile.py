"""A weight map as a small TOML file, which a Case takes in the place of rules: `weights="my_port.map.toml"`.

    schema = "parity-map/1"

    [ties]                                          # leaves of the reference that share memory
    "head.weight" = "embedding.weight"

    [leaves]                                        # reference leaf = candidate leaf, with what is done to the array on the way
    "embedding.weight" = "embedding.embedding"
    "up.weight" = { to = "up.kernel", do = [{ transpose = [1, 0] }] }

    [[rule]]                                        # several leaves to one, one to several, or a leaf that only one side has
    from = ["q.weight", "k.weight", "v.weight"]
    to = ["qkv.kernel"]
    do = [{ concat = { axis = 0, sizes = [5, 5, 5] } }, { transpose = [1, 0] }]

Operations: transpose = axes; reshape = [shape, shape]; heads = { order, axis }; split and concat = { axis, sizes }; constant = value.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .convert import Concat, Constant, ConversionError, HeadPermutation, Operation, Reshape, Rule, Split, Transpose

SCHEMA = "parity-map/1"
MAKERS: Mapping[str, Callable[[Any], Operation]] = {
    "transpose": lambda value: Transpose(tuple(value)),
    "reshape": lambda value: Reshape(tuple(value[0]), tuple(value[1])),
    "heads": lambda value: HeadPermutation(tuple(value["order"]), value.get("axis", 0)),
    "split": lambda value: Split(value["axis"], tuple(value["sizes"])),
    "concat": lambda value: Concat(value["axis"], tuple(value["sizes"])),
    "constant": lambda value: Constant(np.asarray(value)),
}


def load(path: str | Path) -> tuple[tuple[Rule, ...], dict[str, str]]:
    """Rules and ties of a file. Raises ConversionError, in one line, for a file that is missing, no map, or holds something unknown."""
    try:
        content = tomllib.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConversionError(f"the weight map {path} cannot be read: {error}") from error
    if content.get("schema") != SCHEMA:
        raise ConversionError(f"the weight map {path} has schema {content.get('schema')!r}, expected {SCHEMA!r}")
    unknown = sorted(set(content) - {"schema", "ties", "leaves", "rule"})
    if unknown:
        raise ConversionError(f"the weight map {path} has {unknown[0]!r}, expected schema, ties, leaves and rule")
    rules = []
    for source, target in content.get("leaves", {}).items():
        table = {"to": target} if isinstance(target, str) else target
        rules.append(_rule(path, {**table, "from": [source]} if isinstance(table, dict) else table))
    rules += [_rule(path, table) for table in content.get("rule", [])]
    ties = content.get("ties", {})
    if not all(isinstance(name, str) for name in ties.values()):
        raise ConversionError(f"the weight map {path} has ties that are no names: {ties}")
    return tuple(rules), dict(ties)


def _rule(path: str | Path, table: Any) -> Rule:
    wrong = sorted(set(table) - {"from", "to", "do"}) if isinstance(table, dict) else [repr(table)]
    if wrong:
        raise ConversionError(f"the weight map {path} has a rule with {wrong[0]}, expected from, to and do")
    sources, targets = (_names(path, table, side) for side in ("from", "to"))
    operations = []
    for step in table.get("do", []):
        if not isinstance(step, dict) or len(step) != 1 or next(iter(step)) not in MAKERS:
            raise ConversionError(f"the weight map {path} has the operation {step!r}, expected one of {', '.join(MAKERS)}")
        name, value = next(iter(step.items()))
        try:
            operations.append(MAKERS[name](value))
        except (TypeError, KeyError, IndexError, ValueError) as error:
            raise ConversionError(f"the weight map {path} has {name} = {value!r}, which is no such operation: {error}") from error
    return Rule(sources, targets, tuple(operations))


def _names(path: str | Path, table: Mapping[str, Any], side: str) -> tuple[str, ...]:
    value = table.get(side, [])
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ConversionError(f"the weight map {path} has {side} = {value!r}, expected names of leaves")
    return tuple(value)


def text(rules: Sequence[Rule], ties: Mapping[str, str], comment: Sequence[str] = ()) -> str:
    """The file of a map. Rules of one leaf to one leaf are a line each. Raises ConversionError for an operation that has no spelling."""
    lines = [*(f"# {line}" for line in comment), f"schema = {_string(SCHEMA)}"]
    if ties:
        lines += ["", "[ties]", *(f"{_string(tied)} = {_string(name)}" for tied, name in ties.items())]
    single = [rule for rule in rules if len(rule.sources) == len(rule.targets) == 1]
    if single:
        lines += ["", "[leaves]"]
    for rule in single:
        target = _string(rule.targets[0])
        if rule.operations:
            target = f"{{ to = {target}, do = [{', '.join(map(_operation, rule.operations))}] }}"
        lines.append(f"{_string(rule.sources[0])} = {target}")
    for rule in rules:
        if rule not in single:
            lines += ["", "[[rule]]", f"from = [{', '.join(map(_string, rule.sources))}]", f"to = [{', '.join(map(_string, rule.targets))}]",
                      f"do = [{', '.join(map(_operation, rule.operations))}]"]
    return "\n".join(lines) + "\n"


def _operation(operation: Operation) -> str:
    if isinstance(operation, Transpose):
        return f"{{ transpose = {list(operation.axes)} }}"
    if isinstance(operation, Reshape):
        return f"{{ reshape = [{list(operation.source)}, {list(operation.target)}] }}"
    if isinstance(operation, HeadPermutation):
        return f"{{ heads = {{ order = {list(operation.order)}, axis = {operation.axis} }} }}"
    if isinstance(operation, (Split, Concat)):
        name = "split" if isinstance(operation, Split) else "concat"
        return f"{{ {name} = {{ axis = {operation.axis}, sizes = {list(map(int, operation.sizes))} }} }}"
    if isinstance(operation, Constant):
        return f"{{ constant = {json.dumps(operation.value.tolist())} }}"
    raise ConversionError(f"a weight map has no spelling for the operation {operation!r}")


def _string(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
