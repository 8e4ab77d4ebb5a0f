"""The training loop. It knows phases, not what happens in them."""

import itertools
import math
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from megatron_apt.checkpoint import store
from megatron_apt.checkpoint.resume import begin, check_same_run, committed, warn_of_random_weights
from megatron_apt.checkpoint.save import Checkpoints
from megatron_apt.config import RunConfig, check_fits, to_dict
from megatron_apt.data.batches import Batches
from megatron_apt.data.encoding import keep
from megatron_apt.data.identity import Identity, identify
from megatron_apt.data.microbatch import Microbatch
from megatron_apt.errors import BadGradient, BadLoss, Collapse
from megatron_apt.kernels.launch import choose
from megatron_apt.lock import FolderLock, LockLost
from megatron_apt.methods.build import build_method
from megatron_apt.parallel.agree import largest, on_main
from megatron_apt.parallel.mesh import Mesh
from megatron_apt.parallel.watch import Watch
from megatron_apt.schedule.actions import Task
from megatron_apt.schedule.execute import Executor
from megatron_apt.schedule.prepare import Pipeline
from megatron_apt.schema import convert
from megatron_apt.training.fit import fitted
from megatron_apt.training.guards import CollapseAlarm, Signals, Stopped, explain
from megatron_apt.training.log import IterationValues, LogError, Means, RunLog, write_summary
from megatron_apt.training.networks import Network

Report = Callable[[int, dict[str, float]], None]


class Trainer:
    """One run on one rank: builds everything from its configuration, resumes from the
    latest checkpoint if there is one.
    """

    def __init__(self, config: RunConfig, mesh: Mesh):
        found = on_main(mesh, lambda: fitted(config))
        # No more than what was open: other differences between ranks must show
        data = replace(config.data, text_length=found.data.text_length)
        config = replace(config, model=found.model, data=data)
        check_fits(config)
        self.config, self.mesh = config, mesh
        self.method = build_method(config, mesh)
        self.batches = Batches(
            config.data,
            config.model,
            mesh,
            config.seed,
            config.global_batch,
            config.micro_batch,
            self.method.least_samples,
        )
        self.pipeline = Pipeline(config.pipeline, self.method, mesh)
        self.networks = {
            name: Network(name, role, mesh, self.pipeline.cut(name))
            for name, role in self.method.roles.items()
        }
        self.executor = Executor(self.networks, mesh)
        self.checkpoints = Checkpoints(config.output, mesh, config.retention)
        self.iteration = 0
        self._means = Means()  # of each value since the last save
        self.data = on_main(mesh, lambda: [identify(source) for source in self.batches.sources])
        on_main(mesh, lambda: keep(self.batches.sources[0], Path(config.output)))
        folder = on_main(mesh, lambda: store.latest(config.output))
        warn_of_random_weights(config)
        if folder is None:
            for network in self.networks.values():
                network.start()
        else:
            self._resume(folder)

    def _resume(self, folder) -> None:
        store.verify(folder, self.mesh)
        state = store.read_state(folder)
        trained_on = convert(
            state.get("data", []),
            list[Identity],
            f"{folder}/state.json: data",
            remedy="use an older checkpoint",
        )
        check_same_run(state["config"], to_dict(self.config), folder, trained_on, self.data)
        for name, network in self.networks.items():
            network.restore(folder, state["updates"].get(name, 0), state["sources"].get(name, ""))
        self.iteration = state["iteration"]

    def save(self, prune: bool = True) -> None:
        """Starts a commit of weights, averages, optimisers and counters of this
        iteration; with save_async=False, finishes it.

        Args:
            prune: False keeps every older checkpoint.
        """
        self.commit()  # the snapshot goes where the last one lies
        tensors = {}
        for network in self.networks.values():
            tensors |= network.sharded_state()
        state = {
            "config": to_dict(self.config),
            "data": [asdict(dataset) for dataset in self.data],
            "updates": {name: network.updates for name, network in self.networks.items()},
            "sources": {name: network.source for name, network in self.networks.items() if network.source},
            "ema": self.networks[self.config.of_method.sampled].ema is not None,
            "samples_seen": self.iteration * self.config.global_batch,
            "values": self._means.taken(),
        }
        self.checkpoints.save(self.iteration, tensors, state, prune)
        if not self.config.save_async:
            self.commit()

    def commit(self) -> None:
        """Waits for the save that is under way, if one is, and commits it."""
        if self.checkpoints.commit() and self.mesh.is_main:
            committed(self.config.output)

    def step(self) -> dict[str, float]:
        """One iteration: every phase over the global batch. Returns what to log, the same on every rank."""
        return self.run(1)[0]

    def run(self, count: int) -> list[dict[str, float]]:
        """So many iterations as one window of the pipeline. Returns what to log of each,
        the same on every rank.

        Raises:
            BadGradient, BadLoss: on every rank. On one pipeline stage before the update,
                on several at the end of the window.
        """
        first, values = self.iteration, IterationValues(count)
        phases = {phase.name: phase for phase in self.method.phases}

        def batches(iteration: int) -> list[Microbatch]:
            loaded = self.batches.iteration(first + iteration) if first + iteration >= 0 else []
            every = self.method.measure_every
            if iteration >= 0 and every and (first + iteration) % every == 0:
                for batch in loaded:
                    values.add(iteration, self.method.measure(self.executor.modules, batch))
            return loaded

        def step(task: Task) -> None:
            square, lr = self.networks[task.role].update(self.config.iterations)
            values.updated(task.iteration, task.role, square, lr)
            if self.mesh.pp.size == 1 and math.isnan(square):
                raise explain(self.networks[task.role], self.executor, phases[task.phase], batches, self.mesh)

        for iteration, metrics in enumerate(
            self.executor.run(self.pipeline.program(len(self.batches.parts), count), batches, step)
        ):
            values.add(iteration, metrics)
        rows = values.joined(self.mesh)
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
        Stopped: a signal ended training between two iterations, before the last one, with
            a checkpoint.
        FolderInUse, LockLost: another process writes to the output folder.
        LogError: a log cannot be written; training goes on from the last checkpoint.
        Collapse, BadLoss, BadGradient: training stopped by itself. The last checkpoint
            saved before the first sign is kept; there is none if config.save_every is 0.
    """
    choose(config.kernels)
    with (
        Watch(mesh.world.rank, mesh.world.size, config.guards.rank_timeout) as watch,
        FolderLock(config.output, "training", "another --output", mesh) as lock,
    ):
        on_main(mesh, lambda: begin(config))
        trainer = Trainer(config, mesh)
        trainer.checkpoints.fence = lock.check
        try:
            with Signals() as signals:
                signalled = _Loop(trainer, signals, lock, report).run()
        except LockLost:
            raise  # the folder is another's
        except BaseException as error:
            # Every rank is here
            if mesh.world.size == 1 or isinstance(error, BadLoss | BadGradient | Collapse | LogError):
                trainer.commit()
            raise
        watch.leave()
    if signalled:
        raise Stopped(signalled, config.guards)


class _Loop:
    """Iterations until the last one or a signal, and what they leave behind."""

    def __init__(self, trainer: Trainer, signals: Signals, lock: FolderLock, report: Report | None):
        self.trainer, self.signals, self.lock, self.report = trainer, signals, lock, report
        self.config, self.mesh = trainer.config, trainer.mesh
        self.alarm = CollapseAlarm(trainer.method, self.config.guards)
        self.saved = trainer.iteration
        self.trouble: ValueError | None = None  # of the main rank's files
        self.log: RunLog | None = None

    def run(self) -> int:
        """The number of the signal that ended training early; 0 if it is done."""
        config, trainer = self.config, self.trainer
        if self.mesh.is_main and trainer.iteration >= config.iterations:
            done = (
                f"{config.output} is already at iteration {trainer.iteration} of {config.iterations}; give "
                "another --output to train again"
            )
            print(
                done
                if config.iterations
                else "iterations=0: there is nothing to train; give --iterations of at least 1"
            )
        self._noting(self._open_log)
        signalled, _ = self._agree()
        try:
            while trainer.iteration < config.iterations and not signalled:
                began, first = time.perf_counter(), trainer.iteration
                rows = trainer.run(_window(config, self.mesh, first))
                self._record(first, rows, (time.perf_counter() - began) / len(rows))
                signalled, writing = self._agree()
                if not writing:
                    trainer.commit()
                # A standing alarm must not push the last good checkpoint out.
                if config.save_every and trainer.iteration % config.save_every == 0 and not self.alarm.since:
                    self._save()
            if self.saved != trainer.iteration:
                self._save(prune=not self.alarm.since)
            trainer.commit()
        finally:
            self._noting(self._close_log)
        self._agree()
        return self._conclude(signalled)

    def _record(self, first: int, rows: list[dict[str, float]], seconds: float) -> None:
        for iteration, values in enumerate(rows, first + 1):
            values["seconds"] = seconds
            if self.log:
                self._noting(self.log.row, iteration, values, iteration % self.config.log_every == 0)
            if self.report and self.mesh.is_main:
                self.report(iteration, values)
            self.alarm.watch(iteration, values)

    def _save(self, prune: bool = True) -> None:
        self.trainer.save(prune)
        self.saved = self.trainer.iteration

    def _agree(self) -> list[int]:
        """(signal, whether any rank is writing), alike on all ranks.

        Raises:
            LogError, LockLost: on every rank, if the main one's files are no longer its
                own or cannot be written.
        """
        if self.lock.lost:
            self._noting(self.lock.check)
        signalled, writing, trouble = largest(
            self.mesh, self.signals.received, self.trainer.checkpoints.writing, self.trouble is not None
        )
        if trouble:
            on_main(self.mesh, self._raise)
        return [signalled, writing]

    def _raise(self) -> None:
        assert self.trouble is not None
        raise self.trouble

    def _noting(self, action: Callable[..., None], *args) -> None:
        """Keeps an error of the main rank until all ranks can raise it."""
        try:
            action(*args)
        except (LogError, LockLost) as error:
            self.trouble = self.trouble or error

    def _open_log(self) -> None:
        self.log = RunLog(self.config, self.trainer.iteration) if self.mesh.is_main else None

    def _close_log(self) -> None:
        if self.log:
            self.log.close()

    def _conclude(self, signalled: int) -> int:
        config, iteration = self.config, self.trainer.iteration
        early = signalled if iteration < config.iterations else 0
        if self.mesh.is_main and early:
            print(
                f"{config.output}: saved at iteration {iteration} of {config.iterations} and stopped by "
                f"{signal.Signals(early).name}",
                flush=True,
            )
        elif not early:
            on_main(
                self.mesh, lambda: write_summary(config.output, iteration, self.trainer.method.correlated)
            )
        return early


def _window(config: RunConfig, mesh: Mesh, iteration: int) -> int:
    """Iterations until the pipeline must drain: at a checkpoint and at the end of the
    run. One stage has nothing to overlap.
    """
    left = config.iterations - iteration
    to_save = config.save_every - iteration % config.save_every if config.save_every else left
    return min(config.pipeline.window if mesh.pp.size > 1 else 1, left, to_save)
