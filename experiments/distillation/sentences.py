"""Sentences: those of prose in the text corpus, and those of a file.

Documentation is prose between examples, tables and signatures. A paragraph is a run of lines without a blank one; its lines are joined
and split where a full stop, question or exclamation mark is followed by a capital. Kept is what has the form of a sentence: it ends with
such a mark, has 4 to 60 words, and consists mostly of letters.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.errors import RunError

WORDS = (4, 60)
_BULLET = re.compile(r"^\s*(?:[*•-]|\(?\d+[.)])\s+")
_CODE = re.compile(r"^\s*(?:>>>|\.\.\.(?:\s|$)|\$ |\+[-=+]+|[-=~^*]{3,}|\||\.\. |:\w+.*:|@\w)")
_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))\s+(?=[\"'(\[]*[A-Z])")
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|cf|vs|resp|approx|Mr|Mrs|Ms|Dr|St|No|Fig|Inc|[A-Z])|\s[A-Z])\.$")
_SENTENCE = re.compile(r"^[\"'(\[]*[A-Z0-9].*[.!?][\"')\]]*$")


def split(text: str) -> list[str]:
    """Sentences of prose, in order."""
    return [sentence for paragraph in _paragraphs(text) for sentence in _sentences(paragraph) if is_sentence(sentence)]


def is_sentence(text: str) -> bool:
    """Whether `text` has the form of a sentence of prose."""
    letters = sum(character.isalpha() or character == " " for character in text)
    return bool(_SENTENCE.match(text)) and WORDS[0] <= len(text.split()) <= WORDS[1] and letters >= 0.8 * len(text)


def _paragraphs(text: str) -> Iterator[str]:
    """Runs of lines, joined; an item of a list is a run of its own, and a run with a line of code or of a table is left out."""
    lines: list[str] = []
    code = False
    for line in [*text.splitlines(), ""]:
        bullet = _BULLET.match(line)
        if not line.strip() or bullet:
            if lines and not code:
                yield " ".join(lines)
            lines, code = [], False
        if line.strip():
            lines.append(" ".join((line[bullet.end() :] if bullet else line).split()))
            code = code or bool(_CODE.match(line))


def _sentences(paragraph: str) -> Iterator[str]:
    held = ""
    for piece in _END.split(paragraph):
        held = f"{held} {piece}" if held else piece
        if not _ABBREVIATION.search(held):
            yield held
            held = ""
    if held:
        yield held


def read(path: Path) -> list[str]:
    """Sentences of a file, each once, in order: its lines, or, of a .csv or .tsv file, the cells of its text columns.

    A column is of text if at least half of its cells hold a space and no number; so a score, an id or a label is never read. Raises
    RunError, naming the path, for a file that is missing, empty, not UTF-8 or without such a column.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RunError(f"data.sentences: no file {path}") from error
    except UnicodeDecodeError as error:
        raise RunError(f"data.sentences: {path} is not UTF-8 text: byte {error.object[error.start]:#04x} at offset {error.start}") from error
    except OSError as error:
        raise RunError(f"data.sentences: cannot read {path}: {error.strerror or error}") from error
    delimiter = {".csv": ",", ".tsv": "\t"}.get(path.suffix.lower())
    if delimiter is None:
        found = text.splitlines()
    else:
        try:
            rows = [row for row in csv.reader(text.splitlines(keepends=True), delimiter=delimiter) if row]
        except csv.Error as error:
            raise RunError(f"data.sentences: {path} is not a table: {error}") from error
        columns = _text_columns(rows)
        if rows and not columns:
            raise RunError(f"data.sentences: {path} has no column of sentences among its {max(map(len, rows))}")
        rows = rows[1:] if _has_header(rows, columns) else rows
        found = [row[column] for row in rows for column in columns if column < len(row)]
    sentences = list(dict.fromkeys(sentence for sentence in (" ".join(line.split()) for line in found) if sentence))
    if not sentences:
        raise RunError(f"data.sentences: {path} holds no sentence")
    return sentences


def _text_columns(rows: Sequence[Sequence[str]]) -> list[int]:
    columns = []
    for index in range(max((len(row) for row in rows), default=0)):
        cells = [row[index] for row in rows if index < len(row)]
        if 2 * sum(" " in cell.strip() and not is_number(cell) for cell in cells) >= len(cells):
            columns.append(index)
    return columns


def _has_header(rows: Sequence[Sequence[str]], columns: Sequence[int]) -> bool:
    """Whether the first row names the columns: none of its text cells holds a space, as sentences of several words do."""
    return len(rows) > 1 and all(" " not in rows[0][column].strip() for column in columns if column < len(rows[0]))


def is_number(text: str) -> bool:
    """Whether `float` reads the text."""
    try:
        float(text)
    except ValueError:
        return False
    return True
