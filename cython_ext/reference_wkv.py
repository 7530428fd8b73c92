"""The part of `reference` that is the twin of `cython_ext.wkv`. Letters: B batch, L length, H heads, P head width."""

from __future__ import annotations

import numpy as np
from numpy import ndarray

from cython_ext.checks_wkv import wkv_arguments, wkv_step_arguments


def _first_state(initial_state: ndarray | None, r: ndarray) -> ndarray:
    batch, _, heads, p = r.shape
    return np.zeros((batch, heads, p, p), r.dtype) if initial_state is None else initial_state.copy()


def _token(r: ndarray, k: ndarray, v: ndarray, w: ndarray, u: ndarray, state: ndarray, gain: bool) -> tuple[ndarray, ndarray]:
    """y (B, H, P) and the state (B, H, P, P) after one token."""
    write = k[..., None] * v[..., None, :]
    if gain:
        read = state = w[..., None] * state + u[..., None] * write
    else:
        read, state = state + u[..., None] * write, w[..., None] * state + write
    return (r[..., None, :] @ read)[..., 0, :], state


class wkv:
    """Twin of `cython_ext.wkv`; the equations stand there. One token after another at any length."""

    @staticmethod
    def forward(r, k, v, w, u, initial_state=None, time_first="bonus"):
        """Read and write the memory along L.

        r, k, v (B, L, H, P); decay w, of any sign and size, and u (H, P); initial_state (B, H, P, P), key index first, or None for zeros;
        time_first "bonus" or "gain". All float32 or all float64; arrays that are read-only or not contiguous are accepted, the latter copied.
        Returns y (B, L, H, P) and the last state (B, H, P, P), new arrays.
        Raises TypeError for another type or dtype, ValueError for another shape, an empty axis or an unknown time_first, by name.
        """
        (r, k, v, w, u, initial_state), gain = wkv_arguments(r, k, v, w, u, initial_state, time_first)
        state = _first_state(initial_state, r)
        y = np.empty_like(r)
        for t in range(r.shape[1]):
            y[:, t], state = _token(r[:, t], k[:, t], v[:, t], w, u, state, gain)
        return y, state

    @staticmethod
    def backward(grad_y, grad_state, r, k, v, w, u, initial_state=None, time_first="bonus"):
        """The gradients of every array argument of `forward`, given those of y and of the last state that it returned.

        grad_y (B, L, H, P); grad_state (B, H, P, P) or None for zeros; the rest as `forward` took it. Returns a tuple in the order
        (r, k, v, w, u, initial_state), each of the argument's shape and dtype; None where initial_state was None. Sums over B are taken in
        float64, and so is what chunks add to the gradient of u. Raises as `forward` does.
        """
        arrays, gain = wkv_arguments(r, k, v, w, u, initial_state, time_first, grad_y=grad_y, grad_state=grad_state)
        r, k, v, w, u, initial_state, grad_y, grad_state = arrays
        states = [_first_state(initial_state, r)]
        for t in range(r.shape[1]):
            states.append(_token(r[:, t], k[:, t], v[:, t], w, u, states[t], gain)[1])
        carry = np.zeros_like(states[0]) if grad_state is None else grad_state
        grad_r, grad_k, grad_v, grad_w, grad_u = np.empty_like(r), np.empty_like(r), np.empty_like(r), np.zeros(w.shape), np.zeros(w.shape)
        for t in reversed(range(r.shape[1])):
            read, write, value, grad = r[:, t], k[:, t], v[:, t], grad_y[:, t]
            match = (grad * value).sum(axis=-1, keepdims=True)
            if gain:
                carry = carry + read[..., None] * grad[..., None, :]
                grad_r[:, t] = (states[t + 1] @ grad[..., None])[..., 0]
                grad_write = (carry @ value[..., None])[..., 0]
                grad_k[:, t], grad_v[:, t] = u * grad_write, ((u * write)[..., None, :] @ carry)[..., 0, :]
                grad_u += (grad_write * write).sum(axis=0, dtype=np.float64)
            else:
                own = (read * u * write).sum(axis=-1, keepdims=True)
                grad_r[:, t] = (states[t] @ grad[..., None])[..., 0] + match * u * write
                grad_k[:, t] = (carry @ value[..., None])[..., 0] + match * u * read
                grad_v[:, t] = (write[..., None, :] @ carry)[..., 0, :] + own * grad
                grad_u += (match * read * write).sum(axis=0, dtype=np.float64)
            grad_w += (carry * states[t]).sum(axis=(0, 3), dtype=np.float64)
            carry = w[..., None] * carry
            if not gain:
                carry = carry + read[..., None] * grad[..., None, :]
        grad_w, grad_u = grad_w.astype(r.dtype), grad_u.astype(r.dtype)
        return grad_r, grad_k, grad_v, grad_w, grad_u, None if initial_state is None else carry

    @staticmethod
    def step(r, k, v, w, u, state, time_first="bonus", out=None):
        """One token; the state is overwritten with the one after it.

        r, k, v (B, H, P); w, u (H, P); state (B, H, P, P), contiguous and writeable; time_first "bonus" or "gain"; out (B, H, P) for the result,
        contiguous and writeable, or None for a new array. Returns y (B, H, P). Allocates no array when `out` is given and the rest is contiguous.
        Raises TypeError for another type or dtype, ValueError for another shape, an empty axis, an unknown time_first, or a state or out that
        cannot be written in place, by name.
        """
        (r, k, v, w, u, state, out), gain = wkv_step_arguments(r, k, v, w, u, state, time_first, out)
        y, state[:] = _token(r, k, v, w, u, state, gain)
        if out is None:
            return y
        out[:] = y
        return out
