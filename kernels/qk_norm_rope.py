"""Queries, keys and values of joint attention out of both streams' projections: RMSNorm
of q and k over each head, rotation of the visual ones by their place in the video, and
text and visual tokens side by side, as the attention or its exchange between ranks takes
them.

With x the K numbers of a head, w the learned scale, n = x r, r = 1 / sqrt(mean(x^2) +
eps) and e^{i phase} of consecutive pairs as complex numbers:
    y = (n w) e^{i phase}        (text: phase 0; v: y = x)
    h = dy e^{-i phase},   dx = r (h w - n mean(h w n)),   dw = sum over tokens and heads of h n

Letters: n samples, l tokens of one of them, T tokens of all, H local heads, K head size,
G ranks that exchange heads. Statistics, rotation and sums in fp32. Bytes at e bytes a
number, T tokens of both streams: forward 6 T H K e (q, k, v in and out), backward 8 T H K
e (their gradients, q and k in, the projections' gradients out), and the phases, 4 K for
each visual token. Only the projections are kept; r is computed again. A program takes a
few tokens of one sample: it loads their phases once, walks over heads, and keeps the sums
for dw in registers; the sums of programs are added in a fixed order.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from megatron_apt.kernels.launch import jit, launch, tl, use_kernels
from megatron_apt.kernels.rms_norm import rms_norm

Form = Literal["apart", "keys_values", "by_rank"]

_NUMBERS = 1024  # of a tile: one load of 16 bytes of bf16 a thread for each of q, k and v
_PROGRAMS = 2048  # wanted of a launch: a few times what a GPU holds at once; more would only load more phases


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotates consecutive pairs of the last dimension of x (a, b, ..., K) by unit complex
    numbers (1 or a, b, ..., K / 2).
    """
    pairs = torch.view_as_complex(
        x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).contiguous()
    )
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


def joint_qkv_reference(
    text: Tensor,
    visual: Tensor,
    text_weight: Tensor | None,
    visual_weight: Tensor | None,
    rotary: Tensor | None,
    tokens: tuple[int, int] | None = None,
    form: Form = "apart",
    ranks: int = 1,
) -> tuple[Tensor, ...]:
    """The definition, differentiated by autograd (and rms_norm)."""
    (text_qk, text_v), (visual_qk, visual_v) = text.split((2, 1), dim=-2), visual.split((2, 1), dim=-2)
    text_qk = text_qk if text_weight is None else rms_norm(text_qk, text_weight)
    visual_qk = visual_qk if visual_weight is None else rms_norm(visual_qk, visual_weight)
    if rotary is not None:
        visual_qk = rotate(visual_qk, rotary)
    if tokens is None:
        qk, v = torch.cat((text_qk, visual_qk), dim=1), torch.cat((text_v, visual_v), dim=1)
        return *qk.unbind(3), v.squeeze(3)
    streams = (
        torch.cat((text_qk, text_v), dim=3).flatten(0, 1),
        torch.cat((visual_qk, visual_v), dim=3).flatten(0, 1),
    )
    qkv = torch.cat([x[:length] if length < len(x) else x for x, length in zip(streams, tokens, strict=True)])
    if form == "keys_values":
        return qkv[:, :, 0], qkv[:, :, 1:]
    return (qkv.unflatten(1, (ranks, -1)).transpose(0, 1),) if form == "by_rank" else qkv.unbind(2)


@jit
def _phases(table, row, mask, column, K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Cosines and sines (ROWS, TILE / 2) of these rows of a table of K / 2 pairs."""
    pairs = tl.load(table + row[:, None].to(tl.int64) * K + column[None, :], mask=mask, other=0.0)
    return tl.split(tl.reshape(pairs, (ROWS, TILE // 2, 2)))


@jit
def _rotated(y, cos, sin, ROWS: tl.constexpr, TILE: tl.constexpr):
    even, odd = tl.split(tl.reshape(y, (ROWS, TILE // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, TILE))


@jit
def _forward(
    x_at, weight_at, table_at, q_at, k_at, v_at,
    q_sample, q_token, q_group, q_head,
    k_sample, k_token, k_group, k_head,
    v_sample, v_token, v_group, v_head,
    length, period, heads, group, each,
    NORM: tl.constexpr, ROTARY: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, TILE)
    mask = (token < length)[:, None] & (column < K)[None, :]
    row = sample * length + token
    if ROTARY:
        cos, sin = _phases(table_at, row % period, mask, column, K, ROWS, TILE)
    if NORM:
        q_weight = tl.load(weight_at + column, mask=column < K, other=0.0).to(tl.float32)
        k_weight = tl.load(weight_at + K + column, mask=column < K, other=0.0).to(tl.float32)
    x_place = row[:, None] * heads * (3 * K) + column[None, :]
    token = token[:, None].to(tl.int64)
    q_at += sample * q_sample + token * q_token + column[None, :]
    k_at += sample * k_sample + token * k_token + column[None, :]
    v_at += sample * v_sample + token * v_token + column[None, :]
    first = tl.program_id(1) * each
    for head in range(first, tl.minimum(first + each, heads)):
        x = x_at + x_place + head * (3 * K)
        q = tl.load(x, mask=mask, other=0.0).to(tl.float32)
        k = tl.load(x + K, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(x + 2 * K, mask=mask, other=0.0)
        if NORM:
            q = q * tl.rsqrt(tl.sum(q * q, 1, keep_dims=True) / K + 1e-6) * q_weight[None, :]
            k = k * tl.rsqrt(tl.sum(k * k, 1, keep_dims=True) / K + 1e-6) * k_weight[None, :]
        if ROTARY:
            q = _rotated(q, cos, sin, ROWS, TILE)
            k = _rotated(k, cos, sin, ROWS, TILE)
        far, near = tl.cast(head // group, tl.int64), tl.cast(head % group, tl.int64)
        tl.store(q_at + far * q_group + near * q_head, q.to(q_at.dtype.element_ty), mask=mask)
        tl.store(k_at + far * k_group + near * k_head, k.to(k_at.dtype.element_ty), mask=mask)
        tl.store(v_at + far * v_group + near * v_head, v, mask=mask)


@jit
def _norm_backward(x, weight, h, K: tl.constexpr):
    """dx, and dw of each row, from the gradient before the rotation."""
    factor = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / K + 1e-6)
    n = x * factor
    scaled = h * weight[None, :]
    return (scaled - n * (tl.sum(scaled * n, 1, keep_dims=True) / K)) * factor, h * n


@jit
def _backward(
    x_at, weight_at, table_at, dq_at, dk_at, dv_at, dx_at, dweight_at,
    q_sample, q_token, q_group, q_head,
    k_sample, k_token, k_group, k_head,
    v_sample, v_token, v_group, v_head,
    length, period, heads, group, each,
    NORM: tl.constexpr, ROTARY: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, TILE)
    mask = (token < length)[:, None] & (column < K)[None, :]
    row = sample * length + token
    if ROTARY:
        cos, sin = _phases(table_at, row % period, mask, column, K, ROWS, TILE)
        sin = -sin
    if NORM:
        q_weight = tl.load(weight_at + column, mask=column < K, other=0.0).to(tl.float32)
        k_weight = tl.load(weight_at + K + column, mask=column < K, other=0.0).to(tl.float32)
    dq_weight = tl.zeros((ROWS, TILE), tl.float32)
    dk_weight = tl.zeros((ROWS, TILE), tl.float32)
    x_place = row[:, None] * heads * (3 * K) + column[None, :]
    token = token[:, None].to(tl.int64)
    dq_at += sample * q_sample + token * q_token + column[None, :]
    dk_at += sample * k_sample + token * k_token + column[None, :]
    dv_at += sample * v_sample + token * v_token + column[None, :]
    first = tl.program_id(1) * each
    for head in range(first, tl.minimum(first + each, heads)):
        far, near = tl.cast(head // group, tl.int64), tl.cast(head % group, tl.int64)
        dq = tl.load(dq_at + far * q_group + near * q_head, mask=mask, other=0.0).to(tl.float32)
        dk = tl.load(dk_at + far * k_group + near * k_head, mask=mask, other=0.0).to(tl.float32)
        dv = tl.load(dv_at + far * v_group + near * v_head, mask=mask, other=0.0)
        place = x_place + head * (3 * K)
        if ROTARY:
            dq = _rotated(dq, cos, sin, ROWS, TILE)
            dk = _rotated(dk, cos, sin, ROWS, TILE)
        if NORM:
            q = tl.load(x_at + place, mask=mask, other=0.0).to(tl.float32)
            k = tl.load(x_at + place + K, mask=mask, other=0.0).to(tl.float32)
            dq, q_part = _norm_backward(q, q_weight, dq, K)
            dk, k_part = _norm_backward(k, k_weight, dk, K)
            dq_weight += q_part
            dk_weight += k_part
        tl.store(dx_at + place, dq.to(dx_at.dtype.element_ty), mask=mask)
        tl.store(dx_at + place + K, dk.to(dx_at.dtype.element_ty), mask=mask)
        tl.store(dx_at + place + 2 * K, dv, mask=mask)
    if NORM:
        program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(
            0
        ) + tl.program_id(0)
        part = dweight_at + program.to(tl.int64) * (2 * K) + column
        tl.store(part, tl.sum(dq_weight, 0), mask=column < K)
        tl.store(part + K, tl.sum(dk_weight, 0), mask=column < K)


def _views(tensors: tuple[Tensor, ...], form: Form) -> list[Tensor]:
    """q, k, v as views (n, l, G, H / G, K) of the joint tensors, or of their gradients."""
    tensors = tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)
    if form == "by_rank":
        return list(tensors[0].transpose(0, 1).unsqueeze(0).unbind(-2))
    q, *others = (t.unsqueeze(2) for t in tensors)
    return [q, *others] if form == "apart" else [q, *others[0].unbind(-2)]


def _grid(
    samples: int, length: int, heads: int, width: int
) -> tuple[tuple[int, int, int], int, dict[str, int]]:
    """The grid (tiles of tokens, parts of the heads, samples), heads of a part, and the tile."""
    tile = 1 << (width - 1).bit_length()
    rows = max(_NUMBERS // tile, 1)
    tiles = -(-length // rows)
    parts = min(-(-_PROGRAMS // max(tiles * samples, 1)), heads)
    each = -(-heads // parts)
    return (tiles, -(-heads // each), samples), each, {"K": width, "ROWS": rows, "TILE": tile}


def _launch(
    kernel,
    joint: list[Tensor],
    start: int,
    length: int,
    x: Tensor,
    weight: Tensor | None,
    table: Tensor | None,
    *results: Tensor | None,
) -> None:
    """One stream, whose tokens of a sample are `start` to `start + length` of the joint ones."""
    if not length:
        return
    joint = [t.narrow(1, start, length) for t in joint]
    samples, _, groups, group, width = joint[0].shape
    grid, each, shape = _grid(samples, length, groups * group, width)
    strides = [stride for t in joint for stride in t.stride()[:-1]]
    numbers = (length, 1 if table is None else len(table), groups * group, group, each)
    launch(
        kernel,
        grid,
        x,
        weight,
        table,
        *joint,
        *results,
        *strides,
        *numbers,
        NORM=weight is not None,
        ROTARY=table is not None,
        **shape,
    )


class _JointQkv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, text, visual, text_weight, visual_weight, table, samples, lengths, form, ranks):
        text, visual, text_weight, visual_weight = (
            t if t is None else t.contiguous() for t in (text, visual, text_weight, visual_weight)
        )
        heads, width, tokens = text.shape[-3], text.shape[-1], sum(lengths)
        shapes = {
            "apart": [(samples, tokens, heads, width)] * 3,
            "keys_values": [(samples, tokens, heads, width), (samples, tokens, heads, 2, width)],
            "by_rank": [(ranks, tokens, heads // ranks, 3, width)],
        }
        outputs = tuple(text.new_empty(shape) for shape in shapes[form])
        joint = _views(outputs, form)
        _launch(_forward, joint, 0, lengths[0], text, text_weight, None)
        _launch(_forward, joint, lengths[0], lengths[1], visual, visual_weight, table)
        ctx.save_for_backward(text, visual, text_weight, visual_weight, table)
        ctx.samples, ctx.lengths, ctx.form = samples, lengths, form
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        text, visual, text_weight, visual_weight, table = ctx.saved_tensors
        joint, start, found = _views(gradients, ctx.form), 0, []
        for x, weight, phases, length in zip(
            (text, visual), (text_weight, visual_weight), (None, table), ctx.lengths, strict=True
        ):
            dx = torch.empty_like(x)
            dx.flatten(0, 1)[ctx.samples * length :].zero_()  # padding
            parts = None
            if weight is not None:
                grid, *_ = _grid(ctx.samples, length, x.shape[-3], x.shape[-1])
                parts = torch.empty(math.prod(grid), *weight.shape, dtype=torch.float32, device=x.device)
            _launch(_backward, joint, start, length, x, weight, phases, dx, parts)
            found.append((dx, None if parts is None else parts.sum(0).to(weight.dtype)))
            start += length
        (dtext, dtext_weight), (dvisual, dvisual_weight) = found
        return dtext, dvisual, dtext_weight, dvisual_weight, None, None, None, None, None


def joint_qkv(
    text: Tensor,
    visual: Tensor,
    text_weight: Tensor | None,
    visual_weight: Tensor | None,
    rotary: Tensor | None,
    tokens: tuple[int, int] | None = None,
    form: Form = "apart",
    ranks: int = 1,
) -> tuple[Tensor, ...]:
    """Queries and keys, normalised and rotated, and values of text and visual tokens.

    Args:
        text, visual: (a, b, H, 3, K) projections to q, k and v. Without `tokens`: (n,
            l_text, ...) and (n, l_visual, ...).
        text_weight, visual_weight: (2, K) scales of q and of k; None: not normalised
            (here).
        rotary: (a or 1, b, 1, 1, K / 2) unit complex numbers for the visual tokens; None:
            no rotation.
        tokens: the packed form, in which so many rows of each stream are tokens and the
            rest, at the end, is padding, whose gradient is zero.
        form: how a packed form is laid out.
        ranks: of "by_rank".

    Returns:
        Without `tokens`: q, k and v (n, l_text + l_visual, H, K), text first in each
            sample. With `tokens`, T = sum(tokens), all text first:
        "apart" q, k and v (T, H, K); "keys_values" q (T, H, K) and one (T, H, 2, K);
        "by_rank" one (ranks, T, H / ranks, 3, K).
    """
    if not use_kernels(text, visual, *(w for w in (text_weight, visual_weight) if w is not None)):
        return joint_qkv_reference(text, visual, text_weight, visual_weight, rotary, tokens, form, ranks)
    table = None if rotary is None else torch.view_as_real(rotary).flatten(0, -3).flatten(-2).contiguous()
    samples, lengths = (len(text), (text.shape[1], visual.shape[1])) if tokens is None else (1, tokens)
    outputs = _JointQkv.apply(text, visual, text_weight, visual_weight, table, samples, lengths, form, ranks)
    return outputs if tokens is None or form == "by_rank" else tuple(y.squeeze(0) for y in outputs)
