"""The laws of who may import whom, read from the syntax tree of every file: a text search would trip over comments and strings."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("conf", "torch_impl", "jax_impl", "cython_ext", "runtime", "parity_tests", "experiments")
TORCH = {"torch", "torch_impl"}
JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "jax_impl"}
MODELS = {"torch_impl", "jax_impl", "runtime", "experiments"}


def sources() -> list[str]:
    """Every Python and Cython file of the rooms, tests and test files left out: those may import anything."""
    files = [path.relative_to(ROOT) for room in ROOMS for pattern in ("*.py", "*.pyx", "*.pxd") for path in (ROOT / room).rglob(pattern)]
    return sorted(str(f) for f in files if "tests" not in f.parts[:-1] and not f.name.startswith("test_") and f.name != "conftest.py")


def imports(path: str, text: str) -> set[str]:
    """Dotted names that a file imports, at any depth of the file; Cython files are read line by line."""
    if not path.endswith(".py"):
        found = re.findall(r"^\s*(?:c?import|from)\s+([\w.]+)", text, re.MULTILINE)
        return set(found)
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(Path(path).parts[: -node.level]) + "." * bool(node.module) if node.level else ""
            names |= {f"{package}{node.module or ''}.{alias.name}" for alias in node.names}
    return names


def effects(text: str) -> Iterator[str]:
    """Seeding, global JAX configuration and environment writes, wherever they stand in a file."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name.endswith(("manual_seed", "random.seed", "config.update", "environ.setdefault", "environ.update", "putenv")) or name == "seed":
                yield name
        targets = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else [node.target] if isinstance(node, ast.AugAssign) else []
        yield from (ast.unparse(target) for target in targets if ast.unparse(target).startswith(("os.environ", "environ[")))


def broken_laws(path: str, text: str) -> list[str]:
    """Every law that the file at `path`, with this text, breaks."""
    names = imports(path, text)
    roots = {name.split(".")[0] for name in names}
    room, part = Path(path).parts[0], "/".join(Path(path).parts[:2])
    foreign = roots - set(sys.stdlib_module_names) - {room}
    laws = []

    def law(number: int, breaks: set[str], words: str) -> None:
        if breaks:
            laws.append(f"law {number}: {path} {words}: {', '.join(sorted(breaks))}")

    if room == "torch_impl":
        law(1, roots & JAX, "imports JAX")
    if room == "jax_impl":
        law(1, roots & TORCH, "imports torch")
    if room == "cython_ext":
        law(2, foreign - {"numpy", "scipy", "threadpoolctl", "cython", "cpython", "libc", "openmp"}, "may import only numpy, scipy and threadpoolctl")
    if room == "conf":
        law(2, foreign, "may import only the standard library")
    if part.endswith("_impl/ops"):
        others = {name for name in names if name.startswith(f"{room}.") and not name.startswith(f"{room}.ops")}
        shells = {name for name in names if name.startswith(("flax", "torch.nn")) and not name.startswith("torch.nn.functional")}
        law(3, others | shells | roots & {"conf", "runtime"}, "holds arrays and scalars only, no modules and no config")
    if part == "parity_tests/harness":
        law(4, {n for n in names if n.split(".")[0] in set(ROOMS) and not n.startswith("parity_tests.harness")}, "imports something of ours")
        allowed = TORCH if "torch" in Path(path).stem else JAX if re.search("jax|nnx|linen|flax", Path(path).stem) else set()
        law(4, roots & (TORCH | JAX) - allowed, "imports a framework outside its adapter")
    if room != "experiments":
        law(5, roots & {"hydra", "omegaconf", "wandb"}, "imports what only experiments may")
        law(6, roots & {"experiments"}, "imports experiments")
    if room not in ("runtime", "experiments"):
        law(5, roots & {"transformers", "tokenizers"}, "imports what only runtime and experiments may")
    if room != "runtime" and part != "parity_tests/harness":
        law(5, roots & {"safetensors"}, "writes tensors past runtime")
    if room not in ("parity_tests", "experiments"):
        law(6, roots & {"parity_tests"}, "imports parity_tests")
    if room == "parity_tests" and not re.fullmatch(r"parity_tests/specs(_\w+)?\.py", path):
        # a bug is put into the port, so the bugs know that one
        ports = {"jax_impl"} if re.fullmatch(r"parity_tests/(mutants|mutations)(_\w+)?\.py", path) else set()
        law(6, roots & MODELS - ports, "knows a model, which only parity_tests/specs*.py may")
    if room != "experiments" and path.endswith(".py"):
        law(7, set(effects(text)), "seeds, configures or writes the environment")
    return laws


@pytest.mark.parametrize("path", sources())
def test_every_file_keeps_the_laws(path: str) -> None:
    assert not broken_laws(path, (ROOT / path).read_text())


@pytest.mark.parametrize(("path", "text", "number"), [
    ("torch_impl/layers.py", "def f():\n    import jax.numpy as jnp", 1),
    ("jax_impl/ops/wkv.py", "from torch_impl.ops import wkv", 1),
    ("cython_ext/selective_scan.pyx", "cimport numpy\nimport torch", 2),
    ("conf/models.py", "import numpy", 2),
    ("torch_impl/ops/wkv.py", "from conf.models import GroundedMambaConfig", 3),
    ("torch_impl/ops/wkv.py", "from torch.nn import Module", 3),
    ("torch_impl/ops/wkv.py", "from torch_impl.layers import linear", 3),
    ("jax_impl/ops/wkv.py", "from flax import nnx", 3),
    ("parity_tests/harness/case.py", "from runtime import build", 4),
    ("parity_tests/harness/measure.py", "import torch", 4),
    ("parity_tests/harness/adapters/torch_adapter.py", "import jax", 4),
    ("runtime/build.py", "import wandb", 5),
    ("torch_impl/layers.py", "import tokenizers", 5),
    ("experiments/checkpoint.py", "from safetensors.numpy import save_file", 5),
    ("runtime/build.py", "from experiments import train", 6),
    ("runtime/build.py", "from parity_tests import specs", 6),
    ("parity_tests/twins.py", "import torch_impl", 6),
    ("parity_tests/my_specs.py", "import torch_impl", 6),
    ("parity_tests/mutants_mamba.py", "import torch_impl", 6),
    ("runtime/build.py", "import jax\njax.config.update('jax_enable_x64', True)", 7),
    ("torch_impl/layers.py", "import os\nos.environ['A'] = '1'", 7),
    ("torch_impl/layers.py", "import torch\ndef f():\n    torch.manual_seed(0)", 7),
])
def test_a_broken_law_is_found(path: str, text: str, number: int) -> None:
    assert [found for found in broken_laws(path, text) if found.startswith(f"law {number}:")]


@pytest.mark.parametrize(("package", "absent"), [
    ("torch_impl.grounded_mamba", "jax flax optax jaxlib"),
    ("torch_impl.ops.compiled", "jax flax optax jaxlib cython_ext.selective_scan cython_ext.wkv"),
    ("jax_impl.functional", "torch"),
    ("runtime", "torch jax flax optax"),
    ("cython_ext", "torch jax cython_ext.selective_scan"),
    ("conf.models", "torch jax numpy"),
    ("parity_tests.harness", "torch jax flax optax"),
])
def test_a_room_imports_without_the_others(package: str, absent: str) -> None:
    code = f"import sys\nfor name in {absent.split()!r}: sys.modules[name] = None\nimport {package}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
