"""Writes one of our checkpoints as a folder that diffusers' pipelines load.

    TARGET/transformer/       the generator: config.json, *.safetensors and their index
    TARGET/scheduler/         flow-matching Euler, whose one step from sigma 1 to 0 is
                              x = z - v: our one-step sample
    TARGET/discriminator/     if asked for: backbone and heads under our names, for those
                              who continue training
    TARGET/README.md          model card
    TARGET/...                what else the pipeline needs (VAE, text encoders,
                              tokenizers), copied from a base pipeline if one is given

One tensor at a time is in memory.
Everything is written under another name and renamed at the end. Files that a killed
export has finished are kept by the next one.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_apt.checkpoint import store
from megatron_apt.convert.base import SCHEDULER, Copied, alone, base_index, copy, left_behind, plan_copy
from megatron_apt.convert.card import model_card
from megatron_apt.convert.checkpoint import Checkpoint
from megatron_apt.convert.counterpart import SECOND, Counterpart
from megatron_apt.convert.errors import ConvertError
from megatron_apt.convert.importer import Moved
from megatron_apt.convert.source import DTYPES, PART, beyond, part_of
from megatron_apt.convert.weights import Mapped, Same
from megatron_apt.methods.registry import METHODS
from megatron_apt.parallel.mesh import Mesh

_NAME = "diffusion_pytorch_model"
_PLAN = "export.json"  # what an export under way is of
_THREADS = 2  # each reads, rearranges and writes one tensor of ours at a time
_FLUSHED = 2**28  # bytes after which the disk is set to work, while further ones are made
_CODES = {dtype: code for code, dtype in DTYPES.items()}
Maker = Callable[[], Iterable[tuple[str, Tensor]]]  # tensors by name, made when called


def export_transformer(
    checkpoint: Checkpoint,
    family: Counterpart,
    folder: Path,
    mesh: Mesh,
    dtype: str,
    moved: Moved,
    shard_bytes: int,
) -> None:
    """Writes config.json and weights of the generator into `folder`, which exists."""
    held = [shape for shape, _ in store.index(checkpoint.folder).values()]
    if problem := beyond(checkpoint.model, len(held), sum(shape.numel() for shape in held)):
        raise ConvertError(f"{checkpoint.folder}/state.json: describes {problem}; use another checkpoint")
    tensors = family.tensors(checkpoint.model, mesh)
    config = family.write_config(checkpoint.model)
    original = checkpoint.original()
    if original is not None and family.model(original, checkpoint.folder) == family.model(
        config, checkpoint.folder
    ):
        config = original  # with fields that change nothing, as it was
    _write_weights(checkpoint.folder, checkpoint.prefix, tensors, folder, _NAME, dtype, moved, shard_bytes)
    store.write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")


def discriminator_tensors(checkpoint: Checkpoint) -> list[Mapped]:
    """Backbone and heads under our names.

    Raises:
        ConvertError: a checkpoint without them.
    """
    others, critic = ("optimizer.", "ema.", "fp8."), f"{checkpoint.method.critic}."
    named = {
        key.removeprefix(critic): shape
        for key, (shape, _) in store.index(checkpoint.folder).items()
        if key.startswith(critic)
    }
    tensors = [
        Mapped(name, shape, {name: shape}, Same())
        for name, shape in named.items()
        if not name.startswith(others)
    ]
    if not tensors:
        some = " or ".join(f"method={name!r}" for name, method in METHODS.items() if method.critic)
        raise ConvertError(f"{checkpoint.folder}: holds no discriminator; export one of a run with {some}")
    return tensors


def export_discriminator(
    checkpoint: Checkpoint, tensors: list[Mapped], folder: Path, dtype: str, moved: Moved, shard_bytes: int
) -> None:
    """Writes it, with what is needed to build it, into `folder`, which exists."""
    critic, config = checkpoint.method.critic, checkpoint.state["config"]
    _write_weights(checkpoint.folder, f"{critic}.", tensors, folder, "model", dtype, moved, shard_bytes)
    described = {"architecture": "megatron_apt Discriminator", "model": config["model"]}
    described[config["method"]] = config[config["method"]]
    store.write_atomically(folder / "config.json", json.dumps(described, indent=2) + "\n")


def export_pipeline(
    checkpoint: Checkpoint,
    family: Counterpart,
    target: Path,
    mesh: Mesh,
    *,
    base: str = "",
    dtype: str = "stored",
    discriminator: bool = False,
    license: str = "other",
    part: str = "",
    moved: Moved = lambda count: None,
    shard_bytes: int = 5 * 10**9,
) -> list[str]:
    """Writes the target folder; returns what of the base's files was left out.

    Args:
        part: of a pipeline, that the generator is written as; empty: transformer for one
            step, else what it was imported as.
        base: a pipeline's folder whose other parts are copied; empty: transformer and
            scheduler alone.
        dtype: of the weights, a name of torch's, or "stored" for the checkpoint's own.
        license: of the model card.

    Raises:
        ConvertError: the target exists, the base is no pipeline, or the checkpoint lacks
            something.
        CheckpointError: the checkpoint is damaged.
    """
    part = _checked_part(checkpoint, target, base, part)
    index = base_index(base, family, checkpoint.model, checkpoint.one_step, part) if base else None
    plan = plan_copy(Path(base), index, left_behind(checkpoint.one_step, part)) if index is not None else None
    critic = discriminator_tensors(checkpoint) if discriminator else []
    work, lock = (target.with_name(f".{target.name}.export.{kind}") for kind in ("tmp", "lock"))
    store.verify(checkpoint.folder, mesh)
    average, experts = checkpoint.prefix.endswith("ema."), _experts(checkpoint, part, index)
    with store.lock(lock):
        try:
            _begin(work, checkpoint, part, dtype, shard_bytes)
            export_transformer(checkpoint, family, work / part, mesh, dtype, moved, shard_bytes)
            if critic:
                (work / "discriminator").mkdir()
                export_discriminator(checkpoint, critic, work / "discriminator", dtype, moved, shard_bytes)
            _write_around(work, checkpoint.one_step, index, plan)
            card = model_card(checkpoint.state, family, average, license, base, experts)
            store.write_atomically(work / "README.md", card)
            work.rename(target)
            (target / _PLAN).unlink()
            store.sync(target.parent)
        except (ConvertError, store.CheckpointError):
            shutil.rmtree(work, ignore_errors=True)  # nothing of it would be used again
            raise
        finally:
            lock.unlink(missing_ok=True)
    return plan.left_out if plan else []


def _checked_part(checkpoint: Checkpoint, target: Path, base: str, part: str) -> str:
    """The part of a pipeline that is written.

    Raises:
        ConvertError: the target cannot be written, or no pipeline has such a part.
    """
    if os.path.lexists(target):
        raise ConvertError(f"{target} exists already; give another target")
    if base and target.resolve().is_relative_to(Path(base).resolve()):
        raise ConvertError(f"{target}: lies in the base {base}, which is copied; give another target")
    part = part or (PART if checkpoint.one_step else _remembered(checkpoint, base))
    if part_of(part) != part:
        raise ConvertError(f"part={part!r}: a pipeline's networks are {PART} and {SECOND}")
    return part


def _write_around(work: Path, one_step: bool, index: dict | None, plan: Copied | None) -> None:
    """What a pipeline has beside its networks."""
    if index is not None and plan is not None:
        copy(plan, work)
        described = json.dumps(alone(index) if one_step else index, indent=2)
        store.write_atomically(work / "model_index.json", described + "\n")
    if one_step or index is None:
        (work / "scheduler").mkdir()
        scheduler = json.dumps(SCHEDULER, indent=2) + "\n"
        store.write_atomically(work / "scheduler" / "scheduler_config.json", scheduler)


def _remembered(checkpoint: Checkpoint, base: str) -> str:
    """The part that a checkpoint was imported as.

    Raises:
        ConvertError: that cannot be found any more, and the base has two.
    """
    if checkpoint.part is None and base and (Path(base) / SECOND).is_dir():
        raise ConvertError(
            f"{checkpoint.folder}: started from {checkpoint.source or 'random weights'}, which is not there "
            f"any more, so that nothing tells whether it is the base's {PART} or {SECOND}; say --part"
        )
    return checkpoint.part or PART


def _experts(checkpoint: Checkpoint, part: str, index: dict | None) -> str:
    """What the card says of a pipeline of two networks, of which the second takes over at
    less noise; "" of others.
    """
    if part != PART:
        return (
            f"takes the place of `{part}`, which the pipeline calls where there is less noise than its "
            f"`boundary_ratio`; `{PART}` is the base's"
        )
    if checkpoint.one_step and (checkpoint.part == SECOND or (index or {}).get(SECOND, [None])[0]):
        return (
            f"stands alone as `{PART}`, started from the `{checkpoint.part or PART}` of its pipeline: one "
            "evaluation at full noise makes the sample, so that no second network and no `boundary_ratio` "
            "is left"
        )
    return ""


def _begin(work: Path, checkpoint: Checkpoint, part: str, dtype: str, shard_bytes: int) -> None:
    """Keeps the files of weights that an interrupted export of the same checkpoint has
    finished, and nothing else.
    """
    written = (checkpoint.folder / store.SUMS).stat().st_mtime_ns
    plan = json.dumps(
        [str(checkpoint.folder.resolve()), written, checkpoint.prefix, part, dtype, shard_bytes]
    )
    if work.exists() and not (
        (work / _PLAN).is_file() and (work / _PLAN).read_text(encoding="utf-8") == plan
    ):
        shutil.rmtree(work)  # of another checkpoint
    work.mkdir(parents=True, exist_ok=True)
    for left_over in work.iterdir():
        if left_over.is_dir() and left_over.name != part:
            shutil.rmtree(left_over)
    (work / part).mkdir(exist_ok=True)
    store.write_atomically(work / _PLAN, plan)


def _write_weights(
    source: Path,
    prefix: str,
    tensors: list[Mapped],
    folder: Path,
    name: str,
    dtype: str,
    moved: Moved,
    shard_bytes: int,
) -> None:
    stored = store.Stored(source)
    kept = _dtypes(stored, prefix, tensors)
    dtypes = kept if dtype == "stored" else dict.fromkeys(kept, getattr(torch, dtype))
    files: list[list[Mapped]] = [[]]
    held = 0
    for mapped in tensors:
        size = mapped.shape.numel() * dtypes[mapped.name].itemsize
        if files[-1] and held + size > shard_bytes:
            files.append([])
            held = 0
        files[-1].append(mapped)
        held += size

    def theirs(mapped: Mapped) -> Iterator[tuple[str, Tensor]]:
        key = _key(prefix, mapped)
        tensor = stored.read(key).to(dtypes[mapped.name])
        if (
            tensor.dtype == torch.float16
            and kept[mapped.name] != tensor.dtype
            and not torch.isfinite(tensor).all()
        ):
            raise ConvertError(
                f"{source}: {key} has numbers beyond float16 (65504); use --dtype bfloat16 or float32"
            )
        return zip(mapped.theirs, mapped.change.theirs(tensor), strict=True)

    weight_map = {}
    for i, part in enumerate(files):
        file = folder / (
            f"{name}.safetensors"
            if len(files) == 1
            else f"{name}-{i + 1:05d}-of-{len(files):05d}.safetensors"
        )
        entries = [
            (key, dtypes[mapped.name], shape) for mapped in part for key, shape in mapped.theirs.items()
        ]
        weight_map |= dict.fromkeys((key for key, *_ in entries), file.name)
        if file.exists():  # of an export that was interrupted
            moved(sum(dtype.itemsize * shape.numel() for _, dtype, shape in entries))
        else:
            _write_safetensors(file, entries, [partial(theirs, mapped) for mapped in part], moved)
    if len(files) > 1:
        total = sum(mapped.shape.numel() * dtypes[mapped.name].itemsize for mapped in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        store.write_atomically(folder / f"{name}.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _key(prefix: str, mapped: Mapped) -> str:
    return (prefix.removesuffix("ema.") if mapped.fixed else prefix) + mapped.name


def _dtypes(stored: store.Stored, prefix: str, tensors: list[Mapped]) -> dict[str, torch.dtype]:
    """The dtype of each of our tensors in the checkpoint.

    Raises:
        ConvertError: one is not there, or of another shape.
    """
    found: dict[str, torch.dtype] = {}
    for mapped in tensors:
        shape, dtype = stored.index.get(_key(prefix, mapped), (None, None))
        if shape != mapped.shape or dtype is None:
            there = (
                "is not in it"
                if shape is None
                else f"has shape {tuple(shape)} instead of {tuple(mapped.shape)}"
            )
            raise ConvertError(
                f"{stored.folder}: {_key(prefix, mapped)} {there}; its state.json describes another model"
            )
        found[mapped.name] = dtype
    return found


def _write_safetensors(
    file: Path, entries: list[tuple[str, torch.dtype, torch.Size]], makers: list[Maker], moved: Moved
) -> None:
    """A safetensors file of tensors that are made when they are written, in any order;
    the library's own writer wants all of them at once.

    The format: the header's length (8 bytes, little-endian), a JSON header with every
    tensor's dtype, shape and place, then the numbers. Tensors of wider dtypes come first,
    so that each begins at a multiple of its number's size.
    """
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in sorted(entries, key=lambda entry: (-entry[1].itemsize, entry[0])):
        start, end = end, end + dtype.itemsize * shape.numel()
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    encoded = struct.pack("<Q", len(encoded)) + encoded
    temporary = file.with_name(file.name + ".tmp")
    with open(temporary, "wb") as stream:
        stream.write(encoded)
        stream.truncate(len(encoded) + end)
        stream.flush()

        def write(make: Maker) -> int:
            size = 0
            for name, tensor in make():
                _write_at(stream.fileno(), tensor, len(encoded) + header[name]["data_offsets"][0])
                moved(tensor.nbytes)
                size += tensor.nbytes
            return size

        unflushed = 0
        with ThreadPoolExecutor(_THREADS) as pool:
            for size in pool.map(write, makers):
                unflushed += size
                if unflushed >= _FLUSHED:
                    os.fsync(stream.fileno())
                    unflushed = 0
        os.fsync(stream.fileno())
    temporary.replace(file)
    store.sync(file.parent)


def _write_at(descriptor: int, tensor: Tensor, offset: int) -> None:
    data = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    while data:  # one call writes at most 2 GiB
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
