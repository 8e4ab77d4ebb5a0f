"""What a window of iterations must compute, and what must come before what.

The nodes are the tasks of a method's phases over pipeline stages. A task is one action
on one microbatch and one stage: F forward, I input gradient, W weight gradient, or the
STEP of the stages of a role that one rank holds. Edges are of three kinds:
    data      F after the F of the stage before it, or of the segments it reads;
              I after the I behind it and after its own F; W after its own I
    version   a task that reads a role's weights comes after the STEP that plain
              alternation of the phases would give it,
    reuse     and before the next STEP of that role on its rank, which overwrites them.
Any order that keeps them computes what plain alternation computes, gradient for gradient.
In particular D's real branch may run beside the G phase, and the next iteration's G
beside the D phase.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_apt.methods.base import Branch, Phase, roles_of
from megatron_apt.schedule.actions import Task


@dataclass(frozen=True)
class Cost:
    """Time of the part of a network that one rank holds, for one microbatch, and the
    activation memory that it keeps for its gradients.
    """

    F: float = 1.0
    I: float = 1.0  # noqa: E741
    W: float = 1.0
    memory: float = 1.0

    def __mul__(self, factor: float) -> "Cost":
        return Cost(factor * self.F, factor * self.I, factor * self.W, factor * self.memory)


@dataclass(frozen=True)
class Window:
    """What is to be scheduled.

    Attributes:
        phases: of the method.
        placement: role -> rank of each of its stages, in order. Every rank holds as many
            stages as any other.
        microbatches, iterations: how many.
        costs: role -> cost of one rank's part, which its stages share equally; or one for
            each stage.
        message: time from the end of a task to the start of one on another rank that
            needs its result, for one version of a microbatch.
        split: False joins W to I, as an ordinary backward pass does.
        apart: every branch waits until the one before it has left the pipeline, on every
            rank.
        shared: microbatches of an iteration whose `Segment.ahead` takes the place of the
            segment itself, where the method has such.
    """

    phases: tuple[Phase, ...]
    placement: Mapping[str, tuple[int, ...]]
    microbatches: int
    iterations: int
    costs: Mapping[str, Cost | Sequence[Cost]]
    message: float = 0.0
    split: bool = True
    apart: bool = False
    shared: int = 0

    def __post_init__(self) -> None:
        for role in roles_of(self.phases):
            if role not in self.placement or role not in self.costs:
                raise ValueError(f"role {role!r} of the method has no placement or no cost")
            held = [self.placement[role].count(rank) for rank in range(self.ranks)]
            if len(set(held)) != 1:
                raise ValueError(
                    f"placement of {role!r} gives the ranks {held} stages; every rank must hold the same "
                    "number"
                )

    @property
    def ranks(self) -> int:
        return 1 + max(rank for ranks in self.placement.values() for rank in ranks)

    def cost(self, role: str, stage: int) -> Cost:
        """Of one stage."""
        costs = self.costs[role]
        return costs * (1 / self.chunks(role)) if isinstance(costs, Cost) else costs[stage]

    def chunks(self, role: str) -> int:
        """Stages of a role on each rank."""
        return len(self.placement[role]) // self.ranks


class Graph:
    """The tasks of a window as columns; a task is its index.

    Attributes:
        tasks: what each is.
        rank, time: where and how long.
        live: activation memory it takes (F) or frees (W, or I where the role is frozen),
            in the unit of the costs' memory.
        before, after: tasks that a task waits for, and that wait for it; to and from
            another rank there is a `delay`.
        sources: those of `before` whose results it takes.
    """

    def __init__(self, window: Window):
        self.window = window
        self.tasks: list[Task] = []
        self.rank: list[int] = []
        self.time: list[float] = []
        self.live: list[float] = []
        self.before: list[list[int]] = []
        self.sources: list[list[int]] = []
        self.number: dict[Task, int] = {}
        self._ahead: dict[tuple, list[int]] = {}  # forwards made in the iteration before, by place
        self._segments = {
            (phase.name, branch.name): branch.segments for phase in window.phases for branch in phase.branches
        }
        self._readers: dict[tuple[str, int], list[int]] = {}  # of the present version of a stage
        self._stepped: dict[tuple[str, int], int] = {}  # the STEP that made it
        flushed = 0
        for iteration in range(window.iterations):
            for phase in window.phases:
                for branch in phase.branches:
                    # Apart: the first microbatch enters when all before it is done, each
                    # further one after the one before it.
                    gate, flushed = (
                        (list(range(flushed, len(self.tasks))), len(self.tasks)) if window.apart else ([], 0)
                    )
                    for microbatch in range(window.microbatches):
                        entry = self._chain(iteration, phase, branch, microbatch, gate)
                        gate = [entry] if window.apart else []
                for rank in range(window.ranks):
                    self._step(Task("STEP", phase.updates, rank, iteration, phase.name), rank)

    # --- construction

    def _add(
        self, task: Task, rank: int, time: float, live: float, sources: Sequence[int], before: Sequence[int]
    ) -> int:
        number = self.number[task] = len(self.tasks)
        self.tasks.append(task)
        self.rank.append(rank)
        self.time.append(time)
        self.live.append(live)
        self.sources.append(list(dict.fromkeys(sources)))
        self.before.append(list(dict.fromkeys((*sources, *before))))
        return number

    def _chain(self, iteration: int, phase: Phase, branch: Branch, microbatch: int, gate: list[int]) -> int:
        """Adds one branch of one microbatch; returns its first task."""
        window, last = self.window, len(branch.segments) - 1
        forward: list[list[int]] = []  # for each segment and stage
        for s, segment in enumerate(branch.segments):
            made = self._ahead.pop((iteration, phase.name, branch.name, s, microbatch), None)
            if segment.ahead and microbatch < window.shared and iteration + 1 < window.iterations:
                place = (iteration + 1, *segment.ahead, microbatch)
                made = self._ahead[place] = self._forwards(*place, [], [])
            sources = [forward[r][-1] for r in segment.reads]
            gated = [] if segment.reads else gate
            losses = [forward[r][-1] for r in branch.reads if r != s] if s == last else []
            forward.append(
                made
                or self._forwards(iteration, phase.name, branch.name, s, microbatch, sources, gated, losses)
            )
        inputs: dict[int, int] = {}  # segment -> I of its first stage
        for s in reversed(branch.backward):
            segment = branch.segments[s]
            behind = [inputs[reader] for reader in branch.readers(s)]
            for own in reversed(forward[s]):
                task, full, rank = self.tasks[own], segment.grad == "full", self.rank[own]
                cost = window.cost(segment.role, task.stage) * segment.copies
                joined = cost.W if full and not window.split else 0.0
                inputs[s] = self._read(
                    task._replace(kind="I"),
                    rank,
                    cost.I + joined,
                    0.0 if full else -cost.memory,
                    [*behind, own],
                )
                if full:
                    self._read(task._replace(kind="W"), rank, cost.W - joined, -cost.memory, [inputs[s]])
                behind = [inputs[s]]
        return forward[0][0]

    def _forwards(
        self,
        iteration: int,
        phase: str,
        branch: str,
        s: int,
        microbatch: int,
        sources: list[int],
        gate: Sequence[int],
        losses: Sequence[int] = (),
    ) -> list[int]:
        """Adds the forward of each stage of a segment. `sources` are what its first stage
        reads, `losses` what a loss reads beside the last one.
        """
        segment, found = self._segments[phase, branch][s], []
        for stage, rank in enumerate(self.window.placement[segment.role]):
            cost = self.window.cost(segment.role, stage) * segment.copies
            if stage == len(self.window.placement[segment.role]) - 1:
                sources = [*sources, *losses]
            task = Task("F", segment.role, stage, iteration, phase, branch, s, microbatch)
            live = cost.memory if segment.grad != "none" else 0.0
            found.append(self._read(task, rank, cost.F, live, sources, gate if stage == 0 else ()))
            sources = found[-1:]
        return found

    def _read(
        self, task: Task, rank: int, time: float, live: float, sources: list[int], gate: Sequence[int] = ()
    ) -> int:
        """Adds a task that reads the present version of its stage's weights."""
        place = (task.role, rank)
        version = [self._stepped[place]] if place in self._stepped else []
        number = self._add(task, rank, time, live, sources, [*gate, *version])
        self._readers.setdefault(place, []).append(number)
        return number

    def _step(self, task: Task, rank: int) -> None:
        place = (task.role, rank)
        self._stepped[place] = self._add(task, rank, 0.0, 0.0, [], self._readers.pop(place, []))

    # --- reading

    @cached_property
    def after(self) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in self.tasks]
        for task, sources in enumerate(self.before):
            for source in sources:
                found[source].append(task)
        return found

    def delay(self, source: int, task: int) -> float:
        return self.message[source] if self.rank[source] != self.rank[task] else 0.0

    @cached_property
    def message(self) -> list[float]:
        """Time of a message with each task's result."""
        return [
            0.0
            if t.kind == "STEP"
            else self.window.message * self._segments[t.phase, t.branch][t.segment].copies
            for t in self.tasks
        ]

    @cached_property
    def load(self) -> list[float]:
        """Work of each rank."""
        found = [0.0] * self.window.ranks
        for rank, time in zip(self.rank, self.time, strict=True):
            found[rank] += time
        return found
