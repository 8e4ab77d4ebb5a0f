"""Latent shards: the encoded dataset on disk, its writer and its reader.

    dataset.json            what was encoded and how; written last, so that a folder
                            without it is unfinished
    index.jsonl             one line per sample: id, key, shard, [offset, size] of each
                            member, latent shape, text length, caption, CRC-32 of the
                            arrays in the order of ARRAYS
    shard-00000.tar         WebDataset, all numbers in float32; for each sample
        {key}.json
        {key}.latent.npy    (C, F, H, W)
        {key}.text.npy      (L, E)
        {key}.pooled.npy    (P,), format 2: the text encoder's vector of the whole caption
        {key}.given.npy     (C', F, H, W), image-to-video: the mask and the latents of the
                            first frame; dataset.json has "first_frame" then
        {key}.image.npy     (L', E'), if there was an image encoder: its tokens of that
                            frame
    conditions.safetensors  text embeddings "null" (empty caption) and "negative" (the
                            fixed negative prompt); with format 2 also "null_pooled" and
                            "negative_pooled"
    tokenizer.model         sentencepiece model of the built-in text encoder, so that new
                            prompts can be encoded
    rejected.jsonl          inputs that did not become samples: file, field, value, remedy
    notes.jsonl             only if there are any: what is worth knowing of inputs that did: file, note

While encoding, encode.json holds the settings and shard-*.done the index lines, rejected
inputs and notes of each finished shard.
"""

import io
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_apt.data.encoding import CONDITIONS, Encoding
from megatron_apt.data.index import AGAIN, ARRAYS, BLOCK, IndexLine, Place, read_index
from megatron_apt.errors import shown


class FirstFrame(NamedTuple):
    """What image-to-video models are given of a clip's first frame, each in its own way;
    None what there is not.
    """

    given: Tensor | None = None  # (C', F, H, W) mask and latents
    image: Tensor | None = None  # (L', E') tokens of an image encoder
    # (C, 1, H, W) its latent, which a causal VAE makes of it alone; none in a sample of
    # one frame, which is a picture
    latent: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Sample:
    """latent (C, F, H, W), text (L, E), and pooled (P,) if the text encoder has it,
    float32; read-only, they may be shared with a cache.

    For image-to-video also given (C', F, H, W), and image (L', E') if there was an image
    encoder.
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
    """(n, P) pooled vectors of samples of datasets that all have them, or None where none
    has: what Condition.pack takes.
    """
    pooled = [sample.pooled for sample in samples if sample.pooled is not None]
    return torch.stack(pooled) if pooled else None


class LatentShards(Encoding):
    """Random access to an encoded dataset, by sample id 0 .. len - 1.

    Attributes:
        captions, shapes: of every sample, in order; shapes are latent shapes (C, F, H,
            W).

    Args:
        cache_bytes: datasets up to this size are kept in memory as they are read; 0 turns
            it off.

    Raises:
        FileNotFoundError, ValueError: folder, index or shard missing, unfinished, empty,
            of another format, truncated, or not of one encoding.
    """

    def __init__(self, path: str | Path, cache_bytes: int = 256 << 20):
        super().__init__(path)
        self._index = read_index(self.path, self.info)
        self.captions = [line.caption for line in self._index]
        self.shapes = [line.latent_shape for line in self._index]
        total = sum(size for line in self._index for _, size in line.places())
        self._cache: dict[int, Sample] | None = {} if total <= cache_bytes else None

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Sample:
        """The sample of this id; negative ids count from the end.

        Raises:
            IndexError; ValueError naming shard and offset if the bytes there are not what
            the index says.
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
    def files(self) -> list[Path]:
        """The shards, by name."""
        return [self.path / name for name in sorted({line.shard for line in self._index})]

    def _read(self, index: int) -> Sample:
        line, latent = self._index[index], self.shapes[index]
        shapes: dict[str, tuple[int, ...]] = {
            "latent": latent,
            "text": (line.text_length, self.null_text.shape[1]),
        }
        if self.null_pooled is not None:
            shapes["pooled"] = (self.pooled_width,)
        if self.given_channels:
            shapes["given"] = (self.given_channels, *latent[1:])
        if self.image_shape is not None:
            shapes["image"] = self.image_shape
        file = self.path / line.shard
        try:
            with open(file, "rb") as stream:
                arrays = {name: _read_member(stream, line, name, shape) for name, shape in shapes.items()}
        except OSError as error:
            raise ValueError(f"{file}: {error.strerror or error}; {AGAIN}") from None
        return Sample(id=index, caption=line.caption, **arrays)


def _read_member(file: io.BufferedReader, line: IndexLine, name: str, shape: tuple[int, ...]) -> Tensor:
    """One array of a sample, checked: against the member's name in the tar file, the
    shape, and the sum if the index has one.
    """
    place: Place | None = getattr(line, name)
    if place is None:
        raise ValueError(
            f"{file.name}: sample {line.key} has no {name}, but dataset.json or {CONDITIONS} says that all "
            f"have; {AGAIN}"
        )
    file.seek(place[0] - BLOCK)
    header = file.read(BLOCK)
    if header[:100].rstrip(b"\0") != f"{line.key}.{name}.npy".encode():
        if len(header.strip(b"\0")) == 0:
            raise ValueError(
                f"{file.name}, offset {place[0]}: no readable array (zeros), the shard is damaged; {AGAIN}"
            )
        raise ValueError(
            f"{file.name}, offset {place[0]}: holds {shown(repr(header[:40]))}, index.jsonl says "
            f"{line.key}.{name}.npy; {AGAIN}"
        )
    there = [other for other in ARRAYS if getattr(line, other) is not None]
    array = _read_array(file, place, shape, None if line.crc32 is None else line.crc32[there.index(name)])
    if line.crc32 is None and not array.isfinite().all():
        raise ValueError(
            f"{file.name}, offset {place[0]}: {line.key}.{name}.npy holds NaN or infinity, the shard is "
            f"damaged; {AGAIN}"
        )
    return array


def _read_array(
    file: io.BufferedReader, place: Place, shape: tuple[int, ...], crc32: int | None = None
) -> Tensor:
    """A .npy file inside another. Its own header is believed only where it says what is
    expected, so that it allocates nothing.
    """
    offset, size = place
    file.seek(offset)
    data = bytearray(size)
    damaged = f"{file.name}, offset {offset}: no readable array"
    if file.readinto(data) != size:
        raise ValueError(f"{damaged} (the file ends before it does), the shard is damaged; {AGAIN}")
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        found, fortran, dtype = read_header(stream)
    except Exception as error:  # numpy parses it as Python's own parser does, which has many ways to fail
        raise ValueError(f"{damaged} ({error}), the shard is damaged; {AGAIN}") from None
    if found != shape or dtype != np.float32 or fortran or size - stream.tell() != 4 * math.prod(shape):
        raise ValueError(
            f"{file.name}, offset {offset}: {dtype} {found} in {size} bytes, index.jsonl says float32 "
            f"{shape}; {AGAIN}"
        )
    if crc32 is not None and zlib.crc32(data) != crc32:
        raise ValueError(
            f"{file.name}, offset {offset}: not what was written there (CRC-32), the shard is damaged; "
            f"{AGAIN}"
        )
    return torch.frombuffer(data, dtype=torch.float32, offset=stream.tell()).reshape(shape)
