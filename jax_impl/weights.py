"""Flat dict of torch-named NumPy arrays <-> nested dict of NNX leaves, without torch.

A path's parts are joined by dots; a Linear's `kernel` (in, out) is torch's `weight` (out, in), a Conv's (K, in, out) is (out, in, K),
a norm's `scale` and an Embed's `embedding` are torch's `weight`, and the two layers of a GRUCell are torch's `*_ih_l0` and `*_hh_l0`; everything
else keeps its name and layout. Integer leaves travel as int64.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

TIED = {"lm_head.weight": "embedding.weight"}
_CELL = {"dense_i": "ih_l0", "dense_h": "hh_l0"}


def torch_name(path: tuple[Any, ...]) -> str:
    """Name of the leaf in the torch module of the same class."""
    *parents, leaf = map(str, path)
    leaf = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
    if parents and parents[-1] in _CELL:
        leaf = f"{leaf}_{_CELL[parents.pop()]}"
    return ".".join([*parents, leaf])


def flatten(tree: dict[Any, Any], path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    """Leaves of a nested dict by path."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {key: leaf for name, child in tree.items() for key, leaf in flatten(child, (*path, name)).items()}


def to_arrays(variables: dict[str, Any]) -> dict[str, np.ndarray]:
    """The leaves of all collections ({"params": tree, ...}) under their torch names, tied names included; C-contiguous copies."""
    arrays = {}
    for tree in variables.values():
        for path, leaf in flatten(tree).items():
            value = np.asarray(leaf)
            value = value.astype(np.int64) if value.dtype.kind in "iu" else value
            arrays[torch_name(path)] = np.array(value.T if path[-1] == "kernel" else value, order="C")
    return arrays | {name: arrays[source].copy() for name, source in TIED.items() if source in arrays}


def to_variables(arrays: dict[str, np.ndarray], template: dict[Any, Any]) -> dict[Any, Any]:
    """Collections like `template` (its leaves have shape and dtype) with the values of `arrays`, copied.

    Raises ValueError, naming all of them, for missing, misshapen and unused arrays, and for tied arrays that differ.
    """
    errors = [f"{name} differs from {source}, to which it is tied" for name, source in TIED.items()
              if name in arrays and source in arrays and not np.array_equal(arrays[name], arrays[source])]
    used = set()

    def fill(tree: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(tree, dict):
            return {name: fill(child, (*path, name)) for name, child in tree.items()}
        name = torch_name(path)
        used.add(name)
        if name not in arrays:
            errors.append(f"{name} is missing")
            return None
        value = np.asarray(arrays[name])
        shape = tuple(tree.shape[::-1] if path[-1] == "kernel" else tree.shape)
        if value.shape != shape:
            errors.append(f"{name} must have shape {shape}, found {value.shape}")
            return None
        return jnp.array(value.T if path[-1] == "kernel" else value, tree.dtype)

    variables = {collection: fill(tree, ()) for collection, tree in template.items()}
    used |= {name for name, source in TIED.items() if source in used}
    errors += [f"{name} is not used" for name in arrays if name not in used]
    if errors:
        raise ValueError("arrays do not fit the model: " + "; ".join(errors))
    return variables
