"""Randomised weights: zeros for biases and ones for norm scales hide most porting bugs, so every floating leaf gets other values.

One generator per name, `default_rng([seed, crc32(name)])`, so that a leaf's values do not depend on which other leaves there are. Values
are rounded to the coarsest dtype of the case: every precision then computes with exactly the same weights.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

import numpy as np

from . import tree
from .adapters.base import Leaf
from .case import CaseError, raised

NORMS = ("layernorm", "rmsnorm", "groupnorm", "batchnorm")


def signed(rng: np.random.Generator, shape: tuple[int, ...], low: float, high: float) -> np.ndarray:
    """Magnitudes uniform in [low, high) with random signs."""
    return rng.uniform(low, high, shape) * rng.choice([-1.0, 1.0], shape)


def default(leaf: Leaf, rng: np.random.Generator) -> np.ndarray:
    """Values by kind of layer: norm scales near 1 but never 1, biases away from 0, weights normal with variance 1 / fan-in."""
    if leaf.layer in NORMS and leaf.attribute == "weight":
        return 1.0 + signed(rng, leaf.shape, 0.1, 0.4)
    if leaf.attribute == "running_var":
        return rng.uniform(0.5, 1.5, leaf.shape)
    if leaf.attribute == "bias":
        return signed(rng, leaf.shape, 0.1, 0.5)
    if leaf.layer == "embedding":
        return rng.normal(0.0, 0.7, leaf.shape)
    if len(leaf.shape) >= 2:
        return rng.normal(0.0, 1.0 / math.sqrt(math.prod(leaf.shape[1:])), leaf.shape)
    return signed(rng, leaf.shape, 0.2, 0.8)


def randomised(leaves: Mapping[str, Leaf], current: Mapping[str, np.ndarray], *, seed: int, grid: str,
               overrides: Mapping[str, Callable], ties: Mapping[str, str]) -> dict[str, np.ndarray]:
    """New values for every floating leaf (integers keep theirs unless overridden); tied leaves get those of the leaf they are tied to.

    `overrides`: pattern of names -> `f(rng, shape)`; the last pattern that fits is used. Raises CaseError for a pattern that fits no leaf and
    for values of a wrong shape or not finite.
    """
    unused = [pattern for pattern in overrides if not any(fnmatchcase(name, pattern) for name in leaves)]
    if unused:
        raise CaseError(f"leaves: no leaf is named {', '.join(unused)}")
    result: dict[str, np.ndarray] = {}
    for name, leaf in leaves.items():
        if name in ties:
            continue
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        own = [make for pattern, make in overrides.items() if fnmatchcase(name, pattern)]
        floating = current[name].dtype.kind == "f"
        if not own and not floating:
            result[name] = current[name].copy()
            continue
        try:
            values = np.asarray(own[-1](rng, leaf.shape) if own else default(leaf, rng))
        except Exception as error:
            raise CaseError(f"leaves: the function for {name} raised {raised(error)}") from error
        if values.shape != leaf.shape or not np.isfinite(values.astype(np.float64)).all():
            raise CaseError(f"leaves: values for {name} have shape {values.shape} or are not finite, expected finite of {leaf.shape}")
        result[name] = tree.to_grid(values, grid) if floating else values.astype(current[name].dtype)
    return {name: result[ties.get(name, name)] for name in leaves}


def moved(values: np.ndarray, name: str, seed: int) -> np.ndarray:
    """Every entry moved by 1 % of its size up or down (zeros by 0.01), each in its own direction: a norm cannot undo that."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), 1])
    step = 0.01 * np.where(values == 0.0, 1.0, np.abs(values))
    return values + step * rng.choice([-1.0, 1.0], values.shape) * rng.uniform(0.5, 1.0, values.shape)
