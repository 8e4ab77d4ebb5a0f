"""Samplers: Euler with guidance, one step, two steps. Functions of a velocity network;
noise is keyed by (seed, sample).
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_apt.conventions import interpolate, one_step_sample, predict_sample, shift
from megatron_apt.kernels.keyed_noise import derive_key, keyed_normal
from megatron_apt.models.backbone import Backbone
from megatron_apt.models.condition import Condition
from megatron_apt.models.embeddings import patch_grid, patchify, unpatchify
from megatron_apt.models.layout import build_layout
from megatron_apt.parallel.mesh import Mesh

Velocity = Callable[[Tensor, float], Tensor]  # (latents (n, C, F, H, W), t) -> velocity


def sample_noise(seed: int, ids: Tensor, shape: tuple[int, int, int, int], purpose: str = "z") -> Tensor:
    """N(0, I) latents (n, C, F, H, W): row i depends on (seed, ids[i], purpose) alone."""
    numel = shape[0] * shape[1] * shape[2] * shape[3]
    return keyed_normal(derive_key(seed, "sample", purpose), ids, numel).view(len(ids), *shape)


@dataclass(frozen=True)
class Sampler:
    """A trained network with the conditions of some samples. Without context parallelism:
    every rank samples whole latents.

    Attributes:
        model: a backbone.
        condition, negative: text of the n samples, and what guidance points away from.
            Where they have first frames, so do the samples made.
    """

    model: Backbone
    mesh: Mesh
    condition: Condition
    negative: Condition

    def velocity(self, x: Tensor, t: float, guidance_scale: float = 1.0) -> Tensor:
        """v(x, t, c), guided: v(neg) + w (v(c) - v(neg)); w = 1 costs one evaluation, any
        other two in one pass.
        """
        model = self.model.model
        grid = patch_grid(x.shape[2:], model.patch)
        guided = guidance_scale != 1.0
        condition = self.condition.join(self.negative) if guided else self.condition
        tokens = patchify(torch.cat((x, x)) if guided else x, model.patch)
        n = len(condition.lengths)
        layout = build_layout((grid,) * n, condition.lengths, self.mesh)
        v = unpatchify(self.model(tokens, x.new_full((n,), t), condition, layout), grid, model.patch)
        if guided:
            conditional, negative = v.chunk(2)
            v = negative + guidance_scale * (conditional - negative)
        return v

    @torch.no_grad()
    def euler(self, z: Tensor, steps: int, guidance_scale: float = 1.0, s: float = 1.0) -> Tensor:
        """N Euler steps from t = 1 to 0 on the grid shift(n / N, s). One step without guidance is z - v."""
        times = [shift(n / steps, s) for n in range(steps, -1, -1)]
        x = z
        for t, following in itertools.pairwise(times):
            x = x + (following - t) * self.velocity(x, t, guidance_scale)
        return self._with_first(x)

    @torch.no_grad()
    def one_step(self, z: Tensor) -> Tensor:
        """G(z, c) = z - v(z, c, 1)."""
        return self._with_first(one_step_sample(z, self.velocity(z, 1.0)))

    @torch.no_grad()
    def two_steps(self, z: Tensor, renoise: Tensor, t: float = 0.5) -> Tensor:
        """x1 = G(z); x_t = (1 - t) x1 + t z'; x2 = x_t - t v(x_t, c, t): zero-shot
        two-step inference of the paper.
        """
        t_tensor = torch.as_tensor(t, dtype=z.dtype)
        x_t = interpolate(self.one_step(z), renoise, t_tensor)
        return self._with_first(predict_sample(x_t, self.velocity(x_t, t), t_tensor))

    def _with_first(self, x: Tensor) -> Tensor:
        """Latents whose first frames are those given, which no velocity moves."""
        if self.condition.first is None or x.shape[2] == 1:
            return x
        _, rows, columns = patch_grid(x.shape[2:], self.model.model.patch)
        first = unpatchify(self.condition.first.to(x.dtype), (1, rows, columns), self.model.model.patch)
        return torch.cat((first, x[:, :, 1:]), dim=2)
