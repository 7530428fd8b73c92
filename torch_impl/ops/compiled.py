"""The one door to cython_ext: its kernels as torch custom ops, with autograd, on tensors that share their memory with NumPy.

The environment variable GROUNDWAVE_KERNELS, read at every call (under torch.compile: when the call is traced), says what runs:

    auto        the kernel where it can, else the torch form: on any device but the CPU, for dtypes other than float32 and float64 or
                mixed ones, for N above 256, or, with a warning, when the extension is not built. The default
    compiled    the kernel, or a RuntimeError that says why it cannot
    torch       the torch form: chunked for the delta rule and WKV (`compiled_wkv`), recurrent for the rest (`compiled_cms`, `compiled_wave`)

Gradients are first-order: differentiating them again raises NotImplementedError. The hierarchical delta rule is forward only: where a
gradient is wanted or a transform of torch.func is at work, it counts among the kernels that cannot; so does the plain one where the
transform is not "exact".
Letters: B batch, L length, N state; of the delta rule H heads, d head width, m hidden width of a flux.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import cython_ext
from cython_ext.checks import MAX_STATE
from torch_impl.ops import delta_rule as delta_torch_form
from torch_impl.ops import selective_scan as torch_form

MODES = ("auto", "compiled", "torch")
DTYPES = (torch.float32, torch.float64)
MLP = tuple[Tensor, Tensor, Tensor, Tensor]
Pair = tuple[Tensor, Tensor]

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
    limit = f"needs N of at most {MAX_STATE}, found {N}" if N > MAX_STATE else None
    if _runs_compiled("selective_scan", [tensor for tensor in arguments if tensor is not None], limit):
        states = _scan(*arguments, eps)
        return states, states[:, -1].clone()
    return torch_form.selective_scan(*arguments, eps=eps, impl="recurrent")


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, initial_state: Tensor | None = None, *, chunk_size: int = 64, transform: str = "exact",
) -> tuple[Tensor, Tensor]:
    """The plain rule of `torch_impl.ops.delta_rule`, by the compiled kernel where GROUNDWAVE_KERNELS allows it.

    q, k, v (B, H, L, d); beta (B, H, L); initial_state (B, H, d, d) or None for zeros. Returns o (B, H, L, d) and the last state.
    `chunk_size` is the torch form's: the kernel is the recurrence whatever the chunk, and has its own. Raises ValueError for a wrong
    shape, an empty axis, a `chunk_size` below 1, an unknown transform or GROUNDWAVE_KERNELS; RuntimeError when it says "compiled" and the
    kernel cannot run.
    """
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"q must have shape (B, H, L, d) with no axis empty, found {tuple(q.shape)}")
    B, H, L, d = q.shape
    _shape("k", k, "B, H, L, d", B, H, L, d)
    _shape("v", v, "B, H, L, d", B, H, L, d)
    _shape("beta", beta, "B, H, L", B, H, L)
    _shape("initial_state", initial_state, "B, H, d, d", B, H, d, d)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, found {chunk_size}")
    arguments = (q, k, v, beta, initial_state)
    limit = None if transform == "exact" else f"has transform 'exact' alone, found {transform!r}"
    if _runs_compiled("delta_rule", [tensor for tensor in arguments if tensor is not None], limit):
        return _delta(*arguments)
    return delta_torch_form.delta_rule(*arguments, chunk_size=chunk_size, transform=transform, impl="chunked")


def hierarchical_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, fast_decay: Tensor, slow_decay: Tensor, fast_gate: Tensor, slow_gate: Tensor,
    token_mlp: MLP, chunk_mlp: MLP, bilinear: Tensor, temp: Tensor, mask: Tensor | None = None, initial_state: Pair | None = None, *,
    chunk_size: int = 64, transform: str = "lam",
) -> tuple[Tensor, Pair]:
    """The rule of `torch_impl.ops.delta_rule`, forward only, by the compiled kernel where GROUNDWAVE_KERNELS allows it.

    q, k, v (B, H, L, d), not yet normalised; beta, decays and gates (B, H, L) in (0, 1); token_mlp: weights (m, 2d), (m,), (1, m), (1,);
    chunk_mlp the same with 2d + 1 inputs; bilinear (H, d, d); temp (H,); mask (B, L) bool, true for valid tokens, padding on the right;
    initial_state (S_fast, S_slow), each (B, H, d, d). Returns o (B, H, L, d), zero at padded positions, and the last states.
    Raises ValueError and TypeError as the kernel or the torch form does, ValueError for an unknown GROUNDWAVE_KERNELS; RuntimeError
    when it says "compiled" and the kernel cannot run, as where an argument requires a gradient.
    """
    arguments = (q, k, v, beta, fast_decay, slow_decay, fast_gate, slow_gate, token_mlp, chunk_mlp, bilinear, temp)
    states = [] if initial_state is None else list(initial_state)
    tensors = [*arguments[:8], *token_mlp, *chunk_mlp, bilinear, temp, *states]
    limit = None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        limit = "has no gradient and an argument requires one: call it under torch.no_grad(), or the torch form"
    elif torch._C._are_functorch_transforms_active():
        limit = "has no rule for the transforms of torch.func"
    if _runs_compiled("delta_rule", tensors, limit, [] if mask is None else [mask]):
        o, fast, slow = _hierarchical_delta_rule(*arguments, mask, states, chunk_size, transform)
        return o, (fast, slow)
    return delta_torch_form.hierarchical_delta_rule(*arguments, mask, initial_state, chunk_size=chunk_size, transform=transform, impl="chunked")


def _shape(name: str, tensor: Tensor | None, letters: str, *sizes: int) -> None:
    if tensor is not None and tensor.shape != sizes:
        raise ValueError(f"{name} must have shape ({letters}) = {tuple(sizes)}, found {tuple(tensor.shape)}")


def _runs_compiled(kernel: str, tensors: list[Tensor], limit: str | None, masks: Sequence[Tensor] = ()) -> bool:
    """Whether the compiled `kernel` is to run on these tensors and on `masks`, which may have a dtype of their own.

    `limit` says what else keeps it from it. Raises ValueError for an unknown mode, RuntimeError when "compiled" cannot.
    """
    mode = os.environ.get("GROUNDWAVE_KERNELS") or "auto"
    if mode not in MODES:
        raise ValueError(f"GROUNDWAVE_KERNELS must be one of {', '.join(MODES)}, found {mode!r}")
    if mode == "torch":
        return False
    dtype, problem = tensors[0].dtype, None
    if not all(tensor.is_cpu for tensor in tensors) or not all(mask.is_cpu for mask in masks):
        problem = f"needs tensors on the CPU, found {' and '.join(sorted({tensor.device.type for tensor in [*tensors, *masks]}))}"
    elif dtype not in DTYPES or any(tensor.dtype != dtype for tensor in tensors):
        problem = f"needs tensors all float32 or all float64, found {' and '.join(sorted({str(tensor.dtype) for tensor in tensors}))}"
    elif limit is not None:
        problem = limit
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


def _run(module: str, function: str, name: str, *arguments: Any, **options: Any) -> Any:
    """Call `cython_ext.<module>.<function>` on NumPy views of the tensors among the arguments, and count the call under `name`."""
    named = {key: _array(value) for key, value in options.items()}
    result = getattr(cython_ext.kernel(module), function)(*map(_array, arguments), **named)
    with _lock:
        _calls[name] += 1
    return result


def _array(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return (argument.detach() if argument.requires_grad else argument).numpy()
    return tuple(map(_array, argument)) if isinstance(argument, (tuple, list)) else argument


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

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            save(ctx, arguments, output := op(*arguments))
            return output

        backward = staticmethod(differentiate)

    def call(*arguments: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return Function.apply(*arguments)
        return (Recorded.apply if _recorded() else op)(*arguments)

    op.register_autograd(differentiate, setup_context=save)
    op.register_vmap(loop)
    return call


def _recorded() -> bool:
    """Whether autograd records call by call, where an autograd.Function costs half of what an op's own gradient does."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


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


def _refusal(name: str) -> Callable[..., None]:
    def refuse(ctx: Any, *gradients: Tensor) -> None:
        raise NotImplementedError(
            f"the compiled {name} has no second-order gradients; the torch form has: impl=\"recurrent\" or GROUNDWAVE_KERNELS=torch")

    return refuse


_scan = _differentiable(_selective_scan, _differentiate, _save)
_scan_backward = _differentiable(_selective_scan_backward, _refusal("selective_scan"), _save_nothing)


_RULE = "Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? initial_state"


@torch.library.custom_op("groundwave::delta_rule", mutates_args=(), device_types="cpu", schema=f"({_RULE}) -> (Tensor, Tensor)")
def _delta_rule(q, k, v, beta, initial_state):
    return tuple(map(torch.from_numpy, _run("delta_rule", "forward", "delta_rule", q, k, v, beta, initial_state)))


@torch.library.custom_op(
    "groundwave::delta_rule_backward", mutates_args=(), device_types="cpu",
    schema=f"(Tensor grad_o, Tensor grad_state, {_RULE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
def _delta_rule_backward(grad_o, grad_state, q, k, v, beta, initial_state):
    gradients = _run("delta_rule", "backward", "delta_rule_backward", grad_o, grad_state, q, k, v, beta, initial_state)
    return tuple(q.new_empty(0) if gradient is None else torch.from_numpy(gradient) for gradient in gradients)


@_delta_rule.register_fake
def _(q, k, v, beta, initial_state):
    batch, heads, _, d = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, d, d)


@_delta_rule_backward.register_fake
def _(grad_o, grad_state, q, k, v, beta, initial_state):
    return tuple(_like(tensor, q) for tensor in (q, k, v, beta, initial_state))


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_rule(ctx: Any, grad_o: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
    arrays = ctx.saved_tensors
    gradients = _delta_backward(grad_o, grad_state, *arrays)
    return tuple(None if array is None else gradient for array, gradient in zip(arrays, gradients, strict=True))


_delta = _differentiable(_delta_rule, _differentiate_rule, _save_inputs)
_delta_backward = _differentiable(_delta_rule_backward, _refusal("delta_rule"), _save_nothing)


_HIERARCHICAL = (
    "(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor fast_decay, Tensor slow_decay, Tensor fast_gate, Tensor slow_gate, Tensor[] token_mlp, "
    "Tensor[] chunk_mlp, Tensor bilinear, Tensor temp, Tensor? mask, Tensor[] initial_state, int chunk_size, str transform) "
    "-> (Tensor, Tensor, Tensor)")


# An absent initial_state is an empty list: a schema has no optional lists of tensors.
@torch.library.custom_op("groundwave::hierarchical_delta_rule", mutates_args=(), device_types="cpu", schema=_HIERARCHICAL)
def _hierarchical_delta_rule(
    q, k, v, beta, fast_decay, slow_decay, fast_gate, slow_gate, token_mlp, chunk_mlp, bilinear, temp, mask, initial_state, chunk_size, transform
):
    o, states = _run(
        "delta_rule", "hierarchical_forward", "hierarchical_delta_rule", q, k, v, beta, fast_decay, slow_decay, fast_gate, slow_gate,
        token_mlp, chunk_mlp, bilinear, temp, mask, initial_state or None, chunk_size, transform)
    return tuple(map(torch.from_numpy, (o, *states)))


@_hierarchical_delta_rule.register_fake
def _(q, k, v, beta, fast_decay, slow_decay, fast_gate, slow_gate, token_mlp, chunk_mlp, bilinear, temp, mask, initial_state, chunk_size, transform):
    batch, heads, _, d = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, d, d), q.new_empty(batch, heads, d, d)
