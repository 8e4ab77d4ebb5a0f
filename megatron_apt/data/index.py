"""The files that describe a dataset, by declared types and checked against each other:
dataset.json, index.jsonl and shard-*.done.

Whatever they say of sizes and places is bounded by what the shards hold before anything
is allocated.
"""

import hashlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from megatron_apt.errors import shown
from megatron_apt.schema import Count, Positive, convert, parse_json_lines, read_json

# A reader of format 1 alone would take means for the pooled vectors it does not know
FORMAT, POOLED_FORMAT = 1, 2
# Of a sample; only the first two are in every dataset
ARRAYS = ("latent", "text", "pooled", "given", "image")
INDEX = "index.jsonl"
AGAIN = "copy the folder again or encode again"
BLOCK = 512  # of a tar file
MOST_HEADER = 4096  # bytes of a .npy file that are not its data

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*\Z", max_length=200)]
"""A file in the dataset's own folder: no way leads out of it."""
Place = tuple[Annotated[int, msgspec.Meta(ge=BLOCK, lt=2**53)], Positive]
"""(offset, size) of a member's bytes in its shard."""


class FirstFrameInfo(msgspec.Struct):
    channels: Positive
    image: tuple[Positive, Positive] | msgspec.UnsetType = msgspec.UNSET
    image_encoder: dict | msgspec.UnsetType = msgspec.UNSET


class Info(msgspec.Struct):
    """What a reader needs of dataset.json; index_sha256 came later than format 1."""

    samples: Positive
    rejected: Count
    codec: dict
    text_encoder: dict
    conditions: Name
    settings: dict
    first_frame: FirstFrameInfo | msgspec.UnsetType = msgspec.UNSET
    index_sha256: str | None = None


class DoneLine(msgspec.Struct, kw_only=True, gc=False, omit_defaults=True):
    """One sample: where its arrays lie. crc32, of the arrays that are there in the order
    of ARRAYS, came later than format 1.
    """

    key: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]+\Z", max_length=100)]
    shard: Name
    latent: Place
    text: Place
    pooled: Place | None = None
    given: Place | None = None
    image: Place | None = None
    meta: Place
    latent_shape: tuple[Positive, Positive, Positive, Positive]
    text_length: Positive
    caption: str
    crc32: tuple[Count, ...] | None = None

    def places(self) -> list[Place]:
        """Of its members, in the file's order."""
        return sorted(
            place for place in (*(getattr(self, name) for name in ARRAYS), self.meta) if place is not None
        )


class IndexLine(DoneLine, kw_only=True, gc=False, omit_defaults=True):
    id: Count


class Done(msgspec.Struct):
    """A finished shard."""

    index: list[dict]
    rejected: list[dict]
    notes: list[dict] = []


def read_info(folder: Path) -> dict:
    """The contents of dataset.json.

    Raises:
        FileNotFoundError: no finished dataset there.
        ValueError: naming file and field.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{shown(folder)} does not exist; write it with `megatron-apt encode`")
    file = folder / "dataset.json"
    if not file.is_file():
        remedy = "give a folder written by `megatron-apt encode`"
        if (folder / "encode.json").is_file():
            remedy = "its encoding was interrupted, run the same `megatron-apt encode` again"
        raise FileNotFoundError(f"{file} does not exist; {remedy}")
    info = read_json(file, dict, remedy=AGAIN)
    if info.get("format") not in (FORMAT, POOLED_FORMAT):
        raise ValueError(
            f"{file}: format={info.get('format')}, this version reads {FORMAT} and {POOLED_FORMAT}; encode "
            "the dataset again"
        )
    if info.get("samples") == 0:
        raise ValueError(f"{file}: samples=0, the dataset is empty; encode inputs that can be used")
    convert(info, Info, str(file), remedy=AGAIN)
    return info


def read_index(folder: Path, info: dict) -> list[IndexLine]:
    """The lines of index.jsonl, each behind the one before it in key and place.

    Raises:
        FileNotFoundError; ValueError naming file, line and field.
    """
    file = folder / INDEX
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; copy it there or encode again")
    lines = list(_in_order(file, parse_json_lines(file, IndexLine, remedy=AGAIN)))
    if len(lines) != info["samples"]:
        raise ValueError(
            f"{file}: {len(lines)} samples, dataset.json says {info['samples']}: the two are not of one "
            f"encoding; {AGAIN}"
        )
    if info.get("index_sha256") not in (None, sha256_of(file)):
        raise ValueError(f"{file}: is not the one that dataset.json was written with (index_sha256); {AGAIN}")
    check_shards(folder, lines)
    return lines


def sha256_of(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_done(file: Path) -> dict:
    """{"index": [...], "rejected": [...], "notes": [...]} of a finished shard.

    Raises:
        ValueError: damaged; naming file and field.
    """
    remedy = "delete this file, and the same command encodes the shard again"
    done = read_json(file, Done, remedy=remedy, most=1 << 30)
    convert(done.index, list[DoneLine], str(file), remedy=remedy)
    return {"index": done.index, "rejected": done.rejected, "notes": done.notes}


def check_shards(folder: Path, lines: list[IndexLine]) -> None:
    """Raises FileNotFoundError or ValueError if a shard is missing or ends before its last member."""
    # The last line of each shard, for they are in order
    ends = {line.shard: sum(line.places()[-1]) for line in lines}
    for shard, end in ends.items():
        file = folder / shard
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist, but {INDEX} names it; copy it there or encode again"
            )
        size = file.stat().st_size
        if size < end:
            raise ValueError(
                f"{file} is truncated: it ends at byte {size}, {INDEX} has data up to {end}; {AGAIN}"
            )


def _in_order(file: Path, lines: Iterator[IndexLine]) -> Iterator[IndexLine]:
    before, shards = None, {}
    for position, line in enumerate(lines):
        problem = _problem(line, position, before, shards)
        if problem:
            raise ValueError(f"{file}:{position + 1}: {problem}; {AGAIN}")
        line.shard = shards.setdefault(line.shard, line.shard)  # one string for a million lines
        before = line
        yield line


def _problem(line: IndexLine, position: int, before: IndexLine | None, shards: dict[str, str]) -> str | None:
    """What is wrong with a line beside its types."""
    if line.id != position:
        return f"id={line.id}, expected {position}: lines are swapped, missing or there twice"
    if before is not None and (len(line.key), line.key) <= (len(before.key), before.key):
        return f"key={line.key!r} stands behind {before.key!r}: lines are swapped or there twice"
    same = before is not None and before.shard == line.shard
    if not same and line.shard in shards:
        return f"shard={line.shard!r} is not where its other lines are: lines are swapped"
    end = sum(before.places()[-1]) if same else 0
    for offset, size in line.places():
        if offset % BLOCK or offset < end + BLOCK:
            return f"offset {offset}: no member begins there, the one before it ends at {end}"
        end = offset + size
    return _size_problem(line)


def _size_problem(line: IndexLine) -> str | None:
    if not re.fullmatch(r".+\.tar", line.shard):
        return f"shard={line.shard!r} is no tar file"
    if not 0 <= line.latent[1] - 4 * math.prod(line.latent_shape) <= MOST_HEADER:
        return (
            f"latent_shape={list(line.latent_shape)} in float32 does not fit a member of {line.latent[1]} "
            "bytes"
        )
    if 4 * line.text_length > line.text[1]:
        return f"text_length={line.text_length} in float32 does not fit a member of {line.text[1]} bytes"
    if line.crc32 is not None and len(line.crc32) != len(line.places()) - 1:
        return f"crc32: {len(line.crc32)} sums for {len(line.places()) - 1} arrays"
    return None
