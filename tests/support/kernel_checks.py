"""How a kernel is held against its reference: the same inputs, the reference in float64,
every output and every gradient.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_apt.kernels.launch import implementation

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Largest difference over largest value. fp32: rounding of sums; bf16: one unit in the
# last place, as the interpreter truncates where a GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers of float64 on the CPU, of this seed and shape."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs_and_gradients(call: Callable, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Of a sum of the outputs with random weights of this dtype."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    outputs = call(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    smooth = [out for out in outputs if out.requires_grad]
    weights = [random(*out.shape, seed=100 + i).to(dtype).to(out) for i, out in enumerate(smooth)]
    torch.autograd.backward(smooth, weights)
    return [out.detach() for out in outputs] + [leaf.grad for leaf in leaves if leaf.requires_grad]


def difference(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value wanted."""
    if not want.numel():
        return 0.0
    assert torch.isfinite(got).all() or not torch.isfinite(want).all(), "values that are not finite"
    both = torch.isfinite(want)
    assert torch.equal(got[~both].double(), want[~both].double()), "infinities at other places"
    if not both.any():
        return 0.0
    error = (got.double() - want.double())[both].abs().max() / want[both].double().abs().max().clamp_min(
        1e-30
    )
    return float(error)


def compare(
    call: Callable,
    reference: Callable,
    inputs: list[Tensor],
    dtype: torch.dtype,
    tolerance: float | None = None,
) -> None:
    """Asserts that `call` with kernels equals `reference` in float64, on float inputs rounded to dtype."""
    low = [t.to(DEVICE, dtype) if t.is_floating_point() else t.to(DEVICE) for t in inputs]
    want = outputs_and_gradients(reference, [t.double() if t.is_floating_point() else t for t in low], dtype)
    with implementation("kernels"):
        got = outputs_and_gradients(call, low, dtype)
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape, f"number {i}: shape {tuple(a.shape)}, not {tuple(b.shape)}"
        error = difference(a, b)
        assert error <= (tolerance or TOLERANCE[dtype]), (
            f"number {i} of outputs and gradients: {error:.2e} apart"
        )
