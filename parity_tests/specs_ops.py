"""Our ops without weights as models of the harness, for cases against other people's implementations of the same functions.

    delta_rule   o, S = f(q, k, v, beta[, S])     q, k, v (B, H, L, d), beta (B, H, L), S (B, H, d, d)
    wkv          y, S = f(r, k, v, w, u[, S])     r, k, v (B, L, H, P), w and u (H, P), S (B, H, P, P); the "bonus" form of RWKV-5/6
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import cython_ext
from parity_tests.harness import Bound, Engine, StateProtocol

B, H, L, D = 3, 5, 13, 6
CHUNK = 7  # so that every length but a few ends in a ragged chunk


def delta_inputs(seed: int, batch: int = B, length: int = L) -> dict[str, np.ndarray]:
    """q, k, v, beta; keys of norm 1, as the rule needs them to stay bounded."""
    rng = np.random.default_rng([seed, batch, length])
    q, k, v = rng.normal(size=(3, batch, H, length, D))
    return {"q": q, "k": k / np.linalg.norm(k, axis=-1, keepdims=True), "v": v, "beta": rng.uniform(0.1, 0.95, (batch, H, length))}


def wkv_inputs(seed: int, batch: int = B, length: int = L) -> dict[str, np.ndarray]:
    """r, k, v, decays w in (0, 1), u."""
    rng = np.random.default_rng([seed, batch, length])
    r, k, v = rng.normal(size=(3, batch, length, H, D))
    return {"r": r, "k": k, "v": v, "w": rng.uniform(0.3, 0.99, (H, D)), "u": rng.normal(size=(H, D))}


# inputs of other sizes leave the range in which the rules are stable, so the offset and the one-hot regime are left out
REGIMES = ("as is", "carried state", "x 1e-3", "length 1", "length 2", "length 63", "length 100", "batch 1", "batch 3")
COMMON: dict[str, Any] = {
    "trajectory": None, "regimes": REGIMES, "sizes": {"batch": B, "heads": H, "length": L, "width": D},
    "bounds": (Bound(1e-12, "100 steps of sums of six products, float64 rounding in another order", on="free"),
               Bound(1e-11, "the way back through 100 steps loses a digit", on="gradients")),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "delta_rule": {**COMMON, "inputs": delta_inputs, "states": StateProtocol(axis=2, split_length=10)},
    "wkv": {**COMMON, "inputs": wkv_inputs, "states": StateProtocol(axis=1, along=("r", "k", "v"), split_length=10)},
}


def torch_op(op: str, impl: str) -> Any:
    """A torch module that calls our torch form of an op."""
    from torch import nn

    from torch_impl.ops.delta_rule import delta_rule
    from torch_impl.ops.wkv import wkv

    class Op(nn.Module):
        def forward(self, *arrays: Any) -> tuple:
            return {"delta_rule": delta_rule, "wkv": wkv}[op](*arrays, impl=impl, chunk_size=CHUNK)

    return Op()


def jax_op(op: str, impl: str) -> Any:
    """An NNX module that calls our JAX form of an op."""
    from flax import nnx

    from jax_impl.ops.delta_rule import delta_rule
    from jax_impl.ops.wkv import wkv

    class Op(nnx.Module):
        def __call__(self, *arrays: Any) -> tuple:
            return {"delta_rule": delta_rule, "wkv": wkv}[op](*arrays, impl=impl, chunk_size=CHUNK)

    return Op()


def cython_op(op: str) -> Engine:
    """The compiled kernel, called without a framework."""
    return Engine(lambda _: cython_ext.kernel(op).forward)


def implementations(op: str) -> dict[str, Callable[[], Any]]:
    """Every implementation of an op by name, each a factory for a case."""
    return {"JAX chunked": partial(jax_op, op, "chunked"), "JAX recurrent": partial(jax_op, op, "recurrent"),
            "torch chunked": partial(torch_op, op, "chunked"), "torch recurrent": partial(torch_op, op, "recurrent"),
            "Cython": partial(cython_op, op)}


def widened(function: Callable[..., Any]) -> Any:
    """A torch module that calls a function; on float64 arguments what it casts to float32, or makes in it, is float64."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Wide(TorchFunctionMode):
        def __torch_function__(self, called: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            if called is torch.Tensor.float:
                return args[0]
            return called(*args, **{**(kwargs or {}), **({"dtype": torch.float64} if called is torch.zeros else {})})

    class Op(torch.nn.Module):
        def forward(self, *arrays: Any) -> Any:
            if arrays[0].dtype != torch.float64:
                return function(*arrays)
            with Wide():
                return function(*arrays)

    return Op()
