"""The walk through a folder of inputs: every file is an input, a rejected one, or
counted; linked folders are followed once.
"""

import os
import stat
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from megatron_apt.encode.kinds import COMPANIONS, MEDIA_SUFFIXES, UNDECODED, suffix_of
from megatron_apt.encode.rejected import RejectedInput
from megatron_apt.errors import shown

Found = Path | RejectedInput
_JUNK = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"})  # what systems leave in folders
_JUNK_FOLDERS = frozenset({"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"})


@dataclass
class Left:
    """Files that are no inputs, by kind: suffix -> (how many, one of them). Text and
    metadata beside inputs are not counted.
    """

    kinds: dict[str, tuple[int, Path]] = field(default_factory=dict)

    def add(self, kind: str, path: Path) -> None:
        count, first = self.kinds.get(kind, (0, path))
        self.kinds[kind] = (count + 1, min(first, path))

    def described(self, before: str = "") -> str:
        """ "3 .xyz (a.xyz), 1 hidden (.b.png)", after `before`; "" for none."""
        parts = [
            f"{count} {kind} ({shown(Path(path.name))})" for kind, (count, path) in sorted(self.kinds.items())
        ]
        return (
            before + ", ".join(parts[:20]) + (f" and {len(parts) - 20} more kinds" if len(parts) > 20 else "")
            if parts
            else ""
        )


class _Walk:
    """One walk. Folders are told by device and inode: whatever way leads there, each is
    entered once; the real way goes before links.
    """

    def __init__(self, source: Path, output: str | Path | None):
        self.found: list[Found] = []
        self.left = Left()
        self._folders: deque[Path] = deque([source])
        self._links: deque[Path] = deque()
        self._entered = set() if output is None else _identity(Path(output))

    def run(self) -> None:
        while self._folders or self._links:
            self._enter(self._folders.popleft() if self._folders else self._links.popleft())

    def _enter(self, folder: Path) -> None:
        identity = _identity(folder)
        if identity and identity <= self._entered:
            return
        self._entered |= identity
        try:
            with os.scandir(folder) as entries:
                names = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            self._reject(
                folder,
                "folder",
                error.strerror or str(error),
                "cannot be read; give its rights, or take it out of the source",
            )
            return
        if {"dataset.json", "encode.json"} & {entry.name for entry in names} and any(
            entry.name.endswith(".tar") for entry in names
        ):
            self.left.add("encoded datasets", folder)
            return
        for entry in names:
            self._look(folder / entry.name, entry)

    def _look(self, path: Path, entry: os.DirEntry) -> None:
        name = entry.name.lower()
        if name.startswith(".") or name in _JUNK_FOLDERS:
            if name not in (".ds_store", ".directory", ".localized") and not name.startswith("._"):
                self.left.add("hidden", path)
            return
        try:
            mode = entry.stat().st_mode
        except OSError as error:
            self._unreachable(path, entry, error)
            return
        if stat.S_ISDIR(mode):
            (self._links if entry.is_symlink() else self._folders).append(path)
        elif name not in _JUNK:
            self._file(path, mode)

    def _file(self, path: Path, mode: int) -> None:
        suffix = suffix_of(path)
        if suffix in MEDIA_SUFFIXES or suffix in UNDECODED:
            self.found.append(path)
        elif suffix not in COMPANIONS:
            self.left.add(
                suffix or "without a suffix" if stat.S_ISREG(mode) else "pipes, sockets and devices", path
            )

    def _unreachable(self, path: Path, entry: os.DirEntry, error: OSError) -> None:
        if suffix_of(path) in COMPANIONS:
            return
        if entry.is_symlink():
            remedy = "a link that leads nowhere; put its target there or remove the link"
            self._reject(path, "link", _target(path), remedy)
        else:
            self._reject(
                path,
                "path",
                error.strerror or str(error),
                "cannot be reached; give its rights, or take it out of the source",
            )

    def _reject(self, path: Path, field: str, value: str, remedy: str) -> None:
        self.found.append(RejectedInput(path, field, value, remedy))


def special(mode: int) -> str:
    """What something is that is no file, by its st_mode."""
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def walk(source: Path, output: str | Path | None = None) -> tuple[list[Found], Left]:
    """Pictures, videos and what cannot be used, sorted by path; and what was left.

    Raises:
        OSError: the source itself cannot be read.
    """
    os.scandir(source).close()
    walked = _Walk(source, output)
    walked.run()
    return sorted(walked.found, key=_order), walked.left


def _order(found: Found) -> Path:
    return Path(found.file) if isinstance(found, RejectedInput) else found


def _identity(folder: Path) -> set[tuple[int, int]]:
    try:
        found = folder.stat()
    except OSError:
        return set()
    return {(found.st_dev, found.st_ino)}


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return "unknown"
