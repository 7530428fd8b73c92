"""What the machine allows, measured in turns with the contenders: the products of a model by themselves, and its bytes read once.

A bound is a contender like any other: `products` runs every matrix product of a model, with the same shapes and as many weights apart in
memory, by the BLAS of torch (MKL or OpenBLAS) or that of NumPy, whichever is faster here; `stream` reads as many bytes, as a matrix-vector
product or a sum does. A model that must do both takes at least the longer of the two. Percent of bound is their time over the model's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

VECTOR = 512  # columns of the matrix that `stream` reads


@dataclass(frozen=True)
class Product:
    """`count` products of (rows, inner) by (inner, columns), each with a right side of its own."""

    rows: int
    inner: int
    columns: int
    count: int = 1

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.inner * self.columns * self.count


def linear_products(module: torch.nn.Module, call: Callable[[], object]) -> list[Product]:
    """The products of every linear layer of `module` that `call` runs, once per call of a layer."""
    found: list[Product] = []

    def seen(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        found.append(Product(output.numel() // output.shape[-1], inputs[0].shape[-1], output.shape[-1]))

    hooks = [layer.register_forward_hook(seen) for layer in module.modules() if isinstance(layer, torch.nn.Linear)]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def with_gradients(products: Sequence[Product]) -> list[Product]:
    """Forward and backward: y = x W, then dx = dy W^T and dW = x^T dy."""
    back = [(Product(p.rows, p.columns, p.inner, p.count), Product(p.inner, p.rows, p.columns, p.count)) for p in products]
    return [*products, *(product for pair in back for product in pair)]


def products(shapes: Sequence[Product], dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """A call that runs all of them, by the faster BLAS."""
    made = [
        (torch.rand(p.rows, p.inner, dtype=dtype), [torch.rand(p.inner, p.columns, dtype=dtype) for _ in range(p.count)],
         torch.empty(p.rows, p.columns, dtype=dtype))
        for p in shapes
    ]
    arrays = [(x.numpy(), [w.numpy() for w in weights], out.numpy()) for x, weights, out in made]

    def by_torch() -> None:
        for x, weights, out in made:
            for weight in weights:
                torch.mm(x, weight, out=out)

    def by_numpy() -> None:
        for x, weights, out in arrays:
            for weight in weights:
                np.matmul(x, weight, out=out)

    return _faster(by_torch, by_numpy)


def batched_products(batch: int, rows: int, inner: int, columns: int) -> Callable[[], object]:
    """A call that runs `batch` products of one shape at once."""
    x, y, out = torch.rand(batch, rows, inner), torch.rand(batch, inner, columns), torch.empty(batch, rows, columns)
    a, b, c = x.numpy(), y.numpy(), out.numpy()
    return _faster(lambda: torch.bmm(x, y, out=out), lambda: np.matmul(a, b, out=c))


def stream(size: int) -> Callable[[], object]:
    """A call that reads `size` bytes once: the rows or the columns of a matrix times a vector, or its sum, whichever is fastest."""
    rows = max(1, size // (4 * VECTOR))
    matrix, right, left = torch.rand(rows, VECTOR), torch.rand(VECTOR), torch.rand(rows)
    down, across = torch.empty(rows), torch.empty(VECTOR)
    a, b, c, d, e = (tensor.numpy() for tensor in (matrix, right, left, down, across))
    return _faster(
        lambda: torch.mv(matrix, right, out=down), lambda: torch.mv(matrix.mT, left, out=across), lambda: np.dot(a, b, out=d),
        lambda: np.dot(c, a, out=e), lambda: torch.sum(matrix))


def _faster(*calls: Callable[[], object]) -> Callable[[], object]:
    """The one whose shortest of five calls in turns is the shorter."""
    shortest = [float("inf")] * len(calls)
    for _ in range(5):
        for i, call in enumerate(calls):
            call()
            started = time.perf_counter()
            call()
            shortest[i] = min(shortest[i], time.perf_counter() - started)
    return calls[shortest.index(min(shortest))]
