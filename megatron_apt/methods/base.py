"""What a method is: roles, and phases made of branches made of segments.

Segment(role, grad, feed)     one pass through one network; grad full | input (its weights are frozen here) | none (no gradient at all)
Branch(name, segments, loss)  a chain of segments that ends in a loss; runs once per microbatch
Phase(name, branches, updates)   the optimiser step of one role closes it
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from megatron_apt.config import GuardConfig, OptimizerConfig
from megatron_apt.data.microbatch import Microbatch
from megatron_apt.models.layout import Layout
from megatron_apt.models.mmdit import Condition

Grad = Literal["full", "input", "none"]
Metrics = dict[str, Tensor]
Values = dict[str, float]


@dataclass(frozen=True)
class Inputs:
    """Arguments of one forward pass: see MMDiT.forward."""

    x: Tensor
    t: Tensor
    condition: Condition
    layout: Layout


@dataclass(frozen=True)
class Segment:
    """One pass through one network.

    `feed` makes the inputs from the microbatch and the outputs of the segments before it in the chain; gradients flow back through it.
    """

    role: str
    grad: Grad
    feed: Callable[[Microbatch, Sequence[Tensor]], Inputs]
    copies: int = 1  # versions of each sample that it sees at once, for the time and memory it takes


@dataclass(frozen=True)
class Branch:
    """A chain of segments and the loss of their outputs.

    `loss` returns this rank's CONTRIBUTION to the global batch's loss (they add up over microbatches and over data x context ranks), and
    contributions to metrics, which add up in the same way.
    """

    name: str
    segments: tuple[Segment, ...]
    loss: Callable[[Microbatch, Sequence[Tensor]], tuple[Tensor, Metrics]]


@dataclass(frozen=True)
class Phase:
    name: str
    branches: tuple[Branch, ...]
    updates: str


@dataclass(frozen=True)
class Role:
    """A network of a method.

    Attributes:
        build: makes it, weights initialised from the run's seed.
        source: checkpoint its weights start from; empty keeps the initialisation.
        target: submodule that takes those weights ("" the network itself, "backbone" of a discriminator).
        optimizer: None for a network that is never trained.
        ema: keeps a moving average.
        trains: parameter name -> False leaves that parameter as it is.
        lr_scale: parameter name -> multiple of the learning rate.
    """

    build: Callable[[], nn.Module]
    source: str = ""
    target: str = ""
    optimizer: OptimizerConfig | None = None
    ema: bool = False
    trains: Callable[[str], bool] = lambda name: True
    lr_scale: Callable[[str], float] = lambda name: 1.0


@dataclass(frozen=True)
class Method:
    """A training method.

    Attributes:
        roles: networks by name; the one to be sampled and exported is "generator".
        phases: of one iteration, in order.
        summarise: turns the summed metrics of an iteration into what is logged.
        signs_of_collapse: (logged values, thresholds) -> message per sign now present.
        correlated: pairs of logged values whose correlation over the run is reported at its end.
        least_samples: of a microbatch, for a method that compares samples with each other.
        check, check_every: a measurement on each microbatch at every so many iterations, before their phases (0: never).
    """

    roles: dict[str, Role]
    phases: tuple[Phase, ...]
    summarise: Callable[[Values], Values] = lambda values: values
    signs_of_collapse: Callable[[Values, GuardConfig], dict[str, str]] = lambda values, guards: {}
    correlated: tuple[tuple[str, str], ...] = ()
    check: Callable[[dict[str, nn.Module], Microbatch], Metrics] | None = None
    check_every: int = 0
    least_samples: int = 1
