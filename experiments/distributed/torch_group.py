"""Processes of torch that train one model: DDP keeps all of it in each, FSDP2 a share of every parameter, its gradient and its moments.

    rows of process r   the r-th part of every micro-batch, so that a micro-batch is the one that a single process would take
    loss                means over all rows: sums, norms and counts are averaged over the processes before anything is squared or divided;
                        backwards each process has the gradient of its own rows, and the wrapper averages them
    memory bank         the rows that one process would write: every process puts in those of its own tokens, zeros elsewhere, and the sum
                        is exact and the same everywhere

Everything runs on the CPU, as the models of the torch backends do, so the processes talk through gloo. Letters: B rows of a micro-batch in one
process, L length, D width, R rows written to the bank.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from conf.schema import DistributedConfig
from experiments.distributed.group import Group
from experiments.errors import RunError
from torch_impl.ops import memory_bank

# Whether buffers are sent before every forward pass: newer releases of torch have another name for it.
_SYNCED = next(name for name in ("forward_sync_buffers", "broadcast_buffers") if name in inspect.signature(DistributedDataParallel).parameters)
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LOST = ("connection closed by peer", "connection reset", "broken pipe", "timed out", "timeout", "gloo", "connection refused")


class TorchGroup(Group):
    """Joined by its constructor, which waits for the other processes. Raises RunError where they cannot be found."""

    def __init__(self, settings: DistributedConfig) -> None:
        self.name = settings.name
        needed = _LAUNCHED if settings.address is None else _LAUNCHED[:2] if settings.process is None else ()
        missing = [name for name in needed if name not in os.environ]
        if missing:
            raise RunError(
                f"distributed.name={settings.name!r}: the environment lacks {', '.join(missing)}; start with "
                f"torchrun --nproc-per-node=2 -m experiments.train distributed={settings.name}"
            )
        process, processes = (
            (settings.process, settings.processes) if settings.process is not None else (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        )
        try:
            dist.init_process_group(
                "gloo", init_method=settings.address or "env://", timeout=timedelta(seconds=settings.timeout), rank=process, world_size=processes
            )
        except (RuntimeError, ValueError) as error:
            raise RunError(f"distributed: process {process} of {processes} cannot join the others: {_first_line(error)}") from error
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.parts = self.size
        self._wrapped: dict[bool, DistributedDataParallel] = {}  # each with a reducer of its own, which does nothing unless its forward was called
        self._mesh: DeviceMesh | None = init_device_mesh("cpu", (self.size,)) if self.name == "fsdp2" else None

    def describe(self) -> str:
        return f"{self.processes()}, {self.name}"

    def close(self) -> None:
        if dist.is_initialized():
            # Never deleted: torch deletes a group while it holds the GIL and waits for a thread that may be waiting for the GIL.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))
            dist.destroy_process_group()

    def lanes(self, batch_size: int, accumulation: int, rank: int | None = None) -> np.ndarray:
        """The rows (B,) of a global batch that this process takes, or another; by micro-batch, as `experiments.steps.base` divides them."""
        rank = self.rank if rank is None else rank
        return np.concatenate([np.array_split(rows, self.size)[rank] for rows in np.array_split(np.arange(batch_size), accumulation)])

    def shard(self, module: nn.Module) -> None:
        """With FSDP2, let every process hold its share of each block of `module`, and of what is not in a block."""
        if self._mesh is not None:
            # States are views, and nobody writes into them.
            warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
            for block in module.blocks:
                fully_shard(block, mesh=self._mesh)
            fully_shard(module, mesh=self._mesh)

    def trained(self, module: nn.Module) -> nn.Module:
        """What to call for a forward pass that is trained on."""
        if self._mesh is not None:
            return module
        unused = _bank_is_empty(module)  # DDP looks for parameters without a gradient only if told to, and complains if there are none
        held = self._wrapped.get(unused)
        if held is None or held.module is not module:  # of a job of the sweep before
            held = self._wrapped[unused] = DistributedDataParallel(module, find_unused_parameters=unused, **{_SYNCED: False})
        return held

    def reducing(self, trained: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Around the passes of a micro-batch: gradients are averaged over the processes at the last one of a step."""
        if self._mesh is None:
            return nullcontext() if last else trained.no_sync()
        trained.set_requires_gradient_sync(last)
        return nullcontext()

    def means(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The mean over the processes of each scalar, with the gradient of this process's own; to the last bit the same everywhere.

        Whole numbers come back in the dtype of the first one.
        """
        found = _Mean.apply(torch.stack([value.double() for value in values]), self.size)
        return [mean.to(value.dtype if value.is_floating_point() else values[0].dtype) for mean, value in zip(found, values, strict=True)]

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes of a tensor that has no gradient."""
        total = value.clone()
        dist.all_reduce(total)
        return total / self.size

    def every(self, flag: bool) -> bool:
        """Whether `flag` holds in every process."""
        least = torch.tensor(int(flag))
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return bool(least)

    def whole(self, rows: np.ndarray, accumulation: int) -> np.ndarray:
        """The rows (B, ...) of all processes in the order of the global batch, `accumulation` micro-batches of it."""
        mine = torch.from_numpy(np.ascontiguousarray(rows))
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        order = np.concatenate([self.lanes(len(rows) * self.size, accumulation, rank) for rank in range(self.size)])
        return torch.cat(parts).numpy()[np.argsort(order)]

    def full(self, tensor: Tensor) -> Tensor:
        """All of a tensor that may be sharded. Every process has to call it."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def placed(self, value: Tensor, like: Tensor) -> Tensor:
        """A whole tensor, the same in every process, as `like` holds its own."""
        return distribute_tensor(value.to(like.dtype), like.device_mesh, like.placements) if isinstance(like, DTensor) else value.to(like.dtype)

    @contextmanager
    def bank_rows(self, module: Any) -> Iterator[Callable[[], list[tuple[Tensor, Tensor]]]]:
        """Around a forward pass: a function that gives the rows (R, D) of keys and values which one process would take of the whole micro-batch."""
        seen: list[dict[str, Tensor]] = [{} for _ in module.blocks]
        hooks = [
            getattr(block.rwkv, name).register_forward_hook(lambda _, __, output, kept=kept, name=name: kept.update({name: output.detach()}))
            for block, kept in zip(module.blocks, seen, strict=True)
            for name in ("key_proj", "value_proj")
        ]
        try:
            yield lambda: self._bank_rows(module, seen)
        finally:
            for hook in hooks:
                hook.remove()

    def _bank_rows(self, module: Any, seen: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        config = module.config
        own = seen[0]["key_proj"].shape[0] * seen[0]["key_proj"].shape[1]
        tokens = own * self.size
        count = min(config.memory_writes, tokens, config.memory_size)
        taken = []
        for block, kept in zip(module.blocks, seen, strict=True):
            positions = memory_bank.row_positions(tokens, count, block.rwkv.writes) - self.rank * own
            mine = (positions >= 0) & (positions < own)
            both = torch.stack([kept["key_proj"].flatten(0, 1), kept["value_proj"].flatten(0, 1)])  # (2, B L, D)
            taken.append(torch.where(mine[:, None], both[:, positions.clamp(0, own - 1)], 0.0))  # (2, R, D)
        together = torch.stack(taken).double()  # which gloo can add, whatever the rows are
        dist.all_reduce(together)
        return [(keys, values) for keys, values in together.to(taken[0].dtype)]

    def _send(self, message: bytes | None) -> bytes:
        size = torch.tensor(0 if message is None else len(message))
        dist.broadcast(size, 0)
        buffer = torch.empty(int(size), dtype=torch.uint8) if message is None else torch.frombuffer(bytearray(message), dtype=torch.uint8)
        dist.broadcast(buffer, 0)
        return buffer.numpy().tobytes()

    def _lost(self, error: Exception) -> str | None:
        text = str(error)
        return _first_line(error) if any(sign in text.lower() for sign in _LOST) else None


def _bank_is_empty(module: Any) -> bool:
    """Whether there is a memory bank that nothing was written to, so that its parameters have no gradient."""
    return bool(getattr(module.config, "memory_size", 0)) and not bool(module.blocks[0].rwkv.memory_count[0] > 0)


class _Mean(torch.autograd.Function):
    """The mean over the processes forwards, nothing backwards: the gradients of the processes are averaged later."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, size: int) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total / size

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _first_line(error: Exception) -> str:
    """The first sentence of an error, without the place in torch's sources."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rpartition("] ")[2].split(". ")[0].rstrip(".")
