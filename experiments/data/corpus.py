"""Documents and their split: CPython's own text, or a local file or folder.

CPython's text is read from the interpreter that runs: the topics of `pydoc_data`, and every file of the standard library as its
source, or as its documentation strings alone where the source is not asked for. Test suites, bundled wheels and the generated
tables of `encodings` are left out; so is a file whose text another one already holds.

The split is by file: a file is held out when the hash of its name falls into the fraction asked for, so it does not depend on
the seed. The topics, one file of as much prose as all held-out files together, are always in training. A single local file is cut
near its end, at the end of a line, and so are the topics where they are all there is.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conf.schema import DataConfig
from experiments.errors import RunError

TOPICS = "pydoc_data/topics.py"
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "__pycache__", "encodings", "_bundled", "turtledemo"}


@dataclass(frozen=True)
class Document:
    """One file: its name, relative to where it was found, and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Training and held-out documents, in the order of their names, and a hash over names and texts."""

    training: tuple[Document, ...]
    validation: tuple[Document, ...]
    sha256: str

    def listing(self) -> dict[str, object]:
        """What is logged of the data: the hash and, for every file, its name, its bytes and its side."""
        return {
            "sha256": self.sha256,
            "training": {document.name: len(document.text.encode()) for document in self.training},
            "validation": {document.name: len(document.text.encode()) for document in self.validation},
        }


def check_path(config: DataConfig, field: str = "data.path") -> None:
    """Raise RunError, naming `field`, unless `path` is None, a file, or a folder that holds a file."""
    if config.path is None:
        return
    path = Path(config.path)
    if not path.exists():
        raise RunError(f"{field}: no file or folder {path}")
    if not _files(path):
        raise RunError(f"{field}: the folder {path} holds no file")


def load(config: DataConfig) -> Corpus:
    """The corpus that the configuration describes.

    Raises RunError, naming the path, for what is missing, empty or not UTF-8, and where either side of the split is empty.
    """
    if config.path is None:
        documents = list(_unique(_standard_library(set(config.parts))))
    else:
        check_path(config)
        documents = list(_unique(_local(Path(config.path))))
    training, validation = _split(documents, config.validation_fraction) if len(documents) > 1 else _cut(documents[0], config.validation_fraction)
    if not training or not validation:
        empty = "training" if not training else "held-out"
        raise RunError(f"data: no {empty} text in {len(documents)} files with data.validation_fraction={config.validation_fraction}")
    digest = hashlib.sha256()
    for side in (training, validation):
        for document in side:
            digest.update(f"{document.name}\0{len(document.text)}\0".encode() + document.text.encode())
    return Corpus(tuple(training), tuple(validation), digest.hexdigest())


def _standard_library(parts: set[str]) -> Iterator[Document]:
    if "topics" in parts:
        topics = importlib.import_module("pydoc_data.topics").topics
        yield Document(TOPICS, "\n\n".join(topics[name].strip() for name in sorted(topics)) + "\n")
    if not parts & {"source", "docstrings"}:
        return
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    found = False
    for name in names:
        if name == TOPICS or _LEFT_OUT & set(name.split("/")[:-1]):
            continue
        try:
            with tokenize.open(root / name) as file:
                source = file.read()
            text = source if "source" in parts else _docstrings(source)
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue  # a file of the interpreter that it cannot read itself is nothing to train on
        found = True
        if text.strip():
            yield Document(name, text)
    if not found:
        raise RunError(f"data.parts: the standard library in {root} has no source files; give text with data.path=...")


def _docstrings(source: str) -> str:
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)))
    texts = [text for text in (ast.get_docstring(node) for node in nodes) if text]
    return "\n\n".join(texts) + "\n" if texts else ""


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    visible = (file for file in path.rglob("*") if not any(part.startswith(".") for part in file.relative_to(path).parts))
    return sorted(file for file in visible if file.is_file())


def _local(path: Path) -> Iterator[Document]:
    for file in _files(path):
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise RunError(f"data.path: {file} is not UTF-8 text: byte {error.object[error.start]:#04x} at offset {error.start}") from error
        except OSError as error:
            raise RunError(f"data.path: cannot read {file}: {error.strerror or error}") from error
        if not text:
            raise RunError(f"data.path: {file} is empty")
        yield Document(file.name if file == path else file.relative_to(path).as_posix(), text)


def _unique(documents: Iterator[Document]) -> Iterator[Document]:
    seen: set[str] = set()
    for document in documents:
        if document.text not in seen:
            seen.add(document.text)
            yield document


def _split(documents: list[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Hold out files by the hash of their names; at least one, the one of the lowest hash."""
    hashes = {document.name: hashlib.sha256(document.name.encode()).digest()[:8] for document in documents if document.name != TOPICS}
    place = {name: int.from_bytes(value, "big") / 2**64 for name, value in hashes.items()}
    lowest = min(place, key=place.__getitem__)
    held = {name for name, value in place.items() if value < fraction} | {lowest}
    return [document for document in documents if document.name not in held], [document for document in documents if document.name in held]


def _cut(document: Document, fraction: float) -> tuple[list[Document], list[Document]]:
    """Both ends of one file, cut at the end of a line where there is one."""
    near = max(1, round(len(document.text) * (1 - fraction)))
    cut = document.text.rfind("\n", 0, near) + 1 or near
    first, last = document.text[:cut], document.text[cut:]
    return [Document(document.name, first)], [Document(document.name, last)] if last else []
