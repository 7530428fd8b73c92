"""Read before any number: sizes that hide transpositions, and defaults that differ by name between torch and Flax."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from .adapters.base import Node

EPSILON = ("layernorm", "groupnorm", "rmsnorm", "batchnorm")


def sizes(named: Mapping[str, int]) -> list[str]:
    """Axes whose size equals another's, is a power of two, or a perfect square: a transposition could go unseen there."""
    found = [] if named else ["sizes: the case declares none, so equal or square axes could hide a transposition"]
    names = list(named)
    for place, name in enumerate(names):
        size = named[name]
        found += [f"sizes: {name} and {other} are both {size}" for other in names[place + 1:] if named[other] == size]
        if size > 1 and size & (size - 1) == 0:
            found.append(f"sizes: {name} = {size} is a power of two")
        elif size > 1 and math.isqrt(size) ** 2 == size:
            found.append(f"sizes: {name} = {size} is a perfect square")
    return found


def defaults(reference: Mapping[str, Node], candidate: Mapping[str, Node], partner: Callable[[str], str | None]) -> list[str]:
    """Settings of paired layers that differ, or that differ by default in the two frameworks."""
    found = []
    for path, node in reference.items():
        other = candidate.get(partner(path)) if partner(path) is not None else None
        if node.layer == "gelu" and node.settings.get("approximate") == "none":
            found.append(f"{path}: torch's gelu is exact here; jax.nn.gelu is the tanh approximation unless approximate=False")
        if other is None:
            continue
        if node.layer in EPSILON and other.layer == node.layer:
            found += _norm(path, node, other)
        if other.layer == "dropout" and other.settings.get("deterministic") is False and other.settings.get("rate", 0.0) > 0.0:
            found.append(f"{path}: dropout is on in the candidate (deterministic=False)")
        if node.layer != other.layer and {node.layer, other.layer} & set(EPSILON):
            found.append(f"{path}: {node.layer} in the reference, {other.layer} in the candidate")
    return found


def _norm(path: str, node: Node, other: Node) -> list[str]:
    found = []
    mine, theirs = node.settings.get("eps"), other.settings.get("epsilon")
    if mine is None and node.layer == "rmsnorm":
        found.append(f"{path}: torch's RMSNorm without eps uses the machine epsilon of its dtype, the candidate uses {theirs}")
    elif mine is not None and theirs is not None and float(mine) != float(theirs):
        found.append(f"{path}: epsilon {theirs} in the candidate, {mine} in the reference (defaults: torch 1e-5, Flax 1e-6)")
    if other.settings.get("use_fast_variance"):
        found.append(f"{path}: the candidate computes the variance in one pass (Flax's default use_fast_variance=True)")
    if node.layer == "batchnorm" and node.settings.get("momentum") is not None and other.settings.get("momentum") is not None:
        expected = 1.0 - float(node.settings["momentum"])
        if not math.isclose(float(other.settings["momentum"]), expected):
            found.append(f"{path}: momentum {other.settings['momentum']} in the candidate is the weight of the old value, expected {expected:g}")
    return found
