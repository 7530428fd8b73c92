"""A tree in which nothing was compiled: it imports, torch and JAX compute in it, and what needs a kernel says what to do."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import runtime

pytest.importorskip("torch")
pytest.importorskip("jax")

TREE = Path(runtime.__file__).parents[1]
PACKAGES = ("conf", "cython_ext", "jax_impl", "runtime", "torch_impl")

# An editable installation finds the modules that a copy lacks, so its finder goes first.
USE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if not getattr(finder, "__module__", "").startswith("__editable__")]
import numpy as np
import cython_ext, runtime
from conf.models import DeltaNetConfig, GroundedMambaConfig, LamConfig, WaveCoreConfig

print(runtime.__file__)
assert not any(map(cython_ext.is_built, cython_ext.KERNELS))
ids, config = np.array([[1, 5, 2]]), DeltaNetConfig(vocab_size=7, dim=6, heads=2, depth=1, ffn_dim=5)
logits = [np.asarray(runtime.build("deltanet_lm", config, backend)(ids)[0]) for backend in ("torch", "jax")]
assert logits[0].shape == (1, 3, 7) and np.abs(logits[0] - logits[1]).max() < 1e-5, logits
models = [("grounded_mamba", GroundedMambaConfig(), {}), ("lam", LamConfig(), {}), ("deltanet_lm", config, {}),
          ("wavecore", WaveCoreConfig(), dict(obs_dim=5, action_dim=2, output_dim=2))]
for name, config, widths in models:
    for backend in ("cython", "torch_compiled", "jax_compiled"):
        try:
            runtime.build(name, config, backend, **widths)
        except ImportError as error:
            print(name, backend, error)
        except ValueError as error:  # a backend that this model does not have
            assert "must be one of" in str(error), error
"""


def test_torch_and_jax_work_and_what_needs_a_kernel_says_what_to_do(tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(TREE / package, tmp_path / package, ignore=shutil.ignore_patterns("*.so", "*.pyd", "tests", "__pycache__"))
    done = subprocess.run([sys.executable, "-c", USE], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    where, *refused = done.stdout.splitlines()
    assert where == str(tmp_path / "runtime" / "__init__.py")
    for model in ("grounded_mamba", "lam", "wavecore"):
        assert any(line.startswith(f"{model} cython backend 'cython' needs the compiled kernels") for line in refused), refused
    for line in refused:
        assert "is not built" in line and "pip install -e ." in line and "apt-get install gcc" in line
