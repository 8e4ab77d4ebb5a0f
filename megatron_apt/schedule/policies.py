"""Where schedules begin: placements of stages, and policies from which the search starts."""

from collections.abc import Sequence

from megatron_apt.methods.base import Phase
from megatron_apt.schedule.build import Policy, Timing


def placement(ranks: int, chunks: int) -> tuple[int, ...]:
    """Rank of each stage when every rank holds `chunks` of them: there and back again (a
    V for 2), so that every rank is near both ends.
    """
    there = tuple(range(ranks))
    return sum((there if chunk % 2 == 0 else there[::-1] for chunk in range(chunks)), ())


def start(phases: Sequence[Phase]) -> tuple[Policy, ...]:
    """The schedules that are known of these phases: as many as every branch has timings."""
    timings = {(phase.name, branch.name): branch.timings for phase in phases for branch in phase.branches}
    return tuple(
        {branch: Timing(*timing) for branch, timing in zip(timings, policy, strict=True)}
        for policy in zip(*timings.values(), strict=False)
    )
