"""What a run ran on: package versions, processor, threads, commit. Saved with every run and every checkpoint."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from threadpoolctl import threadpool_info

_PACKAGES = ("numpy", "scipy", "torch", "jax", "jaxlib", "flax", "optax", "safetensors", "tokenizers", "hydra-core", "wandb")
# A difference in one of these can change the last bit of a sum.
_EXACT = ("python", "processor", "threads", "numpy", "scipy", "torch", "jax", "jaxlib", "flax", "optax", "group")


def describe() -> dict[str, str]:
    """Flat description of this process; packages that are not installed are left out."""
    found = {"python": platform.python_version(), "system": platform.platform(), "processor": processor(), "threads": str(threads())}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    revision = commit()
    return found | ({"commit": revision} if revision else {})


def differences(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """One line for everything that keeps a resumed run from being bit for bit the same."""
    return [f"{name} was {before.get(name)}, is {now.get(name)}" for name in _EXACT if before.get(name) != now.get(name)]


def processor() -> str:
    """Model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def threads() -> int:
    """Threads that numerical libraries loaded so far use, at most; the number of usable cores where none is loaded."""
    pools = [int(pool["num_threads"]) for pool in threadpool_info()]
    return max(pools) if pools else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str | None:
    """Commit of the source tree, with "+" if it has changes, benchmark results apart; None where there is no repository."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        return _git(root, "rev-parse", "HEAD") + ("+" if _git(root, "status", "--porcelain", "--", ".", ":!experiments/results") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
