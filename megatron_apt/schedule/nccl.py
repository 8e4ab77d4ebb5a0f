"""What messages wait for where NCCL carries them, so that no program locks on a GPU that ran on a CPU.

The rules, of NCCL 2.28 and torch's process group on it:

- A batch of sends and receives is one kernel. The kernels of a group run one after the other on a
  stream of their own, in the order in which they were started; so do computing actions on theirs.
- A kernel starts when what was computed before it in the list is done (torch makes the one stream
  wait for the other at every start). Computing waits for the kernels whose messages it takes.
- In a kernel, the first operation for each peer and direction runs in the first round, the second
  in the second; a round is over when all of its operations are.
- An operation is over when its counterpart runs at the same time (nothing is kept under way), and the
  nth send of a rank to a peer meets the nth receive of the peer.

gloo is kinder: every message is on its way by itself.
"""

from collections import deque
from collections.abc import Callable, Sequence

from megatron_apt.schedule.actions import Action
from megatron_apt.schedule.graph import Graph

Batches = Callable[[Sequence[Action]], list[list[Action]]]


class Locked(ValueError):
    """Ranks that wait for each other, or take each other's messages for others; names the actions."""


class _Rank:
    """How far a rank has come on both streams."""

    def __init__(self, graph: Graph, actions: Sequence[Action], batches: list[list[Action]], tensors: int):
        self.computing: list[tuple[Action, set[int]]] = []  # with the kernels that each waits for
        self.kernels: list[tuple[int, deque[list[Action]]]] = []  # computed before it, and its rounds
        kernel_of = {id(action): i for i, batch in enumerate(batches) for action in batch}
        received: dict[int, int] = {}
        started = 0
        for action in actions:
            if action.kind in ("SEND", "RECV"):
                kernel = kernel_of[id(action)]
                if kernel == started:
                    self.kernels.append((len(self.computing), _rounds(batches[kernel], tensors)))
                    started += 1
                if action.kind == "RECV":
                    received[graph.number[action.task]] = kernel
            else:
                sources = graph.sources[graph.number[action.task]] if action.kind != "REDUCE" else ()
                self.computing.append((action, {received[s] for s in sources if s in received}))
        self.computed = self.over = 0
        self.running: dict[tuple[str, int], Action] = {}

    def advance(self) -> bool:
        """Does what waits for no other rank; whether that was anything."""
        before = self.computed, self.over, len(self.running)
        while self.computed < len(self.computing) and all(
            kernel < self.over for kernel in self.computing[self.computed][1]
        ):
            self.computed += 1
        while not self.running and self.over < len(self.kernels):
            needed, rounds = self.kernels[self.over]
            if not rounds:
                self.over += 1
                return self.advance() or True
            if needed > self.computed:
                break
            self.running = {(action.kind, action.peer): action for action in rounds.popleft()}
        return before != (self.computed, self.over, len(self.running))

    @property
    def waits(self) -> str:
        """What it is at; empty at the end of its list."""
        if self.running:
            return str(next(iter(self.running.values())))
        if self.computed < len(self.computing):
            return str(self.computing[self.computed][0])
        return ""


def _rounds(batch: list[Action], tensors: int) -> deque[list[Action]]:
    queues: dict[tuple[str, int], list[Action]] = {}
    for action in batch:
        queues.setdefault((action.kind, action.peer), []).extend([action] * tensors)
    most = max(map(len, queues.values()))
    return deque([queue[i] for queue in queues.values() if i < len(queue)] for i in range(most))


def check_streams(
    graph: Graph, lists: Sequence[Sequence[Action]], batches: Batches, tensors: int = 1
) -> None:
    """Runs lists under these rules.

    Args:
        batches: which neighbouring sends and receives of a list are started together.
        tensors: of each message.

    Raises:
        Locked: naming where each rank stands.
    """
    ranks = [_Rank(graph, actions, batches(actions), tensors) for actions in lists]
    awake = list(range(len(ranks)))
    while awake:
        number = awake.pop()
        rank = ranks[number]
        while rank.advance() or rank.running:
            met = False
            for (kind, peer), action in list(rank.running.items()):
                key = {"SEND": "RECV", "RECV": "SEND"}[kind], number
                if (other := ranks[peer].running.get(key)) is None:
                    continue
                if other.task != action.task:
                    raise Locked(f"rank {number} at {action} meets rank {peer} at {other}")
                del rank.running[kind, peer], ranks[peer].running[key]
                awake.append(peer)
                met = True
            if rank.running and not met:
                break
    if stuck := [f"rank {number} at {rank.waits}" for number, rank in enumerate(ranks) if rank.waits]:
        raise Locked("on NCCL ranks wait for each other: " + "; ".join(stuck))
