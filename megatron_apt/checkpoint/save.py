"""Saving without stopping: a snapshot now, the files in a background thread, the commit
once every rank has written.

Megatron-Core plans the save (collectives, now) and writes the files; the main rank
collects the results (collectives, at the commit); between the two lie only file writes.
They run in a thread, not in Megatron-Core's forked process: the thread ends with its
process, so no orphan of a killed run can write into the folder of the next one, and
nothing is forked under the feet of CUDA, NCCL or gloo threads. The snapshot is the copy
that every parameter's owner makes when shards become whole parameters (networks.py).
"""

import json
import math
import os
import queue
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from megatron_apt.checkpoint import describe, index
from megatron_apt.checkpoint.files import CheckpointError, point
from megatron_apt.checkpoint.state import FORMAT, iteration_of, name, read_values
from megatron_apt.checkpoint.sums import Sum, checksum, seal
from megatron_apt.config import RetentionConfig
from megatron_apt.files import sync, write_atomically
from megatron_apt.lock import LockLost
from megatron_apt.parallel.mesh import Mesh

_FAILED = (
    "{folder}: could not be written ({reason}); the checkpoints before it are whole. Free disk space, or "
    "check the folder"
)


@dataclass
class _Pending:
    """A save between its snapshot and its commit, on one rank."""

    iteration: int
    temporary: Path
    state: dict
    prune: bool
    request: AsyncRequest
    buckets: list  # what this rank writes, in host memory
    # Of the files this rank has written; this and the next two are filled by the thread
    sums: dict[str, Sum] = field(default_factory=dict)
    written: list[index.Index] = field(default_factory=list)
    error: str = ""
    thread: threading.Thread | None = None


class Checkpoints:
    """Saves of one run. Every rank makes the same calls in the same order."""

    def __init__(self, output: str, mesh: Mesh, retention: RetentionConfig):
        self.root, self.mesh, self.retention = Path(output) / "checkpoints", mesh, retention
        self._pending: _Pending | None = None
        self._validated = False  # that the ranks' parts make up each tensor; they stay the same in a run
        self._removal: threading.Thread | None = None  # of superseded checkpoints, on the main rank
        self.fence: Callable[[], None] = lambda: None
        """Raises LockLost on the main rank once the folder is another's; asked before
        anything is made or committed there.
        """

    def save(
        self, iteration: int, tensors: Mapping[str, ShardedTensor], state: dict, prune: bool = True
    ) -> None:
        """Starts a commit of these tensors, which must not change before it is done, and
        returns while they are being written.

        Args:
            state: JSON-ready; goes into state.json.
            prune: False leaves every older checkpoint where it is.

        Raises:
            CheckpointError: on every rank, if the folder cannot be made.
        """
        self.commit()
        temporary = self.root / f".{name(iteration)}.tmp"

        def clear() -> None:
            if self._removal is not None:
                self._removal.join()
            for left_over in self.root.glob(".iteration-*.tmp"):  # of a run that was killed
                shutil.rmtree(left_over)
            temporary.mkdir(parents=True)

        self._on_main(clear, temporary)
        # Results come back within this process: without this, Megatron-Core starts a
        # manager process that outlives a killed run.
        filesystem_async._results_queue = queue.Queue()
        try:
            parts, _ = save_preprocess(dict(tensors), not self._validated)
            request = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1).async_save(
                parts, temporary
            )
        except (OSError, CheckpointException) as error:  # the latter derives from BaseException
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise CheckpointError(_FAILED.format(folder=temporary, reason=reason)) from error
        self._validated = True
        buckets = request.preload_fn() if request.preload_fn is not None else []
        self._pending = pending = _Pending(iteration, temporary, state, prune, request, buckets)
        pending.thread = threading.Thread(
            target=_write, args=(pending,), name=f"save-{iteration}", daemon=True
        )
        pending.thread.start()

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing."""
        thread = self._pending.thread if self._pending is not None else None
        return thread is not None and thread.is_alive()

    def commit(self) -> Path | None:
        """Waits for the pending save, if any, and commits it; returns its folder.

        Raises:
            CheckpointError: on every rank, if any could not write.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        if pending.thread is not None:
            pending.thread.join()
        final = self.root / name(pending.iteration)
        mine = pending.error, pending.sums, pending.written
        everyone: list[tuple] = [()] * self.mesh.world.size
        dist.gather_object(mine, everyone if self.mesh.is_main else None, dst=0)

        def publish() -> None:
            if errors := [error for error, *_ in everyone if error]:
                raise CheckpointError(errors[0])
            sums = {name: value for _, part, _ in everyone for name, value in part.items()}
            tensors = describe.joined(one for *_, written in everyone for one in written)
            self._publish(pending, final, sums, tensors)

        self._on_main(publish, pending.temporary)
        return final

    def _on_main(self, action: Callable[[], None], folder: Path) -> None:
        """Runs `action` on the main rank while the others wait; its failure is raised on all of them."""
        failure = [None]
        if self.mesh.is_main:
            try:
                self.fence()
                action()
            except OSError as error:
                failure = [
                    CheckpointError(_FAILED.format(folder=folder, reason=f"{type(error).__name__}: {error}"))
                ]
            except CheckpointError as error:
                failure = [CheckpointError(_FAILED.format(folder=folder, reason=error))]
            except LockLost as error:
                failure = [error]
        dist.broadcast_object_list(failure, src=0)
        if failure[0]:
            raise failure[0]

    def _publish(self, pending: _Pending, final: Path, sums: dict[str, Sum], tensors: index.Index) -> None:
        temporary = pending.temporary
        write_atomically(
            temporary / "state.json",
            json.dumps({"format": FORMAT, "iteration": pending.iteration, **pending.state}, indent=1),
        )
        describe.write(temporary, tensors)
        seal(temporary, sums)
        # Of a run that was pointed back to an older one; out of sight first, as below
        if os.path.lexists(final):
            final.rename(self.root / f".{final.name}.replaced.tmp")
        temporary.rename(final)
        sync(self.root)
        point(self.root, final.name)
        # First out of sight: a kill halfway must not leave half a checkpoint under a whole one's name.
        old = superseded(self.root, final.name, self.retention) if pending.prune else []
        doomed = [folder.rename(self.root / f".{folder.name}.tmp") for folder in old]
        doomed += self.root.glob(".iteration-*.replaced.tmp")
        self._removal = threading.Thread(target=_remove, args=(doomed,), name="prune")
        self._removal.start()


def _write(pending: _Pending) -> None:
    """Runs in the background: this rank's files, flushed to disk, their checksums, and
    where in them the numbers lie. No collectives, and no exceptions out.
    """
    request = pending.request
    if request.async_fn is None:
        return  # this rank owns nothing
    transforms = cast(partial, request.async_fn).args[0]
    try:
        for i, bucket in enumerate(pending.buckets):
            answers: Any = queue.Queue()  # in place of the queues of processes that it expects
            filesystem_async.FileSystemWriterAsync.write_preloaded_data(
                transforms, i, bucket, answers, cast(Any, _Count()), use_fsync=True
            )
            _, answer = answers.get()
            if isinstance(answer, Exception):
                raise answer
            pending.sums[bucket[1]] = checksum(Path(bucket[0]))
            pending.written.append(_described(bucket, answer))
    except Exception as error:  # goes to the commit, which raises it on every rank
        pending.error = f"{type(error).__name__}: {error}"


def _described(bucket: tuple, results: list) -> index.Index:
    """Where in a file that has just been written its tensors lie."""
    file, name, (_, written) = bucket
    chunks = []
    for (item, _), result in zip(written, results, strict=True):
        tensor, place = item.tensor_data, result.storage_data
        box = tensor.chunk.offsets, tensor.chunk.sizes
        chunks.append(
            describe.Written(
                item.index.fqn, tensor.size, tensor.properties.dtype, *box, (place.offset, place.length)
            )
        )
    return describe.located(Path(file).parent, name, chunks)


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)  # the next save tries again


class _Count:
    """Stands in for the queue by which a writing process says that it is done."""

    def get(self) -> None: ...

    def task_done(self) -> None: ...


def superseded(root: Path, newest: str, retention: RetentionConfig) -> list[Path]:
    """Committed folders, up to `newest`, that retention does not keep."""
    found = {
        iteration: path
        for path in root.glob("iteration-*")
        if (iteration := iteration_of(path.name)) is not None and path.is_dir()
    }
    last = iteration_of(newest)
    assert last is not None
    found = {iteration: found[iteration] for iteration in sorted(found) if iteration <= last}
    folders = list(found.values())
    if not retention.last:
        return []
    kept = {path.name for path in folders[-retention.last :]}
    if retention.every:
        kept |= {path.name for iteration, path in found.items() if iteration % retention.every == 0}
    if retention.best:
        kept |= _best(root, folders, retention)
    return [path for path in folders if path.name not in kept]


def _best(root: Path, folders: list[Path], retention: RetentionConfig) -> set[str]:
    """The folder whose saved value of `retention.best` is best, which `best` then names,
    and those whose values cannot be read.
    """
    values: dict[str, float] = {}
    unreadable: set[str] = set()
    for folder in folders:
        try:
            value = read_values(folder).get(retention.best)
        except CheckpointError as error:
            warnings.warn(f"{error} (retention.best); it stays where it is", stacklevel=2)
            unreadable.add(folder.name)
            continue
        if value is None or math.isnan(value):
            warnings.warn(
                f"{folder}: has no value {retention.best!r} (retention.best), so it cannot be the best",
                stacklevel=2,
            )
        else:
            values[folder.name] = value
    if not values:
        return unreadable
    best = (min if retention.best_is == "lowest" else max)(values, key=lambda name: values[name])
    write_atomically(root / "best", best)
    return {best, *unreadable}
