"""The device mesh: sizes, coordinates and process groups, made once at start-up and passed down."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Axis:
    """One direction of the mesh: how many ranks it has, which of them this process is, and their group."""

    size: int
    rank: int
    group: Any  # torch.distributed.ProcessGroup


@dataclass(frozen=True)
class Mesh:
    """Tensor (tp), context (cp), pipeline (pp) and data (dp) parallel axes.

    `dp_cp` joins dp and cp: weights are replicated over it, so gradients are summed over
    it. `stage` is every rank that holds the same pipeline stages as this one, `world`
    every rank.
    """

    tp: Axis
    cp: Axis
    pp: Axis
    dp: Axis
    dp_cp: Axis
    stage: Axis
    world: Axis
    device: torch.device
    sequence_parallel: bool  # activations between blocks are split over tp along their first dimension
    context_parallel: str  # "ulysses", "all_gather", or Transformer Engine's "p2p" and "a2a+p2p"
    row_multiple: int = 1  # each rank's part of a microbatch is padded to a multiple of so many tokens
    cp_levels: tuple[Any, ...] = ()  # with a2a+p2p: the groups of the exchange and of the ring

    @staticmethod
    def alone(device: torch.device) -> "Mesh":
        """One process that has joined no group: for what needs a model's shapes, and no collective."""
        one = Axis(1, 0, None)
        return Mesh(
            one, one, one, one, one, one, one, device, sequence_parallel=False, context_parallel="ulysses"
        )

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes logs."""
        return self.world.rank == 0
