"""Learned queries over tokens: attention, pooling and projected pooling against their
references, in the interpreter without a GPU.
"""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_apt.kernels.launch import implementation
from megatron_apt.kernels.learnable_query_attention import (
    learnable_query_attention,
    learnable_query_attention_reference,
    merge,
)
from megatron_apt.kernels.learnable_query_pooling import (
    learnable_query_pooling,
    learnable_query_pooling_reference,
)
from megatron_apt.kernels.projected_scores import projected_query_pooling, projected_query_pooling_reference
from megatron_apt.kernels.rows import Rows
from support.kernel_checks import DEVICE, compare, random

DTYPES = [torch.float32, torch.bfloat16]
# (tokens of each sample, queries, heads, head size): one token, odd sizes, samples
# without tokens, several blocks, every query count.
CASES = [
    ([1], 1, 1, 8),
    ([63], 1, 3, 24),
    ([3, 0, 60], 1, 5, 8),
    ([1000], 1, 1, 64),
    ([7, 300, 65, 1], 1, 3, 24),
    ([0, 0], 1, 3, 8),
    ([63, 63], 3, 3, 24),
]


def make_rows(lengths: list[int], uniform: bool) -> tuple[Rows, tuple[int, int]]:
    if uniform:
        return Rows.uniform(len(lengths), lengths[0], DEVICE), (len(lengths), lengths[0])
    return Rows.packed(lengths, DEVICE), (sum(lengths), 1)


def forms(lengths: list[int]) -> list[bool]:
    return [False, True] if len(set(lengths)) == 1 and lengths[0] else [False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths, queries, heads, width", CASES)
def test_attention(lengths, queries, heads, width, dtype):
    for uniform in forms(lengths):
        rows, shape = make_rows(lengths, uniform)
        q = random(*((queries,) if queries > 1 else ()), heads, width)
        inputs = [q, random(*shape, heads, 2, width, seed=1), random(width, seed=2) + 1]
        compare(
            partial(learnable_query_attention, rows=rows),
            partial(learnable_query_attention_reference, rows=rows),
            inputs,
            dtype,
        )


# Matrix units take bf16: e^(score - max), dacc, and projected k and dk are rounded on
# their way into products, before a result's own rounding. Of one head and one token (dx =
# w dacc) nothing averages these three roundings out.
PRODUCTS = {torch.float32: None, torch.bfloat16: 2**-6}

# (tokens of each sample, heads, head size, width)
POOLED = [
    ([1], 1, 8, 8),
    ([63], 3, 24, 40),
    ([3, 0, 60], 5, 8, 24),
    ([1000], 1, 64, 130),
    ([0, 0], 3, 8, 8),
    ([33, 33], 3, 24, 72),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths, heads, width, depth", POOLED)
def test_pooling(lengths, heads, width, depth, dtype):
    for uniform in forms(lengths):
        rows, shape = make_rows(lengths, uniform)
        inputs = [
            random(heads, width),
            random(*shape, heads, width, seed=1),
            random(*shape, depth, seed=2),
            random(width, seed=3) + 1,
        ]
        compare(
            partial(learnable_query_pooling, rows=rows),
            partial(learnable_query_pooling_reference, rows=rows),
            inputs,
            dtype,
            PRODUCTS[dtype],
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths, heads, width, depth", POOLED)
def test_projected_pooling(lengths, heads, width, depth, dtype):
    for uniform in forms(lengths):
        rows, shape = make_rows(lengths, uniform)
        wk, bk = random(heads * width, depth, seed=1, scale=depth**-0.5), random(heads * width, seed=2)
        inputs = [random(heads, width), random(*shape, depth, seed=3), wk, bk, random(width, seed=4) + 1]
        compare(
            partial(projected_query_pooling, rows=rows),
            partial(projected_query_pooling_reference, rows=rows),
            inputs,
            dtype,
            PRODUCTS[dtype],
        )


def attention(q, kv, k_scale, rows):
    with implementation("kernels" if q.dtype == torch.float32 else "reference"):
        return learnable_query_attention(q, kv, k_scale, rows)


@settings(deadline=None, max_examples=15)
@given(
    parts=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    queries=st.sampled_from([(), (2,)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_partition_of_the_tokens_merges_to_the_same_triple(parts, queries, dtype):
    """Sharp attention, where separate softmaxes would be far off; parts without tokens take part."""
    total = sum(parts)
    q, kv, k_scale = (
        t.to(DEVICE, dtype)
        for t in (random(*queries, 2, 8, scale=10), random(total, 1, 2, 2, 8, seed=1), random(8, seed=2) + 1)
    )
    split = attention(q, kv, k_scale, Rows.packed(parts, DEVICE))
    whole = attention(q, kv, k_scale, Rows.packed([total], DEVICE))
    for got, want in zip(merge(list(zip(*split, strict=True))), whole, strict=True):
        assert torch.allclose(got, want[0], rtol=1e-4 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_video_of_46800_tokens(dtype):
    """One softmax over 184 programs for each head, and another sample behind it."""
    rows, heads, width = Rows.packed([46800, 3], DEVICE), 1, 8
    q, kv, k_scale = (
        random(heads, width),
        random(rows.total, 1, heads, 2, width, seed=1),
        random(width, seed=2) + 1,
    )
    compare(
        partial(learnable_query_attention, rows=rows),
        partial(learnable_query_attention_reference, rows=rows),
        [q, kv, k_scale],
        dtype,
    )


# Fp32 has smaller tiles, so takes more of them
@pytest.mark.parametrize(
    "length, dtype",
    [(5000, torch.float32), pytest.param(46800, torch.bfloat16, marks=pytest.mark.slow)],
)
def test_a_video_is_pooled(length, dtype):
    rows, heads, width, depth = Rows.packed([length, 3], DEVICE), 1, 8, 8
    inputs = [
        random(heads, width),
        random(rows.total, 1, heads, width, seed=1),
        random(rows.total, 1, depth, seed=2),
        random(width, seed=3) + 1,
    ]
    compare(
        partial(learnable_query_pooling, rows=rows),
        partial(learnable_query_pooling_reference, rows=rows),
        inputs,
        dtype,
        PRODUCTS[dtype],
    )


def test_operands_that_are_not_contiguous():
    """Keys and values, keys and tokens, as slices of wider tensors; samples and tokens exchanged."""
    rows = Rows.uniform(2, 5, DEVICE)
    q, k_scale = random(3, 8), random(8, seed=2) + 1
    wide = random(2, 5, 3, 2, 20, seed=1)
    call = lambda f: lambda q, kv, k_scale: f(q, kv[..., 4:12], k_scale, rows)  # noqa: E731
    compare(
        call(learnable_query_attention),
        call(learnable_query_attention_reference),
        [q, wide, k_scale],
        torch.float32,
    )
    call = lambda f: lambda q, kv, k_scale: f(q, kv.transpose(0, 1)[..., :8], k_scale, rows)  # noqa: E731
    compare(
        call(learnable_query_attention),
        call(learnable_query_attention_reference),
        [q, wide.transpose(0, 1), k_scale],
        torch.float32,
    )
    call = lambda f: lambda q, k, x, k_scale: f(q, k[..., 0, :8], x[..., :12], k_scale, rows)  # noqa: E731
    inputs = [q, wide, random(2, 5, 30, seed=3), k_scale]
    compare(call(learnable_query_pooling), call(learnable_query_pooling_reference), inputs, torch.float32)


def test_rows_of_padding_take_no_part():
    rows = Rows.packed([3, 5], DEVICE)
    q, kv, k_scale = random(2, 8), random(11, 1, 2, 2, 8, seed=1), random(8, seed=2) + 1
    compare(
        partial(learnable_query_attention, rows=rows),
        partial(learnable_query_attention_reference, rows=rows),
        [q, kv, k_scale],
        torch.float32,
    )
    q, kv, k_scale = (t.to(DEVICE) for t in (q, kv, k_scale))
    _, total, acc = learnable_query_attention(q, kv.requires_grad_(), k_scale, rows)
    (total.sum() + acc.sum()).backward()
    assert kv.grad[:8].any() and not kv.grad[8:].any()


def test_results_do_not_depend_on_timing():
    rows = Rows.packed([300, 5], DEVICE)
    inputs = [
        t.to(DEVICE, torch.float32)
        for t in (random(2, 8), random(305, 1, 2, 2, 8, seed=1), random(8, seed=2) + 1)
    ]
    with implementation("kernels"):
        for a, b in zip(
            learnable_query_attention(*inputs, rows), learnable_query_attention(*inputs, rows), strict=True
        ):
            assert torch.equal(a, b)


def test_float64_takes_the_reference():
    rows, double = Rows.packed([4, 2], DEVICE), torch.float64
    q, kv, k_scale = (
        t.to(DEVICE, double) for t in (random(2, 8), random(6, 1, 2, 2, 8, seed=1), random(8, seed=2))
    )
    with implementation("kernels"):
        got = learnable_query_attention(q, kv, k_scale, rows)
    assert all(t.dtype == double for t in got)
    assert all(
        torch.equal(a, b)
        for a, b in zip(got, learnable_query_attention_reference(q, kv, k_scale, rows), strict=True)
    )


def test_pooling_then_projecting_is_attention():
    """acc of values = Wv_h (acc of x) + sum bv_h."""
    rows, (heads, width, depth) = Rows.packed([7, 30], DEVICE), (3, 8, 12)
    q, x, k_scale = random(heads, width), random(37, 1, depth, seed=1), random(width, seed=2) + 1
    wk, wv = random(2, heads, width, depth, seed=3)
    bk, bv = random(2, heads, width, seed=4)
    q, x, k_scale, wk, wv, bk, bv = (t.to(DEVICE) for t in (q, x, k_scale, wk, wv, bk, bv))
    k, v = (torch.einsum("abd,hkd->abhk", x, w) + b for w, b in ((wk, bk), (wv, bv)))
    want = learnable_query_attention(q, torch.stack((k, v), -2), k_scale, rows)
    for top, total, acc in (
        learnable_query_pooling(q, k, x, k_scale, rows),
        projected_query_pooling(q, x, wk.flatten(0, 1), bk.flatten(), k_scale, rows),
    ):
        values = torch.einsum("nhd,hkd->nhk", acc, wv) + total.unsqueeze(-1) * bv
        assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip((top, total, values), want, strict=True))
