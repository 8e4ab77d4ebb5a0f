"""Where schedules begin: placements of stages, and policies from which the search starts."""

from collections.abc import Sequence

from megatron_apt.methods.base import Phase
from megatron_apt.schedule.build import Policy, Wish


def placement(ranks: int, chunks: int) -> tuple[int, ...]:
    """Rank of each stage when every rank holds `chunks` of them: there and back again (a
    V for 2), so that every rank is near both ends.
    """
    there = tuple(range(ranks))
    return sum((there if chunk % 2 == 0 else there[::-1] for chunk in range(chunks)), ())


def start(phases: Sequence[Phase]) -> tuple[Policy, ...]:
    """What long searches found for APT, which carries over to other sizes; none for a
    method with other branches.
    """
    branches = {(phase.name, branch.name) for phase in phases for branch in phase.branches}
    return tuple(policy for policy in (_EVEN, _ATTENTION) if policy.keys() == branches)


# 8 ranks in a V, 16 microbatches, F = I = W, at most 16 live activations: it reaches the
# lower bound there, and on 4 ranks.
_EVEN: Policy = {
    ("g", "fake"): Wish(0.332, -0.171, 0.273, -0.722, 6.955),
    ("d", "real"): Wish(0.366, 0.417, 1.298, 2.859, 6.717),
    ("d", "fake"): Wish(0.997, -0.094, 0.242, 0.757, 0.907),
}

# The same for F 1, I 1.8, W 0.3 (a video's attention): bubble 0.02 once it is justified.
_ATTENTION: Policy = {
    ("g", "fake"): Wish(0.001, 0.211, 1.046, 1.409, -0.939),
    ("d", "real"): Wish(0.243, 0.249, 1.164, 1.194, -0.899),
    ("d", "fake"): Wish(0.465, 0.191, 0.939, 2.151, 1.175),
}
