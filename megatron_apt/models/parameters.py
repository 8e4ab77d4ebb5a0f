"""What a parameter's shards are, how they start, and which gradients are partial.

Every parameter carries three facts set where it is built:
    sharded_dim   the dimension split over tensor parallelism, or None when every rank
                  holds it whole
    tp_partial    True when each tensor-parallel rank sees only a part of the tokens or
                  heads, so that its gradient is a part of the sum
    fixed         True for a table that belongs to checkpoints but is never trained, and
                  so has no average either
"""

import contextlib
import math
from collections.abc import Callable, Generator
from typing import cast

import torch
from torch import Tensor, nn

from megatron_apt.kernels.keyed_noise import derive_key
from megatron_apt.parallel.mesh import Mesh

Init = Callable[[Tensor, torch.Generator], None]


def xavier(weight: Tensor, generator: torch.Generator) -> None:
    nn.init.xavier_uniform_(weight, generator=generator)


def zeros(weight: Tensor, generator: torch.Generator) -> None:
    weight.zero_()


def ones(weight: Tensor, generator: torch.Generator) -> None:
    weight.fill_(1.0)


def normal(std: float) -> Init:
    def fill(weight: Tensor, generator: torch.Generator) -> None:
        weight.normal_(std=std, generator=generator)

    return fill


def declare(
    parameter: nn.Parameter,
    init: Init,
    sharded_dim: int | None = None,
    tp_partial: bool = False,
    fixed: bool = False,
) -> nn.Parameter:
    """Attaches the facts of this module's docstring to a parameter."""
    one = declared(parameter)
    one.initial = init
    one.sharded_dim = sharded_dim
    one.tp_partial = tp_partial
    one.fixed = fixed
    parameter.requires_grad_(not fixed)
    return parameter


class Declared(nn.Parameter):
    """The type of a parameter with the facts of this module's docstring; nothing is of this class.

    Attributes:
        main_grad: where Megatron-Core gathers the gradient of one that trains.
    """

    initial: Init
    sharded_dim: int | None
    tp_partial: bool
    fixed: bool
    main_grad: Tensor


def declared(parameter: nn.Parameter) -> Declared:
    """The same parameter, whose facts a type checker knows."""
    return cast(Declared, parameter)


def column_linear(
    part: type,
    width_in: int,
    width_out: int,
    config,
    mesh: Mesh,
    init: Init = xavier,
    gather_output: bool = False,
) -> nn.Module:
    """A linear layer whose output features are split over tensor parallelism."""
    layer = part(
        width_in,
        width_out,
        config=config,
        init_method=lambda weight: None,
        gather_output=gather_output,
        bias=True,
        skip_bias_add=False,
        is_expert=False,
        tp_comm_buffer_name=None,
        tp_group=mesh.tp.group,
    )
    declare(layer.weight, init, sharded_dim=0)
    declare(layer.bias, zeros, sharded_dim=0)
    return layer


def row_linear(
    part: type, width_in: int, width_out: int, config, mesh: Mesh, init: Init = xavier
) -> nn.Module:
    """A linear layer whose input features are split over tensor parallelism."""
    layer = part(
        width_in,
        width_out,
        config=config,
        init_method=lambda weight: None,
        bias=True,
        input_is_parallel=True,
        skip_bias_add=False,
        is_expert=False,
        tp_comm_buffer_name=None,
        tp_group=mesh.tp.group,
    )
    declare(layer.weight, init, sharded_dim=1)
    declare(layer.bias, zeros, tp_partial=config.sequence_parallel)
    return layer


class _Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """`initialise` fills every parameter. (nn.utils.skip_init imports sympy on the
        meta device, which takes half a second.)
        """


def linear(
    width_in: int, width_out: int, dtype: torch.dtype, init: Init = xavier, tp_partial: bool = False
) -> nn.Linear:
    """A linear layer that every tensor-parallel rank holds whole."""
    layer = _Linear(width_in, width_out, dtype=dtype)
    for parameter, start in ((layer.weight, init), (layer.bias, zeros)):
        declare(cast(nn.Parameter, parameter), start, tp_partial=tp_partial)
    return layer


def full_shape(parameter: nn.Parameter, mesh: Mesh) -> tuple[int, ...]:
    """Shape of the parameter over all tensor-parallel ranks."""
    shape, dimension = list(parameter.shape), declared(parameter).sharded_dim
    if dimension is not None:
        shape[dimension] *= mesh.tp.size
    return tuple(shape)


@torch.no_grad()
def initialise(model: nn.Module, mesh: Mesh, seed: int) -> None:
    """Moves the model to the mesh's device and fills every parameter from (seed, its
    name): the same model on every mesh.

    Weights are drawn whole, in fp32 on the CPU, and each rank keeps its slice.
    """
    if mesh.device.type == "meta":
        return  # built for its shapes alone
    model.to(mesh.device)
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(derive_key(seed, "weights", name) >> 1)
        whole = torch.empty(full_shape(parameter, mesh))
        one = declared(parameter)
        one.initial(whole, generator)
        if one.sharded_dim is not None:
            whole = whole.chunk(mesh.tp.size, one.sharded_dim)[mesh.tp.rank]
        parameter.copy_(whole)


def count(model: nn.Module, mesh: Mesh) -> int:
    """Number of weights over all tensor-parallel ranks."""
    return sum(math.prod(full_shape(parameter, mesh)) for parameter in model.parameters())


@contextlib.contextmanager
def frozen(module: nn.Module) -> Generator[None]:
    """Inside, the module's parameters take no gradient, so no weight-gradient product is
    computed for them.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
