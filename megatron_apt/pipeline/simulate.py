"""What a schedule would cost: start of every task, makespan, idle share and activation memory, from the same lists that run."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_apt.pipeline.graph import Graph

Order = Sequence[Sequence[int]]  # for each rank its tasks, as indices into the graph


class Stuck(ValueError):
    """A schedule in which ranks wait for each other for ever."""


@dataclass(frozen=True)
class Timeline:
    """A schedule in time.

    Attributes:
        start: of every task.
        makespan: end of the last one.
        bubble: idle / (ranks x makespan), start-up and drain included.
        peak_live: for each rank the most activations held at once, in microbatches of its part of one network.
    """

    start: list[float]
    makespan: float
    bubble: float
    peak_live: list[float]


def simulate(graph: Graph, order: Order) -> Timeline:
    """Runs the lists: a rank takes its next task as soon as it is free and the task's inputs are there.

    Raises:
        Stuck: naming the first task that never starts on each rank.
    """
    end: list[float | None] = [None] * len(graph.tasks)
    start, free, at = [0.0] * len(graph.tasks), [0.0] * len(order), [0] * len(order)
    waiting: dict[int, list[int]] = {}  # task -> ranks that wait for its end
    awake = list(range(len(order)))
    while awake:
        rank = awake.pop()
        while at[rank] < len(order[rank]):
            task = order[rank][at[rank]]
            begin = free[rank]
            for source in graph.before[task]:
                if end[source] is None:
                    waiting.setdefault(source, []).append(rank)
                    break
                begin = max(begin, end[source] + graph.delay(source, task))
            else:
                start[task], end[task] = begin, begin + graph.time[task]
                free[rank], at[rank] = end[task], at[rank] + 1
                awake += waiting.pop(task, [])
                continue
            break
    stuck = [f"rank {rank} at {graph.tasks[order[rank][i]]}" for rank, i in enumerate(at) if i < len(order[rank])]
    if stuck:
        raise Stuck("ranks wait for each other: " + "; ".join(stuck))
    makespan = max(free)
    busy = sum(graph.time[task] for tasks in order for task in tasks)
    return Timeline(start, makespan, 1 - busy / (len(order) * makespan), [peak(graph, tasks) for tasks in order])


def peak(graph: Graph, tasks: Sequence[int]) -> float:
    """Most activations held at once by a rank that runs these tasks in this order."""
    live = most = 0.0
    for task in tasks:
        live += graph.live[task]
        most = max(most, live)
    return most


def lower_bound(graph: Graph) -> float:
    """No schedule is shorter: each rank's work between the earliest its first task can start and the least that follows its last one."""
    tasks = range(len(graph.tasks))
    head, tail = [0.0] * len(graph.tasks), [0.0] * len(graph.tasks)
    for task in tasks:  # tasks are numbered so that what one waits for comes before it
        head[task] = max((head[s] + graph.time[s] + graph.delay(s, task) for s in graph.before[task]), default=0.0)
    for task in reversed(tasks):
        tail[task] = max((tail[s] + graph.time[s] + graph.delay(task, s) for s in graph.after[task]), default=0.0)
    path = max(head[t] + graph.time[t] + tail[t] for t in tasks)
    found = [path]
    for rank, load in enumerate(graph.load):
        if mine := [t for t in tasks if graph.rank[t] == rank and graph.time[t]]:
            found.append(min(head[t] for t in mine) + load + min(tail[t] for t in mine))
    return max(found)
