"""Training beyond one process: DDP and FSDP2 in torch (`torch_group`), a mesh of devices in JAX (`jax_mesh`).

A process is in one group from its first distributed run to its end: the frameworks can be joined only once.
"""

from __future__ import annotations

import os

from conf.schema import TrainConfig
from experiments.distributed.group import ALONE, Group
from experiments.errors import EchoError, RunError

__all__ = ["ALONE", "Group", "close", "join", "said"]

_RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
_joined: list[Group] = []


def join(config: TrainConfig) -> Group:
    """The group of the configuration, waiting for the other processes at the first call. Raises RunError if it cannot be joined."""
    settings = config.distributed
    if settings.name == "none":
        return ALONE
    if _joined:
        (group,) = _joined
        if group.name != settings.name:
            raise RunError(f"distributed.name: this process is in a group of {group.name!r} already and cannot join one of {settings.name!r}")
        return group
    try:
        if settings.name == "jax":
            from experiments.distributed.jax_mesh import JaxMesh as Joined
        else:
            from experiments.distributed.torch_group import TorchGroup as Joined
    except ImportError as error:
        raise RunError(f"distributed: {error}") from error
    _joined.append(Joined(settings))
    return _joined[0]


def close() -> None:
    """Leave the group, if this process is in one."""
    while _joined:
        _joined.pop().close()


def said(error: BaseException) -> str | None:
    """What this process says of an error; None for what process 0 says. Before a group is joined all go wrong alike."""
    if isinstance(error, EchoError) or not (_joined or all(os.environ.get(name, "0") == "0" for name in _RANKS)):
        return None
    return str(error) if not _joined or _joined[0].main else f"process {_joined[0].rank}: {error}"
