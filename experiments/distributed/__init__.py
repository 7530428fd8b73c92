"""Training beyond one process: DDP and FSDP2 in torch (`torch_group`), a mesh of devices in JAX (`jax_mesh`).

A process is in one group from its first distributed run to its end: the frameworks can be joined only once.
"""

from __future__ import annotations

import os
import time

from conf.schema import TrainConfig
from experiments.distributed.group import ALONE, Group
from experiments.errors import EchoError, RunError

__all__ = ["ALONE", "Group", "close", "join", "said", "second_word"]

_RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
_STRANGERS = {  # what torchrun tells its processes is not for these
    "none": "add distributed=ddp or distributed=fsdp2",
    "jax": "start each without torchrun, with distributed.address=HOST:PORT distributed.processes={count} and distributed.process=0, 1, ...",
}
_PATIENCE = 30.0  # seconds
_joined: list[Group] = []


def join(config: TrainConfig) -> Group:
    """The group of the configuration, waiting for the other processes at the first call. Raises RunError if it cannot be joined."""
    settings = config.distributed
    if settings.name in _STRANGERS and (count := _by_torchrun()) > 1:
        raise RunError(
            f"distributed.name={settings.name!r}: torchrun started {count} processes, and each would train alone; "
            + _STRANGERS[settings.name].format(count=count)
        )
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


def alone(command: str) -> None:
    """Raise RunError where torchrun started several processes of a command that is for one."""
    if (count := _by_torchrun()) > 1:
        raise RunError(f"{command} runs in one process: torchrun started {count}, and each would do all of it; start it without torchrun")


def close() -> None:
    """Leave the group, if this process is in one."""
    while _joined:
        _joined.pop().close()


def said(error: BaseException) -> str | None:
    """What this process says of an error; None for what process 0 says. Before a group is joined all go wrong alike."""
    if isinstance(error, EchoError) or not (_joined or all(os.environ.get(name, "0") == "0" for name in _RANKS)):
        return None
    if not _joined or _joined[0].main:
        return str(error)
    return None if isinstance(error, KeyboardInterrupt) else f"process {_joined[0].rank}: {error}"


def second_word(error: BaseException) -> str | None:
    """What a process says after all that left the word to process 0; None for nothing.

    torchrun ends all processes when one has ended, process 0 perhaps before it said what went wrong and closed what it has open. So the
    others wait to be ended; if that does not happen and no group was joined, process 0 had nothing to say.
    """
    if isinstance(error, KeyboardInterrupt) or not _by_torchrun() or os.environ["RANK"] == "0":
        return None
    time.sleep(_PATIENCE)
    return None if isinstance(error, EchoError) or _joined else f"process {os.environ['RANK']}: {error}"


def _by_torchrun() -> int:
    """The processes that torchrun started, 0 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 0
