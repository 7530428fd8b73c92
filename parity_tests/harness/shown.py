"""Reports read from their files and printed again: of one case, seed and set of precisions the newest result, the earlier ones in a line each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from . import report, summaries
from .battery import Result
from .mutate import Mutation
from .records import ReportError


def read(files: Sequence[Path]) -> tuple[list[Result], dict[str, list[Mutation]]]:
    """Results and mutations of report files. Raises ReportError naming the file that is none, or when there is neither in any."""
    results: list[Result] = []
    mutations: dict[str, list[Mutation]] = {}
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
            results += report.from_json(text)
            mutations |= report.mutations_from_json(text)
        except OSError as error:
            raise ReportError(f"{path} cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise ReportError(f"{path}: expected JSON in UTF-8, found {error.reason}") from error
        except ReportError as error:
            raise ReportError(f"{path}: {error}") from error
    if not results and not mutations:
        raise ReportError(f"{', '.join(map(str, files))}: expected at least one case, found none")
    return results, mutations


def show(results: Sequence[Result], mutations: Mapping[str, Sequence[Mutation]], console: Console, *, table: bool = True) -> bool:
    """Print the reports. Whether the newest result of every case, and every mutation, held."""
    groups = summaries.histories(results)
    for group in groups:
        report.terminal(group[-1], console, table=table)
        for result in reversed(group[:-1]):
            state = "held" if result.held else f"did not hold: {result.sentence}"
            console.print(f"  earlier, {result.meta.get('time', '-')}, commit {result.meta.get('commit', '-')[:12]}: {escape(state)}", soft_wrap=True)
    for name, found in mutations.items():
        console.print(f"injected bugs: {escape(name)}")
        report.mutations_table(found, console)
    newest = [group[-1] for group in groups]
    total(newest, console)
    return all(result.held for result in newest) and all(item.held for found in mutations.values() for item in found)


def total(results: Sequence[Result], console: Console) -> None:
    """Print how many of several cases hold, and which do not."""
    if len(results) > 1:
        wrong = [label for label, result in zip(summaries.labels(results), results, strict=True) if not result.held]
        console.print(f"{len(results) - len(wrong)} of {len(results)} cases hold" + "".join(f"; {escape(label)} does not" for label in wrong))
