"""Messages between the ranks of a pipeline: started where they stand in the list, waited for where
they are used.

A message is one flat tensor, and it is one batch of its own. NCCL runs the batches of a group one
after the other on one stream, and of a batch with several tensors for one peer one in each round, so
with more than that ranks can lock (see nccl.py, which proves each program for `batched`).
"""

from collections import deque
from collections.abc import Callable, Sequence
from math import prod
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
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()  # a message stays until it is gone
        self._coming: dict[Task, tuple[dist.Work, list[Expected], Tensor]] = {}

    def write(self, task: Task, rank: int, tensors: Sequence[Tensor]) -> None:
        """Adds tensors to the message with a task's result for a rank."""
        self._written.setdefault((task, rank), []).extend(tensors)

    def post(self, action: Action) -> None:
        """Starts a send or a receive; lets go of what is sent."""
        if action.kind == "SEND":
            if tensors := self._written.pop((action.task, action.peer)):
                flat = joined(tensors)
                self._sending.append((self._start(dist.isend, flat, action.peer), flat))
                self._let_go()
        elif expected := self._expected(action.task):
            size = sum(prod(one.shape) for one in expected)
            flat = torch.empty(size, dtype=_common([one.dtype for one in expected]), device=self._mesh.device)
            self._coming[action.task] = self._start(dist.irecv, flat, action.peer), expected, flat

    def _start(self, operation: Callable, flat: Tensor, peer: int) -> dist.Work:
        # As a batch, because NCCL makes another communicator for each pair of ranks otherwise
        peer = dist.get_global_rank(self._mesh.pp.group, peer)
        (work,) = dist.batch_isend_irecv([dist.P2POp(operation, flat, peer, self._mesh.pp.group)])
        return work

    def take(self, task: Task) -> list[tuple[Expected, Tensor]]:
        """Waits for the message with a task's result; empty if it has been taken already
        or none was needed.
        """
        if task not in self._coming:
            return []
        work, expected, flat = self._coming.pop(task)
        work.wait()
        parts = flat.split([prod(one.shape) for one in expected])
        return [(one, part.view(one.shape)) for one, part in zip(expected, parts, strict=True)]

    def finish(self) -> None:
        """Waits for the last sends."""
        while self._sending:
            self._sending.popleft()[0].wait()

    def _let_go(self) -> None:
        """Of messages that are gone. Gloo does not say whether one is, so there the oldest is
        waited for, which cannot lock ranks: the schedule runs even if all sends wait. On
        CUDA the stream would wait, not the host, so nothing is waited for.
        """
        if self._mesh.device.type == "cuda":
            while self._sending and self._sending[0][0].is_completed():
                self._sending.popleft()
        while self._mesh.device.type != "cuda" and len(self._sending) > _UNDER_WAY:
            self._sending.popleft()[0].wait()


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """One flat tensor of these, in their order; their own memory where there is but one."""
    _common([tensor.dtype for tensor in tensors])
    flat = [tensor.detach().contiguous().view(-1) for tensor in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _common(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """Of a message, which is one tensor.

    Raises:
        TypeError: several.
    """
    first, *others = dict.fromkeys(dtypes)
    if others:
        raise TypeError(f"a message is of one dtype, this one has tensors of {first} and {others[0]}")
    return first


def batched(actions: Sequence[Action]) -> list[list[Action]]:
    """How `Executor.run` posts the sends and receives of a list, for the checker: each alone."""
    return [[action] for action in actions if action.kind in ("SEND", "RECV")]
