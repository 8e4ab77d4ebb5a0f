"""learnable_query_pooling whose keys never reach memory.

An alternative where memory is short: the discriminator keeps its keys, which takes less
time (README.md).

One kernel projects the keys, normalises them and multiplies them by the query:
    k_t,h = Wk_h x_t + bk_h
    s_t,h = (norm(k_t,h) k_scale . q_h) / sqrt(K)
Then it pools as learnable_query_pooling does.

Forward: a tiled matrix product over x (T, D) and Wk (H K, D) whose epilogue holds whole
heads and leaves one number of each: 2 T D H K flops, T D e bytes of x (its other reads
come from L2) and T H fp32 scores, where a separate projection writes and reads T H K e
more. Backward: keys are projected again in chunks of rows, turned into dk and used up in
dx = dk Wk, dWk = dk^T x, dbk = sum dk: 6 T D H K flops. Memory beside the gradients: k
and dk of one chunk, 2 * 8192 * H K * e bytes = 101 MB at H K = 3072 in bf16, and dWk in
fp32. What it buys is memory, T H K e bytes a head between forward and backward (288 MB
for 46,800 tokens), and forwards without a backward. With one, projecting again takes 2 T
D H K flops, ten times as long as keys to memory and back: where memory is no matter, keep
the keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_apt.kernels.launch import interpreted, jit, launch, tl, use_kernels
from megatron_apt.kernels.learnable_query_attention import Triple, power_of_2, query_gradients
from megatron_apt.kernels.learnable_query_pooling import (
    flat,
    key_backward,
    learnable_query_pooling_reference,
    pooled,
    pooled_backward,
)
from megatron_apt.kernels.rows import Rows

_CHUNK = 8192  # rows


def projected_query_pooling_reference(
    q: Tensor, x: Tensor, wk: Tensor, bk: Tensor, k_scale: Tensor, rows: Rows
) -> Triple:
    """The definition, differentiated by autograd."""
    return learnable_query_pooling_reference(q, F.linear(x, wk, bk).unflatten(-1, q.shape), x, k_scale, rows)


@jit
def _projected_scores(
    q_at,
    x_at,
    weight_at,
    bias_at,
    scale_at,
    score_at,
    rows,
    heads,
    depth,
    by_row,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    number = tl.program_id(0) * HEADS * TILE + tl.arange(0, HEADS * TILE)
    head, column = number // TILE, number % TILE
    live = (head < heads) & (column < WIDTH)
    feature = head * WIDTH + column
    k = tl.zeros((ROWS, HEADS * TILE), tl.float32)
    for first in range(0, depth, DEPTH):
        d = first + tl.arange(0, DEPTH)
        mask = (row < rows)[:, None] & (d < depth)[None, :]
        x = tl.load(x_at + row[:, None].to(tl.int64) * by_row + d[None, :], mask=mask, other=0.0)
        weight = tl.load(
            weight_at + feature[:, None].to(tl.int64) * depth + d[None, :],
            mask=live[:, None] & (d < depth)[None, :],
            other=0.0,
        )
        if UPCAST:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        k = tl.dot(x, tl.trans(weight), k, input_precision="ieee")
    bias = tl.load(bias_at + feature, mask=live, other=0.0).to(tl.float32)
    gain = tl.load(q_at + feature, mask=live, other=0.0).to(tl.float32) * tl.load(
        scale_at + column, mask=live, other=0.0
    ).to(tl.float32)
    k += bias[None, :]
    square = tl.sum(tl.reshape(k * k, (ROWS, HEADS, TILE)), 2) / WIDTH
    score = (
        tl.sum(tl.reshape(k * gain[None, :], (ROWS, HEADS, TILE)), 2)
        * tl.rsqrt(square + 1e-6)
        * (1.0 / tl.sqrt(WIDTH * 1.0))
    )
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    tl.store(
        score_at + head[None, :].to(tl.int64) * rows + row[:, None],
        score,
        mask=(row < rows)[:, None] & (head < heads)[None, :],
    )


def _tiles(heads: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    # 128 x 256 numbers of k, two heads of 128, are what two groups of four warps can
    # hold; the products then outweigh the copies from L2. fp32 is multiplied without
    # matrix units, from registers.
    tile = power_of_2(width, 16)
    low = dtype != torch.float32
    shape = (
        {"ROWS": 128, "DEPTH": 64, "HEADS": 256 // tile}
        if low
        else {"ROWS": 64, "DEPTH": 16, "HEADS": 128 // tile}
    )
    shape["HEADS"] = max(min(shape["HEADS"], power_of_2(heads)), 1)
    return {
        "WIDTH": width,
        "TILE": tile,
        "UPCAST": interpreted(),
        "num_warps": 8,
        "num_stages": 3 if low else 2,
    } | shape


def projected_scores(q: Tensor, x: Tensor, wk: Tensor, bk: Tensor, k_scale: Tensor) -> Tensor:
    """x (T, D) -> scores (H, T) fp32."""
    (heads, width), (rows, depth) = q.shape, x.shape
    tiles, scores = (
        _tiles(heads, width, x.dtype),
        torch.empty(heads, rows, dtype=torch.float32, device=x.device),
    )
    # Heads first: the programs that run together share few tiles of x, and Wk stays in L2.
    grid = (-(-heads // tiles["HEADS"]), -(-rows // tiles["ROWS"]))
    launch(_projected_scores, grid, q, x, wk, bk, k_scale, scores, rows, heads, depth, x.stride(0), **tiles)
    return scores


class _ProjectedPooling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, x, wk, bk, k_scale, rows):
        q, wk, bk, k_scale, tokens = (
            q.contiguous(),
            wk.contiguous(),
            bk.contiguous(),
            k_scale.contiguous(),
            flat(x),
        )
        scores = projected_scores(q, tokens, wk, bk, k_scale)
        top, total, acc = pooled(scores, tokens, rows)
        ctx.save_for_backward(q, tokens, wk, bk, k_scale, scores, top)
        ctx.rows, ctx.shape = rows, x.shape
        ctx.mark_non_differentiable(top)
        return top, total, acc

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _, dtotal, dacc):
        q, tokens, wk, bk, k_scale, scores, top = ctx.saved_tensors
        dx, dscores = pooled_backward(scores, top, tokens, dtotal, dacc, ctx.rows)
        dwk, dbk, part = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (wk, bk, q))
        for first in range(0, len(tokens), _CHUNK):
            chunk = slice(first, first + _CHUNK)
            dk, more = key_backward(
                q, F.linear(tokens[chunk], wk, bk).unflatten(-1, q.shape), k_scale, dscores[:, chunk]
            )
            dk = dk.flatten(1)
            part += more
            dx[chunk].addmm_(dk, wk)
            dwk += dk.T @ tokens[chunk]
            dbk += dk.sum(0, dtype=torch.float32)
        dq, dk_scale = query_gradients(part, q, k_scale)
        return dq, dx.view(ctx.shape), dwk.to(wk.dtype), dbk.to(bk.dtype), dk_scale, None


def projected_query_pooling(
    q: Tensor, x: Tensor, wk: Tensor, bk: Tensor, k_scale: Tensor, rows: Rows
) -> Triple:
    """learnable_query_pooling(q, Wk x + bk, x, k_scale, rows) without the keys in memory.

    Args:
        q: (H, K), one learned query per head.
        x: (a, b, D) what is projected to keys and pooled, a * b = rows.total.
        wk, bk: (H K, D) and (H K,).
        k_scale: (K,) weight of the keys' RMSNorm.
        rows: samples of the tokens.

    Returns:
        max (n, H), without gradient; sum (n, H); acc (n, H, D); in at least fp32. Samples
        without tokens have max = -inf, sum = 0, acc = 0.
    """
    if not use_kernels(q, x, wk, bk, k_scale):
        return projected_query_pooling_reference(q, x, wk, bk, k_scale, rows)
    return _ProjectedPooling.apply(q, x, wk, bk, k_scale, rows)
