"""Every block of the harness's README is run in an empty folder: files under their names, commands with what they print."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("flax")

from parity_tests.harness import plugin
from parity_tests.harness.cli import main

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCK = re.compile(r"^```(\w*)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ROOT = README.parents[2]


def blocks() -> list[tuple[str, str, str]]:
    """Language, name and text of every block, in order."""
    return BLOCK.findall(README.read_text())


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Commands of a console block, each with the lines that it is said to print."""
    found: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


def plain(line: str) -> str:
    """A line without what differs from run to run: seconds, rounding errors, the width of columns."""
    line = re.sub(r"\d+\.\d+ ?s\b", "# s", line)
    return " ".join(re.sub(r"\b\d(\.\d+)?e-\d+\b", "#", line).split())


def shown(expected: list[str], printed: list[str]) -> str | None:
    """None when the printed lines are those expected, `...` standing for any; otherwise the first expected line that was not printed."""
    place, free = 0, False
    for line in expected:
        if line == "...":
            free = True
            continue
        wanted = re.escape(plain(line)).replace(r"\.\.\.", ".*")
        rest = range(place, len(printed)) if free else range(place, min(place + 1, len(printed)))
        found = next((index for index in rest if re.fullmatch(wanted, plain(printed[index]))), None)
        if found is None:
            return line
        place, free = found + 1, False
    return None if free or place == len(printed) else f"(the end, found {printed[place]!r})"


class Shell:
    """Runs the commands of the README in a folder: `parity`, `python` and `pytest` in this process, anything else in bash."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.status = folder, 0

    def run(self, command: str) -> list[str]:
        """The lines that a command prints, on either stream."""
        name, *arguments = shlex.split(command)
        if command == "echo $?":
            return [str(self.status)]
        if name == "parity":
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), self.fresh():
                self.status = main(arguments)
            return out.getvalue().splitlines()
        if name == "python":
            with self.fresh():
                runpy.run_path(arguments[0])
            return []
        if name == "pytest":
            # of what other tests of this process have run nothing goes into the report
            with self.fresh(), pytest.MonkeyPatch.context() as patch:
                patch.setattr(plugin, "_batteries", {})
                out = io.StringIO()
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                    self.status = int(pytest.main(["-p", "no:cacheprovider", *arguments]))
            return out.getvalue().splitlines()
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=self.folder, env={**os.environ, "PATH": path}, check=False)
        self.status = done.returncode
        return (done.stdout + done.stderr).splitlines()

    @contextlib.contextmanager
    def fresh(self):
        """As in a process of its own: modules of the folder are imported anew, and the path is as it was."""
        before = list(sys.path)
        sys.path.insert(0, str(self.folder))
        try:
            yield
        finally:
            sys.path[:] = before
            inside = [name for name, module in sys.modules.items() if (getattr(module, "__file__", None) or "").startswith(str(self.folder))]
            for name in inside:
                del sys.modules[name]


def test_every_block_runs_and_prints_what_it_is_said_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shell = Shell(tmp_path)
    for language, name, text in blocks():
        if name:
            (shell.folder / name).write_text(text)
            continue
        assert language == "console", f"a block without a name is a console, found {language!r}: {text[:50]}"
        for command, expected in commands(text):
            printed = shell.run(command)
            missing = shown(expected, printed)
            assert missing is None, f"$ {command}\nexpected: {missing}\n" + "\n".join(printed)


def test_what_is_compared_can_differ() -> None:
    assert shown(["a 0.3 s", "...", "c 2e-9"], ["a 1.7 s", "b", "c  3.1e-12"]) is None
    assert shown(["a", "c"], ["a", "b", "c"]) == "c" and shown(["a"], ["a", "b"]) == "(the end, found 'b')"
    assert shown(["a", "..."], ["b"]) == "a" and shown(["allowed 1e-9, 3 checks"], ["allowed 1e-9, 4 checks"]) is not None


def test_the_page_is_part_of_the_package() -> None:
    files = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["parity_tests"]
    assert README.relative_to(ROOT / "parity_tests").as_posix() in files


def test_the_names_that_the_text_uses_exist() -> None:
    """`code` in the running text that looks like an option, a field of a case or a command of the harness is one."""
    from dataclasses import fields

    from parity_tests.harness.battery import TIERS
    from parity_tests.harness.case import Case

    text = BLOCK.sub("", README.read_text())
    code = re.findall(r"`([^`\n]+)`", text)
    known = {field.name for field in fields(Case)}
    used = {match for item in code for match in re.findall(r"^(\w+)=", item)}
    assert used and used <= known, used - known
    table = re.findall(r"^\| \d+ .*\| ([\w, ]+) \|$", text, re.MULTILINE)
    assert len(table) == 10 and {name for row in table for name in row.split(", ")} - {"all"} <= set(TIERS)
    helps = io.StringIO()
    with contextlib.redirect_stdout(helps), pytest.raises(SystemExit):
        main(["--help"])
    assert all(re.search(rf"^\s+{name} ", helps.getvalue(), re.MULTILINE) for name in ("run", "map", "convert", "diff", "mutate", "golden", "report"))
