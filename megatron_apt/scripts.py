"""What the scripts under tools/ share: bad arguments are found before the work, and
errors that a user can cause end with one message.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron_apt import outputs
from megatron_apt.errors import described, is_expected


def run(main: Callable[[], int | None]) -> NoReturn:
    """Ends the process with main's exit code, or with one message."""
    name = Path(sys.argv[0]).stem
    try:
        code = main()
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)  # as shells have it
    except Exception as error:
        if not is_expected(error):
            raise
        sys.exit(f"{name}: {described(error)}")
    sys.exit(code)


# Types of arguments, for argparse.


def output_file(text: str) -> str:
    """A file that can be written; empty for none."""
    try:
        outputs.check("FILE", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("FILE=")) from None
    return text


def whole(least: int, most: int = 10**6) -> Callable[[str], int]:
    """A whole number in [least, most]."""
    return lambda text: int(_bounded(text, int, "a whole number", least, most))


def number(least: float, most: float = 1e9) -> Callable[[str], float]:
    """A number in [least, most]; NaN is none."""
    return lambda text: _bounded(text, float, "a number", least, most)


def _bounded(text: str, kind: type, what: str, least: float, most: float) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text[:100]!r} is not {what} between {least:,} and {most:,}")
    return value
