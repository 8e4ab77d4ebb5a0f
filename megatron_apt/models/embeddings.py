"""Embeddings of time, position and patches."""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_apt.models.layout import Grid, Layout
from megatron_apt.models.parameters import linear

_FREQUENCIES = 256


class TimestepEmbedding(nn.Module):
    """t in [0, 1], (n,) -> (n, D): 256 sines and cosines of 1000 t, then a two-layer network."""

    def __init__(self, width: int, dtype: torch.dtype):
        super().__init__()
        self.linear_1 = linear(_FREQUENCIES, width, dtype)
        self.linear_2 = linear(width, width, dtype)

    def forward(self, t: Tensor) -> Tensor:
        dtype = torch.promote_types(self.linear_1.weight.dtype, torch.float32)
        half = _FREQUENCIES // 2
        frequencies = torch.exp(
            torch.arange(half, device=t.device, dtype=dtype) * (-math.log(10000.0) / half)
        )
        angles = 1000.0 * t.to(dtype)[:, None] * frequencies
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


class PooledEmbedding(nn.Module):
    """Pooled text (n, P) -> (n, D) through a two-layer network."""

    def __init__(self, width_in: int, width: int, dtype: torch.dtype):
        super().__init__()
        self.linear_1, self.linear_2 = linear(width_in, width, dtype), linear(width, width, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.linear_1.in_features:
            raise ValueError(
                f"pooled text is {x.shape[1]} wide, this model reads {self.linear_1.in_features}: give that "
                "of its own text encoders"
            )
        return self.linear_2(F.silu(self.linear_1(x)))


@lru_cache(maxsize=8)  # a table of 46,800 tokens is 24 MB
def rotary_table(layout: Layout, axes: Grid, theta: float, dtype: torch.dtype) -> Tensor:
    """Unit complex numbers e^{i position / theta^(j / pairs)} of the visual tokens, in
    the layout's folded form (a, b, 1, 1, K / 2).

    Args:
        axes: pairs of numbers of a head turned by (frame, row, column); K / 2 in all.
    """
    angles = []
    for axis, pairs in enumerate(axes):
        rates = theta ** (
            -torch.arange(pairs, device=layout.positions.device, dtype=torch.float64) / max(pairs, 1)
        )
        angles.append(layout.positions[:, axis, None].double() * rates)
    phases = torch.cat(angles, dim=-1)
    table = torch.polar(torch.ones_like(phases), phases).to(
        torch.complex128 if dtype == torch.float64 else torch.complex64
    )
    table = layout.visual.fold(table)
    if layout.visual.uniform and len(set(layout.grids)) == 1:
        table = table[:1]  # every sample has the same positions: broadcast instead of reading n copies
    return table[:, :, None, None]


def patchify(latents: Tensor, patch: Grid) -> Tensor:
    """(n, C, F, H, W) -> (n * tokens, C * pf * ph * pw), tokens in frame, row, column
    order.

    Raises:
        ValueError: a latent size that the patch does not divide.
    """
    n, c, *size = latents.shape
    grid = patch_grid(size, patch)
    x = latents.view(n, c, grid[0], patch[0], grid[1], patch[1], grid[2], patch[2])
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(n * math.prod(grid), -1)


def unpatchify(tokens: Tensor, grid: Grid, patch: Grid) -> Tensor:
    """Inverse of `patchify` for samples that share one grid: (n * tokens, P) -> (n, C, F, H, W)."""
    x = tokens.view(-1, *grid, tokens.shape[-1] // math.prod(patch), *patch).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.reshape(len(x), x.shape[1], *(g * p for g, p in zip(grid, patch, strict=True)))


def patch_grid(size: Sequence[int], patch: Grid) -> Grid:
    """Tokens over (frames, rows, columns) of a latent of this size."""
    if any(s % p for s, p in zip(size, patch, strict=True)):
        raise ValueError(
            f"latent of frames x rows x columns = {tuple(size)} does not split into patches of {patch}; "
            "encode to a size that is a multiple"
        )
    frames, rows, columns = (s // p for s, p in zip(size, patch, strict=True))
    return frames, rows, columns
