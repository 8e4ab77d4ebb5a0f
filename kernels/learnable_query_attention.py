"""Attention of learned queries over the tokens of each sample.

An alternative to learnable_query_pooling, which the discriminator uses: it takes values
and so their projection, twice as many products (README.md). Pooling shares its softmax,
its norm of keys and its merging of partial results.

There are few queries per head, mostly one, however many tokens. For sample i and head h,
with n_t = k_t / sqrt(mean(k_t^2) + eps), over the sample's tokens t:
    s_t    = (q_h . n_t k_scale) / sqrt(K)     scores
    max    = max_t s_t
    sum    = sum_t e^(s_t - max)
    acc    = sum_t e^(s_t - max) v_t
    output = acc / sum
The triple (max, sum, acc) of any partition of the tokens merges exactly (log-sum-exp): so
do the blocks of a kernel, and context-parallel ranks.

Backward, with w_t = e^(s_t - max), g = q k_scale / sqrt(K) and max a constant (it cancels
in acc / sum):
    dv_t     = w_t dacc
    ds_t     = w_t (dsum + dacc . v_t)
    dk_t     = (ds_t g - n_t ds_t s_t / K) / rms_t
    p_h      = sum_t ds_t n_t
    dq_h     = p_h k_scale / sqrt(K)
    dk_scale = sum_h p_h q_h / sqrt(K)
since mean(ds g n) = ds s / K: the norm costs the backward no reduction of its own.

Letters: n samples, T tokens, H heads, K head size, Q queries per head. Bytes at e bytes a
number: forward 2 T H K e (kv in), backward 4 T H K e (kv in, dkv out); the scores are
computed again rather than kept. Flops: 8 T H Q K and 20 T H Q K, 2 or 3 a byte of bf16:
no work for matrix units. A program walks over a block of one sample's tokens for one
head. Every row of its tile runs its own online softmax, so that nothing crosses warps in
the loop; the rows meet once, behind it, and the blocks in a second kernel in a fixed
order.
"""

import math

import torch
from torch import Tensor

from megatron_apt.kernels.launch import jit, launch, tl, use_kernels
from megatron_apt.kernels.rms_norm import rms_norm
from megatron_apt.kernels.rows import Blocks, Rows

Triple = tuple[Tensor, Tensor, Tensor]  # max, sum, acc

# Tokens: parts are 0.4 % of the bytes of kv, and one video of 46,800 tokens and 24 heads
# makes 4,392 programs
_BLOCK = 256


def learnable_query_attention_reference(q: Tensor, kv: Tensor, k_scale: Tensor, rows: Rows) -> Triple:
    """The definition, differentiated by autograd; statistics in at least fp32."""
    k, v = (kv if rows.sample is None else kv.flatten(0, 1)[: rows.total]).unbind(-2)
    k, wide = rms_norm(k, k_scale), torch.promote_types(kv.dtype, torch.float32)
    parts = [_attend(one, k.to(wide), v.to(wide), rows) for one in q.to(wide).view(-1, *q.shape[-2:])]
    if q.dim() == 2:
        return parts[0]
    top, total, acc = (torch.stack(part, 1) for part in zip(*parts, strict=True))
    return top, total, acc


def _attend(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Triple:
    scores = torch.einsum("...hk,hk->...h", k, q / math.sqrt(q.shape[-1]))
    weights, top, total = softmax_parts(scores, rows)
    if rows.sample is None:
        return top, total, torch.einsum("nsh,nshk->nhk", weights, v)
    acc = weights.new_zeros(rows.samples, *v.shape[1:]).index_add(0, rows.sample, weights.unsqueeze(-1) * v)
    return top, total, acc


def softmax_parts(scores: Tensor, rows: Rows) -> Triple:
    """Scores (n, s, H), or packed (T, H) -> e^(score - max), max (n, H) without gradient, sum (n, H)."""
    if rows.sample is None:
        top = scores.detach().amax(1)
        weights = torch.exp(scores - top[:, None])
        return weights, top, weights.sum(1)
    top = scores.new_full((rows.samples, scores.shape[-1]), -torch.inf)
    top = top.scatter_reduce(0, rows.sample[:, None].expand_as(scores), scores.detach(), "amax")
    weights = torch.exp(scores - top.index_select(0, rows.sample))
    return weights, top, weights.new_zeros(rows.samples, weights.shape[-1]).index_add(0, rows.sample, weights)


def merge(parts: list[Triple]) -> Triple:
    """The triple of all tokens, from those of the parts of any partition."""
    tops, totals, accs = (torch.stack(kind) for kind in zip(*parts, strict=True))
    top = tops.amax(0)
    # No tokens at all: 0, not e^(inf - inf)
    share = torch.exp(tops - top.masked_fill(top == -torch.inf, 0.0))
    return top, (totals * share).sum(0), (accs * share.unsqueeze(-1)).sum(0)


@jit
def key_gain(q_at, scale_at, place, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """g = q k_scale / sqrt(K) (1, TILE) of the query at row `place` of q, zero outside."""
    column = tl.arange(0, TILE)
    q = tl.load(q_at + place * WIDTH + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    scale = tl.load(scale_at + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    return (q * scale * (1.0 / tl.sqrt(WIDTH * 1.0)))[None, :]


@jit
def inverse_rms(k, WIDTH: tl.constexpr):
    return tl.rsqrt(tl.sum(k * k, 1, keep_dims=True) / WIDTH + 1e-6)


# Queries are tuples of two-dimensional tiles: a dimension for them would make the
# compiler lay tiles out across warps and move k and v through shared memory in every
# step. Tuples grow by `+`, as kernels know no starred expressions.


# ruff: noqa: RUF005
@jit
def _forward(
    q_at,
    kv_at,
    scale_at,
    top_at,
    total_at,
    acc_at,
    table,
    heads,
    by_row,
    by_head,
    to_v,
    QUERIES: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    head, block = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(table + 3 * block + 1), tl.load(table + 3 * block + 2)
    column = tl.arange(0, TILE)
    gains, tops, totals, accs = (), (), (), ()
    for j in tl.static_range(QUERIES):
        gains = gains + (key_gain(q_at, scale_at, j * heads + head, WIDTH, TILE),)
        tops = tops + (tl.full((ROWS, 1), float("-inf"), tl.float32),)
        totals = totals + (tl.zeros((ROWS, 1), tl.float32),)
        accs = accs + (tl.zeros((ROWS, TILE), tl.float32),)
    for first in range(start, stop, ROWS):
        row = (first + tl.arange(0, ROWS))[:, None]
        mask = (row < stop) & (column < WIDTH)[None, :]
        place = row.to(tl.int64) * by_row + head * by_head + column[None, :]
        k = tl.load(kv_at + place, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(kv_at + place + to_v, mask=mask, other=0.0).to(tl.float32)
        factor = inverse_rms(k, WIDTH)
        new_tops, new_totals, new_accs = (), (), ()
        for j in tl.static_range(QUERIES):
            score = tl.where(row < stop, tl.sum(k * gains[j], 1, keep_dims=True) * factor, float("-inf"))
            top = tl.maximum(tops[j], score)
            # Rows that have seen no token: e^(-inf), not e^(inf - inf)
            shift = tl.where(top == float("-inf"), 0.0, top)
            fade, weight = tl.exp(tops[j] - shift), tl.exp(score - shift)
            new_tops = new_tops + (top,)
            new_totals = new_totals + (totals[j] * fade + weight,)
            new_accs = new_accs + (accs[j] * fade + weight * v,)
        tops, totals, accs = new_tops, new_totals, new_accs
    for j in tl.static_range(QUERIES):
        top = tl.max(tops[j])
        share = tl.exp(tops[j] - top)
        part = (block.to(tl.int64) * QUERIES + j) * heads + head
        tl.store(top_at + part, top)
        tl.store(total_at + part, tl.sum(totals[j] * share))
        tl.store(acc_at + part * WIDTH + column, tl.sum(accs[j] * share, 0), mask=column < WIDTH)


@jit
def _merge_blocks(
    tops,
    totals,
    accs,
    first,
    top_at,
    total_at,
    acc_at,
    groups,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    sample, group = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(first + sample), tl.load(first + sample + 1)
    highest = tl.full((BLOCKS,), float("-inf"), tl.float32)
    for b in range(begin, end, BLOCKS):
        block = b + tl.arange(0, BLOCKS)
        highest = tl.maximum(
            highest,
            tl.load(tops + block.to(tl.int64) * groups + group, mask=block < end, other=float("-inf")),
        )
    top = tl.max(highest, 0)
    total = tl.zeros((BLOCKS,), tl.float32)
    column = tl.arange(0, TILE)
    acc = tl.zeros((TILE,), tl.float32)
    for b in range(begin, end, BLOCKS):
        block = b + tl.arange(0, BLOCKS)
        place = block.to(tl.int64) * groups + group
        share = tl.exp(tl.load(tops + place, mask=block < end, other=float("-inf")) - top)
        total += share * tl.load(totals + place, mask=block < end, other=0.0)
        if accs is not None:
            mask = (block < end)[:, None] & (column < WIDTH)[None, :]
            acc += tl.sum(
                share[:, None]
                * tl.load(accs + place[:, None] * WIDTH + column[None, :], mask=mask, other=0.0),
                0,
            )
    place = sample.to(tl.int64) * groups + group
    tl.store(top_at + place, top)
    tl.store(total_at + place, tl.sum(total, 0))
    if accs is not None:
        tl.store(acc_at + place * WIDTH + column, acc, mask=column < WIDTH)


def merge_blocks(
    top: Tensor, total: Tensor, acc: Tensor | None, blocks: Blocks
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Triples of the blocks, (B, ...) and acc (B, ..., K) -> of the samples (n, ...), in
    the order of the blocks.
    """
    groups, width = math.prod(top.shape[1:]), acc.shape[-1] if acc is not None else 1
    samples = len(blocks.first) - 1
    out = (
        top.new_empty(samples, *top.shape[1:]),
        total.new_empty(samples, *total.shape[1:]),
        None if acc is None else acc.new_empty(samples, *acc.shape[1:]),
    )
    grid = (samples, groups)
    launch(
        _merge_blocks,
        grid,
        top,
        total,
        acc,
        blocks.first,
        *out,
        groups,
        WIDTH=width,
        TILE=power_of_2(width),
        BLOCKS=32,
    )
    return out


@jit
def _backward(
    q_at,
    kv_at,
    scale_at,
    top_at,
    dtotal_at,
    dacc_at,
    dkv_at,
    part_at,
    table,
    heads,
    by_row,
    by_head,
    to_v,
    QUERIES: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    head, block = tl.program_id(0), tl.program_id(1)
    sample, start, stop = (
        tl.load(table + 3 * block),
        tl.load(table + 3 * block + 1),
        tl.load(table + 3 * block + 2),
    )
    column = tl.arange(0, TILE)
    gains, tops, dtotals, daccs, parts = (), (), (), (), ()
    for j in tl.static_range(QUERIES):
        group = (sample.to(tl.int64) * QUERIES + j) * heads + head
        gains = gains + (key_gain(q_at, scale_at, j * heads + head, WIDTH, TILE),)
        tops = tops + (tl.load(top_at + group),)
        dtotals = dtotals + (tl.load(dtotal_at + group),)
        daccs = daccs + (tl.load(dacc_at + group * WIDTH + column, mask=column < WIDTH, other=0.0)[None, :],)
        parts = parts + (tl.zeros((ROWS, TILE), tl.float32),)
    for first in range(start, stop, ROWS):
        row = (first + tl.arange(0, ROWS))[:, None]
        mask = (row < stop) & (column < WIDTH)[None, :]
        place = row.to(tl.int64) * by_row + head * by_head + column[None, :]
        k = tl.load(kv_at + place, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(kv_at + place + to_v, mask=mask, other=0.0).to(tl.float32)
        factor = inverse_rms(k, WIDTH)
        n = k * factor
        dv, dk = tl.zeros((ROWS, TILE), tl.float32), tl.zeros((ROWS, TILE), tl.float32)
        new_parts = ()
        for j in tl.static_range(QUERIES):
            score = tl.sum(n * gains[j], 1, keep_dims=True)
            weight = tl.where(row < stop, tl.exp(score - tops[j]), 0.0)
            dscore = weight * (dtotals[j] + tl.sum(v * daccs[j], 1, keep_dims=True))
            dv += weight * daccs[j]
            dk += dscore * (gains[j] - n * (score / WIDTH))
            new_parts = new_parts + (parts[j] + dscore * n,)
        parts = new_parts
        place = (row.to(tl.int64) * heads + head) * 2 * WIDTH + column[None, :]
        tl.store(dkv_at + place, (dk * factor).to(dkv_at.dtype.element_ty), mask=mask)
        tl.store(dkv_at + place + WIDTH, dv.to(dkv_at.dtype.element_ty), mask=mask)
    for j in tl.static_range(QUERIES):
        group = (block.to(tl.int64) * QUERIES + j) * heads + head
        tl.store(part_at + group * WIDTH + column, tl.sum(parts[j], 0), mask=column < WIDTH)


def power_of_2(number: int, least: int = 1) -> int:
    return max(1 << (number - 1).bit_length(), least)


def _shape(queries: int, width: int) -> dict[str, int]:
    # 16 numbers a thread of k and of v: two 16-byte loads of each, and registers for
    # several blocks of four warps.
    tile = power_of_2(width)
    return {
        "QUERIES": queries,
        "WIDTH": width,
        "TILE": tile,
        "ROWS": min(max(2048 // tile, 1), _BLOCK),
        "num_warps": 4,
    }


def query_gradients(part: Tensor, q: Tensor, k_scale: Tensor) -> tuple[Tensor, Tensor]:
    """p (Q, H, K) -> dq, dk_scale."""
    part = part * q.shape[-1] ** -0.5
    return (part * k_scale).view_as(q).to(q.dtype), (part.view_as(q) * q).flatten(0, -2).sum(0).to(
        k_scale.dtype
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, k_scale, rows):
        q, k_scale, flat = q.contiguous(), k_scale.contiguous(), kv.flatten(0, 1)
        flat = flat if flat.stride(-1) == 1 else flat.contiguous()
        blocks, (heads, width) = rows.blocks(_BLOCK), q.shape[-2:]
        shape = _shape(q.numel() // (heads * width), width)
        top, total = (
            torch.empty(len(blocks), *q.shape[:-1], dtype=torch.float32, device=q.device) for _ in range(2)
        )
        acc = torch.empty(len(blocks), *q.shape, dtype=torch.float32, device=q.device)
        # Heads first: programs that run together read whole rows of kv.
        launch(
            _forward,
            (heads, len(blocks)),
            q,
            flat,
            k_scale,
            top,
            total,
            acc,
            blocks.table,
            heads,
            *flat.stride()[:3],
            **shape,
        )
        top, total, acc = merge_blocks(top, total, acc, blocks)
        ctx.save_for_backward(q, flat, k_scale, top)
        ctx.rows, ctx.shape, ctx.kv_shape = rows, shape, kv.shape
        ctx.mark_non_differentiable(top)
        return top, total, acc

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _, dtotal, dacc):
        (q, flat, k_scale, top), rows, heads = ctx.saved_tensors, ctx.rows, ctx.saved_tensors[0].shape[-2]
        blocks, dkv = rows.blocks(_BLOCK), torch.empty(flat.shape, dtype=flat.dtype, device=flat.device)
        dkv[rows.total :].zero_()
        part = torch.empty(len(blocks), *q.shape, dtype=torch.float32, device=q.device)
        arguments = (
            q,
            flat,
            k_scale,
            top,
            dtotal.contiguous(),
            dacc.contiguous(),
            dkv,
            part,
            blocks.table,
            heads,
            *flat.stride()[:3],
        )
        launch(_backward, (heads, len(blocks)), *arguments, **ctx.shape)
        dq, dk_scale = query_gradients(part.sum(0), q, k_scale)
        return dq, dkv.view(ctx.kv_shape), dk_scale, None


def learnable_query_attention(q: Tensor, kv: Tensor, k_scale: Tensor, rows: Rows) -> Triple:
    """Partial softmax attention of q over the tokens at hand.

    Args:
        q: (H, K), one learned query per head, or (Q, H, K).
        kv: (a, b, H, 2, K) keys and values; in the packed form with a * b >= rows.total,
            the rest being padding.
        k_scale: (K,) weight of the keys' RMSNorm.
        rows: samples of the tokens.

    Returns:
        max (n, H) or (n, Q, H), without gradient; sum likewise; acc (n, H, K) or (n, Q,
        H, K); in at least fp32. Samples without tokens have max = -inf, sum = 0, acc = 0.
    """
    if not use_kernels(q, kv, k_scale):
        return learnable_query_attention_reference(q, kv, k_scale, rows)
    return _Attention.apply(q, kv, k_scale, rows)
