"""What the demo keeps in its folder beside data and runs: which stages are done, results
and report. All of it can be made again.
"""

import contextlib
import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

from msgspec import Meta

from megatron_apt.demo.machine import Machine
from megatron_apt.demo.recipes import DemoConfig
from megatron_apt.files import write_atomically
from megatron_apt.lock import FolderLock
from megatron_apt.schema import read_json

WHAT, OPTION = "a demo", "another --root"  # of its lock


class Progress(TypedDict):
    """progress.json: stages that are done, in order, the seconds that each has taken so
    far, and the machine that ran the last of them.
    """

    quick: bool
    done: list[str]
    seconds: dict[str, Annotated[float, Meta(ge=0, le=1e9)]]
    machine: NotRequired[Machine]


def prepare(config: DemoConfig) -> None:
    """That a demo can run in its folder, which is made if it is not there.

    Raises:
        ValueError: it is in use, cannot be written to, or holds a demo of another
            --quick.
    """
    with FolderLock(config.root, WHAT, OPTION):
        load_progress(config)


def load_progress(config: DemoConfig) -> Progress:
    """What is done in a demo's folder, which may be new.

    Raises:
        ValueError: it cannot be read, or is of another --quick.
    """
    file = Path(config.root) / "progress.json"
    if not (file.exists() or file.is_symlink()):
        return Progress(quick=config.quick, done=[], seconds={})
    progress = _read(file)
    if progress["quick"] != config.quick:
        raise ValueError(
            f"{file}: quick={progress['quick']}, this run asks for quick={config.quick}; give another "
            f"--root, or remove {config.root} to start again"
        )
    return progress


def found_progress(root: Path) -> Progress:
    """What is done in a folder where a demo has run.

    Raises:
        ValueError: none has, or it cannot be read.
    """
    file = root / "progress.json"
    if not (file.exists() or file.is_symlink()):
        raise ValueError(
            f"root={root}: no demo has finished a stage there; run `megatron-apt demo --root {root}` first, "
            "or give another --root"
        )
    return _read(file)


def _read(file: Path) -> Progress:
    remedy = (
        f"remove it, then run `megatron-apt demo --root {file.parent}`: runs and data are found again, "
        "figures are measured again"
    )
    return read_json(file, Progress, remedy=remedy)


def save_progress(root: Path, progress: Progress) -> None:
    write(root / "progress.json", lambda file: write_atomically(file, json.dumps(progress, indent=1)))


def write(file: Path, action: Callable[[Path], None]) -> None:
    """Raises ValueError, naming the file, where it cannot be written."""
    with named_failure(file):
        action(file)


@contextlib.contextmanager
def named_failure(file: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        remedy = (
            "remove what stands there, free disk space or check permissions, then start again: finished "
            "stages stay"
        )
        raise ValueError(f"{file}: cannot be written ({error.strerror or error}); {remedy}") from None
