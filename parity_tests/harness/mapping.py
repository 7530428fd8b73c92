"""The weight map of two models, from walking both side by side: what a leaf becomes follows from the kind of layer that owns it.

    torch                                  flax
    Linear.weight      (out, in)           kernel (in, out)
    Conv1d.weight      (out, in/groups, k) kernel (k, in/groups, out)             also depthwise
    Conv2d.weight      (out, in/groups, h, w)  kernel (h, w, in/groups, out)
    Embedding.weight                       embedding
    LayerNorm, RMSNorm, GroupNorm .weight  scale
    BatchNorm .weight, .running_mean, .running_var   scale, mean, var
    bare parameters and buffers            the leaf of the same name, as it is
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from .adapters.base import Leaf, joined
from .case import CaseError, raised
from .convert import Constant, ConversionError, Operation, Rule, Transpose, WeightMap

KINDS: Mapping[tuple[str, str], tuple[str, tuple[Operation, ...]]] = {
    ("linear", "weight"): ("kernel", (Transpose((1, 0)),)),
    ("conv1d", "weight"): ("kernel", (Transpose((2, 1, 0)),)),
    ("conv2d", "weight"): ("kernel", (Transpose((2, 3, 1, 0)),)),
    ("embedding", "weight"): ("embedding", ()),
    ("layernorm", "weight"): ("scale", ()),
    ("rmsnorm", "weight"): ("scale", ()),
    ("groupnorm", "weight"): ("scale", ()),
    ("batchnorm", "weight"): ("scale", ()),
    ("batchnorm", "running_mean"): ("mean", ()),
    ("batchnorm", "running_var"): ("var", ()),
}


def renamer(names: Mapping[str, str] | Callable[[str], str]) -> Callable[[str], str]:
    """A function from reference paths to candidate paths; the longest dotted prefix of a mapping wins, `*` stands for one part.

    In a candidate's path it may be a piece of a part: `{"blocks.*": "blocks_*"}`, as Linen names the modules of a list.
    """
    if callable(names):
        return _checked(names)
    table = sorted(((source.split("."), target.split(".")) for source, target in names.items()), key=lambda item: -len(item[0]))

    def rename(path: str) -> str:
        parts = path.split(".")
        for source, target in table:
            if len(source) <= len(parts) and all(want in ("*", part) for want, part in zip(source, parts, strict=False)):
                stars = iter(part for want, part in zip(source, parts, strict=False) if want == "*")
                fixed = [part.replace("*", next(stars, "*"), 1) if "*" in part else part for part in target]
                return ".".join([*(part for part in fixed if part), *parts[len(source):]])
        return path

    return rename


def _checked(names: Callable[[str], str]) -> Callable[[str], str]:
    def rename(path: str) -> str:
        try:
            found = names(path)
        except Exception as error:
            raise CaseError(f"names of the case raised {raised(error)} for {path!r}") from error
        if not isinstance(found, str):
            raise CaseError(f"names of the case gives {type(found).__name__} for {path!r}, expected a dotted path")
        return found

    return rename


def build(reference: Mapping[str, Leaf], candidate: Mapping[str, Leaf], *, names: Mapping[str, str] | Callable[[str], str],
          rules: Iterable[Rule] = (), ties: Mapping[str, str]) -> WeightMap:
    """The complete map between two sets of leaves.

    Raises ConversionError once, with every leaf that is missing, unused, misshapen, doubly matched or tied without being declared, each
    with the leaf of the nearest shape as a suggestion.
    """
    rename, problems = renamer(names), _tie_problems(reference, ties)
    found: list[Rule] = []
    for rule in rules:
        unknown = [name for name in rule.sources if name not in reference] + [name for name in rule.targets if name not in candidate]
        if unknown:
            problems.append(f"a rule of the case names {', '.join(unknown)}, which neither model has")
        else:
            found.append(rule)
    ruled = {name for rule in found for name in rule.sources}
    lost: list[Leaf] = []
    for leaf in reference.values():
        if leaf.name in ruled or leaf.name in ties:
            continue
        if leaf.layer == "batchnorm" and leaf.attribute == "num_batches_tracked":
            found.append(Rule((leaf.name,), (), (Constant(np.zeros((), np.int64)),)))
            continue
        rule = _by_kind(leaf, candidate, rename)
        if rule is None:
            lost.append(leaf)
        else:
            found.append(rule)
    problems += _double(found, "sources", "read") + _double(found, "targets", "set")
    set_once = {name for rule in found for name in rule.targets}
    empty = [leaf for leaf in candidate.values() if leaf.name not in set_once]
    placed = {reference[name].module for rule in found for name in rule.sources}  # a bias without a place beside weights that have one
    problems += [f"{'missing bias' if 'bias' in leaf.attribute and leaf.module in placed else 'unused'}: {leaf.name} {leaf.shape} of the reference "
                 f"has no place in the candidate{_suggest(leaf, empty)}" for leaf in lost]
    problems += [f"missing: {leaf.name} {leaf.shape} of the candidate is set by nothing{_suggest(leaf, lost)}" for leaf in empty]
    problems += _misshapen(found, reference, candidate)
    if problems:
        lines = [*problems, *_advice(lost, empty)]
        raise ConversionError(f"{len(problems)} problem{'s' * (len(problems) > 1)} with the weights:\n  " + "\n  ".join(lines))
    return WeightMap(tuple(found), dict(ties))


def _by_kind(leaf: Leaf, candidate: Mapping[str, Leaf], rename: Callable[[str], str]) -> Rule | None:
    module, target = rename(leaf.module), rename(leaf.name)
    kind, operations = KINDS.get((leaf.layer, leaf.attribute), (leaf.attribute, ()))
    options = [(joined(module, kind), operations), (joined(module, leaf.attribute), ())]
    if target != joined(module, leaf.attribute):  # the name map speaks of the leaf itself
        options = [(joined(target.rpartition(".")[0], kind), operations)] * (target.endswith(f".{leaf.attribute}")) + [(target, operations)]
    for name, way in options:
        if name in candidate:
            return Rule((leaf.name,), (name,), way)
    return None


def _tie_problems(reference: Mapping[str, Leaf], ties: Mapping[str, str]) -> list[str]:
    problems = []
    for tied, name in ties.items():
        absent = [item for item in (tied, name) if item not in reference]
        if absent:
            problems.append(f"tie of {', '.join(absent)}: the reference has no such leaf")
        elif name in ties:
            problems.append(f"tie of {tied}: {name} is tied itself")
        elif reference[tied].shared != name and reference[name].shared != tied:
            problems.append(f"tie of {tied}: declared to share memory with {name}, but it does not")
    for leaf in reference.values():
        if leaf.shared is not None and leaf.name not in ties and leaf.shared not in ties:
            problems.append(f"tied but not declared: {leaf.name} shares memory with {leaf.shared}; declare ties={{{leaf.name!r}: {leaf.shared!r}}}")
    return problems


def _double(rules: Iterable[Rule], side: str, verb: str) -> list[str]:
    seen: dict[str, list[Rule]] = {}
    for rule in rules:
        for name in getattr(rule, side):
            seen.setdefault(name, []).append(rule)
    other = "targets" if side == "sources" else "sources"
    return [f"doubly matched: {name} is {verb} by {' and '.join(', '.join(getattr(rule, other)) or 'a constant' for rule in group)}"
            for name, group in seen.items() if len(group) > 1]


def _misshapen(rules: Iterable[Rule], reference: Mapping[str, Leaf], candidate: Mapping[str, Leaf]) -> list[str]:
    problems = []
    for rule in rules:
        try:
            made = rule.forward([np.empty(reference[name].shape) for name in rule.sources]) if rule.targets else []
        except ConversionError as error:
            problems.append(f"misshapen: {', '.join(rule.sources)}: {error}")
            continue
        for name, array in zip(rule.targets, made, strict=True):
            if tuple(array.shape) != candidate[name].shape:
                sources = ", ".join(f"{source} {reference[source].shape}" for source in rule.sources)
                others = [leaf for leaf in candidate.values() if leaf.name != name and leaf.shape == tuple(array.shape)]
                near = f"; {others[0].name} has that shape" if others else ""
                problems.append(f"misshapen: {sources} becomes {tuple(array.shape)}, but {name} is {candidate[name].shape}{near}")
    return problems


def _advice(lost: Iterable[Leaf], empty: Iterable[Leaf]) -> list[str]:
    """What to do when leaves of both sides are left over."""
    if not lost or not empty:
        return []
    if any(leaf.attribute in ("kernel", "embedding", "scale") for leaf in lost) and any(leaf.attribute == "weight" for leaf in empty):
        return ["kinds of layers are known from torch to Flax: make the torch module the reference and the Flax module the candidate"]
    return ["modules of other names are paired by names={...} of the case, single leaves by weights=[Rule(...)]; `parity map` proposes such rules"]


def _suggest(leaf: Leaf, others: Iterable[Leaf]) -> str:
    def distance(other: Leaf) -> tuple:
        size = abs(math.log((math.prod(other.shape) + 1) / (math.prod(leaf.shape) + 1)))
        likeness = difflib.SequenceMatcher(None, leaf.name, other.name).ratio()
        return (sorted(other.shape) != sorted(leaf.shape), abs(len(other.shape) - len(leaf.shape)), size, -likeness)

    best = min(others, key=distance, default=None)
    return "" if best is None else f" (nearest: {best.name} {best.shape})"
