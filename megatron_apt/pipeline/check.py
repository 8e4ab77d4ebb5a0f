"""Proves a schedule before it runs.

The graph holds what plain alternation demands, so a schedule that keeps every edge of it computes the same gradients; what is left to prove is that
the lists hold each task once, on its rank, can be run without a deadlock, and stay within memory.
"""

from collections import Counter

from megatron_apt.pipeline.graph import Graph
from megatron_apt.pipeline.simulate import Order, peak, simulate


class BadSchedule(ValueError):
    """A schedule that must not run; names the action."""


def check(graph: Graph, order: Order, cap: float = float("inf")) -> None:
    """Each task once and on its rank; everything it waits for done before, on its own rank in the list; no deadlock; live activations within `cap`.

    Sends and receives are not in the lists yet: each message counts as sent when its task ends and as received where a task needs it.

    Raises:
        BadSchedule: naming the first action that is wrong.
    """
    if len(order) != graph.window.ranks:
        raise BadSchedule(f"{len(order)} lists for {graph.window.ranks} ranks")
    count = Counter(task for tasks in order for task in tasks)
    for rank, tasks in enumerate(order):
        for task in tasks:
            if not 0 <= task < len(graph.tasks):
                raise BadSchedule(f"rank {rank} has task {task}, of {len(graph.tasks)}")
            if graph.rank[task] != rank:
                raise BadSchedule(f"{graph.tasks[task]} is on rank {rank}, its weights are on rank {graph.rank[task]}")
            if count[task] > 1:
                raise BadSchedule(f"{graph.tasks[task]} is there {count[task]} times")
    for task in range(len(graph.tasks)):
        if not count[task]:
            raise BadSchedule(f"{graph.tasks[task]} is missing")
    for rank, tasks in enumerate(order):
        done: set[int] = set()
        for task in tasks:
            for source in graph.before[task]:
                if graph.rank[source] == rank and source not in done:
                    raise BadSchedule(f"rank {rank} runs {graph.tasks[task]} before {graph.tasks[source]}, which it needs")
            done.add(task)
        if (most := peak(graph, tasks)) > cap + 1e-9:
            raise BadSchedule(f"rank {rank} holds {most:g} live activations at once, more than {cap:g}")
    try:
        simulate(graph, order)
    except ValueError as error:
        raise BadSchedule(str(error)) from error
