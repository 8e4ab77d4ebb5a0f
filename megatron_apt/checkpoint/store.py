"""Checkpoint folders: one commit each, loadable on another tensor-, context- or data-parallel size.

    OUTPUT/checkpoints/iteration-00000100/   tensors (torch_dist) and state.json: iteration, configuration, counters
    OUTPUT/checkpoints/latest                name of the newest whole one

A save writes to a temporary name, flushes to disk, renames, then moves `latest`: a crash at any instant leaves the previous commit whole.
Everything of ours that is not a tensor is JSON. torch_dist keeps its own index as a pickle, which is read only if it names nothing but the
classes such an index is made of.
"""

import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.serialization import load_tensors_metadata
from torch import Tensor, nn

from megatron_apt.parallel.mesh import Mesh

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another shape."""


def sharded(key: str, tensor: Tensor, parameter: nn.Parameter, mesh: Mesh) -> ShardedTensor:
    """A tensor laid out like a parameter (its weight, average or optimiser state), as dist_checkpointing sees it."""
    if parameter.sharded_dim is None:
        return ShardedTensor.from_rank_offsets(key, tensor, replica_id=(0, mesh.tp.rank, mesh.dp_cp.rank))
    offset = (parameter.sharded_dim, mesh.tp.rank, mesh.tp.size)
    return ShardedTensor.from_rank_offsets(key, tensor, offset, replica_id=(0, 0, mesh.dp_cp.rank))


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(output: str, iteration: int, tensors: Mapping[str, ShardedTensor], state: dict, mesh: Mesh, keep: int) -> Path:
    """Commits one checkpoint; every rank calls it. Older ones beyond `keep` are removed after the commit."""
    root = Path(output) / "checkpoints"
    final = root / f"iteration-{iteration:08d}"
    temporary = root / f".{final.name}.tmp"
    if mesh.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(dict(tensors), str(temporary))
    if mesh.is_main:
        write_atomically(temporary / "state.json", json.dumps({"format": FORMAT, "iteration": iteration, **state}, indent=1))
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _sync(root)
        write_atomically(root / "latest", final.name)
        earlier = [path for path in sorted(root.glob("iteration-*")) if path.name <= final.name]
        for old in earlier[:-keep] if keep else []:
            shutil.rmtree(old)
    dist.barrier()
    return final


def latest(output: str) -> Path | None:
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
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: {error}; the checkpoint is damaged, use an older one") from error
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{file}: format={state.get('format')}, this version reads {FORMAT}")
    return state


class _IndexReader(pickle.Unpickler):
    """Unpickles nothing but the classes that torch.distributed.checkpoint's own index is made of."""

    _MODULES = ("torch.distributed.checkpoint.", "torch.serialization", "torch._utils", "collections", "pathlib")
    _NAMES = frozenset({"torch.Size", "torch.device", "builtins.set", "builtins.slice", "_codecs.encode"})

    def find_class(self, module: str, name: str):
        known = module.startswith(self._MODULES[0]) or module in self._MODULES or f"{module}.{name}" in self._NAMES
        torch_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout | torch.memory_format)
        if not (known or torch_type):
            raise CheckpointError(f"its index asks for {module}.{name}, which no checkpoint index needs; do not load this checkpoint")
        return super().find_class(module, name)


def _check_index(folder: Path) -> None:
    """torch reads .metadata with an unrestricted unpickler, so it is read here first with a restricted one.

    Raises:
        CheckpointError: missing, damaged, or naming anything that could run code.
    """
    file = folder / ".metadata"
    try:
        with open(file, "rb") as stream:
            _IndexReader(stream).load()
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    except Exception as error:
        raise CheckpointError(f"{file}: cannot be read ({type(error).__name__}: {error}); the checkpoint is damaged, use an older one") from error


def load(folder: Path, tensors: Mapping[str, ShardedTensor]) -> dict[str, Tensor]:
    """Loads these tensors, each rank its part.

    Raises:
        CheckpointError: a tensor that the checkpoint lacks or holds in another shape, or an unreadable file.
    """
    _check_index(folder)
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
