"""NCCL's rules for messages: what locked is seen to lock, and every program runs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_apt.methods.base import Phase
from megatron_apt.schedule.actions import Action, Task
from megatron_apt.schedule.build import gpipe, phases_apart, search
from megatron_apt.schedule.check import check_program
from megatron_apt.schedule.graph import Graph
from megatron_apt.schedule.mail import batched, joined
from megatron_apt.schedule.nccl import Locked, check_streams
from megatron_apt.schedule.policies import start
from megatron_apt.schedule.program import Program, lower
from support.symbolic import ANY_WINDOW, APT, METHODS_UNDER_TEST, window


def merged(actions):
    """What stood beside each other was one batch once."""
    found, fresh = [], True
    for action in actions:
        if action.kind in ("SEND", "RECV"):
            found = [*found, [action]] if fresh else [*found[:-1], [*found[-1], action]]
        fresh = action.kind not in ("SEND", "RECV")
    return found


def program(kind: str, ranks: int, microbatches: int, phases: tuple[Phase, ...] = APT, **options) -> Program:
    if kind == "interleaved":
        graph = Graph(window(phases, ranks, microbatches, **options))
        built = search(graph, start(phases), 4 * ranks, evaluations=0)
    else:
        graph = Graph(window(phases, ranks, microbatches, split=kind == "zero_bubble", apart=True, **options))
        built = gpipe(graph) if kind == "gpipe" else phases_apart(graph, 4 * ranks)
    return lower(built.graph, built.order, built.timeline)


PROGRAMS = [
    (kind, ranks, microbatches)
    for kind in ("1f1b", "zero_bubble", "interleaved")
    for ranks, microbatches in ((2, 4), (2, 8), (4, 4), (4, 8))
]


@pytest.mark.parametrize(("kind", "ranks", "microbatches"), PROGRAMS)
def test_batches_of_neighbours_of_several_tensors_lock_and_single_flat_messages_do_not(
    kind, ranks, microbatches
):
    made = program(kind, ranks, microbatches)
    with pytest.raises(Locked, match=r"on NCCL ranks wait for each other: rank \d at (SEND|RECV) \d"):
        check_streams(made.graph, made.lists, merged, tensors=3)
    check_streams(made.graph, made.lists, batched, tensors=3)
    check_streams(made.graph, made.lists, batched)
    check_program(made)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(["1f1b", "zero_bubble", "interleaved", "gpipe"]), **ANY_WINDOW)
def test_every_program_runs_under_nccls_rules(kind, ranks, microbatches, phases, **options):
    made = program(kind, ranks, microbatches, phases, **options)
    check_streams(made.graph, made.lists, batched)


# --- the rules, by hand


def two_ranks() -> tuple[Graph, Task, Task]:
    """A graph with a message each way: F of the generator's stage 0 to rank 1, its gradient back."""
    graph = Graph(window(METHODS_UNDER_TEST["flow"], 2, 1, 1))
    forward = next(task for task in graph.tasks if task.kind == "F" and task.stage == 0)
    back = next(task for task in graph.tasks if task.kind == "I" and task.stage == 1)
    return graph, forward, back


def test_kernels_of_a_group_run_in_the_order_in_which_they_were_started():
    graph, there, back = two_ranks()
    exchange = [
        [Action("SEND", there, 1), Action("RECV", back, 1)],
        [Action("SEND", back, 0), Action("RECV", there, 0)],
    ]
    with pytest.raises(Locked, match=r"rank 0 at SEND 1 .*; rank 1 at SEND 0"):
        check_streams(graph, exchange, batched)
    check_streams(graph, exchange, merged)  # in one kernel both directions run at once
    check_streams(graph, [exchange[0], exchange[1][::-1]], batched)


def test_a_round_waits_for_all_of_its_operations():
    """Rank 0 sends two tensors beside a receive; rank 1 answers only after the second has come."""
    graph, there, back = two_ranks()
    lists = [
        [Action("SEND", there, 1), Action("RECV", back, 1)],
        [Action("RECV", there, 0), Action("F", there), Action("SEND", back, 0)],
    ]
    check_streams(graph, lists, merged)
    with pytest.raises(Locked, match="rank 0 at RECV 1"):
        check_streams(graph, lists, merged, tensors=2)


def test_a_kernel_waits_for_what_is_computed_before_it_and_computing_for_what_it_takes():
    graph, there, _ = two_ranks()
    used = next(task for task in graph.tasks if task.kind == "F" and task.stage == 1)
    sent, received = Action("SEND", there, 1), Action("RECV", there, 0)
    check_streams(graph, [[Action("F", there), sent], [received, Action("F", used)]], batched)
    late = [Action("F", used), received]  # takes nothing that is under way, so it runs
    check_streams(graph, [[sent], late], batched)
    with pytest.raises(Locked, match="rank 1 at RECV 0"):
        check_streams(graph, [[], [received, Action("F", used)]], batched)


def test_messages_that_meet_others_are_named():
    graph, there, back = two_ranks()
    with pytest.raises(Locked, match=r"rank 0 at SEND 1 F .* meets rank 1 at RECV 0 I"):
        check_streams(graph, [[Action("SEND", there, 1)], [Action("RECV", back, 0)]], batched)


def test_a_message_is_one_tensor_of_one_dtype():
    a, b = torch.arange(6.0).view(2, 3).t(), torch.arange(2.0)
    assert joined([a, b]).tolist() == [0, 3, 1, 4, 2, 5, 0, 1]
    assert joined([b]).data_ptr() == b.data_ptr()
    with pytest.raises(TypeError, match=r"of one dtype.* torch\.float32 and torch\.bfloat16"):
        joined([b, b.bfloat16()])
