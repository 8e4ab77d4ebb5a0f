"""A Hugging Face checkpoint into one of ours, one tensor at a time.

Our tensors are written in parts of some hundred megabytes, two parts at a time, each
tensor as torch.save writes it: a thread holds one of ours, made of views of the mapped
source, and its numbers are read once, to be hashed and written. Parts that are on disk
stay if the import is killed, and the next one goes on behind them. At the end they are
one commit under one index of torch_dist, which any mesh loads.

Tensors keep the dtype they have. The commit is a run folder's iteration 0: train with
`--init.generator TARGET`, sample, inspect, export.
"""

import hashlib
import importlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import msgspec
import torch
from torch.utils.serialization import config as serialization

from megatron_apt import schema
from megatron_apt.checkpoint import describe, store
from megatron_apt.config import DataConfig, RunConfig, to_dict
from megatron_apt.convert.counterpart import Counterpart
from megatron_apt.convert.errors import ConvertError
from megatron_apt.convert.source import Source
from megatron_apt.convert.weights import Mapped
from megatron_apt.lock import FolderLock
from megatron_apt.methods.registry import METHODS, PRETRAINING
from megatron_apt.models.config import ModelConfig
from megatron_apt.parallel.mesh import Mesh

ROLE = METHODS[PRETRAINING].sampled
_PLAN = "import.json"  # what of which files goes into which part
_DATA, _PLACES = "tensors.distcp", "places.json"  # the files of a part: tensors, and where each of them is
_WRITERS = 2  # hashing takes longer than writing, and both leave Python's lock alone
_PIECE = 2**18  # bytes written and then hashed while they are in the processor's cache
Moved = Callable[[int], None]  # told how many bytes have been written


class _Hashed(io.RawIOBase):
    """A file that is written front to back, with the SHA-256 of what was written."""

    def __init__(self, file: BinaryIO):
        super().__init__()
        self.file, self.size, self.sha256 = file, 0, hashlib.sha256()
        self.failure: OSError | None = None  # torch.save tells of it in other words

    def write(self, data: Any, /) -> int:
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            try:
                self.file.write(piece)
            except OSError as error:
                self.failure = error
                raise
            self.sha256.update(piece)
        self.size += len(data)
        return len(data)


@dataclass(frozen=True)
class _Work:
    """The folder in which an import is under way."""

    folder: Path
    parts: list[list[Mapped]]

    def part(self, i: int) -> Path:
        return self.folder / f"part-{i:05d}"


def import_checkpoint(
    source: Source,
    family: Counterpart,
    target: Path,
    mesh: Mesh,
    moved: Moved = lambda count: None,
    part_bytes: int = 2**28,
    first_frame: bool = False,
) -> Path:
    """Writes TARGET/checkpoints/iteration-00000000; returns it.

    Args:
        moved: called with the bytes of each tensor written, and of each that an
            interrupted import had written.
        first_frame: model.first_frame of the checkpoint's configuration.

    Raises:
        ConvertError: source and model do not fit, or the target holds a run.
        FolderInUse, LockLost: another process writes to the target.
    """
    model = replace(family.model(source.config, source.path), dtype=_main_dtype(source))
    if first_frame:
        model = _given_first_frames(model, family)
    source.bound(model)
    tensors = family.tensors(model, mesh)
    source.check(tensors)
    for mapped in tensors:
        _dtype(mapped, source)
    root = target / "checkpoints"
    final = root / "iteration-00000000"
    with FolderLock(target, "import", "another target") as lock:
        root.mkdir(exist_ok=True)
        parts, plan = _plan(source, tensors, part_bytes)
        plan["first_frame"] = first_frame
        interrupted = not (root / "latest").exists() and _planned(final, plan)  # between its last two steps
        if any(root.glob("iteration-*")) and not interrupted:
            raise ConvertError(f"{root} holds checkpoints already; give another target")
        if not interrupted:
            work = _begin(root / ".import.tmp", parts, plan)
            # SHA-256 sees more, and every file is compared with it
            no_crc = cast(Any, serialization).patch("save.compute_crc32", False)
            with no_crc, ThreadPoolExecutor(1) as sealing, ThreadPoolExecutor(_WRITERS) as writing:

                def write(i: int) -> Future:
                    _write(work, i, source, moved)
                    return sealing.submit(_seal, work, i)  # while the next one is written

                # For _finish; it takes a second
                sealing.submit(importlib.import_module, "torch.distributed.checkpoint")
                for sealed in list(writing.map(write, range(len(parts)))):
                    sealed.result()
            _finish(work, model, source)
            lock.check()
            work.folder.rename(final)
            store.sync(root)
        store.write_atomically(root / "latest", final.name)
    return final


def _given_first_frames(model: ModelConfig, family: Counterpart) -> ModelConfig:
    if not any(field.name == "first_frame" for field in fields(model)):
        raise ConvertError(f"first_frame: a {family.architecture} is given no first frame; leave it out")
    return replace(model, first_frame=True)


def _plan(source: Source, tensors: list[Mapped], part_bytes: int) -> tuple[list[list[Mapped]], dict]:
    """The tensors in parts, and all that decides what the parts will hold."""
    parts: list[list[Mapped]] = [[]]
    for mapped in tensors:
        if parts[-1] and _bytes(parts[-1], source) + _bytes([mapped], source) > part_bytes:
            parts.append([])
        parts[-1].append(mapped)
    files = sorted({entry.file for entry in source.entries.values()})
    return parts, {
        "layout": [_DATA, _PLACES],
        "files": [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files],
        "config": source.config,
        "parts": [[[m.name, list(m.theirs), str(m.change)] for m in part] for part in parts],
    }


def _planned(folder: Path, plan: dict) -> bool:
    try:
        return (folder / _PLAN).is_file() and json.loads((folder / _PLAN).read_bytes()) == plan
    except (ValueError, RecursionError):  # of no import that got so far
        return False


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


def _write(work: _Work, i: int, source: Source, moved: Moved) -> None:
    """Writes a part that is not there yet, under another name."""
    folder, part = work.part(i), work.parts[i]
    if folder.is_dir():
        moved(_bytes(part, source))
        return
    temporary, stream = folder.with_suffix(".tmp"), None
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        with open(temporary / _DATA, "wb") as file:
            stream, places = _Hashed(file), {}
            for mapped in part:
                start = stream.size
                tensor = mapped.change.ours([source.read(name) for name in mapped.theirs])
                torch.save(tensor, cast(BinaryIO, stream))
                places[f"{ROLE}.{mapped.name}"] = start, stream.size - start
                moved(tensor.nbytes)
                del tensor  # not while the next one is made
        described = {"bytes": stream.size, "sha256": stream.sha256.hexdigest(), "places": places}
        (temporary / _PLACES).write_text(json.dumps(described), encoding="utf-8")
    except ConvertError:
        raise
    except Exception as error:
        cause = (stream is not None and stream.failure) or error
        reason = f"{type(cause).__name__}: {cause}"
        raise ConvertError(
            f"{temporary}: could not be written ({reason}); free disk space and import again: it goes on here"
        ) from error


def _main_dtype(source: Source) -> str:
    """What the model is run in, unless a recipe says otherwise: bfloat16 where most
    numbers are; float16 would not hold training's range.
    """
    numbers: Counter[torch.dtype] = Counter()
    for entry in source.entries.values():
        numbers[entry.dtype] += entry.shape.numel()
    return "bfloat16" if max(numbers, key=lambda dtype: numbers[dtype]) == torch.bfloat16 else "float32"


def _dtype(mapped: Mapped, source: Source) -> torch.dtype:
    dtypes = {source.entries[name].dtype for name in mapped.theirs}
    if len(dtypes) > 1:
        raise ConvertError(
            f"{source.path}: {', '.join(mapped.theirs)} become one tensor, and have dtypes "
            f"{sorted(map(str, dtypes))}; give them one"
        )
    return dtypes.pop()


def _seal(work: _Work, i: int) -> None:
    """A part that has just been written goes to disk, and only then gets its name."""
    temporary, folder = work.part(i).with_suffix(".tmp"), work.part(i)
    if not folder.is_dir():
        for path in (*temporary.iterdir(), temporary):
            store.sync(path)
        temporary.rename(folder)
        store.sync(work.folder)


def _written(mapped: Mapped, source: Source, places: dict[str, tuple[int, int]]) -> describe.Written:
    key, whole = f"{ROLE}.{mapped.name}", (0,) * len(mapped.shape)
    return describe.Written(
        key, mapped.shape, _dtype(mapped, source), whole, mapped.shape, tuple(places[key])
    )


class _Part(msgspec.Struct):
    """What a part holds, and where."""

    bytes: schema.Count
    sha256: str
    places: dict[str, tuple[schema.Count, schema.Count]]


def _read_part(folder: Path, tensors: list[Mapped]) -> _Part:
    """Raises ConvertError for one that another import wrote, or that was damaged since."""
    remedy = f"remove {folder.parent} and import again"
    part = schema.read_json(folder / _PLACES, _Part, remedy=remedy, error=ConvertError)
    if part.places.keys() != {f"{ROLE}.{mapped.name}" for mapped in tensors}:
        raise ConvertError(f"{folder / _PLACES}: names other tensors than were planned; {remedy}")
    return part


def _finish(work: _Work, model: ModelConfig, source: Source) -> None:
    """Makes one commit of the parts: one index over all of them, and what else a checkpoint has."""
    found, sums = [], {}
    for i in range(len(work.parts)):
        name = work.part(i).name
        part = _read_part(work.part(i), work.parts[i])
        found.append(
            describe.located(
                work.folder, f"{name}/{_DATA}", [_written(m, source, part.places) for m in work.parts[i]]
            )
        )
        sums[f"{name}/{_DATA}"] = {"bytes": part.bytes, "sha256": part.sha256}
        sums[f"{name}/{_PLACES}"] = store.checksum(work.part(i) / _PLACES)
    describe.write(work.folder, describe.joined(found))
    data = DataConfig(text_length=model.text_padding or 0)
    state = {
        "format": store.FORMAT,
        "iteration": 0,
        "samples_seen": 0,
        "updates": {},
        "sources": {ROLE: str(source.path.resolve())},
        "ema": False,
        "values": {},
        "imported": source.config,
        "part": source.part,
        "config": to_dict(RunConfig(method=PRETRAINING, model=model, data=data)),
    }
    store.write_atomically(work.folder / "state.json", json.dumps(state, indent=1))
    store.seal(work.folder, sums)
