"""Joint attention of a packed microbatch, on one rank or over context-parallel ranks.

Ulysses trades tokens for heads by an all-to-all on either side of a local attention;
all_gather keeps queries local and collects every rank's keys and values. Both give every
query its sample's whole text and picture; chunks may be uneven. The rings of Transformer
Engine exchange keys and values inside its attention (models/spec.py) and need even
chunks.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megatron_apt.kernels.qk_norm_rope import joint_qkv
from megatron_apt.models.layout import Layout, build_layout
from megatron_apt.parallel.collectives import gather_rows
from megatron_apt.parallel.megatron import all_to_all
from megatron_apt.parallel.mesh import Mesh

RINGS = ("p2p", "a2a+p2p")


def joint_attention(
    text: Tensor,
    visual: Tensor,
    norms: tuple[Tensor | None, Tensor | None],
    rotary: Tensor | None,
    layout: Layout,
    mesh: Mesh,
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Attention of each sample over its own text and visual tokens.

    Args:
        text, visual: (a, b, H, 3, K) projections to q, k and v in the layout's folded
            form, this rank's tokens and heads.
        norms: (2, K) scales of the text's and of the visual tokens' queries and keys;
            None where those are not normalised here.
        rotary: `rotary_table` of the visual tokens; None: no rotation.
        attention: (g, lq, H, K), (g, lk, H, K), (g, lk, H, K) -> (g, lq, H, K).

    Returns:
        Text and visual outputs, (a, b, H * K), in the same folded form.
    """
    ring = mesh.cp.size > 1 and mesh.context_parallel in RINGS
    tokens = text.shape[1] + visual.shape[1]
    if ring and not (layout.text.uniform and layout.visual.uniform and tokens % 2 == 0):
        raise ValueError(
            f"parallel.context_parallel={mesh.context_parallel!r} needs samples and captions of one length, "
            f"whole ones for the {mesh.tp.size} tensor-parallel ranks, and an even number of tokens on each "
            f"rank (here {tokens}): check data.text_length, data.block and micro_batch, or use ulysses or "
            "all_gather"
        )
    if layout.batched or ring:
        out = attention(*joint_qkv(text, visual, *norms, rotary)).flatten(2)
        return out.split((text.shape[1], visual.shape[1]), dim=1)
    counts = len(layout.text.index), len(layout.visual.index)
    qkv = partial(joint_qkv, text, visual, *norms, rotary, counts)
    if mesh.cp.size == 1:
        out = _attend_groups(*qkv(), layout, attention)
    elif mesh.context_parallel == "ulysses":
        out = _ulysses(*qkv("by_rank", mesh.cp.size), layout, mesh, attention)
    else:
        q, keys_values = qkv("keys_values")
        keys_values = gather_rows(keys_values, list(layout.token_counts), mesh.cp)
        out = _attend_groups(q, *keys_values.unbind(2), layout, attention)
    text_out, visual_out = out.flatten(1).split(counts)
    return layout.text.fold(text_out), layout.visual.fold(visual_out)


def self_attention(
    visual: Tensor, norm: Tensor | None, rotary: Tensor | None, layout: Layout, mesh: Mesh, attention
) -> Tensor:
    """Attention of each sample over its own visual tokens: joint attention beside texts
    of no tokens. Arguments as there.
    """
    layout = build_layout(layout.grids, (0,) * layout.samples, mesh)
    text = visual[:, :0] if layout.text.uniform else visual[:0]
    return joint_attention(text, visual, (None, norm), rotary, layout, mesh, attention)[1]


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], layout: Layout, attention
) -> Tensor:
    """Attention of each sample's visual tokens over tokens that are whole on every rank.

    Args:
        q: (a, b, H, K) of this rank's visual tokens and heads, in the layout's folded
            form.
        k, v: (sum of lengths, H, K) packed.
        lengths: tokens of each sample in k and v.

    Returns:
        (a, b, H * K), folded.
    """
    stream = layout.visual
    if stream.uniform and len(set(lengths)) == 1:
        return attention(q, *(x.unflatten(0, (layout.samples, -1)) for x in (k, v))).flatten(2)
    samples = zip(stream.unfold(q).split(stream.counts), k.split(lengths), v.split(lengths), strict=True)
    return stream.fold(
        torch.cat([attention(*(x.unsqueeze(0) for x in qkv)).squeeze(0) for qkv in samples]).flatten(1)
    )


def whole_attention(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], attention) -> Tensor:
    """Attention of each sample's tokens among themselves, all on every rank.

    Args:
        q, k, v: (sum of lengths, H, K) packed, this rank's heads.

    Returns:
        (sum of lengths, H * K).
    """
    if len(set(lengths)) == 1:
        return attention(*(x.unflatten(0, (len(lengths), -1)) for x in (q, k, v))).flatten(0, 1).flatten(1)
    samples = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([attention(*(x.unsqueeze(0) for x in qkv)).squeeze(0) for qkv in samples]).flatten(1)


class _Permuted(torch.autograd.Function):
    """Rows in another order. Every row occurs once, so the gradient is rows in the order
    before: no sum, as indexing would have.
    """

    @staticmethod
    def forward(ctx, x, rows, back):
        ctx.save_for_backward(back)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, dy):  # ty: ignore[incompatible-method-override]  # torch says *grads
        return dy.index_select(0, ctx.saved_tensors[0]), None, None


def _attend_groups(q: Tensor, k: Tensor, v: Tensor, layout: Layout, attention) -> Tensor:
    groups = layout.groups
    assert layout.queries is not None and layout.keys is not None  # as in every packed layout
    q = _Permuted.apply(q, layout.queries.rows, layout.queries.back).split(
        [g.samples * g.queries for g in groups]
    )
    k, v = (
        _Permuted.apply(x, layout.keys.rows, layout.keys.back).split([g.samples * g.keys for g in groups])
        for x in (k, v)
    )
    out = [
        attention(*(x.unflatten(0, (g.samples, -1)) for x in qkv)).flatten(0, 1)
        for g, *qkv in zip(groups, q, k, v, strict=True)
    ]
    return _Permuted.apply(torch.cat(out), layout.queries.back, layout.queries.rows)


def _ulysses(qkv: Tensor, layout: Layout, mesh: Mesh, attention) -> Tensor:
    """(cp, T, H / cp, 3, K) -> (T, H, K), with each rank attending for H / cp heads over
    all tokens in between.
    """
    cp, tokens = qkv.shape[:2]
    sizes = list(layout.token_counts)
    sent = qkv.reshape(cp * tokens, -1)
    gathered = all_to_all(mesh.cp.group, sent, sizes, [tokens] * cp).view(sum(sizes), -1, 3, qkv.shape[-1])
    out = _attend_groups(*gathered.unbind(2), layout, attention)
    back = all_to_all(mesh.cp.group, out.reshape(sum(sizes), -1), [tokens] * cp, sizes)
    return back.view(cp, tokens, -1, qkv.shape[-1]).transpose(0, 1).reshape(tokens, -1, qkv.shape[-1])
