"""What stands beside the tensors of a new commit: index.json for us, and for others what
Megatron-Core and torch read.
"""

import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_apt.checkpoint import index, records
from megatron_apt.checkpoint.index import Chunk, Index, Stored

_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Written:
    """A chunk of a tensor that has been written.

    Attributes:
        shape, dtype: of the tensor.
        offsets, sizes: of the chunk.
        record: where in its file torch.save wrote it, and how many bytes.
    """

    key: str
    shape: Sequence[int]
    dtype: torch.dtype
    offsets: Sequence[int]
    sizes: Sequence[int]
    record: tuple[int, int]


def located(folder: Path, name: str, written: Iterable[Written]) -> Index:
    """The index of the chunks of one file, with the places of their numbers.

    Raises:
        OSError, Unreadable: it is not as it was written.
    """
    found: Index = {}
    descriptor = os.open(folder / name, os.O_RDONLY)
    try:
        for one in written:
            record = records.parse(descriptor, *one.record)
            chunk = Chunk(
                tuple(one.offsets), tuple(one.sizes), name, one.record, record.start if record.plain else None
            )
            dtype = str(one.dtype).removeprefix("torch.")
            found.setdefault(one.key, Stored(tuple(one.shape), dtype, [])).chunks.append(chunk)
    finally:
        os.close(descriptor)
    return found


def joined(parts: Iterable[Index]) -> Index:
    """One index of all of them, in an order that depends on nothing but the tensors."""
    found: Index = {}
    for key, tensor in sorted(
        ((key, tensor) for part in parts for key, tensor in part.items()), key=lambda item: item[0]
    ):
        found.setdefault(key, Stored(tensor.shape, tensor.dtype, [])).chunks.extend(tensor.chunks)
    for tensor in found.values():
        tensor.chunks.sort(key=lambda chunk: chunk.offsets)
    return found


def write(folder: Path, tensors: Index) -> None:
    """Writes the index, ours and torch_dist's, and what Megatron-Core wants to find: the
    name of the format, and what is common to the ranks, which is nothing here. The same
    tensors at the same places give the same bytes.
    """
    (folder / index.INDEX).write_text(index.text(tensors), encoding="utf-8")
    (folder / index.TORCH_INDEX).write_bytes(index.torch_bytes(tensors))
    (folder / "metadata.json").write_text(json.dumps(_BACKEND), encoding="utf-8")
    nothing = io.BytesIO()
    torch.save({}, nothing)  # in memory first: on a full disk torch.save raises no OSError
    (folder / "common.pt").write_bytes(nothing.getvalue())
