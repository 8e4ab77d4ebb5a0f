"""RMSProp on a shard in one pass, from the gradient to weights and moving average.

    s <- alpha s + (1 - alpha) g^2
    w <- w - lr lr_scale g / (sqrt(s) + eps)
    parameter <- w                              (rounded to the parameter's dtype)
    average <- average + (1 - decay) (w - average)

Bytes a weight with fp32 g, s, w, average and bf16 parameters: 16 in (g, s, w, average),
14 out (s, w, average, parameter), together 30, and 22 without an average. The operations
of the reference each pass over memory: 70, and 58 without an average, with a temporary as
large as the longest stretch.

A shard's stretches start anywhere in the buffers of weights and gradients. They are cut
into chunks, and one launch over a table of chunks does all of them; chunks that all start
at multiples of 16 elements are read in words of 16 bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_apt.kernels.launch import jit, launch, tl, use_kernels

_CHUNK = 1024


@dataclass(frozen=True, eq=False)
class Stretch:
    """A run of a shard whose weights share a learning-rate scale."""

    part: slice  # of the master, the states and the average
    grad: Tensor  # the same elements of the gradient buffer
    weights: Tensor  # and of the parameter buffer that the module reads
    lr_scale: float


@dataclass(frozen=True, eq=False)
class _Pass:
    """The chunks of one gradient buffer and one parameter buffer: one launch."""

    grads: Tensor  # begin of the buffer's memory, whatever the length
    weights: Tensor
    table: Tensor  # (chunks, 4) int64: place in the shard, among the gradients, among the weights; length
    scales: Tensor  # (chunks,) fp32
    aligned: bool


@dataclass(frozen=True, eq=False)
class Stretches:
    """The stretches of a shard; gradients and weights stay where they are."""

    entries: Sequence[Stretch]

    @cached_property
    def passes(self) -> list[_Pass]:
        groups: dict[tuple, list[Stretch]] = {}
        for s in self.entries:
            buffers = ((t.dtype, t.untyped_storage().data_ptr()) for t in (s.grad, s.weights))
            groups.setdefault(tuple(buffers), []).append(s)
        return [_pass(group) for group in groups.values()]


def _pass(stretches: list[Stretch]) -> _Pass:
    rows, scales = [], []
    for s in stretches:
        places, length = (
            (s.part.start, s.grad.storage_offset(), s.weights.storage_offset()),
            s.part.stop - s.part.start,
        )
        rows += [(*(p + i for p in places), min(_CHUNK, length - i)) for i in range(0, length, _CHUNK)]
        scales += [s.lr_scale] * (len(rows) - len(scales))
    table, device = torch.tensor(rows, dtype=torch.int64).view(-1, 4), stretches[0].grad.device
    begin = [t.as_strided((1,), (1,), 0) for t in (stretches[0].grad, stretches[0].weights)]
    return _Pass(
        *begin,
        table.to(device),
        torch.tensor(scales, dtype=torch.float32).to(device),
        not (table[:, :3] % 16).any(),
    )


def rmsprop_ema_reference(
    master: Tensor,
    square: Tensor,
    average: Tensor | None,
    stretches: Stretches,
    lr: float,
    alpha: float,
    eps: float,
    decay: float,
) -> None:
    """The definition, one operation after another."""
    for stretch in stretches.entries:
        s, w, grad = square[stretch.part], master[stretch.part], stretch.grad
        s.mul_(alpha).addcmul_(grad, grad, value=1 - alpha)
        w.addcdiv_(grad, s.sqrt().add_(eps), value=-lr * stretch.lr_scale)
        stretch.weights.copy_(w)
    if average is not None:
        average.lerp_(master, 1 - decay)


@jit
def _chunk(master_at, square_at, average_at, grad_at, weights_at, mask, rate, alpha, rest, eps, gain):
    g = tl.load(grad_at, mask=mask).to(tl.float32)
    s = alpha * tl.load(square_at, mask=mask) + rest * g * g
    tl.store(square_at, s, mask=mask)
    w = tl.load(master_at, mask=mask) - rate * (g / (tl.sqrt_rn(s) + eps))
    tl.store(master_at, w, mask=mask)
    tl.store(weights_at, w.to(weights_at.dtype.element_ty), mask=mask)
    if average_at is not None:
        average = tl.load(average_at, mask=mask)
        tl.store(average_at, average + gain * (w - average), mask=mask)


@jit
def _update(
    master_at,
    square_at,
    average_at,
    grad_at,
    weights_at,
    table,
    scales,
    lr,
    alpha,
    rest,
    eps,
    gain,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    entry = table + 4 * tl.program_id(0)
    place, grad, weights, length = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    if ALIGNED:  # the compiler cannot know it of a number from memory
        place, grad, weights = (
            tl.multiple_of(place, 16),
            tl.multiple_of(grad, 16),
            tl.multiple_of(weights, 16),
        )
    rate, i = lr * tl.load(scales + tl.program_id(0)), tl.arange(0, CHUNK)
    average_at = average_at + place + i if average_at is not None else None
    master_at, square_at, grad_at, weights_at = (
        master_at + place + i,
        square_at + place + i,
        grad_at + grad + i,
        weights_at + weights + i,
    )
    if ALIGNED and length == CHUNK:
        _chunk(master_at, square_at, average_at, grad_at, weights_at, None, rate, alpha, rest, eps, gain)
    else:
        _chunk(
            master_at, square_at, average_at, grad_at, weights_at, i < length, rate, alpha, rest, eps, gain
        )


@torch.no_grad()
def rmsprop_ema(
    master: Tensor,
    square: Tensor,
    average: Tensor | None,
    stretches: Stretches,
    lr: float,
    alpha: float,
    eps: float,
    decay: float = 1.0,
) -> None:
    """One update of all stretches, in place. Elements of the shard outside of them, which
    padding is, keep their values.

    Args:
        master, square, average: the shard, fp32 for the kernel.
        decay: of the average.
    """
    if not use_kernels(master, square, *(t for s in stretches.entries for t in (s.grad, s.weights))):
        return rmsprop_ema_reference(master, square, average, stretches, lr, alpha, eps, decay)
    numbers = (float(lr), alpha, 1.0 - alpha, eps, 1.0 - decay)
    for p in stretches.passes:
        shard = (master, square, average, p.grads, p.weights)
        launch(
            _update,
            (len(p.table),),
            *shard,
            p.table,
            p.scales,
            *numbers,
            ALIGNED=p.aligned,
            CHUNK=_CHUNK,
            num_warps=4,
        )
