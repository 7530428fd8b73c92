"""The compiled kernels of cython_ext; everything else is in pyproject.toml.

CYTHON_DEBUG=1 builds them for the baseline processor alone and without optimisation, with every check that Cython has on arrays, with trapping
bounds checks on C arrays where they are declared, and with stack guards for where only a pointer to them is known. CYTHON_SANITIZE=1 builds
them under gcc's address and undefined-behaviour sanitizers instead; `make sanitize` runs the tests on that build.
"""

import os
import shutil
import sys
import sysconfig
import tempfile
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

KERNELS = [
    "selective_scan", "plain_delta", "delta_rule", "dense", "wkv", "cms", "wave", "wavecore_step", "wavecore_engine", "lam_engine", "mamba_step",
    "blas_threads", "xla_ffi", "xla_hierarchical",
]
SHARED = "cython_ext._shared"  # what Cython writes for memoryviews, once instead of into every kernel: a quarter of the time to compile
DEBUG, SANITIZE = (os.environ.get(name, "0") not in ("", "0") for name in ("CYTHON_DEBUG", "CYTHON_SANITIZE"))

# Strict arithmetic: no -ffast-math (NaN must stay NaN), no -march=native (a wheel runs elsewhere; clones.pxd adds AVX2 and AVX-512),
# no fused multiply-add, which would make results depend on the processor. Nobody reads the floating-point exception flags: without them
# (-fno-trapping-math, which changes no result) loops with a choice between two values become vector instructions.
STRICT = ["-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
RELEASE_FLAGS = ["-O3", "-g0", *STRICT]
DEBUG_FLAGS = [
    "-O0", "-g1", *STRICT, "-fsanitize=bounds", "-fsanitize-undefined-trap-on-error", "-fstack-protector-all", "-DGROUNDWAVE_CLONES=",
]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
SANITIZE_FLAGS = ["-O1", "-g1", "-fno-omit-frame-pointer", *STRICT, *SANITIZERS, "-DGROUNDWAVE_CLONES="]
FLAGS, FOLDER = (SANITIZE_FLAGS, "sanitize") if SANITIZE else (DEBUG_FLAGS, "debug") if DEBUG else (RELEASE_FLAGS, "release")
LINK_FLAGS = ["-fopenmp", *(SANITIZERS if SANITIZE else [])]

# What every kernel needs of the compiler and its libraries, in one file that takes no time.
PROBE = """
#include <Python.h>
#include <omp.h>
#include <math.h>
double probe(double x) { return exp(x) * omp_get_max_threads(); }
"""

NEEDED = (
    "groundwave compiles its kernels and {problem}.\n"
    "Install gcc and the Python headers, then try again:\n"
    "    Debian, Ubuntu:   apt-get install gcc libc6-dev python3-dev\n"
    "    Fedora, RHEL:     dnf install gcc python3-devel\n"
    "    Alpine:           apk add gcc musl-dev libgomp python3-dev"
)


class BuildKernels(build_ext):
    """Translates the .pyx files into the build folder, then compiles them side by side, or says which package is missing."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extensions(self):
        from Cython.Build import cythonize

        compiler = self.compiler.compiler_so[0]
        if shutil.which(compiler) is None:
            sys.exit(NEEDED.format(problem=f"found no C compiler: {compiler!r} is not on the path"))
        headers = [sysconfig.get_path("include"), sysconfig.get_path("platinclude")]
        if not any(os.path.exists(os.path.join(folder, "Python.h")) for folder in headers):
            sys.exit(NEEDED.format(problem=f"found no Python headers: there is no Python.h in {headers[0]}"))
        try:
            self.probe()
        except (CompileError, LinkError) as error:
            sys.exit(NEEDED.format(problem=f"{compiler!r} failed: {error}"))
        translated = cythonize(
            self.extensions,
            build_dir=os.path.join(self.build_temp, FOLDER),
            shared_utility_qualified_name=SHARED,
            force=True,  # Cython looks at dates alone, not at directives
            compiler_directives={
                "language_level": 3, "cdivision": True, "boundscheck": DEBUG, "wraparound": False, "initializedcheck": DEBUG, "nonecheck": DEBUG,
            },
        )
        for extension, source in zip(self.extensions, translated, strict=True):
            extension.sources = source.sources
        self.force = True  # flags are not among the dates that decide either
        super().build_extensions()

    def probe(self):
        """One small library, compiled and linked before Cython's minute; raises CompileError or LinkError."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text(PROBE)
            objects = self.compiler.compile([str(source)], output_dir=folder, extra_preargs=FLAGS)
            self.compiler.link_shared_object(objects, str(Path(folder, "probe.so")), extra_postargs=LINK_FLAGS)


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            f"cython_ext.{name}",
            [f"cython_ext/{name}.pyx"],
            depends=sorted(glob("cython_ext/*.pxd") + glob("cython_ext/*.h")),
            include_dirs=["cython_ext"],
            extra_compile_args=FLAGS,
            extra_link_args=LINK_FLAGS,
        )
        for name in KERNELS
    ] + [Extension(SHARED, [SHARED.replace(".", "/") + ".c"], extra_compile_args=FLAGS, extra_link_args=LINK_FLAGS)],
)
