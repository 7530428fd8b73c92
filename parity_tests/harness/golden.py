"""Golden files: what the reference of a case computes, as one `.npz` of named arrays, so that a port is proved where the reference cannot run.

    meta                                   JSON: schema, case, leaves, modules, regimes, structures of arguments and outputs, provenance
    weights/NAME                           every leaf, by the reference's name
    as is/inputs, states, outputs          the inputs of a regime, the state handed over, what the model gives
    as is/calls/0003 blocks.0.norm/...     arguments and outputs of every module in run order
    as is/layers/...                       the layers on inputs of their own, with outputs and gradients
    as is/gradients/...                    gradients end to end by name
    .../float32/...                        the same outputs in lower precision
    splits/..., training/...               whole sequences that splits are compared to; losses and leaves after the optimiser run

An array that is held already is not written again: the structure in `meta` names the place of the first. `Golden` reads such a file as the
recording of a reference, and the tiers compare a candidate to it as they would to the reference itself. What asks the reference something
new (observability, repairs of the diagnosis) is not run, and the report says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import formats, mapping, provenance
from .adapters.base import Gradients, Leaf, Unsupported, digest
from .answers import SCHEMA, Golden
from .battery import Battery
from .case import Case, make, raised
from .convert import Rule
from .policy import Policy, applied, described
from .recording import Recording, Skip
from .regimes import Regime
from .structures import Arrays, StructureError


def record(case: Case, *, policy: Policy | None = None, progress: Callable[[str], None] = lambda _: None) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays of a golden file of a case, and notes on what could not be put in it. Raises CaseError for a reference that cannot be run."""
    recording = Recording(case)
    arrays, policy = Arrays(), policy or Policy()
    with applied(policy, {recording.kind}):
        base = recording.adapter("float64")
        meta: dict[str, Any] = {
            "schema": SCHEMA, "case": case.name, "kind": recording.kind, "seed": case.seed, "dtypes": list(case.dtypes),
            "leaves": [asdict(leaf) for leaf in recording.leaves.values()],
            "weights": {name: arrays.put(f"weights/{name}", value) for name, value in recording.weights.items()},
            "modules": [{"path": node.path, "layer": node.layer, "settings": _plain(node.settings)} for node in base.modules().values()],
            "regimes": [], "provenance": provenance.described(case) | {"policy": described(policy, {recording.kind}, case.jit)}}
        notes: list[str] = []
        every = {regime.name: regime for regime in (*recording.plain(), *recording.regimes)}
        for regime in every.values():
            progress(regime.name)
            meta["regimes"].append({"regime": asdict(regime), "asked": regime in recording.regimes, **_regime(recording, regime, arrays, notes)})
        notes += [f"{regime}: layer {path} is left out, the reference refuses it: {error}" for (regime, path), error in recording.refused.items()]
        progress("splits and training")
        meta["splits"] = _splits(recording, arrays)
        meta["training"] = _training(Battery(case, policy=policy, recording=recording, candidate=_Nobody()), arrays)
    return {"meta": np.asarray(json.dumps(meta, allow_nan=True)), **arrays.held}, notes


class _Nobody:
    """Stands for the candidate where only the reference is asked."""

    kind = "callable"


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is None or isinstance(value, (bool, int, float, str))}


def _regime(recording: Recording, regime: Regime, arrays: Arrays, notes: list[str]) -> dict[str, Any]:
    """What the reference does under a regime, as structures over `arrays`; {"skip": reason} for what does not apply."""
    entry: dict[str, Any] = {"layers": []}
    lower = [dtype for dtype in recording.case.dtypes if dtype != "float64"]
    try:
        run = recording.run(regime)
    except Skip as reason:
        entry["skip"] = str(reason)
    else:
        inputs, states = recording.inputs(regime), recording.states(regime)
        entry |= {"inputs": arrays.take(f"{regime.name}/inputs", inputs), "states": arrays.take(f"{regime.name}/states", states),
                  "outputs": arrays.take(f"{regime.name}/outputs", run.outputs), "calls": []}
        for place, call in enumerate(run.calls):
            at = f"{regime.name}/calls/{place:04d} {call.path}".rstrip()
            try:
                entry["calls"].append([call.path, call.index, *(arrays.take(f"{at}/{part}", getattr(call, part))
                                                               for part in ("args", "kwargs", "outputs"))])
            except StructureError as error:
                notes.append(f"{regime.name}: the call of {call.path or 'the model'} is left out: {error}")
        entry["own"] = {dtype: arrays.take(f"{regime.name}/{dtype}/outputs", recording.run(regime, dtype).outputs) for dtype in lower}
        if regime in recording.plain():
            entry["gradients"] = _gradients(arrays, f"{regime.name}/gradients", lambda: recording.adapter("float64").gradients(
                inputs, states, recording.case.seed))
    try:
        layers = recording.forced(regime) if recording.kind != "callable" else []
    except Skip as reason:
        entry["skip layers"] = str(reason)
        return entry
    seen: set[str] = set()
    for layer in layers:
        at = f"{regime.name}/layers/{layer.index:04d} {layer.path}"
        try:
            held = {"path": layer.path, "index": layer.index, **{part: arrays.take(f"{at}/{part}", getattr(layer, part))
                                                               for part in ("args", "kwargs", "outputs")}}
        except StructureError as error:
            notes.append(f"{regime.name}: layer {layer.path} is left out: {error}")
            continue
        held["own"] = {dtype: arrays.take(f"{at}/{dtype}/outputs", recording.own(regime, layer, dtype)) for dtype in lower}
        if regime in recording.plain() and layer.path not in seen:
            held["gradients"] = _gradients(arrays, f"{at}/gradients", lambda layer=layer: recording.adapter("float64").call_gradients(
                layer.path, layer.args, layer.kwargs, recording.case.seed))
        seen.add(layer.path)
        entry["layers"].append(held)
    return entry


def _gradients(arrays: Arrays, at: str, compute: Callable[[], Gradients]) -> dict[str, Any]:
    try:
        found = compute()
    except Unsupported as error:
        return {"unsupported": str(error)}
    except Exception as error:
        return {"error": raised(error)}
    return {"loss": found.loss, "parameters": arrays.take(f"{at}/parameters", found.parameters), "inputs": arrays.take(f"{at}/inputs", found.inputs)}


def _whole(recording: Recording) -> dict[str, np.ndarray]:
    case = recording.case
    return recording.grid(case.draw(case.seed, length=case.states.split_length if case.accepts("length") else None))


def _splits(recording: Recording, arrays: Arrays) -> list:
    if recording.case.states is None:
        return []
    inputs, found = _whole(recording), []
    for name, states in (("carried", recording.states(recording.plain()[1])), ("beginning", None)):
        outputs = recording.adapter("float64").run(inputs, states, tap=False).outputs
        found.append([digest((inputs, states)), arrays.take(f"splits/{name}/outputs", outputs)])
    return found


def _training(battery: Battery, arrays: Arrays) -> dict[str, Any]:
    if battery.case.trajectory is None:
        return {"unsupported": "the case names no trajectory"}
    batches = battery.batches()
    try:
        found = battery.reference_training(batches)
    except Unsupported as error:
        return {"unsupported": str(error)}
    except Exception as error:
        return {"error": raised(error)}
    return {"batches": digest(batches), "losses": arrays.take("training/losses", found.losses),
            "arrays": arrays.take("training/arrays", found.arrays)}


def write(path: Path, case: Case, *, progress: Callable[[str], None] = lambda _: None) -> tuple[int, int, list[str]]:
    """Write the golden file of a case. Returns how many arrays it holds, its size in bytes, and notes on what could not be put in it."""
    arrays, notes = record(case, progress=progress)
    formats.save(path, arrays, compressed=True)
    return len(arrays), path.stat().st_size, notes


def alone(case: Case, golden_leaves: Mapping[str, Leaf]) -> Case:
    """The case with its reference in the candidate's place, to check a reference against the file that it wrote."""
    def first(pair: tuple | None) -> tuple | None:
        return None if pair is None else (pair[0], pair[0])

    trajectory = case.trajectory and replace(case.trajectory, call=first(case.trajectory.call), after=first(case.trajectory.after))
    return replace(case, candidate=case.reference, names={}, weights=[Rule(name, name) for name in golden_leaves], ties={}, adapt=None, unpaired={},
                   loss=first(case.loss), call=first(case.call), trajectory=trajectory, also={})


def check(path: Path, case: Case, *, side: str = "candidate", progress: Callable[[str], None] | None = None) -> Battery:
    """The battery of a case's candidate (or of its reference) over a golden file. Raises GoldenError or CaseError."""
    golden = Golden(case, path)
    if side == "reference":
        golden.leaves = {name: replace(leaf, shared=None) for name, leaf in golden.leaves.items()}
        golden.case = alone(golden.case, golden.leaves)
        golden.rename = mapping.renamer({})
    also, absent = {}, []
    for name, entry in golden.case.also.items():
        try:
            make(entry[0] if isinstance(entry, tuple) else entry, "float64")
            also[name] = entry
        except ImportError as error:
            absent.append(f"implementation {name!r} has no vote: {raised(error)}")
    golden.case = replace(golden.case, also=also)
    battery = Battery(golden.case, recording=golden, progress=progress)
    for note in absent:
        battery.note(note)
    made = golden.meta["provenance"]
    battery.note(f"compared to {path.name}, which a {golden.meta['kind']} reference of case {golden.meta['case']!r} wrote at {made.get('time', '-')}"
                 + (f", commit {made['commit'][:12]}" if "commit" in made else ""))
    return battery
