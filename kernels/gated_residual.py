"""Residual connection with AdaLN's gate: y = x + gate h, one gate vector per sample.

    dx = dy,   dh = gate dy,   dgate = sum over the sample's rows of dy h
Bytes at e bytes a number: forward 3 R D e (x, h in, y out), backward 3 R D e (dy, h in,
dh out; dx is dy itself).
"""

import torch
from torch import Tensor

from megatron_apt.kernels.launch import jit, launch, tl, use_kernels
from megatron_apt.kernels.rows import Rows, sum_blocks

_ROWS = 32


def gated_residual_reference(x: Tensor, gate: Tensor, h: Tensor, rows: Rows) -> Tensor:
    """The definition, differentiated by autograd."""
    return torch.addcmul(x, rows.expand(gate), h)


@jit
def _forward(x_at, gate_at, h_at, y_at, table, width, ROWS: tl.constexpr, TILE: tl.constexpr):
    entry = table + 3 * tl.program_id(0)
    sample, start, stop = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    gate = tl.load(gate_at + sample.to(tl.int64) * width + column, mask=column < width, other=0.0).to(
        tl.float32
    )
    for first in range(start, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < stop)[:, None] & (column < width)[None, :]
        place = row[:, None].to(tl.int64) * width + column[None, :]
        x = tl.load(x_at + place, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(h_at + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_at + place, (x + gate[None, :] * h).to(y_at.dtype.element_ty), mask=mask)


@jit
def _backward(gate_at, h_at, dy_at, dh_at, dgate_at, table, width, ROWS: tl.constexpr, TILE: tl.constexpr):
    entry = table + 3 * tl.program_id(0)
    sample, start, stop = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    gate = tl.load(gate_at + sample.to(tl.int64) * width + column, mask=column < width, other=0.0).to(
        tl.float32
    )
    dgate = tl.zeros((ROWS, TILE), tl.float32)
    for first in range(start, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < stop)[:, None] & (column < width)[None, :]
        place = row[:, None].to(tl.int64) * width + column[None, :]
        dy = tl.load(dy_at + place, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(h_at + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(dh_at + place, (gate[None, :] * dy).to(dh_at.dtype.element_ty), mask=mask)
        dgate += dy * h
    tl.store(dgate_at + tl.program_id(0).to(tl.int64) * width + column, tl.sum(dgate, 0), mask=column < width)


def _shape(width: int) -> dict[str, int]:
    tile = min(1 << (width - 1).bit_length(), 1024)  # 16 bytes of bf16 a thread
    return {"ROWS": 4096 // tile, "TILE": tile, "num_warps": 4}


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, h, rows):
        x, gate, h = x.contiguous(), gate.contiguous(), h.contiguous()
        width, y = x.shape[-1], torch.empty_like(x)
        shape = _shape(width)
        blocks = rows.blocks(max(_ROWS, shape["ROWS"]))
        grid = (len(blocks), -(-width // shape["TILE"]))
        launch(_forward, grid, x, gate, h, y, blocks.table, width, **shape)
        ctx.save_for_backward(gate, h)
        ctx.blocks, ctx.grid, ctx.shape = blocks, grid, shape
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (gate, h), blocks, width = ctx.saved_tensors, ctx.blocks, dy.shape[-1]
        dy, dh = dy.contiguous(), torch.empty_like(h)
        parts = torch.empty(len(blocks), width, dtype=torch.float32, device=h.device)
        launch(_backward, ctx.grid, gate, h, dy, dh, parts, blocks.table, width, **ctx.shape)
        return dy, sum_blocks(parts, blocks).to(gate.dtype), dh, None


def gated_residual(x: Tensor, gate: Tensor, h: Tensor, rows: Rows) -> Tensor:
    """x + gate h.

    Args:
        x, h: (a, b, D) with a * b = rows.total.
        gate: (n, D), one vector per sample of `rows`.

    Returns:
        Like x.
    """
    if not use_kernels(x, gate, h):
        return gated_residual_reference(x, gate, h, rows)
    return _GatedResidual.apply(x, gate, h, rows)
