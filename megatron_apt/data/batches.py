"""Microbatches from latent shards: which samples, in which shape, on which rank."""

import torch
from torch import Tensor

from megatron_apt.config import DataConfig
from megatron_apt.data.microbatch import Microbatch, pack_latents
from megatron_apt.data.order import SampleOrder
from megatron_apt.data.shards import LatentShards
from megatron_apt.models.config import ModelConfig
from megatron_apt.models.embeddings import patch_grid
from megatron_apt.models.layout import build_layout
from megatron_apt.models.mmdit import Condition
from megatron_apt.models.spec import DTYPES
from megatron_apt.parallel.mesh import Mesh


def fit_text(text: Tensor, length: int) -> Tensor:
    """(L, E) cut or padded with zeros to `length` tokens; 0 leaves it as it is."""
    if not length or len(text) == length:
        return text
    return text[:length] if len(text) > length else torch.cat((text, text.new_zeros(length - len(text), text.shape[1])))


def pack_texts(texts: list[Tensor], length: int) -> Condition:
    """Conditions of samples; the mean is over each caption's own tokens, before padding."""
    fitted = [fit_text(text, length) for text in texts]
    return Condition(torch.cat(fitted), tuple(len(t) for t in fitted), torch.stack([t.mean(0) for t in texts]))


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
            raise ValueError(f"global_batch={global_batch} is not a multiple of micro_batch={micro_batch} x {mesh.dp.size} data-parallel ranks; use {share}")
        self.data, self.model, self.mesh, self.seed = data, model, mesh, seed
        self.global_batch, self.micro_batch, self.microbatches = global_batch, micro_batch, global_batch // share
        self.sources = [LatentShards(path) for path in data.shards]
        for path, source in zip(data.shards, self.sources, strict=True):
            self._check(path, source)
        weights = data.weights or (1,) * len(self.sources)
        self.order = SampleOrder([len(s) for s in self.sources], weights, micro_batch, seed)

    def _check(self, path: str, source: LatentShards) -> None:
        for shape in set(source.shapes):
            if shape[0] != self.model.latent_channels:
                raise ValueError(f"{path}: latents have {shape[0]} channels, model.latent_channels={self.model.latent_channels}; set it to {shape[0]}")
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
        condition = pack_texts([sample.text for sample in samples], self.data.text_length)
        layout = build_layout(tuple(patch_grid(s[1:], self.model.patch) for s in shapes), condition.lengths, self.mesh)
        sources = [self.sources[source] for source, _ in places]
        return Microbatch(
            mesh=self.mesh,
            patch=self.model.patch,
            positions=torch.tensor(positions, device=self.mesh.device),
            sample_ids=tuple(index for _, index in places),
            shapes=shapes,
            x=tokens.to(self.mesh.device, dtype).index_select(0, layout.visual.index),
            condition=self._on_device(condition),
            null=self._on_device(pack_texts([source.null_text for source in sources], self.data.text_length)),
            negative=self._on_device(pack_texts([source.negative_text for source in sources], self.data.text_length)),
            seed=self.seed,
            iteration=iteration,
            global_batch=self.global_batch,
        )

    def _on_device(self, condition: Condition) -> Condition:
        return Condition(condition.tokens.to(self.mesh.device), condition.lengths, condition.pooled.to(self.mesh.device))
