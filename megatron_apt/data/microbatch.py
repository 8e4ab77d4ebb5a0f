"""A microbatch on one rank: its tokens, its conditions, and every random number a method may draw for it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from megatron_apt.conventions import interpolate
from megatron_apt.kernels.keyed_noise import (
    Tokens,
    derive_key,
    keyed_normal,
    keyed_uniform,
    token_mix,
    token_noise,
)
from megatron_apt.kernels.launch import use_kernels
from megatron_apt.models.condition import Condition
from megatron_apt.models.embeddings import patch_grid, patchify
from megatron_apt.models.layout import Grid, Layout, build_layout
from megatron_apt.parallel.mesh import Mesh

LatentShape = tuple[int, int, int, int]


def pack_latents(
    shapes: tuple[LatentShape, ...], patch: Grid, make: Callable[[list[int], LatentShape], Tensor]
) -> Tensor:
    """Packed tokens of samples in order; `make(rows, shape)` gives the (len(rows), C, F,
    H, W) latents of the samples of one shape.
    """
    if len(set(shapes)) == 1:
        return patchify(make(list(range(len(shapes))), shapes[0]), patch)
    parts: dict[int, Tensor] = {}
    for shape in dict.fromkeys(shapes):
        rows = [i for i, other in enumerate(shapes) if other == shape]
        for i, tokens in zip(rows, patchify(make(rows, shape), patch).chunk(len(rows)), strict=True):
            parts[i] = tokens
    return torch.cat([parts[i] for i in range(len(shapes))])


@dataclass(frozen=True, eq=False)
class Microbatch:
    """Samples of one microbatch.

    Attributes:
        positions: (n,) place of each sample in the run's endless sample stream. With
            (seed, iteration, phase, purpose) it keys every draw, so noise depends on
            neither rank, mesh nor the way the global batch is cut into microbatches.
        sample_ids: index of each sample in its dataset, for messages.
        shapes: latent shape (C, F, H, W) of each sample.
        x: (T_visual, C * patch) clean latents, this rank's tokens.
        condition, null, negative: each sample's own text, the empty caption and the fixed
            negative prompt, n of each; all with the sample's own first frame, if the
            model is given one. That of `condition.first` is part of x too.
        global_batch: samples of the whole iteration, over which losses are averaged.
    """

    mesh: Mesh
    patch: Grid
    positions: Tensor
    sample_ids: tuple[int, ...]
    shapes: tuple[LatentShape, ...]
    x: Tensor
    condition: Condition
    null: Condition
    negative: Condition
    seed: int
    iteration: int
    global_batch: int
    phase: str = ""
    # Noise is used by several segments of a branch, drawn once
    drawn: dict[str, Tensor] = field(default_factory=dict)

    def for_phase(self, phase: str) -> "Microbatch":
        return replace(self, phase=phase, drawn={})

    def named_samples(self) -> str:
        """The samples for a message: their index in their dataset, the first eight."""
        return ", ".join(map(str, self.sample_ids[:8])) + (", ..." if len(self.sample_ids) > 8 else "")

    @cached_property
    def grids(self) -> tuple[Grid, ...]:
        return tuple(patch_grid(shape[1:], self.patch) for shape in self.shapes)

    @cached_property
    def layout(self) -> Layout:
        return self.layout_for(self.condition)

    def layout_for(self, condition: Condition) -> Layout:
        """Layout for one or several copies of these samples under as many conditions."""
        return build_layout(
            self.grids * (len(condition.lengths) // len(self.grids)), condition.lengths, self.mesh
        )

    def noise(self, purpose: str) -> Tensor:
        """N(0, I) shaped like x, from (seed, iteration, phase, position, purpose); a
        sample's stream has the order of its latents.
        """
        if purpose not in self.drawn:
            key = self._key(purpose)
            self.drawn[purpose] = (
                token_noise(key, self.positions, self._places, self.x)
                if use_kernels(self.x)
                else self._noise_reference(key)
            )
        return self.drawn[purpose]

    def _noise_reference(self, key: int) -> Tensor:
        """Whole latents, then this rank's tokens of them."""

        def make(rows: list[int], shape: LatentShape) -> Tensor:
            numel = shape[0] * shape[1] * shape[2] * shape[3]
            return keyed_normal(key, self.positions[rows], numel, dtype=self.x.dtype).view(len(rows), *shape)

        return pack_latents(self.shapes, self.patch, make).index_select(0, self.layout.visual.index)

    def interpolated(self, purpose: str, t: Tensor) -> Tensor:
        """x_t = (1 - t) x + t z with z = noise(purpose) and (n,) times."""
        if use_kernels(self.x):  # the noise is drawn where it is used
            return token_mix(self._key(purpose), self.positions, self._places, self.x, 1 - t.float(), t)
        return interpolate(self.x, self.noise(purpose), self.layout.expand(t))

    def perturbed(self, x: Tensor, sigma: float, purpose: str) -> Tensor:
        """x + sigma n with n = noise(purpose)."""
        if use_kernels(x) and not (x.requires_grad and torch.is_grad_enabled()):
            ones = torch.ones(len(self.shapes), device=x.device)
            return token_mix(self._key(purpose), self.positions, self._places, x, ones, sigma * ones)
        return x + sigma * self.noise(purpose)

    def _key(self, purpose: str) -> int:
        return derive_key(self.seed, self.iteration, self.phase, purpose)

    @cached_property
    def _places(self) -> Tokens:
        sizes = torch.tensor([shape[1:] for shape in self.shapes]).to(self.x.device)
        return Tokens(self.layout.positions, self.layout.visual.sample, sizes, self.patch)

    def uniform(self, purpose: str) -> Tensor:
        """U(0, 1), one number per sample, (n,)."""
        return keyed_uniform(self._key(purpose), self.positions, 1, dtype=self.x.dtype)[:, 0]

    def normal(self, purpose: str) -> Tensor:
        """N(0, 1), one number per sample, (n,)."""
        return keyed_normal(self._key(purpose), self.positions, 1, dtype=self.x.dtype)[:, 0]

    def times(self, t: float) -> Tensor:
        """The same time for every sample, (n,)."""
        return self.x.new_full((len(self.shapes),), t)

    def token_mean(self, squared: Tensor) -> Tensor:
        """Contribution of (T_visual, P) elementwise values to the mean over the global
        batch of each sample's mean.

        First frames that stand in place of the sample's own are not generated and do not
        count.
        """
        given = self.condition.first is not None
        counted = squared.index_fill(0, self.layout.first.local, 0) if given else squared
        return (
            self.layout.sample_sum(counted) / self.layout.sample_numel(squared.shape[1], without_first=given)
        ).sum() / self.global_batch

    def sample_mean(self, values: Tensor) -> Tensor:
        """Contribution of (n,) per-sample values, equal on every context-parallel rank,
        to their mean over the global batch.
        """
        return values.sum() / (self.global_batch * self.mesh.cp.size)


def dropped(batch: Microbatch, probability: float, purpose: str) -> Condition:
    """The samples' conditions with each replaced by the empty caption with this probability."""
    if probability == 0:
        return batch.condition
    drop = (batch.uniform(purpose) < probability).tolist()
    return mixed(batch.null, batch.condition, drop)


def mixed(a: Condition, b: Condition, take_a: list[bool]) -> Condition:
    """Per sample: a's text where the flag is set, else b's; b's pictures."""
    texts_a, texts_b = a.tokens.split(a.lengths), b.tokens.split(b.lengths)
    texts = [ta if flag else tb for ta, tb, flag in zip(texts_a, texts_b, take_a, strict=True)]
    mask = torch.tensor(take_a, device=a.pooled.device)[:, None]
    return replace(
        b,
        tokens=torch.cat(texts),
        lengths=tuple(len(t) for t in texts),
        pooled=torch.where(mask, a.pooled, b.pooled),
    )


def rolled(condition: Condition) -> Condition:
    """Each sample's text given to the next sample: unmatched pairs. Pictures stay."""
    texts = condition.tokens.split(condition.lengths)
    texts = (texts[-1], *texts[:-1])
    return replace(
        condition,
        tokens=torch.cat(texts),
        lengths=tuple(len(t) for t in texts),
        pooled=condition.pooled.roll(1, 0),
    )
