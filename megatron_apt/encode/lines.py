"""Lines of a manifest: streamed, bounded, in one encoding for the whole file; a bad line
is named and the next goes on.
"""

import codecs
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_apt.encode.rejected import RejectedInput
from megatron_apt.encode.written import AS_UTF8, MARKS, as_cp1252, utf16_without_mark

MOST_LINE = 1 << 20  # characters
BLOCK = 1 << 20  # bytes read at once


class Line(NamedTuple):
    """number counts from 1; text ends with its line break; problem says why the text (cut
    then) cannot be used, note what was done to read it.
    """

    number: int
    text: str
    problem: str | None = None
    note: str = ""


def read_lines(source: Path) -> Iterator[Line]:
    r"""Lines end at \n, \r\n or \r and nowhere else: U+2028 and U+0085 are text.

    Raises:
        OSError: the file cannot be read.
    """
    encoding, skipped = _encoding(source)
    with open(source, "rb") as file:
        file.seek(skipped)
        # Bad bytes of UTF-8 come through as lone surrogates, so that a line knows its
        # own; what else there is has only U+FFFD for them.
        kind, errors = (
            ("utf-8", "surrogateescape") if encoding in ("utf-8", "cp1252") else (encoding, "replace")
        )
        stream = io.TextIOWrapper(file, kind, errors, newline="")
        number = 0
        while text := stream.readline(MOST_LINE + 1):
            number += 1
            if len(text) > MOST_LINE and not text.endswith(("\n", "\r")):
                _skip(stream)
                yield Line(number, text[:80], f"longer than {MOST_LINE} characters; shorten it")
            else:
                yield _line(number, text.removeprefix("\ufeff"), encoding)  # of files that were joined


def bad_line(source: Path, line: Line, problem: str) -> RejectedInput:
    return RejectedInput(f"{source}:{line.number}", "line", line.text.strip(), problem)


def _line(number: int, text: str, encoding: str) -> Line:
    if text.isascii():
        return Line(number, text)
    try:
        data = text.encode("utf-8", "surrogateescape")
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        if encoding == "cp1252":
            return Line(
                number,
                data.decode("cp1252"),
                note=f"the manifest is read as cp1252; {AS_UTF8} to be sure of it",
            )
        return Line(number, text, f"not UTF-8 (byte {error.start}); {AS_UTF8}")
    return Line(number, text)


def _skip(stream: io.TextIOWrapper) -> None:
    """The rest of a line."""
    while (text := stream.readline(BLOCK)) and not text.endswith(("\n", "\r")):
        pass


def _encoding(source: Path) -> tuple[str, int]:
    """(encoding, bytes of its mark) of a whole manifest."""
    with open(source, "rb") as file:
        start = file.read(64 << 10)
        for mark, encoding in MARKS:
            if start.startswith(mark):
                return encoding, len(mark)
        unmarked = utf16_without_mark(start)
        if unmarked is not None:
            return unmarked, 0
        file.seek(0)
        return ("utf-8" if _is_utf8(file) else _eight_bit(file)), 0


def _is_utf8(file: io.BufferedReader) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        while block := file.read(BLOCK):
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _eight_bit(file: io.BufferedReader) -> str:
    """cp1252 if every line beyond ASCII reads as that, none as UTF-8; else UTF-8 with bad lines."""
    file.seek(0)
    while line := file.readline(MOST_LINE):
        if not line.isascii() and (_decodes(line) or as_cp1252(line) is None):
            return "utf-8"
    return "cp1252"


def _decodes(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
