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

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_apt.models.codec import load_codec
from megatron_apt.models.pipeline_image import ClipImageEncoder, load_image_encoder
from megatron_apt.models.text import load_text_encoder

FORMAT, POOLED_FORMAT = 1, 2  # a reader of format 1 alone would take means for the pooled vectors it does not know
ARRAYS = ("latent", "text", "pooled", "given", "image")  # of a sample; only the first two are in every dataset
TOKENIZER = "tokenizer.model"
CONDITIONS = "conditions.safetensors"
AGAIN = "copy the folder again or encode again"


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
        self.info = read_info(self.path)
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


def read_info(folder: Path) -> dict:
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
