"""Where schedules begin: placements of stages, and policies from which the search starts."""

from collections.abc import Sequence
from dataclasses import replace

from megatron_apt.methods.base import Phase
from megatron_apt.pipeline.build import Policy, Wish


def placement(ranks: int, chunks: int) -> tuple[int, ...]:
    """Rank of each stage when every rank holds `chunks` of them: there and back again (a V for 2), so that every rank is near both ends."""
    there = tuple(range(ranks))
    return sum((there if chunk % 2 == 0 else there[::-1] for chunk in range(chunks)), ())


def start(phases: Sequence[Phase]) -> tuple[Policy, ...]:
    """Policies to begin with: a cautious one for any method, and what long searches found for APT on 8 ranks, which carries over to other sizes."""
    cautious = _cautious(phases)
    found = []
    for times in (_EVEN, _ATTENTION, _ATTENTION_LINE):
        known = {kind: wish for kind, wish in times.items() if kind in cautious}
        if known:
            guarded = {k: replace(w, window=cautious[k].window, narrowing=0.0, reserve=0.0) if k[0] == "F" else w for k, w in known.items()}
            found += [cautious | known, cautious | guarded]
    return (*found, cautious)


def _cautious(phases: Sequence[Phase]) -> Policy:
    """Phase by phase, backward before forward, weight gradients last. Each kind of forward has memory of its own, so none blocks another."""
    kinds = [(phase.name, branch.name, s, segment.grad) for phase in phases for branch in phase.branches for s, segment in enumerate(branch.segments)]
    keeping = sum(grad != "none" for *_, grad in kinds)
    policy: Policy = {}
    for i, (phase, branch, s, grad) in enumerate(kinds):
        policy["F", phase, branch, s] = Wish(offset=i / len(kinds), window=0.5 / max(1, keeping))
        if grad != "none":
            policy["I", phase, branch, s] = Wish(offset=i / len(kinds) - 1)
        if grad == "full":
            policy["W", phase, branch, s] = Wish(offset=i / len(kinds) + 0.5)
    return policy


# 8 ranks in a V, 16 microbatches, F = I = W, at most 16 live activations, 1,905 evaluations: it reaches the lower bound there.
_EVEN: Policy = {
    ("F", "g", "fake", 0): Wish(0.137, 0.11, -0.199, window=0.694, narrowing=0.232, reserve=0.0625),
    ("F", "g", "fake", 1): Wish(-0.405, -0.151, -0.056, window=0.625, narrowing=0.575),
    ("I", "g", "fake", 1): Wish(-0.117, 0.186, -0.067),
    ("I", "g", "fake", 0): Wish(-0.181, -0.044, -0.006),
    ("W", "g", "fake", 0): Wish(0.384, 0.342, -0.246),
    ("F", "d", "real", 0): Wish(0.264, -0.013, -0.252, window=0.656, narrowing=0.288, reserve=0.125),
    ("I", "d", "real", 0): Wish(-0.001, 0.449, -0.267),
    ("W", "d", "real", 0): Wish(0.578, -0.122, -0.038),
    ("F", "d", "fake", 0): Wish(-0.096, 0.09, -0.469),
    ("F", "d", "fake", 1): Wish(0.124, 0.299, 0.101, window=0.306, reserve=0.3125),
    ("I", "d", "fake", 1): Wish(-0.632, 0.104, 0.301),
    ("W", "d", "fake", 1): Wish(0.667, 0.338, -0.089),
}

# 8 ranks in a V, 16 microbatches, F 1, I 1.8, W 0.3 (a video's attention), at most 16 live activations, 4,700 evaluations: bubble 0.088.
_ATTENTION: Policy = {
    ("F", "g", "fake", 0): Wish(-0.183, 0.3265, 0.0672, window=0.4206, narrowing=0.5035),
    ("F", "g", "fake", 1): Wish(-0.1494, 0.3265, 0.0672, window=0.2944, narrowing=0.5035),
    ("I", "g", "fake", 1): Wish(-0.0553, 0.3265, -0.121),
    ("I", "g", "fake", 0): Wish(0.0052, 0.3265, -0.121),
    ("W", "g", "fake", 0): Wish(0.072, 0.3265, -0.121),
    ("F", "d", "real", 0): Wish(0.0181, 0.5981, 0.0355, window=0.7894, narrowing=0.7103, reserve=0.0312),
    ("I", "d", "real", 0): Wish(0.0678, 0.5981, -0.064),
    ("W", "d", "real", 0): Wish(0.2483, 0.5981, -0.064),
    ("F", "d", "fake", 0): Wish(0.3631, 0.0356, 0.0297),
    ("F", "d", "fake", 1): Wish(0.3779, 0.0356, 0.0297, window=0.602, narrowing=0.1752, reserve=0.0625),
    ("I", "d", "fake", 1): Wish(0.4195, 0.0356, -0.0534),
    ("W", "d", "fake", 1): Wish(0.7017, 0.0356, -0.0534),
}

# The same in a line, 4,174 evaluations: bubble 0.098; a better start on 4 ranks.
_ATTENTION_LINE: Policy = {
    ("F", "g", "fake", 0): Wish(-0.323, 0.025, 0.004, window=0.68, narrowing=0.122, reserve=0.0938),
    ("F", "g", "fake", 1): Wish(-0.291, 0.108, 0.097, window=0.774, narrowing=0.068, reserve=0.0938),
    ("I", "g", "fake", 1): Wish(-0.317, -0.11, -0.07),
    ("I", "g", "fake", 0): Wish(0.168, 0.108, -0.067),
    ("W", "g", "fake", 0): Wish(-0.167, 0.1, -0.085),
    ("F", "d", "real", 0): Wish(0.519, 0.013, -0.113, window=0.966, narrowing=0.294, reserve=0.0312),
    ("I", "d", "real", 0): Wish(0.244, -0.373, 0.005),
    ("W", "d", "real", 0): Wish(0.4, 0.11, -0.27),
    ("F", "d", "fake", 0): Wish(0.508, 0.095, 0.037),
    ("F", "d", "fake", 1): Wish(0.527, 0.08, 0.048, reserve=0.0312),
    ("I", "d", "fake", 1): Wish(0.586, 0.088, -0.06),
    ("W", "d", "fake", 1): Wish(1.03, 0.704, -0.025),
}
