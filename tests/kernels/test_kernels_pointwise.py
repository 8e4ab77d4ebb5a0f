"""modulated_norm and gated_residual against their references, in the interpreter without a GPU."""

from functools import partial

import pytest
import torch

from megatron_apt.kernels.gated_residual import gated_residual, gated_residual_reference
from megatron_apt.kernels.launch import implementation
from megatron_apt.kernels.modulated_norm import modulated_norm, modulated_norm_reference
from megatron_apt.kernels.rows import Rows, sum_blocks
from support.kernel_checks import DEVICE, compare, random

# (rows of each sample, width): one row, odd sizes, samples without rows, more rows than a block, one video.
CASES = [([1], 8), ([63], 24), ([3, 0, 60], 40), ([1000], 96), ([7, 200, 65, 1], 384), ([0, 0], 16)]
DTYPES = [torch.float32, torch.bfloat16]


def rows_and_tensors(lengths: list[int], width: int, vectors: int, uniform: bool):
    rows = Rows.uniform(len(lengths), lengths[0], DEVICE) if uniform else Rows.packed(lengths, DEVICE)
    shape = (len(lengths), lengths[0]) if uniform else (sum(lengths), 1)
    wide = [random(*shape, width, seed=i) + 0.3 for i in range(2)]
    return rows, wide, [random(len(lengths), width, seed=10 + i) for i in range(vectors)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("lengths, width", CASES)
def test_modulated_norm(lengths, width, kind, dtype):
    for uniform in {False, len(set(lengths)) == 1}:
        rows, (x, _), vectors = rows_and_tensors(lengths, width, 2, uniform)
        compare(
            partial(modulated_norm, rows=rows, kind=kind),
            partial(modulated_norm_reference, rows=rows, kind=kind),
            [x, *vectors],
            dtype,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths, width", CASES)
def test_gated_residual(lengths, width, dtype):
    for uniform in {False, len(set(lengths)) == 1}:
        rows, (x, h), (gate,) = rows_and_tensors(lengths, width, 1, uniform)
        compare(
            partial(gated_residual, rows=rows),
            partial(gated_residual_reference, rows=rows),
            [x, gate, h],
            dtype,
        )


def test_vectors_that_change_inside_a_sample():
    """Uniform samples in two parts each, one of them empty: the first frame and the rest
    of image to video.
    """
    lengths, sample = (
        [7, 58, 0, 65, 40, 25],
        torch.arange(6).repeat_interleave(torch.tensor([7, 58, 0, 65, 40, 25])).view(3, 65),
    )
    rows = Rows(Rows.packed(lengths).offsets, torch.device(DEVICE), sample.to(DEVICE))
    x, h, *vectors = (
        random(3, 65, 40) + 0.3,
        random(3, 65, 40, seed=1),
        *(random(6, 40, seed=10 + i) for i in range(2)),
    )
    compare(
        partial(modulated_norm, rows=rows),
        partial(modulated_norm_reference, rows=rows),
        [x, *vectors],
        torch.float32,
    )
    compare(
        partial(gated_residual, rows=rows),
        partial(gated_residual_reference, rows=rows),
        [x, vectors[0], h],
        torch.float32,
    )


def test_a_video_of_46800_tokens():
    """Sums over 46,800 rows, split over many programs."""
    rows, (x, h), vectors = rows_and_tensors([46800, 3], 16, 2, uniform=False)
    compare(
        partial(modulated_norm, rows=rows),
        partial(modulated_norm_reference, rows=rows),
        [x, *vectors],
        torch.float32,
    )
    compare(
        partial(gated_residual, rows=rows),
        partial(gated_residual_reference, rows=rows),
        [x, vectors[0], h],
        torch.float32,
    )


def test_operands_that_are_not_contiguous():
    rows = Rows.uniform(2, 5, DEVICE)
    x, vectors = random(5, 2, 12), random(2, 36)
    call = lambda f: lambda x, v: f(x.transpose(0, 1), *v.chunk(3, -1)[:2], rows)  # noqa: E731
    compare(call(modulated_norm), call(modulated_norm_reference), [x, vectors], torch.float32)


def test_the_order_of_sums_is_fixed():
    rows = Rows.packed([100, 333], DEVICE)
    blocks = rows.blocks(32)
    assert blocks.table[:, 1:].diff(dim=1).sum() == 433 and len(blocks) == 4 + 11
    parts = random(len(blocks), 7).to(DEVICE, torch.float32)
    with implementation("kernels"):
        total = sum_blocks(parts, blocks)
        assert torch.equal(total, sum_blocks(parts, blocks))
    assert torch.allclose(total, torch.stack((parts[:4].sum(0), parts[4:].sum(0))))


def test_float64_takes_the_reference():
    rows, (x, _), vectors = rows_and_tensors([4], 8, 2, uniform=True)
    x, vectors = x.to(DEVICE), [v.to(DEVICE) for v in vectors]
    with implementation("kernels"):
        assert torch.equal(modulated_norm(x, *vectors, rows), modulated_norm_reference(x, *vectors, rows))
