"""Checks of single fields of a model's shape: each raises ValueError naming field, value and remedy."""

import math
from typing import get_args, get_type_hints

# Of which no honest model comes near; beyond them shapes overflow, and loops over blocks
# take for ever
DEEPEST, WIDEST = 10**4, 10**6


def short(value: object) -> str:
    """As Python writes it, cut where a damaged file has put a long one."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def check_whole(config: object, where: str, low: int, high: int, *names: str) -> None:
    """Raises ValueError for a field that is no whole number from low to high."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{where}{name}={short(value)}: must be a whole number")
        if value < low:
            raise ValueError(
                f"{where}{name}={value}: must {f'be at least {low}' if low else 'not be negative'}"
            )
        if value > high:
            raise ValueError(
                f"{where}{name}={value if value < 2**64 else 'of many digits'}: must be at most {high}"
            )


def check_tuples(config: object, where: str, **lengths: int | None) -> None:
    """Raises ValueError for a field that is no tuple of so many whole numbers (None: any number of them)."""
    for name, length in lengths.items():
        value = getattr(config, name)
        whole = isinstance(value, tuple) and all(
            isinstance(part, int) and not isinstance(part, bool) for part in value
        )
        if not whole or (length is not None and len(value) != length):
            raise ValueError(
                f"{where}{name}={short(value)}: must be {'a list of' if length is None else length} whole "
                "numbers"
            )
        if len(value) > DEEPEST:
            raise ValueError(f"{where}{name}: has {len(value)} numbers; must have at most {DEEPEST}")
        if any(not abs(part) <= WIDEST for part in value):
            raise ValueError(
                f"{where}{name}={short(value) if max(map(abs, value)) < 2**64 else 'of many digits'}: must "
                f"be at most {WIDEST}"
            )


def check_choices(config: object, where: str, *names: str) -> None:
    """Raises ValueError for a field whose value is none of those that its type lists, or
    is no bool where it is one.
    """
    hints = get_type_hints(type(config))
    for name in names:
        value, choices = getattr(config, name), get_args(hints[name]) or (True, False)
        if not isinstance(value, type(choices[0])) or value not in choices:
            raise ValueError(f"{where}{name}={short(value)}: use {', '.join(map(repr, choices))}")


def check_number(value: object, name: str, low: float) -> None:
    """Raises ValueError for what is no finite number of at least low."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < math.inf:
        raise ValueError(
            f"{name}={short(value)}: must be a finite number, "
            f"{'not negative' if low == 0 else f'at least {low:g}'}"
        )
