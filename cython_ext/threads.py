"""How many OpenMP threads the kernels may use, one number for all of them, and BLAS kept to one thread. No result depends on either."""

from __future__ import annotations

import ctypes
import operator
import os
import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

from threadpoolctl import LibController, ThreadpoolController

SERIAL_WORK = 262_144  # multiplications, some 30 microseconds of one thread, below which waking others costs more than they save

_chosen = array("q", [0])  # the number that was set, 0 for none, where C can read it
_lock = threading.Lock()
_inside = 0  # callers now within one_blas_thread
_before: list[tuple[LibController, int]] = []
_others: list[LibController] | None = None  # of the BLAS libraries those that blas_threads does not care for; None before the first search


def set_num_threads(count: int | None) -> None:
    """Let every kernel use up to `count` threads; None goes back to the default.

    Raises TypeError for what is not an integer, ValueError for one below 1.
    """
    if count is not None:
        if isinstance(count, bool):
            raise TypeError(f"the number of threads must be an integer of at least 1, or None, found {count!r}")
        try:
            count = operator.index(count)
        except TypeError:
            raise TypeError(f"the number of threads must be an integer of at least 1, or None, found {count!r}") from None
        if count < 1:
            raise ValueError(f"the number of threads must be an integer of at least 1, or None, found {count!r}")
    _chosen[0] = count or 0


def get_num_threads() -> int:
    """What was set; else the first number of OMP_NUM_THREADS, read at every call; else the processors this process may run on."""
    return _chosen[0] or default_num_threads()


def default_num_threads() -> int:
    """What `get_num_threads` says where nothing was set."""
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
    from cython_ext import blas_threads  # compiled, as whoever calls this is; this module must load without it

    others = find_blas()
    blas_threads.begin()
    try:
        with _lock:
            if _inside == 0:
                _before.extend((library, library.num_threads) for library in others if library.num_threads != 1)
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
    finally:
        blas_threads.end()


def find_blas() -> list[LibController]:
    """Hand OpenBLAS, wherever this process has loaded it, to blas_threads, and return the other BLAS libraries.

    Done once, for the search takes milliseconds, when the kernel that asks has loaded its own.
    """
    global _others
    with _lock:
        if _others is None:
            from cython_ext import blas_threads

            others = []
            for library in ThreadpoolController().select(user_api="blas").lib_controllers:
                addresses = _openblas(library)
                if addresses is None:
                    others.append(library)
                else:
                    blas_threads.add(*addresses)
            _others = others
    return _others


def _openblas(library: LibController) -> tuple[int, int] | None:
    """The addresses of the functions that get and set the threads of an OpenBLAS with threads of its own; None for another library."""
    if library.internal_api != "openblas" or library.threading_layer == "openmp":
        return None
    for prefix, suffix in product(("", "scipy_"), ("", "64_", "_64")):
        names = [f"{prefix}openblas_{verb}_num_threads{suffix}" for verb in ("get", "set")]
        if all(hasattr(library.dynlib, name) for name in names):
            get, put = (ctypes.cast(getattr(library.dynlib, name), ctypes.c_void_p).value for name in names)
            return get, put
    return None
