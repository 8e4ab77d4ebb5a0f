"""Collectives with exact adjoints.

One rule covers every parallel axis over which a loss is shared: each rank's loss is a
CONTRIBUTION, and the objective is the sum of the contributions over the data x context
ranks. Under that rule the gradient of a sum over ranks is again a sum over ranks, and
every weight gradient is summed over data x context, without special cases for weights
before or after a reduction.
"""

import torch
import torch.distributed as dist

from megatron_apt.parallel.mesh import Axis


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        y = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx, dy):  # ty: ignore[incompatible-method-override]  # torch says *grads
        dx = dy.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(dx, group=ctx.group)
        return dx, None


def sum_over(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Sum of x over the ranks of an axis, on each of them; the adjoint is the same sum."""
    return x if axis.size == 1 else _Sum.apply(x, axis.group)


@torch.no_grad()
def max_over(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Elementwise maximum over the ranks of an axis; not differentiated (it only shifts exponents)."""
    y = x.detach().clone(memory_format=torch.contiguous_format)
    if axis.size > 1:
        dist.all_reduce(y, op=dist.ReduceOp.MAX, group=axis.group)
    return y


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sizes, axis):
        ctx.sizes, ctx.axis = sizes, axis
        # Gloo gathers equal parts only, so shorter parts are padded to the longest.
        longest = max(sizes)
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        gathered = x.new_empty(axis.size * longest, *x.shape[1:])
        dist.all_gather_into_tensor(gathered, padded, group=axis.group)
        return torch.cat([part[:size] for part, size in zip(gathered.chunk(axis.size), sizes, strict=True)])

    @staticmethod
    def backward(ctx, dy):  # ty: ignore[incompatible-method-override]  # torch says *grads
        longest = max(ctx.sizes)
        padded = dy.new_zeros(ctx.axis.size, longest, *dy.shape[1:])
        for row, part in zip(padded, dy.split(ctx.sizes), strict=True):
            row[: len(part)] = part
        dx = dy.new_empty(longest, *dy.shape[1:])
        dist.reduce_scatter_tensor(dx, padded.flatten(0, 1), group=ctx.axis.group)
        return dx[: ctx.sizes[ctx.axis.rank]], None, None


def gather_rows(x: torch.Tensor, sizes: list[int], axis: Axis) -> torch.Tensor:
    """Every rank's rows, in rank order; `sizes` are their numbers, which may differ. The
    adjoint sums and scatters.
    """
    return x if axis.size == 1 else _GatherRows.apply(x, sizes, axis)
