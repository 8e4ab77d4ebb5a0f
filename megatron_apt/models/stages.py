"""How a network is cut into pipeline stages, and what travels between them.

A stage is a run of neighbouring blocks. Everything a block needs besides its own weights
travels with the hidden states: the condition vector, the modulation projected once for
all blocks, and of a discriminator the tokens of the heads passed so far. So every
parameter lies in exactly one stage, no gradient has to be summed over the pipeline, and
parameters keep the names they have in the whole network, whatever the number of stages.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_apt.models.layout import Layout, chunk
from megatron_apt.parallel.mesh import Axis

State = dict[str, Tensor]  # what one stage gives to the next, by name


@dataclass(frozen=True)
class Cut:
    """A network of `stages` stages, of which this rank holds some."""

    stages: int = 1
    mine: tuple[int, ...] = (0,)

    def blocks(self, depth: int, stage: int) -> range:
        """Blocks (from 0) of a stage of a network `depth` blocks deep."""
        return range(*chunk(depth, self.stages, stage))

    def holds(self, depth: int, block: int) -> bool:
        return any(block in self.blocks(depth, stage) for stage in self.mine)

    @property
    def first(self) -> bool:
        return 0 in self.mine

    @property
    def last(self) -> bool:
        return self.stages - 1 in self.mine


WHOLE = Cut()


class Staged(nn.Module):
    """A network that runs stage by stage. Its forward runs all of them, where this rank holds all."""

    cut: Cut

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensors that travel."""
        raise NotImplementedError

    def enter(self, x: Tensor, t: Tensor, condition, layout: Layout) -> State:
        """What the first stage begins with. Arguments as in Backbone.forward."""
        raise NotImplementedError

    def run_stage(self, stage: int, state: State, layout: Layout) -> State | Tensor:
        """What leaves a stage; the network's output after the last one."""
        raise NotImplementedError

    def carried(self, stage: int, layout: Layout) -> dict[str, tuple[tuple[int, ...], bool]]:
        """Shape of each tensor that leaves a stage other than the last, and whether it
        depends on the network's input (not on weights alone).
        """
        raise NotImplementedError

    def output_shape(self, layout: Layout) -> tuple[int, ...]:
        raise NotImplementedError


def run_all(network: Staged, x: Tensor, t: Tensor, condition, layout: Layout) -> Tensor:
    """The output of a network that this rank holds whole."""
    made: State | Tensor = network.enter(x, t, condition, layout)
    for stage in range(network.cut.stages):
        made = network.run_stage(stage, cast(State, made), layout)
    return cast(Tensor, made)  # by the last stage


@torch.no_grad()
def run_line(network: Staged, x: Tensor, t: Tensor, condition, layout: Layout, axis: Axis) -> Tensor | None:
    """The output of a network whose stages lie on the ranks of an axis, one after
    another; None on all of them but the last.
    """
    before, after = (
        dist.get_global_rank(axis.group, rank) if 0 <= rank < axis.size else None
        for rank in (axis.rank - 1, axis.rank + 1)
    )
    if before is None:
        state = network.enter(x, t, condition, layout)
    else:
        state = {
            name: x.new_empty(size, dtype=network.dtype)
            for name, (size, _) in network.carried(axis.rank - 1, layout).items()
        }
        for tensor in state.values():
            dist.recv(tensor, before, group=axis.group)
    out = network.run_stage(axis.rank, state, layout)
    if after is None or isinstance(out, Tensor):
        return cast(Tensor, out)
    for name in network.carried(axis.rank, layout):
        dist.send(out[name].contiguous(), after, group=axis.group)
    return None
