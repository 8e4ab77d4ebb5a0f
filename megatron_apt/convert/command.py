"""megatron-apt convert: Hugging Face checkpoints in, one-step generators for diffusers'
pipelines out, and proof that they are the same.
"""

import ctypes
import gc
import json
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

# What works is imported where it is needed, so that options are printed and refused at
# once, and nothing waits for Megatron-Core but `verify`.
from megatron_apt import outputs
from megatron_apt.config import ParallelConfig, check_heads

if TYPE_CHECKING:
    from megatron_apt.convert.importer import Moved
    from megatron_apt.parallel.mesh import Mesh

# M_MMAP_THRESHOLD of glibc's malloc.h: larger pieces are mapped, and unmapped when they
# are freed
_MMAP_THRESHOLD = -3


@dataclass(frozen=True)
class Import:
    """A Hugging Face transformer into a run folder, from which any recipe can start
    (--init.generator). Killed, it goes on where it was.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Folder of a transformer or of a whole pipeline, or one .safetensors file."""
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    subfolder: str = ""
    """Of a pipeline's folder; empty: transformer. Wan2.2 has transformer_2 too."""
    config: str = ""
    """config.json of a file that has none beside it."""
    first_frame: bool = False
    """Wan2.2's TI2V: the checkpoint samples as image to video (model.first_frame),
    which its config.json cannot tell. Recipes choose anew.
    """
    json: str = ""
    """Also writes bytes, seconds and GB/s to this file."""


@dataclass(frozen=True)
class Export:
    """A generator into a folder that diffusers loads, with a scheduler whose one step is
    our one-step sample.
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder (its latest checkpoint) or iteration-* folder."""
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    base: str = ""
    """Folder of a whole pipeline, whose VAE, text encoders and tokenizers are copied
    beside; empty: transformer and scheduler alone.
    """
    part: str = ""
    """Of a pipeline, that it is written as; empty: what it was imported as (transformer_2
    is Wan2.2's second network), for one step transformer.
    """
    weights: Literal["auto", "ema", "raw"] = "auto"
    """auto: the average where there is one."""
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = "stored"
    """Of the weights written; a trained checkpoint stores float32."""
    discriminator: bool = False
    """Also writes backbone and heads of the discriminator, under our names."""
    license: str = "other"
    """Of the model card; that of the checkpoint you started from binds you too."""
    shard_bytes: int = 5 * 10**9
    """Largest file."""
    json: str = ""


@dataclass(frozen=True)
class Verify:
    """Compares our forward pass with diffusers' on random inputs, in float32; exit code 1
    above the tolerance.

    Under torchrun or srun ours runs on the mesh of --parallel, as it will in training.
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder or iteration-* folder."""
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """The transformer it was imported from or exported to, as for import."""
    subfolder: str = ""
    config: str = ""
    """config.json of a file that has none beside it."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    tolerance: float = 1e-5
    """Of the largest difference, relative to the largest value."""
    samples: int = 2
    seed: int = 0
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    json: str = ""

    def __post_init__(self):
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}: must be at least 1")


Command = (
    Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
)


def run(command: Import | Export | Verify) -> int:
    """Returns the exit code."""
    import torch

    # Nothing of torch is garbage; to find that out takes the interpreter a third of a
    # second when it ends
    gc.freeze()

    from megatron_apt.convert.errors import ConvertError
    from megatron_apt.parallel import startup
    from megatron_apt.parallel.mesh import Mesh

    outputs.check("json", command.json)
    try:
        if isinstance(command, Verify):
            try:
                return perform(command, startup.start(command.parallel))
            finally:
                startup.stop()
        _, processes, _ = startup.placement()
        if processes > 1:
            raise ConvertError(
                f"import and export are for one process, and here are {processes}; start it without torchrun "
                "or srun"
            )
        _give_memory_back()
        return perform(command, Mesh.alone(torch.device("cpu")))
    except KeyboardInterrupt:
        print("megatron-apt: interrupted; called again, it goes on where it was", file=sys.stderr)
        return 130
    except OSError as error:
        where = error.filename or (command.json if isinstance(command, Verify) else command.target)
        raise ConvertError(
            f"{where}: {error.strerror or error}; check the disk and the target, then call again"
        ) from error


def perform(command: Import | Export | Verify, mesh: "Mesh") -> int:
    """The command, on a mesh of one process unless it is Verify; returns the exit code."""
    if isinstance(command, Import):
        return _import(command, mesh)
    return _export(command, mesh) if isinstance(command, Export) else _verify(command, mesh)


def _import(command: Import, mesh: "Mesh") -> int:
    from megatron_apt.convert.counterparts import counterpart_of
    from megatron_apt.convert.importer import import_checkpoint
    from megatron_apt.convert.source import open_source

    source = open_source(command.source, command.subfolder, command.config)
    family, target = counterpart_of(source.config, str(source.path)), Path(command.target)
    count = sum(entry.bytes for entry in source.entries.values())
    with _measured("import", count, command.json) as moved:
        for note in source.notes:
            print(f"{source.path}: {note}")
        print(import_checkpoint(source, family, target, mesh, moved, first_frame=command.first_frame))
    return 0


def _export(command: Export, mesh: "Mesh") -> int:
    from megatron_apt.convert.counterparts import counterpart_of_model
    from megatron_apt.convert.exporter import Checkpoint, export_pipeline

    checkpoint, target = Checkpoint.open(command.checkpoint, command.weights), Path(command.target)
    family = counterpart_of_model(checkpoint.model, str(checkpoint.folder))
    names = ("base", "part", "dtype", "discriminator", "license", "shard_bytes")
    options = {name: getattr(command, name) for name in names}
    with _measured("export", None, command.json) as moved:
        left_out = export_pipeline(checkpoint, family, target, mesh, moved=moved, **options)
    if left_out:
        more = f" and {len(left_out) - 10} more" if len(left_out) > 10 else ""
        print(f"left out of the copy: {', '.join(left_out[:10])}{more}")
    print(target)
    return 0


def _verify(command: Verify, mesh: "Mesh") -> int:
    from megatron_apt.convert.counterparts import counterpart_of, counterpart_of_model
    from megatron_apt.convert.errors import ConvertError
    from megatron_apt.convert.exporter import Checkpoint
    from megatron_apt.convert.source import open_source
    from megatron_apt.convert.verify import parity

    checkpoint = Checkpoint.open(command.checkpoint, command.weights)
    family = counterpart_of_model(checkpoint.model, str(checkpoint.folder))
    check_heads(checkpoint.model, command.parallel)
    part = checkpoint.part
    own = part if part and Path(command.source, part).is_dir() else ""
    source = open_source(command.source, command.subfolder or own, command.config)
    if counterpart_of(source.config, str(source.path)) is not family:
        raise ConvertError(
            f"{source.path}: is a {source.config['_class_name']}, {checkpoint.folder} a "
            f"{family.architecture}; give what it was imported from"
        )
    kind = "ema" if checkpoint.prefix.endswith("ema.") else "raw"
    found = parity(
        f"{checkpoint.folder}:{kind}", family, checkpoint.model, source, mesh, command.samples, command.seed
    )
    if mesh.is_main:
        _tell(command, family.architecture, mesh, found)
    return int(found > command.tolerance)


def _tell(command: Verify, architecture: str, mesh: "Mesh", found: float) -> None:
    """The difference that was found, in words and as JSON if that is asked for."""
    good = found <= command.tolerance
    verdict = f"tolerance {command.tolerance:.0e}: {'equal' if good else 'NOT equal'}"
    where = f"{architecture}{_described(mesh)}"
    print(f"{where}: largest difference {found:.2e} of the largest value, {verdict}")
    if command.json:
        result: dict[str, Any] = {"difference": found, "tolerance": command.tolerance, "equal": good}
        result["architecture"] = architecture
        result |= {name: getattr(mesh, name).size for name in ("tp", "cp", "pp")}
        outputs.write("json", command.json, json.dumps(result, indent=1))


def _described(mesh: "Mesh") -> str:
    split = [
        f"{name}={getattr(mesh, name).size}" for name in ("tp", "cp", "pp") if getattr(mesh, name).size > 1
    ]
    return f" on {', '.join(split)}" if split else ""


def _give_memory_back() -> None:
    """Tensors that are let go leave the process at once; glibc otherwise keeps the space
    of recent ones, for each thread.
    """
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**20)


@contextmanager
def _measured(name: str, total: int | None, file: str) -> Generator["Moved"]:
    """A progress bar with bytes and speed, and the figures at the end."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    done, start, lock = 0, time.perf_counter(), threading.Lock()
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(name, total=total)

        def moved(count: int) -> None:
            nonlocal done
            with lock:  # several threads write
                done += count
                bar.update(task, completed=done)

        yield moved
    seconds = time.perf_counter() - start
    print(f"{name}: {done / 1e9:.2f} GB in {seconds:.1f} s, {done / 1e9 / seconds:.2f} GB/s")
    outputs.write(
        "json",
        file,
        json.dumps({"bytes": done, "seconds": seconds, "gb_per_second": done / 1e9 / seconds}, indent=1),
    )
