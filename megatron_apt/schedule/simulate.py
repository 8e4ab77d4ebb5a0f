"""What a schedule would cost: start of every task, makespan, idle share and activation
memory, from the same lists that run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_apt.schedule.graph import Graph

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
        peak_live: for each rank the most activations held at once, in microbatches of its
            part of one network.
    """

    start: list[float]
    makespan: float
    bubble: float
    peak_live: list[float]


def simulate(graph: Graph, order: Order) -> Timeline:
    """Runs the lists: a rank takes its next task as soon as it can.

    That is when the rank is free and the inputs of the task are there.

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
                ended = end[source]
                if ended is None:
                    waiting.setdefault(source, []).append(rank)
                    break
                begin = max(begin, ended + graph.delay(source, task))
            else:
                start[task] = begin
                free[rank] = end[task] = begin + graph.time[task]
                at[rank] += 1
                awake += waiting.pop(task, [])
                continue
            break
    stuck = [
        f"rank {rank} at {graph.tasks[order[rank][i]]}" for rank, i in enumerate(at) if i < len(order[rank])
    ]
    if stuck:
        raise Stuck("ranks wait for each other: " + "; ".join(stuck))
    makespan = max(free)
    busy = sum(graph.time[task] for tasks in order for task in tasks)
    return Timeline(
        start, makespan, 1 - busy / (len(order) * makespan), [peak(graph, tasks) for tasks in order]
    )


def peak(graph: Graph, tasks: Sequence[int]) -> float:
    """Most activations held at once by a rank that runs these tasks in this order."""
    live = most = 0.0
    for task in tasks:
        live += graph.live[task]
        most = max(most, live)
    return most


def lower_bound(graph: Graph, cap: float = float("inf")) -> float:
    """No schedule that keeps to `cap` is shorter: the longest path, and what each rank
    must do and hold between its first task and its last.

    A rank works off its load. It holds every activation at least as long as a microbatch
    that never waits takes from the forward to the end of the task that frees it, and no
    more than `cap` of them at once.
    """
    tasks = range(len(graph.tasks))
    head, tail = [0.0] * len(graph.tasks), [0.0] * len(graph.tasks)
    for task in tasks:  # tasks are numbered so that what one waits for comes before it
        head[task] = max(
            (head[s] + graph.time[s] + graph.delay(s, task) for s in graph.before[task]), default=0.0
        )
    for task in reversed(tasks):
        tail[task] = max(
            (tail[s] + graph.time[s] + graph.delay(task, s) for s in graph.after[task]), default=0.0
        )
    found = [max(head[t] + graph.time[t] + tail[t] for t in tasks)]
    held = _held(graph)
    for rank, load in enumerate(graph.load):
        mine = [t for t in tasks if graph.rank[t] == rank]
        for total, some in (
            (load, [t for t in mine if graph.time[t]]),
            (held[rank] / cap, [t for t in mine if graph.live[t]]),
        ):
            if some:
                found.append(min(head[t] for t in some) + total + min(tail[t] for t in some))
    return max(found)


def _held(graph: Graph) -> list[float]:
    """For each rank the least that its activations add up to, size times the time that they are held."""
    found = [0.0] * graph.window.ranks
    chains: dict[tuple, list[int]] = {}
    for number, task in enumerate(graph.tasks):
        if task.kind != "STEP" and task.iteration == task.microbatch == 0:  # all others take as long
            chains.setdefault((task.phase, task.branch), []).append(number)
    for chain in chains.values():
        frees = {graph.tasks[t][1:]: t for t in chain if graph.live[t] < 0}
        for taker in (t for t in chain if graph.live[t] > 0):
            # Counted from its start, of it and of those in its chain that wait for it
            end = {taker: graph.time[taker]}
            for task in chain:
                after = [end[s] + graph.delay(s, task) for s in graph.before[task] if s in end]
                if after:
                    end[task] = max(after) + graph.time[task]
            found[graph.rank[taker]] += graph.live[taker] * end[frees[graph.tasks[taker][1:]]]
    return [held * graph.window.microbatches * graph.window.iterations for held in found]
