"""Weights of linear layers in the order in which the kernels read them, in the arithmetic's own dtype or in bfloat16.

    packed = pack(weight)                     weight (O, I), as torch keeps it; `packed.weight` is read from one end to the other
    packed = pack(weight, "bfloat16")         half the bytes; arithmetic stays float32

Letters: I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy import ndarray

BLOCK_BYTES = 256  # of a row of a block: 64 columns of float32 or 32 of float64
LINE = 64  # bytes of a line of the cache
FEW = 16  # fewer outputs than these stay as they are, (O, I)
WIDE, HALF, TURNED = range(3)  # `Storage` of dense.pxd


class Packed(NamedTuple):
    """A weight ready for `dense.linear`; made by `pack`."""

    weight: ndarray  # (blocks, I, 64 or 32) of the arithmetic's dtype; (blocks, I, 32) uint32 in bfloat16; (O, I) where O is small
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
        blocks = self.weight
        if self.storage == HALF:
            blocks = np.concatenate([blocks << 16, blocks & 0xFFFF0000], axis=2).view(np.float32)
        return blocks.transpose(0, 2, 1).reshape(-1, self.inputs)[: self.outputs].copy()


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
    rows = np.zeros((-(-outputs // block) * block, inputs), weight.dtype)
    rows[:outputs] = weight
    blocks = rows.reshape(-1, block, inputs).transpose(0, 2, 1)
    if weights != "bfloat16":
        return Packed(np.array(blocks, order="C"), outputs, inputs, WIDE)
    halves = bfloat16(blocks).astype(np.uint32)
    return Packed(np.ascontiguousarray(halves[:, :, : block // 2] | halves[:, :, block // 2 :] << 16), outputs, inputs, HALF)


def unpacked(weight: Packed | ndarray) -> ndarray:
    """A copy of a weight (O, I), packed or not."""
    return weight.matrix() if isinstance(weight, Packed) else weight.copy()


def together(layers: Mapping[str, Packed]) -> dict[str, Packed]:
    """The same layers as views of one array, in their order, each from a cache line on.

    A step that walks through its weights in this order reads one stream of memory, and a large array is given large pages.
    """
    places, end = {}, 0
    for name, packed in layers.items():
        places[name] = end
        end += -(-packed.weight.nbytes // LINE) * LINE
    held = np.empty(end + LINE, np.uint8)
    held = held[-held.__array_interface__["data"][0] % LINE :]
    moved = {}
    for name, packed in layers.items():
        weight = held[places[name] : places[name] + packed.weight.nbytes].view(packed.weight.dtype).reshape(packed.weight.shape)
        weight[...] = packed.weight
        moved[name] = packed._replace(weight=weight)
    return moved


def bfloat16(x: ndarray) -> ndarray:
    """The bits (uint16) of the bfloat16 nearest to each float32 of `x`, the even one on a tie; NaN stays NaN."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), bits >> 16 | 0x40, nearest).astype(np.uint16)
