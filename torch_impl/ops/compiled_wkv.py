"""The WKV memory by its compiled kernel: the part of the door `compiled` that it takes, and what GROUNDWAVE_KERNELS says is said there.

The torch form that may run instead is the chunked one. Gradients are first-order.
Letters: B batch, L length, H heads, P head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_impl.ops import wkv as torch_form
from torch_impl.ops.compiled import _differentiable, _like, _refusal, _run, _runs_compiled, _save_nothing, _shape


def wkv(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, initial_state: Tensor | None = None, *,
    time_first: str = "bonus", chunk_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """The memory of `torch_impl.ops.wkv`, by the compiled kernel where GROUNDWAVE_KERNELS allows it.

    r, k, v (B, L, H, P); decay w and u (H, P); initial_state (B, H, P, P) or None for zeros; chunk_size of the torch form alone, the kernel
    cuts L by itself. Returns y (B, L, H, P) and the last state (B, H, P, P).
    Raises ValueError for a wrong shape, an empty axis, an unknown `time_first` or GROUNDWAVE_KERNELS; RuntimeError when it says "compiled"
    and the kernel cannot run.
    """
    if r.ndim != 4 or 0 in r.shape:
        raise ValueError(f"r must have shape (B, L, H, P) with no axis empty, found {tuple(r.shape)}")
    B, L, H, P = r.shape
    _shape("k", k, "B, L, H, P", B, L, H, P)
    _shape("v", v, "B, L, H, P", B, L, H, P)
    _shape("w", w, "H, P", H, P)
    _shape("u", u, "H, P", H, P)
    _shape("initial_state", initial_state, "B, H, P, P", B, H, P, P)
    if time_first not in torch_form.TIME_FIRSTS:
        raise ValueError(f"time_first must be 'bonus' or 'gain', found {time_first!r}")
    arguments = (r, k, v, w, u, initial_state)
    if _runs_compiled("wkv", [tensor for tensor in arguments if tensor is not None], None):
        return _read_and_write(*arguments, time_first)
    return torch_form.wkv(*arguments, time_first=time_first, impl="chunked", chunk_size=chunk_size)


_ARRAYS = "Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor? initial_state"


@torch.library.custom_op(
    "groundwave::wkv", mutates_args=(), device_types="cpu", schema=f"({_ARRAYS}, str time_first) -> (Tensor, Tensor)")
def _wkv(r, k, v, w, u, initial_state, time_first):
    return tuple(map(torch.from_numpy, _run("wkv", "forward", "wkv", r, k, v, w, u, initial_state, time_first)))


# An op cannot return None among tensors: the gradient of an absent initial_state is an empty tensor.
@torch.library.custom_op(
    "groundwave::wkv_backward", mutates_args=(), device_types="cpu",
    schema=f"(Tensor grad_y, Tensor grad_state, {_ARRAYS}, str time_first) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
def _wkv_backward(grad_y, grad_state, r, k, v, w, u, initial_state, time_first):
    gradients = _run("wkv", "backward", "wkv_backward", grad_y, grad_state, r, k, v, w, u, initial_state, time_first)
    return tuple(r.new_empty(0) if gradient is None else torch.from_numpy(gradient) for gradient in gradients)


@_wkv.register_fake
def _(r, k, v, w, u, initial_state, time_first):
    batch, _, heads, p = r.shape
    return r.new_empty(r.shape), r.new_empty(batch, heads, p, p)


@_wkv_backward.register_fake
def _(grad_y, grad_state, r, k, v, w, u, initial_state, time_first):
    return tuple(_like(tensor, r) for tensor in (r, k, v, w, u, initial_state))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *arrays, ctx.time_first = inputs
    ctx.save_for_backward(*arrays)


def _differentiate(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _go_back(grad_y, grad_state, *ctx.saved_tensors, ctx.time_first)
    return (*(None if array is None else gradient for array, gradient in zip(ctx.saved_tensors, gradients, strict=True)), None)


_read_and_write = _differentiable(_wkv, _differentiate, _save)
_go_back = _differentiable(_wkv_backward, _refusal("wkv"), _save_nothing)
