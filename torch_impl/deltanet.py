"""DeltaNet: the layer, and a causal language model made of it.

    q, k, v = heads(silu(conv(W x)))        beta = sigmoid(W_b x)        hierarchical: decays, gates and fluxes besides
    y       = W_o (RMSNorm_d(rule(q, k, v, beta, ...)) * sigmoid(W_g x))

    DeltaNetLM:   x = x + DeltaNetLayer(RMSNorm(x));   x = x + W_2(silu(W_1 n) * W_3 n), n = RMSNorm(x);   tied head on RMSNorm(x)

Sources: Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (2024); LAM's hierarchical DeltaNet.
Letters: B batch, L length, D width, H heads, d head width, K kernel, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.models import DeltaNetConfig
from torch_impl.language import PreNormLM
from torch_impl.layers import linear
from torch_impl.ops import compiled
from torch_impl.ops.delta_rule import delta_rule, hierarchical_delta_rule, l2norm
from torch_impl.ops.normalise import rms_norm
from torch_impl.ops.short_conv import causal_conv, short_conv
from torch_impl.state import State

IMPLS = ("recurrent", "chunked", "compiled")
RULES = {"hierarchical": "lam", "plain": "exact"}  # the rule and its transform unless another is asked for
CONVS = ("same", "causal")


class ShortConvolution(nn.Conv1d):
    """Depthwise convolution along L with torch's parameters, (D, 1, K) and (D,), on (B, L, D)."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__(dim, dim, kernel, groups=dim)
        nn.init.uniform_(self.weight, -(kernel**-0.5), kernel**-0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x (B, L, D). With `past` (B, K - 1, D) causal, else centred; returns y (B, L, D) and the next `past`, or None."""
        if past is None:
            return short_conv(x, self.weight, self.bias, self.kernel_size[0] // 2), None
        return causal_conv(x, self.weight, self.bias, past)


class GatedRMSNorm(nn.Module):
    """RMSNorm of every head, times a sigmoid gate: of the token where one is given, else learned per channel."""

    def __init__(self, width: int, eps: float, output_gate: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.gate = nn.Parameter(torch.ones(width), requires_grad=not output_gate)

    def forward(self, o: Tensor, gate: Tensor | None) -> Tensor:
        """o (B, L, H, d), gate of the same shape before its sigmoid, or None. Returns (B, L, H, d)."""
        return rms_norm(o, self.weight, self.eps) * torch.sigmoid(self.gate if gate is None else gate)


class Flux(nn.Module):
    """Weights of a flux, clamp(sigmoid(W_2 silu(W_1 x))): the op computes it, in the middle of the rule."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, width)
        self.out = nn.Linear(width, 1)
        for layer in (self.hidden, self.out):
            nn.init.xavier_uniform_(layer.weight, gain=0.1)
            nn.init.zeros_(layer.bias)

    def mlp(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.hidden.weight, self.hidden.bias, self.out.weight, self.out.bias


class PlainRule(nn.Module):
    """The plain delta rule on l2-normalised queries and keys; no weights."""

    def __init__(self, chunk_size: int, transform: str, impl: str) -> None:
        super().__init__()
        self.chunk_size, self.transform, self.impl = chunk_size, transform, impl

    def forward(self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """q, k, v (B, H, L, d), beta (B, H, L), state (B, H, d, d) or None. Returns o (B, H, L, d) and the last state."""
        arguments = (l2norm(q), l2norm(k), v, beta, state)
        if self.impl == "compiled":
            return compiled.delta_rule(*arguments, chunk_size=self.chunk_size, transform=self.transform)
        return delta_rule(*arguments, chunk_size=self.chunk_size, transform=self.transform, impl=self.impl)


class HierarchicalRule(nn.Module):
    """The hierarchical delta rule and the weights that only it uses."""

    def __init__(self, heads: int, width: int, chunk_size: int, transform: str, impl: str) -> None:
        super().__init__()
        self.chunk_size, self.transform, self.impl = chunk_size, transform, impl
        bound = 0.1 * math.sqrt(6 / (width + width))
        self.W_bilinear = nn.Parameter(torch.empty(heads, width, width).uniform_(-bound, bound))  # Xavier per head, gain 0.1
        self.temp = nn.Parameter(torch.full((heads,), math.sqrt(width)))
        hidden = max(width // 2, 1)
        self.token_flux = Flux(2 * width, hidden)
        self.chunk_flux = Flux(2 * width + 1, hidden)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decays: tuple[Tensor, Tensor], gates: tuple[Tensor, Tensor],
        mask: Tensor | None, states: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """q, k, v (B, H, L, d); beta, fast and slow decays and gates (B, H, L). Returns o (B, H, L, d) and both last states."""
        arguments = (
            q, k, v, beta, *decays, *gates, self.token_flux.mlp(), self.chunk_flux.mlp(), self.W_bilinear, self.temp, mask, states)
        if self.impl == "compiled":
            return compiled.hierarchical_delta_rule(*arguments, chunk_size=self.chunk_size, transform=self.transform)
        return hierarchical_delta_rule(*arguments, chunk_size=self.chunk_size, transform=self.transform, impl=self.impl)


class DeltaNetLayer(nn.Module):
    """Token mixing by the delta rule.

    `rule` is "hierarchical" or "plain"; `conv` "same" (an encoder's: output t sees t - K / 2 .. ) or "causal" (a decoder's, which
    streams); `transform` None takes the rule's own, "lam" or "exact". Raises ValueError for an unknown choice, for `dim` not divisible by
    `heads`, and for a causal hierarchical layer: its chunk means look ahead.
    """

    def __init__(
        self, dim: int, heads: int, *, rule: str = "hierarchical", conv: str = "same", conv_kernel: int = 4, chunk_size: int = 64,
        transform: str | None = None, rms_eps: float = 1e-6, output_gate: bool = True, impl: str = "chunked",
    ) -> None:
        super().__init__()
        for name, value, choices in (("rule", rule, tuple(RULES)), ("conv", conv, CONVS), ("impl", impl, IMPLS)):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, found {value!r}")
        if dim % heads:
            raise ValueError(f"dim must be divisible by heads, found dim={dim} and heads={heads}")
        if conv == "causal" and rule == "hierarchical":
            raise ValueError("conv must be 'same' with rule='hierarchical', found 'causal': its chunk means look ahead")
        self.dim, self.heads, self.conv = dim, heads, conv
        width = dim // heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (linear(dim, dim) for _ in range(4))
        if output_gate:
            self.g_proj = linear(dim, dim)
        self.b_proj = linear(dim, heads)
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (ShortConvolution(dim, conv_kernel) for _ in range(3))
        self.output_gate, self.hierarchical = output_gate, rule == "hierarchical"
        if self.hierarchical:
            self.fast_decay_proj, self.slow_decay_proj = (linear(dim, heads, bias=(0.0,) * heads) for _ in range(2))
            self.fast_decay_bias = nn.Parameter(torch.full((heads,), math.log(0.3)))
            self.slow_decay_bias = nn.Parameter(torch.full((heads,), math.log(0.9)))
            self.fast_gate_proj, self.slow_gate_proj = (linear(dim, heads) for _ in range(2))
            self.rule = HierarchicalRule(heads, width, chunk_size, transform or RULES[rule], impl)
        else:
            self.rule = PlainRule(chunk_size, transform or RULES[rule], impl)
        self.o_norm = GatedRMSNorm(width, rms_eps, output_gate)

    def forward(self, x: Tensor, mask: Tensor | None = None, state: State | None = None) -> tuple[Tensor, State]:
        """x (B, L, D); mask (B, L), true for valid tokens, padding on the right, or None; state as returned, or None for zeros.

        Returns y (B, L, D) and the last state: {"S_fast", "S_slow"}, or {"S"} with {"conv_q", "conv_k", "conv_v"} (B, K - 1, D) where
        the layer is causal. Raises ValueError for a mask in a layer on the plain rule.
        """
        if mask is not None:
            if not self.hierarchical:
                raise ValueError("mask must be None for a layer on the plain rule: its state would go on through the padding")
            x = x * mask[..., None]
        past = self._past(x, state)
        q, k, v, new = [], [], [], {}
        for name, heads in (("q", q), ("k", k), ("v", v)):
            y, after = getattr(self, f"{name}_conv1d")(getattr(self, f"{name}_proj")(x), past.get(f"conv_{name}"))
            heads.append(F.silu(y).unflatten(-1, (self.heads, -1)).transpose(1, 2))  # (B, H, L, d)
            new |= {} if after is None else {f"conv_{name}": after}
        beta = self._per_head(self.b_proj(x))
        if self.hierarchical:
            decays = (self._per_head(self.fast_decay_proj(x) + self.fast_decay_bias), self._per_head(self.slow_decay_proj(x) + self.slow_decay_bias))
            gates = (self._per_head(self.fast_gate_proj(x)), self._per_head(self.slow_gate_proj(x)))
            states = None if state is None else (state["S_fast"], state["S_slow"])
            o, (new["S_fast"], new["S_slow"]) = self.rule(q[0], k[0], v[0], beta, decays, gates, mask, states)
        else:
            o, new["S"] = self.rule(q[0], k[0], v[0], beta, None if state is None else state["S"])
        gate = self.g_proj(x).unflatten(-1, (self.heads, -1)) if self.output_gate else None
        return self.o_proj(self.o_norm(o.transpose(1, 2), gate).flatten(-2)), new

    def _past(self, x: Tensor, state: State | None) -> State:
        if self.conv == "same":
            return {}
        names = ("conv_q", "conv_k", "conv_v")
        return {name: x.new_zeros(x.shape[0], self.q_conv1d.kernel_size[0] - 1, self.dim) if state is None else state[name] for name in names}

    @staticmethod
    def _per_head(z: Tensor) -> Tensor:
        """Sigmoid of z (B, L, H), as (B, H, L)."""
        return torch.sigmoid(z).transpose(1, 2)


class DeltaNetBlock(nn.Module):
    """x + DeltaNetLayer(RMSNorm(x)), then x + W_2(silu(W_1 n) * W_3 n) with n = RMSNorm(x)."""

    def __init__(self, config: DeltaNetConfig, impl: str) -> None:
        super().__init__()
        self.norm_delta = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.delta = DeltaNetLayer(
            config.dim, config.heads, rule="plain", conv="causal", conv_kernel=config.conv_kernel, chunk_size=config.chunk_size,
            rms_eps=config.norm_eps, impl=impl,
        )
        self.norm_ffn = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.w1, self.w3 = linear(config.dim, config.ffn_dim), linear(config.dim, config.ffn_dim)
        self.w2 = linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """x (B, L, D). Returns the block's output (B, L, D) and its state."""
        y, state = self.delta(self.norm_delta(x), None, None if state is None else {name: value.detach() for name, value in state.items()})
        x = x + y
        n = self.norm_ffn(x)
        return x + self.w2(F.silu(self.w1(n)) * self.w3(n)), state


class DeltaNetLM(PreNormLM):
    """Causal language model on the plain delta rule, with a state of constant size. `impl` is "recurrent", "chunked" or "compiled"."""

    def __init__(self, config: DeltaNetConfig | None = None, *, impl: str = "chunked") -> None:
        config = DeltaNetConfig() if config is None else config
        super().__init__(config, lambda: DeltaNetBlock(config, impl))

    def state_shapes(self, batch_size: int) -> list[dict[str, tuple[int, ...]]]:
        """Shapes of the states for `batch_size` sequences."""
        config = self.config
        past = (batch_size, config.conv_kernel - 1, config.dim)
        one = {"conv_q": past, "conv_k": past, "conv_v": past, "S": (batch_size, config.heads, config.head_dim, config.head_dim)}
        return [one] * config.depth
