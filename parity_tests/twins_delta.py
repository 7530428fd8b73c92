"""Independent twins of the delta rules in plain NumPy: one sample, one head, one token or chunk after another, from the specification.

As in `twins.py` they import nothing of ours and are analytic in their arrays, so that complex arrays carry derivatives through them.
Letters: B batch, H heads, L length, d head width, m hidden width of a flux, C chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from parity_tests.twins import sigmoid

Pair = tuple[np.ndarray, np.ndarray]


def plain(q: np.ndarray, k: np.ndarray, v: np.ndarray, beta: np.ndarray, s: np.ndarray) -> Pair:
    """The plain rule as a product of transition matrices, S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = q_t^T S_t.

    q, k, v (B, H, L, d), beta (B, H, L), s (B, H, d, d). Returns o (B, H, L, d) and the last states.
    """
    s = np.array(s, dtype=np.result_type(q, k, v, beta, s))
    o = np.zeros(v.shape, dtype=s.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                key, rate = k[b, h, t], beta[b, h, t]
                transition = np.eye(key.size) - rate * np.outer(key, key)
                s[b, h] = transition @ s[b, h] + rate * np.outer(key, v[b, h, t])
                o[b, h, t] = q[b, h, t] @ s[b, h]
    return o, s


def norm(x: np.ndarray) -> np.ndarray:
    """Euclidean norm of all entries, analytic, with derivative zero at zero."""
    square = (x * x).sum()
    return np.sqrt(square) if square.real > 0 else 0.0


def unit(x: np.ndarray) -> np.ndarray:
    length = norm(x)
    return x / length if np.real(length) > 1e-12 else x / 1e-12


def flux(x: np.ndarray, mlp: Sequence[np.ndarray]) -> np.ndarray:
    """clamp(sigmoid(MLP(x)), 0.01, 0.99) of one vector."""
    hidden = mlp[0] @ x + mlp[1]
    value = sigmoid(mlp[2][0] @ (hidden * sigmoid(hidden)) + mlp[3][0])
    return 0.01 if value.real < 0.01 else 0.99 if value.real > 0.99 else value


def transform(n: np.ndarray, kind: str) -> np.ndarray:
    """(I - N)^-1, as the finite series that it is for a strictly lower N; or LAM's I + N + strict_lower(N N^T)."""
    size = n.shape[0]
    if kind == "lam":
        return np.eye(size) + n + np.tril(n @ n.T, -1)
    total, power = np.eye(size, dtype=n.dtype), np.eye(size, dtype=n.dtype)
    for _ in range(size - 1):
        power = power @ n
        total = total + power
    return total


def hierarchical(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, beta: np.ndarray, fast_decay: np.ndarray, slow_decay: np.ndarray, fast_gate: np.ndarray,
    slow_gate: np.ndarray, token_mlp: Any, chunk_mlp: Any, bilinear: np.ndarray, temp: np.ndarray, lengths: Sequence[int],
    states: Pair, chunk_size: int, kind: str,
) -> tuple[np.ndarray, Pair]:
    """The hierarchical rule of samples with `lengths` valid tokens each, every sample cut to its length first. Arguments as the op's."""
    everything = [q, k, v, beta, fast_decay, slow_decay, fast_gate, slow_gate, *token_mlp, *chunk_mlp, bilinear, temp, *states]
    dtype = np.result_type(*everything)
    o = np.zeros(q.shape, dtype=dtype)
    last: Pair = (np.array(states[0], dtype=dtype), np.array(states[1], dtype=dtype))
    heads = range(q.shape[1])
    for b, length in enumerate(lengths):
        for start in range(0, length, chunk_size):
            tokens = range(start, min(start + chunk_size, length))
            inside = []
            for h in heads:
                queries, keys = (np.array([unit(x[b, h, t]) for t in tokens]) for x in (q, k))
                rates = beta[b, h, tokens.start : tokens.stop]
                values, written = (rates[:, None] * x for x in (v[b, h, tokens.start : tokens.stop], keys))
                full = transform(-np.tril(written @ keys.T, -1), kind)
                u, w = full @ values, full @ written
                s = sum((key @ bilinear[h]) @ row for key, row in zip(keys, u, strict=True)) / temp[h] / len(tokens)
                psi = flux(np.concatenate([keys.mean(0), u.mean(0), [s]]), chunk_mlp)
                phi = [flux(np.concatenate(pair), token_mlp) for pair in zip(written, values, strict=True)]
                inside.append((queries, keys, u, w, psi, phi))
            coupling = 0.05 + 0.1 * np.mean([one[4] for one in inside])
            for h in heads:
                queries, keys, u, w, psi, phi = inside[h]
                at = slice(tokens.start, tokens.stop)
                memories = []
                for memory, decay, share in ((last[0][b, h], fast_decay, 0.10), (last[1][b, h], slow_decay, 0.05)):
                    kept = memory * decay[b, h, at].mean() * (1 - share * psi)
                    read = kept / (norm(kept) + 1e-8)
                    corrected = u - w @ read
                    answers = [queries[i] @ read + sum(queries[i] @ keys[j] * corrected[j] for j in range(i + 1)) for i in range(len(tokens))]
                    memories.append((kept + keys.T @ corrected, answers))
                for i, t in enumerate(tokens):
                    alpha = 0.5 + 0.3 * phi[i]
                    o[b, h, t] = alpha * fast_gate[b, h, t] * memories[0][1][i] + (1 - alpha) * slow_gate[b, h, t] * memories[1][1][i]
                fast, slow = memories[0][0], memories[1][0]
                mixed = fast + coupling * psi * slow, slow + coupling * (1 - psi) * fast
                for memory, new in zip(last, mixed, strict=True):
                    memory[b, h] = new / (norm(new) + 1e-8)
    return o, last
