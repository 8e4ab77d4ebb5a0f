"""Microbatches from latent shards: which samples, in which shape, on which rank.

An iteration takes the next `global_batch` samples of the stream. They are dealt out in
rounds: `micro_batch` samples to each data-parallel rank in turn. What is left after the
last full round is cut into one contiguous piece for each rank, whose sizes differ by at
most one, so that a global batch need not be a multiple of anything; a rank whose piece is
empty has one microbatch less.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from megatron_apt.config import DataConfig
from megatron_apt.data.encoding import Encoding
from megatron_apt.data.microbatch import LatentShape, Microbatch, pack_latents
from megatron_apt.data.order import SampleOrder
from megatron_apt.data.shards import FirstFrame, LatentShards, stack_pooled
from megatron_apt.models.condition import Condition
from megatron_apt.models.config import ModelConfig
from megatron_apt.models.embeddings import patch_grid, patchify
from megatron_apt.models.layout import build_layout, chunk
from megatron_apt.parallel.mesh import Mesh


def deal(global_batch: int, micro_batch: int, ranks: int, rank: int) -> list[tuple[int, int]]:
    """(first, count) of each microbatch of a rank, within one iteration's samples."""
    rounds, rest = divmod(global_batch, micro_batch * ranks)
    full = [((m * ranks + rank) * micro_batch, micro_batch) for m in range(rounds)]
    start, stop = chunk(rest, ranks, rank)
    return [*full, (global_batch - rest + start, stop - start)] if stop > start else full


def check_first_frames(source: Encoding, model: ModelConfig) -> None:
    """Raises ValueError if the model is given first frames that the dataset does not hold
    in its widths. More than the model reads is no harm.
    """
    if model.condition_channels and not source.given_channels:
        raise ValueError(
            f"{source.path}: holds no first frames, model.condition_channels={model.condition_channels} "
            "reads them; encode it with --image-to-video, or train a text-to-video model"
        )
    if model.condition_channels not in (0, source.given_channels):
        raise ValueError(
            f"{source.path}: first frames have {source.given_channels} channels (mask and latent), "
            f"model.condition_channels={model.condition_channels}; encode with the VAE of the model's "
            "pipeline"
        )
    if model.first_frame and source.info["codec"].get("causal") is False:
        raise ValueError(
            f"{source.path}: was encoded with pixel_causal=False, so a first latent frame holds several "
            "frames and no picture makes one; encode it with a causal codec for model.first_frame"
        )
    wanted = model.image_shape
    if wanted and source.image_shape != wanted:
        found = (
            "no image tokens"
            if source.image_shape is None
            else "image tokens of {} x {}".format(*source.image_shape)
        )
        raise ValueError(
            f"{source.path}: holds {found}, this model reads {wanted[0]} x {wanted[1]} "
            "(model.image_tokens, image_width); encode with --image-to-video and the image_encoder of "
            "its pipeline"
        )


def first_frames(frames: Sequence[FirstFrame], model: ModelConfig) -> dict[str, Tensor]:
    """The fields `visual`, `image` and `first` of samples' Condition, as far as the model reads them."""
    given, images, latents = zip(*frames, strict=True)
    pictures: dict[str, Tensor] = {}
    if model.condition_channels:
        shapes = tuple(tuple(one.shape) for one in given)
        pictures["visual"] = pack_latents(
            shapes, model.patch, lambda rows, _: torch.stack([given[i] for i in rows])
        )
    if model.image_shape:
        pictures["image"] = torch.stack(images)
    if model.first_frame:
        clips = [patchify(latent[None], model.patch) for latent in latents if latent is not None]
        pictures["first"] = torch.cat([torch.empty(0, model.patch_width), *clips])
    return pictures


class Batches:
    """Serves microbatch m of iteration i to this data-parallel rank.

    Args:
        least: samples that every microbatch must have.

    Raises:
        ValueError: datasets that do not fit the model, or a global batch that leaves a
            rank without samples or a microbatch with too few.
    """

    def __init__(
        self,
        data: DataConfig,
        model: ModelConfig,
        mesh: Mesh,
        seed: int,
        global_batch: int,
        micro_batch: int,
        least: int = 1,
    ):
        if not data.shards:
            raise ValueError("data.shards=(): name at least one folder written by `megatron-apt encode`")
        everyone = [deal(global_batch, micro_batch, mesh.dp.size, rank) for rank in range(mesh.dp.size)]
        if not all(everyone):
            raise ValueError(
                f"global_batch={global_batch} leaves some of {mesh.dp.size} data-parallel ranks without "
                "samples; use a larger one"
            )
        fewest = min(count for parts in everyone for _, count in parts)
        if fewest < least:
            raise ValueError(
                f"global_batch={global_batch} in microbatches of micro_batch={micro_batch} on {mesh.dp.size} "
                f"data-parallel ranks leaves one of {fewest}; this method needs {least} in each, use a "
                f"multiple of {micro_batch * mesh.dp.size} with micro_batch of at least {least}"
            )
        self.model, self.mesh, self.seed = model, mesh, seed
        self.text_length = data.text_length or 0
        self.global_batch, self.parts = global_batch, everyone[mesh.dp.rank]
        self.sources = [LatentShards(path) for path in data.shards]
        for path, source in zip(data.shards, self.sources, strict=True):
            self._check(path, source)
        pooled = {
            path: "none" if s.null_pooled is None else s.pooled_width
            for path, s in zip(data.shards, self.sources, strict=True)
        }
        if len(set(pooled.values())) > 1:
            raise ValueError(
                f"data.shards: widths of the pooled text differ, {pooled}; mix datasets of one text encoder"
            )
        weights = data.weights or (1,) * len(self.sources)
        self.order = SampleOrder([len(s) for s in self.sources], weights, data.block, seed)

    def _check(self, path: str, source: LatentShards) -> None:
        for shape in set(source.shapes):
            if shape[0] != self.model.latent_channels:
                raise ValueError(
                    f"{path}: latents have {shape[0]} channels, "
                    f"model.latent_channels={self.model.latent_channels}; set it to {shape[0]}"
                )
            patch_grid(tuple(shape[1:]), self.model.patch)
        width = source.null_text.shape[-1]
        if width != self.model.text_width:
            raise ValueError(
                f"{path}: text embeddings are {width} wide, model.text_width={self.model.text_width}; set it "
                f"to {width}"
            )
        if self.model.pooled_text and source.pooled_width != self.model.pooled_width:
            kind = "the mean of the text" if source.null_pooled is None else "the text encoder's own"
            raise ValueError(
                f"{path}: pooled text is {kind}, {source.pooled_width} wide, this model reads "
                f"{self.model.pooled_width} (model.pooled_width); encode with the "
                "text encoders of its pipeline"
            )
        check_first_frames(source, self.model)

    def iteration(self, iteration: int) -> list[Microbatch]:
        """This rank's microbatches of an iteration."""
        return [
            self._microbatch(iteration, iteration * self.global_batch + first, count)
            for first, count in self.parts
        ]

    def _microbatch(self, iteration: int, first: int, count: int) -> Microbatch:
        positions = range(first, first + count)
        places = [self.order.at(position) for position in positions]
        samples = [self.sources[source][index] for source, index in places]
        dtype = torch.float64 if self.model.dtype == "float64" else torch.float32
        shapes = tuple(cast(LatentShape, tuple(sample.latent.shape)) for sample in samples)
        tokens = pack_latents(
            shapes, self.model.patch, lambda rows, _: torch.stack([samples[i].latent for i in rows])
        )
        condition = Condition.pack(
            [sample.text for sample in samples], self.text_length, stack_pooled(samples)
        )
        layout = build_layout(
            tuple(patch_grid(s[1:], self.model.patch) for s in shapes), condition.lengths, self.mesh
        )
        datasets = [source for source, _ in places]
        # What is dropped or replaced is the text: the empty and the negative caption keep
        # a sample's own first frame, as in the pipelines.
        pictures = first_frames([sample.first_frame for sample in samples], self.model)
        pictures = {name: tensor.to(self.mesh.device, dtype) for name, tensor in pictures.items()}
        return Microbatch(
            mesh=self.mesh,
            patch=self.model.patch,
            positions=torch.tensor(positions, device=self.mesh.device),
            sample_ids=tuple(index for _, index in places),
            shapes=shapes,
            x=tokens.to(self.mesh.device, dtype).index_select(0, layout.visual.index),
            condition=replace(condition.to(self.mesh.device), **pictures),
            null=replace(self._fixed(datasets, "null"), **pictures),
            negative=replace(self._fixed(datasets, "negative"), **pictures),
            seed=self.seed,
            iteration=iteration,
            global_batch=self.global_batch,
        )

    def _fixed(self, datasets: list[int], which: str) -> Condition:
        """The empty or the negative caption of each sample's dataset."""
        sources = [
            self.sources[dataset] for dataset in (datasets[:1] if len(set(datasets)) == 1 else datasets)
        ]
        pooled = [getattr(source, f"{which}_pooled") for source in sources]
        packed = Condition.pack(
            [getattr(source, f"{which}_text") for source in sources],
            self.text_length,
            None if pooled[0] is None else torch.cat(pooled),
        )
        return packed.repeat(len(datasets) // len(sources)).to(self.mesh.device)
