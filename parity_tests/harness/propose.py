"""A weight map proposed for two models, and verified: `parity map CASE`.

    classes       leaves of both sides whose axes have the same sizes, in any order, may belong together; siblings that one side keeps
                  joined (q, k and v in one kernel) are found among the leaves that are left over
    fingerprints  tell the leaves of a class apart by what they do (`fingerprints`)
    names         decide between leaves with equal fingerprints: kind of layer, path, number of the block
    verification  with random weights through the map, loss and gradients of all leaves must agree

A map that is impossible, or that does not verify, is one ConversionError.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, permutations
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from . import mapping
from .adapters import opened
from .adapters.base import Adapter, Leaf, Unsupported
from .case import Case
from .convert import Concat, Constant, ConversionError, Operation, Rule, Split, WeightMap
from .fingerprints import SAME, Pair, Unit, apart, distance, flat, key, mark, shape_of
from .locate import number
from .policy import Policy, applied
from .recording import Recording

TRIES = 720  # orders of leaves with equal fingerprints that are tried when the order of their names does not verify

Chosen = tuple[Unit, Unit, tuple[Operation, ...]]


@dataclass(frozen=True)
class Proposal:
    """A verified map. `loss` and `worst` are the distances of loss and gradients under it, `worst` NaN for models without gradients.

    `by_name` counts the leaves that only shape and name told, `by_fingerprint` the others; `notes` name the former where it matters.
    """

    rules: tuple[Rule, ...]
    ties: dict[str, str]
    loss: float
    worst: float
    by_name: int
    by_fingerprint: int
    notes: tuple[str, ...] = ()

    def comment(self, name: str) -> list[str]:
        """What a file of the map says at its head."""
        checked = f"outputs agree to {number(self.loss)}" if math.isnan(self.worst) else \
            f"loss agrees to {number(self.loss)}, gradients to {number(self.worst)}"
        return [f"weight map of case {name!r}, reference = candidate; with random weights {checked} (relative)", *self.notes]


def propose(case: Case, progress: Callable[[str], None] | None = None) -> Proposal:
    """The map of a case's reference to its candidate. Rules that the case has are kept. Raises ConversionError when there is no such map."""
    sides = [opened(case, role, "float64") for role in ("reference", "candidate")]
    with applied(Policy(), {side.kind for side in sides}):
        return _proposed(case, sides, progress or (lambda _: None))


def _proposed(case: Case, sides: list[Adapter], say: Callable[[str], None]) -> Proposal:
    say("leaves of both models")
    left, right = (side.leaves() for side in sides)
    ties = {name: leaf.shared for name, leaf in left.items() if leaf.shared is not None and name not in case.ties and leaf.shared not in case.ties}
    recording = Recording(replace(case, ties={**case.ties, **ties}))
    kept = [rule for rule in case.weights if all(name in left for name in rule.sources) and all(name in right for name in rule.targets)]
    done = {name for rule in kept for name in (*rule.sources, *rule.targets)} | set(recording.case.ties)
    kept += [Rule((name,), (), (Constant(np.zeros((), np.int64)),)) for name, leaf in left.items()
             if leaf.layer == "batchnorm" and leaf.attribute == "num_batches_tracked" and name not in done]
    done |= {name for rule in kept for name in rule.sources}
    pairs = classes(*([Unit((leaf,), leaf.shape) for name, leaf in leaves.items() if name not in done] for leaves in (left, right)), case)
    inputs, seed = recording.inputs(recording.plain()[0]), case.seed
    say("fingerprints")
    mark(sides, pairs, recording.case.ties, inputs, (recording.weights, sides[1].arrays()), seed)
    chosen: list[Chosen] = []
    loose: list[list[int]] = []
    for pair in pairs:
        found, alike = assigned(*pair, case)
        loose += [[len(chosen) + place for place in places] for places in alike]
        chosen += found
    say("verification")
    rules, loss, worst = verified(sides, recording, kept, chosen, loose)
    notes = [f"told apart by name, since their fingerprints are equal: {', '.join(chosen[place][0].name for place in places)}" for places in loose]
    by_name = sum(map(len, loose)) + sum(pair[0][0].mark is None for pair in pairs if pair[0])
    return Proposal(tuple(rules), dict(recording.case.ties), loss, worst, by_name, len(chosen) - by_name, tuple(notes))


def classes(ours: list[Unit], theirs: list[Unit], case: Case) -> list[Pair]:
    """Units of both sides by the sizes of their axes, equally many of each. Raises ConversionError, naming what is left over."""
    uneven: list[Pair] = []
    for _ in range(len(ours) + len(theirs) + 1):
        table: dict[tuple, Pair] = {}
        for side, units in enumerate((ours, theirs)):
            for unit in units:
                table.setdefault((key(unit.shape), unit.floating), ([], []))[side].append(unit)
        uneven = [pair for pair in table.values() if len(pair[0]) != len(pair[1])]
        if not uneven:
            return list(table.values())
        if not _joined(ours, theirs, uneven) and not _flattened(uneven):
            break
    rename, lines = mapping.renamer(case.names), []
    for mine, others in uneven:
        lost = [f"{unit.name} {shape_of(unit)} of the reference" for unit in _over(mine, others, rename)]
        lost += [f"{unit.name} {shape_of(unit)} of the candidate" for unit in _over(others, mine, lambda path: path)]
        lines += lost
    raise ConversionError(f"no map is possible, {len(lines)} leaves have no partner of their size: {'; '.join(lines)}; "
                          "a leaf that only one side has needs a rule with a Constant in the case's weights")


def _over(units: list[Unit], others: list[Unit], rename: Callable[[str], str]) -> list[Unit]:
    """Those of a class that are left over when each of the other side has taken the nearest by name."""
    rest = list(units)
    for other in others:
        if rest:
            rest.remove(max(rest, key=lambda unit: likeness(unit, other, rename)))
    return rest


def _joined(ours: list[Unit], theirs: list[Unit], uneven: list[Pair]) -> bool:
    """Join siblings of one side whose joined shape a lone unit of the other has; whether that was possible for one."""
    for many, place in ((ours, 0), (theirs, 1)):
        spare = [unit for pair in uneven if len(pair[place]) > len(pair[1 - place]) for unit in pair[place] if len(unit.leaves) == 1]
        wanted = [unit for pair in uneven if len(pair[place]) < len(pair[1 - place]) for unit in pair[1 - place] if len(unit.leaves) == 1]
        for unit in wanted:
            for group in _siblings(spare):
                for axis in range(len(group[0].shape)):
                    shape = list(group[0].shape)
                    shape[axis] = sum(item.shape[axis] for item in group)
                    rest = {item.shape[:axis] + item.shape[axis + 1:] for item in group}
                    if len(rest) == 1 and key(shape) == key(unit.shape):
                        for item in group:
                            many.remove(item)
                        many.append(Unit(tuple(item.leaves[0] for item in group), tuple(shape), axis))
                        return True
    return False


def _siblings(units: list[Unit]) -> Iterator[list[Unit]]:
    """Runs of two or more units that are the same leaf of modules side by side, or leaves side by side of one module; longest first."""
    table: dict[tuple, list[Unit]] = {}
    for unit in units:
        leaf: Leaf = unit.leaves[0]
        table.setdefault((leaf.module.rpartition(".")[0], leaf.layer, leaf.attribute), []).append(unit)
        table.setdefault((leaf.module, leaf.layer, None), []).append(unit)
    for group in table.values():
        for count in range(len(group), 1, -1):
            yield from (group[start:start + count] for start in range(len(group) - count + 1)
                        if all(len(item.shape) == len(group[start].shape) for item in group[start:start + count]))


def _flattened(uneven: list[Pair]) -> bool:
    """Take two classes of equally many values for one when one is a reshape of the other, (heads, width) and (dim,); whether there were two."""
    for mine, others in uneven:
        for more, rest in uneven:
            if len(mine) > len(others) and len(rest) > len(more):
                one, two = mine[0], rest[0]
                if math.prod(one.shape) == math.prod(two.shape) and one.floating and two.floating:
                    for unit in (*mine, *others, *more, *rest):
                        unit.shape = (math.prod(one.shape),)
                    return True
    return False


def likeness(unit: Unit, other: Unit, rename: Callable[[str], str]) -> float:
    """Between 0 and 1: how alike paths, numbers and leaf names are, the leaf's by what its kind of layer is called on the other side."""
    one, two = unit.leaves[0], other.leaves[0]
    called = mapping.KINDS.get((one.layer, one.attribute), (one.attribute, ()))[0]
    names = [".".join(part for part in (rename(one.module), called) if part), two.name]
    numbers = [re.findall(r"\d+", name) for name in names]
    return 0.5 * difflib.SequenceMatcher(None, *names).ratio() + 0.3 * (numbers[0] == numbers[1]) + 0.2 * (called == two.attribute)


def assigned(mine: list[Unit], others: list[Unit], case: Case) -> tuple[list[Chosen], list[list[int]]]:
    """The pairs of a class, and the places of pairs that only names tell apart. Raises ConversionError for a unit without a partner."""
    rename = mapping.renamer(case.names)
    table = [[distance(unit, other) for other in others] for unit in mine]
    cost = np.array([[10.0 * (not entry[0] <= SAME) + 1.0 - likeness(unit, other, rename) for other, entry in zip(others, row, strict=True)]
                     for unit, row in zip(mine, table, strict=True)])
    pairs: list[Chosen] = []
    alike: dict[tuple, list[int]] = {}
    for row, column in zip(*linear_sum_assignment(cost), strict=True):
        far, way, order = table[row][column]
        unit, other = mine[row], others[column]
        if not far <= SAME:
            nearest = min(range(len(others)), key=lambda place, row=row: table[row][place][0])
            raise ConversionError(
                f"no leaf of the candidate does what {unit.name} {shape_of(unit)} does: the nearest is {others[nearest].name}, whose gradient "
                f"is {number(table[row][nearest][0])} from it (relative L2, with equal weights in all leaves of one shape)")
        if order != tuple(range(len(order))):
            many = unit if len(unit.leaves) > 1 else other
            changed = Unit(tuple(many.leaves[place] for place in order), many.shape, many.axis)
            unit, other = (changed, other) if many is unit else (unit, changed)
        same = tuple(place for place in range(len(others)) if table[row][place][0] <= SAME)
        alike.setdefault(same, []).append(len(pairs))
        pairs.append((unit, other, way))
    return pairs, [places for same, places in alike.items() if len(same) > 1 and len(places) > 1]


def rule(unit: Unit, other: Unit, way: tuple[Operation, ...]) -> Rule:
    """The rule of a pair: join, operations, split."""
    sources, targets = (tuple(leaf.name for leaf in item.leaves) for item in (unit, other))
    before = (Concat(unit.axis, unit.sizes),) if len(sources) > 1 else ()
    after = (Split(other.axis, other.sizes),) if len(targets) > 1 else ()
    return Rule(sources, targets, (*before, *way, *after))


def verified(sides: Sequence[Adapter], recording: Recording, kept: list[Rule], chosen: list[Chosen],
             loose: list[list[int]]) -> tuple[list[Rule], float, float]:
    """The rules under which both models agree with random weights: the order of names first, then other orders of what looks alike.

    Returns them with the distances of loss (outputs without gradients) and gradients. Raises ConversionError when no order agrees.
    """
    inputs, seed, ties = recording.inputs(recording.plain()[0]), recording.case.seed, recording.case.ties
    sides[0].load(recording.weights)
    try:
        expected: Any = sides[0].gradients(inputs, None, seed)
        sides[1].gradients(inputs, None, seed)
    except Unsupported:
        expected = None
    plain = flat(sides[0].run(inputs, None, tap=False).outputs)
    first: tuple[float, float, str] | None = None
    for order in islice(_orders(len(chosen), loose), TRIES):
        rules = kept + [rule(chosen[place][0], chosen[order[place]][1], chosen[place][2]) for place in range(len(chosen))]
        weight_map = WeightMap(tuple(rules), ties)
        try:
            sides[1].load(weight_map.to_candidate(recording.weights))
        except (ConversionError, ValueError) as error:
            if order == list(range(len(chosen))):
                raise ConversionError(f"the proposed map does not fit: {error}") from error
            continue
        found = _agreement(sides[1], weight_map, inputs, seed, ties, plain, expected)
        if found[0] <= SAME and not found[1] > SAME:
            return rules, found[0], found[1]
        first = first or found
    loss, worst, where = first or (math.inf, math.nan, "")
    detail = f"the gradient of {where} is off by {number(worst)}" if where else f"the outputs are off by {number(loss)}"
    names = ", ".join(chosen[place][0].name for places in loose for place in places)
    raise ConversionError(f"the proposed map does not verify: with random weights {detail} (relative L2); "
                          + (f"ambiguous, since alike with equal weights: {names}; name them in the case's names or weights" if loose
                             else "the two models differ where equal weights hide it"))


def _orders(count: int, loose: list[list[int]]) -> Iterator[list[int]]:
    """The order as it is, then those with the places of each loose group exchanged, one group after another."""
    yield list(range(count))
    for places in loose:
        for order in islice(permutations(places), 1, TRIES):
            made = list(range(count))
            for place, other in zip(places, order, strict=True):
                made[place] = other
            yield made


def _agreement(adapter: Adapter, weight_map: WeightMap, inputs: Mapping, seed: int, ties: Mapping[str, str], plain: np.ndarray,
               expected: Any) -> tuple[float, float, str]:
    """Distance of the losses, the worst gradient and its leaf; of the outputs, NaN and "" without gradients."""
    if expected is None:
        return apart(plain, flat(adapter.run(inputs, None, tap=False).outputs)), math.nan, ""
    found = adapter.gradients(inputs, None, seed)
    given = weight_map.gradients(found.parameters)
    everything = math.sqrt(sum(float(np.sum(np.square(value))) for value in expected.parameters.values())) or 1.0
    worst, where = 0.0, ""
    for name, value in expected.parameters.items():
        name = ties.get(name, name)
        other = given.get(name, np.zeros_like(value))
        noise = float(np.linalg.norm(value - other)) / (1e-6 * everything)  # a gradient that is zero in exact arithmetic is rounding
        far = min(apart(value, other), noise)
        if far >= worst:
            worst, where = far, name
    return abs(found.loss - expected.loss) / (abs(expected.loss) or 1.0), worst, where
