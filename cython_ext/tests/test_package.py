"""The package without its compiled modules, and the number of threads, BLAS's too."""

from __future__ import annotations

import importlib.machinery
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import scipy.linalg.blas  # noqa: F401  (a BLAS to set the threads of)
from threadpoolctl import ThreadpoolController

import cython_ext
from cython_ext.threads import SERIAL_WORK, one_blas_thread, threads_for

PACKAGE = Path(cython_ext.__file__).parent

# An editable installation finds the modules that a copy of the package lacks, so its finder goes first.
ASK = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if not getattr(finder, "__module__", "").startswith("__editable__")]
import cython_ext
from cython_ext import reference, sampling, get_num_threads
print(cython_ext.__file__)
print(cython_ext.is_built("selective_scan"))
try:
    from cython_ext import selective_scan
except ImportError as error:
    print("ImportError:", error)
try:
    cython_ext.no_such_kernel
except AttributeError as error:
    print("AttributeError:", error)
"""


def ask(folder, *, compiled=None):
    """What a fresh interpreter prints that sees only the Python files of the package, and `compiled` as its extension module."""
    package = folder / "cython_ext"
    package.mkdir()
    for source in PACKAGE.glob("*.py"):
        shutil.copy(source, package)
    if compiled is not None:
        (package / f"selective_scan{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(compiled)
    done = subprocess.run([sys.executable, "-c", ASK], cwd=folder, capture_output=True, text=True, check=True, timeout=60)
    lines = done.stdout.splitlines()
    assert lines[0] == str(package / "__init__.py")
    return lines[1:]


def test_without_the_extension_the_package_imports_and_says_what_to_do(tmp_path):
    built, refused, unknown = ask(tmp_path)
    assert built == "False"
    for words in ("ImportError: the compiled kernel cython_ext.selective_scan is not built", "pip install -e .", "gcc", "python3-dev",
                  "cython_ext.reference"):
        assert words in refused
    assert unknown == "AttributeError: module 'cython_ext' has no attribute 'no_such_kernel'"


def test_a_broken_extension_is_not_taken_for_an_absent_one(tmp_path):
    built, refused, _ = ask(tmp_path, compiled=b"not a shared library")
    assert built == "True"
    assert "cython_ext.selective_scan is built but does not load" in refused


def test_a_missing_openmp_library_is_named(monkeypatch):
    def failing(name):
        raise ImportError("libgomp.so.1: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(cython_ext.importlib, "import_module", failing)
    with pytest.raises(ImportError, match=r"cython_ext\.dense is built but does not load \(libgomp.*apt-get install libgomp1"):
        cython_ext.kernel("dense")


def test_an_unknown_kernel_is_refused():
    for function in (cython_ext.kernel, cython_ext.is_built):
        with pytest.raises(ValueError, match=r"kernel must be one of 'selective_scan', 'delta_rule', .*found 'scan'"):
            function("scan")


@pytest.fixture
def threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cython_ext.set_num_threads(None)
    yield monkeypatch
    cython_ext.set_num_threads(None)


@pytest.mark.parametrize(("value", "expected"), [("3", 3), ("5,2", 5), (" 7 ", 7)])
def test_the_default_comes_from_the_environment_at_the_call(threads, value, expected):
    threads.setenv("OMP_NUM_THREADS", value)
    assert cython_ext.get_num_threads() == expected
    cython_ext.set_num_threads(2)
    assert cython_ext.get_num_threads() == 2
    cython_ext.set_num_threads(None)
    assert cython_ext.get_num_threads() == expected


@pytest.mark.parametrize("value", [None, "", "0", "-1", "many"])
def test_without_a_usable_default_every_processor_is_used(threads, value):
    if value is not None:
        threads.setenv("OMP_NUM_THREADS", value)
    threads.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5, 7, 9}, raising=False)
    assert cython_ext.get_num_threads() == 5


@pytest.mark.parametrize(("count", "error"), [(0, ValueError), (-2, ValueError), (1.5, TypeError), ("2", TypeError), (True, TypeError)])
def test_impossible_counts_are_refused_and_change_nothing(threads, count, error):
    cython_ext.set_num_threads(3)
    with pytest.raises(error, match="integer of at least 1"):
        cython_ext.set_num_threads(count)
    assert cython_ext.get_num_threads() == 3


def test_small_work_and_single_rows_wake_no_threads(threads):
    cython_ext.set_num_threads(4)
    assert threads_for(9, SERIAL_WORK - 1) == 1
    assert threads_for(1, SERIAL_WORK) == 1
    assert threads_for(3, SERIAL_WORK) == 3
    assert threads_for(9, SERIAL_WORK) == 4


@pytest.fixture
def blas():
    """The threads of every BLAS, as a function, when each has two: the way back from one must be seen on a machine of one core too."""
    controller = ThreadpoolController().select(user_api="blas")
    with controller.limit(limits=2):
        yield lambda: {library["num_threads"] for library in controller.info()}


def test_blas_keeps_to_one_thread_and_gets_its_own_back(blas):
    assert blas() == {2}
    with one_blas_thread():
        assert blas() == {1}
        with one_blas_thread():
            assert blas() == {1}
        assert blas() == {1}
    assert blas() == {2}
    with pytest.raises(KeyError), one_blas_thread():
        raise KeyError
    assert blas() == {2}


def test_blas_keeps_to_one_thread_for_every_caller_whoever_came_first(blas):
    """threadpoolctl lets the first thread that sets OpenBLAS's number keep that right as long as it lives."""
    with one_blas_thread():
        assert blas() == {1}
    found = []

    def other():
        with one_blas_thread():
            found.append(blas())
        found.append(blas())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found == [{1}, {2}]


def test_the_last_of_overlapping_callers_restores_the_threads_of_blas(blas):
    first, second = one_blas_thread(), one_blas_thread()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert blas() == {1}
    second.__exit__(None, None, None)
    assert blas() == {2}
