"""Reports as JSON: they read back, they fit their own schema, and what is wrong with a file is said by the name of the field."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from parity_tests.harness import records, report
from parity_tests.harness.mutate import Mutation
from parity_tests.harness.tests import synthetic

BUG = Mutation("gelu", "a.b", "a.b", True, "forced", ("2 meaning",), math.nan, True, "a sentence")


def fits(value: Any, schema: dict, whole: dict) -> bool:
    """Whether a value fits a JSON Schema, of which these are the parts that `records.schema` uses."""
    if "$ref" in schema:
        return fits(value, whole["$defs"][schema["$ref"].rpartition("/")[2]], whole)
    if "anyOf" in schema:
        return any(fits(value, part, whole) for part in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return value in schema.get("enum", [schema.get("const")])
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float), "null": type(None)}
    if not isinstance(value, kinds[schema["type"]]) or (isinstance(value, bool) and schema["type"] != "boolean"):
        return False
    if schema["type"] == "array":
        return all(fits(item, schema["items"], whole) for item in value)
    if schema["type"] != "object":
        return True
    named, rest = schema.get("properties", {}), schema.get("additionalProperties")
    return all(name in value for name in schema.get("required", ())) and all(
        fits(item, named.get(name, rest), whole) for name, item in value.items() if named.get(name, rest))


def test_results_read_back() -> None:
    made = synthetic.result("made", wrong="blocks.1.norm")
    text = report.to_json([made], {"made": [BUG]})
    assert report.from_json(text) == [made] and report.to_json(report.from_json(text), report.mutations_from_json(text)) == text
    (back,) = report.mutations_from_json(text)["made"]
    assert math.isnan(back.cosine) and replace(back, cosine=0.0) == replace(BUG, cosine=0.0)


def test_a_report_fits_its_schema_and_has_native_booleans() -> None:
    made = synthetic.result()
    made.tiers[0].checks[0] = replace(made.tiers[0].checks[0], value=math.inf, own_error=math.nan)
    record, schema = json.loads(report.to_json([made], {"made": [BUG]})), records.schema()
    assert fits(record, schema, schema)
    assert record["held"] is True and record["cases"][0]["held"] is True and record["cases"][0]["tiers"][1]["checks"][0]["held"] is True
    assert record["mutations"]["made"][0]["detected"] is True and record["cases"][0]["tiers"][0]["checks"][0]["value"] == "inf"
    for spoil in (lambda case: case.pop("order"), lambda case: case.update(leaves=True), lambda case: case["tiers"][1]["checks"][0].update(held=1),
                  lambda case: case["tiers"][1]["checks"][0].update(value="wide"), lambda case: case["tiers"][1].pop("name")):
        other = json.loads(json.dumps(record))
        spoil(other["cases"][0])
        assert not fits(other, schema, schema)
    names = {"Result", "TierResult", "Check", "Measure", "Series", "Mutation", "number"}
    assert set(schema["$defs"]) >= names and all(schema["$defs"][name].get("description") for name in names - {"number"})


WRONG: dict[str, tuple[Callable[[dict], Any], str]] = {
    "another schema": (lambda record: record.update(schema="other/3"), "expected a report of schema parity-report/1, found 'other/3'"),
    "no cases": (lambda record: record.pop("cases"), "cases: expected a list, found null"),
    "no object": (lambda record: record["cases"].append(3), r"cases\[1\]: expected an object \(Result\), found 3"),
    "a field is missing": (lambda record: record["cases"][0]["tiers"][2].pop("name"), r"cases\[0\].tiers\[2\].name: missing"),
    "a number for a boolean": (lambda record: record["cases"][0]["tiers"][1]["checks"][4].update(held=1),
                               r"cases\[0\].tiers\[1\].checks\[4\].held: expected true or false, found 1"),
    "a string for a number": (lambda record: record["cases"][0]["tiers"][1]["checks"][4].update(value="much"),
                              r'value: expected a number or one of nan, inf, -inf, found "much"'),
    "a boolean for a number": (lambda record: record["cases"][0]["input_errors"].update(a=True), r"input_errors.a: expected a number"),
    "a fraction for a whole number": (lambda record: record["cases"][0].update(leaves=2.5), r"leaves: expected a whole number, found 2.5"),
    "a string for a list": (lambda record: record["cases"][0].update(notes="a note"), r'cases\[0\].notes: expected a list, found "a note"'),
    "a list for an object": (lambda record: record["cases"][0].update(order=[]), r"cases\[0\].order: expected an object, found \[\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_file_is_said_by_name(case: str) -> None:
    spoil, message = WRONG[case]
    record = json.loads(report.to_json([synthetic.result(layers=2)]))
    spoil(record)
    with pytest.raises(records.ReportError, match=message):
        report.from_json(json.dumps(record))


@pytest.mark.parametrize(("text", "message"), [("", "found no JSON"), ("[1]", "found 'list'"), ("{", "found no JSON")])
def test_what_is_no_report_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report.from_json(text)


def test_files_of_earlier_and_later_versions_are_readable() -> None:
    """A field with a default may be absent; one that is not known is passed over."""
    record = json.loads(report.to_json([synthetic.result()]))
    for name in ("series", "meta", "totals"):
        del record["cases"][0][name]
    record["cases"][0]["to come"] = {"a": 1}
    (back,) = report.from_json(json.dumps(record))
    assert back.series == [] and back.meta == {} and back.checks == synthetic.result().checks
