"""The one door to cython_ext: its kernels as JAX operations on a CPU, by XLA's foreign function interface, with gradients.

The environment variable GROUNDWAVE_KERNELS, read at every call (under `jax.jit`: when the call is traced), says what runs, as in torch:

    auto        the kernel where it can, else the JAX form: on any platform but the CPU, for dtypes other than float32 and float64 or mixed
                ones, for N above 256, or, with a warning, when the extension is not built. The default
    compiled    the kernel, or a RuntimeError that says why it cannot; on another platform XLA refuses the program
    torch       the framework's own form, here JAX's: recurrent for the selective scan, chunked for WKV and the delta rule

Which platform a program is for is decided when it is lowered, not by where its operands happen to be. Gradients are first-order and in
reverse: differentiating them again raises NotImplementedError, `jax.jvp` JAX's TypeError. `jax.vmap` calls the kernel once per mapped row.
Letters: B batch, L length, N state, H heads, P or d head width.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import cython_ext
from cython_ext.checks import MAX_STATE
from jax_impl.ops import delta_rule as delta_form
from jax_impl.ops import selective_scan as scan_form
from jax_impl.ops import wkv as wkv_form

MODES = ("auto", "compiled", "torch")
DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
Arrays = tuple[Array | None, ...]

_before: dict[str, int] = {}  # what the counts were at the last reset


def kernel_calls(name: str | None = None) -> int:
    """How many kernels have come to their end in this process since the last reset; `name` counts one, "selective_scan_backward" say.

    JAX computes behind the caller's back: wait for a result (`jax.block_until_ready`) before counting.
    """
    if not cython_ext.is_built("xla_ffi"):
        return 0
    counts = {key: count - _before.get(key, 0) for key, count in cython_ext.kernel("xla_ffi").kernel_calls().items()}
    return sum(counts.values()) if name is None else counts[name]


def reset_kernel_calls() -> None:
    """Start counting from zero."""
    if cython_ext.is_built("xla_ffi"):
        _before.update(cython_ext.kernel("xla_ffi").kernel_calls())


def selective_scan(
    update: Array, dt_a: Array, dt_b: Array | None, transition: Array, weight: Array, bias: Array,
    initial_state: Array | None = None, *, eps: float = 1e-5,
) -> tuple[Array, Array]:
    """The normalised recurrence of `jax_impl.ops.selective_scan`, by the compiled kernel where GROUNDWAVE_KERNELS allows it.

    update (B, L, N); dt_a (B, L); dt_b (B, L) or None for 1; transition (N, N); weight, bias (N,) of the LayerNorm;
    initial_state (B, N) or None for zeros. Returns the states of all tokens (B, L, N) and the last one (B, N).
    Raises ValueError for a wrong shape, an empty axis or an unknown GROUNDWAVE_KERNELS; RuntimeError when it says "compiled" and the kernel
    cannot run.
    """
    B, L, N = _leading("update", update, "B, L, N")
    shapes = {"dt_a": (B, L), "dt_b": (B, L), "transition": (N, N), "weight": (N,), "bias": (N,), "initial_state": (B, N)}
    arguments = (update, dt_a, dt_b, transition, weight, bias, initial_state)
    _shapes(arguments[1:], shapes, {"dt_a": "B, L", "dt_b": "B, L", "transition": "N, N", "initial_state": "B, N"})
    limit = f"needs N of at most {MAX_STATE}, found {N}" if N > MAX_STATE else None
    runs = _runs_compiled("selective_scan", arguments, limit)
    if not runs:
        return scan_form.selective_scan(*arguments, eps=eps)
    states = _scan(runs, float(eps), arguments)
    return states, states[:, -1]


def wkv(
    r: Array, k: Array, v: Array, w: Array, u: Array, initial_state: Array | None = None, *,
    time_first: str = "bonus", chunk_size: int = 32,
) -> tuple[Array, Array]:
    """The memory of `jax_impl.ops.wkv`, by the compiled kernel where GROUNDWAVE_KERNELS allows it.

    r, k, v (B, L, H, P); decay w and u (H, P); initial_state (B, H, P, P) or None for zeros; chunk_size of the JAX form alone, the kernel
    cuts L by itself. Returns y (B, L, H, P) and the last state (B, H, P, P).
    Raises ValueError for a wrong shape, an empty axis, an unknown `time_first` or GROUNDWAVE_KERNELS, or a `chunk_size` below 1; RuntimeError
    when GROUNDWAVE_KERNELS says "compiled" and the kernel cannot run.
    """
    B, _, H, P = _leading("r", r, "B, L, H, P")
    arguments = (r, k, v, w, u, initial_state)
    shapes = {"k": r.shape, "v": r.shape, "w": (H, P), "u": (H, P), "initial_state": (B, H, P, P)}
    _shapes(arguments[1:], shapes, {"k": "B, L, H, P", "v": "B, L, H, P", "w": "H, P", "u": "H, P", "initial_state": "B, H, P, P"})
    if time_first not in wkv_form.TIME_FIRSTS:
        raise ValueError(f"time_first must be 'bonus' or 'gain', found {time_first!r}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, found {chunk_size}")
    runs = _runs_compiled("wkv", arguments, None)
    if not runs:
        return wkv_form.wkv(*arguments, time_first=time_first, impl="chunked", chunk_size=chunk_size)
    return _memory(runs, time_first, chunk_size, arguments)


def delta_rule(
    q: Array, k: Array, v: Array, beta: Array, initial_state: Array | None = None, *, chunk_size: int = 64, transform: str = "exact",
) -> tuple[Array, Array]:
    """The plain rule of `jax_impl.ops.delta_rule`, by the compiled kernel where GROUNDWAVE_KERNELS allows it.

    q, k, v (B, H, L, d); beta (B, H, L); initial_state (B, H, d, d) or None for zeros. Returns o (B, H, L, d) and the last state.
    `chunk_size` is the JAX form's: the kernel is the recurrence whatever the chunk, and has its own. Raises ValueError for a wrong
    shape, an empty axis, a `chunk_size` below 1, an unknown transform or GROUNDWAVE_KERNELS; RuntimeError when it says "compiled" and the
    kernel cannot run, as where the transform is not "exact".
    """
    B, H, L, d = _leading("q", q, "B, H, L, d")
    arguments = (q, k, v, beta, initial_state)
    shapes = {"k": q.shape, "v": q.shape, "beta": (B, H, L), "initial_state": (B, H, d, d)}
    _shapes(arguments[1:], shapes, {"k": "B, H, L, d", "v": "B, H, L, d", "beta": "B, H, L", "initial_state": "B, H, d, d"})
    delta_form._check(chunk_size, transform, "chunked")
    limit = None if transform == "exact" else f"has transform 'exact' alone, found {transform!r}"
    runs = _runs_compiled("delta_rule", arguments, limit)
    if not runs:
        return delta_form.delta_rule(*arguments, chunk_size=chunk_size, transform=transform)
    return _rule(runs, chunk_size, arguments)


def _leading(name: str, array: Array, letters: str) -> tuple[int, ...]:
    if array.ndim != letters.count(",") + 1 or 0 in array.shape:
        raise ValueError(f"{name} must have shape ({letters}) with no axis empty, found {tuple(array.shape)}")
    return array.shape


def _shapes(arrays: Arrays, shapes: dict[str, tuple[int, ...]], letters: dict[str, str]) -> None:
    for (name, shape), array in zip(shapes.items(), arrays, strict=True):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} must have shape ({letters.get(name, 'N')}) = {tuple(shape)}, found {tuple(array.shape)}")


def _runs_compiled(kernel: str, arrays: Arrays, limit: str | None) -> str | None:
    """The mode, "auto" or "compiled", in which the compiled `kernel` is to run on these arrays; None where the JAX form is to run.

    `limit` says what else keeps it from it. Raises ValueError for an unknown mode, RuntimeError when "compiled" cannot.
    """
    mode = os.environ.get("GROUNDWAVE_KERNELS") or "auto"
    if mode not in MODES:
        raise ValueError(f"GROUNDWAVE_KERNELS must be one of {', '.join(MODES)}, found {mode!r}")
    if mode == "torch":
        return None
    dtypes = sorted({str(array.dtype) for array in arrays if array is not None})
    problem = limit
    if len(dtypes) > 1 or arrays[0].dtype not in DTYPES:
        problem = f"needs arrays all float32 or all float64, found {' and '.join(dtypes)}"
    elif problem is None:
        problem = _unregistered()
        if problem is not None and mode == "auto":
            warnings.warn(f"the compiled kernels for JAX {problem}; the slower JAX form runs instead", RuntimeWarning, stacklevel=3)
    if problem is not None and mode == "compiled":
        raise RuntimeError(f"GROUNDWAVE_KERNELS=compiled, but the kernel {kernel} {problem}")
    return mode if problem is None else None


@cache
def _unregistered() -> str | None:
    """What keeps XLA from calling the kernels; None once they are registered with it."""
    if not cython_ext.is_built("xla_ffi"):
        return "is not built: run `pip install -e .` in the root of the repository"
    try:
        for name, handler in cython_ext.kernel("xla_ffi").handlers().items():
            jax.ffi.register_ffi_target(f"groundwave_{name}", handler, platform="cpu")
    except Exception as error:  # XLA refuses what it no longer speaks by errors of its own kinds
        return f"cannot be registered with XLA: {error}"
    return None


def _call(kernel: str, operands: Sequence[Array], shapes: Sequence[tuple[int, ...]], **attributes: float) -> list[Array]:
    """The custom call of `kernel`, whose results have `shapes` and the dtype of the operands."""
    results = [jax.ShapeDtypeStruct(shape, operands[0].dtype) for shape in shapes]
    numbers = {name: np.float64(value) if name == "eps" else np.int64(value) for name, value in attributes.items()}
    return jax.ffi.ffi_call(f"groundwave_{kernel}", results, vmap_method="sequential")(*operands, **numbers)


def _by_platform(mode: str, kernel: Callable[..., Any], form: Callable[..., Any], *operands: Any) -> Any:
    """`kernel` in a program for the CPU; in one for another platform `form`, or the kernel too, for XLA to refuse, in mode "compiled"."""
    return kernel(*operands) if mode == "compiled" else jax.lax.platform_dependent(*operands, cpu=kernel, default=form)


def _gradients(form: Callable[..., Any], arrays: Arrays, cotangents: Any) -> Arrays:
    return jax.vjp(form, arrays)[1](cotangents)[0]


def _once(name: str, backward: Callable[..., Arrays], *operands: Any) -> Arrays:
    """`backward(*operands)`, whose own gradient is refused by name."""
    def refuse(*_: Any) -> None:
        raise NotImplementedError(
            f"the compiled {name} has no second-order gradients; the JAX form has: impl=\"recurrent\" or GROUNDWAVE_KERNELS=torch")

    once = jax.custom_vjp(lambda operands: backward(*operands))
    once.defvjp(lambda operands: (backward(*operands), None), refuse)
    return once(operands)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(mode: str, eps: float, arrays: Arrays) -> Array:
    def kernel(arrays: Arrays) -> Array:
        return _call("selective_scan", _scan_operands(arrays), [arrays[0].shape], eps=eps, scaled=arrays[2] is not None)[0]

    return _by_platform(mode, kernel, lambda arrays: scan_form.selective_scan(*arrays, eps=eps)[0], arrays)


def _scan_operands(arrays: Arrays) -> list[Array]:
    update, dt_a, dt_b, *shared, state = arrays
    return [update, dt_a, dt_a if dt_b is None else dt_b, *shared, jnp.zeros_like(update[:, 0]) if state is None else state]


def _scan_forward(mode: str, eps: float, arrays: Arrays) -> tuple[Array, Any]:
    states = _scan(mode, eps, arrays)
    return states, (arrays, states)


def _scan_backward(mode: str, eps: float, saved: Any, grad_states: Array) -> tuple[Arrays]:
    def kernel(grad_states: Array, arrays: Arrays, states: Array) -> Arrays:
        operands = _scan_operands(arrays)
        shapes = [operand.shape for operand in operands]
        found = _call("selective_scan_backward", [grad_states, *operands, states], shapes, eps=eps, scaled=arrays[2] is not None)
        return _present(found, arrays)

    def form(grad_states: Array, arrays: Arrays, states: Array) -> Arrays:
        return _gradients(lambda arrays: scan_form.selective_scan(*arrays, eps=eps)[0], arrays, grad_states)

    return (_once("selective_scan", partial(_by_platform, mode, kernel, form), grad_states, *saved),)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _memory(mode: str, time_first: str, chunk_size: int, arrays: Arrays) -> tuple[Array, Array]:
    def kernel(arrays: Arrays) -> tuple[Array, Array]:
        (batch, _, heads, p), fresh = arrays[0].shape, arrays[5] is None
        shapes = [arrays[0].shape, (batch, heads, p, p)]
        return tuple(_call("wkv", _memory_operands(arrays), shapes, fresh=fresh, gain=time_first == "gain"))

    return _by_platform(mode, kernel, _memory_form(time_first, chunk_size), arrays)


def _memory_form(time_first: str, chunk_size: int) -> Callable[[Arrays], tuple[Array, Array]]:
    return lambda arrays: wkv_form.wkv(*arrays, time_first=time_first, impl="chunked", chunk_size=chunk_size)


def _memory_operands(arrays: Arrays) -> list[Array]:
    return [*arrays[:5], arrays[4] if arrays[5] is None else arrays[5]]  # what stands for an absent state is not read


def _memory_forward(mode: str, time_first: str, chunk_size: int, arrays: Arrays) -> tuple[tuple[Array, Array], Arrays]:
    return _memory(mode, time_first, chunk_size, arrays), arrays


def _memory_backward(mode: str, time_first: str, chunk_size: int, arrays: Arrays, cotangents: tuple[Array, Array]) -> tuple[Arrays]:
    def kernel(cotangents: tuple[Array, Array], arrays: Arrays) -> Arrays:
        shapes = [*(array.shape for array in arrays[:5]), cotangents[1].shape]
        operands = [*cotangents, *_memory_operands(arrays)]
        return _present(_call("wkv_backward", operands, shapes, fresh=arrays[5] is None, gain=time_first == "gain"), arrays)

    def form(cotangents: tuple[Array, Array], arrays: Arrays) -> Arrays:
        return _gradients(_memory_form(time_first, chunk_size), arrays, cotangents)

    return (_once("wkv", partial(_by_platform, mode, kernel, form), cotangents, arrays),)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rule(mode: str, chunk_size: int, arrays: Arrays) -> tuple[Array, Array]:
    def kernel(arrays: Arrays) -> tuple[Array, Array]:
        operands = _rule_operands(arrays)
        return tuple(_call("delta_rule", operands, [operands[0].shape, operands[4].shape]))

    return _by_platform(mode, kernel, lambda arrays: delta_form.delta_rule(*arrays, chunk_size=chunk_size), arrays)


def _rule_operands(arrays: Arrays) -> list[Array]:
    q, state = arrays[0], arrays[4]
    return [*arrays[:4], jnp.zeros((*q.shape[:2], q.shape[3], q.shape[3]), q.dtype) if state is None else state]


def _rule_forward(mode: str, chunk_size: int, arrays: Arrays) -> tuple[tuple[Array, Array], Arrays]:
    return _rule(mode, chunk_size, arrays), arrays


def _rule_backward(mode: str, chunk_size: int, arrays: Arrays, cotangents: tuple[Array, Array]) -> tuple[Arrays]:
    def kernel(cotangents: tuple[Array, Array], arrays: Arrays) -> Arrays:
        operands = _rule_operands(arrays)
        return _present(_call("delta_rule_backward", [*cotangents, *operands], [operand.shape for operand in operands]), arrays)

    def form(cotangents: tuple[Array, Array], arrays: Arrays) -> Arrays:
        return _gradients(lambda arrays: delta_form.delta_rule(*arrays, chunk_size=chunk_size), arrays, cotangents)

    return (_once("delta_rule", partial(_by_platform, mode, kernel, form), cotangents, arrays),)


def _present(gradients: Sequence[Array], arrays: Arrays) -> Arrays:
    """`gradients` with None where the array is None."""
    return tuple(None if array is None else gradient for array, gradient in zip(arrays, gradients, strict=True))


_scan.defvjp(_scan_forward, _scan_backward)
_memory.defvjp(_memory_forward, _memory_backward)
_rule.defvjp(_rule_forward, _rule_backward)
