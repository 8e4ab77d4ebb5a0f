"""What is wrong with an input file. Apart from the decoders, so that readers of shards need none."""

import math
from pathlib import Path

from megatron_apt.errors import shown

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
