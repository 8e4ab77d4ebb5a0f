"""Records of a CSV manifest. Whatever is wrong with one (quotes, commas, lengths) costs
that line, never what follows it and never half a caption.
"""

import csv
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_apt.encode.kinds import MEDIA_SUFFIXES, UNDECODED, suffix_of
from megatron_apt.encode.lines import MOST_LINE, Line, bad_line, read_lines
from megatron_apt.encode.rejected import RejectedInput
from megatron_apt.errors import shown

# Of one record: captions may have line breaks in quotes, but a quote that is never closed
# would swallow the file
MOST_LINES = 100
OPEN_QUOTE = (
    'a quotation mark opens here and closes nowhere sensible; close it, and write a " inside a '
    'quoted field as ""'
)
COLUMNS = "the first line must name path and caption (and may name start, fps), separated by commas"


class Row(NamedTuple):
    line: Line
    fields: dict[str, str]


class _Open(Exception):
    """A record goes on for too long, or into a line that cannot be read."""


def read_csv(source: Path) -> Iterator[Row | RejectedInput]:
    """Rows by the names of the first line, in the file's order.

    A line that is no row gives its RejectedInput.

    Raises:
        ValueError: no readable first line, or one without path, with a name twice, or
            with other separators than commas.
    """
    lines = _Lines(read_lines(source))
    header = None
    while (first := lines.take()) is not None:
        record = _record(lines, first, header)
        if isinstance(record, list) and not any(field.strip() for field in record):
            continue
        if header is None:
            header = _header(source, first, record)
        elif isinstance(record, str):
            yield bad_line(source, first, record)
        else:
            yield _row(source, first, record, header)
    if header is None:
        raise ValueError(f"{shown(source)}: no entries; {COLUMNS}")


class _Lines:
    """Lines that can be handed back."""

    def __init__(self, lines: Iterator[Line]):
        self._lines, self._back = lines, deque()

    def take(self) -> Line | None:
        return self._back.popleft() if self._back else next(self._lines, None)

    def give_back(self, lines: list[Line]) -> None:
        self._back.extendleft(reversed(lines))


def _record(lines: _Lines, first: Line, header: list[str] | None) -> list[str] | str:
    """Fields of the record that begins with this line, or what is wrong with it; then the
    lines after the first are still to be read.
    """
    if first.problem:
        return first.problem
    taken = [first]
    try:
        fields = next(csv.reader(_feed(lines, taken), strict=True, skipinitialspace=True))
        if not any(_looks_like_row(line.text, header) for line in taken[1:]):
            return fields
        problem = OPEN_QUOTE
    except (csv.Error, _Open) as error:
        problem = _csv_problem(error)
    lines.give_back(taken[1:])
    return problem


def _feed(lines: _Lines, taken: list[Line]) -> Iterator[str]:
    """Text of the first line, then of as many as the reader asks for."""
    yield taken[0].text
    length = len(taken[0].text)
    while (line := lines.take()) is not None:
        taken.append(line)
        length += len(line.text)
        if line.problem or length > MOST_LINE or len(taken) > MOST_LINES:
            raise _Open
        yield line.text


def _looks_like_row(text: str, header: list[str] | None) -> bool:
    """Whether a line inside a quoted field is really the next row: as many fields, and a
    picture or video where the path belongs.
    """
    if header is None:
        return False
    try:
        fields = next(csv.reader([text], skipinitialspace=True), [])
    except csv.Error:
        return False
    return (
        len(fields) == len(header)
        and suffix_of(fields[header.index("path")].strip()) in MEDIA_SUFFIXES | UNDECODED.keys()
    )


def _csv_problem(error: Exception) -> str:
    text = str(error)
    if "field larger" in text:
        return f"{text}; shorten it, or close a quotation mark"
    if "expected after" in text:
        return f'text behind a closing quotation mark; write a " inside a quoted field as "" ({text})'
    return OPEN_QUOTE


def _header(source: Path, first: Line, record: list[str] | str) -> list[str]:
    where = f"{shown(source)}:{first.number}"
    names = [] if isinstance(record, str) else [name.strip().lower() for name in record]
    for separator, called in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if "path" not in names and "path" in [
            name.strip(' "').lower() for name in first.text.strip().split(separator)
        ]:
            raise ValueError(
                f"{where}: columns are separated by {called} ({shown(first.text.strip()[:200])}); {COLUMNS}"
            )
    if isinstance(record, str):
        raise ValueError(f"{where}: {record}")
    if "path" not in names:
        raise ValueError(f"{where}: columns {[shown(name)[:80] for name in record[:20]]}; {COLUMNS}")
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise ValueError(f"{where}: column {shown(twice[0])!r} is there twice; name each column once")
    return names


def _row(source: Path, first: Line, record: list[str], header: list[str]) -> Row | RejectedInput:
    if len(record) > len(header):
        problem = (
            f"{len(record)} fields, but {len(header)} columns; put a caption with commas in quotation marks"
        )
        return bad_line(source, first, problem)
    fields = dict(zip(header, record, strict=False))
    unnamed = [text for name, text in zip(header, record, strict=False) if not name and text.strip()]
    if unnamed:
        return bad_line(
            source,
            first,
            f"{unnamed[0]!r} stands in a column without a name; put a caption with commas in quotation marks",
        )
    return Row(first, fields)
