"""Builds schedules: list scheduling of tasks, whose timings are found by search.

A policy says of each branch when its microbatches want to enter the pipeline and how fast
they want to go through it; that makes every task due at some time. Going through time, a
free rank runs the task that is most overdue among those whose inputs are there. Memory is
promised in the order of due times: a forward overtakes another only if the other's
activations will still fit. So lists never get stuck unless the due times themselves ask
for more memory than there is, and due times taken from a schedule that fits fit again.

That is what justification needs: the schedule is run backwards in time, what ended last
first, and then forwards again in the order that this gave. Each task so moves towards the
tasks that wait for it and then towards those that it waits for, and most of what was idle
between them goes.

A search draws policies at random, changes the best a little at a time, as annealing does,
and justifies what it has found; equal arguments give equal schedules.

Phases apart (what Megatron-Core's forward_backward_func does when it is called for one
branch after the other) need no search: when microbatches enter as fast as one rank works
and go through without a stop, the order on each rank is 1F1B.
"""

import heapq
import math
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from megatron_apt.schedule.actions import Task
from megatron_apt.schedule.graph import Graph
from megatron_apt.schedule.simulate import Order, Timeline, lower_bound, peak, simulate


@dataclass(frozen=True)
class Timing:
    """When the tasks of one branch want to run.

    Attributes:
        offset: of the first microbatch after the beginning of its iteration, as a share
            of an iteration's work.
        pace: from one microbatch to the next, as a share of one microbatch's work in an
            iteration.
        forward, backward: time from stage to stage, as a multiple of what a microbatch
            takes that never waits.
        late: delay of weight gradients, as a share of one microbatch's work in an
            iteration.
    """

    offset: float
    pace: float
    forward: float = 1.0
    backward: float = 1.0
    late: float = 0.0


Policy = dict[tuple[str, str], Timing]  # by phase and branch


class NoRoom(ValueError):
    """Due times ask for more memory than there is."""


class DueTimes:
    """Turns policies into due times of a graph's tasks."""

    def __init__(self, graph: Graph):
        window = graph.window
        self.branches = [(phase.name, branch.name) for phase in window.phases for branch in phase.branches]
        self._length = max(graph.load) / window.iterations
        self._slot = self._length / window.microbatches
        # Of one microbatch of each branch, as a share of what one takes in an iteration
        self.work = dict.fromkeys(self.branches, 0.0)
        for task, time in zip(graph.tasks, graph.time, strict=True):
            if task.kind != "STEP" and task.iteration == task.microbatch == 0:
                self.work[task.phase, task.branch] += time / self._slot / window.ranks
        self._tasks = graph.tasks
        # Forward and backward time from the entry of a microbatch, if it never waits
        self._way: dict[tuple, tuple[float, float]] = {}
        for number, task in enumerate(graph.tasks):
            if self._place(task) not in self._way and task.kind != "STEP":
                ways = (self._after(graph, source, number) for source in graph.before[number])
                self._way[self._place(task)] = max(ways, key=sum, default=(0.0, 0.0))

    @staticmethod
    def _place(task: Task) -> tuple:
        return task.kind, task.phase, task.branch, task.segment, task.stage

    def _after(self, graph: Graph, source: int, number: int) -> tuple[float, float]:
        earlier, task = graph.tasks[source], graph.tasks[number]
        if earlier[3:6] != task[3:6] or earlier.microbatch != task.microbatch:  # not of the same chain
            return 0.0, 0.0
        forward, backward = self._way[self._place(earlier)]
        time = graph.time[source] + graph.delay(source, number)
        return (forward + time, backward) if earlier.kind == "F" else (forward, backward + time)

    def due(self, policy: Policy) -> list[float]:
        wait = {}
        for (kind, phase, branch, segment, stage), (forward, backward) in self._way.items():
            timing = policy[phase, branch]
            late = timing.late * self._slot if kind == "W" else 0.0
            at = timing.offset * self._length + timing.forward * forward + timing.backward * backward + late
            wait[kind, phase, branch, segment, stage] = at, timing.pace * self._slot
        found = []
        for task in self._tasks:
            if task.kind == "STEP":
                found.append(-math.inf)  # at once
                continue
            at, pace = wait[self._place(task)]
            found.append(self._length * task.iteration + at + pace * task.microbatch)
        return found


@dataclass(frozen=True)
class Listed:
    """Lists of tasks for each rank, with the start of every task."""

    order: list[list[int]]
    start: list[float]
    makespan: float


def list_schedule(graph: Graph, due: Sequence[float], cap: float, backwards: bool = False) -> Listed:
    """Runs what is due first, on every rank; backwards from the end of time, with due
    times counted from there.

    Raises:
        NoRoom: in order of due times the tasks do not fit into `cap`.
    """
    before, after = (graph.after, graph.before) if backwards else (graph.before, graph.after)
    live = [-size for size in graph.live] if backwards else graph.live
    tasks: list[list[int]] = [[] for _ in range(graph.window.ranks)]
    for task, rank in enumerate(graph.rank):
        tasks[rank].append(task)
    ranks = [_Rank(mine, due, live, cap) for mine in tasks]
    waits, start, free_at = [len(sources) for sources in before], [0.0] * len(due), [0.0] * len(ranks)
    comes: dict[int, float] = {}  # when the last message for a task comes
    # ~task: its inputs are there; task: it ends
    events = [(0.0, ~task) for task, count in enumerate(waits) if not count]
    heapq.heapify(events)
    message, place, time = graph.message, graph.rank, graph.time
    while events:
        now, touched = events[0][0], set()
        while events and events[0][0] <= now + _SAME_TIME:
            event = heapq.heappop(events)[1]
            if event < 0:
                ranks[place[~event]].offer(~event)
                touched.add(place[~event])
                continue
            rank = place[event]
            ranks[rank].end(event)
            touched.add(rank)
            for other in after[event]:
                waits[other] -= 1
                if place[other] != rank and (delay := message[other if backwards else event]):
                    comes[other] = max(comes.get(other, now), now + delay)
                if not waits[other]:
                    if comes.get(other, now) > now:
                        heapq.heappush(events, (comes[other], ~other))
                    else:
                        ranks[place[other]].offer(other)
                        touched.add(place[other])
        for rank in sorted(touched):
            task = ranks[rank].begin()
            if task is not None:
                start[task], free_at[rank] = now, now + time[task]
                heapq.heappush(events, (now + time[task], task))
    missing = len(due) - sum(len(rank.order) for rank in ranks)
    if missing:
        raise NoRoom(f"{missing} tasks of {len(due)} never find room in {cap:g} activations")
    makespan = max(free_at)
    if not backwards:
        return Listed([rank.order for rank in ranks], start, makespan)
    return Listed(
        [rank.order[::-1] for rank in ranks],
        [makespan - at - length for at, length in zip(start, time, strict=True)],
        makespan,
    )


_SAME_TIME = 1e-9


class _Rank:
    """One rank while its list is made: what could run, what memory is left, and to whom it is promised."""

    def __init__(self, tasks: Sequence[int], due: Sequence[float], live: Sequence[float], cap: float):
        self.order: list[int] = []
        self._due, self._live, self._left = due, live, cap
        # Of memory, and when it is promised
        self._takers = sorted((task for task in tasks if live[task] > 0), key=lambda task: (due[task], task))
        self._first, self._served = 0, set()  # of them: all before the first are served
        # Inputs are there: of tasks that take memory, and of all others.
        self._ready_takers: list[tuple[float, int]] = []
        self._ready: list[tuple[float, int]] = []
        self._busy = False

    def offer(self, task: int) -> None:
        """The task's inputs are there."""
        heapq.heappush(self._ready_takers if self._live[task] > 0 else self._ready, (self._due[task], task))

    def begin(self) -> int | None:
        """Starts the most overdue task that fits, unless one runs."""
        if self._busy:
            return None
        heap = self._ready
        if (
            self._ready_takers
            and (not heap or self._ready_takers[0] < heap[0])
            and self._fits(self._ready_takers[0][1])
        ):
            heap = self._ready_takers
            self._left -= self._live[heap[0][1]]
            self._served.add(heap[0][1])
        if not heap:
            return None
        task = heapq.heappop(heap)[1]
        self.order.append(task)
        self._busy = True
        return task

    def end(self, task: int) -> None:
        self._busy = False
        if self._live[task] < 0:
            self._left -= self._live[task]

    def _fits(self, task: int) -> bool:
        """Beside all that is due before it and has not run."""
        while self._takers[self._first] in self._served:
            self._first += 1
        left, at = self._left + 1e-9, self._first
        while True:
            other = self._takers[at]
            if other not in self._served:
                left -= self._live[other]
                if left < 0 or other == task:
                    return left >= 0
            at += 1


def justified(graph: Graph, listed: Listed, cap: float, turns: int, enough: float = 0.0) -> Listed:
    """The shortest of the schedules that come of running this one backwards and forwards
    in time, in turn, until one is short enough.
    """
    best, time = listed, graph.time
    for turn in range(turns):
        if best.makespan <= enough:
            break
        backwards = turn % 2 == 0
        due = (
            [-at - length for at, length in zip(listed.start, time, strict=True)]
            if backwards
            else listed.start
        )
        listed = list_schedule(graph, due, cap, backwards)
        best = min(best, listed, key=_makespan)
    return best


def _makespan(listed: Listed) -> float:
    return listed.makespan


@dataclass(frozen=True)
class Built:
    """A schedule with what it costs.

    Attributes:
        bound: no schedule of this window that keeps to its cap is shorter.
    """

    graph: Graph
    order: Order
    timeline: Timeline
    bound: float


def priced(graph: Graph, order: Order, cap: float) -> Built:
    return Built(graph, order, simulate(graph, order), lower_bound(graph, cap))


def phases_apart(graph: Graph, cap: float) -> Built:
    """The better of 1F1B and of forwards as early as `cap` allows, one branch after the
    other; the window's `apart` must be set.

    Raises:
        NoRoom: one microbatch alone takes more than `cap`.
    """
    order = _one_forward_one_backward(graph)
    turn = {task: number for tasks in order for number, task in enumerate(tasks)}
    orders = [order] if max(peak(graph, tasks) for tasks in order) <= cap + 1e-9 else []
    orders.append(_plainly(graph, cap).order)
    with suppress(NoRoom):
        orders.append(list_schedule(graph, [turn[task] for task in range(len(turn))], cap).order)
    return priced(graph, min(orders, key=lambda order: simulate(graph, order).makespan), cap)


def _plainly(graph: Graph, cap: float) -> Listed:
    """What plain alternation would do first is due first. Everything fits then that can fit at all."""
    return list_schedule(graph, range(len(graph.tasks)), cap)


def gpipe(graph: Graph) -> Built:
    """All forwards of a branch, then all that leads back, one branch after the other; the
    window's `apart` must be set. Memory is what it takes.
    """
    return priced(graph, _one_forward_one_backward(graph, forwards_first=True), math.inf)


def _one_forward_one_backward(graph: Graph, forwards_first: bool = False) -> list[list[int]]:
    due_times = DueTimes(graph)
    timings = {branch: Timing(0.0, pace=due_times.work[branch]) for branch in due_times.branches}
    due = due_times.due(timings)
    turn: dict[tuple[str, str], float] = {branch: number for number, branch in enumerate(due_times.branches)}
    turn |= {(phase, ""): number + 0.5 for (phase, _), number in turn.items()}  # STEP

    def when(number: int) -> tuple:
        task = graph.tasks[number]
        later = forwards_first and task.kind != "F"
        # Rounded, so that what ends at a time frees memory first.
        return task.iteration, turn[task.phase, task.branch], later, round(due[number], 6), number

    tasks = sorted(range(len(graph.tasks)), key=when)
    return [[task for task in tasks if graph.rank[task] == rank] for rank in range(graph.window.ranks)]


def search(graph: Graph, policies: Sequence[Policy], cap: float, evaluations: int, seed: int = 0) -> Built:
    """Tries these policies and others drawn at random, anneals the best, and justifies
    the best of all; stops early at the lower bound.

    Raises:
        NoRoom: one microbatch alone takes more than `cap`.
    """
    due_times, enough = DueTimes(graph), lower_bound(graph, cap) + 1e-9
    tried = _tried(graph, due_times, policies, cap, evaluations, random.Random(seed), enough)
    best = [tried[makespan] for makespan in sorted(tried)[: min(4, 1 + evaluations // 20)]]
    finalists = [_plainly(graph, cap), *(list_schedule(graph, due_times.due(policy), cap) for policy in best)]
    listed = min((justified(graph, finalist, cap, 4, enough) for finalist in finalists), key=_makespan)
    return priced(graph, justified(graph, listed, cap, min(20, evaluations // 5), enough).order, cap)


def _tried(
    graph: Graph,
    due_times: DueTimes,
    policies: Sequence[Policy],
    cap: float,
    evaluations: int,
    rng: random.Random,
    enough: float,
) -> dict[float, Policy]:
    """Policies by the makespan of their schedule, once turned: those given, as many as a
    quarter of `evaluations` drawn at random, the best annealed.

    One turn costs as much as the schedule itself, but what comes of the unturned ones
    says little about what justification makes of them.
    """
    tried: dict[float, Policy] = {}
    now, value, given = {}, math.inf, len(policies)
    for number in range(given + evaluations):
        if value <= enough:
            break
        annealing = bool(now) and number >= given + evaluations // 4
        policy = (
            policies[number]
            if number < given
            else _changed(now, rng)
            if annealing
            else _drawn(due_times.branches, rng)
        )
        try:
            found = justified(
                graph, list_schedule(graph, due_times.due(policy), cap), cap, 1, enough
            ).makespan
        except NoRoom:
            continue
        tried.setdefault(found, policy)
        warmth = 0.001 * max(graph.load) * (1 - (number - given) / evaluations) if annealing else 0.0
        if found <= value or (warmth and rng.random() < math.exp((value - found) / warmth)):
            now, value = policy, found
    return tried


def _drawn(branches: Sequence[tuple[str, str]], rng: random.Random) -> Policy:
    def timing() -> Timing:
        return Timing(
            rng.random(),
            rng.uniform(0.05, 0.65),
            rng.uniform(0.3, 2.0),
            rng.uniform(0.3, 2.0),
            rng.uniform(-1.5, 1.5),
        )

    return {branch: timing() for branch in branches}


# By how much a change moves each timing.
_STEPS = {"offset": 0.1, "pace": 0.15, "forward": 0.4, "backward": 0.4, "late": 1.0}


def _changed(policy: Policy, rng: random.Random) -> Policy:
    changed = dict(policy)
    for _ in range(rng.choice((1, 1, 2, 3))):
        branch, what = rng.choice(list(changed)), rng.choice(list(_STEPS))
        value = getattr(changed[branch], what) + _STEPS[what] * rng.gauss(0, 1) * rng.choice((0.2, 1.0))
        changed[branch] = replace(changed[branch], **{what: value})
    return changed
