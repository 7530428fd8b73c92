"""How many OpenMP threads the kernels may use, one number for all of them, and BLAS kept to one thread. No result depends on either."""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from threadpoolctl import LibController, ThreadpoolController

SERIAL_WORK = 262_144  # multiplications, some 30 microseconds of one thread, below which waking others costs more than they save

_chosen: int | None = None
_lock = threading.Lock()
_inside = 0  # callers now within one_blas_thread
_before: list[tuple[LibController, int]] = []


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


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep every BLAS to one thread, as kernels with threads of their own need it; the last caller to leave restores what was before."""
    global _inside
    with _lock:
        if _inside == 0:
            _before.extend((library, library.num_threads) for library in _blas() if library.num_threads != 1)
            for library, _ in _before:
                library.set_num_threads(1)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                for library, count in _before:
                    library.set_num_threads(count)
                _before.clear()


@cache
def _blas() -> list[LibController]:
    """The BLAS libraries of this process; found once, for the search takes milliseconds, when the kernel that asks has loaded its own."""
    return ThreadpoolController().select(user_api="blas").lib_controllers
