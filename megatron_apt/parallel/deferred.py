"""Weight gradients put off: a backward pass computes what the stage before waits for, the
rest when the schedule says so (zero-bubble pipelines).

While a backward runs inside `deferring`, linear layers only park their input and output
gradient; `WeightGradients.run` does the products later, straight into the gradient buffer
where that has their dtype. Otherwise a gradient enters autograd at its parameter, as in
any backward pass. A reduction overlapped by autograd hooks would miss the former: a
pipeline starts its reductions itself (the REDUCE action).
"""

import contextlib
from collections.abc import Callable, Generator

import torch
import torch.distributed as dist
from torch import Tensor, nn


class WeightGradients:
    """Work that one pass through one stage has put off."""

    def __init__(self):
        self._parked: list[Callable[[], None]] = []

    def later(self, work: Callable[[], None]) -> None:
        self._parked.append(work)

    def run(self) -> None:
        """Does it, in the order of the backward pass, and lets go of the activations one layer at a time."""
        self._parked.reverse()
        while self._parked:
            self._parked.pop()()


_current: WeightGradients | None = None  # not a thread's own: on CUDA autograd runs backward in other threads


@contextlib.contextmanager
def deferring(store: WeightGradients | None) -> Generator[None]:
    """Forward and backward passes inside put their weight gradients into `store`; None
    computes them at once.
    """
    global _current
    before, _current = _current, store
    try:
        yield
    finally:
        _current = before


def current() -> WeightGradients | None:
    """Where weight gradients go now; None outside `deferring` and where no gradient is recorded."""
    return _current if torch.is_grad_enabled() else None


class _Linear(torch.autograd.Function):
    """x W^T + b as Megatron-Core's column-parallel layer, the weight's gradient parked."""

    @staticmethod
    def forward(ctx, x, parameters, store, reduce_input_gradient, gather, group):
        ctx.save_for_backward(x)
        # Passed beside the graph: an edge to a parameter would announce a gradient to its
        # hooks during the backward pass.
        weight, bias = parameters
        ctx.weight, ctx.bias, ctx.store, ctx.group = weight, bias, store, group
        ctx.reduce_input_gradient, ctx.gather = reduce_input_gradient, gather
        return nn.functional.linear(_gathered(x, group) if gather else x, weight, bias)

    @staticmethod
    def backward(ctx, dy):  # ty: ignore[incompatible-method-override]  # torch says *grads
        (x,), weight, bias, group, gather = ctx.saved_tensors, ctx.weight, ctx.bias, ctx.group, ctx.gather

        @torch.no_grad()
        def weight_gradient() -> None:
            rows = (_gathered(x, group) if gather else x).flatten(0, -2)
            columns = dy.flatten(0, -2)
            buffer = getattr(weight, "main_grad", None)
            if buffer is not None and buffer.dtype == rows.dtype:
                buffer.addmm_(columns.t(), rows)  # one pass over the weight's gradient instead of three
            else:
                _deliver(weight, columns.t() @ rows)
            if bias is not None and bias.requires_grad:
                _deliver(bias, columns.sum(0))

        ctx.store.later(weight_gradient)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            if gather:
                total, dx = dx.contiguous(), dx.new_empty(x.shape)
                dist.reduce_scatter_tensor(dx, total, group=group)
            elif ctx.reduce_input_gradient:
                dx = dx.contiguous()
                dist.all_reduce(dx, group=group)
        return dx, *(None,) * 5


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    store: WeightGradients,
    reduce_input_gradient: bool,
    gather: bool,
    group,
) -> Tensor:
    """x (..., in), which takes a gradient, -> (..., out), the gradients of weight and
    bias parked in `store`.

    Args:
        reduce_input_gradient: sum it over `group`, each of whose ranks holds a part of
            the output features.
        gather: x is a part of the first dimension (sequence parallelism): gather it
            before, and scatter its gradient.
    """
    return _Linear.apply(x, (weight, bias), store, reduce_input_gradient, gather, group)


def _gathered(x: Tensor, group) -> Tensor:
    total = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(total, x.contiguous(), group=group)
    return total


@torch.enable_grad()
def _deliver(parameter: Tensor, gradient: Tensor) -> None:
    torch.autograd.backward(parameter.view_as(parameter), gradient)
