"""The precision policy of a run: set, restored afterwards, and part of every report."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata

PACKAGES = ("numpy", "torch", "jax", "jaxlib", "flax", "optax", "safetensors")


@dataclass(frozen=True)
class Policy:
    """Precision and determinism of both sides. `matmul` is JAX's name of a matrix-product precision.

    `threads` is torch's: one by default, which is fastest on layers of test size and keeps the order of sums; None keeps torch's own.
    """

    matmul: str = "highest"
    tf32: bool = False
    threads: int | None = 1

    def __post_init__(self) -> None:
        if self.matmul not in ("highest", "high", "default"):
            raise ValueError(f"matmul precision must be 'highest', 'high' or 'default', found {self.matmul!r}")
        if self.threads is not None and (isinstance(self.threads, bool) or not isinstance(self.threads, int) or self.threads < 1):
            raise ValueError(f"threads must be a whole number of at least 1, found {self.threads!r}")


@contextlib.contextmanager
def applied(policy: Policy, kinds: Iterable[str]) -> Iterator[None]:
    """Hold the policy in the frameworks named in `kinds` ("torch", "nnx", "linen"), and put back what was there before."""
    with contextlib.ExitStack() as stack:
        if "torch" in kinds:
            from .adapters import torch_adapter

            stack.enter_context(torch_adapter.precision(policy))
        if {"nnx", "linen"} & set(kinds):
            from .adapters import jax_shared

            stack.enter_context(jax_shared.precision(policy))
        yield


def described(policy: Policy, kinds: Iterable[str], jit: bool) -> dict:
    """The policy with the versions, the machine and the threads it ran on: plain values for a report."""
    record = {**asdict(policy), "jit": bool(jit), "x64": "by context, never global", "python": platform.python_version(),
              "platform": platform.platform(), "cpus": os.cpu_count() or 0, "frameworks": sorted(kinds)}
    if "torch" in kinds and "torch" in sys.modules:
        from .adapters import torch_adapter

        record["threads"] = torch_adapter.threads()
    if {"nnx", "linen"} & set(kinds):
        from .adapters import jax_shared

        record["device"] = jax_shared.device()
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    record["versions"] = versions
    record["environment"] = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "XLA_FLAGS") if name in os.environ}
    return record
