"""The safetensors files that a folder from elsewhere has its weights in, and what they
announce, read without trust. Never a pickle.

Files of a variant (`variant="fp16"`) have its name in theirs, in several spellings; the
same weights without it are preferred.
"""

import json
import math
import os
import re
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from megatron_apt import schema

# Bytes of a number of each dtype of the format.
SIZES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
}
MOST_HEADER = 32 << 20  # bytes of JSON: of the largest published models it has less than one
_DEEPEST = 64  # objects and lists in one another
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
OTHER_FORMATS = (*PICKLES, ".msgpack", ".h5", ".gguf", ".onnx", ".npz")
_STEMS = ("diffusion_pytorch_model", "model")  # what diffusers and transformers look for
_VARIANTS = ("", "fp32", "bf16", "fp16")  # from what is taken first
_INDEX = re.compile(r"(?P<stem>[^.]+)(?:\.(?P<variant>\w+))?\.safetensors\.index(?:\.(?P<late>\w+))?\.json")
_SHARD = re.compile(
    r"(?P<stem>[^.]+?)(?:\.(?P<variant>\w+))?-(?P<number>\d+)-of-(?P<count>\d+)(?:\.(?P<late>\w+))?\.safetensors"
)
_SINGLE = re.compile(r"(?P<stem>[^.]+)(?:\.(?P<variant>.+))?\.safetensors")


class WeightFileError(ValueError):
    """A file of weights, or a folder of them, that cannot be read; names file, tensor and remedy."""


@dataclass(frozen=True)
class Announced:
    """One tensor as its file's header announces it; dtype is the format's word, such as BF16."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Weights:
    """The files in which one model's weights are.

    Attributes:
        index: the file that says which tensor is where; None of a single file.
        variant: fp16 and the like; "" of plain names.
    """

    files: tuple[Path, ...]
    index: Path | None
    variant: str

    def plain(self, stem: str) -> dict[Path, str]:
        """The names under which the libraries look for these files if they are told of no variant."""
        if self.index is None:
            return {self.files[0]: f"{stem}.safetensors"}
        return {
            file: f"{stem}-{i:05d}-of-{len(self.files):05d}.safetensors"
            for i, file in enumerate(self.files, 1)
        }

    def plain_index(self, stem: str) -> str:
        """The index with those names in it, as JSON."""
        names = {file.name: name for file, name in self.plain(stem).items()}
        assert self.index is not None
        index = _read_index(self.index)
        places = {key: names[place] for key, place in index.weight_map.items()}
        return (
            json.dumps(
                {
                    "metadata": {"total_size": sum(file.stat().st_size for file in self.files)},
                    "weight_map": places,
                },
                indent=2,
            )
            + "\n"
        )


class _Index(msgspec.Struct):
    weight_map: Annotated[dict[str, str], msgspec.Meta(min_length=1)]


class _Tensor(msgspec.Struct):
    dtype: str
    shape: Annotated[list[schema.Count], msgspec.Meta(max_length=16)]
    data_offsets: tuple[schema.Count, schema.Count]


def weight_files(folder: Path) -> Weights:
    """The weight files of a folder: by their index if there is one, without a variant if
    there are such.

    Raises:
        WeightFileError: none, only other formats, several models, or a shard that is
            missing or not where its index says.
    """
    try:
        names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise WeightFileError(f"{folder}: {error.strerror or error}; give the folder of a model") from None
    sets = _sets(names)
    if not sets:
        raise WeightFileError(f"{folder}: {_lacking(names)}")
    stem, variant = _chosen(folder, sets)
    found = sets[stem, variant]
    if found.index:
        return Weights(_indexed(folder / found.index), folder / found.index, variant)
    if not found.single:
        raise WeightFileError(
            f"{folder}: has {found.shards[0]} and no index (*.safetensors.index.json), which says what is in "
            "it; download that too"
        )
    return Weights((folder / found.single,), None, variant)


@dataclass
class _Set:
    """The files of one variant of one model."""

    index: str = ""
    single: str = ""
    shards: tuple[str, ...] = ()


def _sets(names: list[str]) -> dict[tuple[str, str], _Set]:
    sets: dict[tuple[str, str], _Set] = {}
    for name in names:
        for kind, pattern in (("index", _INDEX), ("shards", _SHARD), ("single", _SINGLE)):
            if match := pattern.fullmatch(name):
                parts = match.groupdict()
                found = sets.setdefault((parts["stem"], parts["variant"] or parts.get("late") or ""), _Set())
                setattr(found, kind, (*found.shards, name) if kind == "shards" else name)
                break
    return sets


def _chosen(folder: Path, sets: dict[tuple[str, str], _Set]) -> tuple[str, str]:
    stems = {stem for stem, _ in sets}
    stem = next((known for known in _STEMS if known in stems), None) or (
        min(stems) if len(stems) == 1 else None
    )
    if stem is None:
        names = sorted(found.index or found.single or found.shards[0] for found in sets.values())
        raise WeightFileError(
            f"{folder}: {len(names)} .safetensors files of several names ({_some(names)}); give the one you "
            "mean"
        )
    whole = [
        variant
        for name, variant in sets
        if name == stem and (sets[name, variant].index or sets[name, variant].single)
    ]
    variants = whole or [variant for name, variant in sets if name == stem]
    if variant := next((known for known in _VARIANTS if known in variants), None):
        return stem, variant
    if "" in variants or len(variants) == 1:
        return stem, variants[0] if len(variants) == 1 else ""
    raise WeightFileError(f"{folder}: several variants of {stem} ({_some(sorted(variants))}); leave one")


def _lacking(names: list[str]) -> str:
    others = [name for name in names if name.lower().endswith(OTHER_FORMATS)]
    if not others:
        return "no .safetensors file; give a folder with a model's weights, or download them"
    if others[0].lower().endswith(PICKLES):
        return f"only {others[0]}, a pickle, which could run code: save it as safetensors first"
    return f"only {others[0]}, and weights are read from .safetensors files: save it as such first"


def _indexed(index: Path) -> tuple[Path, ...]:
    places = _read_index(index).weight_map
    names = sorted(set(places.values()))
    # A file may be a link, as in a hub's cache
    if outside := [name for name in names if name in ("", "..") or Path(name).name != name]:
        raise WeightFileError(
            f"{index}: names {printable(repr(outside[0]))} outside its folder; download it again"
        )
    if other := [name for name in names if not name.endswith(".safetensors")]:
        raise WeightFileError(
            f"{index}: names {printable(other[0])}, which is no .safetensors file; download it again"
        )
    for name in names:
        if not (index.parent / name).is_file():
            lost = next(key for key, place in places.items() if place == name)
            raise WeightFileError(
                f"{index}: names {printable(name)} (for {printable(lost)}), which is not there; download it"
            )
    held = {name: announced(index.parent / name) for name in names}
    for key, place in places.items():
        if key not in held[place]:
            raise WeightFileError(
                f"{index.parent / place}: lacks {printable(key)}, which {index.name} says it holds; download "
                "both again"
            )
    return tuple(index.parent / name for name in names)


def _read_index(index: Path) -> _Index:
    return schema.read_json(
        index,
        _Index,
        remedy="it needs a weight_map from tensors to files: download it again",
        error=WeightFileError,
    )


def announced(file: Path) -> dict[str, Announced]:
    """Every tensor of a safetensors file by its header, which is compared with the file's
    length; its numbers are not read.

    Raises:
        WeightFileError: of another format, cut short, or a header that no writer makes.
    """
    try:
        header, size = _read_header(file)
    except OSError as error:
        raise WeightFileError(f"{file}: {error.strerror or error}; give a file that can be read") from None
    try:
        raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        tensors = {
            name: msgspec.json.decode(text, type=_Tensor)
            for name, text in raw.items()
            if name != "__metadata__"
        }
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _broken(file, f"its header: {error}") from None
    _check_places(file, tensors, size)
    return {name: Announced(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _read_header(file: Path) -> tuple[bytes, int]:
    """The header, and the number of bytes behind it."""
    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        start = stream.read(512)
        if len(start) < 8 or start[8:9] != b"{":
            raise _broken(file, described(start, size))
        (length,) = struct.unpack("<Q", start[:8])
        if length > min(MOST_HEADER, size - 8):
            raise _broken(file, f"its header would have {length} bytes, the file has {size}")
        stream.seek(8)
        return stream.read(length), size - 8 - length


def open_regular(file: Path):
    """Opened for reading; never a device or a pipe, which might not answer.

    Raises:
        WeightFileError: no regular file.
        OSError: it cannot be opened.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise WeightFileError(f"{file}: is no regular file; give a .safetensors file")
    return open(descriptor, "rb")


def _check_places(file: Path, tensors: dict[str, _Tensor], size: int) -> None:
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        if (
            tensor.dtype in SIZES
            and math.prod(tensor.shape) * SIZES[tensor.dtype]
            != tensor.data_offsets[1] - tensor.data_offsets[0]
        ):
            raise _broken(
                file, f"{printable(name)} of shape {tuple(tensor.shape)} lies in bytes {tensor.data_offsets}"
            )
        if tensor.data_offsets[0] != end or tensor.data_offsets[1] < end:
            raise _broken(
                file,
                f"{printable(name)} lies in bytes {tensor.data_offsets}, and the tensor before it ends at "
                f"{end}",
            )
        end = tensor.data_offsets[1]
    if end != size:
        raise _broken(file, f"its tensors end at byte {end} of {size}")


def _broken(file: Path, reason: str) -> WeightFileError:
    return WeightFileError(
        f"{file}: is no whole safetensors file ({reason}); it was cut short or is of another format: "
        "download it again"
    )


def described(start: bytes, size: int) -> str:
    """What a file that is no safetensors file begins like."""
    text = start.lstrip().lower()
    for kind, found in {
        "it is empty": size == 0,
        "it is a pointer of git-lfs: `git lfs pull` fetches the file itself": text.startswith(
            b"version https://git-lfs"
        ),
        "it is a web page, not what was to be downloaded": text.startswith(
            (b"<!doctype", b"<html", b"<?xml", b"<head")
        ),
        "it is a pickle under another name, which could run code": _is_pickle(start),
        "it is a GGUF file, whose weights are quantised": start.startswith(b"GGUF"),
        "it is an HDF5 file": start.startswith(b"\x89HDF"),
        "it is an archive": start.startswith(
            (b"PK", b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd")
        )
        or start[257:262] == b"ustar",
        "it is JSON": text.startswith((b"{", b"[")),
        "it is filled with zeros: a download that was not finished": size > 0 and not start.strip(b"\0"),
    }.items():
        if found:
            return kind
    return f"it has {size} bytes that begin with {start[:8].hex()}"


def _is_pickle(start: bytes) -> bool:
    """A pickle of protocol 2 to 5, or the archive that torch.save makes of one."""
    zipped = start.startswith(b"PK\x03\x04") and (
        b"data.pkl" in start or b"/byteorder" in start or b"/version" in start
    )
    return zipped or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05")


def read_settings(file: Path, error: type[ValueError] = ValueError, most: int = 4 << 20) -> dict:
    """The object in a JSON file of settings, such as a config.json.

    Raises:
        error: none in it, or one nested more deeply than what reads it could follow.
    """
    remedy = "it must be a JSON object: download it again"
    value = schema.read_json(file, dict, remedy=remedy, error=error, most=most)
    layer: list = [value]
    for _ in range(_DEEPEST):
        layer = [
            inner
            for outer in layer
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not layer:
            return value
    raise error(f"{file}: nested too deeply; {remedy}")


def printable(name: str) -> str:
    """A name from a file as it may be shown: without control characters, and not longer than a line."""
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii", "replace")
        for c in name[:200]
    )
    return shown if len(name) <= 120 else f"{shown[:100]}... ({len(name)} characters)"


def _some(names: list[str]) -> str:
    names = [printable(name) for name in names]
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
