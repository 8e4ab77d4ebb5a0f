"""The judge of schedules: a symbolic machine that knows nothing of edges or versions.

Every rank runs its list, a value is a hash of all that went into it, weights change at
STEP by what W has summed up. Equal final weights mean equal gradients.
"""

import random
from collections import Counter

from hypothesis import strategies as st

from megatron_apt.config import RunConfig
from megatron_apt.methods.apt.config import AptConfig
from megatron_apt.methods.base import Branch, Phase, Segment, roles_of
from megatron_apt.methods.build import build_method
from megatron_apt.schedule.check import BadSchedule
from megatron_apt.schedule.graph import Cost, Graph, Task, Window
from megatron_apt.schedule.policies import placement

APT = build_method(RunConfig(method="apt"), None).phases


def window(phases=APT, ranks=2, microbatches=3, iterations=2, chunks=1, cost=None, **options) -> Window:
    roles = roles_of(phases)
    return Window(
        phases,
        dict.fromkeys(roles, placement(ranks, chunks)),
        microbatches,
        iterations,
        dict.fromkeys(roles, cost or Cost()),
        **options,
    )


def inputs_of(graph: Graph, task: Task) -> list[Task]:
    """Where a task's data comes from: the stage before or behind it, the segments that it
    reads or that read it, what it kept itself.
    """
    (branch,) = (
        b
        for phase in graph.window.phases
        if phase.name == task.phase
        for b in phase.branches
        if b.name == task.branch
    )

    def other(kind: str, s: int, stage: int) -> Task:
        role = branch.segments[s].role
        return task._replace(kind=kind, role=role, segment=s, stage=stage % len(graph.window.placement[role]))

    s, stage, last = task.segment, task.stage, task.stage == len(graph.window.placement[task.role]) - 1
    if task.kind == "W":
        return [task._replace(kind="I")]
    if task.kind == "I":
        readers = [
            i for i, segment in enumerate(branch.segments) if s in segment.reads and segment.grad != "none"
        ]
        behind = [other("I", r, 0) for r in readers] if last else [other("I", s, stage + 1)]
        return [task._replace(kind="F"), *behind]
    sources = [other("F", s, stage - 1)] if stage else [other("F", r, -1) for r in branch.segments[s].reads]
    if last and s == len(branch.segments) - 1:
        sources += [other("F", r, -1) for r in branch.reads if r != s]
    return sources


class Weights:
    """Hashes of every stage's weights, and of the gradients summed up for them."""

    def __init__(self, graph: Graph):
        self.rank = {
            (role, stage): rank
            for role, ranks in graph.window.placement.items()
            for stage, rank in enumerate(ranks)
        }
        self.present = {place: hash(place) for place in self.rank}
        self.gradients: Counter = Counter()

    def value(self, task: Task, sources) -> int:
        made = hash((task, self.present[task.role, task.stage], *sources))
        if task.kind == "W":
            self.gradients[task.role, task.stage] += made
        return made

    def step(self, task: Task, gradients: Counter) -> None:
        for place, rank in self.rank.items():
            if place[0] == task.role and rank == task.stage:
                self.present[place] = hash((self.present[place], gradients.pop(place, 0)))


def weights_after(graph: Graph, order) -> dict | None:
    """Final weights of every stage, or None where a rank lacks an input or all wait."""
    weights, values, at = Weights(graph), {}, [0] * len(order)
    moved = True
    while moved:
        moved = False
        for rank, tasks in enumerate(order):
            while at[rank] < len(tasks):
                task = graph.tasks[tasks[at[rank]]]
                if task.kind == "STEP":
                    weights.step(task, weights.gradients)
                else:
                    sources = inputs_of(graph, task)
                    if any(
                        source not in values and graph.rank[graph.number[source]] == rank
                        for source in sources
                    ):
                        return None
                    if any(source not in values for source in sources):
                        break
                    values[task] = weights.value(task, (values[source] for source in sources))
                at[rank] += 1
                moved = True
    return weights.present if all(i == len(tasks) for i, tasks in zip(at, order, strict=True)) else None


def mutated(lists, rng: random.Random) -> list[list]:
    """One entry of one list swapped with another, moved, dropped or doubled."""
    lists = [list(entries) for entries in lists]
    entries = rng.choice(lists)
    i, j = rng.randrange(len(entries)), rng.randrange(len(entries))
    kind = rng.choice(("swap", "swap", "move", "drop", "duplicate"))
    if kind == "swap":
        entries[i], entries[j] = entries[j], entries[i]
    elif kind == "move":
        entries.insert(j, entries.pop(i))
    elif kind == "drop":
        del entries[i]
    else:
        entries.insert(j, entries[i])
    return lists


def assert_harm_is_refused(lists, weights, prove, harmless: int, seed: int = 0) -> None:
    """1,000 mutations that change `weights(lists)` are all refused by `prove`, and more
    than so many that change nothing are not.
    """
    rng, want = random.Random(seed), weights(lists)
    assert want is not None
    harmful = passed = 0
    while harmful < 1000:
        changed = mutated(lists, rng)
        same = weights(changed) == want
        harmful += not same
        try:
            prove(changed)
        except BadSchedule:
            continue
        assert same, "a harmful mutation went through"
        passed += 1
    assert passed > harmless


def alternation(graph: Graph):
    """Everything in the order in which the method says it, on each rank."""
    return [
        [t for t in range(len(graph.tasks)) if graph.rank[t] == rank] for rank in range(graph.window.ranks)
    ]


def feed(*_):
    raise AssertionError("planning a schedule calls no network")


_CONSISTENCY = (
    Segment("teacher", "none", feed, feed, copies=2),
    Segment("generator", "none", feed, feed, reads=(0,)),
    Segment("generator", "full", feed, feed),
)


METHODS_UNDER_TEST = {
    "flow": (
        Phase("flow", (Branch("flow", (Segment("generator", "full", feed, feed),), feed),), "generator"),
    ),
    "consistency": (Phase("c", (Branch("c", _CONSISTENCY, feed, reads=(0, 1)),), "generator"),),
    "relativistic": build_method(
        RunConfig(method="apt", apt=AptConfig(loss="relativistic", ar2_lambda=1.0)), None
    ).phases,
    "unmatched": build_method(RunConfig(method="apt", apt=AptConfig(unmatched_conditions=True)), None).phases,
}

# Of a pipeline, for hypothesis: what a window is made of, and the phases
ANY_WINDOW = {
    "ranks": st.integers(1, 5),
    "microbatches": st.integers(1, 6),
    "iterations": st.integers(1, 2),
    "chunks": st.sampled_from([1, 2]),
    "message": st.sampled_from([0.0, 0.3]),
    "phases": st.sampled_from([APT, *METHODS_UNDER_TEST.values()]),
    "cost": st.builds(Cost, st.floats(0.5, 2), st.floats(0.5, 3), st.floats(0.1, 2)),
}
