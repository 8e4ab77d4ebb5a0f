"""Programs: what lowering adds to a schedule, that the checker proves it, and that it
notices what is wrong.
"""

from collections import Counter

import pytest
from hypothesis import given, settings

from megatron_apt.schedule.actions import Action
from megatron_apt.schedule.build import gpipe, phases_apart, search
from megatron_apt.schedule.check import BadSchedule, check_program
from megatron_apt.schedule.graph import Cost, Graph
from megatron_apt.schedule.policies import start
from megatron_apt.schedule.prepare import one_rank
from megatron_apt.schedule.program import Program, lower, messages, read
from support.symbolic import (
    ANY_WINDOW,
    APT,
    METHODS_UNDER_TEST,
    Weights,
    alternation,
    assert_harm_is_refused,
    inputs_of,
    weights_after,
    window,
)


def program(ranks=3, microbatches=3, phases=APT, cap=30, **options) -> Program:
    graph = Graph(window(phases, ranks, microbatches, **options))
    return lower(graph, search(graph, start(phases), cap, evaluations=0).order)


@settings(max_examples=30, deadline=None)
@given(**ANY_WINDOW)
def test_every_program_runs_even_where_sends_wait_for_receives(ranks, microbatches, phases, **options):
    made = program(ranks, microbatches, phases, **options)
    check_program(made)
    for rank, actions in enumerate(made.lists):
        assert [Action.parse(str(action)) for action in actions] == actions
        assert sum(action.kind == "REDUCE" for action in actions) == options["iterations"] * len(phases)
        assert all(action.peer != rank for action in actions)


@pytest.mark.parametrize("split", [False, True])
def test_phases_apart_run_too(split):
    graph = Graph(window(APT, 4, 6, 2, split=split, apart=True))
    built = phases_apart(graph, 8)
    check_program(lower(graph, built.order, built.timeline), 8)


def test_gpipe_runs_all_forwards_of_a_branch_first():
    graph = Graph(window(METHODS_UNDER_TEST["flow"], 3, 4, 1, split=False, apart=True))
    built = gpipe(graph)
    check_program(lower(graph, built.order, built.timeline))
    for tasks in built.order:
        kinds = [graph.tasks[task].kind for task in tasks]
        assert kinds[:4] == ["F"] * 4 and kinds.count("F") == 4
    assert built.timeline.peak_live == [4, 4, 4] and built.timeline.makespan == (4 + 3 - 1) * 3


def test_a_program_is_read_as_it_is_written():
    made = program(ranks=3, microbatches=4, chunks=2)
    again = read(made.text(), APT, dict.fromkeys(("generator", "discriminator"), Cost()))
    assert again.lists == made.lists and again.digest == made.digest
    check_program(again)
    for text, message in [
        ("rank 0\n", "'rank 0' does not begin an action list"),
        (
            "microbatches 2 iterations 1 shared 0 split 1\n  F a.0 i0 g/b.0 m0",
            "stands before the first `rank 0`",
        ),
        ("microbatches 2 iterations 1 shared 0 split 1\nrank 0\n  G a.0", "'G a.0' is not an action"),
    ]:
        with pytest.raises(ValueError, match=message):
            read(text, APT, {})


def test_messages_go_only_where_another_rank_needs_them():
    """In a line forwards go to the next rank and from a network to the one that reads it, gradients back."""
    graph = Graph(window(APT, ranks=2, microbatches=1, iterations=1))
    found = {(str(graph.tasks[source]), rank) for source, rank in messages(graph)}
    chain = {
        ("F generator.0 i0 g/fake.0 m0", 1),
        ("F generator.1 i0 g/fake.0 m0", 0),
        ("F discriminator.0 i0 g/fake.1 m0", 1),
    }
    back = {
        ("I discriminator.1 i0 g/fake.1 m0", 0),
        ("I discriminator.0 i0 g/fake.1 m0", 1),
        ("I generator.1 i0 g/fake.0 m0", 0),
    }
    assert {entry for entry in found if " g/" in entry[0]} == chain | back
    # Real: there and back; fake of the D phase: twice there and to D's first stage, once
    # back
    assert len(found) == 6 + 2 + 4


def test_one_rank_needs_no_messages_and_alternates():
    lists = one_rank(APT, 2).lists
    assert [str(action) for action in lists[0][:4]] == [
        "F generator.0 i0 g/fake.0 m0",
        "F discriminator.0 i0 g/fake.1 m0",
        "I discriminator.0 i0 g/fake.1 m0",
        "I generator.0 i0 g/fake.0 m0",
    ]
    assert [action.kind for action in lists[0]].count("REDUCE") == 2 and not any(
        action.kind in ("SEND", "RECV") for action in lists[0]
    )


def test_mutations_of_a_program_that_change_meaning_are_caught():
    made = program()
    assert weights_passed(made.graph, made.lists) == weights_after(made.graph, alternation(made.graph))

    def prove(lists) -> None:
        check_program(Program(made.graph, lists))

    assert_harm_is_refused(made.lists, lambda lists: weights_passed(made.graph, lists), prove, harmless=5)


def weights_passed(graph: Graph, lists) -> dict | None:
    """Final weights where every send waits for its receive, a rank has what it made or
    received itself, and a STEP takes what was reduced; None where a rank lacks something
    or all wait. Like weights_after it knows no edges.
    """
    weights, memory, at = Weights(graph), [{} for _ in lists], [0] * len(lists)
    reduced: Counter = Counter()

    def next_of(rank: int) -> Action | None:
        return lists[rank][at[rank]] if at[rank] < len(lists[rank]) else None

    moved = True
    while moved:
        moved = False
        for rank in range(len(lists)):
            action = next_of(rank)
            if action is None:
                continue
            task = action.task
            if action.kind in ("SEND", "RECV"):
                if next_of(action.peer) != Action({"SEND": "RECV", "RECV": "SEND"}[action.kind], task, rank):
                    continue
                sender, receiver = (rank, action.peer) if action.kind == "SEND" else (action.peer, rank)
                if task not in memory[sender]:
                    return None
                memory[receiver][task] = memory[sender][task]
                at[action.peer] += 1
            elif action.kind == "REDUCE":
                for place in [
                    place
                    for place in weights.gradients
                    if place[0] == task.role and weights.rank[place] == rank
                ]:
                    reduced[place] += weights.gradients.pop(place)
            elif action.kind == "STEP":
                weights.step(task, reduced)
            else:
                sources = inputs_of(graph, task)
                if any(source not in memory[rank] for source in sources):
                    return None
                memory[rank][task] = weights.value(task, (memory[rank][source] for source in sources))
            at[rank] += 1
            moved = True
    return weights.present if all(next_of(rank) is None for rank in range(len(lists))) else None


def test_the_checker_names_the_message_that_is_wrong():
    made = program(ranks=2, microbatches=2)
    actions = made.lists[0]
    first = {
        kind: next(i for i, action in enumerate(actions) if action.kind == kind)
        for kind in ("SEND", "RECV", "REDUCE")
    }

    def changed(change):
        lists = [list(actions) for actions in made.lists]
        change(lists[0])
        return Program(made.graph, lists)

    for change, message in [
        (lambda a: a.pop(first["SEND"]), "rank 0 never sends .* to rank 1"),
        (lambda a: a.insert(0, a.pop(first["SEND"])), "SEND 1 .* comes before the action itself"),
        (lambda a: a.append(a[first["RECV"]]), "RECV 1 .* is there more than once"),
        (lambda a: a.append(a.pop(first["RECV"])), "rank 0 runs .* before it receives"),
        (lambda a: a.append(a[first["REDUCE"]]), "REDUCE .* is not where it belongs"),
        (lambda a: a.append(a.pop(first["REDUCE"])), "STEP .* before its gradients are reduced"),
        (lambda a: a.pop(first["REDUCE"]), "STEP .* before its gradients are reduced"),
        (lambda a: a.insert(0, a.pop(first["REDUCE"])), "REDUCE .* comes before W "),
        (lambda a: a.append(a[first["SEND"]]._replace(peer=0)), "nobody needs that message"),
        (
            lambda a: a.append(Action("F", a[0].task._replace(microbatch=99))),
            "there is no such action in this window",
        ),
    ]:
        with pytest.raises(BadSchedule, match=message):
            check_program(changed(change))


def test_sends_in_another_order_than_receives_are_a_deadlock():
    made = program(ranks=2, microbatches=3)
    lists = [list(actions) for actions in made.lists]
    places = [i for i, action in enumerate(lists[1]) if action.kind == "RECV"][:2]
    used = next(i for i, action in enumerate(lists[1]) if action.kind == "F")
    # The second message is received after the first one's use; received first, it comes
    # when rank 0 has not sent it yet
    assert places[1] > used
    lists[1].insert(0, lists[1].pop(places[1]))
    with pytest.raises(
        BadSchedule, match=r"ranks wait for each other's messages: rank 0 at SEND 1 .*; rank 1 at RECV 0"
    ):
        check_program(Program(made.graph, lists))
