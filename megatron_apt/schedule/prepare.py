"""What a run needs of its pipeline: how each network is cut, and the checked program of
every window of iterations.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch.distributed as dist

from megatron_apt.config import PipelineConfig
from megatron_apt.methods.base import Method, Phase, roles_of
from megatron_apt.models.stages import Cut
from megatron_apt.parallel.mesh import Mesh
from megatron_apt.schedule import calibration
from megatron_apt.schedule.build import Built, NoRoom, gpipe, phases_apart, search
from megatron_apt.schedule.check import check_program
from megatron_apt.schedule.graph import Cost, Graph, Window
from megatron_apt.schedule.policies import placement, start
from megatron_apt.schedule.program import Program, lower


class Pipeline:
    """The pipeline of one run, the same on every rank.

    Attributes:
        placement: role -> rank of each of its stages.
    """

    def __init__(self, config: PipelineConfig, method: Method, mesh: Mesh):
        self.config, self.method, self.mesh = config, method, mesh
        ranks, depths = mesh.pp.size, {name: role.depth for name, role in method.roles.items()}
        # A V wants two stages of every network on each rank; the apart schedules are a line by nature.
        chunks = config.chunks or (
            2 if config.schedule == "interleaved" and min(depths.values()) >= 2 * ranks else 1
        )
        chunks = chunks if ranks > 1 else 1
        for name, depth in depths.items():
            stages = chunks * ranks
            if depth < stages:
                remedy = "use a smaller parallel.pp" + (" or pipeline.chunks 1" if chunks > 1 else "")
                raise ValueError(
                    f"the {name} has {depth} blocks, which do not make {stages} pipeline stages "
                    f"(parallel.pp={ranks}, {chunks} on each); {remedy}"
                )
        self.placement = dict.fromkeys(depths, placement(ranks, chunks))
        # Of the deepest network's share of a rank
        unit = Cost(config.forward, config.input_gradient, config.weight_gradient)
        if config.calibration:
            unit = calibration.read(config.calibration).relative
        share = max(depths.values()) / ranks
        self._costs = {
            name: [unit * (len(Cut(len(on)).blocks(depths[name], k)) / share) for k in range(len(on))]
            for name, on in self.placement.items()
        }
        self.program = lru_cache(maxsize=8)(self._program)

    def cut(self, role: str) -> Cut:
        """The stages of a role that this rank holds."""
        ranks = self.placement[role]
        return Cut(len(ranks), tuple(stage for stage, rank in enumerate(ranks) if rank == self.mesh.pp.rank))

    def _program(self, microbatches: int, iterations: int) -> Program:
        """The checked program of a window, which drains at its end.

        Raises:
            BadSchedule, NoRoom: it does not fit into the memory allowed.
            ValueError: ranks would not run the same one.
        """
        phases, ranks = self.method.phases, self.mesh.pp.size
        if ranks == 1:
            return one_rank(phases, microbatches, iterations)
        cap = self.config.cap or memory_of_1f1b(phases, ranks)
        window = Window(phases, self.placement, microbatches, iterations, self._costs, self.config.message)
        try:
            built = self._built(window, cap)
        except NoRoom as error:
            raise NoRoom(f"pipeline.cap={cap:g}: {error}; allow more, or 0 for the default") from None
        if self.config.schedule == "gpipe":
            cap = math.inf
        program = lower(built.graph, built.order, built.timeline)
        check_program(program, cap)
        digests: list[int] = [0] * ranks
        dist.all_gather_object(digests, program.digest, group=self.mesh.pp.group)
        if len(set(digests)) > 1:
            raise ValueError(
                f"pipeline ranks made different schedules (digests {digests}); start all of them with one "
                "configuration and one version"
            )
        return program

    def _built(self, window: Window, cap: float) -> Built:
        if self.config.schedule == "interleaved":
            return self._interleaved(window, cap)
        if self.config.schedule == "gpipe":
            return gpipe(Graph(replace(window, split=False, apart=True)))
        return phases_apart(
            Graph(replace(window, split=self.config.schedule == "zero_bubble", apart=True)), cap
        )

    def _interleaved(self, window: Window, cap: float) -> Built:
        """Where forwards can be run once for two iterations, as many of them as pays:
        each holds its activations across the step between them.
        """
        best = search(Graph(window), start(window.phases), cap, self.config.evaluations)
        ahead = any(
            segment.ahead
            for phase in window.phases
            for branch in phase.branches
            for segment in branch.segments
        )
        counts = (
            {min(window.microbatches, int(share * cap)) for share in (0.125, 0.25, 0.5, 1.0)}
            if ahead and window.iterations > 1
            else set()
        )
        for count in sorted(counts - {0}):
            try:
                found = search(
                    Graph(replace(window, shared=count)), start(window.phases), cap, self.config.evaluations
                )
            except NoRoom:
                break
            best = min(best, found, key=lambda built: built.timeline.makespan)
        return best


def memory_of_1f1b(phases: Sequence[Phase], ranks: int) -> float:
    """Most live activations of 1F1B phase by phase: as many microbatches as ranks, of the
    most versions a network keeps of one; at least two, which is what a chain of two
    networks comes to.
    """
    kept = [
        segment.copies
        for phase in phases
        for branch in phase.branches
        for segment in branch.segments
        if segment.grad != "none"
    ]
    return float(ranks * max(2, *kept))


def one_rank(phases: Sequence[Phase], microbatches: int, iterations: int = 1) -> Program:
    """Plain alternation on one rank: phase by phase, each microbatch through all of its branches."""
    roles = roles_of(phases)
    graph = Graph(
        Window(
            tuple(phases),
            dict.fromkeys(roles, (0,)),
            microbatches,
            iterations,
            dict.fromkeys(roles, Cost()),
            split=False,
        )
    )
    number = {phase.name: i for i, phase in enumerate(phases)}

    def place(task: int) -> tuple:
        what = graph.tasks[task]
        return what.iteration, number[what.phase], what.kind == "STEP", what.microbatch, task

    program = lower(graph, [sorted(range(len(graph.tasks)), key=place)])
    check_program(program)
    return program


def without_update(program: Program) -> Program:
    """The same without reductions and steps: gradients stay as this rank accumulated them."""
    return Program(
        program.graph,
        [
            [action for action in actions if action.kind not in ("REDUCE", "STEP")]
            for actions in program.lists
        ],
    )
