"""What a command writes to: standard output that outlives its reader, a line of progress, files of reports that replace the old ones whole."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from . import formats
from .case import Case, CaseError

WIDTH = 120  # columns of a report that goes to a file


class Usage(Exception):
    """A wrong command line."""


class Output(Console):
    """Standard output. When nobody reads it any more (`| head`) the rest is dropped, and what the command does besides is still done."""

    def __init__(self) -> None:
        super().__init__(width=None if sys.stdout.isatty() else WIDTH)

    def on_broken_pipe(self) -> None:
        """Go on without output, where rich ends the program."""
        self.quiet = True
        dropped()


def dropped() -> None:
    """Send what is still written to standard output nowhere."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


@contextlib.contextmanager
def progress(case: Case, console: Console, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A line that says what is being done, on a terminal."""
    with console.status(case.name, spinner="line") as status:
        yield lambda text: status.update(f"{escape(case.name)}: {escape(text)}") if not quiet and console.is_terminal else None


def check_folders(arguments: argparse.Namespace, *names: str) -> None:
    """Raise Usage for a file to write whose folder does not exist, or that is a folder: before anything is computed."""
    for name in names:
        path = getattr(arguments, name)
        if path is not None and not path.parent.is_dir():
            raise Usage(f"--{name} {path}: the folder {path.parent} does not exist")
        if path is not None and path.is_dir():
            raise Usage(f"--{name} {path} cannot be written: Is a directory")


def write(option: str, path: Path | None, make: Callable[[], str]) -> None:
    """Write a report to the file of an option, if there is one. Raises CaseError when that fails."""
    if path is None:
        return
    try:
        formats.write_text(path, make())
    except OSError as error:
        raise CaseError(f"{option} {path} cannot be written: {error.strerror}") from error
