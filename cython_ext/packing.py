"""Weights of linear layers in the order in which the kernels read them, in the arithmetic's own dtype or in bfloat16.

    packed = pack(weight)                     weight (O, I), as torch keeps it; `packed.weight` is read column by column of blocks
    packed = pack(weight, "bfloat16")         half the bytes; arithmetic stays float32

Letters: I inputs, O outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy import ndarray

BLOCK_BYTES = 256  # of a row of a block: 64 columns of float32 or 32 of float64
FEW = 16  # fewer outputs than these stay as they are, (O, I)
WIDE, HALF, TURNED = range(3)  # `Storage` of dense.pxd


class Packed(NamedTuple):
    """A weight ready for `dense.linear`; made by `pack`."""

    weight: ndarray  # (I, columns) of the arithmetic's dtype; (I, columns // 2) uint32 in bfloat16; (O, I) where O is small
    outputs: int
    inputs: int
    storage: int

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the arithmetic."""
        return np.dtype(np.float32) if self.storage == HALF else self.weight.dtype

    def matrix(self) -> ndarray:
        """The weight (O, I) that the kernels multiply by, rounded to bfloat16 where it is stored so."""
        if self.storage == TURNED:
            return self.weight.copy()
        wide = self.weight
        if self.storage == HALF:
            words = wide.reshape(self.inputs, -1, 1, 32)
            wide = np.concatenate([words << 16, words & 0xFFFF0000], axis=2).view(np.float32).reshape(self.inputs, -1)
        return wide[:, : self.outputs].T.copy()


def pack(weight: ndarray, weights: str | None = None) -> Packed:
    """A copy of `weight` (O, I) in the order of the kernels.

    weights: "float32" or "float64", which must be the dtype of `weight`, or "bfloat16", of a float32 `weight` rounded to even; None for the
    dtype of `weight`. A weight of fewer than 16 outputs is never rounded: it has few bytes. Raises TypeError for what is no float32 or float64
    array, ValueError for another shape, an empty axis or another `weights`.
    """
    if not isinstance(weight, ndarray) or isinstance(weight, np.ma.MaskedArray):
        raise TypeError(f"weight must be a NumPy array without a mask, found {type(weight).__name__}")
    if weight.dtype not in (np.float32, np.float64):
        raise TypeError(f"weight must be float32 or float64, found {weight.dtype}")
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight must have shape (O, I) with no axis empty, found {weight.shape}")
    allowed = (weight.dtype.name, "bfloat16") if weight.dtype == np.float32 else (weight.dtype.name,)
    if weights is not None and weights not in allowed:
        raise ValueError(f"weights must be {' or '.join(map(repr, allowed))} for a weight of {weight.dtype}, found {weights!r}")
    outputs, inputs = weight.shape
    if outputs < FEW:
        return Packed(np.array(weight, order="C", subok=False), outputs, inputs, TURNED)
    block = BLOCK_BYTES // weight.dtype.itemsize
    wide = np.zeros((inputs, -(-outputs // block) * block), weight.dtype)
    wide[:, :outputs] = weight.T
    if weights != "bfloat16":
        return Packed(wide, outputs, inputs, WIDE)
    halves = bfloat16(wide).astype(np.uint32).reshape(inputs, -1, 2, block // 2)
    return Packed((halves[:, :, 0] | halves[:, :, 1] << 16).reshape(inputs, -1), outputs, inputs, HALF)


def bfloat16(x: ndarray) -> ndarray:
    """The bits (uint16) of the bfloat16 nearest to each float32 of `x`, the even one on a tie; NaN stays NaN."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), bits >> 16 | 0x40, nearest).astype(np.uint16)
