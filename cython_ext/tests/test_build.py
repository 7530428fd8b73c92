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
from cython_ext.tests import build_cases

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not all((ROOT / name).exists() for name in ("setup.py", "cython_ext/dense.pyx")), reason="the sources are not here")


def build(*options, code=None, **environment):
    command = [sys.executable, *(["-c", code] if code else ["setup.py"]), "build_ext", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})


WITHOUT_JAX = (  # whose own kernels wrap these, take XLA's headers and run in no case of build_cases
    "import runpy, setuptools\n"
    "setup = setuptools.setup\n"
    "def fewer(ext_modules, **rest):\n"
    "    setup(ext_modules=[module for module in ext_modules if not module.name.startswith('cython_ext.xla_')], **rest)\n"
    "setuptools.setup = fewer\n"
    "runpy.run_path('setup.py', run_name='__main__')")


def test_debug_build_trips_no_check_and_gives_the_bits_of_the_release(tmp_path):
    """The debug build has bounds checks and the baseline instructions alone, so equal bits also hold the clones to the baseline."""
    built = build("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"), code=WITHOUT_JAX, CYTHON_DEBUG="1")
    assert built.returncode == 0, built.stdout + built.stderr
    for source in Path(cython_ext.__file__).parent.glob("*.py"):
        shutil.copy(source, tmp_path / "lib" / "cython_ext")
    given = build_cases.drawn()
    (tmp_path / "given").write_bytes(pickle.dumps(given))
    done, files = {}, {}
    for name, path in (("debug", tmp_path / "lib"), ("release", Path(cython_ext.__file__).parents[1])):
        command = [sys.executable, "-c", build_cases.SCRIPT, str(tmp_path / "given"), str(tmp_path / name)]
        ran = subprocess.run(command, cwd=path, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr
        files[name], done[name] = pickle.loads((tmp_path / name).read_bytes())
    assert all(Path(file).is_relative_to(tmp_path) for file in files["debug"])
    assert not any(Path(file).is_relative_to(tmp_path) for file in files["release"])
    modules = {Path(file).name.split(".")[0] for file in files["debug"]}
    others = {name for name in cython_ext.KERNELS if name.startswith("xla_")} | {"mamba_step"}  # of JAX, and a part of the engine
    assert modules == {"mamba_engine", *cython_ext.KERNELS} - others
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
