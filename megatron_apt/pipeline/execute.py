"""Runs a schedule: the only code that calls the networks of a method during training."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron_apt.data.microbatch import Microbatch
from megatron_apt.methods.base import Branch, Metrics, Phase, Segment
from megatron_apt.pipeline.actions import Action

if TYPE_CHECKING:
    from megatron_apt.networks import Network


@dataclass
class _Chain:
    """One branch on one microbatch between its first forward and its last backward."""

    batch: Microbatch
    computed: list[Tensor] = field(default_factory=list)  # outputs with their graphs
    boundary: list[Tensor] = field(default_factory=list)  # the same values cut from those graphs: what the next segment and the loss read


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, the module's parameters take no gradient, so no weight-gradient product is computed for them."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


class Executor:
    """Executes the actions of a phase on this rank's networks.

    Whether a network's weights take part is decided for each action, forward and backward alike: recomputation inside a backward runs
    the network again and must see the same choice.
    """

    def __init__(self, networks: "dict[str, Network]"):
        self._networks = networks
        self.networks: dict[str, nn.Module] = {name: network.module for name, network in networks.items()}
        self.bad_loss = ""  # where the first loss of this rank that was not finite arose

    def run(
        self, phase: Phase, actions: Sequence[Action], batches: Sequence[Microbatch], step: Callable[[str], None], last: int | None = None
    ) -> Metrics:
        """Runs every action in order; returns the sum of the branches' metric contributions.

        Args:
            last: microbatch after whose backward passes gradients are complete; None: the last one, -1: none of them.

        A loss that is not finite is noted in `bad_loss` and its gradient made so too: the update then stops every rank, not this one alone.
        """
        chains: dict[tuple[int, int], _Chain] = {}
        metrics: Metrics = {}
        last = len(batches) - 1 if last is None else last
        for action in actions:
            if action.kind == "STEP":
                step(action.role)
                continue
            branch, key = phase.branches[action.branch], (action.branch, action.microbatch)
            if action.kind == "F":
                chain = chains.setdefault(key, _Chain(batches[action.microbatch]))
                self._forward(branch, action.segment, chain)
                if action.segment == len(branch.segments) - 1:
                    for name, value in self._loss(phase, branch, action.microbatch, chain).items():
                        metrics[name] = metrics[name] + value if name in metrics else value
            else:
                segment = branch.segments[action.segment]
                with self._networks[segment.role].accumulating(last=action.microbatch == last):
                    self._backward(segment, action.segment, chains[key])
            if self._finished(branch, action):
                chains.pop(key).batch.drawn.clear()  # its noise; another branch that needs it draws it again, equal
        return metrics

    def _context(self, segment: Segment):
        if segment.grad == "none":
            return torch.no_grad()
        return frozen(self.networks[segment.role]) if segment.grad == "input" else contextlib.nullcontext()

    def _forward(self, branch: Branch, index: int, chain: _Chain) -> None:
        segment = branch.segments[index]
        with self._context(segment):
            inputs = segment.feed(chain.batch, chain.boundary)
            output = self.networks[segment.role](inputs.x, inputs.t, inputs.condition, inputs.layout)
        chain.computed.append(output)
        chain.boundary.append(output.detach().requires_grad_(segment.grad != "none"))

    def _loss(self, phase: Phase, branch: Branch, microbatch: int, chain: _Chain) -> Metrics:
        loss, metrics = branch.loss(chain.batch, chain.boundary)
        if not torch.isfinite(loss):
            where = f"phase {phase.name}, branch {branch.name}, microbatch {microbatch} on rank {chain.batch.mesh.world.rank}"
            self.bad_loss = self.bad_loss or f"loss of {where} is {loss.item()}; its samples: {chain.batch.named_samples()}"
            loss = loss * float("nan")
        if loss.requires_grad:
            loss.backward()
        return metrics

    def _backward(self, segment: Segment, index: int, chain: _Chain) -> None:
        gradient = chain.boundary[index].grad
        with self._context(segment):
            torch.autograd.backward(chain.computed[index], gradient)
        chain.computed[index] = chain.boundary[index].grad = None

    @staticmethod
    def _finished(branch: Branch, action: Action) -> bool:
        first = next((i for i, s in enumerate(branch.segments) if s.grad != "none"), None)
        return action.segment == first if action.kind == "B" else first is None and action.segment == len(branch.segments) - 1
