"""What a boundary is, how one input goes through it, and how what happened is judged.

Good: `fine` (it worked), `named` (an expected error that names file or field and what to
do), `skipped` (an input listed in rejected.jsonl). Faults: `crash` (any other exception),
`unnamed` (an error that names nothing), `wrong` (accepted though it must be seen, or
something else was lost), `ran` (code of the input was run), `noise` (a library wrote to
the terminal), `hang`, `memory`, `died`.
"""

import contextlib
import io
import os
import random
import re
import shutil
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

GOOD = ("fine", "named", "skipped")
LONGEST = 4000  # characters of an error: one that repeats a hostile value in full is no help
_WORDS = (
    "use|set|start|give|must|fetch|download|remove|correct|copy|needs?|known|at least|can be|there "
    "are|usage|required|expected|save|helptext"
)
_REMEDY = re.compile(rf";|\b({_WORDS})\b", re.I)


class Wrong(AssertionError):
    """The package accepted what it must see, or damaged what was whole."""


@dataclass(frozen=True)
class Input:
    """One damaged input, as it lies in its folder.

    Attributes:
        what: description.
        names: an error must name one of these, or the folder.
        must_see: nothing may accept it.
        canary: a file that exists only if code of the input was run.
        settings: for the boundary's own `run`.
    """

    what: str
    names: tuple[str, ...] = ()
    must_see: bool = False
    canary: Path | None = None
    settings: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Boundary:
    """A kind of input.

    Attributes:
        share: of all inputs, relative to other boundaries.
        prepare: writes valid inputs into a folder, once; boundaries with the same
            function share the folder.
        make: (random numbers, folder of valid inputs, new folder) -> a damaged input in
            the new folder.
        run: (input, folder of valid inputs, its folder) -> outcome; raises what the
            package raises.
        warm: (folder of valid inputs, folder) puts valid inputs through, so that no input
            waits for imports.
        quiet: libraries may not write to the terminal, for an input is one of many files.
    """

    name: str
    share: int
    prepare: Callable[[Path], None]
    make: Callable[[random.Random, Path, Path], Input]
    run: Callable[[Input, Path, Path], "Outcome"]
    warm: Callable[[Path, Path], None] = lambda valid, folder: None
    quiet: bool = False


@dataclass(frozen=True)
class Outcome:
    kind: str
    message: str = ""

    @property
    def good(self) -> bool:
        return self.kind in GOOD


@dataclass(frozen=True)
class Done:
    """A finished command: exit code, and what it said."""

    code: int
    said: str


def command(*argv: object) -> Done:
    """`megatron-apt ARGV` in this process. Exceptions that would be a traceback come through."""
    from megatron_apt.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            main([str(part) for part in argv])
        except SystemExit as end:
            if isinstance(end.code, str):
                return Done(1, end.code)
            return Done(int(end.code or 0), said.getvalue())
    return Done(0, said.getvalue())


def judged(done: Done, case: Input, folder: Path, remedy: bool = True) -> Outcome:
    """Whether a finished command said what it must; `remedy`: also what to do."""
    if done.code == 0:
        return Outcome("fine", done.said[:300])
    text = done.said
    if "Traceback (most recent call last)" in text:
        return Outcome("crash", text[-1500:])
    if len(text) > LONGEST:
        return Outcome("unnamed", f"an error of {len(text)} characters: {text[:200]} ... {text[-200:]}")
    if not any(name in text for name in (*case.names, str(folder))):
        return Outcome("unnamed", f"names neither the file nor one of {case.names[:6]}: {text[:600]}")
    if remedy and not _REMEDY.search(text):
        return Outcome("unnamed", f"says nothing to do: {text[:600]}")
    return Outcome("named", text[:600])


def worst(outcomes: list[Outcome]) -> Outcome:
    """The first fault of several commands, else the first error, else the first."""
    faults = [one for one in outcomes if not one.good]
    named = [one for one in outcomes if one.kind != "fine"]
    return (faults or named or outcomes)[0]


def attempt(boundary: Boundary, number: int, seed: int, valid: Path, scratch: Path) -> tuple[Input, Outcome]:
    """Makes input `number` and puts it through. The same numbers give the same input."""
    folder = scratch / f"{boundary.name}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    case = boundary.make(random.Random(f"{boundary.name} {seed} {number}"), valid, folder)
    before = os.getcwd()
    os.chdir(folder)  # what a command writes to a relative path goes away with the folder
    try:
        outcome = boundary.run(case, valid, folder)
    except Wrong as wrong:
        outcome = Outcome("wrong", str(wrong))
    except MemoryError as error:
        outcome = Outcome("memory", _last_frames(error))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome = Outcome("crash", _last_frames(error))
    finally:
        os.chdir(before)
    if case.canary is not None and case.canary.exists():
        case.canary.unlink()
        outcome = Outcome("ran", f"code of the input was run; {outcome.kind}: {outcome.message}")
    return case, outcome


def _last_frames(error: BaseException) -> str:
    """The exception, and where in the package it arose."""
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if "megatron_apt" in f.filename and "/cli.py" not in f.filename
    ]
    places = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames[-4:]))
    return f"{type(error).__name__}: {str(error)[:400]} [{places}]"
