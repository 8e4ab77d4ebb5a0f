"""Builds schedules: list scheduling of a window's tasks, with the wishes of each kind of task found by search.

A policy gives every kind of task (F, I or W of one segment of one branch) the time at which it would like to run and how much memory it may take.
Going through time, a free rank runs the task that is most overdue among those whose inputs are there and whose activations fit. A search changes
policies a little at a time, as annealing does, and keeps the one with the shortest makespan; equal arguments give equal schedules.

Phases apart (what Megatron-Core's forward_backward_func does when it is called for one branch after the other) need no search: backward before
forward, and never more microbatches in flight at a stage than there are stages from it to the end of the chain, which is 1F1B. With weight gradients
split off and run where nothing else can, it is the zero-bubble schedule.
"""

import heapq
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_apt.pipeline.graph import Graph, Task
from megatron_apt.pipeline.simulate import Timeline, lower_bound, simulate

Kind = tuple[str, str, str, int]  # F | I | W, phase, branch, segment


@dataclass(frozen=True)
class Wish:
    """When tasks of one kind want to run, and what they may hold.

    Attributes:
        offset: after the beginning of their iteration, as a share of an iteration's work.
        pace: from one microbatch to the next, as a share of one microbatch's work in an iteration.
        slope: from one rank's stage to the next, likewise.
        window: most activations that the first stage of the kind may hold, as a share of the cap; forward only.
        narrowing: by how much less the last stage may hold, as a share of that.
        reserve: memory it leaves to others, as a share of the cap.
    """

    offset: float = 0.0
    pace: float = 0.13
    slope: float = 0.0
    window: float = 1.0
    narrowing: float = 0.0
    reserve: float = 0.0


Policy = dict[Kind, Wish]


class NoRoom(ValueError):
    """A policy lets some kinds of tasks fill the memory that others need to go on."""

    def __init__(self, missing: int, message: str):
        super().__init__(message)
        self.missing = missing


def kind_of(task: Task) -> Kind:
    return task.kind, task.phase, task.branch, task.segment


def list_schedule(graph: Graph, policy: Policy, cap: float) -> list[list[int]]:
    """Lists of tasks for each rank.

    Raises:
        NoRoom: the policy does not fit into `cap`.
    """
    due, room, limit = _wishes_of_tasks(graph, policy, cap)
    ranks = [_Rank(graph, due, room, limit) for _ in range(graph.window.ranks)]
    waits, ready_at = [len(sources) for sources in graph.before], [0.0] * len(graph.tasks)
    # A task t is an event when its inputs are there, and -t - 1 when it ends.
    events = [(0.0, task) for task, count in enumerate(waits) if not count]
    heapq.heapify(events)
    while events:
        now, touched = events[0][0], set()
        while events and events[0][0] <= now + _SAME_TIME:
            _, event = heapq.heappop(events)
            task = event if event >= 0 else -event - 1
            touched.add(graph.rank[task])
            if event >= 0:
                ranks[graph.rank[task]].offer(task)
                continue
            ranks[graph.rank[task]].end(task)
            for other in graph.after[task]:
                waits[other] -= 1
                ready_at[other] = max(ready_at[other], now + graph.delay(task, other))
                if not waits[other]:
                    heapq.heappush(events, (ready_at[other], other))
        for number in sorted(touched):
            task = ranks[number].begin()
            if task is not None:
                heapq.heappush(events, (now + graph.time[task], -task - 1))
    missing = len(graph.tasks) - sum(len(rank.order) for rank in ranks)
    if missing:
        raise NoRoom(missing, f"{missing} tasks of {len(graph.tasks)} never find room in {cap:g} activations")
    return [rank.order for rank in ranks]


_SAME_TIME = 1e-9


def _wishes_of_tasks(graph: Graph, policy: Policy, cap: float) -> tuple[list[float], list[float], list[float]]:
    """For each task: the time it is due, the most its kind may hold at its stage, and the most its rank may hold with it."""
    window = graph.window
    length = max(graph.load) / window.iterations
    slot = length / window.microbatches
    due, room, limit = [], [], []
    for task, size in zip(graph.tasks, graph.live, strict=True):
        wish, depth = policy.get(kind_of(task)), task.stage / window.chunks(task.role)
        if wish is None:  # a STEP: at once
            wish, at = Wish(), -math.inf
        else:
            at = length * (task.iteration + wish.offset) + slot * (wish.pace * task.microbatch + wish.slope * depth)
        due.append(at)
        room.append(max(size, wish.window * cap * (1 - wish.narrowing * depth / window.ranks)))
        limit.append(cap * (1 - wish.reserve))
    return due, room, limit


class _Rank:
    """One rank while its list is made: what could run, what is held, what runs now."""

    def __init__(self, graph: Graph, due: list[float], room: list[float], limit: list[float]):
        self.order: list[int] = []
        self._graph, self._due, self._room, self._limit = graph, due, room, limit
        # What takes memory waits in a heap for each kind and stage, because its next one may not fit; all else in one heap.
        self._free: list[tuple[float, int]] = []
        self._by_place: dict[tuple, list[tuple[float, int]]] = {}
        self._held: Counter = Counter()
        self._used, self._busy = 0.0, False

    @staticmethod
    def _place(task: Task) -> tuple:
        return task.phase, task.branch, task.segment, task.stage

    def offer(self, task: int) -> None:
        """The task's inputs are there."""
        heap = self._by_place.setdefault(self._place(self._graph.tasks[task]), []) if self._graph.live[task] > 0 else self._free
        heapq.heappush(heap, (self._due[task], task))

    def begin(self) -> int | None:
        """Starts the most overdue task that fits, unless one runs."""
        if self._busy:
            return None
        best, where = self._free, None
        for place, heap in self._by_place.items():
            if heap and (not best or heap[0] < best[0]) and self._fits(place, heap[0][1]):
                best, where = heap, place
        if not best:
            return None
        task = heapq.heappop(best)[1]
        if where is not None:
            self._take(where, self._graph.live[task])
        self.order.append(task)
        self._busy = True
        return task

    def end(self, task: int) -> None:
        self._busy = False
        if self._graph.live[task] < 0:
            self._take(self._place(self._graph.tasks[task]), self._graph.live[task])

    def _fits(self, place: tuple, task: int) -> bool:
        size = self._graph.live[task]
        return self._used + size <= self._limit[task] + 1e-9 and self._held[place] + size <= self._room[task] + 1e-9

    def _take(self, place: tuple, size: float) -> None:
        self._used += size
        self._held[place] += size


@dataclass(frozen=True)
class Built:
    """A schedule with what it costs.

    Attributes:
        bound: no schedule of this window is shorter, whatever its memory.
    """

    graph: Graph
    order: list[list[int]]
    timeline: Timeline
    bound: float
    policy: Policy


def build(graph: Graph, policy: Policy, cap: float) -> Built:
    return priced(graph, list_schedule(graph, policy, cap), policy)


def priced(graph: Graph, order: list[list[int]], policy: Policy) -> Built:
    return Built(graph, order, simulate(graph, order), lower_bound(graph), policy)


def phases_apart(graph: Graph, cap: float) -> Built:
    """The better of 1F1B and of forwards as early as `cap` allows, one branch after the other; the window's `apart` must be set.

    With split weight gradients it is a zero-bubble schedule.
    """
    return search(graph, (_one_forward_one_backward(graph, cap, eager=False), _one_forward_one_backward(graph, cap, eager=True)), cap, evaluations=0)


def _one_forward_one_backward(graph: Graph, cap: float, eager: bool) -> Policy:
    policy, window = {}, graph.window
    for phase in window.phases:
        for branch in phase.branches:
            stages = [len(window.placement[segment.role]) for segment in branch.segments]
            for s, segment in enumerate(branch.segments):
                left = sum(stages[s:])  # to the end of the chain
                in_flight = left * segment.copies / window.chunks(segment.role)
                # Eager forwards leave room for one microbatch of the segments behind them, which would block otherwise.
                behind = sum(later.copies for later in branch.segments[s + 1 :])
                memory = {"reserve": behind / cap} if eager else {"window": in_flight / cap, "narrowing": stages[s] / left}
                policy["F", phase.name, branch.name, s] = Wish(offset=2.0 - s / len(stages), **memory)
                policy["I", phase.name, branch.name, s] = Wish()
                policy["W", phase.name, branch.name, s] = Wish(offset=3.0 if window.split else -1.0)
    return policy


def search(graph: Graph, policies: Sequence[Policy], cap: float, evaluations: int, seed: int = 0) -> Built:
    """Anneals the two best of these policies and takes the better result; stops early at the lower bound.

    Raises:
        NoRoom: no policy was found that fits into `cap`.
    """
    bound = lower_bound(graph)
    ranked = sorted((_makespan(graph, policy, cap), i) for i, policy in enumerate(policies))
    least, best = ranked[0][0], policies[ranked[0][1]]
    for value, i in ranked[:2] if evaluations else ():
        if least <= bound + 1e-9:
            break
        makespan, found = _anneal(graph, policies[i], value, cap, evaluations, random.Random(seed), bound)
        if makespan < least:
            least, best = makespan, found
    return build(graph, best, cap)


def _anneal(graph: Graph, policy: Policy, value: float, cap: float, evaluations: int, rng: random.Random, bound: float) -> tuple[float, Policy]:
    """Shortest makespan found and its policy, from one policy whose makespan is `value`."""
    now, best, least = policy, policy, value
    for number in range(evaluations):
        if least <= bound + 1e-9:
            break
        candidate = _changed(now, rng)
        found = _makespan(graph, candidate, cap)
        warmth = 0.002 * max(graph.load) * (1 - number / evaluations) + 1e-9
        if found <= value or rng.random() < math.exp((value - found) / warmth):
            now, value = candidate, found
            if value < least:
                best, least = now, value
    return least, best


def _makespan(graph: Graph, policy: Policy, cap: float) -> float:
    """Of the policy's schedule; of one that does not fit far more than of any that does, and the more the less of it fits."""
    try:
        return simulate(graph, list_schedule(graph, policy, cap)).makespan
    except NoRoom as error:
        return sum(graph.load) * (1 + error.missing)


# What a change may touch; offsets matter most.
_TIMES = ("offset", "offset", "pace", "slope")
_MEMORY = ("window", "narrowing", "reserve")


def _changed(policy: Policy, rng: random.Random) -> Policy:
    changed = dict(policy)
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.choice(sorted(changed))
        what = rng.choice(_TIMES + _MEMORY if kind[0] == "F" else _TIMES)
        value = getattr(changed[kind], what)
        value += 0.15 * rng.gauss(0, 1) * rng.choice((0.2, 1.0))
        changed[kind] = replace(changed[kind], **{what: min(1.0, max(0.0, value)) if what in _MEMORY else value})
    return changed
