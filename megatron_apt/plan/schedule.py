"""megatron-apt schedule: what a pipeline would cost, before a cluster is booked; the
interleaved schedule beside phases apart.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from rich.console import Console
from rich.table import Table

from megatron_apt import outputs
from megatron_apt.config import RunConfig
from megatron_apt.methods.base import Phase, roles_of
from megatron_apt.methods.build import build_method
from megatron_apt.methods.registry import DEFAULT, MethodName
from megatron_apt.outputs import check_number
from megatron_apt.schedule import calibration
from megatron_apt.schedule.build import Built, NoRoom, Policy, phases_apart, search
from megatron_apt.schedule.check import check_program
from megatron_apt.schedule.graph import Cost, Graph, Window
from megatron_apt.schedule.policies import placement, start
from megatron_apt.schedule.prepare import memory_of_1f1b
from megatron_apt.schedule.program import Program, lower

PICTURES = (".png", ".svg", ".pdf")
MOST_TASKS = 250_000  # of a window: more take many minutes and gigabytes
MOST_TRIED = 200_000_000  # tasks times evaluations
NAMES = {
    "apart_1f1b": "phases apart, 1F1B",
    "apart_zb": "phases apart, zero-bubble",
    "interleaved": "interleaved",
}


@dataclass(frozen=True)
class ScheduleConfig:
    ranks: int = 8
    """Pipeline ranks."""
    microbatches: int = 16
    iterations: int = 4
    """In one window, whose start-up and drain are counted."""
    cost: str = "F=1,I=1,W=1"
    """Time of the part of a network that one rank holds: forward, input gradient, weight gradient."""
    calibration: str = ""
    """A file of tools/benchmarks/gpu.sh, or FILE:FORMAT (e.g. `calibration.json:fp8
    current`), whose measured times take the place of `cost`.
    """
    discriminator: float = 1.0
    """Cost of the discriminator as a multiple of the generator's."""
    message: float = 0.0
    """Time of a message between ranks."""
    cap: float = 0.0
    """Most live activations on a rank, in microbatches of its part of one network; 0:
    twice the ranks, which 1F1B phase by phase needs.
    """
    chunks: Literal[0, 1, 2] = 0
    """Stages of each network on a rank in the interleaved schedule; 2: there and back, a
    V; 0: the better of both.
    """
    method: MethodName = DEFAULT
    evaluations: int = -1
    """Schedules tried in the search; -1: 200, and fewer for windows of many actions, so
    that the command takes a minute or two.
    """
    seed: int = 0
    compare: bool = True
    """Show 1F1B and zero-bubble, phase by phase, too."""
    picture: str = ""
    """Draws the timelines to this PNG or SVG file."""
    dump: str = ""
    """Writes the interleaved action lists to this file."""
    json: str = ""
    frontier: bool = False
    """Search the interleaved schedule for other caps too and show its bubble against memory."""

    def __post_init__(self) -> None:
        for name, most in (("ranks", 1024), ("microbatches", 16384), ("iterations", 1024)):
            check_number(name, getattr(self, name), 1, most)
        for name, least, most in (
            ("cap", 0, 1e9),
            ("message", 0, 1e9),
            ("discriminator", 1e-6, 1e6),
            ("evaluations", -1, 10_000),
        ):
            check_number(name, getattr(self, name), least, most)
        check_number("seed", self.seed, -(2**63), 2**63 - 1)
        tasks = self.tasks
        if tasks > MOST_TASKS or self.evaluations * tasks > MOST_TRIED:
            given = ", ".join(
                f"{name}={getattr(self, name)}"
                for name in ("ranks", "microbatches", "iterations", "evaluations")
            )
            raise ValueError(
                f"{given}: a window of up to {tasks:,} tasks; at most {MOST_TASKS:,} are searched, and "
                f"{MOST_TRIED:,} in all evaluations together; lower one of them"
            )

    @property
    def tasks(self) -> int:
        """Of the largest window that is searched, at most."""
        segments = sum(len(branch.segments) for phase in _phases(self) for branch in phase.branches)
        return 3 * segments * (self.chunks or 2) * self.ranks * self.microbatches * self.iterations

    @property
    def unit(self) -> Cost:
        """Time of the part of the generator that one rank holds."""
        return calibration.read(self.calibration).relative if self.calibration else parse_cost(self.cost)

    @property
    def cost_text(self) -> str:
        unit = self.unit
        return (
            f"F=1,I={unit.I:.2f},W={unit.W:.2f} of {calibration.read(self.calibration).what}"
            if self.calibration
            else self.cost
        )


def parse_cost(text: str) -> Cost:
    """Cost of `F=1,I=1.8,W=0.3`; what is left out is 1.

    Raises:
        ValueError: naming the text.
    """
    try:
        parts = [part.split("=") for part in text.split(",")]
        values = {key.strip(): float(value) for key, value in parts}
        if (
            len(values) < len(parts)
            or not set(values) <= {"F", "I", "W"}
            or not all(1e-6 <= value <= 1e6 for value in values.values())
        ):
            raise ValueError
    except ValueError:
        shown = text if len(text) <= 300 else text[:300] + "..."
        raise ValueError(
            f"cost {shown!r}: give times above 0 as F=1,I=1.8,W=0.3, each once, from 1e-6 to 1e6"
        ) from None
    return Cost(**values)


def schedules(options: ScheduleConfig) -> dict[str, Built]:
    """The schedules to show, each checked."""
    cap = options.cap or memory_of_1f1b(_phases(options), options.ranks)
    try:
        return _schedules(options, cap)
    except NoRoom as error:
        raise NoRoom(f"cap={cap:g}: {error}; allow more, or 0 for the default") from None


def _schedules(options: ScheduleConfig, cap: float) -> dict[str, Built]:
    found = {}
    if options.compare:
        found["apart_1f1b"] = phases_apart(_graph(options, 1, split=False, apart=True), cap)
        found["apart_zb"] = _searched(_graph(options, 1, apart=True), (), cap, options)
    found["interleaved"] = interleaved(options, cap)
    for built in found.values():
        check_program(program(built), cap)
    return found


def program(built: Built) -> Program:
    return lower(built.graph, built.order, built.timeline)


def interleaved(options: ScheduleConfig, cap: float) -> Built:
    graphs = [_graph(options, chunks) for chunks in ((options.chunks,) if options.chunks else (2, 1))]
    return min(
        (_searched(graph, start(graph.window.phases), cap, options) for graph in graphs), key=_makespan
    )


def _searched(graph: Graph, policies: Sequence[Policy], cap: float, options: ScheduleConfig) -> Built:
    evaluations = options.evaluations if options.evaluations >= 0 else min(200, 2_500_000 // len(graph.tasks))
    return search(graph, policies, cap, evaluations, options.seed)


def frontier(options: ScheduleConfig) -> dict[float, Built]:
    """The interleaved schedule for caps of once to four times the ranks, where a
    microbatch fits at all; each checked.
    """
    found: dict[float, Built] = {}
    for cap in (share * options.ranks for share in (1.0, 1.5, 2.0, 3.0, 4.0)):
        with suppress(NoRoom):
            # What fits into less fits into this
            found[cap] = min([*list(found.values())[-1:], interleaved(options, cap)], key=_makespan)
            check_program(program(found[cap]), cap)
    return found


def _phases(options: ScheduleConfig) -> tuple[Phase, ...]:
    return build_method(RunConfig(method=options.method), None).phases


def _graph(options: ScheduleConfig, chunks: int, **kind) -> Graph:
    phases = _phases(options)
    costs = costs_of(phases, options.unit, options.discriminator)
    places = dict.fromkeys(costs, placement(options.ranks, chunks))
    return Graph(
        Window(phases, places, options.microbatches, options.iterations, costs, options.message, **kind)
    )


def costs_of(phases: Sequence[Phase], cost: Cost, discriminator: float) -> dict[str, Cost]:
    """The cost of each role; the discriminator's times are so many times as long."""
    other = Cost(*(discriminator * value for value in (cost.F, cost.I, cost.W)))
    return {role: other if role == "discriminator" else cost for role in roles_of(phases)}


def _makespan(built: Built) -> float:
    return built.timeline.makespan


def bubble_bound(built: Built) -> float:
    return 1 - sum(built.graph.load) / (built.graph.window.ranks * built.bound)


def schedule(options: ScheduleConfig) -> None:
    """Prints the tables, and writes the files that are asked for.

    Raises:
        ValueError: a file that cannot be written, before anything is searched; a cap that
            is too small.
    """
    outputs.check("json", options.json)
    outputs.check("dump", options.dump)
    outputs.check("picture", options.picture, PICTURES)
    found = schedules(options)
    alone = schedules(replace(options, iterations=1)) if options.iterations > 1 else {}
    by_cap = frontier(options) if options.frontier else {}
    case = (
        f"{options.method}, {options.ranks} ranks, {options.microbatches} microbatches, {options.iterations} "
        f"iterations, {options.cost_text}"
    )
    console = Console()
    console.print(table(case, "", {NAMES[name]: built for name, built in found.items()}))
    if alone:
        console.print(table("One iteration alone", "", {NAMES[name]: built for name, built in alone.items()}))
    console.print(
        "Least bubble: of any schedule with this placement and cap, from the longest path and from what each "
        "rank must do and hold. Peak live: activations held at once, in microbatches of one rank's part of "
        "one network."
    )
    if by_cap:
        console.print(
            table(
                "Interleaved, by most live activations",
                "cap",
                {f"{cap:g}": built for cap, built in by_cap.items()},
            )
        )
    if options.json:
        numbers = (
            figures(found)
            | ({"one_iteration": figures(alone)} if alone else {})
            | (
                {"frontier": {f"{cap:g}": built.timeline.bubble for cap, built in by_cap.items()}}
                if by_cap
                else {}
            )
        )
        outputs.write("json", options.json, json.dumps(numbers, indent=1))
    if options.dump:
        outputs.write("dump", options.dump, program(found["interleaved"]).text())
    if options.picture:
        from megatron_apt.schedule.draw import draw

        with outputs.named_failure("picture", options.picture):
            draw({NAMES[name]: built for name, built in found.items()}, options.picture)


def table(title: str, first: str, found: Mapping[str, Built]) -> Table:
    table = Table(title=title)
    for heading in (first, "makespan", "bubble", "least bubble", "peak live"):
        table.add_column(heading, justify="left" if heading == first else "right")
    for name, built in found.items():
        line = built.timeline
        table.add_row(
            name,
            f"{line.makespan:.1f}",
            f"{line.bubble:.4f}",
            f"{bubble_bound(built):.4f}",
            f"{max(line.peak_live):g}",
        )
    return table


def figures(found: Mapping[str, Built]) -> dict:
    return {
        "bubble": {name: built.timeline.bubble for name, built in found.items()},
        "peak_live": {name: max(built.timeline.peak_live) for name, built in found.items()},
        "bound": {name: bubble_bound(built) for name, built in found.items()},
        "makespan": {name: built.timeline.makespan for name, built in found.items()},
    }
