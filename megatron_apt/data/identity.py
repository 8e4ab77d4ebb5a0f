"""Which dataset a folder holds, so that a run resumes on the data it was trained on,
wherever that lies by now.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from megatron_apt.data.index import AGAIN
from megatron_apt.data.shards import LatentShards
from megatron_apt.schema import Count, Positive, convert

_PLACES, _BYTES = 64, 1 << 16  # read of the shards


@dataclass(frozen=True)
class Shape:
    """What each sample of a dataset was before it was encoded: a picture is a clip of one frame."""

    frames: Positive
    height: Positive
    width: Positive
    fps: float = 0.0
    """Frames per second; 0: of every source its own frames, each `stride`-th of them."""
    stride: Positive = 1


@dataclass(frozen=True)
class Identity:
    """Goes into a checkpoint's state.json, one for each of data.shards."""

    path: str
    samples: Count
    digest: str
    """SHA-256 of the index, and of the shards' bytes at 64 places: other samples,
    captions or encodings show, one changed latent may not.
    """
    shape: Shape | None = None
    """None where nothing says it: an older checkpoint, a dataset of another writer."""


def shape_of(info: dict, folder: Path) -> Shape | None:
    """What the settings in dataset.json say of the samples' shape; None where they say nothing.

    Raises:
        ValueError: they say what no shape can be; names file and field.
    """
    settings = info["settings"]
    if not {"frames", "height", "width"} <= settings.keys():
        return None
    return convert(settings, Shape, f"{folder}/dataset.json: settings", remedy=AGAIN)


def identify(source: LatentShards) -> Identity:
    """Reads at most 4 MiB of the shards."""
    with open(source.path / "index.jsonl", "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    sizes = [(file, file.stat().st_size) for file in source.files]
    total, begin = sum(size for _, size in sizes), 0
    places = [place * total // _PLACES for place in range(_PLACES)]
    for file, size in sizes:
        with open(file, "rb") as stream:
            for place in (p for p in places if begin <= p < begin + size):
                stream.seek(place - begin)
                digest.update(stream.read(_BYTES))
        begin += size
    return Identity(
        str(source.path.absolute()), len(source), digest.hexdigest(), shape_of(source.info, source.path)
    )
