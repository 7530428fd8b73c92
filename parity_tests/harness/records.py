"""Reports as JSON: written with a schema name and native booleans, read back as the same objects, or refused with the field that is wrong.

The schema follows the dataclasses `Result`, `TierResult`, `Check`, `Measure`, `Series` and `Mutation` field by field, with `held` beside the
fields of a result and a mutation; `schema()` is the JSON Schema of the whole (`parity report --schema` prints it). Numbers that JSON does not
have are the strings "nan", "inf" and "-inf". A reader passes over fields that it does not know, and fields that have a default may be absent:
files of earlier versions stay readable, and the number in the schema's name changes only when a field changes its meaning.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from .battery import Result
from .mutate import Mutation

SCHEMA = "parity-report/1"
NUMBERS = ("nan", "inf", "-inf")


class ReportError(ValueError):
    """A file that is no report of this schema; the message names the field."""


def plain(value: Any) -> Any:
    """Native JSON values; numbers that JSON does not have are spelled as strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, (bool, int, float, str)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def to_json(results: Sequence[Result], totals: Sequence[str] = (), mutations: Mapping[str, Sequence[Mutation]] | None = None) -> str:
    """Results as JSON: schema name, verdict, everything that was measured, one line of totals for each, and the mutations of cases by name."""
    lines = [{"totals": line} for line in totals] or [{} for _ in results]
    cases = [{**plain(result), "held": result.held, **line} for result, line in zip(results, lines, strict=True)]
    record: dict[str, Any] = {"schema": SCHEMA, "held": all(result.held for result in results), "cases": cases}
    if mutations:
        record["mutations"] = {name: [{**plain(item), "held": item.held} for item in found] for name, found in mutations.items()}
        record["held"] = record["held"] and all(item.held for found in mutations.values() for item in found)
    record["held"] = record["held"] and bool(results or mutations)
    return json.dumps(record, allow_nan=False, separators=(",", ":"))


def from_json(text: str) -> list[Result]:
    """The results that `to_json` wrote. Raises ReportError (a ValueError) for another schema, or naming a field that is not what it must be."""
    return [typed(Result, case, f"cases[{place}]") for place, case in enumerate(_opened(text)["cases"])]


def mutations_from_json(text: str) -> dict[str, list[Mutation]]:
    """The mutations of a report, by case; empty when none were injected. Raises ReportError."""
    found = _opened(text).get("mutations", {})
    return typed(dict[str, list[Mutation]], found, "mutations")


def _opened(text: str) -> dict:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ReportError(f"expected a report of schema {SCHEMA}, found no JSON: {error}") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise ReportError(f"expected a report of schema {SCHEMA}, found {found!r}")
    if not isinstance(record.get("cases"), list):
        raise ReportError(f"cases: expected a list, found {_shown(record.get('cases'))}")
    return record


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 50 else f"{text[:47]}..."


def typed(kind: Any, value: Any, path: str) -> Any:
    """`value`, as JSON has it, as an object of the annotated type. Raises ReportError naming `path` and what stands there."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else typed(next(item for item in args if item is not type(None)), value, path)
    if dataclasses.is_dataclass(kind):
        return _object(kind, value, path)
    if kind is float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(_expect(value, good or value in NUMBERS, path, f"a number or one of {', '.join(NUMBERS)}"))
    if kind is int:
        return _expect(value, isinstance(value, int) and not isinstance(value, bool), path, "a whole number")
    if kind in (bool, str):
        return _expect(value, isinstance(value, kind), path, "true or false" if kind is bool else "a string")
    if origin in (list, tuple):
        _expect(value, isinstance(value, list), path, "a list")
        return origin(typed(args[0], item, f"{path}[{place}]") for place, item in enumerate(value))
    if kind is dict or origin is dict:
        _expect(value, isinstance(value, dict), path, "an object")
        return {key: typed(args[1], item, f"{path}.{key}") for key, item in value.items()} if args else value
    raise TypeError(f"{path}: a report holds no {kind}")


def _object(kind: type, value: Any, path: str) -> Any:
    _expect(value, isinstance(value, dict), path, f"an object ({kind.__name__})")
    hints, given = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        if field.name in value:
            given[field.name] = typed(hints[field.name], value[field.name], f"{path}.{field.name}")
        elif _required(field):
            raise ReportError(f"{path}.{field.name}: missing")
    return kind(**given)


def _expect(value: Any, good: bool, path: str, expected: str) -> Any:
    if not good:
        raise ReportError(f"{path}: expected {expected}, found {_shown(value)}")
    return value


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def schema() -> dict:
    """The JSON Schema (draft 2020-12) of a report."""
    parts: dict[str, dict] = {}
    case = _described(Result, parts)
    mutation = _described(Mutation, parts)
    for name in (case, mutation):
        parts[name["$ref"].rpartition("/")[2]]["properties"]["held"] = {"type": "boolean"}
    parts["Result"]["properties"]["totals"] = {"type": "string"}
    parts["number"] = {"anyOf": [{"type": "number"}, {"enum": list(NUMBERS)}]}
    return {
        "title": SCHEMA, "type": "object", "required": ["schema", "held", "cases"],
        "properties": {"schema": {"const": SCHEMA}, "held": {"type": "boolean"}, "cases": {"type": "array", "items": case},
                       "mutations": {"type": "object", "additionalProperties": {"type": "array", "items": mutation}}},
        "$defs": dict(sorted(parts.items())),
    }


def _described(kind: Any, parts: dict[str, dict]) -> dict:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [_described(item, parts) if item is not type(None) else {"type": "null"} for item in args]}
    if dataclasses.is_dataclass(kind):
        if kind.__name__ not in parts:
            hints, fields = typing.get_type_hints(kind), dataclasses.fields(kind)
            parts[kind.__name__] = {}  # the name is taken before the fields are looked at
            parts[kind.__name__] = {
                "description": " ".join((kind.__doc__ or "").split()), "type": "object",
                "required": [field.name for field in fields if _required(field)],
                "properties": {field.name: _described(hints[field.name], parts) for field in fields},
            }
        return {"$ref": f"#/$defs/{kind.__name__}"}
    if kind is float:
        return {"$ref": "#/$defs/number"}
    if kind in (int, bool, str):
        return {"type": {int: "integer", bool: "boolean", str: "string"}[kind]}
    if origin in (list, tuple):
        return {"type": "array", "items": _described(args[0], parts)}
    return {"type": "object"} | ({"additionalProperties": _described(args[1], parts)} if args else {})
