"""A mesh of all devices of all JAX processes, with one axis, "data": batches and carried states are divided along it, the rest is everywhere.

Parameters and moments are replicated: these models are small beside what a device holds, and a step then needs one sum of gradients and no
gathering of weights. Under `jit` an array means the whole of it, so the loss, its penalties, the clipping and the rows of the memory bank are
those of the global batch with no line written for it; the compiler puts in the sums. What is not training (validation, monitors, samples)
runs in every process by itself, on its first device, with that device's copy.

Several processes find each other by `jax.distributed.initialize`; on CPUs they talk through gloo. One that lost another has an error from gloo,
or is aborted by a thread of JAX, which also notices one whose threads stand still: `_say_if_aborted`.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from conf.schema import DistributedConfig
from experiments.distributed.group import Group
from experiments.errors import RunError

_HEARTBEAT = 100.0  # seconds; JAX's own default
_LEAST = 4095  # bytes of a message, less one
_PLACE = re.compile(r"\[\S+\.cc:\d+\] ")  # in gloo's sources
_GRACE = 10.0  # seconds that a process has to say what it lost
_LOST = ("gloo", "connection closed", "connection reset", "unavailable", "deadline_exceeded", "heartbeat", "timed out", "aborted", "coordination")


class JaxMesh(Group):
    """Joined by its constructor, which waits for the other processes. Raises RunError where they cannot be found."""

    name = "jax"
    _parts_are = "devices"

    def __init__(self, settings: DistributedConfig) -> None:
        if settings.address is not None:
            _initialise(settings)
        self.rank, self.size, self.parts = jax.process_index(), jax.process_count(), jax.device_count()
        self.mesh = Mesh(np.array(jax.devices()), ("data",))
        self.rows = NamedSharding(self.mesh, PartitionSpec("data"))
        self.everywhere = NamedSharding(self.mesh, PartitionSpec())
        if self.size > 1:
            self._say_if_aborted()

    def describe(self) -> str:
        return f"{self.processes()}, {self.parts} devices, jax"

    def close(self) -> None:
        error = sys.exc_info()[1]
        # JAX's own way out waits for the others, who wait for this process or are gone, and then aborts.
        if self.broken and self.size > 1 and (error is None or isinstance(error, SystemExit)):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(error.code if error is not None and isinstance(error.code, int) else 2)

    def divided(self, tree: Any) -> Any:
        """Whole arrays, the same in every process, divided by rows."""
        return jax.tree.map(lambda leaf: self._put(leaf, self.rows), tree)

    def replicated(self, tree: Any) -> Any:
        """Whole arrays, the same in every process, on every device."""
        return jax.tree.map(lambda leaf: self._put(leaf, self.everywhere), tree)

    def own(self, tree: Any) -> Any:
        """The copies that this process's first device holds of replicated arrays."""
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)

    def whole(self, tree: Any) -> Any:
        """NumPy copies of whole arrays. Every process has to call it for one that is divided among processes."""
        return jax.tree.map(self._whole, tree)

    def _whole(self, leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return np.array(leaf)
        if leaf.is_fully_replicated:
            return np.array(leaf.addressable_data(0))
        return np.array(multihost_utils.process_allgather(leaf, tiled=True))

    @staticmethod
    def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        value = np.asarray(leaf)
        value = value.astype(jax.dtypes.canonicalize_dtype(value.dtype))  # as `jit` does with what it is given
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    def _send(self, message: bytes | None) -> bytes:
        with jax.enable_x64(True):
            size = int(multihost_utils.broadcast_one_to_all(np.int64(0 if message is None else len(message))))
            room = np.zeros(1 << max(size - 1, _LEAST).bit_length(), np.uint8)  # every length is a program of its own
            if message is not None:
                room[:size] = np.frombuffer(message, np.uint8)
            return np.asarray(multihost_utils.broadcast_one_to_all(room)).astype(np.uint8)[:size].tobytes()

    def _lost(self, error: Exception) -> str | None:
        text = _PLACE.sub("", " ".join(str(error).split()))
        return text[:200] if self.size > 1 and any(sign in text.lower() for sign in _LOST) else None

    def _say_if_aborted(self) -> None:
        """Say a line and end with status 2 where JAX aborts this process.

        `signal.signal` would wait for the main thread, which may never again run a line of Python; and the call that JAX offers for a lost
        process dies of its own argument before it is called.
        """
        speaker = "" if self.main else f"process {self.rank}: "
        line = f"groundwave: {speaker}distributed: aborted by JAX, as where another of the {self.size} processes ended or did not answer in time\n"

        @ctypes.CFUNCTYPE(None, ctypes.c_int)
        def handler(_: int) -> None:
            if self.broken:
                time.sleep(_GRACE)  # the main thread knows, is about to say so, and leaves
            else:
                os.write(2, line.encode())
            os._exit(2)

        self._handler = handler  # which C knows by its address alone
        ctypes.CDLL(None).signal(signal.SIGABRT, handler)


def _initialise(settings: DistributedConfig) -> None:
    """Find the other processes: those that the cluster names for "auto", else as configured."""
    named: dict[str, Any] = {}
    if settings.address != "auto":
        host = settings.address.rpartition(":")[0]
        named = {"coordinator_address": settings.address, "num_processes": settings.processes, "process_id": settings.process}
        if host in ("localhost", "127.0.0.1", "[::1]"):
            named["coordinator_bind_address"] = settings.address  # else JAX listens on every interface
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    limit = max(int(settings.timeout), 1)
    try:
        jax.distributed.initialize(
            **named, initialization_timeout=limit, heartbeat_timeout_seconds=max(int(min(settings.timeout, _HEARTBEAT)), 1),
            shutdown_timeout_seconds=limit,
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"distributed: this process cannot join the others at {settings.address}: {reason}") from error
