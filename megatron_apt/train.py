"""The training loop. It knows phases, not what happens in them."""

import itertools
import math
import signal
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_apt.checkpoint import store
from megatron_apt.checkpoint.resume import check_same_run, warn_of_random_weights
from megatron_apt.checkpoint.save import Checkpoints
from megatron_apt.config import RunConfig, check_fits, to_dict
from megatron_apt.data.batches import Batches
from megatron_apt.data.microbatch import Microbatch
from megatron_apt.errors import BadGradient, BadLoss, Collapse
from megatron_apt.guards import CollapseAlarm, Signals, Stopped, explain
from megatron_apt.kernels.launch import choose
from megatron_apt.log import Means, Pieces, RunLog, write_summary
from megatron_apt.methods import METHODS
from megatron_apt.networks import Network
from megatron_apt.parallel.mesh import Mesh
from megatron_apt.parallel.watch import Watch
from megatron_apt.pipeline.actions import Task
from megatron_apt.pipeline.execute import Executor
from megatron_apt.pipeline.prepare import Pipeline

Report = Callable[[int, dict[str, float]], None]


class Trainer:
    """One run on one rank: builds everything from its configuration, resumes from the latest checkpoint if there is one."""

    def __init__(self, config: RunConfig, mesh: Mesh):
        check_fits(config)
        self.config, self.mesh = config, mesh
        self.method = METHODS[config.method](config, mesh)
        self.batches = Batches(config.data, config.model, mesh, config.seed, config.global_batch, config.micro_batch, self.method.least_samples)
        self.pipeline = Pipeline(config.pipeline, self.method, mesh)
        self.networks = {name: Network(name, role, mesh, self.pipeline.cut(name)) for name, role in self.method.roles.items()}
        self.executor = Executor(self.networks, mesh)
        self.checkpoints = Checkpoints(config.output, mesh, config.retention)
        self.iteration = 0
        self._means = Means()  # of each value since the last save
        folder = store.latest(config.output)
        warn_of_random_weights(config)
        if folder is None:
            for network in self.networks.values():
                network.start()
        else:
            self._resume(folder)

    def _resume(self, folder) -> None:
        store.verify(folder, self.mesh)
        state = store.read_state(folder)
        check_same_run(state["config"], to_dict(self.config), folder)
        for name, network in self.networks.items():
            network.restore(folder, state["updates"].get(name, 0), state["sources"].get(name, ""))
        self.iteration = state["iteration"]

    def save(self, prune: bool = True) -> None:
        """Starts a commit of weights, averages, optimisers and counters of this iteration; with save_async=False, finishes it.

        Args:
            prune: False keeps every older checkpoint.
        """
        self.checkpoints.commit()  # the snapshot goes where the last one lies
        tensors = {}
        for network in self.networks.values():
            tensors |= network.sharded_state()
        state = {
            "config": to_dict(self.config),
            "updates": {name: network.updates for name, network in self.networks.items()},
            "sources": {name: network.source for name, network in self.networks.items() if network.source},
            "ema": self.networks["generator"].ema is not None,
            "samples_seen": self.iteration * self.config.global_batch,
            "values": self._means.taken(),
        }
        self.checkpoints.save(self.iteration, tensors, state, prune)
        if not self.config.save_async:
            self.checkpoints.commit()

    def step(self) -> dict[str, float]:
        """One iteration: every phase over the global batch. Returns what to log, the same on every rank."""
        return self.run(1)[0]

    def run(self, count: int) -> list[dict[str, float]]:
        """So many iterations as one window of the pipeline. Returns what to log of each, the same on every rank.

        Raises:
            BadGradient, BadLoss: on every rank. On one pipeline stage before the update, on several at the end of the window.
        """
        first, pieces = self.iteration, Pieces(count)
        phases = {phase.name: phase for phase in self.method.phases}

        def batches(iteration: int) -> list[Microbatch]:
            loaded = self.batches.iteration(first + iteration) if first + iteration >= 0 else []
            if iteration >= 0 and self.method.check_every and (first + iteration) % self.method.check_every == 0:
                for batch in loaded:
                    pieces.add(iteration, self.method.check(self.executor.modules, batch))
            return loaded

        def step(task: Task) -> None:
            square, lr = self.networks[task.role].update(self.config.iterations)
            pieces.updated(task.iteration, task.role, square, lr)
            if self.mesh.pp.size == 1 and math.isnan(square):
                raise explain(self.networks[task.role], self.executor, phases[task.phase], batches, self.mesh)

        for iteration, metrics in enumerate(self.executor.run(self.pipeline.program(len(self.batches.parts), count), batches, step)):
            pieces.add(iteration, metrics)
        rows = pieces.joined(self.mesh)
        for row, phase in itertools.product(rows, self.method.phases):
            if math.isnan(row[f"{phase.updates}/grad_norm"]):
                raise explain(self.networks[phase.updates], self.executor, phase, batches, self.mesh)
        self.iteration += count
        rows = [self.method.summarise(row) for row in rows]
        for row in rows:
            self._means.add(row)
        return rows


def train(config: RunConfig, mesh: Mesh, report: Report | None = None) -> None:
    """Trains to config.iterations, resuming if the output folder holds a checkpoint.

    Args:
        report: called on the main rank after every iteration with (iteration, values).

    Raises:
        Stopped: SIGTERM or SIGUSR1 ended training between two iterations, with a checkpoint.
        Collapse, BadLoss, BadGradient: training stopped by itself. The last checkpoint saved before the first sign is kept; there is none
            if config.save_every is 0.
    """
    choose(config.kernels)
    with Watch(mesh.world.rank, mesh.world.size, config.guards.rank_timeout) as watch:
        trainer = Trainer(config, mesh)
        try:
            with Signals() as signals:
                signalled = _loop(trainer, signals, report)
        except BaseException as error:
            if mesh.world.size == 1 or isinstance(error, BadLoss | BadGradient | Collapse):  # every rank is here
                trainer.checkpoints.commit()
            raise
        watch.leave()
    if signalled:
        raise Stopped(signalled, config.guards)


def _loop(trainer: Trainer, signals: Signals, report: Report | None) -> int:
    """Iterations until the last one or a signal, whose number it returns, and what they leave behind."""
    config, mesh = trainer.config, trainer.mesh
    alarm = CollapseAlarm(trainer.method, config.guards)
    log = RunLog(config, trainer.iteration) if mesh.is_main else None
    saved, signalled = trainer.iteration, 0
    if log and trainer.iteration >= config.iterations:
        print(f"{config.output} is already at iteration {trainer.iteration} of {config.iterations}; give another --output to train again")
    try:
        while trainer.iteration < config.iterations and not signalled:
            began, first = time.perf_counter(), trainer.iteration
            rows = trainer.run(_window(config, mesh, first))
            seconds = (time.perf_counter() - began) / len(rows)
            for iteration, values in enumerate(rows, first + 1):
                values["seconds"] = seconds
                if log:
                    log.row(iteration, values, scalars=iteration % config.log_every == 0)
                if report and mesh.is_main:
                    report(iteration, values)
                alarm.watch(iteration, values)
            signalled, writing = _agreed(mesh, signals.received, trainer.checkpoints.writing)
            if not writing:
                trainer.checkpoints.commit()
            # A standing alarm must not push the last good checkpoint out.
            if config.save_every and trainer.iteration % config.save_every == 0 and not alarm.since:
                trainer.save()
                saved = trainer.iteration
        if saved != trainer.iteration:
            trainer.save(prune=not alarm.since)
        trainer.checkpoints.commit()
    finally:
        if log:
            log.close()
    if log and signalled:
        print(f"{config.output}: saved at iteration {trainer.iteration} of {config.iterations} and stopped by {signal.Signals(signalled).name}")
    elif log:
        write_summary(config.output, trainer.iteration, trainer.method.correlated)
    return signalled


def _window(config: RunConfig, mesh: Mesh, iteration: int) -> int:
    """Iterations until the pipeline must drain: at a checkpoint and at the end of the run. One stage has nothing to overlap."""
    left = config.iterations - iteration
    to_save = config.save_every - iteration % config.save_every if config.save_every else left
    return min(config.pipeline.window if mesh.pp.size > 1 else 1, left, to_save)


def _agreed(mesh: Mesh, *flags: int) -> list[int]:
    """The largest of each number over all ranks, so that every rank decides alike."""
    if mesh.world.size == 1:
        return list(flags)
    largest = torch.tensor(flags, device=mesh.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=mesh.world.group)
    return largest.tolist()
