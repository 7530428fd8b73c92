"""Building the extension: with every check on, and without what a build needs."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cython_ext
from cython_ext.tests.examples import (
    DELTA_SHAPES,
    PLAIN_SHAPES,
    SHAPES,
    WKV_SHAPES,
    arguments,
    cotangent,
    delta_arguments,
    plain_arguments,
    plain_cotangents,
    wkv_arguments,
    wkv_cotangents,
)
from cython_ext.tests.test_wavecore_backward import ways_back, ways_there

ROOT = Path(__file__).resolve().parents[2]
SMALL = [shape for shape in SHAPES if shape[1] * shape[2] < 4000]
SMALL_DELTA = [shape for shape in DELTA_SHAPES if shape[2] * shape[3] < 4000]
SMALL_PLAIN = [shape for shape in PLAIN_SHAPES if shape[2] * shape[3] < 7000]
SMALL_CMS = [(1, 1, 1, 1), (3, 9, 33, 5), (2, 5, 17, 16)]
SMALL_WKV = [shape for shape in WKV_SHAPES if shape[1] * shape[3] < 4000]

# Runs the copy of the package found on the path over every small example; an error of a check inside a loop cannot be raised there, only
# be reported, so the hook for reports ends the process.
RUN = """
import os, pickle, sys
from pathlib import Path

def stop(report):
    print("inside a kernel:", repr(report.exc_value), file=sys.stderr, flush=True)
    os._exit(3)

sys.unraisablehook = stop
import cython_ext
scan, delta, wkv = cython_ext.selective_scan, cython_ext.delta_rule, cython_ext.wkv
results = {}
for case, given in pickle.loads(Path(sys.argv[1]).read_bytes()).items():
    if case.startswith("cms") or case.startswith("wave"):
        module, name = case.split()[:2]
        outputs = getattr(getattr(cython_ext, module), name)(*given[0], **given[1])
        results[case] = list(given[0] if outputs is None else outputs)  # a write changes what it is given
    elif case.startswith("wkv"):
        results[case] = [*wkv.forward(*given[2:]), *wkv.backward(*given)]
    elif isinstance(given, list):
        states = scan.forward(*given[1:], 1e-5)
        results[case] = [states, *scan.backward(*given, states, 1e-5)]
    elif isinstance(given, tuple):
        results[case] = [*delta.forward(*given[2:]), *delta.backward(*given)]
    else:
        o, states = delta.hierarchical_forward(**given)
        results[case] = [o, *states]
Path(sys.argv[2]).write_bytes(pickle.dumps(([scan.__file__, delta.__file__, wkv.__file__], results)))
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
    for dtype in ("float32", "float64"):
        for case, shape in enumerate(SMALL):
            arrays = arguments(shape, dtype, dt_b=case % 2 == 0, initial_state=case % 3 > 0)
            given[f"scan {shape} {dtype}"] = [cotangent(shape, dtype), *arrays.values()]
        for case, shape in enumerate(SMALL_DELTA):
            for transform in ("lam", "exact"):
                given[f"delta {shape} {dtype} {transform}"] = {**delta_arguments(shape, dtype, case % 2 == 0), "transform": transform}
        for case, shape in enumerate(SMALL_PLAIN):
            given[f"plain {shape} {dtype}"] = (*plain_cotangents(shape, dtype), *plain_arguments(shape, dtype, case % 2 == 0).values())
        for case, shape in enumerate(SMALL_WKV):
            arrays, time_first = wkv_arguments(shape, dtype, case % 2 == 0, "direct"), ("bonus", "gain")[case % 3 % 2]
            given[f"wkv {shape} {dtype}"] = (*wkv_cotangents(shape, dtype), *arrays.values(), time_first)
        for shape in SMALL_CMS:
            for module, name, arrays, options in (*ways_there(shape, dtype), *ways_back(shape, dtype)):
                given[f"{module} {name} {shape} {dtype}"] = list(arrays.values()), options
    (tmp_path / "given").write_bytes(pickle.dumps(given))
    done, files = {}, {}
    for name, path in (("debug", tmp_path / "lib"), ("release", Path(cython_ext.__file__).parents[1])):
        ran = subprocess.run(
            [sys.executable, "-c", RUN, str(tmp_path / "given"), str(tmp_path / name)], cwd=path, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr
        files[name], done[name] = pickle.loads((tmp_path / name).read_bytes())
    assert [[Path(file).is_relative_to(tmp_path) for file in files[name]] for name in ("debug", "release")] == [[True] * 3, [False] * 3]
    assert done["debug"].keys() == done["release"].keys() == given.keys()
    differ = [
        case for case, outputs in done["debug"].items() for a, b in zip(outputs, done["release"][case], strict=True)
        if (a is None) != (b is None) or (a is not None and a.tobytes() != b.tobytes())
    ]
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
