"""The two branches of a GroundedMamba block: a selective state space that reacts and an RWKV memory that holds on.

    SSM:   h_t = LN((I + dt_A A-hat) h_{t-1} + dt_B B a_t)      y_t = C h_t + D * a_t
    RWKV:  y_t = W_o (norm(WKV(sigmoid(W_r b), W_k b, W_v b)) + memory_gate * bank(W_q b))

Source: GroundThink's StableStateSSM and RWKVGroundedMemory.
Letters: B batch, L length, D width, N state, H heads, P head width, M slots, R rows written to the bank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from conf.models import GroundedMambaConfig
from torch_impl.ops import memory_bank
from torch_impl.ops.normalise import head_norm
from torch_impl.ops.selective_scan import selective_scan, spectral_bound
from torch_impl.ops.wkv import wkv

IMPLS = ("recurrent", "chunked", "compiled")


class StableStateSSM(nn.Module):
    """Selective state space with a bounded transition and a normalised state."""

    def __init__(self, config: GroundedMambaConfig, impl: str) -> None:
        super().__init__()
        self.config, self.impl = config, "compiled" if impl == "compiled" else "recurrent"
        self.A = nn.Parameter(-0.1 * torch.eye(config.ssm_dim) + 0.01 * torch.randn(config.ssm_dim, config.ssm_dim))
        self.B_proj = nn.Linear(config.dim, config.ssm_dim, bias=False)
        self.C_proj = nn.Linear(config.ssm_dim, config.dim, bias=False)
        self.D = nn.Parameter(torch.ones(config.dim))
        self.dt_proj = linear(config.dim, len(config.dt_bias), bias=config.dt_bias)
        self.state_norm = nn.LayerNorm(config.ssm_dim, eps=config.norm_eps)
        nn.init.normal_(self.B_proj.weight, std=0.01)
        nn.init.normal_(self.C_proj.weight, std=0.01)

    def step_size(self, z: Tensor) -> Tensor:
        """Map dt_proj's outputs into [dt_min, dt_max]. "hard" has no gradient above dt_max, where the initial bias lies."""
        low, high = self.config.dt_min, self.config.dt_max
        if self.config.dt_clamp == "hard":
            return torch.logaddexp(z, torch.zeros_like(z)).clamp(low, high)  # softplus, finite gradient for any z
        return low + (high - low) * torch.sigmoid(z)

    def forward(self, a: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """a (B, L, D), state (B, N) or None for zeros. Returns y (B, L, D) and the states of all tokens (B, L, N)."""
        dt = self.step_size(self.dt_proj(a))  # (B, L, 1 or 2)
        dt_b = dt[..., 1] / self.config.dt_max if dt.shape[-1] == 2 else None
        states, _ = selective_scan(
            self.B_proj(a), dt[..., 0], dt_b, spectral_bound(self.A, self.config.max_singular),
            self.state_norm.weight, self.state_norm.bias, state, eps=self.config.norm_eps, impl=self.impl,
        )
        return self.C_proj(states) + self.D * a, states


class HeadNorm(nn.Module):
    """Normalise the channels of each head of each token, then scale and shift per channel."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, y: Tensor) -> Tensor:
        """y (B, L, H, P). Returns (B, L, D)."""
        return head_norm(y, self.weight, self.bias, self.eps)


class RWKVGroundedMemory(nn.Module):
    """RWKV memory with a fixed decay per channel and, beside it, a bank of slowly averaged rows."""

    def __init__(self, config: GroundedMambaConfig, impl: str, chunk_size: int) -> None:
        super().__init__()
        self.config, self.impl, self.chunk_size = config, impl, chunk_size
        dim, heads = config.dim, config.rwkv_heads
        self.key_proj = linear(dim, dim)
        self.value_proj = linear(dim, dim)
        self.receptance_proj = linear(dim, dim)
        self.output_proj = linear(dim, dim)
        rate = -5.0 * torch.arange(1, heads + 1) / heads
        decay = rate if config.decay == "exp_exp" else rate.exp()
        self.time_decay = nn.Parameter(decay[:, None].repeat(1, config.head_dim))
        self.time_first = nn.Parameter(torch.full((heads, config.head_dim), 0.5))
        if config.readout_norm:
            self.readout_norm = HeadNorm(dim, config.norm_eps)
        if config.memory_size:
            self.memory_query = linear(dim, dim)
            self.memory_gate = nn.Parameter(torch.zeros(dim))
            self.register_buffer("memory_keys", torch.zeros(config.memory_size, dim))
            self.register_buffer("memory_values", torch.zeros(config.memory_size, dim))
            self.register_buffer("memory_count", torch.zeros(config.memory_size, dtype=torch.int64))
            self.register_buffer("update_counter", torch.zeros((), dtype=torch.int64))
            self.register_buffer("writes", torch.zeros((), dtype=torch.int64))

    def forward(self, b: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """b (B, L, D), state (B, H, P, P) or None for zeros.

        Returns y (B, L, D), the last state, and the key and value rows (R, D) that the bank would write, detached; None without a bank.
        """
        config = self.config
        r, k, v = torch.sigmoid(self.receptance_proj(b)), self.key_proj(b), self.value_proj(b)
        rows = self.rows(k, v) if config.memory_size else None
        w = torch.exp(-torch.exp(self.time_decay)) if config.decay == "exp_exp" else self.time_decay  # (H, P)
        r, k, v = (x.unflatten(-1, w.shape) for x in (r, k, v))  # (B, L, H, P)
        if config.normalised_key:
            k = (1 - w) * k
        y, state = wkv(r, k, v, w, self.time_first, state, time_first=config.time_first, impl=self.impl, chunk_size=self.chunk_size)
        y = self.readout_norm(y) if config.readout_norm else y.flatten(-2)  # (B, L, D)
        if config.memory_size and self.memory_count[0] > 0:  # slots fill in order, so an empty first slot is an empty bank
            y = y + self.memory_gate * memory_bank.read(
                self.memory_query(b), self.memory_keys, self.memory_values, self.memory_count,
                alpha=config.memory_alpha, heads=config.retrieval_heads,
            )
        return self.output_proj(y), state, rows

    def rows(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The rows (R, D) of k and v (B, L, D), flattened over tokens, that the next write would store."""
        tokens = k.shape[0] * k.shape[1]
        positions = memory_bank.row_positions(tokens, min(self.config.memory_writes, tokens, self.config.memory_size), self.writes)
        return k.detach().flatten(0, 1)[positions], v.detach().flatten(0, 1)[positions]

    @torch.no_grad()
    def update_memory(self, rows: tuple[Tensor, Tensor]) -> None:
        """Count one optimiser step; on every `memory_every`-th, write `rows` (R, D), (R, D) into the bank."""
        self.update_counter += 1
        if self.update_counter % self.config.memory_every:
            return
        keys, values, count = memory_bank.write(
            self.memory_keys, self.memory_values, self.memory_count, *rows, alpha=self.config.memory_alpha)
        self.memory_keys.copy_(keys)
        self.memory_values.copy_(values)
        self.memory_count.copy_(count)
        self.writes += 1


def linear(inputs: int, outputs: int, bias: tuple[float, ...] | None = None) -> nn.Linear:
    """Linear layer with weights uniform in +-1 / sqrt(inputs) and, where given, the initial bias."""
    layer = nn.Linear(inputs, outputs, bias=bias is not None)
    nn.init.uniform_(layer.weight, -inputs**-0.5, inputs**-0.5)
    if bias is not None:
        layer.bias.data.copy_(torch.tensor(bias))
    return layer
