"""Checkpoint folders: one commit each, loadable on another tensor-, context- or data-parallel size.

    OUTPUT/checkpoints/iteration-00000100/                  a commit
        *.distcp .metadata metadata.json common.pt          tensors, in Megatron-Core's torch_dist format
        state.json                                          iteration, configuration, counters
        checksums.json                                      size and SHA-256 of every file above
    OUTPUT/checkpoints/latest                               name of the newest whole one

A save (checkpoint/save.py) writes to a temporary name, flushes to disk, renames, then moves `latest`: a crash at any instant leaves the
previous commit whole. Everything of ours that is not a tensor is JSON. torch_dist keeps its own index as a pickle, which is read only if it
names nothing but the classes such an index is made of; common.pt, which is empty here, is read by torch with weights_only.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_apt.parallel.mesh import Mesh

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing import ShardedTensor

FORMAT = 2
SUMS = "checksums.json"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another shape."""


def sharded(key: str, tensor: Tensor, parameter: nn.Parameter, mesh: Mesh, replica: int) -> "ShardedTensor":
    """A tensor laid out like a parameter (its weight, average or optimiser state), as dist_checkpointing sees it.

    Args:
        replica: 0 on the data x context rank that writes it, any other number on further ranks that hold it.
    """
    from megatron.core.dist_checkpointing import ShardedTensor

    if parameter.sharded_dim is None:
        return ShardedTensor.from_rank_offsets(key, tensor, replica_id=(0, mesh.tp.rank, replica))
    return ShardedTensor.from_rank_offsets(key, tensor, (parameter.sharded_dim, mesh.tp.rank, mesh.tp.size), replica_id=(0, 0, replica))


def replicated(key: str, tensor: Tensor, mesh: Mesh) -> "ShardedTensor":
    """A tensor that is the same on every rank of a pipeline stage."""
    from megatron.core.dist_checkpointing import ShardedTensor

    return ShardedTensor.from_rank_offsets(key, tensor, replica_id=(0, mesh.tp.rank, mesh.dp_cp.rank))


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


@contextlib.contextmanager
def lock(file: Path) -> Iterator[None]:
    """Held by one process at a time; let go when it ends, however that happens.

    Raises:
        CheckpointError: another process holds it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{file}: another process is writing here; wait for it, or give another target") from None
        yield


def sync(path: Path) -> None:
    """Flushes a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def latest(output: str | Path) -> Path | None:
    """The newest committed checkpoint of a run, or None."""
    pointer = Path(output) / "checkpoints" / "latest"
    if not pointer.is_file():
        return None
    path = pointer.parent / pointer.read_text(encoding="utf-8").strip()
    if not path.is_dir():
        raise CheckpointError(f"{pointer} names {path.name}, which does not exist; point it at one of the iteration-* folders beside it")
    return path


def resolve(path: str) -> Path:
    """A checkpoint folder from what a user may give: the folder itself, or a run's output folder (its latest).

    Raises:
        CheckpointError: nothing there.
    """
    folder = Path(path)
    if (folder / "state.json").is_file():
        return folder
    found = latest(path)
    if found is None:
        raise CheckpointError(f"{path}: no checkpoint there; give an iteration-* folder, or the output folder of a run that saved one")
    return found


def read_state(folder: Path) -> dict:
    """state.json of a checkpoint."""
    file = folder / "state.json"
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}; the checkpoint is damaged, use an older one") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{file}: is not of format {FORMAT}, which this version reads")
    return state


class _Record:
    """An object of torch's own index, whose classes take a second to import: its fields under their names, or `packed` where it packs them."""

    def __init__(self, *packed):
        self.packed = packed

    def __setstate__(self, state: dict | tuple):
        self.__dict__.update(state if isinstance(state, dict) else {"packed": state})


class _IndexReader(pickle.Unpickler):
    """Unpickles nothing but what torch.distributed.checkpoint's own index is made of."""

    _OWN = "torch.distributed.checkpoint."
    _MODULES = ("torch.serialization", "torch._utils", "collections", "pathlib")
    _NAMES = frozenset({"torch.Size", "torch.device", "builtins.set", "builtins.slice", "_codecs.encode"})

    def find_class(self, module: str, name: str):
        known = module in self._MODULES or f"{module}.{name}" in self._NAMES
        torch_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout | torch.memory_format)
        if "." in name or not (known or torch_type or module.startswith(self._OWN)):
            raise CheckpointError(f"its index asks for {module}.{name}, which no checkpoint index needs; do not load this checkpoint")
        return _Record if module.startswith(self._OWN) else super().find_class(module, name)


def _read_index(folder: Path) -> _Record:
    """torch's index of a commit. torch itself reads it with an unrestricted unpickler, so this comes first.

    Raises:
        CheckpointError: missing, damaged, or naming anything that could run code.
    """
    file = folder / ".metadata"
    try:
        with open(file, "rb") as stream:
            return _IndexReader(stream).load()
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    except Exception as error:
        raise CheckpointError(f"{file}: cannot be read ({type(error).__name__}: {error}); the checkpoint is damaged, use an older one") from error


def checksum(file: Path) -> dict:
    """Size and SHA-256 of a file."""
    with open(file, "rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def damages(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the files of a commit, one line each, naming the file.

    Args:
        part, parts: look at one of so many shares of the files (their sizes are all compared by each).
    """
    try:
        listed = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{folder / SUMS}: {type(error).__name__}: {error}; the list of checksums itself is damaged"]
    found = []
    for i, (name, (size, digest)) in enumerate(sorted(expected.items(), key=lambda item: (-item[1][0], item[0]))):
        file = folder / name
        if not file.is_file():
            found.append(f"{file}: missing")
        elif file.stat().st_size != size:
            found.append(f"{file}: {file.stat().st_size} bytes, {size} were committed; it was cut short or overwritten")
        elif i % parts == part and checksum(file)["sha256"] != digest:
            found.append(f"{file}: its SHA-256 differs from the committed one; bits have changed")
    return found


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
        raise CheckpointError("; ".join(wrong) + ". Use an older checkpoint: point `latest` at another iteration-* folder")


def index(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor of a commit, in order of names."""
    return Stored(folder).index


class Stored:
    """The tensors of a commit, read whole and one at a time, without a model or other processes. Threads may read beside each other.

    Attributes:
        index: shape and dtype of every tensor, in order of names.
    """

    def __init__(self, folder: Path):
        found = _read_index(folder)
        self.folder = folder
        self.index = {key: (meta.size, meta.properties.packed[0]) for key, meta in sorted(found.state_dict_metadata.items())}
        self._chunks: dict[str, list[tuple[tuple[int, ...], _Record]]] = {key: [] for key in self.index}
        for chunk, place in found.storage_data.items():
            self._chunks[chunk.fqn].append((tuple(chunk.offset), place))

    def read(self, key: str) -> Tensor:
        """One tensor. It alone is held, and where it was written in chunks one of them beside it.

        Raises:
            CheckpointError: a file that cannot be read, or chunks that do not make the tensor.
        """
        shape, dtype = self.index[key]
        whole, filled = None, 0
        for offsets, place in self._chunks[key]:
            chunk = self._record(key, place)
            if chunk.shape == shape and chunk.dtype == dtype:
                return chunk
            whole = torch.empty(shape, dtype=dtype) if whole is None else whole
            part = whole[tuple(slice(start, start + size) for start, size in zip(offsets, chunk.shape, strict=True))]
            if part.shape != chunk.shape:
                raise CheckpointError(f"{self.folder}: a chunk of {key!r} reaches beyond its shape {tuple(shape)}; the checkpoint is damaged")
            part.copy_(chunk)
            filled += chunk.numel()
        if whole is None or filled != whole.numel():
            raise CheckpointError(f"{self.folder}: {key!r} is not whole, {filled} of {shape.numel()} numbers are there; use an older checkpoint")
        return whole

    def _record(self, key: str, place: _Record) -> Tensor:
        """What torch.save wrote at this place."""
        file = self.folder / place.relative_path
        try:
            with open(file, "rb") as stream:
                return torch.load(_Slice(stream, place.offset, place.length), map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{file}: {key!r} cannot be read ({type(error).__name__}: {error}); the checkpoint is damaged") from error


class _Slice(io.RawIOBase):
    """Some bytes of a file as a file of their own."""

    def __init__(self, file: BinaryIO, start: int, length: int):
        super().__init__()
        self.file, self.start, self.length, self.place = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.length}[whence]
        return self.place

    def readinto(self, buffer) -> int:
        self.file.seek(self.start + self.place)
        count = self.file.readinto(memoryview(buffer)[: max(self.length - self.place, 0)])
        self.place += count
        return count


def read_tensors(folder: Path, keys: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a commit one after the other, in the order of `keys` (None: all, by name). As Stored.read."""
    stored = Stored(folder)
    for key in stored.index if keys is None else keys:
        yield key, stored.read(key)


def load(folder: Path, tensors: "Mapping[str, ShardedTensor]") -> dict[str, Tensor]:
    """Loads these tensors, each rank its part.

    Raises:
        CheckpointError: a tensor that the checkpoint lacks or holds in another shape, or an unreadable file.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.serialization import load_tensors_metadata

    _read_index(folder)
    try:
        stored = load_tensors_metadata(str(folder))
    except Exception as error:
        raise CheckpointError(f"{folder}: cannot be read as a checkpoint ({type(error).__name__}: {error})") from error
    for key, tensor in tensors.items():
        if key not in stored:
            raise CheckpointError(f"{folder}: has no tensor {key!r}; it was written by another model or stage (it holds {len(stored)} tensors)")
        if tuple(stored[key].global_shape) != tuple(tensor.global_shape):
            raise CheckpointError(
                f"{folder}: {key!r} has shape {tuple(stored[key].global_shape)}, this model needs {tuple(tensor.global_shape)}; "
                "use the checkpoint's own model configuration (state.json beside it)"
            )
    return dist_checkpointing.load(dict(tensors), str(folder))
