"""From an order of computation to what each rank runs, messages and reductions included.

Each message goes into both lists at one moment of the simulated time, the end of the
action that made it. As the lists of all ranks are then cuts of one sequence, they run to
their end even where a send waits for its receive (rendezvous) and messages between two
ranks never overtake each other, which is what NCCL and gloo demand. A receive stands
where its message is made, not where it is used, so that it is under way while its rank
computes.

torch.distributed.pipelining and Megatron-Core's P2PCommunicator and schedules are not
used: both know one network with one loss, forward and backward of every microbatch on
every stage, and messages of one tensor to the next and previous rank. Here several
branches run through several networks of which some are frozen, optimiser steps stand
inside a schedule, and a V sends in both directions at once.
"""

import bisect
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_apt.methods.base import Phase
from megatron_apt.schedule.actions import Action
from megatron_apt.schedule.graph import Cost, Graph, Window
from megatron_apt.schedule.simulate import Order, Timeline, simulate


@dataclass(frozen=True, eq=False)
class Program:
    """A list of actions for each rank."""

    graph: Graph
    lists: list[list[Action]]

    @cached_property
    def order(self) -> list[list[int]]:
        """The computing actions alone, as indices into the graph."""
        number = self.graph.number
        return [[number[a.task] for a in actions if a.kind == a.task.kind] for actions in self.lists]

    @cached_property
    def receivers(self) -> dict[int, list[int]]:
        """Other ranks that need the result of an action."""
        found: dict[int, list[int]] = {}
        for source, rank in messages(self.graph):
            found.setdefault(source, []).append(rank)
        return found

    @cached_property
    def digest(self) -> int:
        """A number that differs where programs differ."""
        return zlib.crc32(self.text().encode())

    def text(self) -> str:
        """What window it is for, then one action a line under the heading of each rank; `read` reads it."""
        window = self.graph.window
        lines = [
            f"microbatches {window.microbatches} iterations {window.iterations} shared {window.shared} split "
            f"{window.split:d}"
        ]
        for rank, actions in enumerate(self.lists):
            lines += [f"rank {rank}", *(f"  {action}" for action in actions)]
        return "\n".join(lines) + "\n"


def read(text: str, phases: Sequence[Phase], costs: Mapping[str, Cost], message: float = 0.0) -> Program:
    """The program of a `Program.text`, for a method's phases and at given costs.

    Raises:
        ValueError: naming the line that is not as it should be.
    """
    head, *lines = text.splitlines() or [""]
    words = head.split()
    try:
        sizes: dict[str, Any] = {
            name: int(value) for name, value in zip(words[::2], words[1::2], strict=True)
        }
        if set(sizes) != {"microbatches", "iterations", "shared", "split"}:
            raise ValueError
        split = bool(sizes.pop("split"))
        if (
            sizes["shared"] < 0
            or not 1 <= sizes["microbatches"] * sizes["iterations"] <= max(1000, len(lines))
            or min(sizes["microbatches"], sizes["iterations"]) < 1
        ):
            raise ValueError  # each microbatch has an action at least; shorter lists are told where they end
    except ValueError:
        raise ValueError(
            f"{head!r} does not begin an action list; one begins `microbatches 16 iterations 4 shared 0 "
            "split 1`"
        ) from None
    lists: list[list[Action]] = []
    for line in filter(str.strip, lines):
        if line.strip() == f"rank {len(lists)}":
            lists.append([])
        elif not lists:
            raise ValueError(f"{line!r} stands before the first `rank 0`")
        else:
            lists[-1].append(Action.parse(line.strip()))
    places: dict[str, dict[int, int]] = {}
    for rank, actions in enumerate(lists):
        for action in actions:
            if action.kind == "F":
                places.setdefault(action.task.role, {})[action.task.stage] = rank
    placement = {role: tuple(rank for _, rank in sorted(stages.items())) for role, stages in places.items()}
    return Program(
        Graph(Window(tuple(phases), placement, costs=costs, message=message, split=split, **sizes)), lists
    )


def messages(graph: Graph) -> list[tuple[int, int]]:
    """(action whose result it is, rank that needs it), each once."""
    needed = ((source, graph.rank[task]) for task, sources in enumerate(graph.sources) for source in sources)
    return list(dict.fromkeys((source, rank) for source, rank in needed if graph.rank[source] != rank))


def reductions(graph: Graph) -> dict[int, int]:
    """For each STEP the number of weight gradients that it waits for."""
    return {
        task: sum(graph.tasks[source].kind == "W" for source in graph.before[task])
        for task, what in enumerate(graph.tasks)
        if what.kind == "STEP"
    }


def lower(graph: Graph, order: Order, timeline: Timeline | None = None) -> Program:
    """The program of an order."""
    timeline = timeline or simulate(graph, order)
    # Slot i of a rank is the gap before its i-th computing action.
    slots: list[list[list[tuple[float, int, int, str, int]]]] = [
        [[] for _ in range(len(tasks) + 1)] for tasks in order
    ]
    starts = [[timeline.start[task] for task in tasks] for tasks in order]
    place = {task: i for tasks in order for i, task in enumerate(tasks)}
    for source, receiver in messages(graph):
        sender, made = graph.rank[source], timeline.start[source] + graph.time[source]
        slots[sender][place[source] + 1].append((made, source, receiver, "SEND", receiver))
        slots[receiver][bisect.bisect_left(starts[receiver], made)].append(
            (made, source, receiver, "RECV", sender)
        )
    open_gradients = reductions(graph)
    lists = []
    for rank, tasks in enumerate(order):
        actions: list[Action] = []
        for i, slot in enumerate(slots[rank]):
            if i:
                task = tasks[i - 1]
                actions.append(Action(graph.tasks[task].kind, graph.tasks[task]))
                step = (
                    next((after for after in graph.after[task] if after in open_gradients), None)
                    if graph.tasks[task].kind == "W"
                    else None
                )
                if step is not None:
                    open_gradients[step] -= 1
                    if not open_gradients[step]:
                        actions.append(Action("REDUCE", graph.tasks[step]))
            actions += [Action(kind, graph.tasks[source], peer) for _, source, _, kind, peer in sorted(slot)]
        lists.append(actions)
    return Program(graph, lists)
