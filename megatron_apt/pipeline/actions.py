"""A schedule is a list of actions per rank. Today's schedules have one pipeline stage.

F 0.1 m3       forward of segment 1 of the phase's branch 0 on microbatch 3
B 0.1 m3       its backward: input gradient, and weight gradient where the segment trains its role
STEP generator
"""

from dataclasses import dataclass
from typing import Literal

from megatron_apt.methods.base import Phase


@dataclass(frozen=True)
class Action:
    kind: Literal["F", "B", "STEP"]
    branch: int = -1  # index in the phase
    segment: int = -1
    microbatch: int = -1
    role: str = ""

    def __str__(self) -> str:
        return f"STEP {self.role}" if self.kind == "STEP" else f"{self.kind} {self.branch}.{self.segment} m{self.microbatch}"


def alternate(phase: Phase, microbatches: int) -> list[Action]:
    """Plain order on one stage: every branch of every microbatch forward and back, then the step."""
    actions = []
    for m in range(microbatches):
        for b, branch in enumerate(phase.branches):
            forward = [Action("F", b, s, m) for s in range(len(branch.segments))]
            backward = [Action("B", b, s, m) for s in reversed(range(len(branch.segments))) if branch.segments[s].grad != "none"]
            actions += forward + backward
    return [*actions, Action("STEP", role=phase.updates)]
