"""Microbatches from latent shards: which samples, in which shape, on which rank."""

import torch

from megatron_apt.config import DataConfig
from megatron_apt.data.microbatch import Microbatch, pack_latents
from megatron_apt.data.order import SampleOrder
from megatron_apt.data.shards import LatentShards
from megatron_apt.models.config import ModelConfig
from megatron_apt.models.embeddings import patch_grid
from megatron_apt.models.layout import build_layout
from megatron_apt.models.mmdit import Condition
from megatron_apt.parallel.mesh import Mesh


class Batches:
    """Serves microbatch m of iteration i to this data-parallel rank.

    Raises:
        ValueError: datasets that do not fit the model, or a global batch that the ranks do not divide.
    """

    def __init__(self, data: DataConfig, model: ModelConfig, mesh: Mesh, seed: int, global_batch: int, micro_batch: int):
        if not data.shards:
            raise ValueError("data.shards=(): name at least one folder written by `megatron-apt encode`")
        share = micro_batch * mesh.dp.size
        if global_batch % share:
            raise ValueError(
                f"global_batch={global_batch} is not a multiple of micro_batch={micro_batch} x {mesh.dp.size} data-parallel ranks; use {share}"
            )
        self.data, self.model, self.mesh, self.seed = data, model, mesh, seed
        self.global_batch, self.micro_batch, self.microbatches = global_batch, micro_batch, global_batch // share
        self.sources = [LatentShards(path) for path in data.shards]
        for path, source in zip(data.shards, self.sources, strict=True):
            self._check(path, source)
        weights = data.weights or (1,) * len(self.sources)
        self.order = SampleOrder([len(s) for s in self.sources], weights, data.block, seed)

    def _check(self, path: str, source: LatentShards) -> None:
        for shape in set(source.shapes):
            if shape[0] != self.model.latent_channels:
                raise ValueError(
                    f"{path}: latents have {shape[0]} channels, model.latent_channels={self.model.latent_channels}; set it to {shape[0]}"
                )
            patch_grid(tuple(shape[1:]), self.model.patch)
        width = source.null_text.shape[-1]
        if width != self.model.text_width:
            raise ValueError(f"{path}: text embeddings are {width} wide, model.text_width={self.model.text_width}; set it to {width}")

    def microbatch(self, iteration: int, m: int) -> Microbatch:
        """Microbatch m (0 <= m < microbatches) of an iteration, this rank's part."""
        first = iteration * self.global_batch + (m * self.mesh.dp.size + self.mesh.dp.rank) * self.micro_batch
        positions = range(first, first + self.micro_batch)
        places = [self.order.at(position) for position in positions]
        samples = [self.sources[source][index] for source, index in places]
        dtype = torch.float64 if self.model.dtype == "float64" else torch.float32
        shapes = tuple(tuple(sample.latent.shape) for sample in samples)
        tokens = pack_latents(shapes, self.model.patch, lambda rows, _: torch.stack([samples[i].latent for i in rows]))
        condition = Condition.pack([sample.text for sample in samples], self.data.text_length)
        layout = build_layout(tuple(patch_grid(s[1:], self.model.patch) for s in shapes), condition.lengths, self.mesh)
        datasets = [source for source, _ in places]
        return Microbatch(
            mesh=self.mesh,
            patch=self.model.patch,
            positions=torch.tensor(positions, device=self.mesh.device),
            sample_ids=tuple(index for _, index in places),
            shapes=shapes,
            x=tokens.to(self.mesh.device, dtype).index_select(0, layout.visual.index),
            condition=condition.to(self.mesh.device),
            null=self._fixed(datasets, "null_text"),
            negative=self._fixed(datasets, "negative_text"),
            seed=self.seed,
            iteration=iteration,
            global_batch=self.global_batch,
        )

    def _fixed(self, datasets: list[int], which: str) -> Condition:
        """The empty or the negative caption of each sample's dataset."""
        if len(set(datasets)) == 1:
            text = getattr(self.sources[datasets[0]], which)
            return Condition.pack([text], self.data.text_length).repeat(len(datasets)).to(self.mesh.device)
        texts = [getattr(self.sources[dataset], which) for dataset in datasets]
        return Condition.pack(texts, self.data.text_length).to(self.mesh.device)
