"""A Hugging Face checkpoint into one of ours, one tensor at a time.

Our tensors are written in parts of some hundred megabytes, each by torch's own checkpoint writer, which asks for a tensor when it writes it: no more
than one of ours and those it is made of are in memory. Parts that are on disk stay if the import is killed, and the next one goes on behind them. At
the end they are one commit under one index, which any mesh loads.

Tensors keep the dtype they have. The commit is a run folder's iteration 0: train with `--init.generator TARGET`, sample, inspect, export.
"""

import json
import pickle
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from megatron_apt.checkpoint import store
from megatron_apt.config import CAPTIONS, DataConfig, RunConfig, to_dict
from megatron_apt.convert.family import Family
from megatron_apt.convert.source import ConvertError, Source
from megatron_apt.convert.weights import Mapped
from megatron_apt.models.config import ModelConfig
from megatron_apt.parallel.mesh import Mesh

ROLE = "generator"
_PLAN = "import.json"  # what of which files goes into which part
Moved = Callable[[int], None]  # told how many bytes have been written


class _Streaming(DefaultSavePlanner):
    """Plans with empty tensors and makes each one when it is written."""

    def __init__(self, source: Source, tensors: dict[str, Mapped], moved: Moved):
        super().__init__()
        self.source, self.tensors, self.moved = source, tensors, moved

    def resolve_data(self, write_item) -> Tensor:
        mapped = self.tensors[write_item.index.fqn]
        tensor = mapped.change.ours([self.source.read(name) for name in mapped.theirs])
        self.moved(tensor.nbytes)
        return tensor


@dataclass(frozen=True)
class _Work:
    """The folder in which an import is under way."""

    folder: Path
    parts: list[list[Mapped]]

    def part(self, i: int) -> Path:
        return self.folder / f"part-{i:05d}"


def import_checkpoint(
    source: Source,
    family: Family,
    target: Path,
    mesh: Mesh,
    moved: Moved = lambda count: None,
    part_bytes: int = 2**28,
    first_frame: bool = False,
) -> Path:
    """Writes TARGET/checkpoints/iteration-00000000; returns it.

    Args:
        moved: called with the bytes of each tensor written, and of each that an interrupted import had written.
        first_frame: model.wan.first_frame of the checkpoint's configuration.

    Raises:
        ConvertError: source and model do not fit, or the target holds a run.
    """
    model = replace(family.model(source.config, source.path), dtype=_main_dtype(source))
    model = replace(model, wan=replace(model.wan, first_frame=first_frame))
    tensors = family.tensors(model, mesh)
    source.check(tensors)
    for mapped in tensors:
        _dtype(mapped, source)
    root = target / "checkpoints"
    final = root / "iteration-00000000"
    with store.lock(root / ".import.lock"):
        parts, plan = _plan(source, tensors, part_bytes)
        interrupted = not (root / "latest").exists() and _planned(final, plan)  # between its last two steps
        if any(root.glob("iteration-*")) and not interrupted:
            raise ConvertError(f"{root} holds checkpoints already; give another target")
        if not interrupted:
            work = _begin(root / ".import.tmp", parts, plan)
            sums: dict[str, dict] = {}
            with ThreadPoolExecutor(1) as sealing:  # of one part while the next is written
                for done in [sealing.submit(_seal, work, i, sums) for i in _written(work, source, moved)]:
                    done.result()
            _finish(work, model, source, sums)
            work.folder.rename(final)
            store.sync(root)
        store.write_atomically(root / "latest", final.name)
    return final


def _plan(source: Source, tensors: list[Mapped], part_bytes: int) -> tuple[list[list[Mapped]], dict]:
    """The tensors in parts, and all that decides what the parts will hold."""
    parts: list[list[Mapped]] = [[]]
    for mapped in tensors:
        if parts[-1] and _bytes(parts[-1], source) + _bytes([mapped], source) > part_bytes:
            parts.append([])
        parts[-1].append(mapped)
    files = sorted({entry.file for entry in source.entries.values()})
    return parts, {
        "files": [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files],
        "config": source.config,
        "parts": [[[m.name, list(m.theirs), str(m.change)] for m in part] for part in parts],
    }


def _planned(folder: Path, plan: dict) -> bool:
    return (folder / _PLAN).is_file() and json.loads((folder / _PLAN).read_text(encoding="utf-8")) == plan


def _begin(folder: Path, parts: list[list[Mapped]], plan: dict) -> _Work:
    """Keeps what an interrupted import of the same source has written."""
    if folder.exists() and not _planned(folder, plan):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob("*.json.tmp"):
        left_over.unlink()
    store.write_atomically(folder / _PLAN, json.dumps(plan))
    return _Work(folder, parts)


def _bytes(part: list[Mapped], source: Source) -> int:
    return sum(source.entries[name].bytes for mapped in part for name in mapped.theirs)


def _written(work: _Work, source: Source, moved: Moved) -> Iterator[int]:
    """Writes every part that is not there yet, under another name, and tells its number."""
    for i, part in enumerate(work.parts):
        folder = work.part(i)
        if folder.is_dir():
            moved(_bytes(part, source))
        else:
            temporary = folder.with_suffix(".tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            tensors = {f"{ROLE}.{mapped.name}": mapped for mapped in part}
            empty = {key: torch.empty(m.shape, dtype=_dtype(m, source), device="meta") for key, m in tensors.items()}
            writer = FileSystemWriter(temporary, single_file_per_rank=True, thread_count=1, sync_files=False)
            try:
                dcp.save(empty, storage_writer=writer, planner=_Streaming(source, tensors, moved), no_dist=True)
            except CheckpointException as error:  # derives from BaseException
                (cause, _), *_ = error.failures.values()
                if isinstance(cause, KeyboardInterrupt):
                    raise cause from None
                reason = f"{type(cause).__name__}: {cause}"
                raise ConvertError(f"{temporary}: could not be written ({reason}); free disk space and import again: it goes on here") from error
        yield i


def _main_dtype(source: Source) -> str:
    """What the model is run in, unless a recipe says otherwise: bfloat16 where most numbers are; float16 would not hold training's range."""
    numbers = Counter()
    for entry in source.entries.values():
        numbers[entry.dtype] += entry.shape.numel()
    return "bfloat16" if max(numbers, key=numbers.get) == torch.bfloat16 else "float32"


def _dtype(mapped: Mapped, source: Source) -> torch.dtype:
    dtypes = {source.entries[name].dtype for name in mapped.theirs}
    if len(dtypes) > 1:
        raise ConvertError(f"{source.path}: {', '.join(mapped.theirs)} become one tensor, and have dtypes {sorted(map(str, dtypes))}; give them one")
    return dtypes.pop()


def _seal(work: _Work, i: int, sums: dict[str, dict]) -> None:
    """A part that has just been written goes to disk, and only then gets its name; of every part the checksums."""
    temporary, folder = work.part(i).with_suffix(".tmp"), work.part(i)
    if not folder.is_dir():
        for file in temporary.iterdir():
            store.sync(file)
        temporary.rename(folder)
        store.sync(work.folder)
    for file in folder.iterdir():
        sums[str(file.relative_to(work.folder))] = store.checksum(file)


def _finish(work: _Work, model: ModelConfig, source: Source, sums: dict[str, dict]) -> None:
    """Makes one commit of the parts: one index over all of them, and what else a checkpoint has."""
    whole = Metadata({}, planner_data={}, storage_data={})
    for i in range(len(work.parts)):
        part = FileSystemReader(work.part(i)).read_metadata()
        for info in part.storage_data.values():
            info.relative_path = f"{work.part(i).name}/{info.relative_path}"
        for field in ("state_dict_metadata", "planner_data", "storage_data"):
            getattr(whole, field).update(getattr(part, field))
    (work.folder / ".metadata").write_bytes(pickle.dumps(whole))
    save_config(CheckpointingConfig("torch_dist"), str(work.folder))
    torch.save({}, work.folder / "common.pt")
    state = {
        "format": store.FORMAT,
        "iteration": 0,
        "samples_seen": 0,
        "updates": {},
        "sources": {ROLE: str(source.path.resolve())},
        "ema": False,
        "values": {},
        "imported": source.config,
        "config": to_dict(RunConfig(method="flow", model=model, data=DataConfig(text_length=CAPTIONS.get(model.family, 0)))),
    }
    store.write_atomically(work.folder / "state.json", json.dumps(state, indent=1))
    for file in work.folder.iterdir():
        if file.is_file() and file.name != store.SUMS:
            store.sync(file)
            sums[file.name] = store.checksum(file)
    store.write_atomically(work.folder / store.SUMS, json.dumps(sums, indent=1, sort_keys=True))
