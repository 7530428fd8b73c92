"""The `parity` command: run cases, put bugs into them, show reports again, convert weights, propose weight maps, compare two files of named arrays.

Exit status: 0 everything held, 1 something did not, 2 the question itself was wrong (one line on standard error).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.markup import escape
from rich.table import Table

from . import formats, golden, html, kills, loading, locate, mapfile, records, report, shown
from .adapters.base import Unsupported
from .answers import GoldenError
from .battery import TIERS, Battery, Result
from .bounds import BoundError
from .candidate import Candidate
from .case import DTYPES, Case, CaseError
from .convert import ConversionError
from .measure import MeasureError, measure
from .mutate import Mutation, run_mutations
from .output import Output, Usage, check_folders, dropped, progress, write
from .policy import Policy
from .recording import Recording

USER_ERRORS = (CaseError, BoundError, ConversionError, formats.FormatError, MeasureError, Unsupported, GoldenError,
               records.ReportError)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise Usage(f"{message} (see {self.prog} --help)")


def _parser() -> _Parser:
    parser = _Parser(prog="parity", description="Do a reference and a candidate compute the same thing, and if not, where do they part?")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    case_help = "file.py:name, module:name, or the name of one of the [tool.parity] cases of the nearest pyproject.toml; without one, all of these"

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
    convert.add_argument("--shard-size", default=formats.SHARD_SIZE, metavar="SIZE", help="of shards beside an index (default: 5GB)")
    convert.add_argument("--to", choices=["candidate", "reference"], help="whose names the result has; needs --case")

    mapping = commands.add_parser("map", help="propose a weight map for a case, verify it by gradients, and write it as a file")
    mapping.add_argument("case", metavar="CASE", help=case_help.partition(";")[0])
    mapping.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: NAME.map.toml in this folder)")

    made = commands.add_parser("golden", help="write what the reference computes as a file, or compare the candidate to such a file")
    made.add_argument("case", metavar="CASE", help=case_help.partition(";")[0])
    made.add_argument("--out", type=Path, metavar="FILE.npz", help="write the file; needs what the reference is written in")
    made.add_argument("--check", type=Path, metavar="FILE.npz", help="compare to the file; needs what the side is written in")
    made.add_argument("--side", choices=["candidate", "reference"], default="candidate", help="what is compared to the file (default: the candidate)")
    made.add_argument("--regime", action="append", help="write this regime only beside the plain ones (may be repeated)")
    made.add_argument("--tier", action="append", choices=list(TIERS), help="check this tier only (may be repeated)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the report of the check as JSON as well")
    made.add_argument("--html", type=Path, metavar="FILE", help="write the report of the check as one HTML page as well")
    made.add_argument("--summary", action="store_true", help="no table of layers")

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
        commands = {"run": _run, "mutate": _mutate, "report": _report, "convert": _convert, "map": _map, "golden": _golden, "diff": _diff}
        status = commands[arguments.command](arguments)
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            dropped()
        return status
    except (Usage, *USER_ERRORS) as error:
        lines = str(error).splitlines()
        print(f"parity: {lines[0]}" + "".join(f";{line.replace('  ', ' ', 1)}" for line in lines[1:]), file=sys.stderr)
        return 2
    except SystemExit as error:
        if arguments is None:  # --help
            raise
        print(f"parity: a case ended the program (exit status {error.code}) before it was compared", file=sys.stderr)
        return 2
    except BrokenPipeError:  # of a plain print
        dropped()
        return 141
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
    return _replaced(case, **changes)


def _replaced(case: Case, **changes: object) -> Case:
    try:
        return replace(case, **changes)
    except ValueError as error:
        raise CaseError(str(error)) from error


def _run(arguments: argparse.Namespace) -> int:
    check_folders(arguments, "json", "html")
    try:
        policy = Policy() if arguments.threads is None else Policy(threads=arguments.threads)
    except ValueError as error:
        raise Usage(str(error)) from error
    cases = [_adjusted(case, arguments) for case in _cases(arguments.cases)]
    console = Output()
    results: list[Result] = []
    mutations: dict[str, list[Mutation]] = {}
    held = True
    for case in cases:
        with progress(case, console, arguments.quiet) as told:
            battery = Battery(case, policy=policy, progress=told)
            result = battery.run(arguments.tier)
        results.append(result)
        report.terminal(result, console, table=not arguments.summary)
        held = held and result.held
        if arguments.mutations and result.held:
            with progress(case, console, arguments.quiet) as told:
                found = run_mutations(case, policy=policy, healthy=False, battery=battery, progress=told)
            report.mutations_table(found, console)
            mutations[case.name] = found
            held = held and all(item.held for item in found)
    shown.total(results, console)
    write("--json", arguments.json, lambda: report.to_json(results, mutations))
    write("--html", arguments.html, lambda: html.page(results, mutations))
    return 0 if held else 1


def _mutate(arguments: argparse.Namespace) -> int:
    check_folders(arguments, "json", "html")
    chosen = [(case, [injector for injector in case.injectors if arguments.unseen or not injector.unseen]) for case in _cases(arguments.cases)]
    lacking, names = [case.name for case, injectors in chosen if not injectors], [case.name for case, _ in chosen]
    if len(set(names)) != len(names):
        raise CaseError(f"cases to mutate need names of their own, found {', '.join(names)}")
    if lacking:
        raise CaseError(f"case {lacking[0]!r} has no injectors: give it some by Case(injectors=...)")
    console = Output()
    mutations: dict[str, list[Mutation]] = {}
    for case, injectors in chosen:
        with progress(case, console, arguments.quiet) as told:
            mutations[case.name] = run_mutations(case, injectors, progress=told)
        console.print(f"injected bugs: {escape(case.name)}")
        report.mutations_table(mutations[case.name], console)
    if len(mutations) > 1:
        for heading, part in kills.parts([item for found in mutations.values() for item in found]):
            console.print(f"all {len(mutations)} cases{f', {heading}' if heading else ''}: {kills.Kills.of(part)}", soft_wrap=True)
    write("--json", arguments.json, lambda: report.to_json([], mutations))
    write("--html", arguments.html, lambda: html.page([], mutations, "Injected bugs"))
    return 0 if all(item.held for found in mutations.values() for item in found) else 1


def _report(arguments: argparse.Namespace) -> int:
    if arguments.schema:
        print(json.dumps(records.schema(), indent=2))
        return 0
    if not arguments.files:
        raise Usage("report needs at least one JSON file, as `parity run --json FILE` writes it")
    check_folders(arguments, "html")
    results, mutations = shown.read(arguments.files)
    write("--html", arguments.html, lambda: html.page(results, mutations))
    console = Output()
    return 0 if shown.show(results, mutations, console, table=not arguments.summary) else 1


def _convert(arguments: argparse.Namespace) -> int:
    if (arguments.case is None) != (arguments.to is None):
        raise Usage("--case and --to belong together")
    arrays = formats.load(arguments.source)
    if arguments.case is not None:
        case = _one(arguments.case)
        candidate = Candidate(case, Recording(case))
        keyed = getattr(candidate.adapters["float64"], "keyed", dict)()  # Linen keeps its variables in collections
        if arguments.to == "candidate":
            arrays = candidate.map.to_candidate(arrays)
            if arguments.target.suffix in formats.NESTED:
                arrays = {keyed.get(name, name): value for name, value in arrays.items()}
        else:
            names = {key: name for name, key in keyed.items()}
            arrays = candidate.map.to_reference({names.get(key, key): value for key, value in arrays.items()})
    formats.save(arguments.target, arrays, shard_size=arguments.shard_size)
    print(f"{len(arrays)} arrays, {sum(value.size for value in arrays.values()):,} values, written to {arguments.target}")
    return 0


def _map(arguments: argparse.Namespace) -> int:
    from .propose import propose  # with scipy's assignment, which the other commands need not wait for

    case = _one(arguments.case)
    target = arguments.out or Path(re.sub(r"\W+", "_", case.name) + ".map.toml")
    if target.exists() or not target.parent.is_dir():
        raise Usage(f"{target} exists; give another name by --out" if target.exists() else f"the folder {target.parent} does not exist")
    found = propose(case)
    try:
        formats.write_text(target, mapfile.text(found.rules, found.ties, found.comment(case.name)))
    except OSError as error:
        raise CaseError(f"{target} cannot be written: {error.strerror}") from error
    for note in found.notes:
        print(f"note: {note}")
    told = f"{found.by_fingerprint} told by what the leaves do, {found.by_name} by name"
    print(f"{len(found.rules)} rules, {told}; {found.comment(case.name)[0].partition('; ')[2]}")
    print(f"written to {target}; a case takes it as weights={str(target)!r}")
    return 0


def _golden(arguments: argparse.Namespace) -> int:
    if (arguments.out is None) == (arguments.check is None):
        raise Usage("golden needs either --out FILE.npz, which writes the file, or --check FILE.npz, which compares to it")
    wrong = [name for name in ("tier", "json", "html", "summary") if arguments.out and getattr(arguments, name)]
    wrong += ["regime"] if arguments.check and arguments.regime else []
    if wrong or (arguments.out and arguments.side != "candidate"):
        raise Usage(f"--{(wrong or ['side'])[0]} belongs to {'--check' if arguments.out else '--out'}")
    check_folders(arguments, "out", "json", "html")
    if arguments.out and arguments.out.suffix != ".npz":
        raise Usage(f"--out {arguments.out}: a golden file is an .npz")
    case = _one(arguments.case)
    console = Output()
    with progress(case, console) as told:
        if arguments.out:
            plain = ("as is", "carried state")[:1 if case.states is None else 2]
            changed = case if not arguments.regime else _replaced(case, regimes=tuple(dict.fromkeys((*plain, *arguments.regime))))
            count, size, notes = golden.write(arguments.out, changed, progress=told)
        else:
            result = golden.check(arguments.check, case, side=arguments.side, progress=told).run(arguments.tier)
    if arguments.out:
        for note in notes:
            console.print(f"note: {escape(note)}", soft_wrap=True)
        console.print(f"{count} arrays, {size:,} bytes, written to {escape(str(arguments.out))}", soft_wrap=True)
        return 0
    report.terminal(result, console, table=not arguments.summary)
    write("--json", arguments.json, lambda: report.to_json([result]))
    write("--html", arguments.html, lambda: html.page([result]))
    return 0 if result.held else 1


def _one(name: str) -> Case:
    cases = loading.load(name)
    if len(cases) != 1:
        raise CaseError(f"{name} is {len(cases)} cases, expected one")
    return cases[0]


def _diff(arguments: argparse.Namespace) -> int:
    if not arguments.tolerance >= 0.0:
        raise Usage(f"--tolerance must be at least 0, found {arguments.tolerance}")
    first, second = formats.load(arguments.first), formats.load(arguments.second)
    if not first and not second:
        raise MeasureError(f"nothing to compare: {arguments.first} and {arguments.second} hold no arrays")
    console, different = Output(), 0
    table = Table("array", "relative L2", "largest difference", "cosine", "", box=None, pad_edge=False)
    for name in [*first, *(name for name in second if name not in first)]:
        if name not in first or name not in second:
            row = ("-", "-", "-", f"only in {arguments.first if name in first else arguments.second}")
        elif "U" in (first[name].dtype.kind, second[name].dtype.kind):  # text, as golden files have it beside their numbers
            if np.array_equal(first[name], second[name]):
                continue
            row = ("-", "-", "-", "another text")
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
