"""Cases by name: `file.py:name`, `module:name`, or the `[tool.parity] cases` of the nearest pyproject.toml, all or one by its own name."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import tomllib
from pathlib import Path
from typing import Any

from .case import Case, CaseError, missing, raised


def nearest_pyproject(start: Path) -> Path | None:
    """The first pyproject.toml in a directory or above it."""
    return next((folder / "pyproject.toml" for folder in (start, *start.parents) if (folder / "pyproject.toml").is_file()), None)


def configured(start: Path) -> list[str]:
    """`[tool.parity] cases` of the nearest pyproject.toml. Raises CaseError when there is none."""
    path = nearest_pyproject(start)
    if path is None:
        raise CaseError(f"no CASE was given and there is no pyproject.toml in {start} or above it")
    try:
        content = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, OSError, UnicodeDecodeError) as error:
        raise CaseError(f"{path} cannot be read: {error}") from error
    names = content.get("tool", {}).get("parity", {}).get("cases")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise CaseError(f"no CASE was given and {path} has no list of names [tool.parity] cases, found {names!r}")
    # files are named relative to the project that lists them
    return [str(path.parent / name) if name.partition(":")[0].endswith(".py") else name for name in names]


def load(spec: str, start: Path | None = None) -> list[Case]:
    """The cases that `file.py:name` or `module:name` stands for: a Case, a list of them, or a function that makes either.

    A name without a colon is that of a case among the `[tool.parity] cases` of the nearest pyproject.toml. Raises CaseError, in one line, for a
    file, module or name that does not exist, an import that fails, or anything that is no case.
    """
    place, _, name = spec.rpartition(":")
    if spec.endswith(".py"):
        raise CaseError(f"a case is named file.py:name or module:name, found {spec!r}; {_known(_file(Path(spec), spec))}")
    if ":" not in spec:
        return [_registered(spec, start or Path.cwd())]
    if not place or not name:
        raise CaseError(f"a case is named file.py:name or module:name, found {spec!r}")
    module = _file(Path(place), spec) if place.endswith(".py") else _module(place, spec, start or Path.cwd())
    if not hasattr(module, name):
        raise CaseError(f"{place} has no {name!r}; {_known(module)}")
    found = getattr(module, name)
    if callable(found) and not isinstance(found, (Case, type)):
        if _needs_arguments(found):
            raise CaseError(f"{spec} is a function that needs arguments, expected a Case, a list of them, or a function that makes either; "
                            f"{_known(module)}")
        try:
            found = found()
        except (Exception, SystemExit) as error:
            raise CaseError(f"{spec} raised {raised(error)}") from error
    if not _is_cases(found):
        raise CaseError(f"{spec} is {type(found).__name__}, expected a Case, a list of them, or a function that makes either")
    return [found] if isinstance(found, Case) else list(found)


def _known(module: Any) -> str:
    found = sorted(key for key, value in vars(module).items() if _is_cases(value))
    return f"its cases are {', '.join(found)}" if found else "it has no case, which is a variable that holds a parity_tests.harness.Case"


def _registered(name: str, start: Path) -> Case:
    try:
        names = configured(start)
    except CaseError as error:
        raise CaseError(f"a case is named file.py:name or module:name, or by its own name where pyproject.toml lists it; found {name!r} and "
                        f"{str(error).removeprefix('no CASE was given and ')}") from error
    cases = [case for spec in names for case in load(spec, start)]
    found = [case for case in cases if case.name == name]
    if len(found) != 1:
        raise CaseError(f"{len(found) or 'no'} cases of {', '.join(names)} are named {name!r}, expected one of "
                        f"{', '.join(case.name for case in cases)} (or file.py:name, module:name)")
    return found[0]


def _needs_arguments(function: Any) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(item.default is item.empty and item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD) for item in parameters)


def _is_cases(value: Any) -> bool:
    return isinstance(value, Case) or (isinstance(value, (list, tuple)) and bool(value) and all(isinstance(case, Case) for case in value))


def _file(path: Path, spec: str) -> Any:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, sorted(other.name for other in path.parent.glob("*.py")), 1) if path.parent.is_dir() else []
        raise CaseError(f"{path} does not exist (asked for {spec})" + (f"; did you mean {path.parent / near[0]}?" if near else ""))
    path = path.resolve()
    package = _package_of(path)
    if package is not None:
        return _module(package[1], spec, package[0])
    name = f"parity_case_{path.stem}_{abs(hash(path)):x}"
    if name in sys.modules:
        return sys.modules[name]
    _on_path(path.parent)
    module_spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a file that exits must not end the command as if all had held
        del sys.modules[name]
        raise CaseError(f"{path} cannot be imported: {raised(error)}{missing(error)}") from error
    return module


def _package_of(path: Path) -> tuple[Path, str] | None:
    """The root folder and dotted name of a file inside a package, so that its relative imports work."""
    folder, parts = path.parent, [path.stem]
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    return (folder, ".".join(parts)) if len(parts) > 1 else None


def _module(name: str, spec: str, root: Path) -> Any:
    _on_path(root)
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise CaseError(f"{name} cannot be imported (asked for {spec}): {raised(error)}{missing(error)}") from error


def _on_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
