"""Pickles read as data: nothing is imported, called, or made into an object of any class.

A pickle is a program for a small stack machine. torch_dist's own index is one, and each
record of its files begins with one. This machine runs the few instructions that those
need. Where Python would import a name, it puts down a Name if the reader knows that one;
where Python would call what it imported, a Made that says with which arguments. What to
make of those is up to the reader.
"""

import pickletools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

# Some 10 seconds and 1 GB at most; the index of a 14B APT run written by 64 ranks has
# about half as many
MOST_STEPS = 8_000_000


class Unreadable(ValueError):
    """Not a pickle of the kind that is read here."""


@dataclass(frozen=True)
class Name:
    """What a pickle calls by module and name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Made:
    """What Python would make by calling `of`, and then give `state`."""

    of: Name
    arguments: tuple
    state: object = None

    def __repr__(self) -> str:
        return f"<{self.of}>"


@dataclass(slots=True, eq=False)
class Pairs:
    """A dictionary whose keys may be anything, in order."""

    items: list = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<{len(self.items)} pairs>"


@dataclass(slots=True, eq=False)
class Persistent:
    """What a pickle refers to and does not hold."""

    key: object


_PUSHED = (
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "SHORT_BINUNICODE",
    "BINUNICODE",
    "SHORT_BINBYTES",
    "BINBYTES",
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class _Machine:
    def __init__(self, allowed: Collection[Name], what: str):
        self.allowed, self.what = allowed, what
        self.stack: list = []
        self.below: list[list] = []  # stacks under the marks
        self.memo: dict[int, object] = {}
        self.steps: dict[str, Callable[[Any], object]] = {
            **dict.fromkeys(_PUSHED, self._push),
            **{name: lambda _, value=value: self.stack.append(value) for name, value in _CONSTANTS.items()},
            **{f"TUPLE{n}": lambda _, n=n: self._tuple(n) for n in (1, 2, 3)},
            **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda _: None),
            **dict.fromkeys(("BINPUT", "LONG_BINPUT"), self._put),
            **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda key: self.stack.append(self.memo[key])),
            **dict.fromkeys(("REDUCE", "NEWOBJ"), self._make),
            "EMPTY_LIST": lambda _: self.stack.append([]),
            "EMPTY_DICT": lambda _: self.stack.append(Pairs()),
            "MARK": self._mark,
            "TUPLE": lambda _: self._push_after_mark(tuple),
            "APPEND": lambda _: self._extend([self.stack.pop()]),
            "APPENDS": lambda _: self._extend(self._to_mark()),
            "SETITEM": lambda _: self._set([self.stack.pop(-2), self.stack.pop()]),
            "SETITEMS": lambda _: self._set(self._to_mark()),
            "MEMOIZE": lambda _: self._put(len(self.memo)),
            "GLOBAL": lambda text: self._name(*text.split(" ", 1)),
            "STACK_GLOBAL": lambda _: self._name(self.stack.pop(-2), self.stack.pop()),
            "BUILD": self._build,
            "BINPERSID": lambda _: self.stack.append(Persistent(self.stack.pop())),
        }

    def run(self, data: bytes) -> object:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            step = self.steps.get(opcode.name)
            if step is None:
                raise Unreadable(
                    f"its {self.what} has the instruction {opcode.name}, which no checkpoint {self.what} "
                    "needs; do not load this checkpoint"
                )
            if count > MOST_STEPS:
                raise Unreadable(f"its {self.what} has more than {MOST_STEPS} instructions")
            step(argument)
        if len(self.stack) != 1 or self.below:
            raise Unreadable(f"its {self.what} leaves more than one value")
        return self.stack[0]

    def _push(self, value: object) -> None:
        self.stack.append(value)

    def _put(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def _mark(self, _) -> None:
        self.below.append(self.stack)
        self.stack = []

    def _to_mark(self) -> list:
        items, self.stack = self.stack, self.below.pop()
        return items

    def _push_after_mark(self, kind: type) -> None:
        items = self._to_mark()
        self.stack.append(kind(items))

    def _tuple(self, count: int) -> None:
        items = tuple(self.stack[-count:])
        if len(items) < count:
            raise Unreadable(f"its {self.what} takes more than there is")
        self.stack[-count:] = [items]

    def _extend(self, items: list) -> None:
        of_kind(self.stack[-1], list).extend(items)

    def _set(self, flat: list) -> None:
        of_kind(self.stack[-1], Pairs).items.extend(zip(flat[::2], flat[1::2], strict=True))

    def _name(self, module: object, name: object) -> None:
        found = Name(of_kind(module, str), of_kind(name, str))
        if found not in self.allowed:
            raise Unreadable(
                f"its {self.what} asks for {str(found)[:200]}, which no checkpoint {self.what} needs; do not "
                "load this checkpoint"
            )
        self.stack.append(found)

    def _make(self, _) -> None:
        arguments = of_kind(self.stack.pop(), tuple)
        self.stack.append(Made(of_kind(self.stack.pop(), Name), arguments))

    def _build(self, _) -> None:
        state = self.stack.pop()
        of_kind(self.stack[-1], Made).state = state


def read(data: bytes, allowed: Collection[Name], what: str) -> object:
    """What a pickle says, made of Name, Made, Pairs, Persistent, and Python's lists,
    tuples, texts and numbers.

    Args:
        what: this is, for messages: index or record.

    Raises:
        Unreadable: no pickle, too long, or one that names what is not allowed or does
            what these files never do.
    """
    try:
        return _Machine(allowed, what).run(data)
    except Unreadable:
        raise
    except Exception as error:  # a pickle that ends early, takes what is not there, holds a text that is none
        raise Unreadable(f"{type(error).__name__}: {str(error)[:200]}") from None


def of_kind(value: object, kind: type):
    """The value, which must be of this kind exactly.

    Raises:
        Unreadable: it is of another one.
    """
    if type(value) is not kind:
        raise Unreadable(f"holds a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def made(value: object, *of: Name) -> Made:
    """The value, which must be made of one of these names.

    Raises:
        Unreadable: it is not.
    """
    if type(value) is not Made or value.of not in of:
        raise Unreadable(f"holds {_short(value)} where a {of[0]} belongs")
    return value


def fields(value: object, of: Name) -> dict[str, object]:
    """The fields of an object that was made of this name without arguments, as dataclasses are stored."""
    pairs = of_kind(made(value, of).state, Pairs).items
    if len(pairs) > 32:
        raise Unreadable(f"holds a {of} of {len(pairs)} fields")
    return {of_kind(key, str): item for key, item in pairs}


def whole_numbers(value: object) -> tuple[int, ...]:
    """The value, which must be a tuple of numbers from 0 to 2**53."""
    numbers = of_kind(value, tuple)
    if not all(map(whole_number, numbers)):
        raise Unreadable("holds something else where whole numbers belong")
    return numbers


def whole_number(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _short(value: object) -> str:
    return repr(value) if type(value) in (Made, Pairs, int, bool) else f"a {type(value).__name__}"
