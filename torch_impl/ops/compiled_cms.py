"""The memory of WaveCore by its compiled kernels: the part of the door `compiled` that it takes, and what GROUNDWAVE_KERNELS says is said there.

All levels go through one op: a call of an op costs tens of microseconds, as much as a level of a small core. Gradients are first-order. A row that
is not written gives value, key and gate none, not even where they are not finite.
Letters: B batch, an axis that all of the tensors have or none, n slots, d width of the level, d_k width of a key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_impl.ops import cms as torch_form
from torch_impl.ops.compiled import _recorded, _refusal, _run, _runs_compiled, _save_nothing, _shape

Levels = tuple[Tensor, ...]


def read(query: Tensor, memory: Tensor, keys: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`torch_impl.ops.cms.read`, one level of `read_levels`."""
    attention, content = read_levels(query, (memory,), (keys,), None if scale is None else (scale,))
    return attention[0], content[0]


def write(
    memory: Tensor, keys: Tensor, value: Tensor, key: Tensor, gate: Tensor, decay: float, *,
    rule: str, threshold: float, chosen: torch_form.Chosen | None = None,
) -> tuple[Tensor, Tensor]:
    """`torch_impl.ops.cms.write`, one level of `write_levels`."""
    given = None if chosen is None else (chosen,)
    written = write_levels((memory,), (keys,), None, None, (value,), (key,), (gate,), (decay,), rule=rule, threshold=threshold, chosen=given)
    return written[0][0], written[1][0]


def write_lazy(
    memory: Tensor, keys: Tensor, norms: Tensor, scale: Tensor, value: Tensor, key: Tensor, gate: Tensor, decay: float, *,
    rule: str, threshold: float, chosen: torch_form.Chosen | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`torch_impl.ops.cms.write_lazy`, one level of `write_levels`."""
    given = None if chosen is None else (chosen,)
    held = ((memory,), (keys,), (norms,), (scale,))
    written = write_levels(*held, (value,), (key,), (gate,), (decay,), rule=rule, threshold=threshold, chosen=given)
    return written[0][0], written[1][0], written[2][0], written[3][0]


def read_levels(query: Tensor, memories: Levels, keys: Levels, scales: Levels | None = None) -> tuple[Levels, Levels]:
    """Every level of a memory as `torch_impl.ops.cms.read` reads it, by the compiled kernel where GROUNDWAVE_KERNELS allows it.

    query (B, d_k), and per level memory (B, n, d), keys (B, n, d_k), scale () where scales are given. Returns the attention (B, n) and the content
    (B, d) of every level. Raises ValueError for a wrong shape, an empty axis, another number of levels or an unknown GROUNDWAVE_KERNELS;
    RuntimeError when it says "compiled" and the kernel cannot run.
    """
    sizes = _levels(memories, keys=keys, scales=scales)
    for level, (batch, slots, _) in enumerate(sizes):
        _shape("query", query, "B, d_k", *batch, keys[level].shape[-1])
        _shape("keys", keys[level], "B, n, d_k", *batch, slots, query.shape[-1])
        _shape("scale", None if scales is None else scales[level], "")
    held = (*memories, *keys, *(scales or ()))
    if _runs_compiled("cms", [query, *held], None):
        outputs = _read_all(query, list(memories), list(keys), list(scales or ()))
        return tuple(outputs[:len(sizes)]), tuple(outputs[len(sizes):])
    return torch_form.read_levels(query, memories, keys, scales)


def write_levels(
    memories: Levels, keys: Levels, norms: Levels | None, scales: Levels | None, values: Levels, new_keys: Levels, gates: Levels,
    decays: Sequence[float], *, rule: str, threshold: float, chosen: Sequence[torch_form.Chosen] | None = None,
) -> tuple[Levels, ...]:
    """Every level of a memory as `write`, or with norms and scales `write_lazy`, of `torch_impl.ops.cms` leaves it, by the compiled kernel where
    GROUNDWAVE_KERNELS allows it.

    Per level memory (B, n, d), keys (B, n, d_k), norms (B, n) and scale (), value (B, d), key (B, d_k), gate (B, 1), decay in (0, 1), and the chosen
    row (B,) int64 and whether it is written (B,) bool. Returns memories and keys, and norms and scales where they are given, of every level.
    Raises ValueError for a wrong shape, an empty axis, another number of levels, an unknown rule or GROUNDWAVE_KERNELS; RuntimeError when it says
    "compiled" and the kernel cannot run.
    """
    lazy = norms is not None and scales is not None
    sizes = _levels(memories, keys=keys, norms=norms, scales=scales, values=values, new_keys=new_keys, gates=gates, decays=decays, chosen=chosen)
    if rule not in ("slot0", "least_salient"):
        raise ValueError(f"rule must be 'slot0' or 'least_salient', found {rule!r}")
    for level, (batch, slots, width) in enumerate(sizes):
        key_width = keys[level].shape[-1]
        _shape("keys", keys[level], "B, n, d_k", *batch, slots, key_width)
        if lazy:
            _shape("norms", norms[level], "B, n", *batch, slots)
            _shape("scale", scales[level], "")
        _shape("value", values[level], "B, d", *batch, width)
        _shape("key", new_keys[level], "B, d_k", *batch, key_width)
        _shape("gate", gates[level], "B, 1", *batch, 1)
    rows, opens = ([], []) if chosen is None else map(list, zip(*chosen, strict=True))
    held = [list(levels) for levels in ((memories, keys, norms, scales) if lazy else (memories, keys, (), ()))]
    new = [list(levels) for levels in (values, new_keys, gates)]
    if _runs_compiled("cms", [tensor for levels in (*held, *new) for tensor in levels], None, [*rows, *opens]):
        outputs = _write_all(*held, *new, rows, opens, tuple(decays), rule, threshold)
        count = len(sizes)
        kinds = [tuple(outputs[start:start + count]) for start in range(0, len(outputs), count)]
        return (*kinds[:2], *(tuple(part.detach() for part in levels) for levels in kinds[2:]))
    return torch_form.write_levels(memories, keys, norms, scales, values, new_keys, gates, decays, rule=rule, threshold=threshold, chosen=chosen)


def _levels(memories: Levels, **others: Sequence[Any] | None) -> list[tuple[tuple[int, ...], int, int]]:
    """The batch, slots and width of every level. Raises ValueError for an empty axis and for another number of levels in any of `others`."""
    for name, levels in others.items():
        if levels is not None and len(levels) != len(memories):
            raise ValueError(f"{name} must have one entry for each of the {len(memories)} levels, found {len(levels)}")
    for memory in memories:
        if memory.ndim not in (2, 3) or 0 in memory.shape:
            raise ValueError(f"memory must have shape (B, n, d) or (n, d) with no axis empty, found {tuple(memory.shape)}")
    return [(tuple(memory.shape[:-2]), *memory.shape[-2:]) for memory in memories]


def _listed(op: Any, differentiate: Callable[..., Any], save: Callable[..., None]) -> Callable[..., Any]:
    """`compiled._differentiable` for an op that gives a list of tensors and takes some: the autograd.Function has them flat."""

    def nested(counts: tuple[int | None, ...], flat: Sequence[Any]) -> list[Any]:
        parts = iter(flat)
        return [next(parts) if count is None else [next(parts) for _ in range(count)] for count in counts]

    def forward(counts: tuple[int | None, ...], *flat: Any) -> tuple[Tensor, ...]:
        return tuple(op(*nested(counts, flat)))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        save(ctx, nested(*inputs[:1], inputs[1:]), output)

    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        found = differentiate(ctx, gradients)
        return (None, *(part for parts in found for part in (parts if isinstance(parts, list) else [parts])))

    def at(part: Any, axis: Any, i: int) -> Any:
        return part.select(axis, i) if isinstance(part, Tensor) and axis is not None else part

    def vmap(info: Any, in_dims: tuple[int | None, ...], counts: tuple[int | None, ...], *flat: Any) -> tuple[Any, Any]:
        results = [
            call(*nested(counts, [at(a, axis, i) for a, axis in zip(flat, in_dims[1:], strict=True)]))
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])

    def recorded(ctx: Any, counts: tuple[int | None, ...], *flat: Any) -> tuple[Tensor, ...]:
        output = forward(counts, *flat)
        setup_context(ctx, (counts, *flat), output)
        return output

    def made(**members: Callable[..., Any]) -> Any:
        return type("Function", (torch.autograd.Function,), {name: staticmethod(member) for name, member in members.items()})

    transform = made(forward=forward, setup_context=setup_context, backward=backward, vmap=vmap).apply
    record = made(forward=recorded, backward=backward).apply

    def call(*arguments: Any) -> Sequence[Tensor]:
        transformed = torch._C._are_functorch_transforms_active()
        if not transformed and not _recorded():
            return op(*arguments)
        counts = tuple(len(part) if isinstance(part, list) else None for part in arguments)
        flat = (part for parts in arguments for part in (parts if isinstance(parts, list) else [parts]))
        return (transform if transformed else record)(counts, *flat)

    op.register_autograd(differentiate, setup_context=save)
    return call


_READ = "Tensor query, Tensor[] memories, Tensor[] keys, Tensor[] scales"


@torch.library.custom_op("groundwave::cms_read", mutates_args=(), device_types="cpu", schema=f"({_READ}) -> Tensor[]")
def _cms_read(query, memories, keys, scales):
    pairs = [_run("cms", "read", "cms_read", query, *level) for level in zip(memories, keys, scales or [None] * len(keys), strict=True)]
    return [torch.from_numpy(part) for parts in zip(*pairs, strict=True) for part in parts]


@torch.library.custom_op(
    "groundwave::cms_read_backward", mutates_args=(), device_types="cpu", schema=f"(Tensor[] gradients, {_READ}) -> Tensor[]")
def _cms_read_backward(gradients, query, memories, keys, scales):
    count = len(memories)
    levels = zip(gradients[:count], gradients[count:], memories, keys, scales or [None] * count, strict=True)
    found = [
        _run("cms", "read_backward", "cms_read_backward", attention, content, query, *level) for attention, content, *level in levels]
    of_query, *held = ([torch.from_numpy(part) for part in parts if part is not None] for parts in zip(*found, strict=True))
    return [sum(of_query[1:], start=of_query[0]), *(part for parts in held for part in parts)]


@_cms_read.register_fake
def _(query, memories, keys, scales):
    shapes = [memory.shape[:-1] for memory in memories] + [(*query.shape[:-1], memory.shape[-1]) for memory in memories]
    return [query.new_empty(shape) for shape in shapes]


@_cms_read_backward.register_fake
def _(gradients, query, memories, keys, scales):
    return [part.new_empty(part.shape) for part in (query, *memories, *keys, *scales)]


def _save_read(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    query, memories, keys, scales = inputs
    ctx.levels = len(memories)
    ctx.save_for_backward(query, *memories, *keys, *scales)


def _differentiate_read(ctx: Any, gradients: Sequence[Tensor]) -> tuple[Any, ...]:
    query, *held = ctx.saved_tensors
    held = [held[:ctx.levels], held[ctx.levels:2 * ctx.levels], held[2 * ctx.levels:]]
    of_query, *parts = _read_back(list(gradients), query, *held)
    return of_query, parts[:ctx.levels], parts[ctx.levels:2 * ctx.levels], parts[2 * ctx.levels:]


_read_all = _listed(_cms_read, _differentiate_read, _save_read)
_read_back = _listed(_cms_read_backward, _refusal("cms"), _save_nothing)

_WRITE = (
    "Tensor[] memories, Tensor[] keys, Tensor[] norms, Tensor[] scales, Tensor[] values, Tensor[] new_keys, Tensor[] gates, Tensor[] rows, "
    "Tensor[] opens, float[] decays, str rule, float threshold")


def _chosen(rows: list[Tensor], opens: list[Tensor], level: int) -> tuple[Tensor, Tensor] | None:
    return (rows[level], opens[level]) if rows else None


# The kernel writes in place: into copies, for the memory of before is kept for the way back and may be the caller's.
@torch.library.custom_op("groundwave::cms_write", mutates_args=(), device_types="cpu", schema=f"({_WRITE}) -> Tensor[]")
def _cms_write(memories, keys, norms, scales, values, new_keys, gates, rows, opens, decays, rule, threshold):
    kinds = [[tensor.clone(memory_format=torch.contiguous_format) for tensor in levels] for levels in (memories, keys, norms, scales) if levels]
    name = "write_lazy" if norms else "write"
    for level, decay in enumerate(decays):
        held, new = (levels[level] for levels in kinds), (values[level], new_keys[level], gates[level])
        _run("cms", name, f"cms_{name}", *held, *new, decay, rule=rule, threshold=threshold, chosen=_chosen(rows, opens, level))
    return [tensor for levels in kinds for tensor in levels]


@torch.library.custom_op(
    "groundwave::cms_write_backward", mutates_args=(), device_types="cpu", schema=f"(Tensor[] gradients, {_WRITE}) -> Tensor[]")
def _cms_write_backward(gradients, memories, keys, norms, scales, values, new_keys, gates, rows, opens, decays, rule, threshold):
    name, count = "write_lazy_backward" if norms else "write_backward", len(memories)
    kinds = [levels for levels in (gradients[:count], gradients[count:], memories, keys, norms, scales, values, new_keys, gates) if levels]
    found = [
        _run("cms", name, f"cms_{name}", *(levels[level] for levels in kinds), decay, rule=rule, threshold=threshold,
             chosen=_chosen(rows, opens, level))
        for level, decay in enumerate(decays)]
    return [torch.from_numpy(part) for parts in zip(*found, strict=True) for part in parts]


@_cms_write.register_fake
def _(memories, keys, norms, scales, values, new_keys, gates, rows, opens, decays, rule, threshold):
    return [part.new_empty(part.shape) for part in (*memories, *keys, *norms, *scales)]


@_cms_write_backward.register_fake
def _(gradients, memories, keys, norms, scales, values, new_keys, gates, rows, opens, decays, rule, threshold):
    return [part.new_empty(part.shape) for part in (*memories, *keys, *values, *new_keys, *gates)]


def _save_write(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    *kinds, decays, rule, threshold = inputs
    ctx.counts, ctx.options = [len(levels) for levels in kinds], (decays, rule, threshold)
    ctx.save_for_backward(*(tensor for levels in kinds for tensor in levels))


def _differentiate_write(ctx: Any, gradients: Sequence[Tensor]) -> tuple[Any, ...]:
    saved, kinds = iter(ctx.saved_tensors), []
    for count in ctx.counts:
        kinds.append([next(saved) for _ in range(count)])
    levels, lazy, chosen = ctx.counts[0], [None] * ctx.counts[2], [None] * ctx.counts[7]
    found = list(_write_back(list(gradients[:2 * levels]), *kinds, *ctx.options))
    of_memories, of_keys, *of_new = (found[start:start + levels] for start in range(0, 5 * levels, levels))
    return of_memories, of_keys, lazy, lazy, *of_new, chosen, chosen, None, None, None


_write_all = _listed(_cms_write, _differentiate_write, _save_write)
_write_back = _listed(_cms_write_backward, _refusal("cms"), _save_nothing)
