"""Which tensors a commit holds and where: index.json, beside torch_dist's own index.

index.json is ours and the one that is read. `.metadata`, a pickle, is written for others
(Megatron-Core, torch.distributed.checkpoint). Commits from before index.json have
`.metadata` alone, which is then read as data (inert.py); nothing of it is ever run.
"""

import json
import pickle
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import torch

from megatron_apt import schema
from megatron_apt.checkpoint import inert
from megatron_apt.checkpoint.files import CheckpointError, opened, plain_name
from megatron_apt.checkpoint.inert import Name, Unreadable

INDEX = "index.json"
TORCH_INDEX = ".metadata"
DAMAGED = "the checkpoint is damaged, use an older one"
MOST_TORCH_BYTES = 32 << 20
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(
            torch.float64,
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.float8_e4m3fn,
            torch.float8_e5m2,
            torch.float8_e8m0fnu,
        ),
        *(
            torch.int64,
            torch.int32,
            torch.int16,
            torch.int8,
            torch.uint8,
            torch.uint16,
            torch.uint32,
            torch.uint64,
            torch.bool,
        ),
    )
}
_META, _PLAN, _FILES = (
    f"torch.distributed.checkpoint.{module}" for module in ("metadata", "planner", "filesystem")
)
_SIZE, _INDEX, _TENSOR, _CHUNK, _KEY, _PROPERTIES, _PLACE = (
    Name("torch", "Size"),
    *(
        Name(_META, name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "ChunkStorageMetadata",
            "MetadataIndex",
            "TensorProperties",
        )
    ),
    Name(_FILES, "_StorageInfo"),
)
_ALLOWED = {
    *(_SIZE, _INDEX, _TENSOR, _CHUNK, _KEY, _PROPERTIES, _PLACE),
    *(Name("torch", name) for name in DTYPES),
    *(Name(_META, name) for name in ("StorageMeta", "_MEM_FORMAT_ENCODING")),
    *(Name(_PLAN, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    Name("torch.serialization", "_get_layout"),
}

Place = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
Shape = Annotated[tuple[Place, ...], msgspec.Meta(max_length=32)]


class Chunk(msgspec.Struct, frozen=True):
    """A box of a tensor, as torch.save wrote it into a file.

    Attributes:
        offsets, shape: the box.
        file: its name in the folder.
        record: where in the file the record begins, and its bytes.
        numbers: where in the file the numbers begin, which then lie there one by one, row
            by row, little-endian. None: the record says how.
    """

    offsets: Shape
    shape: Shape
    file: str
    record: tuple[Place, Place]
    numbers: Place | None = None


class Stored(msgspec.Struct, frozen=True):
    """A tensor of a commit."""

    shape: Shape
    dtype: str
    chunks: list[Chunk]


class _Index(msgspec.Struct, frozen=True):
    format: Annotated[int, msgspec.Meta(ge=1, le=1)]
    tensors: dict[str, Stored]


Index = dict[str, Stored]


def read(folder: Path) -> Index:
    """The index of a commit, by name of the tensor.

    It is checked against itself and against the sizes of the files.

    Raises:
        CheckpointError: missing, damaged, or asking for anything but tensors in files of
            this folder.
    """
    if (folder / INDEX).exists():
        found = schema.read_json(folder / INDEX, _Index, remedy=DAMAGED, error=CheckpointError).tensors
        file = folder / INDEX
    else:
        found, file = read_torch(folder), folder / TORCH_INDEX
    try:
        _check(found)
    except Unreadable as error:
        raise CheckpointError(f"{file}: {error}; {DAMAGED}") from None
    _check_files(folder, found)
    return dict(sorted(found.items()))


def agree(folder: Path, ours: Index) -> bool:
    """Whether torch_dist's own index of a commit has the same tensors in the same records.

    Raises:
        CheckpointError: as read_torch.
    """
    # What this version of torch would write need not be read, where torch can tell without
    # seconds of imports, and where the file may list as many chunks (a hostile one does not)
    told = "torch.distributed.checkpoint.filesystem" in sys.modules
    data, chunks = _torch_file(folder), sum(len(tensor.chunks) for tensor in ours.values())
    if told and len(data) > 32 * chunks and data == torch_bytes(ours):
        return True
    return _places(ours) == _places(read_torch(folder))


def _places(index: Index) -> dict:
    return {
        key: (
            tensor.shape,
            tensor.dtype,
            sorted((chunk.offsets, chunk.shape, chunk.file, chunk.record) for chunk in tensor.chunks),
        )
        for key, tensor in index.items()
    }


def text(index: Index) -> str:
    """index.json of these tensors."""
    return json.dumps(msgspec.to_builtins(_Index(1, index)), separators=(",", ":"))


def _check(index: Index) -> None:
    """Raises Unreadable where a tensor is not made of its chunks."""
    for key, tensor in index.items():
        if tensor.dtype not in DTYPES:
            raise Unreadable(f"{key!r} has dtype {tensor.dtype[:50]!r}, which no tensor of ours has")
        numbers = 0
        for chunk in tensor.chunks:
            if not len(chunk.offsets) == len(chunk.shape) == len(tensor.shape):
                raise Unreadable(
                    f"a chunk of {key!r} has {len(chunk.shape)} dimensions, the tensor {len(tensor.shape)}"
                )
            if any(
                start + size > whole
                for start, size, whole in zip(chunk.offsets, chunk.shape, tensor.shape, strict=True)
            ):
                raise Unreadable(f"a chunk of {key!r} reaches beyond its shape {tensor.shape}")
            if not plain_name(chunk.file):
                raise Unreadable(
                    f"{key!r} lies in {chunk.file[:200]!r}, which is no file of this folder; do not load "
                    "this checkpoint"
                )
            if chunk.record[1] < numel(chunk.shape) * DTYPES[tensor.dtype].itemsize:
                raise Unreadable(
                    f"a chunk of {key!r} of shape {chunk.shape} cannot lie in {chunk.record[1]} bytes"
                )
            numbers += numel(chunk.shape)
        if numbers != numel(tensor.shape) or _overlap(tensor.chunks):
            raise Unreadable(f"{key!r} is not whole, {numbers} of {numel(tensor.shape)} numbers are there")


def numel(shape: tuple[int, ...]) -> int:
    """Numbers in a tensor of this shape."""
    product = 1
    for size in shape:
        product *= size
    return product


def _overlap(chunks: list[Chunk]) -> bool:
    if len(chunks) < 2:
        return False
    if len(chunks) > 4096:
        raise Unreadable(f"a tensor in {len(chunks)} chunks: more ranks than any run has")
    starts = torch.tensor([chunk.offsets for chunk in chunks])
    ends = starts + torch.tensor([chunk.shape for chunk in chunks])
    shared = torch.ones(len(chunks), len(chunks), dtype=torch.bool)
    for start, end in zip(starts.T, ends.T, strict=True):
        shared &= (start[:, None] < end) & (start < end[:, None])
    return bool(shared.sum() > shared.diagonal().sum())


def _check_files(folder: Path, index: Index) -> None:
    """Every record lies in its file, and no two share a byte.

    So the tensors are no larger than the files.

    Raises:
        CheckpointError: naming file and tensor.
    """
    records: dict[str, list[tuple[int, int, str]]] = {}
    for key, tensor in index.items():
        for chunk in tensor.chunks:
            records.setdefault(chunk.file, []).append((*chunk.record, key))
            low, high = (
                chunk.record[0],
                sum(chunk.record) - numel(chunk.shape) * DTYPES[tensor.dtype].itemsize,
            )
            if chunk.numbers is not None and not low <= chunk.numbers <= high:
                raise CheckpointError(
                    f"{folder / INDEX}: the numbers of {key!r} lie outside its record; {DAMAGED}"
                )
    for name, places in records.items():
        end = 0
        size = _size(folder, name)
        for start, length, key in sorted(places):
            if start < end:
                raise CheckpointError(
                    f"{folder / name}: {key!r} cannot be read (it begins inside another tensor); the "
                    "checkpoint is damaged"
                )
            end = start + length
            if end > size:
                raise CheckpointError(
                    f"{folder / name}: {key!r} cannot be read ({size} bytes, it ends at {end}); the "
                    "checkpoint is damaged"
                )


def _size(folder: Path, name: str) -> int:
    try:
        with opened(folder, name):
            return (folder / name).stat().st_size
    except OSError as error:
        raise CheckpointError(f"{folder / name}: {error.strerror}; {DAMAGED}") from None


def read_torch(folder: Path) -> Index:
    """torch_dist's own index of a commit, read as data.

    Raises:
        CheckpointError: missing, damaged, or naming anything but what such an index is
            made of.
    """
    try:
        return _of_torch(inert.read(_torch_file(folder), _ALLOWED, "index"))
    except Unreadable as error:
        raise CheckpointError(f"{folder / TORCH_INDEX}: {error}; {DAMAGED}") from None


def _torch_file(folder: Path) -> bytes:
    return schema.read_bytes(
        folder / TORCH_INDEX, remedy=DAMAGED, error=CheckpointError, most=MOST_TORCH_BYTES
    )


def _of_torch(root: object) -> Index:
    found = inert.fields(root, _INDEX)
    shapes: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}
    index: Index = {}
    listed = 0  # a hostile file may list the same ones again and again
    places = inert.of_kind(found.get("storage_data"), inert.Pairs).items
    for key, value in inert.of_kind(found.get("state_dict_metadata"), inert.Pairs).items:
        tensor = inert.fields(value, _TENSOR)
        chunks = inert.of_kind(tensor.get("chunks"), list)
        listed += len(chunks)
        if listed > len(places):
            raise Unreadable(f"lists more than the {len(places)} chunks that it has places for")
        index[inert.of_kind(key, str)] = Stored(
            _shape(tensor.get("size")), _dtype(tensor.get("properties")), []
        )
        for chunk in map(lambda chunk: inert.fields(chunk, _CHUNK), chunks):
            shapes[key, _shape(chunk.get("offsets"))] = _shape(chunk.get("sizes"))
    for item, value in places:
        which, place = inert.fields(item, _KEY), inert.fields(value, _PLACE)
        key, offsets = inert.of_kind(which.get("fqn"), str), _shape(which.get("offset"))
        if place.get("transform_descriptors") is not None:
            raise Unreadable(f"{key!r} is compressed, which no tensor of ours is")
        if (key, offsets) not in shapes:
            raise Unreadable(f"has a place for a chunk of {key!r} that the tensor does not list")
        start, length = inert.whole_numbers((place.get("offset"), place.get("length")))
        index[key].chunks.append(
            Chunk(
                offsets, shapes[key, offsets], inert.of_kind(place.get("relative_path"), str), (start, length)
            )
        )
    return index


def _shape(value: object) -> tuple[int, ...]:
    arguments = inert.made(value, _SIZE).arguments or ((),)
    if len(arguments) != 1 or len(inert.of_kind(arguments[0], tuple)) > 32:
        raise Unreadable("holds something else where a shape belongs")
    return inert.whole_numbers(arguments[0])


def _dtype(value: object) -> str:
    packed = inert.of_kind(inert.made(value, _PROPERTIES).state, tuple)
    name = packed[0] if packed else None
    if type(name) is not Name or name.name not in DTYPES:
        raise Unreadable("holds something else where a dtype belongs")
    return name.name


def torch_bytes(index: Index) -> bytes:
    """torch_dist's own index of these tensors. The same tensors at the same places give the same bytes."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    tensors, places = {}, {}
    for key, tensor in sorted(index.items()):
        chunks = [
            ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.shape))
            for chunk in tensor.chunks
        ]
        tensors[key] = TensorStorageMetadata(
            TensorProperties(DTYPES[tensor.dtype]), torch.Size(tensor.shape), chunks
        )
        for chunk in tensor.chunks:
            places[MetadataIndex(key, chunk.offsets)] = _StorageInfo(chunk.file, *chunk.record)
    return pickle.dumps(Metadata(tensors, storage_data=places, version="1.0.0"), protocol=4)
