"""Every function of the compiled modules again, in plain NumPy: what the kernels are proved against, and what runs without a compiler.

One class per compiled module, of the module's name and never instantiated: three modules have a `forward`, and the classes let each
keep its own name, so that `reference.selective_scan.forward` stands wherever `cython_ext.selective_scan.forward` does. Names, signatures,
docstrings and errors are those of the kernels. Letters: B batch, L length, N state.
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray

from cython_ext.checks import scan_arguments


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
