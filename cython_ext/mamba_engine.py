"""GroundedMamba without a framework: a prompt of any length in chunks, then a token at a time, from the flat weight dict.

    engine = GroundedMambaEngine(weights, Sizes(vocab_size=10000, ...))        weights: torch names -> arrays, all float32 or all float64
    logits, states = engine.prefill(ids)                                       (B, L) -> the logits after the last token (B, V)
    logits = engine.decode(token, states)                                      (B,) -> (B, V); the states are moved on in place

Between calls nothing but the states is kept, and a prompt is taken in chunks: memory does not grow with the length. The blocks are in
`mamba_block`, a token of one sequence in `mamba_step`.
Letters: B batch, L length, D width, V vocabulary.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy import ndarray

from cython_ext import kernel
from cython_ext.checks import token_ids
from cython_ext.mamba_block import Block, Sizes, State, Taker
from cython_ext.packing import Packed, pack
from cython_ext.sampling import sample_token

TOKENS = 512  # of all rows together in a chunk of a prompt


class GroundedMambaEngine:
    """The forward of one GroundedMamba. Two Python threads may use one engine: what a call needs lies in the call or, for one token, under a lock."""

    def __init__(self, weights: Mapping[str, ndarray], sizes: Sizes, storage: str | None = None) -> None:
        """`weights`: flat dict under torch's names, copied; what is not of the forward is ignored. storage: "bfloat16" halves the bytes of the
        products' weights, arithmetic staying float32; None keeps them as they are. Raises ImportError where a kernel is not built, ValueError,
        naming it, for an array that is missing, of another shape or dtype, and for an unknown storage."""
        for name in ("dense", "selective_scan", "wkv", "mamba_step"):
            kernel(name)
        self.sizes, table = sizes, weights.get("embedding.weight")
        self.dtype = np.dtype(np.float32) if table is None else table.dtype
        take = Taker(weights, self.dtype)
        self._table = take("embedding.weight", sizes.vocab_size, sizes.dim)
        self._head = pack(self._table, storage)
        self._norm = take.affine("ln_out", sizes.dim)
        self._blocks = [Block(take.of(f"blocks.{index}."), sizes, storage) for index in range(sizes.depth)]
        self._decoder = kernel("mamba_step").Decoder(self._blocks, self._norm, self._head, sizes)

    def __call__(self, ids: Any, states: list[State] | None = None) -> tuple[ndarray, list[State]]:
        """ids (B, L) -> the logits of every token (B, L, V) and new states; those passed in are left as they are.

        Raises ValueError for ids that are no integers in [0, V), an empty input, and states of another shape or dtype or with NaN.
        """
        ids, states = self._arguments(ids, states)
        if ids.size == 1:
            logits = np.empty((1, 1, self.sizes.vocab_size), self.dtype)
            self._decoder.step(self._table[ids[0, 0]], states, logits[0, 0])
            return logits, states
        logits = None
        for first, x in self._chunks(ids, states):
            if x.shape[1] == ids.shape[1]:  # one chunk: its logits need no copy
                return self._logits(x), states
            if logits is None:
                logits = np.empty((*ids.shape, self.sizes.vocab_size), self.dtype)
            logits[:, first : first + x.shape[1]] = self._logits(x)
        return logits, states

    def prefill(self, ids: Any, states: list[State] | None = None) -> tuple[ndarray, list[State]]:
        """As a call, but of the last token alone: logits (B, V) and new states, in memory that does not grow with L."""
        ids, states = self._arguments(ids, states)
        for _, x in self._chunks(ids, states):
            last = x[:, -1:]
        return self._logits(last)[:, 0], states

    def decode(self, ids: Any, states: list[State], out: ndarray | None = None) -> ndarray:
        """One token of every row, ids (B,) -> logits (B, V), written to `out` where given. `states` are overwritten with those after it.

        With one row and `out` no array is allocated. Raises as a call does, and for states or an `out` that are not contiguous or cannot be written.
        """
        ids = np.asarray(ids)
        if ids.ndim != 1:
            raise ValueError(f"ids of one token must have shape (batch,), found {ids.shape}")
        ids = token_ids(ids[:, None], self.sizes.vocab_size)
        self._check_states(states, ids.shape[0], written=True)
        if out is None:
            out = np.empty((ids.shape[0], self.sizes.vocab_size), self.dtype)
        elif not isinstance(out, ndarray) or out.shape != (ids.shape[0], self.sizes.vocab_size) or out.dtype != self.dtype or not out.flags.carray:
            expected = f"a contiguous, writeable {self.dtype} array of shape {(ids.shape[0], self.sizes.vocab_size)}"
            raise ValueError(f"out must be {expected}, found {getattr(out, 'dtype', type(out).__name__)} {getattr(out, 'shape', '')}")
        if ids.size == 1:
            self._decoder.step(self._table[ids[0, 0]], states, out[0])
            return out
        x = self._table[ids]
        for block, state in zip(self._blocks, states, strict=True):
            x = block(x, state)
        out[...] = self._logits(x)[:, 0]
        return out

    def generate(self, ids: Any, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 0) -> ndarray:
        """Continue ids (B, L) by `max_new_tokens` tokens, drawn as on every backend: (B, L + max_new_tokens)."""
        ids = token_ids(ids, self.sizes.vocab_size)
        rng, tokens, states, token = np.random.default_rng(seed), [ids], None, None
        for _ in range(operator.index(max_new_tokens)):
            if states is None:
                logits, states = self.prefill(ids)
            else:
                logits = self.decode(token, states)
            token = sample_token(logits, temperature, top_k, rng)
            tokens.append(token[:, None])
        return np.concatenate(tokens, axis=1)

    def init_states(self, batch_size: int) -> list[State]:
        """Zeros: the states before the first token."""
        return [{name: np.zeros(shape, self.dtype) for name, shape in self._state_shapes(batch_size).items()} for _ in self._blocks]

    def stored(self) -> dict[str, ndarray | Packed]:
        """The large weights that the engine holds as they were given, under torch's names: whoever needs them again needs no copy of them."""
        blocks = {f"blocks.{index}.{name}": weight for index, block in enumerate(self._blocks) for name, weight in block.stored().items()}
        return {"embedding.weight": self._table} | blocks

    def _state_shapes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        heads, p = self.sizes.rwkv_heads, self.sizes.dim // self.sizes.rwkv_heads
        return {"ssm": (batch_size, self.sizes.ssm_dim), "wkv": (batch_size, heads, p, p)}

    def _arguments(self, ids: Any, states: list[State] | None) -> tuple[ndarray, list[State]]:
        """The ids checked, and states that this call may write to."""
        ids = token_ids(ids, self.sizes.vocab_size)
        if states is None:
            return ids, self.init_states(ids.shape[0])
        self._check_states(states, ids.shape[0])
        return ids, [{name: np.array(value, order="C") for name, value in state.items()} for state in states]

    def _check_states(self, states: Any, batch: int, written: bool = False) -> None:
        depth, shapes = self.sizes.depth, self._state_shapes(batch)
        if not isinstance(states, (list, tuple)) or len(states) != depth:
            found = f"{len(states)} entries" if isinstance(states, (list, tuple)) else type(states).__name__
            raise ValueError(f"states must be a list with one entry per block, {depth} in all, found {found}")
        for i, state in enumerate(states):
            if not isinstance(state, dict) or state.keys() != shapes.keys():
                found = sorted(state) if isinstance(state, dict) else type(state).__name__
                raise ValueError(f"states[{i}] must be a dict with the keys {sorted(shapes)}, found {found}")
            for name, shape in shapes.items():
                value = state[name]
                if not isinstance(value, ndarray):
                    raise ValueError(f"states[{i}][{name!r}] must be a NumPy array, found {type(value).__name__}")
                if value.shape != shape:
                    raise ValueError(f"states[{i}][{name!r}] must have shape {shape}, found {value.shape}")
                if value.dtype != self.dtype:
                    raise ValueError(f"states[{i}][{name!r}] must have dtype {self.dtype}, found {value.dtype}")
                if written and not value.flags.carray:
                    raise ValueError(f"states[{i}][{name!r}] is overwritten and must be contiguous and writeable, found an array that is not")
                if math.isnan(value.min()):  # the smallest of an array with NaN is NaN
                    raise ValueError(f"states[{i}][{name!r}] {shape} must be finite, found NaN")

    def _chunks(self, ids: ndarray, states: list[State]) -> Iterator[tuple[int, ndarray]]:
        """(first token, output of the last block (B, n, D)) of one chunk after another; the states are moved on."""
        size = max(TOKENS // ids.shape[0], 1)
        for first in range(0, ids.shape[1], size):
            x = self._table[ids[:, first : first + size]]
            for block, state in zip(self._blocks, states, strict=True):
                x = block(x, state)
            yield first, x

    def _logits(self, x: ndarray) -> ndarray:
        dense = kernel("dense")
        return dense.linear(dense.layer_norm(x, *self._norm, self.sizes.norm_eps), self._head)
