"""A small recurrent language model in torch, of the harness's own: embedding, norms, a gated cell with a state, heads, exact gelu, tied head.

B batch, L length, D width 15, H heads 3, P head width 5, N state 7, V vocabulary 11.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Cell(nn.Module):
    """h_t = norm(decay * h_{t-1} + step * write(x_t)); the state passed in is detached."""

    def __init__(self, dim: int, state: int) -> None:
        super().__init__()
        self.write, self.read = nn.Linear(dim, state, bias=False), nn.Linear(state, dim, bias=False)
        self.decay = nn.Parameter(torch.zeros(state))
        self.norm = nn.LayerNorm(state)
        self.register_buffer("step", torch.ones(state))

    def forward(self, x: torch.Tensor, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        h = x.new_zeros(x.shape[0], self.decay.shape[0]) if state is None else state.detach()
        update, out = self.write(x) * self.step, []
        for t in range(x.shape[1]):
            h = self.norm(torch.sigmoid(self.decay) * h + update[:, t])
            out.append(h)
        return self.read(torch.stack(out, 1)), h


class Heads(nn.Module):
    """Channels in heads, each with its own gain and a softmax over its channels."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.project, self.gain = nn.Linear(dim, dim), nn.Parameter(torch.ones(heads, dim // heads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(x).unflatten(-1, tuple(self.gain.shape))
        return (torch.softmax(y, -1) * self.gain).flatten(-2)


class Block(nn.Module):
    """x + cell(norm(x)) + heads(norm(x)) + down(gelu(up(norm(x))))."""

    def __init__(self, dim: int, heads: int, state: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.cell, self.heads = nn.LayerNorm(dim), Cell(dim, state), Heads(dim, heads)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        a = self.norm(x)
        y, state = self.cell(a, state)
        return x + y + self.heads(a) + self.down(F.gelu(self.up(a))), state


class Toy(nn.Module):
    """logits (B, L, V), states = model(ids (B, L), states); states is a list of {"h": (B, N)}."""

    def __init__(self, vocab: int = 11, dim: int = 15, heads: int = 3, state: int = 7, hidden: int = 21, depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, state, hidden) for _ in range(depth))
        self.norm_out = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("calls", torch.tensor(3))

    def forward(self, ids: torch.Tensor, states: list | None = None) -> tuple[torch.Tensor, list]:
        x, after = self.embedding(ids), []
        for block, state in zip(self.blocks, states or [None] * len(self.blocks), strict=True):
            x, h = block(x, None if state is None else state["h"])
            after.append({"h": h})
        return self.head(self.norm_out(x)), after
