"""What latents were made with: codec, text and image encoder, the empty caption and the negative prompt.

A dataset holds it beside its samples, and a run keeps a copy of it, with which samples
are made when the dataset is elsewhere:

    RUN/encoding/dataset.json, conditions.safetensors, tokenizer.model     as in the dataset
    RUN/encoding/examples.json                                             a shape, some captions
"""

import contextlib
import json
from collections.abc import Generator
from pathlib import Path
from typing import Annotated

import msgspec
import safetensors
import torch
from safetensors.torch import load
from torch import Tensor

from megatron_apt.data.index import AGAIN, read_info
from megatron_apt.encoders.image import ClipImageEncoder, load_image_encoder
from megatron_apt.encoders.load import load_codec, load_text_encoder
from megatron_apt.errors import shown
from megatron_apt.files import write_atomically
from megatron_apt.schema import Positive, read_json

TOKENIZER = "tokenizer.model"
CONDITIONS = "conditions.safetensors"
EXAMPLES = "examples.json"
KEPT = "encoding"  # folder of a run
_MOST = 8  # captions that are kept


class Encoding:
    """What made the latents of a folder.

    Attributes:
        null_text, negative_text: (L, E) float32 embeddings of the empty caption and of
            the negative prompt.
        null_pooled, negative_pooled: (1, P) float32 pooled vectors of the two, or None
            without.
        given_channels: C' of what is given of the first frame; 0 if the dataset holds no
            first frames.
        image_shape: (L', E') of the image encoder's tokens, or None without.
        info: the contents of dataset.json.
        captions, shapes: of samples; shapes are latent shapes (C, F, H, W).

    Raises:
        FileNotFoundError, ValueError: a file that is missing, of another format, or
            damaged.
    """

    captions: list[str]
    shapes: list[tuple[int, int, int, int]]

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.info = read_info(self.path)
        conditions = _read_conditions(self.path / self.info["conditions"])
        self.null_text, self.negative_text = conditions["null"], conditions["negative"]
        self.null_pooled = conditions.get("null_pooled")
        self.negative_pooled = conditions.get("negative_pooled")
        first = self.info.get("first_frame", {})
        self.given_channels: int = first.get("channels", 0)
        self.image_shape: tuple[int, int] | None = tuple(first["image"]) if "image" in first else None

    @property
    def pooled_width(self) -> int:
        """Width of the pooled text a model is given: the encoder's own vectors, or
        without them the mean of the text.
        """
        return (self.null_text if self.null_pooled is None else self.null_pooled).shape[1]

    def codec(self, device: str = "cpu", tiling: int | None = None):
        """The codec the latents were made with; `tiling` replaces the side of its tiles
        (see VaeCodec), 0 for none.
        """
        with self._named():
            return load_codec(
                self.info["codec"] if tiling is None else {**self.info["codec"], "tiling": tiling}, device
            )

    def text_encoder(self, device: str = "cpu"):
        """The text encoder the embeddings were made with."""
        config = dict(self.info["text_encoder"])
        if "tokenizer" in config:
            if config["tokenizer"] != TOKENIZER:
                raise ValueError(
                    f"{self.path}/dataset.json: text_encoder.tokenizer={config['tokenizer']!r}, but it is "
                    f"{TOKENIZER!r}; {AGAIN}"
                )
            config["tokenizer"] = str(self.path / TOKENIZER)
        with self._named():
            return load_text_encoder(config, device)

    @contextlib.contextmanager
    def _named(self) -> Generator[None]:
        """Settings that no encoder has are said to be dataset.json's."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.path}/dataset.json: {error}") from None

    def image_encoder(self, device: str = "cpu") -> ClipImageEncoder | None:
        """The image encoder of the first frames, or None without."""
        return (
            None
            if self.image_shape is None
            else load_image_encoder(self.info["first_frame"]["image_encoder"], device)
        )


class _Examples(msgspec.Struct):
    shape: tuple[Positive, Positive, Positive, Positive]
    captions: Annotated[list[str], msgspec.Meta(max_length=_MOST)]


class KeptEncoding(Encoding):
    """The copy that a run keeps; it has no samples."""

    def __init__(self, path: str | Path):
        super().__init__(path)
        examples = read_json(self.path / EXAMPLES, _Examples, remedy="give the run's dataset with --dataset")
        self.captions, self.shapes = examples.captions, [examples.shape]


def keep(source: Encoding, run: Path) -> None:
    """Copies what made a dataset's latents into a run's folder. dataset.json comes last:
    a copy without it, or with another, is made again.
    """
    target, described = run / KEPT, (source.path / "dataset.json").read_bytes()
    if (target / "dataset.json").is_file() and (target / "dataset.json").read_bytes() == described:
        return
    target.mkdir(parents=True, exist_ok=True)
    captions = list(dict.fromkeys(source.captions))[:_MOST]
    examples = json.dumps({"shape": source.shapes[0], "captions": captions}, indent=1)
    write_atomically(target / EXAMPLES, examples)
    # The reader of dataset.json admits no way out of the folder in `conditions`
    for name in (source.info["conditions"], TOKENIZER):
        if (source.path / name).is_file():
            write_atomically(target / name, (source.path / name).read_bytes())
    write_atomically(target / "dataset.json", described)


def _read_conditions(file: Path) -> dict[str, Tensor]:
    """The contents of conditions.safetensors.

    Raises:
        ValueError: missing, damaged, or not what encode writes.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; {AGAIN}")
    try:
        found = load(file.read_bytes())  # by bytes: safetensors opens no name that is not UTF-8
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{file}: no readable safetensors file ({error}); {AGAIN}") from None
    missing = [name for name in ("null", "negative") if name not in found]
    if missing or ("null_pooled" in found) != ("negative_pooled" in found):
        raise ValueError(
            f"{file}: holds {sorted(map(shown, found))[:8]}, needed are null and negative, and both pooled "
            f"or none; {AGAIN}"
        )
    for name in (name for name in ("null", "negative", "null_pooled", "negative_pooled") if name in found):
        tensor, other = found[name], found["null_pooled" if name.endswith("_pooled") else "null"]
        fits = (
            tensor.dtype == torch.float32
            and tensor.ndim == 2
            and tensor.shape[1:] == other.shape[1:]
            and tensor.numel() > 0
        )
        if not fits or (name.endswith("_pooled") and len(tensor) != 1) or not tensor.isfinite().all():
            what = f"{tensor.dtype} {tuple(tensor.shape)}".removeprefix("torch.")
            raise ValueError(
                f"{file}: {shown(name)} is {what}, expected finite float32 rows, as wide as those of the "
                f"empty caption; {AGAIN}"
            )
    return found
