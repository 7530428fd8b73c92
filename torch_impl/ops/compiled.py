"""The one door to cython_ext: its kernels as torch custom ops, with autograd, on tensors that share their memory with NumPy.

The environment variable GROUNDWAVE_KERNELS, read at every call (under torch.compile: when the call is traced), says what runs:

    auto        the kernel where it can, else the recurrent torch form: on any device but the CPU, for dtypes other than float32 and
                float64 or mixed ones, for N above 256, or, with a warning, when the extension is not built. The default
    compiled    the kernel, or a RuntimeError that says why it cannot
    torch       the recurrent torch form

Gradients are first-order: differentiating them again raises NotImplementedError. Letters: B batch, L length, N state.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import cython_ext
from cython_ext.checks import MAX_STATE
from torch_impl.ops import selective_scan as torch_form

MODES = ("auto", "compiled", "torch")
DTYPES = (torch.float32, torch.float64)

_calls: Counter[str] = Counter()
_lock = threading.Lock()  # autograd runs backward kernels in threads of its own


def kernel_calls(name: str | None = None) -> int:
    """How many kernels have run in this process since the last reset; `name` counts one, "selective_scan_backward" say."""
    with _lock:
        return _calls.total() if name is None else _calls[name]


def reset_kernel_calls() -> None:
    """Start counting from zero."""
    with _lock:
        _calls.clear()


def selective_scan(
    update: Tensor, dt_a: Tensor, dt_b: Tensor | None, transition: Tensor, weight: Tensor, bias: Tensor,
    initial_state: Tensor | None = None, *, eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The normalised recurrence of `torch_impl.ops.selective_scan`, by the compiled kernel where GROUNDWAVE_KERNELS allows it.

    update (B, L, N); dt_a (B, L); dt_b (B, L) or None for 1; transition (N, N); weight, bias (N,) of the LayerNorm;
    initial_state (B, N) or None for zeros. Returns the states of all tokens (B, L, N) and the last one (B, N).
    Raises ValueError for a wrong shape, an empty axis or an unknown GROUNDWAVE_KERNELS; RuntimeError when it says "compiled" and
    the kernel cannot run.
    """
    if update.ndim != 3 or 0 in update.shape:
        raise ValueError(f"update must have shape (B, L, N) with no axis empty, found {tuple(update.shape)}")
    B, L, N = update.shape
    _shape("dt_a", dt_a, "B, L", B, L)
    _shape("dt_b", dt_b, "B, L", B, L)
    _shape("transition", transition, "N, N", N, N)
    _shape("weight", weight, "N", N)
    _shape("bias", bias, "N", N)
    _shape("initial_state", initial_state, "B, N", B, N)
    arguments = (update, dt_a, dt_b, transition, weight, bias, initial_state)
    if _runs_compiled("selective_scan", N, [tensor for tensor in arguments if tensor is not None]):
        states = _scan(*arguments, eps)
        return states, states[:, -1].clone()
    return torch_form.selective_scan(*arguments, eps=eps, impl="recurrent")


def _shape(name: str, tensor: Tensor | None, letters: str, *sizes: int) -> None:
    if tensor is not None and tensor.shape != sizes:
        raise ValueError(f"{name} must have shape ({letters}) = {tuple(sizes)}, found {tuple(tensor.shape)}")


def _runs_compiled(kernel: str, state_size: int, tensors: list[Tensor]) -> bool:
    """Whether the compiled `kernel` is to run on these tensors. Raises ValueError for an unknown mode, RuntimeError when "compiled" cannot."""
    mode = os.environ.get("GROUNDWAVE_KERNELS") or "auto"
    if mode not in MODES:
        raise ValueError(f"GROUNDWAVE_KERNELS must be one of {', '.join(MODES)}, found {mode!r}")
    if mode == "torch":
        return False
    devices = sorted({tensor.device.type for tensor in tensors})
    dtypes = sorted({str(tensor.dtype) for tensor in tensors})
    problem = None
    if devices != ["cpu"]:
        problem = f"needs tensors on the CPU, found {' and '.join(devices)}"
    elif len(dtypes) > 1 or tensors[0].dtype not in DTYPES:
        problem = f"needs tensors all float32 or all float64, found {' and '.join(dtypes)}"
    elif state_size > MAX_STATE:
        problem = f"needs N of at most {MAX_STATE}, found {state_size}"
    elif not _is_built(kernel, mode):
        problem = "is not built: run `pip install -e .` in the root of the repository"
    if problem is not None and mode == "compiled":
        raise RuntimeError(f"GROUNDWAVE_KERNELS=compiled, but the kernel {kernel} {problem}")
    return problem is None


@torch.compiler.assume_constant_result
def _is_built(kernel: str, mode: str) -> bool:
    built = cython_ext.is_built(kernel)
    if not built and mode == "auto":
        text = f"cython_ext.{kernel} is not built, the slow torch form runs instead; `pip install -e .` in the root of the repository builds it"
        warnings.warn(text, RuntimeWarning, stacklevel=4)
    return built


def _run(module: str, function: str, name: str, *arguments: Any) -> Any:
    """Call `cython_ext.<module>.<function>` on NumPy views of the tensors among `arguments`, and count the call under `name`."""
    result = getattr(cython_ext.kernel(module), function)(*(a.detach().numpy() if isinstance(a, Tensor) else a for a in arguments))
    with _lock:
        _calls[name] += 1
    return result


def _differentiable(op: Any, differentiate: Callable[..., Any], save: Callable[..., None]) -> Callable[..., Any]:
    """Register the gradient of `op` and a vmap rule that loops over the mapped axis; return what calls `op`, in torch.func too.

    The transforms of torch.func take no gradient through a custom op, only through an autograd.Function.
    """

    def loop(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        results = [
            call(*(a if axis is None else a.select(axis, i) for a, axis in zip(arguments, in_dims, strict=True))) for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])

    class Function(torch.autograd.Function):
        forward, setup_context, backward, vmap = map(staticmethod, (op, save, differentiate, loop))

    def call(*arguments: Any) -> Any:
        return (Function.apply if torch._C._are_functorch_transforms_active() else op)(*arguments)

    op.register_autograd(differentiate, setup_context=save)
    op.register_vmap(loop)
    return call


_ARRAYS = "Tensor update, Tensor dt_a, Tensor? dt_b, Tensor transition, Tensor weight, Tensor bias, Tensor? initial_state"


@torch.library.custom_op("groundwave::selective_scan", mutates_args=(), device_types="cpu", schema=f"({_ARRAYS}, float eps) -> Tensor")
def _selective_scan(update, dt_a, dt_b, transition, weight, bias, initial_state, eps):
    return torch.from_numpy(_run(
        "selective_scan", "forward", "selective_scan", update, dt_a, dt_b, transition, weight, bias, initial_state, eps))


# An op cannot return None among tensors: the gradient of an absent argument is an empty tensor.
@torch.library.custom_op(
    "groundwave::selective_scan_backward", mutates_args=(), device_types="cpu",
    schema=f"(Tensor grad_states, {_ARRAYS}, Tensor states, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
def _selective_scan_backward(grad_states, update, dt_a, dt_b, transition, weight, bias, initial_state, states, eps):
    gradients = _run(
        "selective_scan", "backward", "selective_scan_backward",
        grad_states, update, dt_a, dt_b, transition, weight, bias, initial_state, states, eps)
    return tuple(update.new_empty(0) if gradient is None else torch.from_numpy(gradient) for gradient in gradients)


def _like(tensor: Tensor | None, update: Tensor) -> Tensor:
    return update.new_empty(0 if tensor is None else tensor.shape)


@_selective_scan.register_fake
def _(update, dt_a, dt_b, transition, weight, bias, initial_state, eps):
    return _like(update, update)


@_selective_scan_backward.register_fake
def _(grad_states, update, dt_a, dt_b, transition, weight, bias, initial_state, states, eps):
    return tuple(_like(tensor, update) for tensor in (update, dt_a, dt_b, transition, weight, bias, initial_state))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *arrays, ctx.eps = inputs
    ctx.save_for_backward(*arrays, output)


def _differentiate(ctx: Any, grad_states: Tensor) -> tuple[Tensor | None, ...]:
    *arrays, states = ctx.saved_tensors
    gradients = _scan_backward(grad_states, *arrays, states, ctx.eps)
    return (*(None if array is None else gradient for array, gradient in zip(arrays, gradients, strict=True)), None)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Second-order gradients are refused, so nothing is kept for them."""


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "the compiled selective_scan has no second-order gradients; the torch form has: impl=\"recurrent\" or GROUNDWAVE_KERNELS=torch")


_scan = _differentiable(_selective_scan, _differentiate, _save)
_scan_backward = _differentiable(_selective_scan_backward, _refuse, _save_nothing)
