"""Proves a schedule before it runs.

The graph holds what plain alternation demands, so a schedule that keeps every edge of it
computes the same gradients; what is left to prove is that the lists hold each action
once, on its rank, can be run without a deadlock, and stay within memory.

Not proved: that data-parallel ranks, whose programs may differ, reduce in one order. They
do where each phase's gradients need the step of the phase before it, as in every method
here.
"""

from collections import Counter

from megatron_apt.schedule.graph import Graph
from megatron_apt.schedule.mail import batched
from megatron_apt.schedule.nccl import Locked, check_streams
from megatron_apt.schedule.program import Program, messages, reductions
from megatron_apt.schedule.simulate import Order, peak, simulate


class BadSchedule(ValueError):
    """A schedule that must not run; names the action."""


def check(graph: Graph, order: Order, cap: float = float("inf")) -> None:
    """Each task once and on its rank; everything it waits for done before, on its own
    rank in the list; no deadlock; live activations within `cap`.

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
                raise BadSchedule(
                    f"{graph.tasks[task]} is on rank {rank}, its weights are on rank {graph.rank[task]}"
                )
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
                    raise BadSchedule(
                        f"rank {rank} runs {graph.tasks[task]} before {graph.tasks[source]}, which it needs"
                    )
            done.add(task)
        if (most := peak(graph, tasks)) > cap + 1e-9:
            raise BadSchedule(f"rank {rank} holds {most:g} live activations at once, more than {cap:g}")
    try:
        simulate(graph, order)
    except ValueError as error:
        raise BadSchedule(str(error)) from error


def check_program(program: Program, cap: float = float("inf")) -> None:
    """`check` of what it computes; each message sent once after it is made and received
    once before it is used; each reduction between the last weight gradient and its STEP;
    and no deadlock even if every send and every receive waits for the other, nor by the
    order in which NCCL runs the batches that `Executor.run` starts (nccl.py).

    Raises:
        BadSchedule: naming the first action that is wrong.
    """
    graph = program.graph
    for actions in program.lists:
        for action in actions:
            if action.task not in graph.number:
                raise BadSchedule(f"{action}: there is no such action in this window")
    check(graph, program.order, cap)
    wanted, gradients = set(messages(graph)), reductions(graph)
    for rank, actions in enumerate(program.lists):
        done: set[int] = set()
        moved: set[tuple[str, int, int]] = set()
        reduced: set[int] = set()
        for action in actions:
            task = graph.number[action.task]
            if action.kind in ("SEND", "RECV"):
                receiver, sender = (action.peer, rank) if action.kind == "SEND" else (rank, action.peer)
                if (task, receiver) not in wanted or graph.rank[task] != sender:
                    raise BadSchedule(f"rank {rank}: {action}: nobody needs that message")
                if (action.kind, task, action.peer) in moved:
                    raise BadSchedule(f"rank {rank}: {action} is there more than once")
                if action.kind == "SEND" and task not in done:
                    raise BadSchedule(f"rank {rank}: {action} comes before the action itself")
                moved.add((action.kind, task, action.peer))
            elif action.kind == "REDUCE":
                if task not in gradients or graph.rank[task] != rank or task in reduced or task in done:
                    raise BadSchedule(
                        f"rank {rank}: {action} is not where it belongs: once, on the rank of its STEP and "
                        "before it"
                    )
                if late := [s for s in graph.before[task] if graph.tasks[s].kind == "W" and s not in done]:
                    raise BadSchedule(f"rank {rank}: {action} comes before {graph.tasks[late[0]]}")
                reduced.add(task)
            else:
                for source in graph.sources[task]:
                    if graph.rank[source] != rank and ("RECV", source, graph.rank[source]) not in moved:
                        raise BadSchedule(
                            f"rank {rank} runs {action} before it receives {graph.tasks[source]}"
                        )
                if action.kind == "STEP" and gradients[task] and task not in reduced:
                    raise BadSchedule(f"rank {rank} runs {action} before its gradients are reduced")
                done.add(task)
        for task, receiver in wanted:
            if graph.rank[task] == rank and ("SEND", task, receiver) not in moved:
                raise BadSchedule(f"rank {rank} never sends {graph.tasks[task]} to rank {receiver}")
    _check_rendezvous(program)
    try:
        check_streams(graph, program.lists, batched)
    except Locked as error:
        raise BadSchedule(str(error)) from error


def _check_rendezvous(program: Program) -> None:
    """Runs the lists with sends and receives that each wait for the other."""
    lists, at = program.lists, [0] * len(program.lists)

    def next_of(rank: int):
        return lists[rank][at[rank]] if at[rank] < len(lists[rank]) else None

    awake = list(range(len(lists)))
    while awake:
        rank = awake.pop()
        while (action := next_of(rank)) is not None:
            # Computing waits for nothing but messages, which `check_program` has found in the list before it.
            if action.kind in ("SEND", "RECV"):
                other = next_of(action.peer)
                if (
                    other is None
                    or {action.kind, other.kind} != {"SEND", "RECV"}
                    or other.peer != rank
                    or other.task != action.task
                ):
                    break
                at[action.peer] += 1
                awake.append(action.peer)
            at[rank] += 1
    if stuck := [
        f"rank {rank} at {next_of(rank)}" for rank in range(len(lists)) if next_of(rank) is not None
    ]:
        raise BadSchedule("ranks wait for each other's messages: " + "; ".join(stuck))
