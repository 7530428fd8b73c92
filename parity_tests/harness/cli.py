"""The `parity` command: run cases, put bugs into them, show reports again, convert weights, propose weight maps, compare two files of named arrays.

Exit status: 0 everything held, 1 something did not, 2 the question itself was wrong (one line on standard error).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import formats, html, kills, loading, locate, mapfile, records, report, shown
from .adapters.base import Unsupported
from .battery import TIERS, Battery, Result
from .bounds import BoundError
from .candidate import Candidate
from .case import DTYPES, Case, CaseError
from .convert import ConversionError
from .measure import MeasureError, measure
from .mutate import Mutation, run_mutations
from .policy import Policy
from .recording import Recording

USER_ERRORS = (CaseError, BoundError, ConversionError, formats.FormatError, MeasureError, Unsupported, records.ReportError)


WIDTH = 120  # columns of a report that goes to a file


class _Usage(Exception):
    """A wrong command line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise _Usage(f"{message} (see {self.prog} --help)")


def _parser() -> _Parser:
    parser = _Parser(prog="parity", description="Do a reference and a candidate compute the same thing, and if not, where do they part?")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    case_help = "file.py:name or module:name; without one, [tool.parity] cases of the nearest pyproject.toml"

    run = commands.add_parser("run", help="run every tier of the cases and give the verdict")
    run.add_argument("cases", nargs="*", metavar="CASE", help=case_help)
    run.add_argument("--tier", action="append", choices=list(TIERS), help="run this tier only (may be repeated)")
    run.add_argument("--dtype", action="append", choices=list(DTYPES), help="precisions beside float64 (may be repeated; default: the case's)")
    run.add_argument("--regime", action="append", help="run under this regime only (may be repeated)")
    run.add_argument("--seed", type=int, help="seed of weights and inputs")
    run.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON as well")
    run.add_argument("--html", type=Path, metavar="FILE", help="write the report as one HTML page as well")
    run.add_argument("--threads", type=int, help="threads that torch computes with (default 1)")
    run.add_argument("--eager", action="store_true", help="do not compile the candidate")
    run.add_argument("--mutations", action="store_true", help="then inject the case's own mutations and demand that each is located")
    run.add_argument("--summary", action="store_true", help="no table of layers")
    run.add_argument("--quiet", action="store_true", help="no progress")

    bugs = commands.add_parser("mutate", help="put every bug of the cases' injectors into the candidate and print what noticed it")
    bugs.add_argument("cases", nargs="+", metavar="CASE", help=case_help.partition(";")[0])
    bugs.add_argument("--unseen", action="store_true", help="inject those too that were not seen while tuning, and report them apart")
    bugs.add_argument("--json", type=Path, metavar="FILE", help="write the kill matrix as JSON as well")
    bugs.add_argument("--html", type=Path, metavar="FILE", help="write the kill matrix as one HTML page as well")
    bugs.add_argument("--quiet", action="store_true", help="no progress")

    again = commands.add_parser("report", help="show reports again, in the terminal or as one HTML page")
    again.add_argument("files", nargs="*", type=Path, metavar="JSON", help="what `parity run --json` wrote; of one case the newest counts")
    again.add_argument("--html", type=Path, metavar="FILE", help="write one HTML page of all of them, with earlier results of a case as its history")
    again.add_argument("--summary", action="store_true", help="no table of layers")
    again.add_argument("--schema", action="store_true", help="print the JSON Schema of a report and do nothing else")

    convert = commands.add_parser("convert", help="convert a file of weights between formats and, with --case, between names")
    convert.add_argument("source", type=Path, metavar="SRC")
    convert.add_argument("target", type=Path, metavar="DST")
    convert.add_argument("--case", help=case_help.partition(";")[0])
    convert.add_argument("--to", choices=["candidate", "reference"], help="whose names the result has; needs --case")

    mapping = commands.add_parser("map", help="propose a weight map for a case, verify it by gradients, and write it as a file")
    mapping.add_argument("case", metavar="CASE", help=case_help.partition(";")[0])
    mapping.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: NAME.map.toml in this folder)")

    diff = commands.add_parser("diff", help="compare two files of named arrays")
    diff.add_argument("first", type=Path, metavar="A")
    diff.add_argument("second", type=Path, metavar="B")
    diff.add_argument("--tolerance", type=float, default=0.0, help="largest relative L2 that counts as equal (default 0: bit for bit)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the result is the exit status."""
    arguments = None
    try:
        arguments = _parser().parse_args(argv)
        return {"run": _run, "mutate": _mutate, "report": _report, "convert": _convert, "map": _map, "diff": _diff}[arguments.command](arguments)
    except (_Usage, *USER_ERRORS) as error:
        lines = str(error).splitlines()
        print(f"parity: {lines[0]}" + "".join(f";{line.replace('  ', ' ', 1)}" for line in lines[1:]), file=sys.stderr)
        return 2
    except SystemExit as error:
        if arguments is None:  # --help
            raise
        print(f"parity: a case ended the program (exit status {error.code}) before it was compared", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("parity: interrupted", file=sys.stderr)
        return 130


def _cases(names: Sequence[str]) -> list[Case]:
    return [case for name in names or loading.configured(Path.cwd()) for case in loading.load(name)]


def _adjusted(case: Case, arguments: argparse.Namespace) -> Case:
    changes: dict = {}
    if arguments.dtype:
        changes["dtypes"] = tuple(dict.fromkeys(("float64", *arguments.dtype)))
    if arguments.regime:
        changes["regimes"] = tuple(arguments.regime)
    if arguments.seed is not None:
        changes["seed"] = arguments.seed
    if arguments.eager:
        changes["jit"] = False
    try:
        return replace(case, **changes)
    except ValueError as error:
        raise CaseError(str(error)) from error


def _check_files(arguments: argparse.Namespace, *names: str) -> None:
    """Raise _Usage for a file to write whose folder does not exist: before anything is computed."""
    for name in names:
        path = getattr(arguments, name)
        if path is not None and not path.parent.is_dir():
            raise _Usage(f"--{name} {path}: the folder {path.parent} does not exist")


def _write(option: str, path: Path | None, make: Callable[[], str]) -> None:
    if path is None:
        return
    try:
        path.write_text(make(), encoding="utf-8")
    except OSError as error:
        raise CaseError(f"{option} {path} cannot be written: {error.strerror}") from error


def _run(arguments: argparse.Namespace) -> int:
    _check_files(arguments, "json", "html")
    try:
        policy = Policy() if arguments.threads is None else Policy(threads=arguments.threads)
    except ValueError as error:
        raise _Usage(str(error)) from error
    cases = [_adjusted(case, arguments) for case in _cases(arguments.cases)]
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    results: list[Result] = []
    mutations: dict[str, list[Mutation]] = {}
    held = True
    for case in cases:
        with _progress(case, console, arguments.quiet) as progress:
            battery = Battery(case, policy=policy, progress=progress)
            result = battery.run(arguments.tier)
        results.append(result)
        report.terminal(result, console, table=not arguments.summary)
        held = held and result.held
        if arguments.mutations and result.held:
            with _progress(case, console, arguments.quiet) as progress:
                found = run_mutations(case, policy=policy, healthy=False, battery=battery, progress=progress)
            report.mutations_table(found, console)
            mutations[case.name] = found
            held = held and all(item.held for item in found)
    shown.total(results, console)
    _write("--json", arguments.json, lambda: report.to_json(results, mutations))
    _write("--html", arguments.html, lambda: html.page(results, mutations))
    return 0 if held else 1


@contextlib.contextmanager
def _progress(case: Case, console: Console, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A line that says what is being done, on a terminal."""
    with console.status(case.name, spinner="line") as status:
        yield lambda text: status.update(f"{escape(case.name)}: {escape(text)}") if not quiet and console.is_terminal else None


def _mutate(arguments: argparse.Namespace) -> int:
    _check_files(arguments, "json", "html")
    chosen = [(case, [injector for injector in case.injectors if arguments.unseen or not injector.unseen]) for case in _cases(arguments.cases)]
    lacking, names = [case.name for case, injectors in chosen if not injectors], [case.name for case, _ in chosen]
    if len(set(names)) != len(names):
        raise CaseError(f"cases to mutate need names of their own, found {', '.join(names)}")
    if lacking:
        raise CaseError(f"case {lacking[0]!r} has no injectors: give it some by Case(injectors=...)")
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    mutations: dict[str, list[Mutation]] = {}
    for case, injectors in chosen:
        with _progress(case, console, arguments.quiet) as progress:
            mutations[case.name] = run_mutations(case, injectors, progress=progress)
        console.print(f"injected bugs: {escape(case.name)}")
        report.mutations_table(mutations[case.name], console)
    if len(mutations) > 1:
        for heading, part in kills.parts([item for found in mutations.values() for item in found]):
            console.print(f"all {len(mutations)} cases{f', {heading}' if heading else ''}: {kills.Kills.of(part)}", soft_wrap=True)
    _write("--json", arguments.json, lambda: report.to_json([], mutations))
    _write("--html", arguments.html, lambda: html.page([], mutations, "Injected bugs"))
    return 0 if all(item.held for found in mutations.values() for item in found) else 1


def _report(arguments: argparse.Namespace) -> int:
    if arguments.schema:
        print(json.dumps(records.schema(), indent=2))
        return 0
    if not arguments.files:
        raise _Usage("report needs at least one JSON file, as `parity run --json FILE` writes it")
    _check_files(arguments, "html")
    results, mutations = shown.read(arguments.files)
    _write("--html", arguments.html, lambda: html.page(results, mutations))
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    return 0 if shown.show(results, mutations, console, table=not arguments.summary) else 1


def _convert(arguments: argparse.Namespace) -> int:
    if (arguments.case is None) != (arguments.to is None):
        raise _Usage("--case and --to belong together")
    arrays = formats.load(arguments.source)
    if arguments.case is not None:
        case = _one(arguments.case)
        weight_map = Candidate(case, Recording(case)).map
        arrays = weight_map.to_candidate(arrays) if arguments.to == "candidate" else weight_map.to_reference(arrays)
    formats.save(arguments.target, arrays)
    print(f"{len(arrays)} arrays, {sum(value.size for value in arrays.values()):,} values, written to {arguments.target}")
    return 0


def _map(arguments: argparse.Namespace) -> int:
    from .propose import propose  # with scipy's assignment, which the other commands need not wait for

    case = _one(arguments.case)
    target = arguments.out or Path(re.sub(r"\W+", "_", case.name) + ".map.toml")
    if target.exists() or not target.parent.is_dir():
        raise _Usage(f"{target} exists; give another name by --out" if target.exists() else f"the folder {target.parent} does not exist")
    found = propose(case)
    try:
        target.write_text(mapfile.text(found.rules, found.ties, found.comment(case.name)))
    except OSError as error:
        raise CaseError(f"{target} cannot be written: {error.strerror}") from error
    for note in found.notes:
        print(f"note: {note}")
    told = f"{found.by_fingerprint} told by what the leaves do, {found.by_name} by name"
    print(f"{len(found.rules)} rules, {told}; {found.comment(case.name)[0].partition('; ')[2]}")
    print(f"written to {target}; a case takes it as weights={str(target)!r}")
    return 0


def _one(name: str) -> Case:
    cases = loading.load(name)
    if len(cases) != 1:
        raise CaseError(f"{name} is {len(cases)} cases, expected one")
    return cases[0]


def _diff(arguments: argparse.Namespace) -> int:
    if not arguments.tolerance >= 0.0:
        raise _Usage(f"--tolerance must be at least 0, found {arguments.tolerance}")
    first, second = formats.load(arguments.first), formats.load(arguments.second)
    if not first and not second:
        raise MeasureError(f"nothing to compare: {arguments.first} and {arguments.second} hold no arrays")
    console, different = Console(), 0
    table = Table("array", "relative L2", "largest difference", "cosine", "", box=None, pad_edge=False)
    for name in [*first, *(name for name in second if name not in first)]:
        if name not in first or name not in second:
            row = ("-", "-", "-", f"only in {arguments.first if name in first else arguments.second}")
        else:
            try:
                found = measure(first[name], second[name])
            except MeasureError as error:
                row = ("-", "-", "-", str(error))
            else:
                good = found.mismatched == 0 or found.relative_l2 <= arguments.tolerance
                if good:
                    continue
                row = (locate.number(found.relative_l2), f"{locate.number(found.max_abs)} at {list(found.max_abs_at)}", f"{found.cosine:.6f}",
                       found.note)
        different += 1
        table.add_row(escape(name), *map(escape, row))
    if different:
        console.print(table)
    names = set(first) | set(second)
    console.print(f"{different} of {len(names)} arrays differ" if different else f"{len(names)} arrays are equal"
                  + (f" to {arguments.tolerance:g}" if arguments.tolerance else ", value for value"), soft_wrap=True)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
