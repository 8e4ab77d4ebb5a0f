"""Learned queries over tokens: attention, pooling and projected pooling against their references, in the interpreter without a GPU."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, compare, random
from megatron_apt.kernels.launch import implementation
from megatron_apt.kernels.learnable_query_attention import learnable_query_attention, learnable_query_attention_reference, merge
from megatron_apt.kernels.learnable_query_pooling import learnable_query_pooling, learnable_query_pooling_reference
from megatron_apt.kernels.projected_scores import projected_query_pooling, projected_query_pooling_reference
from megatron_apt.kernels.rows import Rows

DTYPES = [torch.float32, torch.bfloat16]
# (tokens of each sample, queries, heads, head size): one token, odd sizes, samples without tokens, several blocks, every query count.
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
        compare(partial(learnable_query_attention, rows=rows), partial(learnable_query_attention_reference, rows=rows), inputs, dtype)


# (tokens of each sample, heads, head size, width)
POOLED = [([1], 1, 8, 8), ([63], 3, 24, 40), ([3, 0, 60], 5, 8, 24), ([1000], 1, 64, 130), ([0, 0], 3, 8, 8), ([63, 63], 3, 24, 72)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths, heads, width, depth", POOLED)
def test_pooling(lengths, heads, width, depth, dtype):
    for uniform in forms(lengths):
        rows, shape = make_rows(lengths, uniform)
        inputs = [random(heads, width), random(*shape, heads, width, seed=1), random(*shape, depth, seed=2), random(width, seed=3) + 1]
        compare(partial(learnable_query_pooling, rows=rows), partial(learnable_query_pooling_reference, rows=rows), inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths, heads, width, depth", POOLED)
def test_projected_pooling(lengths, heads, width, depth, dtype):
    for uniform in forms(lengths):
        rows, shape = make_rows(lengths, uniform)
        wk, bk = random(heads * width, depth, seed=1, scale=depth**-0.5), random(heads * width, seed=2)
        inputs = [random(heads, width), random(*shape, depth, seed=3), wk, bk, random(width, seed=4) + 1]
        compare(partial(projected_query_pooling, rows=rows), partial(projected_query_pooling_reference, rows=rows), inputs, dtype)
