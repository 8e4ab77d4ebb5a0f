"""A network whose stages sleep for the time they would take: real schedules and messages
for more ranks than a machine has cores.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_apt.models import parameters
from megatron_apt.models.layout import Layout
from megatron_apt.models.stages import Cut, Staged, State
from megatron_apt.parallel.deferred import current
from megatron_apt.parallel.mesh import Mesh


@dataclass(frozen=True)
class Sleep:
    """Seconds that a rank's part of a network takes for one microbatch."""

    F: float
    I: float  # noqa: E741
    W: float


class _Stage(torch.autograd.Function):
    """x + weight, slowly."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, seconds: Sleep, weight_gradient: Callable[[Tensor], None] | None
    ):
        ctx.seconds, ctx.weight_gradient = seconds, weight_gradient
        time.sleep(seconds.F)
        return x + weight

    @staticmethod
    def backward(ctx, dy: Tensor):  # ty: ignore[incompatible-method-override]  # torch says *grads
        time.sleep(ctx.seconds.I)
        if ctx.weight_gradient is not None:
            ctx.weight_gradient(dy.sum())
        if ctx.needs_input_grad[1]:
            time.sleep(ctx.seconds.W)
        return dy, dy.sum(), None, None


class Sleeper(Staged):
    """A network (models/stages.py) that adds a number per block, and whose stages sleep.

    Args:
        samples: of a microbatch; a stage takes longer for several versions of them.
        logits: returns the sum of each sample's tokens, as a discriminator does, not the
            tokens.
    """

    # Its few sums cancel almost wholly, and gradients of two schedules are compared at
    # 1e-5
    dtype = torch.float64

    def __init__(
        self, cut: Cut, mesh: Mesh, depth: int, samples: int, sleep: Sleep, logits: bool, patch_width: int
    ):
        super().__init__()
        self.cut, self.depth, self.samples, self.logits, self.patch_width = (
            cut,
            depth,
            samples,
            logits,
            patch_width,
        )
        self.share = mesh.pp.size / cut.stages  # of a rank's part in a stage
        self.sleep = sleep
        self.entry = self._number() if cut.first else None
        self.blocks = nn.ParameterDict({str(i): self._number() for i in range(depth) if cut.holds(depth, i)})

    @staticmethod
    def _number() -> nn.Parameter:
        return parameters.declare(nn.Parameter(torch.zeros((), dtype=Sleeper.dtype)), parameters.zeros)

    def enter(self, x: Tensor, t: Tensor, condition, layout: Layout) -> State:
        assert self.entry is not None  # a first stage's
        return {"h": x + self.entry}

    def run_stage(self, stage: int, state: State, layout: Layout) -> State | Tensor:
        def weight() -> Tensor:
            return torch.stack([self.blocks[str(i)] for i in self.cut.blocks(self.depth, stage)]).sum()

        size, store = layout.samples / self.samples * self.share, current()
        seconds = Sleep(size * self.sleep.F, size * self.sleep.I, size * self.sleep.W)
        if store is None or not weight().requires_grad:
            h = _Stage.apply(state["h"], weight(), seconds, None)
        else:  # as in parallel/deferred.py

            @torch.enable_grad()
            def put_off(gradient: Tensor) -> None:
                time.sleep(seconds.W)
                torch.autograd.backward(weight(), gradient)

            h = _Stage.apply(
                state["h"],
                weight().detach(),
                seconds,
                lambda gradient: store.later(lambda: put_off(gradient)),
            )
        if stage < self.cut.stages - 1:
            return {"h": h}
        return layout.sample_sum(h) if self.logits else h

    def carried(self, stage: int, layout: Layout) -> dict[str, tuple[tuple[int, ...], bool]]:
        return {"h": (self._tokens(layout), True)}

    def output_shape(self, layout: Layout) -> tuple[int, ...]:
        return (layout.samples,) if self.logits else self._tokens(layout)

    def _tokens(self, layout: Layout) -> tuple[int, ...]:
        return len(layout.positions), self.patch_width
