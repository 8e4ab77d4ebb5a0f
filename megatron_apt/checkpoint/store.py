"""Checkpoint folders: one commit each, loadable on a mesh of another size.

    OUTPUT/checkpoints/iteration-00000100/     a commit
        *.distcp                               tensors, each as torch.save writes it
        index.json                             which tensors, and where their numbers lie
                                               in those files (index.py)
        state.json                             iteration, configuration, counters
        .metadata metadata.json common.pt      what Megatron-Core and
                                               torch.distributed.checkpoint need to load it
        checksums.json                         size and SHA-256 of every file above (sums.py)
        commit.json                            SHA-256 of checksums.json
    OUTPUT/checkpoints/latest                  name of the newest whole one

A save (save.py) writes to a temporary name, flushes to disk, renames, then moves
`latest`: a crash at any instant leaves the previous commit whole. A checkpoint may come
from anywhere, so nothing in it is unpickled: we read JSON, and the numbers. Older commits
have no index.json; what their pickles say is read as data (inert.py).
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron_apt import schema
from megatron_apt.checkpoint import index as tensors
from megatron_apt.checkpoint import records
from megatron_apt.checkpoint.files import CheckpointError, lock, opened
from megatron_apt.checkpoint.inert import Unreadable
from megatron_apt.checkpoint.state import FORMAT, iteration_of, read_state
from megatron_apt.checkpoint.sums import SUMS, checksum, damages, seal, sealed, verify
from megatron_apt.files import sync, write_atomically
from megatron_apt.models.parameters import declared
from megatron_apt.parallel.mesh import Mesh

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing import ShardedTensor


def sharded(key: str, tensor: Tensor, parameter: nn.Parameter, mesh: Mesh, replica: int) -> "ShardedTensor":
    """A tensor laid out like a parameter, as dist_checkpointing sees it.

    The parameter's weight, average or optimiser state.

    Args:
        replica: 0 on the data x context rank that writes it, any other number on further
            ranks that hold it.
    """
    from megatron.core.dist_checkpointing import ShardedTensor

    dimension = declared(parameter).sharded_dim
    if dimension is None:
        return ShardedTensor.from_rank_offsets(key, tensor, replica_id=(0, mesh.tp.rank, replica))
    return ShardedTensor.from_rank_offsets(
        key, tensor, (dimension, mesh.tp.rank, mesh.tp.size), replica_id=(0, 0, replica)
    )


def replicated(key: str, tensor: Tensor, mesh: Mesh) -> "ShardedTensor":
    """A tensor that is the same on every rank of a pipeline stage."""
    from megatron.core.dist_checkpointing import ShardedTensor

    return ShardedTensor.from_rank_offsets(key, tensor, replica_id=(0, mesh.tp.rank, mesh.dp_cp.rank))


def latest(output: str | Path) -> Path | None:
    """The commit of a run that `latest` names, or where that names none the newest whole
    one, with a warning; None where there is none at all.

    Raises:
        CheckpointError: there are commits, or there were, and none is whole.
    """
    root = Path(output) / "checkpoints"
    pointer = root / "latest"
    try:
        if not root.is_dir():
            return None
        named, problem = _named(pointer)
        if named is not None:
            return named
        commits = {
            iteration: path
            for path in root.iterdir()
            if (iteration := iteration_of(path.name)) is not None and path.is_dir()
        }
        if not commits and not os.path.lexists(pointer):
            return None
    except OSError as error:
        raise CheckpointError(f"{error.filename or root}: {error.strerror}; make it readable") from None
    wrong = []
    for _, folder in sorted(commits.items(), reverse=True):
        if not (found := _unfit(folder)):
            warnings.warn(
                f"{pointer}: {problem}; going on from {folder.name}, the newest whole checkpoint beside it",
                stacklevel=2,
            )
            return folder
        wrong.append(found)
    beside = "; ".join(wrong[:3]) or "there is no iteration-* folder beside it"
    raise CheckpointError(
        f"{pointer}: {problem}, and no checkpoint beside it is whole: {beside}. Restore one, or give another "
        "output folder"
    )


def _named(pointer: Path) -> tuple[Path | None, str]:
    """The commit that `latest` names, or what is wrong with it."""
    if not os.path.lexists(pointer):
        return None, "is missing"
    try:
        text = schema.read_bytes(pointer, remedy="", error=CheckpointError, most=1000).decode().strip()
    except CheckpointError as error:
        return None, str(error).removeprefix(f"{pointer}: ").removesuffix("; ")
    except UnicodeDecodeError:
        return None, "is no text"
    if iteration_of(text) is None:
        return None, f"names {text[:100]!r}, which is no checkpoint" if text else "is empty"
    folder = pointer.parent / text
    return (folder, "") if folder.is_dir() else (None, f"names {text}, which does not exist")


def _unfit(folder: Path) -> str:
    """Why a commit cannot be gone on from, by what can be seen without reading all of it; "" if nothing."""
    try:
        read_state(folder)
    except CheckpointError as error:
        return str(error)
    return next(iter(damages(folder, hashed=False)), "")


def resolve(path: str) -> Path:
    """A checkpoint folder from what a user may give: itself, or a run's output folder.

    Raises:
        CheckpointError: nothing there.
    """
    folder = Path(path)
    try:
        if (folder / "state.json").is_file():
            return folder
    except OSError as error:
        raise CheckpointError(
            f"{path}: {error.strerror}; give an iteration-* folder, or the output folder of a run"
        ) from None
    found = latest(path)
    if found is None:
        raise CheckpointError(
            f"{path}: no checkpoint there; give an iteration-* folder, or the output folder of a run that "
            "saved one"
        )
    return found


def index(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor of a commit, in order of names."""
    return Stored(folder).index


class Stored:
    """The tensors of a commit, read without a model or other processes.

    Threads may read beside each other.

    Attributes:
        index: shape and dtype of every tensor, in order of names.

    Raises:
        CheckpointError: the index is missing or damaged, or does not fit the files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._tensors = tensors.read(folder)
        self.index = {
            key: (torch.Size(tensor.shape), tensors.DTYPES[tensor.dtype])
            for key, tensor in self._tensors.items()
        }

    def read(self, key: str) -> Tensor:
        """One tensor. It alone is held, and where it was written in chunks a part of one
        of them beside it.

        Raises:
            CheckpointError: a file that cannot be read.
        """
        shape, dtype = self.index[key]
        return self.fill(key, torch.empty(shape, dtype=dtype))

    def fill(self, key: str, room: Tensor, offsets: Sequence[int] | None = None) -> Tensor:
        """Reads the part of a tensor that `room` has the shape of, in room's dtype;
        returns room. Of the files no more is read than touches it.

        Args:
            offsets: where in the tensor the part begins; None: at its first number.

        Raises:
            CheckpointError: a file that cannot be read.
        """
        tensor = self._tensors[key]
        offsets = tuple(offsets or (0,) * room.dim())
        for chunk in tensor.chunks:
            low = [max(ours, theirs) for ours, theirs in zip(offsets, chunk.offsets, strict=True)]
            ends = zip(offsets, room.shape, chunk.offsets, chunk.shape, strict=True)
            high = [min(ours + size, theirs + extent) for ours, size, theirs, extent in ends]
            if all(start < end for start, end in zip(low, high, strict=True)):
                region = _box(low, high, chunk.offsets)
                self._read(key, chunk, region, room[_box(low, high, offsets)])
        return room

    def _read(self, key: str, chunk: tensors.Chunk, region: records.Region, room: Tensor) -> None:
        try:
            with opened(self.folder, chunk.file) as descriptor:
                records.fill(descriptor, chunk, self._tensors[key], region, room)
        except (OSError, Unreadable) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise CheckpointError(
                f"{self.folder / chunk.file}: {key!r} cannot be read ({reason}); the checkpoint is damaged"
            ) from None


def _box(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> records.Region:
    return tuple(
        slice(start - first, end - first) for start, end, first in zip(low, high, origin, strict=True)
    )


def read_tensors(folder: Path, keys: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a commit, in the order of `keys` (None: all, by name). As Stored.read."""
    stored = Stored(folder)
    for key in stored.index if keys is None else keys:
        yield key, stored.read(key)


def load(source: Path | Stored, wanted: "Mapping[str, ShardedTensor]") -> dict[str, Tensor]:
    """Fills the data of these tensors, each rank its part, and returns it.

    Ranks need not call this together.

    Raises:
        CheckpointError: a tensor that the checkpoint lacks or holds in another shape, or
            an unreadable file.
    """
    stored = source if isinstance(source, Stored) else Stored(source)
    for key, tensor in wanted.items():
        shape, _ = stored.index.get(key, (None, None))
        if shape is None:
            raise CheckpointError(
                f"{stored.folder}: has no tensor {key!r}; it was written by another model or stage (it holds "
                f"{len(stored.index)} tensors)"
            )
        if tuple(shape) != tuple(tensor.global_shape):
            raise CheckpointError(
                f"{stored.folder}: {key!r} has shape {tuple(shape)}, this model needs "
                f"{tuple(tensor.global_shape)}; use the checkpoint's own model configuration (state.json "
                "beside it)"
            )
    filled = {}
    for key, tensor in wanted.items():
        assert tensor.data is not None  # as `sharded` makes them
        filled[key] = stored.fill(key, tensor.data, tensor.global_offset)
    return filled


__all__ = [
    "FORMAT",
    "SUMS",
    "CheckpointError",
    "Stored",
    "checksum",
    "damages",
    "index",
    "latest",
    "load",
    "lock",
    "read_state",
    "read_tensors",
    "replicated",
    "resolve",
    "seal",
    "sealed",
    "sharded",
    "sync",
    "verify",
    "write_atomically",
]
