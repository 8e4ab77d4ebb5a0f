"""megatron-apt checkpoint: what a checkpoint holds, whether it is whole, and the same one
written by another mesh.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from megatron_apt import outputs
from megatron_apt.checkpoint import files, store
from megatron_apt.checkpoint.state import State, configuration_of
from megatron_apt.config import ParallelConfig, PipelineConfig, RetentionConfig, check_fits
from megatron_apt.lock import FolderLock
from megatron_apt.parallel.mesh import Mesh


@dataclass(frozen=True)
class Inspect:
    """Prints what a checkpoint holds."""

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder (its latest checkpoint) or iteration-* folder."""
    tensors: bool = False
    """Also lists every tensor."""
    json: str = ""
    """Also writes it to this file."""


@dataclass(frozen=True)
class Verify:
    """Compares every file with its checksum; exit code 1 if any differs."""

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]


@dataclass(frozen=True)
class Reshard:
    """Writes a checkpoint again from another mesh, one file per rank that owns weights.

    Training loads any checkpoint on any mesh; this lays the files out for one beforehand.
    Start as many processes as the mesh has ranks.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Run folder (its latest checkpoint) or iteration-* folder."""
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """Run folder to write to."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


Command = (
    Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Reshard, tyro.conf.subcommand("reshard")]
)


def run(command: Inspect | Verify | Reshard) -> int:
    """Returns the exit code."""
    if isinstance(command, Inspect):
        outputs.check("json", command.json)
        print("\n".join(inspect(command)))
        return 0
    if isinstance(command, Verify):
        folder = store.resolve(command.path)
        damages = store.damages(folder)
        unsealed = (
            ""
            if store.sealed(folder)
            else "; its list of files is not sealed (older versions sealed none), so that a changed list "
            "would not show"
        )
        print("\n".join(damages) if damages else f"{folder}: every file is as it was committed{unsealed}")
        return int(bool(damages))
    reshard(command)
    return 0


def inspect(command: Inspect) -> Iterator[str]:
    folder = store.resolve(command.path)
    state = store.read_state(folder)
    config = state["config"]
    stored = store.index(folder)
    groups: dict[str, list[int]] = {}
    for key, (shape, dtype) in stored.items():
        role, _, rest = key.partition(".")
        kind = (
            rest.split(".")[0]
            if rest.startswith("ema.")
            else ".".join(rest.split(".")[:2])
            if rest.startswith("optimizer.")
            else "weights"
        )
        total = groups.setdefault(f"{role} {kind}", [0, 0, 0])
        for i, value in enumerate((1, shape.numel(), shape.numel() * dtype.itemsize)):
            total[i] += value
    yield f"{folder}"
    parallel = config["parallel"]
    mesh = " x ".join(f"{axis}={parallel[axis]}" for axis in ("tp", "cp", "pp"))
    yield (
        f"method {config['method']}, iteration {state['iteration']}, {state['samples_seen']} samples seen, "
        f"seed {config['seed']}, written by {mesh}"
    )
    yield f"updates: {', '.join(f'{role} {count}' for role, count in state['updates'].items())}"
    for role, source in state["sources"].items():
        yield f"{role} started from {source}"
    for group, (tensors, numbers, size) in groups.items():
        yield f"  {group:32} {tensors:5} tensors {numbers:15,} numbers {size / 2**20:12,.1f} MiB"
    if command.tensors:
        yield from (f"  {key} {tuple(shape)}" for key, (shape, _) in stored.items())
    if command.json:
        summary = {name: {"tensors": t, "numbers": n, "bytes": b} for name, (t, n, b) in groups.items()}
        outputs.write(
            "json", command.json, json.dumps({"folder": str(folder), **state, "groups": summary}, indent=1)
        )


def reshard(command: Reshard) -> None:
    """Builds the run's networks on the new mesh, loads and saves. The same source and
    mesh give the same bytes.
    """
    from megatron_apt.parallel import startup

    folder = store.resolve(command.source)
    target = Path(command.target) / "checkpoints" / folder.name
    _check_target(folder, target)
    mesh = startup.start(command.parallel)
    try:
        store.verify(folder, mesh)
        state = store.read_state(folder)
        stored = {key: value for key, value in state.items() if key not in ("format", "iteration")}
        stored["config"] = {
            **state["config"],
            "parallel": {**state["config"]["parallel"], **vars(command.parallel)},
        }
        with FolderLock(command.target, "reshard", "another target folder", mesh) as lock:
            if os.path.lexists(target):
                _finish(target, {"format": store.FORMAT, "iteration": state["iteration"], **stored}, mesh)
            else:
                _write_again(folder, state, command, stored, mesh, lock)
        if mesh.is_main:
            print(target)
    finally:
        startup.stop()


def _check_target(folder: Path, target: Path) -> None:
    """Raises CheckpointError for a target that is no place of its own, has the checkpoint
    already, or can be none (its name is too long).
    """
    try:
        _check_place(folder, target)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "its links lead back to themselves"
        raise store.CheckpointError(
            f"{str(target.parent.parent)[:300]}: {reason}; give another target folder"
        ) from None


def _check_place(folder: Path, target: Path) -> None:
    run, source = target.parent.parent, folder.resolve()
    if run.resolve().is_relative_to(source) or target.resolve() == source:
        raise store.CheckpointError(f"{run}: is where {folder} lies; give another target folder")
    in_the_way = next(
        (path for path in (target, target.parent, run, *run.parents) if path.exists() and not path.is_dir()),
        None,
    )
    if in_the_way is not None:
        raise store.CheckpointError(f"{in_the_way}: is no folder; give another target folder")
    if target.exists() and os.path.lexists(target.parent / "latest"):
        raise store.CheckpointError(f"{target} exists already; give another target folder")


def _finish(target: Path, state: dict, mesh: Mesh) -> None:
    """Names a commit the latest that was written whole before the command was killed.

    Raises:
        CheckpointError: it is another one, or damaged.
    """
    store.verify(target, mesh)
    if store.read_state(target) != json.loads(json.dumps(state)):
        raise store.CheckpointError(
            f"{target} exists already, written from another checkpoint or for another mesh; give another "
            "target folder"
        )
    if mesh.is_main:
        files.point(target.parent, target.name)


def _write_again(
    folder: Path, state: State, command: Reshard, stored: dict, mesh: Mesh, lock: FolderLock
) -> None:
    from megatron_apt.checkpoint.fits import check_model
    from megatron_apt.checkpoint.save import Checkpoints
    from megatron_apt.methods.build import build_method
    from megatron_apt.schedule.prepare import Pipeline
    from megatron_apt.training.networks import Network

    config = replace(configuration_of(state["config"]), parallel=command.parallel)
    # Nothing is trained here
    config = replace(config.without_measuring(), pipeline=PipelineConfig(chunks=1))
    check_fits(config)
    check_model(store.Stored(folder), config.model, config.of_method.sampled, mesh)
    tensors = {}
    method = build_method(config, mesh)
    pipeline = Pipeline(config.pipeline, method, mesh)
    for name, role in method.roles.items():
        if role.optimizer is not None:  # what does not train is not in a checkpoint
            network = Network(name, role, mesh, pipeline.cut(name))
            network.restore(folder, state["updates"].get(name, 0), state["sources"].get(name, ""))
            tensors |= network.sharded_state()
    checkpoints = Checkpoints(command.target, mesh, RetentionConfig(last=0))
    checkpoints.fence = lock.check
    checkpoints.save(state["iteration"], tensors, stored)
    checkpoints.commit()
