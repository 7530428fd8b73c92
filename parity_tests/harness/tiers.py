"""The forward tiers: conversion, coverage, forced layers, free runs, rounding in low precision, splits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from . import ahead, series, tree
from .adapters.base import Unsupported
from .case import CaseError, raised
from .compare import Check, Place, exact, failed, passed, rounded
from .convert import copied, unique_integers
from .measure import MeasureError, relative_l2
from .recording import Forced, Recording, ReferenceRaised, Skip, matching
from .regimes import AS_IS, Regime

if TYPE_CHECKING:
    from .battery import Battery


def guarded(place: Place, battery: Battery, compute: Callable[[], list[Check]]) -> list[Check]:
    """The checks of `compute`; an exception is a failed check that carries its first line."""
    try:
        return compute()
    except (Unsupported, Skip):
        raise
    except ReferenceRaised as error:
        return [failed(place, 1, f"the reference raised {error}", quantity="a result")]
    except Exception as error:
        return [failed(place, 1, f"the candidate raised {raised(error)}", quantity="a result")]


def applicable(battery: Battery, tier: str, get: Callable[[Regime], Any]) -> Iterator[tuple[Regime, Any]]:
    """Every regime with what `get` gives for it; those that do not apply are noted, one line for a reason."""
    left_out: dict[str, list[str]] = {}
    for regime in battery.recording.regimes:
        try:
            value = get(regime)
        except Skip as reason:
            left_out.setdefault(str(reason), []).append(regime.name)
            continue
        battery.progress(f"{tier}: {regime.name}")
        yield regime, value
    for reason, names in left_out.items():
        battery.note(f"not run under {', '.join(names)}: {reason}")


def conversion(battery: Battery) -> list[Check]:
    """Bit for bit both ways, with the weights of the case and with integers of which none occurs twice; copies, not views."""
    place = Place("conversion", "", AS_IS, "float64")
    recording, candidate = battery.recording, battery.candidate
    weights = recording.weights
    if not weights:
        raise Unsupported("neither side has a weight")
    shapes = {name: leaf.shape for name, leaf in recording.leaves.items()}
    integers = unique_integers(shapes)
    for rule in candidate.map.rules:
        if not rule.targets:
            integers.update(zip(rule.sources, map(copied, rule.inverse([])), strict=True))
    integers.update({tied: copied(integers[name]) for tied, name in candidate.map.ties.items()})
    checks = []
    for what, arrays in (("weights", weights), ("unique integers", integers)):
        there = candidate.map.to_candidate(arrays)
        back = candidate.map.to_reference(there)
        wrong = [name for name in arrays if arrays[name].shape != back[name].shape or arrays[name].tobytes() != back[name].tobytes()]
        again = candidate.map.to_candidate(back)
        wrong += [name for name in there if there[name].tobytes() != again[name].tobytes()]
        count = sum(len(np.unique(value)) for value in there.values())
        if what == "unique integers" and not any(rule.constant for rule in candidate.map.rules) and count != sum(v.size for v in there.values()):
            wrong.append("(an integer occurs twice in the candidate)")
        checks.append(failed(place, 9, f"{what} differ after the way there and back: {', '.join(sorted(set(wrong)))}", quantity="bits") if wrong
                      else passed(place, 9, f"{what}: {len(arrays)} leaves there and back, bit for bit", quantity="bits"))
    held = battery.candidate.adapter("float64").arrays()
    for name, expected in candidate.weights.items():
        if not np.array_equal(held[name], expected):
            origin = ", ".join(candidate.map.sources_of(name)) or name
            at = Place("conversion", origin.rpartition(".")[0], AS_IS, "float64", battery.position(origin.rpartition(".")[0]))
            checks.append(failed(at, 9, f"{name} of the candidate does not hold the reference's {origin}", origin, "bits"))
    return checks


def coverage(battery: Battery) -> list[Check]:
    """Every module that the reference calls has a partner in the candidate, and the same leaves are trained."""
    recording, candidate = battery.recording, battery.candidate
    checks: list[Check] = []
    if candidate.kind != "callable" and recording.kind != "callable":
        for path, order in recording.order().items():
            place = Place("coverage", path, AS_IS, "float64", order)
            if candidate.path(path) is not None:
                checks.append(passed(place, 1, "has a partner", quantity="a partner"))
                continue
            reason = matching(recording.case.unpaired, path)
            if reason is None:
                checks.append(failed(place, 1, f"the candidate has no module {recording.rename(path)!r}; give names={{...}} or unpaired={{...}}",
                                     quantity="a partner"))
            else:
                battery.note(f"coverage, {path}: no partner, {reason}")
        trained = {source for name, leaf in candidate.leaves.items() if leaf.trainable for source in candidate.map.sources_of(name)}
        for name, leaf in recording.leaves.items():
            if name in recording.case.ties:
                continue
            if leaf.trainable != (name in trained):
                sides = ("trained in the reference but not in the candidate", "trained in the candidate but not in the reference")
                checks.append(failed(Place("coverage", leaf.module, AS_IS, "float64", battery.position(leaf.module)), 1,
                                     f"{name} is {sides[0 if leaf.trainable else 1]}", name, "trained leaves"))
        untapped = sorted(battery.free_run(recording.plain()[0]).untapped) if battery.runs() else []
        if untapped:
            battery.note(f"coverage: called inside a loop of the candidate, so compared by force only: {', '.join(untapped)}")
    return checks or [passed(Place("coverage", "", AS_IS, "float64"), 1, "a function is compared as a whole", quantity="a partner")]


def forced(battery: Battery) -> list[Check]:
    """Meaning: every layer on the reference's own inputs, float64."""
    checks: list[Check] = []
    if battery.recording.kind == "callable" or battery.candidate.kind == "callable":
        raise Unsupported("a function has no layers; the free tier compares it as a whole")
    if set(battery.order) <= {""}:
        raise Unsupported("the model is a single layer, which the free tier compares on the same input")
    ahead.forced(battery)
    for regime, layers in applicable(battery, "forced", battery.recording.forced):
        for layer in layers:
            if battery.candidate.path(layer.path) is None:
                continue
            place = Place("forced", layer.path, regime.name, "float64", battery.position(layer.path))
            checks += guarded(place, battery, lambda layer=layer, place=place: exact(
                place, layer.outputs, battery.candidate.call(layer, "float64"), battery.bounds, "forced"))
    return checks


def free(battery: Battery) -> list[Check]:
    """Meaning: the models end to end, and every layer on the way, float64."""
    checks: list[Check] = []
    ahead.free(battery)
    for regime, reference in applicable(battery, "free", battery.recording.run):
        last = Place("free", "", regime.name, "float64", battery.position(""))

        def compare(regime: Regime = regime, reference: Any = reference, last: Place = last) -> list[Check]:
            found, run = [], battery.free_run(regime)
            for call, other in battery.matched(reference, run):
                battery.agree(call, other)
                if call.path:
                    place = Place("free", call.path, regime.name, "float64", battery.position(call.path))
                    found += exact(place, call.outputs, other.outputs, battery.bounds, "free")
                    if regime.name == AS_IS and call.index == 0:
                        over_time(battery, regime, place, call.outputs, other.outputs)
            over_time(battery, regime, last, reference.outputs, run.outputs)
            return found + exact(last, reference.outputs, run.outputs, battery.bounds, "free")

        checks += guarded(last, battery, compare)
    return checks


def rounding(battery: Battery) -> list[Check]:
    """Rounding in every lower precision, against the float64 oracle: whole runs under all regimes, forced layers where rounding can differ.

    For layers those are the regimes of the case's own sizes and the longest one: a shorter sequence or a smaller batch adds no rounding.
    """
    checks: list[Check] = []
    lower = [dtype for dtype in battery.case.dtypes if dtype != "float64"]
    if not lower:
        raise Unsupported("the case names no precision below float64")
    ahead.rounding(battery)
    for dtype in lower:
        recording, chosen = battery.recording.within(dtype), ahead.rounded_regimes(battery.recording, dtype)
        for regime in battery.recording.regimes:
            if ahead.drowned(regime, dtype):
                battery.note(f"rounding, {dtype}: not run under {regime.name}, which rounds values near 1 to a few steps")
        for regime, layers in applicable(battery, f"rounding, {dtype}", recording.forced):
            if regime not in chosen:
                continue
            for layer in layers:
                if battery.candidate.path(layer.path) is not None:
                    place = Place("rounding", layer.path, regime.name, dtype, battery.position(layer.path))
                    checks += guarded(place, battery, lambda layer=layer, place=place, regime=regime, recording=recording: _forced_rounding(
                        battery, recording, regime, layer, place))
        for regime, oracle in applicable(battery, f"rounding end to end, {dtype}", recording.run):
            if ahead.drowned(regime, dtype):
                continue
            place = Place("rounding", "", f"{regime.name}, end to end", dtype, battery.position(""))

            def compare(regime: Regime = regime, oracle: Any = oracle, place: Place = place, dtype: str = dtype,
                        recording: Recording = recording) -> list[Check]:
                try:
                    own = recording.run(regime, dtype).outputs
                except (CaseError, Skip) as error:  # it runs in float64, so it is the precision that it refuses
                    return [failed(place, 1, f"the reference cannot be run in {dtype}, leave it out of dtypes: {error}", quantity="a result")]
                found = battery.free_run(regime, dtype).outputs
                over_time(battery, regime, place, oracle.outputs, found, own)
                return rounded(place, oracle.outputs, own, found, battery.bounds, lambda: recording.neighbours(regime, dtype))

            checks += guarded(place, battery, compare)
    return checks


def _forced_rounding(battery: Battery, recording: Recording, regime: Regime, layer: Forced, place: Place) -> list[Check]:
    def excused(leaf: str) -> None:  # the regime's numbers, not the model's
        name = f"{layer.path} ({leaf})" if leaf else layer.path
        battery.note(f"rounding, {name} under {regime.name}: not compared, the reference itself leaves the range of {place.dtype}")

    return rounded(place, layer.outputs, recording.own(regime, layer, place.dtype), battery.candidate.call(layer, place.dtype), battery.bounds,
                   lambda: recording.neighbours(regime, place.dtype, layer), excused if regime.on_floats else None)


def over_time(battery: Battery, regime: Regime, place: Place, oracle: Any, candidate: Any, own: Any = None) -> None:
    """Keep the error over time steps for the report, under the plain regimes and the longest one."""
    longest = max((other.length or 0 for other in battery.recording.regimes), default=0)
    if regime in battery.recording.plain() or (regime.length is not None and regime.length == longest):
        with contextlib.suppress(tree.TreeError):  # outputs that have no names are reported where they are compared
            axis = series.steps(battery.case, battery.recording.inputs(regime))
            battery.series += series.over_time((place.where, regime.name, place.dtype), axis, oracle, candidate, own)


def splits(battery: Battery) -> list[Check]:
    """Every two-way split with the state handed on equals the whole, in the reference and in the candidate."""
    case, recording = battery.case, battery.recording
    if case.states is None:
        raise Unsupported("the model carries no state")
    (inputs, along, length), axis = ahead.split_inputs(battery), case.states.axis
    if length < 2:
        raise Unsupported(f"a sequence of {length} cannot be split")
    ahead.splits(battery)
    start, own = recording.states(recording.plain()[1]), battery.states(recording.plain()[1])
    checks: list[Check] = []
    for where, begin in (("from a carried state", start), ("from the beginning", None)):
        whole = recording.adapter("float64").run(inputs, begin, tap=False).outputs
        places = range(1, length) if begin is not None else (length // 2,)
        sides = [("reference", recording.adapter("float64"))] if recording.live else []
        for side, adapter in (*sides, ("candidate", battery.candidate.adapter("float64"))):
            for cut in places:
                battery.progress(f"splits: {side} {cut} of {length}")
                place = Place("splits", "", f"split at {cut} of {length} {where}" + ("" if side == "candidate" else ", reference"), "float64", cut)

                given = begin if begin is None or side == "reference" else own

                def compare(adapter: Any = adapter, cut: int = cut, place: Place = place, begin: Any = given, whole: Any = whole) -> list[Check]:
                    parts = [{name: np.take(value, part, axis=axis) if name in along else value for name, value in inputs.items()}
                             for part in (np.arange(cut), np.arange(cut, length))]
                    first = adapter.run(parts[0], begin, tap=False).outputs
                    second = adapter.run(parts[1], recording.state_of(first), tap=False).outputs
                    return exact(place, whole, glued(first, second, case.states.output, axis), battery.bounds, "splits", 5)

                checks += guarded(place, battery, compare)
    return checks


def glued(first: Any, second: Any, state: int, axis: int) -> tuple:
    """Outputs of the two parts joined along time; the state is that of the second."""
    joined = []
    for index, (left, right) in enumerate(zip(first, second, strict=True)):
        if index == state:
            joined.append(right)
            continue
        rest = tree.named(right)
        joined.append(tree.map_named(lambda name, leaf, rest=rest: np.concatenate([leaf, rest[name]], axis=axis), left))
    return tuple(joined)


def input_error(reference: Any, candidate: Any) -> float:
    """Largest relative L2 over the float leaves that two calls were given; NaN when they do not compare."""
    left, right = tree.named(reference), tree.named(candidate)
    errors = [0.0]
    for name, value in left.items():
        if not isinstance(value, np.ndarray):
            continue
        if name not in right:
            return float("nan")
        try:
            errors.append(relative_l2(value, np.asarray(right[name])))
        except MeasureError:
            return float("nan")
    return max(errors)
