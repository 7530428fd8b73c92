"""Schema of the section `distributed`: how several processes or devices train one model. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from conf.models import between, choice, whole

# How a model is distributed -> the backends that can.
DISTRIBUTED = {"none": (), "ddp": ("torch", "torch_compiled"), "fsdp2": ("torch", "torch_compiled"), "jax": ("jax",)}


@dataclass(frozen=True)
class DistributedConfig:
    """How a model is distributed and where its processes meet.

    ddp, fsdp2: `address` None takes what torchrun sets; file:///FOLDER/FILE or tcp://HOST:PORT need `processes` and `process`, or RANK and
    WORLD_SIZE in the environment. jax: None is one process with all of its devices; HOST:PORT of process 0 needs `processes` and `process`;
    auto asks the cluster (SLURM, Open MPI, TPU). After `timeout` seconds without an answer a process ends. In JAX the
    processes' own threads answer, so that one which is alive and slow is waited for, and the limit is 100 seconds at most.
    """

    name: str = "none"
    address: str | None = None
    processes: int | None = None
    process: int | None = None
    timeout: float = 1800.0

    def __post_init__(self) -> None:
        choice(self, "name", tuple(DISTRIBUTED))
        between(self, "timeout", 0.0, math.inf)
        if (self.processes is None) != (self.process is None):
            raise ValueError(f"processes and process must be given together, found processes={self.processes} and process={self.process}")
        if self.processes is not None:
            whole(self, processes=1, process=0)
            if self.process >= self.processes:
                raise ValueError(f"process must lie in [0, processes), found process={self.process} and processes={self.processes}")
        if self.name in ("ddp", "fsdp2") and self.address is not None and not self.address.startswith(("file:///", "tcp://")):
            raise ValueError(f"address of {self.name} must be file:///FOLDER/FILE or tcp://HOST:PORT, found {self.address!r}")
        if self.name == "jax" and self.address not in (None, "auto"):
            if not self.address.rpartition(":")[2].isdigit():
                raise ValueError(f"address of jax must be HOST:PORT or auto, found {self.address!r}")
            if self.process is None:
                raise ValueError(f"processes and process must be given with address={self.address!r}")

    def check(self, backend: str, *, permuted: bool, compared: bool) -> None:
        """Raise ValueError for what a distributed run cannot be combined with."""
        if self.name == "none":
            return
        if backend not in DISTRIBUTED[self.name]:
            raise ValueError(f"distributed.name={self.name!r} needs backend.name {' or '.join(map(repr, DISTRIBUTED[self.name]))}, found {backend!r}")
        if permuted:
            raise ValueError(f"data.permute_rows is for one process, found distributed.name={self.name!r}")
        if compared:
            raise ValueError(f"comparison.models are compared in one process, found distributed.name={self.name!r}")
