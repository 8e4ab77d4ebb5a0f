"""Messages between the ranks of a pipeline: started together where they stand together in
the list, waited for where they are used.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_apt.parallel.mesh import Mesh
from megatron_apt.schedule.actions import Action, Task

# Messages that a rank keeps until they are received: small beside activations, enough
# that it rarely waits
_UNDER_WAY = 8


class Expected(NamedTuple):
    """One tensor of a message."""

    name: str  # what the receiver knows it by
    shape: tuple[int, ...]
    dtype: torch.dtype
    differentiated: bool  # a gradient goes back


class Mail:
    """The messages of one rank.

    Args:
        expected: the tensors in the message with an action's result. Sender and receiver
            know them without asking.
    """

    def __init__(self, mesh: Mesh, expected: Callable[[Task], list[Expected]]):
        self._mesh, self._expected = mesh, expected
        self._written: dict[tuple[Task, int], list[Tensor]] = {}  # to be sent
        self._sending: deque[tuple[list, list[Tensor]]] = deque()  # tensors stay until they are gone
        self._coming: dict[Task, tuple[list, list[tuple[Expected, Tensor]]]] = {}

    def write(self, task: Task, rank: int, tensors: Sequence[Tensor]) -> None:
        """Adds tensors to the message with a task's result for a rank."""
        self._written.setdefault((task, rank), []).extend(tensors)

    def post(self, actions: Sequence[Action]) -> None:
        """Starts neighbouring sends and receives together; lets go of what is sent.

        With NCCL a `take` then waits for all of them. Ranks cannot lock by that: the
        checker has each one wait for its counterpart alone and in turn.
        """
        operations, of_action = [], []
        for action in actions:
            peer = dist.get_global_rank(self._mesh.pp.group, action.peer)
            if action.kind == "SEND":
                tensors, operation = (
                    [
                        tensor.detach().contiguous()
                        for tensor in self._written.pop((action.task, action.peer))
                    ],
                    dist.isend,
                )
                expected = []
            else:
                expected, operation = self._expected(action.task), dist.irecv
                tensors = [
                    torch.empty(one.shape, dtype=one.dtype, device=self._mesh.device) for one in expected
                ]
            of_action.append((action, tensors, expected, len(operations)))
            operations += [dist.P2POp(operation, tensor, peer, self._mesh.pp.group) for tensor in tensors]
        works = dist.batch_isend_irecv(operations)
        for action, tensors, expected, first in of_action:
            # NCCL returns one work for the whole batch, gloo one for each tensor.
            own = works[first : first + len(tensors)] if len(works) == len(operations) else works
            if action.kind == "SEND":
                self._sending.append((own, tensors))
            else:
                self._coming[action.task] = own, list(zip(expected, tensors, strict=True))
        # Gloo does not say whether a send is complete, so the oldest is waited for. That
        # cannot lock ranks: the schedule runs even if all sends wait.
        while len(self._sending) > _UNDER_WAY:
            self._wait_for_oldest()

    def take(self, task: Task) -> list[tuple[Expected, Tensor]]:
        """Waits for the message with a task's result; empty if it has been taken already
        or none was needed.
        """
        works, found = self._coming.pop(task, ((), []))
        for work in works:
            work.wait()
        return found

    def finish(self) -> None:
        """Waits for the last sends."""
        while self._sending:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        works, _ = self._sending.popleft()
        for work in works:
            work.wait()
