"""Whether a commit is as it was written: the list of its files with their SHA-256, and
the seal of that list.

checksums.json lists every file of the commit but itself and the seal; commit.json,
written last, holds the SHA-256 of the list. So a changed bit in any file is found, and so
is a file too many or too few. Commits from before the seal have none: their list is
compared with what is there, and whether the list itself was changed cannot be told.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TypedDict

import msgspec
import torch.distributed as dist

from megatron_apt import schema
from megatron_apt.checkpoint import index, records
from megatron_apt.checkpoint.files import CheckpointError, opened, plain_name
from megatron_apt.checkpoint.inert import Unreadable
from megatron_apt.files import sync, write_atomically
from megatron_apt.parallel.mesh import Mesh

SUMS = "checksums.json"
SEAL = "commit.json"


class Sum(TypedDict):
    """Of one file."""

    bytes: schema.Count
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


def checksum(file: Path) -> Sum:
    """Size and SHA-256 of a file."""
    with opened(file.parent, file.name) as descriptor, open(descriptor, "rb", closefd=False) as stream:
        return {
            "bytes": os.fstat(descriptor).st_size,
            "sha256": hashlib.file_digest(stream, "sha256").hexdigest(),
        }


def seal(folder: Path, sums: dict[str, Sum]) -> None:
    """Makes the files of a folder a commit, all of them flushed to disk.

    Args:
        sums: of the files that are on disk already; the others are added.
    """
    for name in sorted(_files(folder) - {SUMS, SEAL}):
        if name not in sums:
            sync(folder / name)
            sums[name] = checksum(folder / name)
    write_atomically(folder / SUMS, json.dumps(sums, indent=1, sort_keys=True))
    write_atomically(folder / SEAL, _seal(folder))


def _seal(folder: Path) -> str:
    return json.dumps({"checksums": checksum(folder / SUMS)}, indent=1, sort_keys=True)


def _files(folder: Path) -> set[str]:
    """Every file below a folder, whatever it is, by its name from there. Empty folders count as files."""
    return set(_walk(folder, ""))


def _walk(folder: Path, prefix: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            below = (
                list(_walk(Path(entry.path), f"{prefix}{entry.name}/"))
                if entry.is_dir(follow_symlinks=False)
                else []
            )
            yield from below or [prefix + entry.name]


def sealed(folder: Path) -> bool:
    """Whether its list of files is sealed, as in every commit since there is index.json."""
    return (folder / SEAL).exists() or (folder / index.INDEX).exists()


def damages(folder: Path, part: int = 0, parts: int = 1, hashed: bool = True) -> list[str]:
    """What is wrong with the files of a commit, one line each, naming the file.

    Args:
        part, parts: look at one of so many shares of the files (their sizes are all
            compared by each).
        hashed: False compares names and sizes alone.
    """
    try:
        return _damages(folder, part, parts, hashed)
    except CheckpointError as error:
        return [str(error)]
    except OSError as error:
        return [f"{error.filename or folder}: {error.strerror or error}; it cannot be read"]


def _damages(folder: Path, part: int, parts: int, hashed: bool) -> list[str]:
    remedy = "the list of checksums itself is damaged"
    listed = schema.read_json(folder / SUMS, dict[str, Sum], remedy=remedy, error=CheckpointError)
    if wrong := next((name for name in listed if not plain_name(name)), None):
        raise CheckpointError(
            f"{folder / SUMS}: lists {wrong[:200]!r}, which is no file of this folder; {remedy}"
        )
    found = _seal_damage(folder)
    there = _files(folder) - {SUMS, SEAL}
    found += [
        f"{folder / name}: is not in {SUMS}; it was put here after the commit, or the list was cut short"
        for name in sorted(there - {*listed})
    ]
    for i, (name, expected) in enumerate(
        sorted(listed.items(), key=lambda item: (-item[1]["bytes"], item[0]))
    ):
        if damage := _damage(folder, name, expected, hashed and i % parts == part):
            found.append(f"{folder / name}: {damage}")
    if "state.json" not in listed and not (folder / "state.json").exists():
        found.append(f"{folder / 'state.json'}: missing")
    return found or (_index_damages(folder) if part == 0 else [])


def _seal_damage(folder: Path) -> list[str]:
    if not sealed(folder):
        return []
    if not (folder / SEAL).exists():
        return [f"{folder / SEAL}: missing"]
    found = schema.read_bytes(folder / SEAL, remedy="it cannot be read", error=CheckpointError, most=4096)
    if found != _seal(folder).encode():
        return [f"{folder / SUMS}: its SHA-256 differs from the one in {SEAL}; bits have changed in either"]
    return []


def _damage(folder: Path, name: str, expected: Sum, hashed: bool) -> str:
    file = folder / name
    if not os.path.lexists(file):
        return "missing"
    with opened(folder, name) as descriptor:
        size = os.fstat(descriptor).st_size
    if size != expected["bytes"]:
        return f"{size} bytes, {expected['bytes']} were committed; it was cut short or overwritten"
    if hashed and checksum(file) != expected:
        return "its SHA-256 differs from the committed one; bits have changed"
    return ""


def _index_damages(folder: Path) -> list[str]:
    """Whether the index fits the files, and what only other programs read is what we
    write: it is there for them to trust.
    """
    ours = index.read(folder)
    if (folder / "common.pt").exists() and (damage := _common_damage(folder)):
        return [f"{folder / 'common.pt'}: {damage}; load it with no other program"]
    if (folder / index.INDEX).exists() and not index.agree(folder, ours):
        return [
            f"{folder / index.TORCH_INDEX}: lists other tensors than {index.INDEX}; one of them was changed"
        ]
    return []


def _common_damage(folder: Path) -> str:
    with opened(folder, "common.pt") as descriptor:
        try:
            return (
                ""
                if records.holds_nothing(descriptor, os.fstat(descriptor).st_size)
                else "holds something, and ours hold nothing"
            )
        except Unreadable as error:
            return str(error)


def verify(folder: Path, mesh: Mesh) -> None:
    """Compares every file with its checksum, each rank a share of them.

    Raises:
        CheckpointError: on every rank, naming each damaged file.
    """
    found = damages(folder, mesh.world.rank, mesh.world.size)
    everyone: list[list[str]] = [found]
    if mesh.world.size > 1:
        everyone = [[] for _ in range(mesh.world.size)]
        dist.all_gather_object(everyone, found)
    wrong = sorted(set().union(*everyone))
    if wrong:
        raise CheckpointError(
            "; ".join(wrong) + ". Use an older checkpoint: point `latest` at another iteration-* folder"
        )
