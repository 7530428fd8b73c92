"""Which sources a calibration was computed from: a digest of each that comments, docstrings and layout do not change."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COVERED = (  # what decides whether a bug is noticed, or a clean pair is not
    "conf/models.py", "torch_impl/*.py", "torch_impl/ops/*.py", "jax_impl/*.py", "jax_impl/ops/*.py",
    "parity_tests/specs*.py", "parity_tests/harness/*.py", "parity_tests/harness/adapters/*.py",
)
# what only reads, writes, prints or proposes
SHOWN = ("answers", "charts", "cli", "fingerprints", "formats", "golden", "html", "kills", "loading", "mapfile", "output", "plugin", "propose",
         "provenance", "records", "report", "series", "shown", "structures", "summaries")


@functools.cache
def digest(text: str) -> str:
    """sha256 of the syntax tree of a Python source, docstrings left out."""
    return hashlib.sha256(repr(_plain(ast.parse(text))).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A syntax tree as nested tuples without positions; empty fields are left out, since later versions of Python add such."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, ast.AST):
        return value
    fields = dict(ast.iter_fields(value))
    if isinstance(value, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(value, clean=False) is not None:
        fields["body"] = fields["body"][1:]
    return type(value).__name__, [(name, _plain(item)) for name, item in fields.items() if item is not None and item != []]


def digests(patterns: Sequence[str] = (), root: Path = ROOT) -> dict[str, str]:
    """Digests of COVERED and of further patterns, by path below the root. Raises ValueError for a pattern that fits no file."""
    found = {}
    for pattern in (*COVERED, *patterns):
        paths = [path for path in sorted(root.glob(pattern)) if path.parent.name != "harness" or path.stem not in SHOWN]
        if not paths:
            raise ValueError(f"no source fits {pattern} in {root}")
        found.update({path.relative_to(root).as_posix(): digest(path.read_text(encoding="utf-8")) for path in paths})
    return dict(sorted(found.items()))


def changed(recorded: Mapping[str, str], current: Mapping[str, str]) -> list[str]:
    """Recorded paths whose digests differ or that are gone, each with what became of it.

    A source that is new decides nothing by itself: what makes use of it has changed, too.
    """
    words = {path: "changed" if path in current else "is gone" for path in recorded if recorded[path] != current.get(path)}
    return [f"{path} {word}" for path, word in sorted(words.items())]
