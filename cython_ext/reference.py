"""Every function of the compiled modules again, in plain NumPy: what the kernels are proved against, and what runs without a compiler.

One class per compiled module, of the module's name and never instantiated: three modules have a `forward`, and the classes let each
keep its own name, so that `reference.selective_scan.forward` stands wherever `cython_ext.selective_scan.forward` does. Names, signatures,
docstrings and errors are those of the kernels. Letters: B batch, L length, N state; of the delta rule H heads, d head width, C chunk.
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray
from scipy.linalg import solve_triangular

from cython_ext.checks import hierarchical_arguments, plain_arguments, scan_arguments
from cython_ext.reference_dense import dense  # noqa: F401  (as `reference.dense`)
from cython_ext.reference_wavecore import cms, wave  # noqa: F401
from cython_ext.reference_wkv import wkv  # noqa: F401  (as `reference.wkv`)


def _standardise(h: ndarray, a: ndarray, b: ndarray, u: ndarray, transition: ndarray, eps: float) -> tuple[ndarray, ndarray, ndarray]:
    """One token: the normalised pre-activation (B, N), 1 / its standard deviation (B, 1), and h @ transition.T (B, N)."""
    mixed = h @ transition.T
    pre = h + a[:, None] * mixed + b[:, None] * u
    pre = pre - pre.mean(axis=1, keepdims=True)
    scale = 1 / np.sqrt((pre * pre).mean(axis=1, keepdims=True) + u.dtype.type(eps))
    return pre * scale, scale, mixed


class selective_scan:
    """Twin of `cython_ext.selective_scan`; the equation stands there."""

    @staticmethod
    def forward(update, dt_a, dt_b, transition, weight, bias, initial_state=None, eps=1e-5):
        """The state after every token of the normalised selective scan.

        update (B, L, N); dt_a (B, L); dt_b (B, L) or None for 1; transition (N, N); weight, bias (N,) of the LayerNorm;
        initial_state (B, N) or None for zeros; eps added to the variance. All float32 or all float64, N at most 256; arrays that are
        read-only or not contiguous are accepted, the latter copied. Returns the states (B, L, N), a new array.
        Raises TypeError for another type or dtype, ValueError for another shape, an empty axis or an eps that is not positive, by name.
        """
        arrays, eps = scan_arguments(update, dt_a, dt_b, transition, weight, bias, initial_state, eps)
        update, dt_a, dt_b, transition, weight, bias, initial_state = arrays
        dt_b = np.ones_like(dt_a) if dt_b is None else dt_b
        h = np.zeros_like(update[:, 0]) if initial_state is None else initial_state
        states = np.empty_like(update)
        for t in range(update.shape[1]):
            unit, _, _ = _standardise(h, dt_a[:, t], dt_b[:, t], update[:, t], transition, eps)
            h = states[:, t] = unit * weight + bias
        return states

    @staticmethod
    def backward(grad_states, update, dt_a, dt_b, transition, weight, bias, initial_state, states, eps):
        """The gradients of every array argument of `forward`, given the gradient of the states that it returned.

        grad_states, states (B, L, N), the latter as `forward` returned it; the rest as `forward` took it. Returns a tuple in the order
        (update, dt_a, dt_b, transition, weight, bias, initial_state), each of the argument's shape and dtype; None where the argument
        was None. Sums over B and L are taken in float64. Raises as `forward` does.
        """
        arrays, eps = scan_arguments(
            update, dt_a, dt_b, transition, weight, bias, initial_state, eps, grad_states=grad_states, states=states)
        update, dt_a, dt_b, transition, weight, bias, initial_state, grad_states, states = arrays
        scale_b = np.ones_like(dt_a) if dt_b is None else dt_b
        start = np.zeros_like(update[:, 0]) if initial_state is None else initial_state
        grad_update, grad_dt_a, grad_dt_b = np.empty_like(update), np.empty_like(dt_a), np.empty_like(dt_a)
        grad_transition, grad_weight, grad_bias = (np.zeros(array.shape) for array in (transition, weight, bias))
        carry = np.zeros_like(start)
        for t in reversed(range(update.shape[1])):
            h = states[:, t - 1] if t else start
            unit, scale, mixed = _standardise(h, dt_a[:, t], scale_b[:, t], update[:, t], transition, eps)
            grad = grad_states[:, t] + carry
            grad_bias += grad.sum(axis=0, dtype=np.float64)
            grad_weight += (grad * unit).sum(axis=0, dtype=np.float64)
            pull = grad * weight
            pull = (pull - pull.mean(axis=1, keepdims=True) - unit * (pull * unit).mean(axis=1, keepdims=True)) * scale
            grad_update[:, t] = scale_b[:, t, None] * pull
            grad_dt_a[:, t] = (pull * mixed).sum(axis=1)
            grad_dt_b[:, t] = (pull * update[:, t]).sum(axis=1)
            scaled = dt_a[:, t, None] * pull
            grad_transition += scaled.T.astype(np.float64) @ h
            carry = pull + scaled @ transition
        shared = [total.astype(update.dtype) for total in (grad_transition, grad_weight, grad_bias)]
        return (grad_update, grad_dt_a, None if dt_b is None else grad_dt_b, *shared, None if initial_state is None else carry)


def _unit(x: ndarray) -> ndarray:
    return x / np.maximum(np.sqrt((x * x).sum(axis=-1, keepdims=True)), x.dtype.type(1e-12))


def _normalised(state: ndarray) -> ndarray:
    return state / (np.sqrt((state * state).sum()) + state.dtype.type(1e-8))


def _flux(x: ndarray, mlp: list[ndarray]) -> ndarray:
    """clamp(sigmoid(MLP(x)), 0.01, 0.99) of x (i,) or (n, i): () or (n,)."""
    w0, b0, w2, b2 = mlp
    with np.errstate(over="ignore"):  # exp(-x) may be infinite, and 1 / (1 + inf) is the 0 that it should be
        hidden = x @ w0.T + b0
        hidden = hidden / (1 + np.exp(-hidden))
        return np.clip(1 / (1 + np.exp(-(hidden @ w2[0] + b2[0]))), 0.01, 0.99).astype(x.dtype)


def _transformed(k: ndarray, k_b: ndarray, v: ndarray, transform: str) -> tuple[ndarray, ndarray]:
    """U and W (C, d) of one chunk of one head."""
    identity = np.eye(len(k), dtype=k.dtype)
    n = -np.tril(k_b @ k.T, -1)
    if transform == "exact":
        u, w = (solve_triangular(identity - n, x, lower=True, unit_diagonal=True, check_finite=False) for x in (v, k_b))
        return u, w
    t = identity + n + np.tril(n @ n.T, -1)
    return t @ v, t @ k_b


def _recalled(state: ndarray, x: ndarray) -> ndarray:
    """S^T x of states (..., d, d) and vectors (..., d)."""
    return (x[..., None, :] @ state)[..., 0, :]


def _outer(x: ndarray, y: ndarray) -> ndarray:
    return x[..., :, None] * y[..., None, :]


class delta_rule:
    """Twin of `cython_ext.delta_rule`; the equations stand there, those of the plain rule in `plain_delta.pyx`."""

    @staticmethod
    def forward(q, k, v, beta, initial_state=None):
        """The plain delta rule: S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T, o_t = S_t^T q_t.

        q, k, v (B, H, L, d), taken as they are; beta (B, H, L); initial_state (B, H, d, d), key index first, or None for zeros. All float32 or
        all float64; arrays that are read-only or not contiguous are accepted, the latter copied. Returns o (B, H, L, d) and the last state
        (B, H, d, d), new arrays.
        Raises TypeError for another type or dtype, ValueError for another shape or an empty axis, by name.
        """
        (q, k, v, beta), initial_state = plain_arguments(q, k, v, beta, initial_state)
        state = np.zeros((*q.shape[:2], q.shape[3], q.shape[3]), q.dtype) if initial_state is None else initial_state.copy()
        o = np.empty_like(q)
        for t in range(q.shape[2]):
            error = v[:, :, t] - _recalled(state, k[:, :, t])
            state += _outer(k[:, :, t], beta[:, :, t, None] * error)
            o[:, :, t] = _recalled(state, q[:, :, t])
        return o, state

    @staticmethod
    def backward(grad_o, grad_state, q, k, v, beta, initial_state=None):
        """The gradients of every array argument of `forward`, given those of the outputs and of the last state that it returned.

        grad_o (B, H, L, d), grad_state (B, H, d, d); the rest as `forward` took it. What it computed on the way is computed again. Returns a
        tuple in the order (q, k, v, beta, initial_state), each of the argument's shape and dtype; None where the argument was None. Raises as
        `forward` does.
        """
        arrays, initial_state = plain_arguments(q, k, v, beta, initial_state, grad_o=grad_o, grad_state=grad_state)
        q, k, v, beta, grad_o, grad_state = arrays
        state = np.zeros_like(grad_state) if initial_state is None else initial_state
        states, errors = [state], []
        for t in range(q.shape[2]):
            errors.append(v[:, :, t] - _recalled(state, k[:, :, t]))
            state = state + _outer(k[:, :, t], beta[:, :, t, None] * errors[t])
            states.append(state)
        grad_q, grad_k, grad_v, grad_beta, carry = np.empty_like(q), np.empty_like(k), np.empty_like(v), np.empty_like(beta), grad_state.copy()
        for t in reversed(range(q.shape[2])):
            grad_q[:, :, t] = (states[t + 1] @ grad_o[:, :, t, :, None])[..., 0]
            carry += _outer(q[:, :, t], grad_o[:, :, t])
            pull = _recalled(carry, k[:, :, t])
            grad_beta[:, :, t] = (pull * errors[t]).sum(axis=-1)
            grad_v[:, :, t] = beta[:, :, t, None] * pull
            written = beta[:, :, t, None] * errors[t]
            grad_k[:, :, t] = (carry @ written[..., None] - states[t] @ grad_v[:, :, t, :, None])[..., 0]
            carry -= _outer(k[:, :, t], grad_v[:, :, t])
        return grad_q, grad_k, grad_v, grad_beta, None if initial_state is None else carry

    @staticmethod
    def hierarchical_forward(
        q, k, v, beta, fast_decay, slow_decay, fast_gate, slow_gate, token_mlp, chunk_mlp, bilinear, temp, mask=None, initial_state=None,
        chunk_size=64, transform="lam",
    ):
        """The hierarchical delta rule: a fast and a slow memory, decayed, read, written, mixed and normalised once per chunk.

        q, k, v (B, H, L, d), not yet normalised; beta, decays and gates (B, H, L) in (0, 1); token_mlp: weights (m, 2d), (m,), (1, m), (1,);
        chunk_mlp the same with 2d + 1 inputs; bilinear (H, d, d); temp (H,); mask (B, L), true for valid tokens, padding on the right, or None;
        initial_state (S_fast, S_slow), each (B, H, d, d), or None for zeros; chunk_size tokens in a chunk; transform "lam" or "exact".
        All float32 or all float64, the mask bool; arrays that are read-only or not contiguous are accepted, the latter copied.
        Returns o (B, H, L, d), zero at padded positions, and the last states (S_fast, S_slow), all new arrays.
        Raises TypeError for another type or dtype, ValueError for another shape, an empty axis, a mask with a hole or an empty row, a
        chunk_size below 1 or an unknown transform, by name.
        """
        named = {
            "q": q, "k": k, "v": v, "beta": beta, "fast_decay": fast_decay, "slow_decay": slow_decay, "fast_gate": fast_gate,
            "slow_gate": slow_gate,
        }
        arrays, token_mlp, chunk_mlp, bilinear, temp, lengths, initial_state, size = hierarchical_arguments(
            named, token_mlp, chunk_mlp, bilinear, temp, mask, initial_state, chunk_size, transform)
        heads, dtype = range(q.shape[1]), q.dtype.type
        o = np.zeros(q.shape, q.dtype)
        if initial_state is None:
            fast, slow = np.zeros((2, *q.shape[:2], q.shape[3], q.shape[3]), q.dtype)
        else:
            fast, slow = (state.copy() for state in initial_state)
        for b, length in enumerate(lengths):
            for start in range(0, length, size):
                chunk = slice(start, min(start + size, length))
                inside = []
                for h in heads:
                    q, k, v, beta, fast_decay, slow_decay, fast_gate, slow_gate = (x[b, h, chunk] for x in arrays)
                    q, k = _unit(q), _unit(k)
                    v, k_b = beta[:, None] * v, beta[:, None] * k
                    alpha = dtype(0.5) + dtype(0.3) * _flux(np.concatenate([k_b, v], axis=1), token_mlp)[:, None]
                    u, w = _transformed(k, k_b, v, transform)
                    s = ((k @ bilinear[h]) * u).sum(axis=1) / temp[h]
                    psi = _flux(np.concatenate([k.mean(axis=0), u.mean(axis=0), s.mean(keepdims=True)]), chunk_mlp)
                    inside.append((q, k, u, w, alpha, psi, fast_decay.mean(), slow_decay.mean(), fast_gate[:, None], slow_gate[:, None]))
                mix = dtype(0.05) + dtype(0.1) * np.mean([part[5] for part in inside], dtype=dtype)
                for h, (q, k, u, w, alpha, psi, fast_decay, slow_decay, fast_gate, slow_gate) in enumerate(inside):
                    s_fast, s_slow = fast_decay * (1 - dtype(0.10) * psi) * fast[b, h], slow_decay * (1 - dtype(0.05) * psi) * slow[b, h]
                    r_fast, r_slow = _normalised(s_fast), _normalised(s_slow)
                    u_fast, u_slow = u - w @ r_fast, u - w @ r_slow
                    scores = np.tril(q @ k.T)
                    o[b, h, chunk] = alpha * fast_gate * (q @ r_fast + scores @ u_fast) + (1 - alpha) * slow_gate * (q @ r_slow + scores @ u_slow)
                    s_fast, s_slow = s_fast + k.T @ u_fast, s_slow + k.T @ u_slow
                    fast[b, h] = _normalised(s_fast + mix * psi * s_slow)
                    slow[b, h] = _normalised(s_slow + mix * (1 - psi) * s_fast)
        return o, (fast, slow)
