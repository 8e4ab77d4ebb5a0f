"""What is wrong with an input file. Apart from the decoders, so that readers of shards need none."""

import math
import os
import unicodedata
from pathlib import Path

# Characters of a value or reason that a record holds: what came from outside may be of
# any length
MOST_SHOWN = 200


class RejectedInput(ValueError):
    """An input file that cannot become a sample.

    Attributes:
        file, field, value, remedy: what is wrong with which file, and what to do about
            it. For a line of a manifest, file is MANIFEST:LINE.
    """

    def __init__(self, file: str | Path, field: str, value: object, remedy: str):
        self.file, self.field, self.value, self.remedy = shown(file), field, _plain(value), shown(remedy)
        super().__init__(f"{self.file}: {field}={self.value}: {self.remedy}")

    def as_dict(self) -> dict:
        return {"file": self.file, "field": self.field, "value": self.value, "remedy": self.remedy}


def shown(name: str | os.PathLike) -> str:
    r"""A name as printable UTF-8: bytes that are not UTF-8 and control characters are
    written \xNN, everything else as it is.
    """
    text = os.fsencode(name).decode("utf-8", "backslashreplace") if isinstance(name, os.PathLike) else name
    if text.isprintable():
        return text
    return "".join(c if not _unprintable(c) else _escaped(c) for c in text)


def _unprintable(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def _escaped(character: str) -> str:
    code = ord(character)
    code = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code  # how Python keeps a byte that is not UTF-8
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _plain(value: object) -> object:
    """A value that JSON can hold and a line can show."""
    if (
        value is None
        or (isinstance(value, bool | int) and abs(value) < 2**53)
        or (isinstance(value, float) and math.isfinite(value))
    ):
        return value
    text = shown(value if isinstance(value, str) else _represented(value))
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}... ({len(text)} characters)"


def _represented(value: object) -> str:
    try:
        return repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python converts, lists in lists
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
