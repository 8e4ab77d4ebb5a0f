"""Attention of one learned query per head that pools the head's input, not values.

So no token needs a value projection. With w_t,h = e^(s_t,h - max_h) and the scores of
learnable_query_attention:
    acc_h = sum_t w_t,h x_t                          (D,)
    output_h = (Wv_h acc_h + sum_h bv_h) / sum_h     projected by the caller, once per sample
Backward:
    dx_t = sum_h w_t,h dacc_h
    ds_t,h = w_t,h (dsum_h + x_t . dacc_h)
and dk, dq, dk_scale follow from ds as in learnable_query_attention.

Letters: n samples, T tokens, H heads, K head size, D width, e bytes a number. Scores lie
as (H, T), in fp32.
                 flops                  bytes                     at T = 46,800, H K = D = 3072, H = 24, bf16
    forward      T H (4 K + 2 D)        T (H K + D) e             7.5 Gflop, 0.58 GB
    backward     T H (12 K + 4 D)       2 T (H K + D) e           16 Gflop, 1.15 GB
Attention over values moves the same bytes, and its value projection takes 2 T D H K flops
forward and 4 T D H K backward: 0.88 and 1.77 Tflop. Products over D run on matrix units,
with e^(score - max) and dacc in the type of x and sums in fp32.
"""

import math

import torch
from torch import Tensor

from megatron_apt.kernels.launch import interpreted, jit, launch, tl, use_kernels
from megatron_apt.kernels.learnable_query_attention import (
    Triple,
    inverse_rms,
    key_gain,
    merge_blocks,
    power_of_2,
    query_gradients,
    softmax_parts,
)
from megatron_apt.kernels.rms_norm import rms_norm
from megatron_apt.kernels.rows import Rows, sum_blocks

_KEYS = 256  # tokens of a program over keys
# Tokens of a block: its part is H fp32 rows of x, 6 % of the bytes of 768 bf16 rows, and
# 61 x 12 programs share one video
_POOLED = 768


def learnable_query_pooling_reference(q: Tensor, k: Tensor, x: Tensor, k_scale: Tensor, rows: Rows) -> Triple:
    """The definition, differentiated by autograd; statistics in at least fp32."""
    wide = torch.promote_types(k.dtype, torch.float32)
    scores = torch.einsum("abhk,hk->abh", rms_norm(k, k_scale).to(wide), q.to(wide) / math.sqrt(q.shape[-1]))
    if rows.sample is None:
        weights, top, total = softmax_parts(scores, rows)
        return top, total, torch.einsum("nsh,nsd->nhd", weights, x.to(wide))
    weights, top, total = softmax_parts(scores.flatten(0, 1), rows)
    spans = [slice(*span) for span in zip(rows.offsets, rows.offsets[1:], strict=False)]
    return top, total, torch.stack([weights[span].T @ x.flatten(0, 1)[span].to(wide) for span in spans])


@jit
def _scores(
    q_at,
    k_at,
    scale_at,
    score_at,
    rows,
    heads,
    by_row,
    by_head,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    head, start = tl.program_id(0), tl.program_id(1) * SIZE
    column = tl.arange(0, TILE)
    gain = key_gain(q_at, scale_at, head, WIDTH, TILE)
    for first in range(start, min(start + SIZE, rows), ROWS):
        row = first + tl.arange(0, ROWS)
        place = row[:, None].to(tl.int64) * by_row + head * by_head + column[None, :]
        k = tl.load(k_at + place, mask=(row < rows)[:, None] & (column < WIDTH)[None, :], other=0.0).to(
            tl.float32
        )
        score = tl.sum(k * gain * inverse_rms(k, WIDTH), 1)
        tl.store(score_at + head.to(tl.int64) * rows + row, score, mask=row < rows)


@jit
def _statistics(score_at, top_at, total_at, table, rows, heads, TILE: tl.constexpr):
    head, block = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(table + 3 * block + 1), tl.load(table + 3 * block + 2)
    row = start + tl.arange(0, TILE)
    score = tl.load(score_at + head.to(tl.int64) * rows + row, mask=row < stop, other=float("-inf"))
    top = tl.max(score, 0)
    tl.store(top_at + block * heads + head, top)
    tl.store(total_at + block * heads + head, tl.sum(tl.exp(score - top), 0))


@jit
def _weights(score_at, top_at, sample, row, stop, rows, heads, HEADS: tl.constexpr):
    """e^(score - max) (ROWS, HEADS) of one sample, zero outside."""
    head = tl.arange(0, HEADS)
    top = tl.load(top_at + sample.to(tl.int64) * heads + head, mask=head < heads, other=0.0)
    mask = (row < stop)[:, None] & (head < heads)[None, :]
    score = tl.load(
        score_at + head[None, :].to(tl.int64) * rows + row[:, None], mask=mask, other=float("-inf")
    )
    return tl.exp(score - top[None, :])


@jit
def _pool(
    score_at,
    top_at,
    x_at,
    part_at,
    table,
    rows,
    heads,
    width,
    by_row,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    block = tl.program_id(1)
    sample, start, stop = (
        tl.load(table + 3 * block),
        tl.load(table + 3 * block + 1),
        tl.load(table + 3 * block + 2),
    )
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    acc = tl.zeros((TILE, HEADS), tl.float32)
    for first in range(start, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < stop)[:, None] & (column < width)[None, :]
        x = tl.load(x_at + row[:, None].to(tl.int64) * by_row + column[None, :], mask=mask, other=0.0)
        weight = _weights(score_at, top_at, sample, row, stop, rows, heads, HEADS).to(x_at.dtype.element_ty)
        if UPCAST:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        acc = tl.dot(tl.trans(x), weight, acc, input_precision="ieee")
    head = tl.arange(0, HEADS)
    place = (block.to(tl.int64) * heads + head[None, :]) * width + column[:, None]
    tl.store(part_at + place, acc, mask=(head < heads)[None, :] & (column < width)[:, None])


@jit
def _backward_x(
    score_at,
    top_at,
    x_at,
    dtotal_at,
    dacc_at,
    dx_at,
    dscore_at,
    table,
    rows,
    heads,
    width,
    by_row,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    block = tl.program_id(0)
    sample, start, stop = (
        tl.load(table + 3 * block),
        tl.load(table + 3 * block + 1),
        tl.load(table + 3 * block + 2),
    )
    row, head = start + tl.arange(0, ROWS), tl.arange(0, HEADS)
    weight = _weights(score_at, top_at, sample, row, stop, rows, heads, HEADS)
    rounded = weight.to(x_at.dtype.element_ty)
    if UPCAST:
        rounded = rounded.to(tl.float32)
    product = tl.zeros((ROWS, HEADS), tl.float32)
    for first in range(0, width, TILE):
        column = first + tl.arange(0, TILE)
        mask = (row < stop)[:, None] & (column < width)[None, :]
        x = tl.load(x_at + row[:, None].to(tl.int64) * by_row + column[None, :], mask=mask, other=0.0)
        place = (sample.to(tl.int64) * heads + head[:, None]) * width + column[None, :]
        dacc = tl.load(dacc_at + place, mask=(head < heads)[:, None] & (column < width)[None, :], other=0.0)
        if UPCAST:
            x, dacc = x.to(tl.float32), dacc.to(tl.float32)
        product = tl.dot(x, tl.trans(dacc), product, input_precision="ieee")
        dx = tl.dot(rounded, dacc, input_precision="ieee")
        tl.store(
            dx_at + row[:, None].to(tl.int64) * width + column[None, :],
            dx.to(dx_at.dtype.element_ty),
            mask=mask,
        )
    dtotal = tl.load(dtotal_at + sample.to(tl.int64) * heads + head, mask=head < heads, other=0.0)
    mask = (row < stop)[:, None] & (head < heads)[None, :]
    tl.store(
        dscore_at + head[None, :].to(tl.int64) * rows + row[:, None],
        weight * (dtotal[None, :] + product),
        mask=mask,
    )


@jit
def _backward_k(
    q_at,
    k_at,
    scale_at,
    dscore_at,
    dk_at,
    part_at,
    rows,
    by_score,
    heads,
    by_row,
    by_head,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    head, block = tl.program_id(0), tl.program_id(1)
    start, column = block * SIZE, tl.arange(0, TILE)
    gain = key_gain(q_at, scale_at, head, WIDTH, TILE)
    part = tl.zeros((ROWS, TILE), tl.float32)
    for first in range(start, min(start + SIZE, rows), ROWS):
        row = (first + tl.arange(0, ROWS))[:, None]
        mask = (row < rows) & (column < WIDTH)[None, :]
        k = tl.load(
            k_at + row.to(tl.int64) * by_row + head * by_head + column[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        dscore = tl.load(dscore_at + head.to(tl.int64) * by_score + row, mask=row < rows, other=0.0)
        factor = inverse_rms(k, WIDTH)
        n = k * factor
        dk = dscore * factor * (gain - n * (tl.sum(n * gain, 1, keep_dims=True) / WIDTH))
        part += dscore * n
        tl.store(
            dk_at + (row.to(tl.int64) * heads + head) * WIDTH + column[None, :],
            dk.to(dk_at.dtype.element_ty),
            mask=mask,
        )
    tl.store(
        part_at + (block.to(tl.int64) * heads + head) * WIDTH + column, tl.sum(part, 0), mask=column < WIDTH
    )


def _key_shape(width: int) -> dict[str, int]:
    # 32 bytes of bf16 k a thread, in two loads; registers leave room for eight blocks or more.
    tile = power_of_2(width)
    return {
        "WIDTH": width,
        "TILE": tile,
        "ROWS": min(max(2048 // tile, 1), _KEYS),
        "SIZE": _KEYS,
        "num_warps": 4,
    }


def _tiles(heads: int, width: int, dtype: torch.dtype, backward: bool = False) -> dict[str, int]:
    # Heads are the narrow side of the products. Forward: every slice of columns reads the
    # scores again, from L2, so slices are wide. Backward: each program reads H rows of
    # dacc from L2 beside ROWS of x, and 64 columns leave registers for three programs.
    # Both keep 48 kB or more of x on its way to every multiprocessor. fp32 is multiplied
    # without matrix units, from registers: fewer rows.
    if dtype == torch.float32:
        rows, tile, warps, stages = (32, 64, 8, 2) if backward else (16, 128, 8, 2)
    else:
        rows, tile, warps, stages = (64, 64, 4, 3) if backward else (64, 256, 8, 2)
    tile = min(power_of_2(width, 16), tile)
    return {
        "HEADS": power_of_2(heads, 16),
        "TILE": tile,
        "ROWS": rows,
        "UPCAST": interpreted(),
        "num_warps": warps,
        "num_stages": stages,
    }


def flat(x: Tensor) -> Tensor:
    """(a, b, ...) -> (a b, ...) whose last dimension has stride 1; a copy only if it must be."""
    x = x.flatten(0, 1)
    return x if x.stride(-1) == 1 else x.contiguous()


def key_scores(q: Tensor, k: Tensor, k_scale: Tensor) -> Tensor:
    """k (T, H, K) -> scores (H, T) fp32."""
    (heads, width), rows = q.shape, len(k)
    scores = torch.empty(heads, rows, dtype=torch.float32, device=k.device)
    grid = (heads, -(-rows // _KEYS))
    launch(_scores, grid, q, k, k_scale, scores, rows, heads, k.stride(0), k.stride(1), **_key_shape(width))
    return scores


def key_backward(q: Tensor, k: Tensor, k_scale: Tensor, dscores: Tensor) -> tuple[Tensor, Tensor]:
    """k (T, H, K) and dscores (H, T), which may be a slice of columns -> dk and p (H, K)."""
    (heads, width), rows = q.shape, len(k)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    grid = (heads, -(-rows // _KEYS))
    part = torch.empty(grid[1], heads, width, dtype=torch.float32, device=k.device)
    arguments = (q, k, k_scale, dscores, dk, part, rows, dscores.stride(0), heads, k.stride(0), k.stride(1))
    launch(_backward_k, grid, *arguments, **_key_shape(width))
    return dk, part.sum(0)


def pooled(scores: Tensor, x: Tensor, rows: Rows) -> Triple:
    """Scores (H, T) and x (T, D) -> max, sum, acc."""
    (heads, total), width, blocks = scores.shape, x.shape[-1], rows.blocks(_POOLED)
    tops, sums = (scores.new_empty(len(blocks), heads) for _ in range(2))
    launch(
        _statistics,
        (heads, len(blocks)),
        scores,
        tops,
        sums,
        blocks.table,
        total,
        heads,
        TILE=power_of_2(_POOLED),
    )
    top, summed, _ = merge_blocks(tops, sums, None, blocks)
    tiles, parts = _tiles(heads, width, x.dtype), scores.new_empty(len(blocks), heads, width)
    grid = (-(-width // tiles["TILE"]), len(blocks))
    launch(_pool, grid, scores, top, x, parts, blocks.table, total, heads, width, x.stride(0), **tiles)
    return top, summed, sum_blocks(parts, blocks)


def pooled_backward(
    scores: Tensor, top: Tensor, x: Tensor, dtotal: Tensor, dacc: Tensor, rows: Rows
) -> tuple[Tensor, Tensor]:
    """-> dx (T, D) and dscores (H, T)."""
    (heads, total), width = scores.shape, x.shape[-1]
    tiles = _tiles(heads, width, x.dtype, backward=True)
    blocks = rows.blocks(tiles["ROWS"])
    dx, dscores = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(scores)
    arguments = (
        scores,
        top,
        x,
        dtotal.contiguous(),
        dacc.to(x.dtype).contiguous(),
        dx,
        dscores,
        blocks.table,
        total,
        heads,
        width,
        x.stride(0),
    )
    launch(_backward_x, (len(blocks),), *arguments, **tiles)
    return dx, dscores


class _Pooling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, x, k_scale, rows):
        q, k_scale, keys, tokens = q.contiguous(), k_scale.contiguous(), flat(k), flat(x)
        scores = key_scores(q, keys, k_scale)
        top, total, acc = pooled(scores, tokens, rows)
        ctx.save_for_backward(q, keys, tokens, k_scale, scores, top)
        ctx.rows, ctx.shapes = rows, (k.shape, x.shape)
        ctx.mark_non_differentiable(top)
        return top, total, acc

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _, dtotal, dacc):
        q, keys, tokens, k_scale, scores, top = ctx.saved_tensors
        dx, dscores = pooled_backward(scores, top, tokens, dtotal, dacc, ctx.rows)
        dk, part = key_backward(q, keys, k_scale, dscores)
        dq, dk_scale = query_gradients(part, q, k_scale)
        return dq, dk.view(ctx.shapes[0]), dx.view(ctx.shapes[1]), dk_scale, None


def learnable_query_pooling(q: Tensor, k: Tensor, x: Tensor, k_scale: Tensor, rows: Rows) -> Triple:
    """Sums of x over each sample's tokens, weighted but not yet divided by the weights' sum.

    Args:
        q: (H, K), one learned query per head.
        k: (a, b, H, K) keys before their norm, a * b = rows.total.
        x: (a, b, D) what is pooled.
        k_scale: (K,) weight of the keys' RMSNorm.
        rows: samples of the tokens.

    Returns:
        max (n, H), without gradient; sum (n, H); acc (n, H, D); in at least fp32. Samples
        without tokens have max = -inf, sum = 0, acc = 0.
    """
    if not use_kernels(q, k, x, k_scale):
        return learnable_query_pooling_reference(q, k, x, k_scale, rows)
    return _Pooling.apply(q, k, x, k_scale, rows)
