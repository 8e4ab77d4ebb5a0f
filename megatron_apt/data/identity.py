"""Which dataset a folder holds, so that a run resumes on the data it was trained on,
wherever that lies by now.
"""

import hashlib
from dataclasses import dataclass

from megatron_apt.data.shards import LatentShards
from megatron_apt.schema import Count

_PLACES, _BYTES = 64, 1 << 16  # read of the shards


@dataclass(frozen=True)
class Identity:
    """Goes into a checkpoint's state.json, one for each of data.shards."""

    path: str
    samples: Count
    digest: str
    """SHA-256 of the index, and of the shards' bytes at 64 places: other samples,
    captions or encodings show, one changed latent may not.
    """


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
    return Identity(str(source.path), len(source), digest.hexdigest())
