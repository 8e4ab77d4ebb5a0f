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
from megatron_apt.kernels.rows import Rows

DTYPES = [torch.float32, torch.bfloat16]
# (tokens of each sample, queries, heads, head size): one token, odd sizes, samples without tokens, several blocks, every query count.
CASES = [([1], 1, 1, 8), ([63], 1, 3, 24), ([3, 0, 60], 1, 5, 8), ([1000], 1, 1, 64), ([7, 300, 65, 1], 1, 3, 24), ([0, 0], 1, 3, 8), ([63, 63], 3, 3, 24)]


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
