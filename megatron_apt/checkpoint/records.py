"""The numbers of a tensor out of the record that torch.save wrote, without unpickling it.

A record is a zip file whose members are stored as they are: data.pkl says dtype, shape
and strides, data/0 holds the numbers.
"""

import os
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from megatron_apt.checkpoint import inert
from megatron_apt.checkpoint.index import DTYPES, Chunk, Stored
from megatron_apt.checkpoint.inert import Name, Unreadable

_BAND = 2**24  # bytes read at a time where they cannot go straight to their place
_MOST_PICKLE, _MOST_DESCRIPTION = 2**16, 2**20
_REBUILD, _REBUILD_DTYPE, _EMPTY, _UNTYPED = (
    Name("torch._utils", "_rebuild_tensor_v2"),
    Name("torch._utils", "_rebuild_tensor_v3"),
    Name("collections", "OrderedDict"),
    Name("torch.storage", "UntypedStorage"),
)
_TYPED = {
    Name("torch", f"{name}Storage"): dtype
    for name, dtype in {
        **{
            "Double": "float64",
            "Float": "float32",
            "Half": "float16",
            "BFloat16": "bfloat16",
            "Bool": "bool",
        },
        **{"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8"},
    }.items()
}
_ALLOWED = {_REBUILD, _REBUILD_DTYPE, _EMPTY, _UNTYPED, *_TYPED, *(Name("torch", name) for name in DTYPES)}
Region = tuple[slice, ...]


@dataclass(frozen=True)
class Record:
    """What a record says of its tensor.

    Attributes:
        numbers: where in the file its storage begins.
        bytes: of the storage.
        offset: of the tensor in the storage, in numbers.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    numbers: int
    bytes: int

    @property
    def plain(self) -> bool:
        """Whether its numbers lie one by one, row by row."""
        expected, step = [], 1
        for size in reversed(self.shape):
            expected.insert(0, step)
            step *= size
        return all(
            size == 1 or have == want
            for size, have, want in zip(self.shape, self.strides, expected, strict=True)
        )

    @property
    def start(self) -> int:
        """Where in the file its first number is."""
        return self.numbers + self.offset * DTYPES[self.dtype].itemsize


def parse(descriptor: int, start: int, length: int) -> Record:
    """What the record at this place of a file says.

    Raises:
        Unreadable: it is no record of one tensor.
    """
    try:
        return _parse(descriptor, start, length)
    except Unreadable:
        raise
    except Exception as error:  # zipfile has many
        raise Unreadable(f"{type(error).__name__}: {str(error)[:200]}") from None


def holds_nothing(descriptor: int, length: int) -> bool:
    """Whether a file is what torch.save writes of an empty dictionary.

    Raises:
        Unreadable: it is no file of torch.save.
    """
    try:
        root = _root(_members(descriptor, 0, length))
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(f"{type(error).__name__}: {str(error)[:200]}") from None
    return type(root) is inert.Pairs and not root.items


Members = dict[str, tuple[zipfile.ZipInfo, Callable[[], bytes]]]


def _members(descriptor: int, start: int, length: int) -> Members:
    """Members of a zip file, by name without that of the archive, with what reads them."""
    archive = zipfile.ZipFile(_Slice(descriptor, start, length))
    return {
        info.filename.partition("/")[2]: (info, partial(archive.read, info)) for info in archive.infolist()
    }


def _stored(members: Members, name: str, most: int) -> zipfile.ZipInfo:
    info = members[name][0]
    if (
        info.compress_type != zipfile.ZIP_STORED
        or info.file_size != info.compress_size
        or info.file_size > most
    ):
        raise Unreadable(f"its member {name} is compressed, or longer than it can be")
    return info


def _root(members: Members) -> object:
    """What its pickle says."""
    _stored(members, "data.pkl", _MOST_PICKLE)
    if "byteorder" in members:
        _stored(members, "byteorder", 10)
        if members["byteorder"][1]() != b"little":
            raise Unreadable("its numbers are not little-endian")
    return inert.read(members["data.pkl"][1](), _ALLOWED, "record")


def _parse(descriptor: int, start: int, length: int) -> Record:
    members = _members(descriptor, start, length)
    root, data = _root(members), _stored(members, "data/0", length)
    record = _described(root, _data(descriptor, start + data.header_offset), data.file_size)
    if not start <= record.numbers <= start + length - record.bytes:
        raise Unreadable("its numbers reach beyond it")
    return record


def _data(descriptor: int, header: int) -> int:
    """Where the contents of a member begin, whose own header is there."""
    found = os.pread(descriptor, 30, header)
    if found[:4] != b"PK\3\4":
        raise Unreadable("a member is not where it should be")
    return header + 30 + sum(struct.unpack("<HH", found[26:30]))


def _described(root: object, numbers: int, size: int) -> Record:
    rebuilt = inert.made(root, _REBUILD, _REBUILD_DTYPE)
    if rebuilt.state is not None or len(rebuilt.arguments) not in (6, 7):
        raise Unreadable("is not one tensor")
    storage, offset, shape, strides, _, hooks, *more = rebuilt.arguments
    if inert.made(hooks, _EMPTY).arguments or hooks.state is not None:
        raise Unreadable("has hooks")
    dtype = _dtype(inert.of_kind(storage, inert.Persistent).key, more)
    inert.whole_numbers((offset, *inert.whole_numbers(shape), *inert.whole_numbers(strides)))
    record = Record(dtype, shape, strides, offset, numbers, size)
    item = DTYPES[dtype].itemsize
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    if prod(shape) and (last * item > size or prod(shape) * item > size):
        raise Unreadable(f"a tensor of shape {shape} does not lie in its {size} bytes")
    return record


def _dtype(key: object, more: list) -> str:
    what, kind, name, *_ = inert.of_kind(key, tuple)
    if (what, name) != ("storage", "0"):
        raise Unreadable("refers to what is not in it")
    if kind == _UNTYPED and len(more) == 1 and type(more[0]) is Name and more[0].name in DTYPES:
        return more[0].name
    if more or kind not in _TYPED:
        raise Unreadable("is of no dtype of ours")
    return _TYPED[kind]


def fill(descriptor: int, chunk: Chunk, tensor: Stored, region: Region, room: Tensor) -> None:
    """Reads a region of a chunk into `room`, of its shape and of any strides and dtype.

    Raises:
        Unreadable: the record is damaged or not of this tensor.
        OSError: the file cannot be read.
    """
    start = chunk.numbers
    if start is None:
        record = parse(descriptor, *chunk.record)
        if (record.dtype, record.shape) != (tensor.dtype, chunk.shape):
            raise Unreadable(
                f"it holds {record.dtype} of shape {record.shape}, not {tensor.dtype} of {chunk.shape}"
            )
        if not record.plain:
            room.copy_(_strided(descriptor, record)[region])
            return
        start = record.start
    dtype, shape = DTYPES[tensor.dtype], chunk.shape or (1,)
    region, room = region or (slice(0, 1),), room.reshape(1) if room.dim() == 0 else room
    row, first, last = prod(shape[1:]) * dtype.itemsize, region[0].start, region[0].stop
    if not room.numel():
        return
    if room.dtype == dtype and room.is_contiguous() and room.shape[1:] == shape[1:]:
        _read(descriptor, start + first * row, room)
        return
    rows = max(_BAND // row, 1)
    for low in range(first, last, rows):
        band = torch.empty((min(rows, last - low), *shape[1:]), dtype=dtype)
        _read(descriptor, start + low * row, band)
        room[low - first : low - first + len(band)].copy_(band[(slice(None), *region[1:])])


def _strided(descriptor: int, record: Record) -> Tensor:
    """A tensor that was saved as a view, with the whole storage it is a view of."""
    storage = torch.empty(record.bytes // DTYPES[record.dtype].itemsize, dtype=DTYPES[record.dtype])
    _read(descriptor, record.numbers, storage)
    return storage.as_strided(record.shape, record.strides, record.offset)


def _read(descriptor: int, start: int, room: Tensor) -> None:
    """Fills a contiguous tensor with the bytes from `start` on."""
    left = memoryview(room.detach().reshape(-1).view(torch.uint8).numpy())
    while left:  # one call reads at most 2 GiB
        count = os.preadv(descriptor, [left], start)
        if not count:
            raise Unreadable("the file ends before it does")
        left, start = left[count:], start + count


class _Slice:
    """Some bytes of a file as a file of their own, of which no more is read than a
    record's description can take.
    """

    def __init__(self, descriptor: int, start: int, length: int):
        self.descriptor, self.start, self.length, self.place, self.left = (
            descriptor,
            start,
            length,
            0,
            _MOST_DESCRIPTION,
        )

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.length}[whence]
        if self.place < 0:
            raise OSError("a place before its beginning")
        return self.place

    def read(self, count: int = -1) -> bytes:
        there = max(self.length - self.place, 0)
        count = there if count < 0 else min(count, there)
        self.left -= count
        if self.left < 0:
            raise Unreadable("its description is longer than any of ours")
        data = os.pread(self.descriptor, count, self.start + self.place)
        self.place += len(data)
        return data
