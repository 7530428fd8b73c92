"""The delta rule, plain and hierarchical.

    plain:         S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T        o_t = S_t^T q_t
    in a chunk:    N = -strict_lower(diag(beta) K K^T)    T = (I - N)^-1    U = T diag(beta) V    W = T diag(beta) K
                   U' = U - W S    O = Q S + lower(Q K^T) U'    S <- S + K^T U'
    hierarchical:  a fast and a slow state, read normalised and updated once per chunk: `hierarchical_delta_rule`

Sources: Schlag, Irie and Schmidhuber, "Linear Transformers Are Secretly Fast Weight Programmers" (2021); Yang et al., "Parallelizing
Linear Transformers with the Delta Rule over Sequence Length" (2024), section 3; LAM's hierarchical DeltaNet.
Letters: B batch, H heads, L length, d head width, C chunk, n chunks, m hidden width of a flux. S is (B, H, d, d), key index first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IMPLS = ("recurrent", "chunked")
TRANSFORMS = ("lam", "exact")
EPS = 1e-8  # beside the Frobenius norm of a state
Pair = tuple[Tensor, Tensor]
MLP = tuple[Tensor, Tensor, Tensor, Tensor]


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, initial_state: Tensor | None = None, *,
    chunk_size: int = 64, transform: str = "exact", impl: str = "chunked",
) -> tuple[Tensor, Tensor]:
    """The plain rule. q, k, v (B, H, L, d); beta (B, H, L); initial_state (B, H, d, d) or None for zeros.

    Returns o (B, H, L, d) and the last state. "exact" is the recurrence whatever the chunk; "lam" is what LAM computes in place of the
    inverse, and exists in chunks only. Raises ValueError for an unknown `transform` or `impl`, or a `chunk_size` below 1.
    """
    _check(chunk_size, transform, impl)
    if impl == "recurrent" and transform != "exact":
        raise ValueError(f"the recurrent form has transform 'exact', found {transform!r}")
    state = q.new_zeros(*q.shape[:2], q.shape[3], q.shape[3]) if initial_state is None else initial_state
    if impl == "recurrent" or (transform == "exact" and q.shape[2] == 1):
        return _recurrent(q, k, v, beta, state)
    k_b, v = beta[..., None] * k, beta[..., None] * v
    outputs = []
    for cut, size in _pieces(q.shape[2], chunk_size):
        part = _inside(*(x[:, :, cut].unflatten(2, (-1, size)) for x in (q, k, k_b, v)), transform)
        starts = []
        for write, erase in zip(part.write.unbind(2), part.erase.unbind(2), strict=True):
            starts.append(state)
            state = state + write - erase @ state
        outputs.append((part.own + part.through @ torch.stack(starts, dim=2)).flatten(2, 3))
    return torch.cat(outputs, dim=2), state


def _recurrent(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token after another: the equation as it stands."""
    outputs = []
    for t in range(q.shape[2]):
        q_t, k_t, v_t = (x[:, :, t, :, None] for x in (q, k, v))  # (B, H, d, 1)
        error = v_t - state.mT @ k_t
        state = state + beta[:, :, t, None, None] * k_t * error.mT
        outputs.append((state.mT @ q_t)[..., 0])
    return torch.stack(outputs, dim=2), state


def hierarchical_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, fast_decay: Tensor, slow_decay: Tensor, fast_gate: Tensor, slow_gate: Tensor,
    token_mlp: MLP, chunk_mlp: MLP, bilinear: Tensor, temp: Tensor, mask: Tensor | None = None, initial_state: Pair | None = None, *,
    chunk_size: int = 64, transform: str = "lam", impl: str = "chunked",
) -> tuple[Tensor, Pair]:
    """The hierarchical rule: a fast and a slow memory, decayed, read, written, mixed and normalised once per chunk.

    q, k, v (B, H, L, d), not yet normalised; beta, decays and gates (B, H, L) in (0, 1); token_mlp: weights (m, 2d), (m,), (1, m), (1,);
    chunk_mlp the same with 2d + 1 inputs; bilinear (H, d, d); temp (H,); mask (B, L), true for valid tokens, padding on the right;
    initial_state (S_fast, S_slow), each (B, H, d, d). Returns o (B, H, L, d), zero at padded positions, and the last states.
    Chunks are counted from the first token, the last may be shorter; every mean over a chunk is over its valid tokens, and a chunk
    without any leaves the states as they are. Raises ValueError as `delta_rule`.
    """
    _check(chunk_size, transform, impl)
    valid = torch.ones_like(q[:, :1, :, 0]) if mask is None else mask[:, None].to(q.dtype)  # (B, 1, L)
    if mask is not None:
        q, k, v = (torch.where(mask[:, None, :, None], x, 0.0) for x in (q, k, v))
    q, k = l2norm(q), l2norm(k)
    k_b, v = beta[..., None] * k, beta[..., None] * v
    phi = flux(torch.cat([k_b, v], dim=-1), token_mlp)[..., 0]  # (B, H, L)
    alpha = 0.5 + 0.3 * phi
    zeros = q.new_zeros(*q.shape[:2], q.shape[3], q.shape[3])
    states = (zeros, zeros) if initial_state is None else initial_state
    form = _one_chunk_after_another if impl == "recurrent" else _all_chunks
    return form(
        q, k, k_b, v, fast_decay, slow_decay, alpha * fast_gate, (1 - alpha) * slow_gate, chunk_mlp, bilinear, temp, valid, states,
        chunk_size, transform,
    )


def _one_chunk_after_another(q, k, k_b, v, fast_decay, slow_decay, fast_gate, slow_gate, chunk_mlp, bilinear, temp, valid, states, size, transform):
    """Chunk after chunk, as the equations stand. Gates carry their share of alpha; the rest as in `hierarchical_delta_rule`."""
    fast, slow = states
    outputs = []
    for start in range(0, q.shape[2], size):
        cut = slice(start, start + size)
        q_c, k_c, count = q[:, :, cut], k[:, :, cut], valid[:, :, cut].sum(-1)  # (B, H, C, d), (B, 1)
        u, w, scores = _transformed(q_c, k_c, k_b[:, :, cut], v[:, :, cut], transform)
        psi = _chunk_flux(k_c, u, count, chunk_mlp, bilinear, temp)[..., None, None]  # (B, H, 1, 1)
        kept_fast = _mean(fast_decay[:, :, cut] * valid[:, :, cut], count)[..., None, None] * (1 - 0.10 * psi) * fast
        kept_slow = _mean(slow_decay[:, :, cut] * valid[:, :, cut], count)[..., None, None] * (1 - 0.05 * psi) * slow
        read_fast, read_slow = normalised(kept_fast), normalised(kept_slow)
        u_fast, u_slow = u - w @ read_fast, u - w @ read_slow
        o_fast = fast_gate[:, :, cut, None] * (q_c @ read_fast + scores @ u_fast)
        o_slow = slow_gate[:, :, cut, None] * (q_c @ read_slow + scores @ u_slow)
        outputs.append(o_fast + o_slow)
        new = _mixed(kept_fast + k_c.mT @ u_fast, kept_slow + k_c.mT @ u_slow, psi)
        fast, slow = (torch.where(count[..., None, None] > 0, one, old) for one, old in zip(new, (fast, slow), strict=True))
    return torch.cat(outputs, dim=2), (fast, slow)


def _all_chunks(q, k, k_b, v, fast_decay, slow_decay, fast_gate, slow_gate, chunk_mlp, bilinear, temp, valid, states, size, transform):
    """The same with the work inside the chunks done for all of them at once: only (d, d) products are left to the loop.

    W R enters o and S linearly, so Aq U_x = Aq U - (Aq W) R_x and K^T U_x = K^T U - (K^T W) R_x.
    """
    parts, starts = [], []
    fast, slow = states
    for cut, length in _pieces(q.shape[2], size):
        chunks = [x[:, :, cut].unflatten(2, (-1, length)) for x in (q, k, k_b, v, valid, fast_decay, slow_decay)]
        q_c, k_c, k_b_c, v_c, valid_c, fast_c, slow_c = chunks
        count = valid_c.sum(-1)  # (B, 1, n)
        part = _inside(q_c, k_c, k_b_c, v_c, transform)
        psi = _chunk_flux(k_c, part.u, count, chunk_mlp, bilinear[:, None], temp[:, None])  # (B, H, n)
        keep = torch.stack([_mean(fast_c * valid_c, count) * (1 - 0.10 * psi), _mean(slow_c * valid_c, count) * (1 - 0.05 * psi)], dim=3)
        reads = []
        for i in range(count.shape[2]):
            kept = keep[:, :, i, :, None, None] * torch.stack([fast, slow], dim=2)  # (B, H, 2, d, d)
            read = normalised(kept)
            reads.append(read)
            kept = kept + part.write[:, :, i, None] - part.erase[:, :, i, None] @ read
            new = _mixed(*kept.unbind(2), psi[:, :, i, None, None])
            alive = count[:, :, i, None, None] > 0
            fast, slow = torch.where(alive, new[0], fast), torch.where(alive, new[1], slow)
        parts.append(part)
        starts.append(torch.stack(reads, dim=2))  # (B, H, n, 2, d, d)
    outputs = []
    for (cut, length), part, reads in zip(_pieces(q.shape[2], size), parts, starts, strict=True):
        gates = [gate[:, :, cut].unflatten(2, (-1, length))[..., None] for gate in (fast_gate, slow_gate)]
        fast_o, slow_o = (part.own + part.through @ read for read in reads.unbind(3))
        outputs.append((gates[0] * fast_o + gates[1] * slow_o).flatten(2, 3))
    return torch.cat(outputs, dim=2), (fast, slow)


class Inside(NamedTuple):
    """What chunks contribute whatever the state: u, own = Aq U, through = Q - Aq W, each (..., C, d); write = K^T U, erase = K^T W (..., d, d)."""

    u: Tensor
    own: Tensor
    through: Tensor
    write: Tensor
    erase: Tensor


def _inside(q: Tensor, k: Tensor, k_b: Tensor, v: Tensor, transform: str) -> Inside:
    u, w, scores = _transformed(q, k, k_b, v, transform)
    return Inside(u, scores @ u, q - scores @ w, k.mT @ u, k.mT @ w)


def _transformed(q: Tensor, k: Tensor, k_b: Tensor, v: Tensor, transform: str) -> tuple[Tensor, Tensor, Tensor]:
    """U, W (..., C, d) and Aq (..., C, C) of chunks q, k, beta k, beta v (..., C, d)."""
    n = -(k_b @ k.mT).tril(-1)
    both = torch.cat([v, k_b], dim=-1)
    if transform == "exact":
        wide = torch.promote_types(n.dtype, torch.float32)  # torch solves nothing in half precision
        identity = torch.eye(n.shape[-1], dtype=wide, device=n.device)
        both = torch.linalg.solve_triangular(identity - n.to(wide), both.to(wide), upper=False, unitriangular=True).to(n.dtype)
    else:
        both = both + (n + (n @ n.mT).tril(-1)) @ both
    u, w = both.chunk(2, dim=-1)
    return u, w, (q @ k.mT).tril()


def _chunk_flux(k: Tensor, u: Tensor, count: Tensor, mlp: MLP, bilinear: Tensor, temp: Tensor) -> Tensor:
    """psi (...) of chunks k, u (..., C, d), which are zero beyond their `count` valid tokens. bilinear (H, ..., d, d), temp (H, ...)."""
    s = ((k @ bilinear) * u).sum(-1).sum(-1) / temp
    means = [_mean(k.mT, count[..., None]), _mean(u.mT, count[..., None]), (s / count.clamp(min=1))[..., None]]
    return flux(torch.cat(means, dim=-1), mlp)[..., 0]


def _mean(x: Tensor, count: Tensor) -> Tensor:
    """Mean along the last axis of `x`, of which `count` entries are valid and the others zero."""
    return x.sum(-1) / count.clamp(min=1)


def _mixed(fast: Tensor, slow: Tensor, psi: Tensor) -> Pair:
    """Each timescale learns from the other, then both are normalised. States (B, H, d, d), psi (B, H, 1, 1)."""
    c = 0.05 + 0.1 * psi.mean(1, keepdim=True)  # over the heads of one sample
    return normalised(fast + c * psi * slow), normalised(slow + c * (1 - psi) * fast)


def flux(x: Tensor, mlp: MLP) -> Tensor:
    """clamp(sigmoid(MLP(x)), 0.01, 0.99): x (..., i) -> (..., 1)."""
    w0, b0, w2, b2 = mlp
    return F.linear(F.silu(F.linear(x, w0, b0)), w2, b2).sigmoid().clamp(0.01, 0.99)


def l2norm(x: Tensor) -> Tensor:
    """x / max(|x|, 1e-12) along the last axis; a zero row stays zero and has gradient zero."""
    return torch.where((x != 0).any(-1, keepdim=True), x / _root((x * x).sum(-1, keepdim=True)).clamp(min=1e-12), 0.0)


def normalised(state: Tensor) -> Tensor:
    """S / (|S|_F + 1e-8) over the last two axes; the norm's gradient at S = 0 is zero."""
    return state / (_root((state * state).sum((-2, -1), keepdim=True)) + EPS)


def _root(square: Tensor) -> Tensor:
    """Square root with gradient zero at zero, where the root's own is infinite."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def _pieces(length: int, size: int) -> Iterator[tuple[slice, int]]:
    """The whole chunks as one piece, the ragged last one as another: (where, length of its chunks)."""
    whole = length - length % size
    if whole:
        yield slice(0, whole), size
    if whole < length:
        yield slice(whole, length), length - whole


def _check(chunk_size: int, transform: str, impl: str) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, found {chunk_size}")
    for name, value, choices in (("transform", transform, TRANSFORMS), ("impl of the delta rule", impl, IMPLS)):
        if value not in choices:
            raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, found {value!r}")
