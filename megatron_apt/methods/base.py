"""What a method is: roles, and phases made of branches made of segments.

Segment(role, grad, ...)         one pass through one network; grad is full, input (its
                                 weights are frozen here) or none (no gradient at all)
Branch(name, segments, loss)     a chain of segments that ends in a loss; runs once per
                                 microbatch
Phase(name, branches, updates)   the optimiser step of one role closes it
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor, nn

from megatron_apt.config import GuardConfig, OptimizerConfig
from megatron_apt.data.microbatch import Microbatch
from megatron_apt.models.condition import Condition
from megatron_apt.models.parameters import declared
from megatron_apt.models.stages import Cut, Staged

Grad = Literal["full", "input", "none"]
Metrics = dict[str, Tensor]
Outputs = Mapping[int, Tensor]  # of segments of a branch, by number
Values = dict[str, float]


Inputs = tuple[Tensor, Tensor]  # x and t of a forward pass, as Backbone.forward takes them


@dataclass(frozen=True)
class Segment:
    """One pass through one network.

    Attributes:
        condition: texts of all that the network sees at once; with the microbatch's
            shapes they fix the layout, on every stage.
        feed: makes x and t from the microbatch and the outputs of earlier segments, by
            their number; gradients flow back through it.
        reads: numbers of the segments whose outputs `feed` uses. In a pipeline the others
            are not brought to where it runs.
        copies: versions of each sample that it sees at once, for the time and memory it
            takes.
        ahead: phase, branch and segment whose output in the next iteration this one's is,
            from the same weights and draws (see Phase.repeats). A schedule may then run
            that one early, in place of this one.
    """

    role: str
    grad: Grad
    condition: Callable[[Microbatch], Condition]
    feed: Callable[[Microbatch, Outputs], Inputs]
    reads: tuple[int, ...] = ()
    copies: int = 1
    ahead: tuple[str, str, int] | None = None


@dataclass(frozen=True)
class Branch:
    """A chain of segments and the loss of their outputs.

    Attributes:
        loss: returns this rank's CONTRIBUTION to the global batch's loss (they add up
            over microbatches and over data x context ranks), and contributions to
            metrics, which add up in the same way. It is differentiated with respect to
            the last segment's output alone.
        reads: numbers of the segments, besides the last, whose outputs `loss` uses.
        timings: of this branch in good schedules of the whole iteration, one for each
            that is known: the numbers of a Timing. A search begins from those schedules.
    """

    name: str
    segments: tuple[Segment, ...]
    loss: Callable[[Microbatch, Outputs], tuple[Tensor, Metrics]]
    reads: tuple[int, ...] = ()
    timings: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self):
        for s, segment in enumerate(self.segments):
            if any(not 0 <= r < s for r in segment.reads):
                raise ValueError(
                    f"branch {self.name!r}: segment {s} reads the outputs of {segment.reads}, of which some "
                    "are not before it"
                )
            if segment.grad != "none" and s not in self.backward:
                raise ValueError(
                    f"branch {self.name!r}: no gradient reaches segment {s}; its grad must be 'none'"
                )

    def readers(self, s: int) -> list[int]:
        """Segments that send a gradient back to segment s."""
        return [
            r
            for r in range(s + 1, len(self.segments))
            if s in self.segments[r].reads and self.segments[r].grad != "none"
        ]

    @cached_property
    def backward(self) -> list[int]:
        """Segments that gradients of the loss flow through."""
        last = len(self.segments) - 1
        return [
            s
            for s, segment in enumerate(self.segments)
            if segment.grad != "none" and (s == last or self.readers(s))
        ]


@dataclass(frozen=True)
class Phase:
    """Branches whose gradients one optimiser step takes.

    Attributes:
        updates: the role that steps.
        repeats: a phase whose samples and draws of the iteration before this one takes
            again; in the first iteration of a run it has its own.
    """

    name: str
    branches: tuple[Branch, ...]
    updates: str
    repeats: str = ""


def roles_of(phases: Iterable[Phase]) -> list[str]:
    """Names of the networks that the phases run, each once."""
    return sorted(
        {segment.role for phase in phases for branch in phase.branches for segment in branch.segments}
    )


@dataclass(frozen=True)
class Role:
    """A network of a method.

    Attributes:
        build: makes the stages of it that a rank holds, weights initialised from the
            run's seed.
        depth: its blocks.
        source: checkpoint its weights start from; empty keeps the initialisation.
        target: submodule that takes those weights ("" the network itself, "backbone" of a
            discriminator).
        optimizer: None for a network that is never trained.
        ema: keeps a moving average.
        trains: parameter name -> False leaves that parameter as it is.
        lr_scale: parameter name -> multiple of the learning rate.
    """

    build: Callable[[Cut], Staged]
    depth: int
    source: str = ""
    target: str = ""
    optimizer: OptimizerConfig | None = None
    ema: bool = False
    trains: Callable[[str], bool] = lambda name: True
    lr_scale: Callable[[str], float] = lambda name: 1.0

    def trained(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether the optimiser changes this parameter."""
        return self.optimizer is not None and self.trains(name) and not declared(parameter).fixed


@dataclass(frozen=True)
class Method:
    """A training method.

    Attributes:
        roles: networks by name; `sampled` of the method's settings is the one of its result.
        phases: of one iteration, in order.
        summarise: turns the summed metrics of an iteration into what is logged.
        signs_of_collapse: (logged values, thresholds) -> message per sign now present.
        correlated: pairs of logged values whose correlation over the run is reported at
            its end.
        least_samples: of a microbatch, for a method that compares samples with each
            other.
        measure, measure_every: a measurement on each microbatch at every so many
            iterations, before their phases (0: never).
    """

    roles: dict[str, Role]
    phases: tuple[Phase, ...]
    summarise: Callable[[Values], Values] = lambda values: values
    signs_of_collapse: Callable[[Values, GuardConfig], dict[str, str]] = lambda values, guards: {}
    correlated: tuple[tuple[str, str], ...] = ()
    measure: Callable[[Mapping[str, Staged], Microbatch], Metrics] = lambda networks, batch: {}
    measure_every: int = 0
    least_samples: int = 1
