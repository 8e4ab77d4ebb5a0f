"""Counts what a piece of code communicates, by axis of the mesh and kind of collective.

Collectives are dispatched operators of torch, Megatron-Core's and ours alike, so a
dispatch mode sees them all, in backward passes on the CPU too. The unit is what a rank
must send, at least, in any algorithm: with S the size of the whole tensor and n ranks, a
reduce-scatter or an all-gather sends S (n - 1) / n, an all-reduce both, an all-to-all the
part of its input that is for others.
"""

from collections import Counter

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_apt.parallel.mesh import Mesh

# Operator -> (name, factor, index of the argument whose size counts): the reduced or the gathered whole.
_KINDS = {
    "allreduce_": ("all_reduce", 2, 0),
    "allreduce_coalesced_": ("all_reduce", 2, 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1, 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1, 1),
    "_allgather_base_": ("all_gather", 1, 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 1, 0),
    "alltoall_base_": ("all_to_all", 1, 1),
    "broadcast_": ("broadcast", 1, 0),
}


def size(value) -> int:
    """Bytes of a tensor or of the tensors in a list."""
    return (
        sum(map(size, value))
        if isinstance(value, list | tuple)
        else value.numel() * value.itemsize
        if isinstance(value, Tensor)
        else 0
    )


class Traffic(TorchDispatchMode):
    """Context manager; inside, `sent[axis, kind]` and `payload[axis, kind]` grow.

    Attributes:
        sent: bytes that this rank must send at least.
        payload: bytes of the tensors handed to the collectives.
        calls: how many there were.
    """

    def __init__(self, mesh: Mesh):
        super().__init__()
        axes = {"tp": mesh.tp, "cp": mesh.cp, "dp": mesh.dp, "dp_cp": mesh.dp_cp, "world": mesh.world}
        # Where axes are one group (dp and dp_cp may be), the first name counts.
        self._axes = {axis.group.group_name: (name, axis.size) for name, axis in reversed(axes.items())}
        self.sent, self.payload, self.calls = Counter(), Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and (known := _KINDS.get(func._opname)):
            name, factor, index = known
            group = next(
                dist.ProcessGroup.unbox(a)
                for a in args
                if not isinstance(a, Tensor | list | tuple | int | bool | type(None))
            )
            axis, ranks = self._axes.get(group.group_name, ("other", group.size()))
            self.payload[axis, name] += size(args[index])
            self.sent[axis, name] += round(factor * size(args[index]) * (ranks - 1) / ranks)
            self.calls[axis, name] += 1
        return func(*args, **(kwargs or {}))
