"""The words of a schedule. Each rank has one list of them; the same lists are printed,
parsed, drawn, simulated, checked and run.

F generator.2 i0 d/fake.0 m3            forward of stage 2 of the generator on microbatch
                                        3, in segment 0 of branch `fake` of phase `d`,
                                        iteration 0
I discriminator.1 i0 d/real.0 m3        its input gradient, which the stage before needs
W discriminator.1 i0 d/real.0 m3        its weight gradient, which nothing needs before
                                        the step
SEND 3 F generator.2 i0 d/fake.0 m3     sends the result of an action to rank 3
RECV 2 F generator.1 i0 d/fake.0 m3     receives that of an action of rank 2
REDUCE generator.2 i0 g                 sums the gradients of phase `g` over data-parallel
                                        ranks
STEP generator.2 i0 g                   updates the weights

Of a REDUCE and a STEP the number is a rank: they concern together all stages of the role
that it holds.
"""

from typing import NamedTuple

COMPUTE = ("F", "I", "W", "STEP")


class Task(NamedTuple):
    """An action that computes."""

    kind: str  # F | I | W | STEP
    role: str
    stage: int
    iteration: int
    phase: str
    branch: str = ""
    segment: int = -1
    microbatch: int = -1

    def __str__(self) -> str:
        head = f"{self.kind} {self.role}.{self.stage} i{self.iteration} {self.phase}"
        return head if self.kind == "STEP" else f"{head}/{self.branch}.{self.segment} m{self.microbatch}"

    @staticmethod
    def parse(text: str) -> "Task":
        """Inverse of str.

        Raises:
            ValueError: naming the text.
        """
        action = Action.parse(text)
        if action.kind not in COMPUTE:
            raise _unknown(text)
        return action.task


class Action(NamedTuple):
    """One entry of a rank's list.

    Attributes:
        kind: F, I, W or STEP, then `task` is what is done; SEND or RECV, then it is what
            made the message; REDUCE, then the STEP it prepares.
        peer: the other rank of a SEND or RECV.
    """

    kind: str
    task: Task
    peer: int = -1

    def __str__(self) -> str:
        if self.kind in ("SEND", "RECV"):
            return f"{self.kind} {self.peer} {self.task}"
        return str(self.task).replace("STEP", "REDUCE", 1) if self.kind == "REDUCE" else str(self.task)

    @staticmethod
    def parse(text: str) -> "Action":
        """Inverse of str.

        Raises:
            ValueError: naming the text.
        """
        try:
            kind, *rest = text.split()
            peer, task_kind = -1, kind
            if kind in ("SEND", "RECV"):
                peer, task_kind, *rest = int(rest[0]), *rest[1:]
            place, iteration, path, *last = rest
            role, stage = place.rsplit(".", 1)
            task = Task(
                "STEP" if kind == "REDUCE" else task_kind,
                role,
                int(stage),
                int(iteration.removeprefix("i")),
                path,
            )
            if task.kind != "STEP":
                phase, tail = path.split("/", 1)
                branch, segment = tail.rsplit(".", 1)
                (microbatch,) = last
                task = task._replace(
                    phase=phase,
                    branch=branch,
                    segment=int(segment),
                    microbatch=int(microbatch.removeprefix("m")),
                )
            action = Action(kind, task, peer)
            if str(action) != text.strip() or task.kind not in COMPUTE:
                raise ValueError
        except (ValueError, IndexError):
            raise _unknown(text) from None
        return action


def _unknown(text: str) -> ValueError:
    return ValueError(
        f"{text!r} is not an action; one reads `F generator.2 i0 d/fake.0 m3` or `STEP generator.2 i0 g`"
    )
