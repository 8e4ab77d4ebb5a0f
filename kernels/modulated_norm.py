"""Norm without a learned affine part, then AdaLN's scale and shift of each sample: y =
norm(x) (1 + scale) + shift.

LayerNorm: n = (x - mean(x)) / sqrt(var(x) + eps). RMSNorm: n = x / sqrt(mean(x^2) + eps).
Over D features, statistics in fp32. With h = dy (1 + scale) and r the factor 1 /
sqrt(...):
    dx = r (h - mean(h) - n mean(h n))      (RMSNorm: without mean(h))
    dshift = sum over the sample's rows of dy,   dscale = sum of dy n

Bytes at e bytes a number: forward 2 R D e (x in, y out), backward 3 R D e (x, dy in, dx
out); the statistics are computed again rather than kept. A program keeps its sample's
vectors and both sums in registers while it walks over a block of rows.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_apt.kernels.launch import jit, launch, tl, use_kernels
from megatron_apt.kernels.rows import Rows, sum_blocks

EPS = 1e-6
_ROWS = 32  # of a block: the sums cost D fp32 numbers a block, the vectors as much, beside 32 rows of x


def modulated_norm_reference(
    x: Tensor, shift: Tensor, scale: Tensor, rows: Rows, kind: str = "layer"
) -> Tensor:
    """The definition, differentiated by autograd."""
    normed = (
        F.layer_norm(x, x.shape[-1:], eps=EPS) if kind == "layer" else F.rms_norm(x, x.shape[-1:], eps=EPS)
    )
    return torch.addcmul(rows.expand(shift), normed, 1 + rows.expand(scale))


@jit
def _normed(x, mask, width, LAYER: tl.constexpr):
    """The normalised rows and their factors (ROWS, 1)."""
    if LAYER:
        x = tl.where(mask, x - tl.sum(x, 1, keep_dims=True) / width, 0.0)
    factor = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / width + 1e-6)
    return x * factor, factor


@jit
def _forward(
    x_at, shift_at, scale_at, y_at, table, width, LAYER: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr
):
    entry = table + 3 * tl.program_id(0)
    sample, start, stop = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    column = tl.arange(0, TILE)
    vector = sample.to(tl.int64) * width + column
    shift = tl.load(shift_at + vector, mask=column < width, other=0.0).to(tl.float32)
    scale = tl.load(scale_at + vector, mask=column < width, other=0.0).to(tl.float32) + 1.0
    for first in range(start, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < stop)[:, None] & (column < width)[None, :]
        place = row[:, None].to(tl.int64) * width + column[None, :]
        n, _ = _normed(tl.load(x_at + place, mask=mask, other=0.0).to(tl.float32), mask, width, LAYER)
        tl.store(y_at + place, (n * scale[None, :] + shift[None, :]).to(y_at.dtype.element_ty), mask=mask)


@jit
def _backward(
    x_at,
    scale_at,
    dy_at,
    dx_at,
    dshift_at,
    dscale_at,
    table,
    width,
    LAYER: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    entry = table + 3 * tl.program_id(0)
    sample, start, stop = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    column = tl.arange(0, TILE)
    scale = (
        tl.load(scale_at + sample.to(tl.int64) * width + column, mask=column < width, other=0.0).to(
            tl.float32
        )
        + 1.0
    )
    dshift = tl.zeros((ROWS, TILE), tl.float32)
    dscale = tl.zeros((ROWS, TILE), tl.float32)
    for first in range(start, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < stop)[:, None] & (column < width)[None, :]
        place = row[:, None].to(tl.int64) * width + column[None, :]
        n, factor = _normed(tl.load(x_at + place, mask=mask, other=0.0).to(tl.float32), mask, width, LAYER)
        dy = tl.load(dy_at + place, mask=mask, other=0.0).to(tl.float32)
        dshift += dy
        dscale += dy * n
        h = dy * scale[None, :]
        dx = h - n * (tl.sum(h * n, 1, keep_dims=True) / width)
        if LAYER:
            dx -= tl.sum(h, 1, keep_dims=True) / width
        tl.store(dx_at + place, (dx * factor).to(dx_at.dtype.element_ty), mask=mask)
    part = tl.program_id(0).to(tl.int64) * width + column
    tl.store(dshift_at + part, tl.sum(dshift, 0), mask=column < width)
    tl.store(dscale_at + part, tl.sum(dscale, 0), mask=column < width)


def _shape(width: int) -> dict[str, int]:
    tile = 1 << (width - 1).bit_length()
    return {"ROWS": max(4096 // tile, 1), "TILE": tile, "num_warps": min(max(tile // 512, 4), 8)}


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, scale, rows, layer):
        x, shift, scale = x.contiguous(), shift.contiguous(), scale.contiguous()
        width, y = x.shape[-1], torch.empty_like(x)
        blocks = rows.blocks(max(_ROWS, _shape(width)["ROWS"]))
        launch(
            _forward, (len(blocks),), x, shift, scale, y, blocks.table, width, LAYER=layer, **_shape(width)
        )
        ctx.save_for_backward(x, scale)
        ctx.blocks, ctx.layer, ctx.shift_dtype = blocks, layer, shift.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (x, scale), blocks, width = ctx.saved_tensors, ctx.blocks, dy.shape[-1]
        dy, dx = dy.contiguous(), torch.empty_like(x)
        parts = torch.empty(2, len(blocks), width, dtype=torch.float32, device=x.device)
        launch(
            _backward,
            (len(blocks),),
            x,
            scale,
            dy,
            dx,
            *parts,
            blocks.table,
            width,
            LAYER=ctx.layer,
            **_shape(width),
        )
        return (
            dx,
            sum_blocks(parts[0], blocks).to(ctx.shift_dtype),
            sum_blocks(parts[1], blocks).to(scale.dtype),
            None,
            None,
        )


def modulated_norm(
    x: Tensor, shift: Tensor, scale: Tensor, rows: Rows, kind: Literal["layer", "rms"] = "layer"
) -> Tensor:
    """norm(x) (1 + scale) + shift.

    Args:
        x: (a, b, D) with a * b = rows.total.
        shift, scale: (n, D), one vector per sample of `rows`.

    Returns:
        Like x.
    """
    if not use_kernels(x, shift, scale):
        return modulated_norm_reference(x, shift, scale, rows, kind)
    return _ModulatedNorm.apply(x, shift, scale, rows, kind == "layer")
