"""Runs a program: the only code that calls the networks of a method during training,
besides a method's own check.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron_apt.data.microbatch import Microbatch
from megatron_apt.methods.base import Branch, Metrics, Segment
from megatron_apt.models.layout import Layout
from megatron_apt.models.parameters import frozen
from megatron_apt.models.stages import Staged, State
from megatron_apt.parallel.deferred import WeightGradients, deferring
from megatron_apt.parallel.mesh import Mesh
from megatron_apt.schedule.actions import Action, Task
from megatron_apt.schedule.mail import Expected, Mail
from megatron_apt.schedule.program import Program

if TYPE_CHECKING:
    from megatron_apt.training.networks import Network

# Microbatches of an iteration of the window; of -1, the one before it, none if there was
# none
Load = Callable[[int], Sequence[Microbatch]]
_OUTPUT = "output"  # name of a segment's output beside the names of a state


@dataclass
class _Pass:
    """One stage of one segment between its forward and its last gradient."""

    read: State  # where gradients of its inputs gather
    # Of what it made. An edge into the graph keeps no tensor: what has been sent is freed
    # unless the graph itself needs it.
    made: dict[str, GradientEdge]
    weights: WeightGradients | None


@dataclass
class _Chain:
    """What one rank holds of one branch on one microbatch."""

    branch: Branch
    batch: Microbatch
    left: int  # actions of it still to come on this rank
    passes: dict[tuple[int, int], _Pass] = field(default_factory=dict)  # by segment and stage
    states: dict[tuple[int, int], State] = field(default_factory=dict)  # that a stage will read
    # Of segments, for those that read them and for the loss
    outputs: dict[int, Tensor] = field(default_factory=dict)
    gradients: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict)  # of what a stage made

    layouts: dict[int, Layout] = field(default_factory=dict)  # of segments

    def layout(self, segment: int) -> Layout:
        if segment not in self.layouts:
            self.layouts[segment] = self.batch.layout_for(self.branch.segments[segment].condition(self.batch))
        return self.layouts[segment]

    def add_gradients(self, segment: int, stage: int, values: Mapping[str, Tensor]) -> None:
        present = self.gradients.setdefault((segment, stage), {})
        for name, value in values.items():
            present[name] = present[name] + value if name in present else value


class Executor:
    """Executes programs on this rank's part of the networks.

    Whether a network's weights take part is decided for each action, forward and backward
    alike: recomputation inside a backward runs the network again and must see the same
    choice.
    """

    def __init__(self, networks: "dict[str, Network]", mesh: Mesh):
        self._networks, self.mesh = networks, mesh
        self.modules: dict[str, Staged] = {name: network.module for name, network in networks.items()}
        # Iteration of the first loss of this rank that was not finite, and where it arose
        self.bad_loss: tuple[int, str] | None = None

    def run(self, program: Program, batches: Load, step: Callable[[Task], None]) -> list[Metrics]:
        """Runs this rank's list; returns for each iteration the sum of its metric
        contributions on this rank.

        A loss that is not finite is noted in `bad_loss` and its gradient made so too: the
        update then stops every rank, not this one alone.

        Raises:
            Exception: any that an action raised, with a note that names rank and action.
        """
        run = _Run(self, program, batches)
        rank = self.mesh.pp.rank
        for at, action in enumerate(program.lists[rank]):
            try:
                if action.kind in ("SEND", "RECV"):
                    run.mail.post(action)
                elif action.kind == "REDUCE":
                    self._networks[action.task.role].start_reduction()
                elif action.kind == "STEP":
                    step(action.task)
                else:
                    run.compute(action, at)
            except Exception as error:
                error.add_note(
                    f"in action {action} on rank {self.mesh.world.rank}, stage rank {rank} of the pipeline"
                )
                raise
        run.mail.finish()
        return run.metrics


class _Run:
    """One run of one program on one rank."""

    def __init__(self, executor: Executor, program: Program, batches: Load):
        self._executor, self._networks, self._program, self._batches = (
            executor,
            executor._networks,
            program,
            batches,
        )
        self._mesh, self._rank = executor.mesh, executor.mesh.pp.rank
        self._window, self._graph = program.graph.window, program.graph
        self._branches = {
            (phase.name, branch.name): branch for phase in self._window.phases for branch in phase.branches
        }
        # Layers of Transformer Engine in a pipeline are built to delay their weight
        # gradients, whatever the schedule.
        self._defers = self._window.split or (self._mesh.pp.size > 1 and self._mesh.device.type == "cuda")
        self.metrics: list[Metrics] = [{} for _ in range(self._window.iterations)]
        self._chains: dict[tuple, _Chain] = {}
        self._loaded: dict[int, Sequence[Microbatch]] = {}
        self.mail = Mail(self._mesh, self._expected)
        self._repeats = {phase.name: phase.repeats for phase in self._window.phases}
        mine = [action.task for action in program.lists[self._rank] if action.kind in ("F", "I", "W")]
        self._left = Counter(self._key(task) for task in mine)
        self._left_of_iteration = Counter(self._drawn_in(task)[0] for task in mine)

    @staticmethod
    def _key(task: Task) -> tuple:
        return task.iteration, task.phase, task.branch, task.microbatch

    def _drawn_in(self, task: Task) -> tuple[int, str]:
        """Iteration and phase whose samples and draws a task works on."""
        repeated = self._repeats[task.phase]
        if repeated and (task.iteration or self._has_past):
            return task.iteration - 1, repeated
        return task.iteration, task.phase

    @cached_property
    def _has_past(self) -> bool:
        """Whether the run had an iteration before this window; its microbatches are kept
        for the tasks that take them again.
        """
        before = self._batches(-1)
        if before:
            self._loaded[-1] = before
        return bool(before)

    @cached_property
    def _closing(self) -> set[int]:
        """Places in the list after which no more gradient of that kind comes to those
        weights before the step.

        From the first of them on a bucket of gradients may complete, and starts on its
        way when the last of them has added to it. In a pipeline all buckets start at
        REDUCE instead, in one order: data-parallel ranks with different numbers of
        microbatches run different schedules, and their buckets would complete in
        different orders.
        """
        if len(self._program.lists) > 1:
            return set()
        last: dict[tuple, int] = {}
        for i, action in enumerate(self._program.lists[self._rank]):
            if action.kind in ("I", "W"):
                last[action.task._replace(microbatch=-1)] = i
        return set(last.values())

    def _rank_of(self, role: str, stage: int) -> int:
        return self._window.placement[role][stage]

    def _last_stage(self, role: str) -> int:
        return len(self._window.placement[role]) - 1

    # --- computing

    def compute(self, action: Action, at: int) -> None:
        task = action.task
        chain = self._chain(task)
        for source in map(self._graph.tasks.__getitem__, self._graph.sources[self._graph.number[task]]):
            self._take_in(source)
            if source.iteration > task.iteration:  # made ahead, for the next iteration as well
                (r,) = (
                    r
                    for r, read in enumerate(chain.branch.segments)
                    if read.ahead == (source.phase, source.branch, source.segment)
                )
                chain.outputs[r] = self._chain(source).outputs[source.segment].detach()
        segment = chain.branch.segments[task.segment]
        if action.kind == "F":
            self._forward(task, segment, chain)
        else:
            with (
                self._networks[segment.role].accumulating(last=at in self._closing)
                if segment.grad == "full"
                else contextlib.nullcontext()
            ):
                self._backward(task, segment, chain) if action.kind == "I" else self._weight_gradients(
                    task, chain
                )
        chain.left -= 1
        if not chain.left:
            del self._chains[self._key(task)]
        drawn_in, _ = self._drawn_in(task)
        self._left_of_iteration[drawn_in] -= 1
        if not self._left_of_iteration[drawn_in]:
            self._loaded.pop(drawn_in, None)

    def _chain(self, task: Task) -> _Chain:
        key = self._key(task)
        if key not in self._chains:
            iteration, phase = self._drawn_in(task)
            if iteration not in self._loaded:
                self._loaded[iteration] = self._batches(iteration)
            batch = self._loaded[iteration][task.microbatch].for_phase(phase)
            self._chains[key] = _Chain(self._branches[task.phase, task.branch], batch, self._left[key])
        return self._chains[key]

    def _context(self, segment: Segment):
        if segment.grad == "none":
            return torch.no_grad()
        return (
            frozen(self._executor.modules[segment.role])
            if segment.grad == "input"
            else contextlib.nullcontext()
        )

    def _forward(self, task: Task, segment: Segment, chain: _Chain) -> None:
        s, stage, network = task.segment, task.stage, self._executor.modules[segment.role]
        store = WeightGradients() if self._defers and segment.grad == "full" else None
        with self._context(segment), deferring(store):
            layout = chain.layout(s)
            if stage == 0:
                read = {str(r): chain.outputs[r] for r in segment.reads}
                x, t = segment.feed(chain.batch, chain.outputs)
                state = network.enter(x, t, segment.condition(chain.batch), layout)
            else:
                read = state = chain.states.pop((s, stage))
            made = network.run_stage(stage, state, layout)
        made = {_OUTPUT: made.to(chain.batch.x.dtype)} if isinstance(made, Tensor) else made
        if segment.grad != "none":
            edges = {name: get_gradient_edge(value) for name, value in made.items() if value.requires_grad}
            chain.passes[s, stage] = _Pass(read, edges, store)
        given = {name: value.detach().requires_grad_(value.requires_grad) for name, value in made.items()}
        if _OUTPUT not in given:
            self._give(
                task,
                self._rank_of(task.role, stage + 1),
                given,
                lambda: chain.states.update({(s, stage + 1): given}),
            )
            return
        chain.outputs[s] = given[_OUTPUT]
        for rank in self._program.receivers.get(self._graph.number[task], ()):
            self.mail.write(task, rank, [given[_OUTPUT]])
        if s == len(chain.branch.segments) - 1:
            self._loss(task, chain)

    def _loss(self, task: Task, chain: _Chain) -> None:
        output = chain.outputs[task.segment]
        loss, metrics = chain.branch.loss(
            chain.batch, {r: value.detach() for r, value in chain.outputs.items()} | {task.segment: output}
        )
        # The host waits for one number; a bad loss found only at the update could not be
        # named
        if not torch.isfinite(loss):
            where = (
                f"phase {task.phase}, branch {task.branch}, microbatch {task.microbatch} on rank "
                f"{self._mesh.world.rank}"
            )
            bad = (
                f"loss of {where} is {loss.item()} in iteration {chain.batch.iteration + 1}; its samples: "
                f"{chain.batch.named_samples()}"
            )
            self._executor.bad_loss = self._executor.bad_loss or (task.iteration, bad)
            loss = loss * float("nan")
        if loss.requires_grad:
            loss.backward()
            self._collect(task.segment, output, chain)
        total = self.metrics[task.iteration]
        for name, value in metrics.items():
            total[name] = total[name] + value if name in total else value

    def _collect(self, segment: int, output: Tensor, chain: _Chain) -> None:
        """Moves the gradient that has gathered at a segment's output to where its last stage finds it."""
        gradient, output.grad = output.grad, None
        assert gradient is not None
        last = self._last_stage(chain.branch.segments[segment].role)
        chain.add_gradients(segment, last, {_OUTPUT: gradient})

    def _backward(self, task: Task, segment: Segment, chain: _Chain) -> None:
        s, stage = task.segment, task.stage
        one, arrived = chain.passes[s, stage], chain.gradients.pop((s, stage))
        names = [name for name in one.made if name in arrived]
        with self._context(segment), deferring(one.weights):
            torch.autograd.backward([one.made[name] for name in names], [arrived[name] for name in names])
        if one.weights is not None and not self._window.split:
            one.weights.run()
        one.made = {}
        read, one.read = one.read, {}
        if segment.grad == "input":
            del chain.passes[s, stage]
        if stage:
            gradients = {name: _gradient(value) for name, value in read.items() if value.requires_grad}
            self._give(
                task,
                self._rank_of(task.role, stage - 1),
                gradients,
                lambda: chain.add_gradients(s, stage - 1, gradients),
            )
            return
        for r in self._differentiated(chain.branch, segment):
            rank = self._rank_of(
                chain.branch.segments[r].role, self._last_stage(chain.branch.segments[r].role)
            )
            if rank == self._rank:
                self._collect(r, chain.outputs[r], chain)
            else:
                gradient, chain.outputs[r].grad = _gradient(chain.outputs[r]), None
                self.mail.write(task, rank, [gradient])

    @staticmethod
    def _differentiated(branch: Branch, segment: Segment) -> list[int]:
        """Segments to whose outputs this one sends a gradient."""
        return [r for r in segment.reads if branch.segments[r].grad != "none"]

    def _weight_gradients(self, task: Task, chain: _Chain) -> None:
        """Without a split they came with the input gradients, and this only marks when
        the activations are gone.
        """
        weights = chain.passes.pop((task.segment, task.stage)).weights
        if weights is not None:
            weights.run()

    # --- messages

    def _give(self, task: Task, rank: int, values: State, here: Callable[[], None]) -> None:
        if rank == self._rank:
            here()
        else:
            self.mail.write(task, rank, list(values.values()))

    def _expected(self, source: Task) -> list[Expected]:
        """The tensors in the message with an action's result."""
        chain = self._chain(source)
        segment, samples = chain.branch.segments[source.segment], chain.batch.x.dtype
        network = self._executor.modules[segment.role]
        if source.kind == "F" and source.stage == self._last_stage(segment.role):
            return [
                Expected(
                    _OUTPUT,
                    network.output_shape(chain.layout(source.segment)),
                    samples,
                    segment.grad != "none",
                )
            ]
        if source.kind == "F" or source.stage:
            stage = source.stage if source.kind == "F" else source.stage - 1
            found = []
            for name, (shape, through) in network.carried(stage, chain.layout(source.segment)).items():
                differentiated = segment.grad == "full" or (through and segment.grad == "input")
                if source.kind == "F" or differentiated:
                    found.append(Expected(name, shape, network.dtype, differentiated))
            return found
        found = []
        for r in self._differentiated(chain.branch, segment):
            producer = chain.branch.segments[r].role
            if self._rank_of(producer, self._last_stage(producer)) == self._rank:
                found.append(
                    Expected(
                        str(r), self._executor.modules[producer].output_shape(chain.layout(r)), samples, False
                    )
                )
        return found

    def _take_in(self, source: Task) -> None:
        """Waits for the message with the result of an action of another rank, if it has
        not been waited for yet.
        """
        message = self.mail.take(source)
        if not message:
            return
        chain = self._chain(source)
        if source.kind == "F":
            values = {one.name: tensor.requires_grad_(one.differentiated) for one, tensor in message}
            if _OUTPUT in values:
                chain.outputs[source.segment] = values[_OUTPUT]
            else:
                chain.states[source.segment, source.stage + 1] = values
            return
        for one, tensor in message:
            if source.stage:
                chain.add_gradients(source.segment, source.stage - 1, {one.name: tensor})
            else:
                segment = int(one.name)
                last = self._last_stage(chain.branch.segments[segment].role)
                chain.add_gradients(segment, last, {_OUTPUT: tensor})


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
