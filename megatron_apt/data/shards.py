"""Latent shards: the encoded dataset on disk, its writer and its reader.

    dataset.json            what was encoded and how; written last, so a folder without it is unfinished
    index.jsonl             one line per sample: id, key, shard, [offset, size] of each member, latent shape, text length, caption
    shard-00000.tar         WebDataset: {key}.latent.npy (C, F, H, W) and {key}.text.npy (L, E), both float32, and {key}.json
                            with format 2 also {key}.pooled.npy (P,) float32, the text encoder's vector for the whole caption
                            for image-to-video also {key}.given.npy (C', F, H, W), the mask and the latents of the first frame, and, if there
                            was an image encoder, {key}.image.npy (L', E'), its tokens of that frame; dataset.json has "first_frame" then
    conditions.safetensors  text embeddings "null" (empty caption) and "negative" (the fixed negative prompt),
                            with format 2 also "null_pooled" and "negative_pooled"
    tokenizer.model         sentencepiece model of the built-in text encoder, so that new prompts can be encoded
    rejected.jsonl          inputs that did not become samples: file, field, value, remedy

While encoding, encode.json holds the settings and shard-*.done the index lines of each finished shard.
"""

import contextlib
import errno
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from megatron_apt.data.rejected import RejectedInput
from megatron_apt.models.codec import load_codec
from megatron_apt.models.pipeline_image import ClipImageEncoder, load_image_encoder
from megatron_apt.models.text import load_text_encoder

FORMAT, POOLED_FORMAT = 1, 2  # a reader of format 1 alone would take means for the pooled vectors it does not know
ARRAYS = ("latent", "text", "pooled", "given", "image")  # of a sample; only the first two are in every dataset
TOKENIZER = "tokenizer.model"
CONDITIONS = "conditions.safetensors"
AGAIN = "copy the folder again or encode again"


class EncodeStopped(ValueError):
    """Encoding cannot go on; what is finished is kept and a rerun continues from it."""


class FirstFrame(NamedTuple):
    """What image-to-video models are given of a clip's first frame, each in its own way; None what there is not."""

    given: Tensor | None = None  # (C', F, H, W) mask and latents
    image: Tensor | None = None  # (L', E') tokens of an image encoder
    latent: Tensor | None = None  # (C, 1, H, W) its latent, which a causal VAE makes of it alone; none in a sample of one frame, which is a picture


@dataclass(frozen=True, eq=False)
class Sample:
    """latent (C, F, H, W), text (L, E), and pooled (P,) if the text encoder has it, float32; read-only, they may be shared with a cache.

    For image-to-video also given (C', F, H, W), and image (L', E') if there was an image encoder.
    """

    id: int
    latent: Tensor
    text: Tensor
    caption: str
    pooled: Tensor | None = None
    given: Tensor | None = None
    image: Tensor | None = None

    @property
    def first_frame(self) -> FirstFrame:
        return FirstFrame(self.given, self.image, self.latent[:, :1] if self.latent.shape[1] > 1 else None)


def stack_pooled(samples: Sequence[Sample]) -> Tensor | None:
    """(n, P) pooled vectors of samples of datasets that all have them, or None where none has: what Condition.pack takes."""
    return None if samples[0].pooled is None else torch.stack([sample.pooled for sample in samples])


class LatentShards:
    """Random access to an encoded dataset, by sample id 0 .. len - 1.

    Attributes:
        captions, shapes: of every sample, in order; shapes are latent shapes (C, F, H, W).
        null_text, negative_text: (L, E) float32 embeddings of the empty caption and of the negative prompt.
        null_pooled, negative_pooled: (1, P) float32 pooled vectors of the two, or None without.
        given_channels: C' of what is given of the first frame; 0 if the dataset holds no first frames.
        image_shape: (L', E') of the image encoder's tokens, or None without.
        info: the contents of dataset.json.

    Args:
        cache_bytes: datasets up to this size are kept in memory as they are read; 0 turns it off.

    Raises:
        FileNotFoundError, ValueError: folder, index or shard missing, unfinished, of another format, or truncated.
    """

    def __init__(self, path: str | Path, cache_bytes: int = 256 << 20):
        self.path = Path(path)
        self.info = _read_info(self.path)
        self._index = _read_index(self.path, self.info["samples"])
        self.captions = [line["caption"] for line in self._index]
        self.shapes = [tuple(line["latent_shape"]) for line in self._index]
        self._check_shards()
        conditions = load_file(self.path / self.info["conditions"])
        self.null_text, self.negative_text = conditions["null"], conditions["negative"]
        self.null_pooled, self.negative_pooled = conditions.get("null_pooled"), conditions.get("negative_pooled")
        first = self.info.get("first_frame", {})
        self.given_channels: int = first.get("channels", 0)
        self.image_shape: tuple[int, int] | None = tuple(first["image"]) if "image" in first else None
        total = sum(line[member][1] for line in self._index for member in ARRAYS if member in line)
        self._cache: dict[int, Sample] | None = {} if total <= cache_bytes else None

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Sample:
        """The sample of this id; negative ids count from the end.

        Raises:
            IndexError; ValueError naming shard and offset if the bytes there are not what the index says.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path}: sample {index} of {len(self)}")
        index %= len(self)
        if self._cache is None:
            return self._read(index)
        if index not in self._cache:
            self._cache[index] = self._read(index)
        return self._cache[index]

    @property
    def pooled_width(self) -> int:
        """Width of the pooled text a model is given: the encoder's own vectors, or without them the mean of the text."""
        return (self.null_text if self.null_pooled is None else self.null_pooled).shape[1]

    def codec(self, device: str = "cpu", tiling: int | None = None):
        """The codec the latents were made with; `tiling` replaces the side of its tiles (see VaeCodec), 0 for none."""
        return load_codec(self.info["codec"] if tiling is None else {**self.info["codec"], "tiling": tiling}, device)

    def text_encoder(self, device: str = "cpu"):
        """The text encoder the embeddings were made with."""
        config = dict(self.info["text_encoder"])
        if "tokenizer" in config:
            config["tokenizer"] = str(self.path / config["tokenizer"])
        return load_text_encoder(config, device)

    def image_encoder(self, device: str = "cpu") -> ClipImageEncoder | None:
        """The image encoder of the first frames, or None without."""
        return None if self.image_shape is None else load_image_encoder(self.info["first_frame"]["image_encoder"], device)

    def _check_shards(self) -> None:
        ends: dict[str, int] = {}
        for line in self._index:
            members = [sum(line[member]) for member in (*ARRAYS, "meta") if member in line]
            ends[line["shard"]] = max(ends.get(line["shard"], 0), *members)
        for shard, end in ends.items():
            file = self.path / shard
            if not file.is_file():
                raise FileNotFoundError(f"{file} does not exist, but index.jsonl names it; copy it there or encode again")
            size = file.stat().st_size
            if size < end:
                raise ValueError(f"{file} is truncated: it ends at byte {size}, index.jsonl has data up to {end}; {AGAIN}")

    def _read(self, index: int) -> Sample:
        line, latent = self._index[index], self.shapes[index]
        shapes: dict[str, tuple[int, ...]] = {"latent": latent, "text": (line["text_length"], self.null_text.shape[1])}
        if self.null_pooled is not None:
            shapes["pooled"] = (self.pooled_width,)
        if self.given_channels:
            shapes["given"] = (self.given_channels, *latent[1:])
        if self.image_shape is not None:
            shapes["image"] = self.image_shape
        with open(self.path / line["shard"], "rb") as file:
            return Sample(id=index, caption=line["caption"], **{name: _read_array(file, line[name], shape) for name, shape in shapes.items()})


def _read_info(folder: Path) -> dict:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; write it with `megatron-apt encode`")
    file = folder / "dataset.json"
    if not file.is_file():
        remedy = "give a folder written by `megatron-apt encode`"
        if (folder / "encode.json").is_file():
            remedy = "its encoding was interrupted, run the same `megatron-apt encode` again"
        raise FileNotFoundError(f"{file} does not exist; {remedy}")
    info = json.loads(file.read_text(encoding="utf-8"))
    if info.get("format") not in (FORMAT, POOLED_FORMAT):
        raise ValueError(f"{file}: format={info.get('format')}, this version reads {FORMAT} and {POOLED_FORMAT}; encode the dataset again")
    return info


def _read_index(folder: Path, samples: int) -> list[dict]:
    file = folder / "index.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; copy it there or encode again")
    lines = []
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{number}: {error}; {AGAIN}") from None
    if len(lines) != samples:
        raise ValueError(f"{file}: {len(lines)} samples, dataset.json says {samples}: the two are not of one encoding; {AGAIN}")
    return lines


def _read_array(file: io.BufferedReader, place: list[int], shape: tuple[int, ...]) -> Tensor:
    offset, size = place
    file.seek(offset)
    try:
        array = np.load(io.BytesIO(file.read(size)), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{file.name}, offset {offset}: no readable array ({error}), the shard is damaged; {AGAIN}") from None
    if array.shape != shape or array.dtype != np.float32:
        raise ValueError(f"{file.name}, offset {offset}: {array.dtype} {array.shape}, index.jsonl says float32 {shape}; {AGAIN}")
    return torch.from_numpy(array)


class ShardWriter:
    """Writes a dataset shard by shard, so that an interrupted encoding continues where it was.

    Args:
        settings: what the bytes depend on, as JSON values. A folder begun with other settings is refused.

    Attributes:
        finished: contents of dataset.json if the folder is complete already, else None.

    Raises:
        ValueError: other settings (naming the first that differs), or a folder with foreign files.
    """

    def __init__(self, folder: str | Path, settings: dict):
        self.folder, self.settings = Path(folder), json.loads(json.dumps(settings))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.finished: dict | None = None
        if (self.folder / "dataset.json").is_file():
            self.finished = _read_info(self.folder)
            self._compare(self.finished["settings"])
        elif (self.folder / "encode.json").is_file():
            self._compare(json.loads((self.folder / "encode.json").read_text(encoding="utf-8")))
        elif any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty and was not begun by `megatron-apt encode`; give an empty or new folder as output")
        else:
            self.commit("encode.json", _json_bytes(self.settings))

    def _compare(self, earlier: dict) -> None:
        for field in dict.fromkeys((*earlier, *self.settings)):
            before, now = earlier.get(field), self.settings.get(field)
            if before != now:
                raise ValueError(
                    f"{self.folder}: was begun with {field}={before!r}, now {field}={now!r}; "
                    "give the same settings, another output folder, or delete this one"
                )

    def done(self, shard: int) -> dict | None:
        """{"index": [...], "rejected": [...]} of a finished shard, else None."""
        file = self.folder / f"shard-{shard:05d}.done"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    @contextlib.contextmanager
    def shard(self, number: int) -> Iterator["OpenShard"]:
        """Opens a shard; leaving the block commits it, an exception leaves nothing behind.

        Raises:
            EncodeStopped: disk full.
        """
        name = f"shard-{number:05d}.tar"
        temporary = self.folder / f"{name}.tmp"
        try:
            with disk_full_named(self.folder):
                with open(temporary, "wb") as file:
                    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                        opened = OpenShard(name, tar)
                        yield opened
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self.folder / name)
                self.commit(f"shard-{number:05d}.done", _json_bytes({"index": opened.index, "rejected": opened.rejected}))
        finally:
            temporary.unlink(missing_ok=True)

    def finish(self, shards: int, codec: dict, text_encoder: dict, conditions: dict[str, Tensor], first_frame: dict | None = None) -> dict:
        """Writes index, conditions (named as in the file), rejected.jsonl and, last, dataset.json; returns its contents.

        Args:
            first_frame: "channels" of given, and "image" (shape of its tokens) and "image_encoder" if there is one; None: no first frames.
        """
        parts = [self.done(number) for number in range(shards)]
        index = [{"id": i, **line} for i, line in enumerate(line for part in parts for line in part["index"])]
        rejected = [line for part in parts for line in part["rejected"]]
        info = {
            "format": POOLED_FORMAT if "null_pooled" in conditions else FORMAT,
            "samples": len(index),
            "rejected": len(rejected),
            "shapes": dict(sorted(Counter("x".join(map(str, line["latent_shape"])) for line in index).items())),
            "codec": codec,
            "text_encoder": text_encoder,
            "conditions": CONDITIONS,
            **({} if first_frame is None else {"first_frame": first_frame}),
            "settings": self.settings,
        }
        self.commit("index.jsonl", _jsonl_bytes(index))
        self.write_rejected(rejected)
        self.commit(CONDITIONS, save({name: value.contiguous() for name, value in conditions.items()}))
        self.commit("dataset.json", _json_bytes(info))
        for number in range(shards):
            (self.folder / f"shard-{number:05d}.done").unlink(missing_ok=True)
        (self.folder / "encode.json").unlink(missing_ok=True)
        return info

    def write_rejected(self, rejected: list[dict]) -> None:
        self.commit("rejected.jsonl", _jsonl_bytes(rejected))

    def commit(self, name: str, data: bytes) -> None:
        """Writes a file so that a crash leaves the old one or the new one, whole."""
        temporary = self.folder / f"{name}.tmp"
        try:
            with disk_full_named(self.folder):
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self.folder / name)
        finally:
            temporary.unlink(missing_ok=True)
        directory = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


class OpenShard:
    """A tar file being written; `index` and `rejected` gather its lines."""

    def __init__(self, name: str, tar: tarfile.TarFile):
        self.name, self.index, self.rejected = name, [], []
        self._tar = tar

    def add(self, key: str, latent: Tensor, text: Tensor, caption: str, meta: dict, **others: Tensor | None) -> None:
        """Appends a sample; key is its unique name, without dots (WebDataset cuts names at the first), `others` are further arrays of ARRAYS."""
        line = {"key": key, "shard": self.name}
        for name, array in {"latent": latent, "text": text, **others}.items():
            if array is not None:
                line[name] = self._member(f"{key}.{name}.npy", _npy_bytes(array))
        line["meta"] = self._member(f"{key}.json", _json_bytes({"key": key, "caption": caption, **meta}))
        self.index.append({**line, "latent_shape": list(latent.shape), "text_length": len(text), "caption": caption})

    def reject(self, rejected: RejectedInput) -> None:
        self.rejected.append(rejected.as_dict())

    def _member(self, name: str, data: bytes) -> list[int]:
        header = tarfile.TarInfo(name)  # time, owner and mode are constants, so the same samples give the same bytes
        header.size = len(data)
        offset = self._tar.offset + tarfile.BLOCKSIZE
        self._tar.addfile(header, io.BytesIO(data))
        return [offset, len(data)]


@contextlib.contextmanager
def disk_full_named(folder: Path) -> Iterator[None]:
    """Turns ENOSPC and EDQUOT into EncodeStopped with the folder and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        remedy = "finished shards are kept, free some space and run the same command again"
        raise EncodeStopped(f"{folder}: disk full ({error.strerror}); {remedy}") from None


def _npy_bytes(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, tensor.detach().cpu().contiguous().numpy().astype(np.float32, copy=False), allow_pickle=False)
    return buffer.getvalue()


def _json_bytes(value: dict) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()


def _jsonl_bytes(lines: list[dict]) -> bytes:
    return b"".join(map(_json_bytes, lines))
