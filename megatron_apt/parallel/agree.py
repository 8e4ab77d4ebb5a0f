"""Decisions that every rank must take alike."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_apt.parallel.mesh import Mesh


def largest(mesh: Mesh, *numbers: int) -> list[int]:
    """The largest of each number over all ranks."""
    if mesh.world.size == 1:
        return list(numbers)
    found = torch.tensor(numbers, device=mesh.device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=mesh.world.group)
    return found.tolist()


def from_main(mesh: Mesh, value):
    """The main rank's value, on every rank."""
    if mesh.world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=mesh.world.group)
    return box[0]


def on_main(mesh: Mesh, action: Callable):
    """What `action` returns on the main rank, on every rank.

    Raises:
        ValueError, OSError: on every rank, if `action` raises one on the main rank; of
            the same class where that takes a message alone.
    """
    if mesh.world.size == 1:
        return action()
    result, failure = None, None
    if mesh.is_main:
        try:
            result = action()
        except (ValueError, OSError) as error:
            failure = error
    kind, message, result = from_main(mesh, (failure and type(failure), str(failure), result))
    if kind:
        raise failure or _made(kind, message)
    return result


def _made(kind: type[Exception], message: str) -> Exception:
    try:
        return kind(message)
    except TypeError:  # such as UnicodeDecodeError
        return ValueError(message)
