"""Building the extension: with every check on, and without what a build needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cython_ext
from cython_ext.tests.examples import SHAPES, arguments, cotangent

ROOT = Path(__file__).resolve().parents[2]
SMALL = [shape for shape in SHAPES if shape[1] * shape[2] < 4000]

# Runs the copy of the package found on the path over every small example; an error of a check inside a loop cannot be raised there, only
# be reported, so the hook for reports ends the process.
RUN = """
import os, sys
import numpy as np

def stop(report):
    print("inside a kernel:", repr(report.exc_value), file=sys.stderr, flush=True)
    os._exit(3)

sys.unraisablehook = stop
import cython_ext
given = dict(np.load(sys.argv[1]))
results = {"origin": np.array(cython_ext.selective_scan.__file__)}
for case in sorted({name.split(".")[0] for name in given}):
    arrays = [given.get(f"{case}.{i}") for i in range(8)]
    states = cython_ext.selective_scan.forward(*arrays[1:], 1e-5)
    outputs = [states, *cython_ext.selective_scan.backward(*arrays, states, 1e-5)]
    results.update({f"{case}.{i}": output for i, output in enumerate(outputs) if output is not None})
np.savez(sys.argv[2], **results)
"""


def build(*options, code=None, **environment):
    command = [sys.executable, *(["-c", code] if code else ["setup.py"]), "build_ext", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})


def test_debug_build_trips_no_check_and_gives_the_bits_of_the_release(tmp_path):
    """The debug build has bounds checks and the baseline instructions alone, so equal bits also hold the clones to the baseline."""
    built = build("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"), CYTHON_DEBUG="1")
    assert built.returncode == 0, built.stdout + built.stderr
    for source in Path(cython_ext.__file__).parent.glob("*.py"):
        shutil.copy(source, tmp_path / "lib" / "cython_ext")
    given = {}
    for case, shape in enumerate(SMALL):
        for dtype in ("float32", "float64"):
            arrays = [cotangent(shape, dtype), *arguments(shape, dtype, dt_b=case % 2 == 0, initial_state=case % 3 > 0).values()]
            given.update({f"{case}-{dtype}.{i}": array for i, array in enumerate(arrays) if array is not None})
    np.savez(tmp_path / "given.npz", **given)
    done = {}
    for name, path in (("debug", tmp_path / "lib"), ("release", Path(cython_ext.__file__).parents[1])):
        ran = subprocess.run(
            [sys.executable, "-c", RUN, str(tmp_path / "given.npz"), str(tmp_path / f"{name}.npz")],
            cwd=path, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr
        done[name] = dict(np.load(tmp_path / f"{name}.npz"))
    assert str(done["debug"].pop("origin")).startswith(str(tmp_path)) and not str(done["release"].pop("origin")).startswith(str(tmp_path))
    assert done["debug"].keys() == done["release"].keys() and len(done["debug"]) >= 6 * 2 * len(SMALL)  # six outputs at least per example
    differ = [name for name, array in done["debug"].items() if array.tobytes() != done["release"][name].tobytes()]
    assert not differ


@pytest.mark.parametrize(("compiler", "words"), [
    ("/nowhere/gcc", "found no C compiler: '/nowhere/gcc' is not on the path"),
    ("false", "'false' failed"),
])
def test_a_missing_compiler_gives_one_message_that_names_the_package(tmp_path, compiler, words):
    failed = build("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"), CC=compiler)
    assert failed.returncode != 0
    assert words in failed.stderr and "apt-get install gcc libc6-dev python3-dev" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_missing_python_headers_give_the_same_message(tmp_path):
    code = (
        "import runpy, sysconfig\n"
        "true_path = sysconfig.get_path\n"
        "sysconfig.get_path = lambda name, *rest, **more: '/nowhere' if 'include' in name else true_path(name, *rest, **more)\n"
        "runpy.run_path('setup.py', run_name='__main__')")
    failed = build("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"), code=code)
    assert failed.returncode != 0
    assert "found no Python headers: there is no Python.h in /nowhere" in failed.stderr and "python3-dev" in failed.stderr
    assert "Traceback" not in failed.stderr
