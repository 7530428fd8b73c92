"""The harness imports with either framework absent, touches neither before a case needs it, and keeps each import in its file."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parents[1]
HOMES = {"torch": tuple(f"adapters/torch_{name}.py" for name in ("adapter", "alternatives", "sites", "slips", "values", "variants")),
         "safetensors": ("formats.py",),
         **dict.fromkeys(("jax", "flax", "optax"), tuple(f"adapters/{name}.py" for name in (
             "nnx_adapter", "nnx_trace", "nnx_injectors", "nnx_injectors_more", "linen_adapter", "jax_shared")))}
OURS = ("conf", "torch_impl", "jax_impl", "runtime", "cython_ext", "experiments")

ABSENT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import importlib, pkgutil, parity_tests.harness as harness
skip = SKIP
for module in pkgutil.walk_packages(harness.__path__, "parity_tests.harness."):
    if not any(part in module.name for part in (".tests", *skip)):
        importlib.import_module(module.name)
for name in ("Case", "Bound", "run_case", "run_mutations", "parity_case", "Engine"):
    getattr(harness, name)
held = [name for name in ("torch", "jax", "flax", "optax") if name in sys.modules]
assert held == EXPECTED, held
"""


@pytest.mark.parametrize(("blocked", "skip", "expected"), [
    (("torch", "jax", "flax", "optax"), (".torch_", ".nnx_", ".linen_", ".jax_"), []),
    (("torch",), (".torch_", ".nnx_", ".linen_", ".jax_"), []),
    (("jax", "jaxlib", "flax", "optax"), (".nnx_", ".linen_", ".jax_"), ["torch"]),
])
def test_it_imports_with_a_framework_absent(blocked: tuple, skip: tuple, expected: list) -> None:
    if expected:
        pytest.importorskip("torch")
    text = ABSENT.replace("BLOCKED", repr(blocked)).replace("SKIP", repr(skip)).replace("EXPECTED", repr(expected))
    done = subprocess.run([sys.executable, "-c", text], cwd=HARNESS.parents[1], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def test_each_framework_stays_in_its_files() -> None:
    files = [path for path in HARNESS.rglob("*.py") if "tests" not in path.relative_to(HARNESS).parts]
    assert len(files) > 20
    for path in files:
        name = path.relative_to(HARNESS).as_posix()
        names = imported(path)
        assert not names & set(OURS), f"{name} imports {names & set(OURS)}"
        for package, homes in HOMES.items():
            assert package not in names or name in homes, f"{name} imports {package}"
