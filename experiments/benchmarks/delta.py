"""The plain delta rule: batch 4, 8 heads, 2,048 tokens, heads of 64."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpy as np
import torch

import cython_ext
from experiments.benchmarks import bounds, gate, peers
from experiments.benchmarks.case import BOUND, Case, Target
from jax_impl.ops import delta_rule as jax_rule
from parity_tests import specs
from torch_impl.ops import compiled
from torch_impl.ops import delta_rule as torch_rule

BATCH, HEADS, LENGTH, WIDTH = 4, 8, 2048, 64
LOOP, CHUNKED, KERNELS, JAX, NUMPY = "torch, loop", "torch, chunked", "torch, compiled kernel", "jax, chunked", "compiled kernel, NumPy"
SQUARES = "bound: products of 64 x 64"


def inputs(dtype: type) -> list[np.ndarray]:
    """q, k (unit), v (B, H, L, d) and beta (B, H, L) in (0, 1)."""
    rng, shape = np.random.default_rng(0), (BATCH, HEADS, LENGTH, WIDTH)
    q, k, v = (rng.normal(size=shape) for _ in range(3))
    parts = q / np.sqrt(WIDTH), k / np.linalg.norm(k, axis=-1, keepdims=True), v, rng.uniform(0.05, 0.95, shape[:3])
    return [part.astype(dtype) for part in parts]


def agreement() -> list[gate.Check]:
    """Outputs of every form against the loop's in float64."""
    forms: dict[str, dict[str, np.ndarray]] = {}
    kernel = cython_ext.kernel("delta_rule")
    for dtype in (np.float64, np.float32):
        given = inputs(dtype)
        tensors = [torch.from_numpy(part) for part in given]
        forms[dtype.__name__] = {
            LOOP: torch_rule.delta_rule(*tensors, impl="recurrent")[0].numpy(), CHUNKED: torch_rule.delta_rule(*tensors)[0].numpy(),
            KERNELS: compiled.delta_rule(*tensors)[0].numpy(), NUMPY: kernel.forward(*given)[0],
        }
        if dtype is np.float32:
            forms["float32"][JAX] = np.asarray(jax_rule.delta_rule(*map(jnp.asarray, given))[0])
    truth = forms["float64"].pop(LOOP)
    return [gate.battery(next(case for case in specs.FULL if case.name == "deltanet_lm")),
            *gate.agreement(truth, forms["float64"], forms["float32"], LOOP)]


def rule(threads: int) -> Case:
    given = inputs(np.float32)
    tensors, kernel = [torch.from_numpy(part) for part in given], cython_ext.kernel("delta_rule")
    needed = 6 * WIDTH * WIDTH * BATCH * HEADS * LENGTH  # S^T k, its correction and S^T q: what the rule is, whatever the form
    squares = needed // (2 * WIDTH**3)

    def eager(impl: str) -> None:
        with torch.inference_mode():
            torch_rule.delta_rule(*tensors, impl=impl)

    def compiled_rule() -> None:
        with torch.inference_mode():
            compiled.delta_rule(*tensors)

    return Case(
        name="delta_rule", title=f"plain delta rule, batch {BATCH}, {HEADS} heads of {WIDTH}, {LENGTH:,} tokens", checks=agreement(),
        contenders={
            LOOP: partial(eager, "recurrent"), CHUNKED: partial(eager, "chunked"), KERNELS: compiled_rule, NUMPY: lambda: kernel.forward(*given),
            JAX: peers.jax_call(lambda *a: jax_rule.delta_rule(*a)[0], *map(jnp.asarray, given)),
        },
        bounds={SQUARES: bounds.batched_products(squares, WIDTH, WIDTH, WIDTH)},
        targets=[
            Target("compiled kernel against the loop", LOOP, NUMPY, 20),
            Target("compiled kernel, of the rate of 64 x 64 products", BOUND, NUMPY, 0.4),
        ],
        operations=needed, bytes=4 * 4 * BATCH * HEADS * LENGTH * WIDTH,
    )


CASES = [rule]
