"""One block of GroundedMamba for its engine: the weights, folded and packed once, and the way of several tokens through it.

    y = [g h, (1 - g) readout] @ [C, W_o].T + g D * a                          both branches leave a block by one product

What is constant is folded into the weights: a fixed gate, the (1 - w) of a normalised key, the gate of a memory bank and what de-biases its slots.
Letters: B batch, L length, D width, N state, H heads, P head width, M occupied slots, d width of a retrieval head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from cython_ext import kernel
from cython_ext.packing import HALF, Packed, pack
from cython_ext.threads import one_blas_thread

State = dict[str, ndarray]


class Sizes(NamedTuple):
    """What of the configuration a forward needs, under its names."""

    vocab_size: int
    dim: int
    depth: int
    ssm_dim: int
    rwkv_heads: int
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_clamp: str = "smooth"
    max_singular: float = 0.99
    gate: str = "fixed"
    gate_ssm: float = 0.7
    decay: str = "exp_exp"
    time_first: str = "bonus"
    normalised_key: bool = True
    readout_norm: bool = True
    memory_size: int = 1024
    memory_alpha: float = 0.01
    retrieval_heads: int = 4
    norm_eps: float = 1e-5


class Block:
    """x + LN_out(g SSM(LN_ssm(x)) + (1 - g) RWKV(LN_rwkv(x)))."""

    def __init__(self, take: Taker, sizes: Sizes, storage: str | None) -> None:
        dim, n, heads, dtype = sizes.dim, sizes.ssm_dim, sizes.rwkv_heads, take.dtype
        p = dim // heads
        self.sizes, self.dense, self.scan, self.wkv = sizes, kernel("dense"), kernel("selective_scan"), kernel("wkv")
        self.ln_ssm, self.ln_rwkv, self.ln_out = (take.affine(name, dim) for name in ("ln_ssm", "ln_rwkv", "ln_out"))
        self.transition = spectral_bound(take("ssm.A", n, n), sizes.max_singular)
        self.state_norm = take.affine("ssm.state_norm", n)
        self.update = pack(take("ssm.B_proj.weight", n, dim), storage)
        self.steps = take.leading("ssm.dt_proj.weight", (1, 2))
        self.step = pack(take("ssm.dt_proj.weight", self.steps, dim)), take("ssm.dt_proj.bias", self.steps)
        w = take("rwkv.time_decay", heads, p)
        self.w = np.exp(-np.exp(w)) if sizes.decay == "exp_exp" else w
        self.u = take("rwkv.time_first", heads, p)
        key = take("rwkv.key_proj.weight", dim, dim)
        if sizes.normalised_key:
            key = (1 - self.w).reshape(dim, 1) * key
        self.receptance = pack(take("rwkv.receptance_proj.weight", dim, dim), storage)
        self.key, self.value = pack(key, storage), pack(take("rwkv.value_proj.weight", dim, dim), storage)
        self.readout = take.affine("rwkv.readout_norm", dim) if sizes.readout_norm else None
        self.plain = np.ones(p, dtype), np.zeros(p, dtype)
        self.bank = Bank.of(take, sizes, storage)
        gate, gate_bias = take("gate_proj.weight", 2, dim), take("gate_proj.bias", 2)
        leave, self.skip = take("ssm.C_proj.weight", dim, n), take("ssm.D", dim)
        output = take("rwkv.output_proj.weight", dim, dim)
        self.gate: tuple[Packed, ndarray] | None = None
        if sizes.gate == "learned":  # the first of two softmax weights is a sigmoid of the difference
            self.gate = pack(gate[:1] - gate[1:]), gate_bias[:1] - gate_bias[1:]
        else:
            leave, self.skip, output = sizes.gate_ssm * leave, sizes.gate_ssm * self.skip, (1 - sizes.gate_ssm) * output
        self.leave = pack(np.concatenate([leave, output], axis=1), storage)

    def stored(self) -> dict[str, Packed]:
        """The weights that are as they were given, neither folded nor rounded, under torch's names."""
        packed = {"ssm.B_proj": self.update, "rwkv.receptance_proj": self.receptance, "rwkv.value_proj": self.value}
        if self.bank is not None:
            packed["rwkv.memory_query"] = self.bank.query
        return {f"{name}.weight": weight for name, weight in packed.items() if weight.storage != HALF}

    def __call__(self, x: ndarray, state: State) -> ndarray:
        """x (B, L, D) -> the block's output (B, L, D); `state` is overwritten with the one after the last token."""
        sizes, dense = self.sizes, self.dense
        batch, length, dim = x.shape
        n, heads = sizes.ssm_dim, (batch, length, sizes.rwkv_heads, dim // sizes.rwkv_heads)
        joined = np.empty((batch, length, n + dim), x.dtype)  # [h, readout]
        a = dense.layer_norm(x, *self.ln_ssm, sizes.norm_eps)
        joined[..., :n] = self._scan(a, state["ssm"])
        b = dense.layer_norm(x, *self.ln_rwkv, sizes.norm_eps)
        r = dense.linear(b, self.receptance, None, "sigmoid").reshape(heads)
        k, v = dense.linear(b, self.key).reshape(heads), dense.linear(b, self.value).reshape(heads)
        if length == 1:
            y = self.wkv.step(r[:, 0], k[:, 0], v[:, 0], self.w, self.u, state["wkv"], sizes.time_first)[:, None]
        else:
            y, state["wkv"][...] = self.wkv.forward(r, k, v, self.w, self.u, state["wkv"], sizes.time_first)
        read = joined[..., n:]
        if self.readout is None:
            read[...] = y.reshape(x.shape)
        else:
            np.multiply(dense.layer_norm(y, *self.plain, sizes.norm_eps).reshape(x.shape), self.readout[0], out=read)
            read += self.readout[1]
        if self.bank is not None:
            self.bank.add(b, read)
        a *= self.skip
        if self.gate is not None:
            g = dense.linear(x, *self.gate, "sigmoid")  # (B, L, 1)
            joined[..., :n] *= g
            read *= 1 - g
            a *= g
        a += dense.linear(joined, self.leave)
        y = dense.layer_norm(a, *self.ln_out, sizes.norm_eps)
        y += x
        return y

    def _scan(self, a: ndarray, state: ndarray) -> ndarray:
        """The states of all tokens (B, L, N); `state` becomes the last of them."""
        sizes = self.sizes
        if sizes.dt_clamp == "hard":
            dt = self.dense.linear(a, *self.step, "softplus").clip(sizes.dt_min, sizes.dt_max)
        else:
            dt = self.dense.linear(a, *self.step, "sigmoid")
            dt *= sizes.dt_max - sizes.dt_min
            dt += sizes.dt_min
        dt_b = dt[..., 1] / sizes.dt_max if self.steps == 2 else None
        states = self.scan.forward(
            self.dense.linear(a, self.update), dt[..., 0], dt_b, self.transition, *self.state_norm, state, sizes.norm_eps)
        state[...] = states[:, -1]
        return states


class Bank(NamedTuple):
    """The occupied slots of one block, divided by the weight that they have gathered, head by head."""

    query: Packed
    keys: list[Packed]  # (M, d), with 1 / sqrt(d)
    values: list[Packed]  # (d, M), with the gate

    @classmethod
    def of(cls, take: Taker, sizes: Sizes, storage: str | None) -> Bank | None:
        """None where no slot is occupied: the read is exactly zero then."""
        if not sizes.memory_size:
            return None
        dim, d = sizes.dim, sizes.dim // sizes.retrieval_heads
        query, gate = take("rwkv.memory_query.weight", dim, dim), take("rwkv.memory_gate", dim)
        keys, values = (take(f"rwkv.memory_{name}", sizes.memory_size, dim) for name in ("keys", "values"))
        count = take.counter("rwkv.memory_count", sizes.memory_size)
        m = int((count > 0).sum())
        if m == 0:
            return None
        gathered = -np.expm1(count[:m, None].astype(take.dtype) * math.log1p(-sizes.memory_alpha)).astype(take.dtype)
        keys, values = keys[:m] / gathered / take.dtype.type(math.sqrt(d)), values[:m] / gathered * gate
        heads = [slice(first, first + d) for first in range(0, dim, d)]
        return cls(pack(query, storage), [pack(keys[:, head], storage) for head in heads], [pack(values.T[head], storage) for head in heads])

    def add(self, b: ndarray, out: ndarray) -> None:
        """out (B, L, D) += what every token of b (B, L, D) reads."""
        dense = kernel("dense")
        query, d = dense.linear(b, self.query), self.keys[0].inputs
        for index, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            head = slice(index * d, (index + 1) * d)
            scores = dense.linear(query[..., head], keys)  # (B, L, M)
            scores -= scores.max(-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(-1, keepdims=True)
            out[..., head] += dense.linear(scores, values)


class Taker:
    """Copies of arrays of a flat dict, each held to a shape and to one dtype."""

    def __init__(self, weights: Mapping[str, ndarray], dtype: np.dtype, prefix: str = "") -> None:
        self.weights, self.dtype, self.prefix = weights, dtype, prefix
        if dtype not in (np.float32, np.float64):
            raise ValueError(f"weights must be float32 or float64, found {dtype}")

    def of(self, prefix: str) -> Taker:
        """The arrays whose names begin with `prefix`."""
        return Taker(self.weights, self.dtype, prefix)

    def __call__(self, name: str, *shape: int) -> ndarray:
        return self._array(name, shape, self.dtype)

    def affine(self, name: str, size: int) -> tuple[ndarray, ndarray]:
        """Weight and bias of a norm."""
        return self(f"{name}.weight", size), self(f"{name}.bias", size)

    def counter(self, name: str, size: int) -> ndarray:
        """An array of counts."""
        return self._array(name, (size,), np.dtype(np.int64))

    def leading(self, name: str, allowed: tuple[int, ...]) -> int:
        """The first size of an array, one of `allowed`."""
        value = self.weights.get(self.prefix + name)
        if value is None or value.ndim == 0 or value.shape[0] not in allowed:
            found = "none" if value is None else f"shape {value.shape}"
            raise ValueError(f"weights[{self.prefix + name!r}] must have a first axis of {' or '.join(map(str, allowed))}, found {found}")
        return value.shape[0]

    def _array(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> ndarray:
        name = self.prefix + name
        value = self.weights.get(name)
        if not isinstance(value, ndarray):
            raise ValueError(f"weights[{name!r}] must be an array of shape {shape}, found {type(value).__name__}")
        if value.shape != shape or value.dtype != dtype:
            raise ValueError(f"weights[{name!r}] must have shape {shape} and dtype {dtype}, found {value.shape} and {value.dtype}")
        return np.array(value, order="C", subok=False)


def spectral_bound(matrix: ndarray, max_singular: float) -> ndarray:
    """`matrix` scaled down until its largest singular value is at most `max_singular`."""
    with one_blas_thread():
        largest = np.linalg.svd(matrix, compute_uv=False)[0]
    return matrix * matrix.dtype.type(max_singular / max(float(largest), max_singular))
