"""What every file of a checkpoint goes through: its name is plain, and so is the file."""

import contextlib
import fcntl
import os
import stat
import uuid
from collections.abc import Generator
from pathlib import Path, PurePosixPath

from megatron_apt.files import write_atomically


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another shape."""


def point(root: Path, name: str) -> None:
    """Makes `latest` name a commit. A folder of that name, which nothing of ours makes, is kept beside."""
    pointer = root / "latest"
    if pointer.is_dir() and not pointer.is_symlink():
        pointer.rename(root / f"latest.{uuid.uuid4().hex[:8]}.folder")
    write_atomically(pointer, name)


@contextlib.contextmanager
def lock(file: Path) -> Generator[None]:
    """Held by one process at a time; let go when it ends, however that happens.

    Raises:
        CheckpointError: another process holds it.
        OSError: it is no plain file, or cannot be made.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644), "rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{file}: another process is writing here; wait for it, or give another target"
            ) from None
        yield


def plain_name(name: str) -> bool:
    """Whether it names a file of a folder, or of a folder in that, and nothing anywhere else."""
    if not name or "\\" in name or "\0" in name or len(name) > 500 or not name.isprintable():
        return False
    path = PurePosixPath(name)
    return (
        not path.is_absolute()
        and ".." not in path.parts
        and len(path.parts) <= 2
        and str(path) == name != "."
    )


@contextlib.contextmanager
def opened(folder: Path, name: str) -> Generator[int]:
    """Descriptor of a file of a checkpoint, for reading. A link or a pipe is none.

    Raises:
        OSError: it cannot be opened.
        CheckpointError: it is no plain file.
    """
    file = folder / name
    if file.is_symlink() or (file.parent != folder and file.parent.is_symlink()):
        raise CheckpointError(
            f"{file}: is a link, and a checkpoint is made of plain files; copy what it points to"
        )
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError(f"{file}: is no plain file; the checkpoint is damaged")
        yield descriptor
    finally:
        os.close(descriptor)
