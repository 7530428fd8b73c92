"""How many OpenMP threads the kernels may use; one number for all of them. No result depends on it."""

from __future__ import annotations

import operator
import os

SERIAL_WORK = 262_144  # multiplications, some 30 microseconds of one thread, below which waking others costs more than they save

_chosen: int | None = None


def set_num_threads(count: int | None) -> None:
    """Let every kernel use up to `count` threads; None goes back to the default.

    Raises TypeError for what is not an integer, ValueError for one below 1.
    """
    global _chosen
    if count is not None:
        if isinstance(count, bool):
            raise TypeError(f"the number of threads must be an integer of at least 1, or None, found {count!r}")
        try:
            count = operator.index(count)
        except TypeError:
            raise TypeError(f"the number of threads must be an integer of at least 1, or None, found {count!r}") from None
        if count < 1:
            raise ValueError(f"the number of threads must be an integer of at least 1, or None, found {count!r}")
    _chosen = count


def get_num_threads() -> int:
    """What was set; else the first number of OMP_NUM_THREADS, read at every call; else the processors this process may run on."""
    if _chosen is not None:
        return _chosen
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if first.isdecimal() and int(first) >= 1:
        return int(first)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_for(rows: int, work: int) -> int:
    """Threads for `rows` independent rows of `work` multiplications in all."""
    return 1 if work < SERIAL_WORK else min(get_num_threads(), rows)
