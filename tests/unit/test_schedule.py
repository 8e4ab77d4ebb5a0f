"""Schedules: what they must keep; that checker and builders keep it (the judge:
support/symbolic.py).
"""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_apt.plan.schedule import ScheduleConfig, parse_cost, schedule, schedules
from megatron_apt.schedule.build import list_schedule, phases_apart, search
from megatron_apt.schedule.check import BadSchedule, check
from megatron_apt.schedule.graph import Cost, Graph, Task, Window
from megatron_apt.schedule.policies import start
from megatron_apt.schedule.program import read
from megatron_apt.schedule.simulate import Stuck, lower_bound, simulate
from support.symbolic import (
    APT,
    METHODS_UNDER_TEST,
    alternation,
    assert_harm_is_refused,
    weights_after,
    window,
)


@pytest.mark.parametrize(
    "task",
    [
        Task("F", "generator", 2, 0, "d", "fake", 0, 13),
        Task("W", "my.teacher", 0, 3, "a", "b.c", 1, 0),
        Task("STEP", "discriminator", 7, 2, "d"),
    ],
)
def test_actions_are_read_as_they_are_written(task):
    assert Task.parse(str(task)) == task


@pytest.mark.parametrize(
    "text",
    [
        "F generator.2 i0 d/fake.0",
        "B generator.2 i0 d/fake.0 m3",
        "STEP generator i0 g",
        "STEP generator.0 i0",
        "F generator.2 i0 d/fake.0 3",
        "",
    ],
)
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="is not an action; one reads"):
        Task.parse(text)


def test_the_graph_of_apt_counts_what_the_method_says():
    """G phase: G F I W, D F I. D phase: twice D F I W for the stacked pair, G F, D F I W: 15 units."""
    graph = Graph(window(ranks=4, microbatches=5, iterations=2, chunks=2))
    assert graph.load == [15.0 * 5 * 2] * 4
    assert sum(graph.live) == pytest.approx(0)
    kinds = Counter((t.kind, t.phase, t.branch) for t in graph.tasks)
    assert (
        kinds["W", "g", "fake"] == kinds["F", "d", "real"] == 8 * 5 * 2
        and kinds["STEP", "g", ""] == kinds["STEP", "d", ""] == 4 * 2
    )


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.integers(1, 4),
    microbatches=st.integers(1, 5),
    iterations=st.integers(1, 3),
    chunks=st.sampled_from([1, 2]),
    message=st.sampled_from([0.0, 0.3]),
    cost=st.builds(Cost, st.floats(0.5, 2), st.floats(0.5, 3), st.floats(0.1, 2)),
    room=st.sampled_from([0, 0.5, 1, 3, 9]),
    seed=st.integers(0, 99),
)
def test_interleaved_schedules_compute_what_alternation_computes(
    ranks, microbatches, iterations, chunks, message, cost, room, seed
):
    graph = Graph(window(APT, ranks, microbatches, iterations, chunks, cost, message=message))
    cap = 2 + room  # a microbatch takes 2: of G and D, or of the stacked pair
    built = search(graph, start(APT), cap, evaluations=seed % 5)
    check(graph, built.order, cap)
    assert weights_after(graph, built.order) == weights_after(graph, alternation(graph)) is not None
    assert lower_bound(graph) <= lower_bound(graph, cap) <= built.timeline.makespan + 1e-9
    assert built.order == search(graph, start(APT), cap, evaluations=seed % 5).order


@pytest.mark.parametrize("method", METHODS_UNDER_TEST)
def test_any_method_is_scheduled(method):
    graph = Graph(window(METHODS_UNDER_TEST[method], ranks=3, microbatches=4))
    built = search(graph, start(graph.window.phases), 20, evaluations=0)
    check(graph, built.order, 20)
    assert weights_after(graph, built.order) == weights_after(graph, alternation(graph)) is not None


@pytest.mark.parametrize("split", [False, True])
def test_phases_apart_is_1f1b_and_keeps_its_memory(split):
    graph = Graph(window(ranks=4, microbatches=8, split=split, apart=True))
    built = phases_apart(graph, 8)
    check(graph, built.order, 8)
    assert weights_after(graph, built.order) == weights_after(graph, alternation(graph)) is not None
    flow = Graph(
        window(METHODS_UNDER_TEST["flow"], ranks=4, microbatches=8, iterations=1, split=False, apart=True)
    )
    apart = phases_apart(flow, 8)
    assert apart.timeline.makespan == 3 * (8 + 4 - 1)  # 1F1B: (M + P - 1)(F + B)
    assert apart.timeline.peak_live == [4, 3, 2, 1]


def test_mutations_that_change_meaning_are_caught():
    graph = Graph(window(ranks=3, microbatches=3))
    order = search(graph, start(APT), 10, evaluations=0).order
    assert_harm_is_refused(
        order, lambda lists: weights_after(graph, lists), lambda lists: check(graph, lists), harmless=20
    )


def test_the_checker_names_what_is_wrong():
    graph = Graph(window(ranks=2, microbatches=2, iterations=1))
    order = search(graph, start(APT), 8, evaluations=0).order

    def without(change):
        mutated = [list(tasks) for tasks in order]
        change(mutated)
        return mutated

    step = graph.number[Task("STEP", "generator", 0, 0, "g")]
    for change, message in [
        (lambda o: o[0].remove(step), r"STEP generator\.0 i0 g is missing"),
        (lambda o: o[0].append(step), r"STEP generator\.0 i0 g is there 2 times"),
        (
            lambda o: (o[0].remove(step), o[1].append(step)),
            r"STEP generator\.0 i0 g is on rank 1, its weights are on rank 0",
        ),
        (
            lambda o: (o[0].remove(step), o[0].insert(0, step)),
            r"rank 0 runs STEP generator\.0 i0 g before .* g/fake\.0 m., which it needs",
        ),
        (lambda o: o.pop(), "1 lists for 2 ranks"),
    ]:
        with pytest.raises(BadSchedule, match=message):
            check(graph, without(change))
    with pytest.raises(BadSchedule, match="live activations at once, more than 2"):
        check(graph, order, cap=2)


def test_ranks_that_wait_for_each_other_are_named():
    flow = METHODS_UNDER_TEST["flow"]
    graph = Graph(window(flow, ranks=2, microbatches=2, iterations=1))
    f = [
        [graph.number[Task("F", "generator", stage, 0, "flow", "flow", 0, m)] for m in range(2)]
        for stage in range(2)
    ]
    i = [
        [graph.number[Task("I", "generator", stage, 0, "flow", "flow", 0, m)] for m in range(2)]
        for stage in range(2)
    ]
    with pytest.raises(Stuck, match=r"rank 0 at I generator\.0 .* m0; rank 1 at F generator\.1 .* m1"):
        simulate(graph, [[f[0][0], i[0][0], f[0][1]], [f[1][1], f[1][0]]])


# Attention's input gradient costs more than its forward, and it has few weights
ATTENTION = Cost(1, 1.8, 0.3)


@pytest.mark.parametrize(
    ("ranks", "microbatches", "cost", "reach"),
    [
        (2, 4, Cost(), 0.003),
        (4, 8, Cost(), 0.004),
        (8, 16, Cost(), 0.004),
        (16, 32, Cost(), 0.006),
        (4, 8, ATTENTION, 0.02),
        (8, 16, ATTENTION, 0.03),
    ],
)
def test_the_bubble_of_the_interleaved_schedule(ranks, microbatches, cost, reach):
    """Four iterations of APT in no more activations than phases apart hold."""
    cap = 2 * ranks
    graph = Graph(window(APT, ranks, microbatches, 4, 2, cost))
    built = search(graph, start(APT), cap, evaluations=0)
    check(graph, built.order, cap)
    assert built.timeline.bubble <= reach
    apart = phases_apart(Graph(window(APT, ranks, microbatches, 4, cost=cost, split=False, apart=True)), cap)
    assert max(built.timeline.peak_live) <= max(apart.timeline.peak_live)
    assert apart.timeline.bubble > 0.19


def test_search_finds_the_way_without_a_start():
    graph = Graph(window(APT, 4, 8, 4, 2, ATTENTION))
    assert search(graph, (), 8, evaluations=100).timeline.bubble <= 0.03


def test_a_schedule_run_backwards_keeps_to_the_graph_and_its_memory():
    graph = Graph(window(APT, 3, 4, 2, 2, ATTENTION, message=0.1))
    listed = list_schedule(graph, range(len(graph.tasks)), 4)
    turned = list_schedule(
        graph, [-at - time for at, time in zip(listed.start, graph.time, strict=True)], 4, backwards=True
    )
    check(graph, turned.order, 4)
    timeline = simulate(graph, turned.order)
    assert timeline.makespan <= turned.makespan + 1e-9
    assert all(at <= latest + 1e-9 for at, latest in zip(timeline.start, turned.start, strict=True))
    assert weights_after(graph, turned.order) == weights_after(graph, alternation(graph)) is not None


def test_memory_bounds_the_makespan():
    """One rank, F = I = W: a microbatch holds 1 from the start of F to the end of W, so
    no two of them fit beside each other.
    """
    graph = Graph(window(METHODS_UNDER_TEST["flow"], ranks=1, microbatches=3, iterations=1))
    assert lower_bound(graph) == lower_bound(graph, 1) == 9
    deep = Graph(window(METHODS_UNDER_TEST["flow"], ranks=4, microbatches=6, iterations=1))
    # On the first rank a microbatch takes 4 F, 4 I and a W; two at a time.
    assert lower_bound(deep, 2) == 6 * 9 / 2 > lower_bound(deep)
    assert search(deep, (), 2, evaluations=30).timeline.makespan >= 27


def test_a_large_schedule_is_built():
    graph = Graph(window(APT, 16, 64, 1, chunks=2))
    check(graph, search(graph, start(APT), 32, evaluations=0).order, 32)


def test_a_placement_must_load_every_rank_alike():
    with pytest.raises(ValueError, match=r"placement of 'generator' gives the ranks \[2, 1\] stages"):
        Window(
            APT,
            {"generator": (0, 1, 0), "discriminator": (0, 1)},
            1,
            1,
            {"generator": Cost(), "discriminator": Cost()},
        )
    with pytest.raises(ValueError, match="role 'discriminator' of the method has no placement"):
        Window(APT, {"generator": (0, 1)}, 1, 1, {"generator": Cost()})


def test_the_command_writes_figures_lists_and_a_picture(tmp_path, capsys):
    files = {name: str(tmp_path / f"s.{name}") for name in ("json", "txt", "png")}
    written = {"json": files["json"], "dump": files["txt"], "picture": files["png"]}
    options = ScheduleConfig(ranks=4, microbatches=8, iterations=2, evaluations=20, frontier=True, **written)
    schedule(options)
    assert "interleaved" in capsys.readouterr().out
    figures = json.loads(Path(files["json"]).read_text())
    frontier = figures["frontier"]
    assert list(frontier) == ["4", "6", "8", "12", "16"] and sorted(frontier.values(), reverse=True) == list(
        frontier.values()
    )
    assert frontier["8"] <= figures["bubble"]["interleaved"]
    for figure in ("bubble", "peak_live", "bound"):
        assert figures[figure].keys() == {"apart_1f1b", "apart_zb", "interleaved"}
    assert figures["bubble"]["interleaved"] < figures["bubble"]["apart_zb"] < figures["bubble"]["apart_1f1b"]
    assert max(figures["peak_live"].values()) <= 8
    built = schedules(options)["interleaved"]
    written = read(Path(files["txt"]).read_text(), APT, built.graph.window.costs)
    assert written.order == built.order and written.graph.window.placement == built.graph.window.placement
    assert Path(files["png"]).stat().st_size > 10_000


@pytest.mark.parametrize("cost", ["F=1,I=1,X=2", "F=one", "", "F=0"])
def test_a_bad_cost_is_refused(cost):
    with pytest.raises(ValueError, match=r"cost .*: give times above 0 as F=1,I=1\.8,W=0\.3"):
        parse_cost(cost)


def test_too_little_memory_is_said():
    with pytest.raises(ValueError, match=r"never find room in 1\.5 activations"):
        schedules(
            ScheduleConfig(ranks=3, microbatches=4, iterations=1, cap=1.5, evaluations=3, compare=False)
        )
