"""GroundedMamba: a causal language model whose every block runs two recurrences side by side.

    x   = embedding(ids)
    x   = x + LN_out(g SSM(LN_ssm(x)) + (1 - g) RWKV(LN_rwkv(x)))        for every block
    out = lm_head(ln_out(x)),  lm_head tied to the embedding

Source: GroundThink's GroundedMamba. Letters: B batch, L length, D width, N state, H heads, P head width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from conf.models import GroundedMambaConfig
from torch_impl.language import StreamingLM
from torch_impl.layers import IMPLS, RWKVGroundedMemory, StableStateSSM, linear
from torch_impl.state import State


class GroundedMambaBlock(nn.Module):
    """x + LN_out(g SSM(LN_ssm(x)) + (1 - g) RWKV(LN_rwkv(x)))."""

    def __init__(self, config: GroundedMambaConfig, impl: str, chunk_size: int) -> None:
        super().__init__()
        self.config = config
        self.ln_ssm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.ln_rwkv = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.ln_out = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.ssm = StableStateSSM(config, impl)
        self.rwkv = RWKVGroundedMemory(config, impl, chunk_size)
        odds = math.log(config.gate_ssm / (1 - config.gate_ssm)) / 2
        self.gate_proj = linear(config.dim, 2, bias=(odds, -odds))
        nn.init.zeros_(self.gate_proj.weight)
        self.gate_proj.requires_grad_(config.gate == "learned")

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State, dict[str, Any]]:
        """x (B, L, D). Returns the block's output (B, L, D), its state, and what monitors and the memory bank want of this call."""
        h, s = (None, None) if state is None else (state["ssm"].detach(), state["wkv"].detach())
        ssm, states = self.ssm(self.ln_ssm(x), h)
        rwkv, s, rows = self.rwkv(self.ln_rwkv(x), s)
        if self.config.gate == "learned":
            g = self.gate_proj(x).softmax(-1)[..., :1]  # (B, L, 1), of this token alone: causal
        else:
            g = x.new_tensor(self.config.gate_ssm)
        aux = {"memory_rows": rows, "gate": g.detach().mean(), "ssm_states": states.detach()}
        return x + self.ln_out(g * ssm + (1 - g) * rwkv), {"ssm": states[:, -1], "wkv": s}, aux


class GroundedMamba(StreamingLM):
    """Causal language model with a state of constant size.

    `GroundedMamba(config)` or `GroundedMamba(vocab_size=..., dim=...)` with the other fields at their defaults.
    `impl` is "recurrent" (the readable truth), "chunked" (WKV by matrix products) or "compiled" (both recurrences by Cython kernels).
    """

    def __init__(
        self, config: GroundedMambaConfig | None = None, *, vocab_size: int | None = None, dim: int | None = None, depth: int | None = None,
        ssm_dim: int | None = None, rwkv_heads: int | None = None, impl: str = "chunked", chunk_size: int = 32,
    ) -> None:
        super().__init__()
        self.config = GroundedMambaConfig.of(config, vocab_size=vocab_size, dim=dim, depth=depth, ssm_dim=ssm_dim, rwkv_heads=rwkv_heads)
        if impl not in IMPLS:
            raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, found {impl!r}")
        self.embedding = nn.Embedding(self.config.vocab_size, self.config.dim)
        self.blocks = nn.ModuleList(GroundedMambaBlock(self.config, impl, chunk_size) for _ in range(self.config.depth))
        self.ln_out = nn.LayerNorm(self.config.dim, eps=self.config.norm_eps)
        self.lm_head = nn.Linear(self.config.dim, self.config.vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.lm_head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, states: list[State] | None = None, *, return_aux: bool = False) -> tuple[Any, ...]:
        """input_ids (B, L) in [0, V). Returns logits (B, L, V) and the states to hand to the next call.

        With `return_aux` also a dict, all of it detached: "memory_rows" (k, v rows of every block, for `update_memory`; empty
        without a bank), "gate" (mean weight of the SSM branch, one per block) and "ssm_states" (B, L, N) of every block.
        States passed in are detached (truncated backpropagation); those returned are not. Raises ValueError for ids out of
        range, empty input, and states of another shape or dtype or with NaN.
        """
        self.check(input_ids, states)
        x = self.embedding(input_ids)  # (B, L, D)
        new_states, auxes = [], []
        for block, state in zip(self.blocks, states or [None] * len(self.blocks), strict=True):
            x, state, aux = block(x, state)
            new_states.append(state)
            auxes.append(aux)
        logits = self.lm_head(self.ln_out(x))  # (B, L, V)
        if not return_aux:
            return logits, new_states
        return logits, new_states, {
            "memory_rows": [aux["memory_rows"] for aux in auxes if aux["memory_rows"] is not None],
            "gate": torch.stack([aux["gate"] for aux in auxes]),
            "ssm_states": [aux["ssm_states"] for aux in auxes],
        }

    def state_shapes(self, batch_size: int) -> list[dict[str, tuple[int, ...]]]:
        """Shapes of the states for `batch_size` sequences."""
        config = self.config
        one = {"ssm": (batch_size, config.ssm_dim), "wkv": (batch_size, config.rwkv_heads, config.head_dim, config.head_dim)}
        return [one] * config.depth

    def update_memory(self, aux: dict[str, Any]) -> None:
        """Once per optimiser step: count it, and on every `memory_every`-th write the rows of `aux` into the memory banks."""
        for block, rows in zip(self.blocks, aux["memory_rows"], strict=bool(self.config.memory_size)):
            block.rwkv.update_memory(rows)
