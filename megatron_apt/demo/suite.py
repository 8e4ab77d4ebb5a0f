"""What the demo measures of each trained network, and the files that keep it.

Sample i of every row uses the caption of real sample i and the noise of (seed, i), so
rows differ by network and sampler alone. Images are compared in pixels. Clips are
compared in latents pooled 2 x 2, which keeps the number of features below that of
samples.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TypedDict

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor

from megatron_apt.data.shards import LatentShards, stack_pooled
from megatron_apt.demo.content import APT, APT_2, CONSISTENCY, DIFFUSION, DIFFUSION_1, WITHOUT_AR1
from megatron_apt.demo.files import named_failure, write
from megatron_apt.demo.recipes import Place
from megatron_apt.evaluate.classifier import ClassAccuracy
from megatron_apt.evaluate.diversity import pairwise_diversity
from megatron_apt.evaluate.frechet import frechet_distance, pooled_features
from megatron_apt.files import write_product
from megatron_apt.models.condition import Condition
from megatron_apt.parallel.agree import on_main
from megatron_apt.parallel.mesh import Mesh
from megatron_apt.sample.command import Loaded, load_generator, sample_latents
from megatron_apt.sample.config import SampleConfig
from megatron_apt.schema import Count, read_bytes, read_json

SEED = 1234
SHOWN_SEEDS = 2  # samples of each caption in the report
CHUNK = 128  # samples of one forward pass
SAMPLES = 1797  # of each row: one for each real one
QUICK_SAMPLES = 160


@dataclass(frozen=True)
class Measured:
    """One row: a run, how it is sampled, and its names in results.json and in the report."""

    key: str
    title: str
    run: str
    steps: int
    guidance: float
    nfe: int


def _suite(section: str) -> tuple[Measured, ...]:
    return (
        Measured("diffusion_25", DIFFUSION, f"{section}/flow", 25, 1.0, 25),
        Measured("diffusion_1", DIFFUSION_1, f"{section}/flow", 1, 1.0, 1),
        Measured("consistency_1", CONSISTENCY, f"{section}/consistency", 1, 1.0, 1),
        Measured("apt_1", APT, f"{section}/apt", 1, 1.0, 1),
        Measured("apt_2", APT_2, f"{section}/apt", 2, 1.0, 2),
    )


SUITES = {
    "images": (
        *_suite("images"),
        Measured("apt_1_without_ar1", WITHOUT_AR1, "images/apt_without_ar1", 1, 1.0, 1),
    ),
    "videos": _suite("videos"),
}


@dataclass(frozen=True)
class RealData:
    """What samples of a section are compared with."""

    shards: LatentShards
    latents: Tensor
    features: Tensor
    labels: Tensor
    classifier: ClassAccuracy

    def of(self, latents: Tensor) -> Tensor:
        """Features (n, d) of latents."""
        return _features(self.shards, latents)


def _features(shards: LatentShards, latents: Tensor) -> Tensor:
    if latents.shape[2] == 1:
        codec = shards.codec()
        # Grey: one channel says all
        return torch.stack([codec.decode(latent)[0].flatten() for latent in latents])
    return pooled_features(latents)


@lru_cache(maxsize=2)
def real_data(folder: str) -> RealData:
    """Latents, features, caption classes and the classifier of a dataset."""
    shards = LatentShards(folder)
    latents = torch.stack([shards[i].latent for i in range(len(shards))])
    classes = {caption: i for i, caption in enumerate(sorted(set(shards.captions)))}
    labels = torch.tensor([classes[caption] for caption in shards.captions])
    features = _features(shards, latents)
    return RealData(shards, latents, features, labels, ClassAccuracy.fit(features, labels))


def evaluate(here: Place, section: str, rows: Sequence[Measured], mesh: Mesh, quick: bool = False) -> None:
    """Samples each row for the real captions, every rank its part; writes its numbers and
    the samples shown to the results folder.

    Args:
        quick: only as many samples as the report shows.
    """
    real = real_data(here.data(section))
    folder = _folder(here, section)
    with named_failure(folder):
        folder.mkdir(parents=True, exist_ok=True)
    shown = shown_samples(real.shards)
    ids = torch.tensor(shown + [i for i in range(len(real.shards)) if i not in set(shown)])[
        : QUICK_SAMPLES if quick else SAMPLES
    ]
    for row in rows:
        mine = ids.tensor_split(mesh.dp.size)[mesh.dp.rank]
        loaded = load_generator(f"{here.root}/{row.run}", mesh)
        began = time.perf_counter()
        made = save({"latents": sample_row(loaded, row, real.shards, mine, mesh)})
        seconds = (time.perf_counter() - began) / len(mine)
        write(_part(folder, row, mesh.dp.rank), partial(_write_bytes, made))
        dist.barrier()
        on_main(mesh, partial(_measure, folder, row, real, ids, len(shown), seconds, mesh.dp.size))


def _write_bytes(data: bytes, file: Path) -> None:
    file.write_bytes(data)


def _measure(
    folder: Path, row: Measured, real: RealData, ids: Tensor, shown: int, seconds: float, ranks: int
) -> None:
    """Numbers of the samples that all ranks have made, and those that are shown."""
    parts = [_part(folder, row, rank) for rank in range(ranks)]
    latents = torch.cat([load_file(part)["latents"] for part in parts])
    features = real.of(latents)
    numbers = {
        "frechet": frechet_distance(features, real.features),
        "accuracy": real.classifier.score(features, real.labels[ids]),
        "diversity": pairwise_diversity(features),
        "samples": len(ids),
        "seconds_per_sample": seconds,
    }
    write(
        _file(folder, row, ".safetensors"),
        lambda file: write_product(file, save({"latents": latents[:shown].contiguous()})),
    )
    write(_file(folder, row, ".json"), lambda file: write_product(file, json.dumps(numbers)))
    for part in parts:
        part.unlink()


def _file(folder: Path, row: Measured, suffix: str) -> Path:
    return folder / f"{row.key}{suffix}"


def _part(folder: Path, row: Measured, rank: int) -> Path:
    return folder / f".{row.key}-rank{rank}.safetensors"


def sample_row(loaded: Loaded, row: Measured, shards: LatentShards, ids: Tensor, mesh: Mesh) -> Tensor:
    """One sample for the caption of each dataset entry in ids, (len(ids), C, F, H, W)."""
    config = SampleConfig(checkpoint="", steps=row.steps, guidance=row.guidance)
    null = Condition.pack([shards.null_text], loaded.text_length, shards.null_pooled)
    parts = []
    for chunk in ids.split(CHUNK):
        samples = [shards[i] for i in chunk.tolist()]
        condition = Condition.pack(
            [sample.text for sample in samples], loaded.text_length, stack_pooled(samples)
        )
        parts.append(sample_latents(loaded, mesh, condition, null, shards.shapes[0], chunk, SEED, config))
    return torch.cat(parts)


def shown_samples(shards: LatentShards) -> list[int]:
    """The first samples of each caption, captions in order."""
    places: dict[str, list[int]] = {}
    for i, caption in enumerate(shards.captions):
        places.setdefault(caption, []).append(i)
    return [i for caption in sorted(places, key=_reading_order) for i in places[caption][:SHOWN_SEEDS]]


_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def _reading_order(caption: str) -> tuple:
    numbers = [_DIGITS.index(word) for word in caption.split() if word in _DIGITS]
    return (numbers, caption)


class Numbers(TypedDict):
    """What is measured of a row."""

    frechet: float
    accuracy: float
    diversity: float
    samples: Count
    seconds_per_sample: float


def read_numbers(here: Place, section: str, row: Measured) -> Numbers | None:
    """Those of a row; None if it is not measured yet."""
    file = _file(_folder(here, section), row, ".json")
    return read_json(file, Numbers, remedy=_again(here)) if file.exists() or file.is_symlink() else None


def read_shown(here: Place, section: str, row: Measured, shape: tuple[int, ...]) -> Tensor:
    """The samples of a row that are shown.

    Raises:
        ValueError: missing, damaged, or of another shape or type.
    """
    file = _file(_folder(here, section), row, ".safetensors")
    try:
        found = load(read_bytes(file, remedy=_again(here))).get("latents")
    except (SafetensorError, RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"{file}: no readable safetensors file ({error}); {_again(here)}") from None
    if found is None or found.shape != shape or found.dtype != torch.float32:
        what = (
            "nothing called latents"
            if found is None
            else f"{found.dtype} {tuple(found.shape)}".removeprefix("torch.")
        )
        raise ValueError(f"{file}: holds {what}, expected float32 {shape}; {_again(here)}")
    return found


def trouble(here: Place, section: str, row: Measured) -> str:
    """What is wrong with the files of a row that has been measured; empty if nothing is."""
    try:
        if read_numbers(here, section, row) is None:
            return f"{_file(_folder(here, section), row, '.json')}: missing"
        read_shown(here, section, row, shape_shown(real_data(here.data(section))))
    except ValueError as error:
        return str(error)
    return ""


def shape_shown(real: RealData) -> tuple[int, ...]:
    """Of the samples that are shown of each row."""
    return (len(shown_samples(real.shards)), *real.latents.shape[1:])


def _folder(here: Place, section: str) -> Path:
    return Path(here.root) / "evaluation" / section


def _again(here: Place) -> str:
    return f"`megatron-apt demo --root {here.root}` measures it again"
