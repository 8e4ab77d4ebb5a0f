"""What ends a run early: signals, signs of collapse, gradients that are not finite."""

import os
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType

import torch.distributed as dist

from megatron_apt.config import GuardConfig
from megatron_apt.errors import BadGradient, BadLoss, Collapse
from megatron_apt.methods.base import Method, Phase, Values
from megatron_apt.parallel.mesh import Mesh
from megatron_apt.schedule.execute import Executor, Load
from megatron_apt.schedule.prepare import one_rank, without_update
from megatron_apt.training import signals
from megatron_apt.training.networks import Network

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
# Seconds in which several SIGINT are one: torchrun passes on what the terminal has sent
# already
_ONE_PRESS = 2.0


class Stopped(SystemExit):
    """A signal ended training before its last iteration, with a checkpoint. Its code is
    the process's exit code, never 0.
    """

    def __init__(self, number: int, guards: GuardConfig):
        super().__init__(INTERRUPTED if number == signal.SIGINT else guards.requeue_code)


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
    """Notes SIGTERM, SIGUSR1 and Ctrl-C while it is entered; the loop then saves and ends
    between two iterations. A second Ctrl-C ends at once.
    """

    _WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self):
        self.received = 0
        self._before: dict = {}
        self._interrupted = 0.0

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = {number: signal.signal(number, self._note) for number in self._WATCHED}
        signals.over()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted and now - self._interrupted > _ONE_PRESS:
                os._exit(INTERRUPTED)  # whatever thread or collective is at work
            if not self._interrupted and os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
                os.write(
                    2, b"\nmegatron-apt: saving after this iteration; Ctrl-C again ends at once, without\n"
                )
            self._interrupted = now
        self.received = self.received or number


def explain(network: Network, executor: Executor, phase: Phase, batches: Load, mesh: Mesh) -> Exception:
    """The error to raise for a gradient of this phase that is not finite: the same on
    every rank, all of which call it.
    """
    losses = [found for found in _gathered(executor.bad_loss, mesh) if found]
    if losses:
        return BadLoss(min(losses)[1])  # of the earliest iteration
    here = f"phase {phase.name} on rank {mesh.world.rank}"
    if mesh.pp.size > 1:  # other stages have stepped since, so it cannot be computed again
        found = _first(
            f"the gradient of {_named(network, network.bad)} is not finite in {here}" if network.bad else "",
            mesh,
        )
    else:
        found = _locate(network, executor, phase, batches, mesh)
    return BadGradient(
        found or f"the gradient of {network.name} is not finite only after the sum over ranks: it overflowed"
    )


def _named(network: Network, parameters: Sequence[str]) -> str:
    return f"{network.name}.{parameters[0]}" + (
        f" and of {len(parameters) - 1} more parameters" if len(parameters) > 1 else ""
    )


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

    The reduced gradient no longer says, so the phase is run again one microbatch at a
    time, without reduction and from the same weights: every draw is keyed, so it computes
    the same.
    """
    found, program = "", without_update(one_rank((phase,), 1))
    loaded = {iteration: batches(iteration) for iteration in ((0, -1) if phase.repeats else (0,))}
    for m, batch in enumerate((loaded[-1] if phase.repeats else ()) or loaded[0]):
        network.trained.zero_grad()
        with network.accumulating(last=False):
            executor.run(program, lambda iteration, m=m: loaded[iteration][m : m + 1], lambda task: None)
        # Every microbatch runs on every rank, because others may wait in its collectives;
        # the first find counts.
        if not found and (names := network.trained.bad_gradients()):
            found = (
                f"the gradient of {_named(network, names)} is not finite in phase {phase.name}, microbatch "
                f"{m} on rank {mesh.world.rank}; its samples: {batch.named_samples()}"
            )
    return _first(found, mesh)
