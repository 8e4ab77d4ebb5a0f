"""What ends a run early: signals, signs of collapse, gradients that are not finite."""

import signal
from collections.abc import Sequence
from types import FrameType

import torch.distributed as dist

from megatron_apt.config import GuardConfig
from megatron_apt.errors import BadGradient, BadLoss, Collapse
from megatron_apt.methods.base import Method, Phase, Values
from megatron_apt.networks import Network
from megatron_apt.parallel.mesh import Mesh
from megatron_apt.pipeline.execute import Executor, Load
from megatron_apt.pipeline.prepare import one_rank, without_update


class Stopped(SystemExit):
    """Training ended early, with a checkpoint, because of a signal. Its code is the process's exit code: requeue_code after SIGUSR1, else 0."""

    def __init__(self, number: int, guards: GuardConfig):
        super().__init__(guards.requeue_code if number == signal.SIGUSR1 else 0)


class CollapseAlarm:
    """Raises Collapse when a sign of collapse has lasted for guards.collapse_window iterations."""

    def __init__(self, method: Method, guards: GuardConfig):
        self.method, self.guards = method, guards
        self.since: dict[str, int] = {}

    def watch(self, iteration: int, values: Values) -> None:
        signs = self.method.signs_of_collapse(values, self.guards) if self.guards.collapse_window else {}
        self.since = {sign: self.since.get(sign, iteration) for sign in signs}
        for sign, since in self.since.items():
            if iteration - since >= self.guards.collapse_window:
                raise Collapse(f"collapse at iteration {iteration}, lasting since {since}: {signs[sign]}")


class Signals:
    """Notes SIGTERM and SIGUSR1 while it is entered; the loop then saves and ends between two iterations."""

    _WATCHED = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self):
        self.received = 0
        self._before: dict = {}

    def __enter__(self) -> "Signals":
        self._before = {number: signal.signal(number, self._note) for number in self._WATCHED}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number


def explain(network: Network, executor: Executor, phase: Phase, batches: Load, mesh: Mesh) -> Exception:
    """The error to raise for a gradient of this phase that is not finite: the same on every rank, all of which call it."""
    losses = [found for found in _gathered(executor.bad_loss, mesh) if found]
    if losses:
        return BadLoss(min(losses)[1])  # of the earliest iteration
    here = f"phase {phase.name} on rank {mesh.world.rank}"
    if mesh.pp.size > 1:  # other stages have stepped since, so it cannot be computed again
        found = _first(f"the gradient of {_named(network, network.bad)} is not finite in {here}" if network.bad else "", mesh)
    else:
        found = _locate(network, executor, phase, batches, mesh)
    return BadGradient(found or f"the gradient of {network.name} is not finite only after the sum over ranks: it overflowed")


def _named(network: Network, parameters: Sequence[str]) -> str:
    return f"{network.name}.{parameters[0]}" + (f" and of {len(parameters) - 1} more parameters" if len(parameters) > 1 else "")


def _first(message: str, mesh: Mesh) -> str:
    """The message of the first rank that has one."""
    return next(filter(None, _gathered(message, mesh)), "")


def _gathered(value, mesh: Mesh) -> list:
    """Every rank's value."""
    everyone = [None] * mesh.world.size
    dist.all_gather_object(everyone, value)
    return everyone


def _locate(network: Network, executor: Executor, phase: Phase, batches: Load, mesh: Mesh) -> str:
    """Where the gradient came from.

    The reduced gradient no longer says, so the phase is run again one microbatch at a time, without reduction and from the same weights: every
    draw is keyed, so it computes the same.
    """
    found, program = "", without_update(one_rank((phase,), 1))
    loaded = {iteration: batches(iteration) for iteration in ((0, -1) if phase.repeats else (0,))}
    for m, batch in enumerate((phase.repeats and loaded[-1]) or loaded[0]):
        network.shards.zero_grad()
        with network.accumulating(last=False):
            executor.run(program, lambda iteration, m=m: loaded[iteration][m : m + 1], lambda task: None)
        # Every microbatch runs on every rank, because others may wait in its collectives; the first find counts.
        if not found and (names := network.shards.bad_gradients()):
            found = (
                f"the gradient of {_named(network, names)} is not finite in phase {phase.name}, microbatch {m} on rank {mesh.world.rank}; "
                f"its samples: {batch.named_samples()}"
            )
    return _first(found, mesh)
