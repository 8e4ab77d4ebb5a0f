"""Tensors of a Hugging Face checkpoint, one at a time: a folder in diffusers' layout or
one .safetensors file. Never a pickle.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_apt.convert.counterparts import counterparts
from megatron_apt.convert.errors import ConvertError
from megatron_apt.convert.foreign import plain, what_it_is
from megatron_apt.convert.weights import Mapped
from megatron_apt.encoders.weight_files import (
    Announced,
    WeightFileError,
    announced,
    printable,
    read_settings,
    weight_files,
)
from megatron_apt.models.config import MOST_BLOCKS, ModelConfig

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PART = "transformer"  # of a pipeline, if nothing else is said
_PART = re.compile(r"transformer(_\d+)?")


@dataclass(frozen=True)
class Entry:
    """One tensor as its file announces it, by the name that it has there."""

    file: Path
    shape: torch.Size
    dtype: torch.dtype
    name: str

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Source:
    """A Hugging Face checkpoint.

    Attributes:
        entries: by diffusers' names.
        part: of a pipeline, which it is: transformer, or transformer_2.
        notes: what a user is told of how it is read.
    """

    path: Path
    config: dict
    entries: dict[str, Entry]
    part: str = PART
    notes: tuple[str, ...] = ()

    def read(self, name: str) -> Tensor:
        """One tensor. It is a view of the mapped file, which is let go with it."""
        entry = self.entries[name]
        with _opened(entry.file) as file:
            return file.get_tensor(entry.name)

    def bound(self, model: ModelConfig) -> None:
        """Compares a model's sizes with what the files hold at all, before anything of it
        is built.

        Raises:
            ConvertError: it has more blocks than they have tensors, or is wider than all
                their numbers.
        """
        numbers = sum(entry.shape.numel() for entry in self.entries.values())
        if problem := beyond(model, len(self.entries), numbers):
            raise ConvertError(f"{self.path}: config.json asks for {problem}; they do not belong together")

    def check(self, tensors: list[Mapped]) -> None:
        """Compares the tensors that are there with those that are needed.

        Raises:
            ConvertError: one is missing, superfluous, of another shape, or not of
                floating point.
        """
        needed = {name: shape for mapped in tensors for name, shape in mapped.theirs.items()}
        missing, extra = (
            sorted(needed.keys() - self.entries.keys()),
            sorted(self.entries.keys() - needed.keys()),
        )
        if missing or extra:
            parts = [
                f"{what} {_some(names)}"
                for what, names in (("lacks", missing), ("has unknown", extra))
                if names
            ]
            reason = "config.json describes another model, or the checkpoint is not whole"
            raise ConvertError(f"{self.path}: {' and '.join(parts)}; {reason}")
        for name, shape in needed.items():
            entry = self.entries[name]
            if entry.shape != shape:
                raise ConvertError(
                    f"{entry.file}: {name} has shape {tuple(entry.shape)}, config.json asks for "
                    f"{tuple(shape)}; they do not belong together"
                )


def beyond(model: ModelConfig, tensors: int, numbers: int) -> str | None:
    """What of a model cannot be made of so many tensors with so many numbers; None where all may be."""
    if model.blocks > tensors:
        return f"{model.blocks} blocks, and the files hold {tensors} tensors"
    if model.blocks > MOST_BLOCKS:
        return f"{model.blocks} blocks, and no model has more than {MOST_BLOCKS}"
    for name, width in model.widths.items():
        if width > numbers:
            return f"{name} {width} wide, and the files hold {numbers} numbers"
    return None


def open_source(path: str | Path, subfolder: str = "", config: str = "") -> Source:
    """A checkpoint from a user's path.

    Args:
        path: a transformer's folder (config.json, *.safetensors, an index where there are
            several), a pipeline's folder, or one .safetensors file.
        subfolder: of a pipeline's folder; empty: `transformer`, or transformer_2 where
            that is the only one.
        config: config.json of a file that has none beside it.

    Raises:
        ConvertError: nothing there, only pickles, a file that is missing, cut short or of
            another format, a dtype that is no floating point, or no transformer under
            diffusers' names.
    """
    path = Path(path)
    if not path.exists():
        raise ConvertError(
            f"{path} does not exist; give a local folder or .safetensors file (nothing is downloaded)"
        )
    if path.is_dir():
        _check_pipeline(path, subfolder)
        path = path / (
            subfolder or next((part for part in (PART, "transformer_2") if (path / part).is_dir()), "")
        )
    try:
        return _read(
            path, Path(config) if config else (path if path.is_dir() else path.parent) / "config.json"
        )
    except WeightFileError as error:
        raise ConvertError(str(error)) from None


def _check_pipeline(path: Path, subfolder: str) -> None:
    """Raises ConvertError for a pipeline without such a network."""
    if not (path / "model_index.json").is_file() or any(
        (path / part).is_dir() for part in ([subfolder] if subfolder else (PART, "transformer_2"))
    ):
        return
    name = printable(str(read_json(path / "model_index.json").get("_class_name")))
    there = ", ".join(sorted(printable(inner.name) for inner in path.iterdir() if inner.is_dir()))
    raise ConvertError(
        f"{path}: is a {name}, which has no {subfolder or PART} (it has {there or 'no folders'}); give a "
        "pipeline with one"
    )


def _read(path: Path, config: Path) -> Source:
    if not config.exists():
        _refuse_foreign(path)
    settings = read_json(config)
    if "quantization_config" in settings:
        raise ConvertError(
            f"{config}: has a quantization_config; take the bf16, fp16 or fp32 weights of the same model, "
            "not quantised ones"
        )
    weights = weight_files(path) if path.is_dir() else None
    architecture, held = str(settings.get("_class_name")), {}
    for file in weights.files if weights else (path,):
        found = announced(file)
        if twice := sorted(found.keys() & held.keys()):
            raise ConvertError(
                f"{file}: {printable(twice[0])} is also in {held[twice[0]][0].name}; remove one of the files"
            )
        held |= {name: (file, tensor) for name, tensor in found.items()}
    if reason := what_it_is(held, architecture):
        raise ConvertError(f"{path}: cannot be converted as it is; {reason}")
    try:
        names = plain(held, architecture)
    except ValueError as error:
        raise ConvertError(f"{path}: {error}; keep the one you mean") from None
    family = counterparts().get(architecture)
    unread = family.unread if family else ""
    kept = {
        short: held[name] + (name,)
        for short, name in names.names.items()
        if not unread or not re.fullmatch(unread, short)
    }
    entries = {
        short: Entry(file, torch.Size(tensor.shape), _dtype(file, name, tensor), name)
        for short, (file, tensor, name) in kept.items()
    }
    notes = [f"weights of the variant {weights.variant}"] if weights and weights.variant else []
    notes += [f"names begin with {printable(prefix)}, which is taken off" for prefix in names.prefixes[:3]]
    notes += [f"left out: {', '.join(names.beside)} (other parts of a pipeline)"] if names.beside else []
    return Source(path, settings, entries, _part(path), tuple(notes))


def _refuse_foreign(path: Path) -> None:
    """Of a file without config.json: what it is, where that is not a transformer.

    Raises:
        ConvertError: it is something else.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    for file in files[:1]:
        if reason := what_it_is(announced(file)):
            raise ConvertError(f"{file}: cannot be converted as it is; {reason}")


def _part(path: Path) -> str:
    """What of a pipeline a folder is."""
    folder = path if path.is_dir() else path.parent
    named = part_of(folder.absolute().name)
    return named if named != PART else part_of(folder.resolve().name)


def part_of(folder: str) -> str:
    """The part of a pipeline that a folder of this name is."""
    return folder if _PART.fullmatch(folder) else PART


def _dtype(file: Path, name: str, tensor: Announced) -> torch.dtype:
    if tensor.dtype not in DTYPES:
        raise ConvertError(
            f"{file}: {printable(name)} has dtype {printable(tensor.dtype)}; weights are {', '.join(DTYPES)} "
            "(quantised ones must be expanded: take the bf16, fp16 or fp32 weights of the same model)"
        )
    return DTYPES[tensor.dtype]


def _opened(file: Path):
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ConvertError(
            f"{file}: is no whole safetensors file ({error}); it was cut short or is of another format: "
            "download it again"
        ) from None


def read_json(file: Path) -> dict:
    """The object in a JSON file.

    Raises:
        ConvertError: not there, or none in it.
    """
    if not file.exists():
        raise ConvertError(
            f"{file} does not exist; a checkpoint needs its config.json, or give another with --config"
        )
    return read_settings(file, ConvertError)


def _some(names: list[str]) -> str:
    names = [printable(name) for name in names]
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
