"""JSON from outside, parsed by declared types: what does not fit is one message that
names file, field, value and remedy.

A type is a dataclass, a TypedDict, a msgspec.Struct or a plain annotation such as
dict[str, int]; bounds are written as Annotated[int, msgspec.Meta(ge=0)]. Python's parser
reads the text, because our own files may hold NaN (a mean loss of a diverged run).
"""

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

T = TypeVar("T")

Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
"""A number of things: samples, iterations, bytes."""
Positive = Annotated[int, msgspec.Meta(ge=1, lt=2**53)]

# Or a half of a whole pair
_SURROGATE_BYTES = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")

# Of one JSON file: no honest one comes near, and a hostile one must not fill the memory
MOST_BYTES = 64 << 20


def read_json(
    file: str | os.PathLike,
    kind: type[T] | Any,
    *,
    remedy: str,
    error: type[ValueError] = ValueError,
    most: int = MOST_BYTES,
) -> T:
    """The contents of a JSON file as `kind`.

    Raises:
        error: unreadable, larger than `most` bytes, not JSON, or of another type or
            range; names file, field and remedy.
    """
    return parse_json(
        read_bytes(file, remedy=remedy, error=error, most=most), kind, str(file), remedy=remedy, error=error
    )


def read_bytes(
    file: str | os.PathLike, *, remedy: str, error: type[ValueError] = ValueError, most: int = MOST_BYTES
) -> bytes:
    """A whole file of at most `most` bytes.

    Raises:
        error: it cannot be read, or is larger.
    """
    try:
        with open(file, "rb", opener=never_waiting) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise error(f"{os.fspath(file)}: is no plain file; {remedy}")
            data = stream.read(most + 1)
    except OSError as failure:
        raise error(f"{os.fspath(file)}: {failure.strerror or failure}; {remedy}") from None
    if len(data) > most:
        raise error(
            f"{os.fspath(file)}: {os.path.getsize(file)} bytes, more than the {most} that such a file may "
            f"have; {remedy}"
        )
    return data


def never_waiting(path: str, flags: int) -> int:
    """An opener that opens a pipe, too, without waiting for who is at its other end."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def parse_json(
    data: bytes | str, kind: type[T] | Any, where: str, *, remedy: str, error: type[ValueError] = ValueError
) -> T:
    """JSON text as `kind`; `where` (a file, or file:line) begins every message.

    Raises:
        error: not JSON, or of another type or range.
    """
    try:
        value = json.loads(data)
        if _SURROGATE.search(data) if isinstance(data, str) else _SURROGATE_BYTES.search(data):
            # What cannot be written again cannot be printed or be the name of a file
            # either
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise error(f"{where}: nested too deeply; {remedy}") from None
    except ValueError as failure:  # not JSON, not UTF-8, or a number of more digits than Python converts
        raise error(f"{where}: not JSON ({failure}); {remedy}") from None
    return convert(value, kind, where, remedy=remedy, error=error)


def parse_json_lines(
    file: Path, kind: type[T] | Any, *, remedy: str, error: type[ValueError] = ValueError
) -> Iterator[T]:
    """One object of `kind` for each line of a JSON Lines file of our own writing.

    Raises:
        error: naming file and line.
    """
    decoder = msgspec.json.Decoder(kind)
    try:
        with open(file, "rb") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(MOST_BYTES + 1), b""), 1):
                try:
                    yield decoder.decode(line)
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as failure:
                    raise error(f"{file}:{number}: {_described(failure)}; {remedy}") from None
    except OSError as failure:
        raise error(f"{file}: {failure.strerror or failure}; {remedy}") from None


def convert(
    value: object,
    kind: type[T] | Any,
    where: str,
    *,
    at: str = "",
    remedy: str,
    error: type[ValueError] = ValueError,
) -> T:
    """A value that json.loads gave, as `kind`; it stands in `where`, at field `at` of it.

    Raises:
        error: of another type or range; names the field.
    """
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError, UnicodeError, OverflowError) as failure:
        raise error(f"{where}: {_described(failure, at)}; {remedy}") from None


def _described(failure: Exception, at: str = "") -> str:
    """`Expected int, got str - at $.updates.generator` with the field first."""
    what, _, place = str(failure).replace("`", "").partition(" - at $")
    place = f"{at}{place.strip()}".removeprefix(".")
    return f"{place}: {what}" if place else what
