"""Files that are written whole or not at all: a crash leaves the old contents or the new.

New contents go to a temporary name beside the file and to disk. Then they take its place.
"""

import contextlib
import os
from pathlib import Path
from types import TracebackType


class Replacement:
    """New contents of a file, which take its place when `commit` is called.

    A context manager. Left without `commit`, it removes the new contents, and the old
    ones stay. What lies under the temporary name, a link or a pipe even, is removed, not
    opened.

    Attributes:
        stream: takes the new contents, as bytes.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._temporary = self.path.with_name(self.path.name + ".tmp")
        self._temporary.unlink(missing_ok=True)
        self.stream = open(self._temporary, "xb")
        self._committed = False

    def flush(self) -> None:
        """Waits until all that was written so far is on disk."""
        self.stream.flush()
        os.fsync(self.stream.fileno())

    def commit(self) -> None:
        """Puts the new contents, once they are on disk, in the place of the old ones."""
        self.flush()
        self.stream.close()
        self._temporary.replace(self.path)
        self._committed = True
        sync(self.path.parent)

    def __enter__(self) -> "Replacement":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):  # on a full disk what is still to be written fails again
            self.stream.close()
        if not self._committed:
            with contextlib.suppress(OSError):
                self._temporary.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike[str], data: str | bytes) -> None:
    """The file has its old contents, or the new ones on disk. Text is written as UTF-8."""
    with Replacement(path) as new:
        new.stream.write(data.encode() if isinstance(data, str) else data)
        new.commit()


def write_product(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Writes what can be made again (a picture, a report), and the folder it lies in.

    A reader sees the old contents or the new ones, and several processes may write at
    once, for each has a temporary name of its own. Nothing is flushed to disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: str | os.PathLike[str]) -> None:
    """Flushes a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
