"""How this package's Triton kernels are chosen, launched, and, on a machine without a
GPU, recorded for compilation.

Public calls take a kernel or the reference in torch by one rule (`use_kernels`): kernels
on CUDA tensors, references on all others. `implementation` overrides it: "reference"
everywhere, or "kernels" on CPU tensors too, which needs Triton's interpreter
(TRITON_INTERPRET=1 set before the first import).
"""

import contextlib
import functools
import os
from collections.abc import Callable, Generator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:  # what a kernel is written in looks like Python, but its types are others
    triton: Any
    tl: Any
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:  # not on Linux, say; references serve
        # Of the language, definitions of kernels need its annotation alone
        triton, tl = None, SimpleNamespace(constexpr=int)

Implementation = Literal["auto", "kernels", "reference"]

_implementation: Implementation = "auto"
_recorded: "list[Launch] | None" = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what the kernels take; float64 is for references


def jit(function: Callable | None = None, **options: Any) -> Any:
    """triton.jit with its options, or the plain function where there is no Triton."""
    if function is None:
        return functools.partial(jit, **options)
    return triton.jit(function, **options) if triton is not None else function


@contextlib.contextmanager
def implementation(choice: Implementation) -> Generator[None]:
    """Public calls inside take this implementation."""
    global _implementation
    before, _implementation = _implementation, choice
    try:
        yield
    finally:
        _implementation = before


def choose(choice: Implementation) -> None:
    """Sets the implementation for the rest of the process.

    Raises:
        ValueError: kernels are asked for, and there is no Triton, or nothing that runs
            them.
    """
    global _implementation
    if choice == "kernels" and triton is None:
        raise ValueError("kernels='kernels': Triton is not installed here; use kernels='auto' or 'reference'")
    if choice == "kernels" and not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(
            "kernels='kernels': Triton's kernels need CUDA, and there is none here; use kernels='auto' or "
            "'reference'"
        )
    _implementation = choice


def use_kernels(*tensors: Tensor) -> bool:
    """Whether these operands go to a kernel."""
    if (
        _implementation == "reference"
        or triton is None
        or any(t.dtype not in DTYPES for t in tensors if t.is_floating_point())
    ):
        return False
    return _implementation == "kernels" or tensors[0].is_cuda


@dataclass(frozen=True)
class Launch:
    """One launch as it would have happened: what the compiler needs."""

    kernel: Any
    arguments: tuple[Any, ...]  # tensors (on the meta device), numbers
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    grid: tuple[int, ...]


@contextlib.contextmanager
def recording() -> Generator[list[Launch]]:
    """Launches inside are written down instead of done, so calls on meta tensors show
    what they would launch on a GPU.
    """
    global _recorded
    before, _recorded = _recorded, []
    try:
        with implementation("kernels"):
            yield _recorded
    finally:
        _recorded = before


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: Any,
) -> None:
    """Launches a kernel: `arguments` in its order, then its constexpr parameters by name."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, arguments, constants, num_warps, num_stages, grid))
    elif all(grid):
        kernel[grid](*arguments, **constants, num_warps=num_warps, num_stages=num_stages)


def interpreted() -> bool:
    """Whether kernels run in the interpreter, whose matrix products know no bf16."""
    return triton is not None and triton.knobs.runtime.interpret
