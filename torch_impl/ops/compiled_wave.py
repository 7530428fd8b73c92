"""The wave state of WaveCore by its compiled kernels: the part of the door `compiled` that it takes, and what GROUNDWAVE_KERNELS says is said there.

Gradients are first-order. Letters: B batch, or none in a step, L length, I channels, S states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_impl.ops import wave as torch_form
from torch_impl.ops.compiled import _differentiable, _refusal, _run, _runs_compiled, _save_inputs, _save_nothing, _shape


def selective_step(
    u: Tensor, carry: Tensor, dt: Tensor, b: Tensor, c: Tensor, a_raw: Tensor, b_base: Tensor, c_base: Tensor, d: Tensor
) -> tuple[Tensor, Tensor]:
    """The step of `torch_impl.ops.wave`, by the compiled kernel where GROUNDWAVE_KERNELS allows it.

    u, dt, b, c (B, I), carry (B, I, S), a_raw, b_base, c_base (I, S), d (I,). Returns y (B, I) and h (B, I, S). Raises ValueError for a wrong
    shape, an empty axis or an unknown GROUNDWAVE_KERNELS; RuntimeError when it says "compiled" and the kernel cannot run.
    """
    if u.ndim not in (1, 2) or 0 in u.shape:
        raise ValueError(f"u must have shape (B, I) or (I,) with no axis empty, found {tuple(u.shape)}")
    arguments = (u, carry, dt, b, c, a_raw, b_base, c_base, d)
    _check("B, I", *arguments)
    if not _runs_compiled("wave", list(arguments), None):
        return torch_form.selective_step(*arguments)
    if u.ndim == 2:
        return _step(*arguments)
    y, h = _step(*(tensor[None] for tensor in arguments[:5]), *arguments[5:])
    return y[0], h[0]


def selective_scan(
    u: Tensor, carry: Tensor, dt: Tensor, b: Tensor, c: Tensor, a_raw: Tensor, b_base: Tensor, c_base: Tensor, d: Tensor
) -> tuple[Tensor, Tensor]:
    """The scan of `torch_impl.ops.wave`, by the compiled kernel where GROUNDWAVE_KERNELS allows it.

    u, dt, b, c (B, L, I), the rest as in `selective_step`. Returns y (B, L, I) and the last h (B, I, S). Raises as `selective_step` does.
    """
    if u.ndim != 3 or 0 in u.shape:
        raise ValueError(f"u must have shape (B, L, I) with no axis empty, found {tuple(u.shape)}")
    arguments = (u, carry, dt, b, c, a_raw, b_base, c_base, d)
    _check("B, L, I", *arguments)
    return (_scan if _runs_compiled("wave", list(arguments), None) else torch_form.selective_scan)(*arguments)


def _check(
    letters: str, u: Tensor, carry: Tensor, dt: Tensor, b: Tensor, c: Tensor, a_raw: Tensor, b_base: Tensor, c_base: Tensor, d: Tensor
) -> None:
    if a_raw.ndim != 2 or 0 in a_raw.shape:
        raise ValueError(f"a_raw must have shape (I, S) with no axis empty, found {tuple(a_raw.shape)}")
    inner, states = u.shape[-1], a_raw.shape[1]
    for name, tensor in (("dt", dt), ("b", b), ("c", c)):
        _shape(name, tensor, letters, *u.shape)
    for name, tensor in (("a_raw", a_raw), ("b_base", b_base), ("c_base", c_base)):
        _shape(name, tensor, "I, S", inner, states)
    batch = u.shape[:1] if u.ndim > 1 else ()
    _shape("carry", carry, "B, I, S", *batch, inner, states)
    _shape("d", d, "I", inner)


_ARRAYS = "Tensor u, Tensor carry, Tensor dt, Tensor b, Tensor c, Tensor a_raw, Tensor b_base, Tensor c_base, Tensor d"


def _registered(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The kernel `name` of `cython_ext.wave` as an op, with its way back."""

    @torch.library.custom_op(f"groundwave::{name}", mutates_args=(), device_types="cpu", schema=f"({_ARRAYS}) -> (Tensor, Tensor)")
    def forward(u, carry, dt, b, c, a_raw, b_base, c_base, d):
        return tuple(map(torch.from_numpy, _run("wave", name, name, u, carry, dt, b, c, a_raw, b_base, c_base, d)))

    @torch.library.custom_op(
        f"groundwave::{name}_backward", mutates_args=(), device_types="cpu",
        schema=f"(Tensor grad_y, Tensor grad_h, {_ARRAYS}) -> ({', '.join(['Tensor'] * 9)})")
    def backward(grad_y, grad_h, u, carry, dt, b, c, a_raw, b_base, c_base, d):
        arguments = (grad_y, grad_h, u, carry, dt, b, c, a_raw, b_base, c_base, d)
        return tuple(map(torch.from_numpy, _run("wave", f"{name}_backward", f"{name}_backward", *arguments)))

    @forward.register_fake
    def _(u, carry, dt, b, c, a_raw, b_base, c_base, d):
        return u.new_empty(u.shape), carry.new_empty(carry.shape)

    @backward.register_fake
    def _(grad_y, grad_h, *arguments):
        return tuple(part.new_empty(part.shape) for part in arguments)

    go_back = _differentiable(backward, _refusal("wave"), _save_nothing)

    def differentiate(ctx: Any, grad_y: Tensor, grad_h: Tensor) -> tuple[Tensor, ...]:
        return go_back(grad_y, grad_h, *ctx.saved_tensors)

    return _differentiable(forward, differentiate, _save_inputs)


_step, _scan = map(_registered, ("wave_step", "wave_scan"))
