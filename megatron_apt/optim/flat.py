"""All weights of a network in one fp32 buffer, all gradients in another; the parameters are views into them.

An optimiser step, an average, a norm or a reduction over ranks is then a few calls on long tensors instead of a few hundred on short ones.
bf16 networks keep their own bf16 buffer for compute; gradients are accumulated, and weights updated, in fp32.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_apt.parallel.mesh import Mesh


@dataclass(frozen=True)
class Group:
    """A stretch of the buffer whose weights share a learning-rate scale and weight decay."""

    start: int
    stop: int
    lr_scale: float
    decays: bool


class FlatParameters:
    """The trainable parameters of a module, in three areas: sharded over tp | replicated | replicated with partial gradients.

    Attributes:
        master: (N,) fp32 (or fp64) weights, the ones that are updated.
        grad: (N,) gradients, in master's dtype.
        groups: stretches for the optimiser.
    """

    def __init__(self, module: nn.Module, mesh: Mesh, lr_scale=lambda name: 1.0):
        self.mesh = mesh
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("a network without trainable parameters cannot be optimised; unfreeze its heads or its backbone")

        def area(p) -> int:
            return 0 if p.sharded_dim is not None else 2 if p.tp_partial else 1

        named.sort(key=lambda item: (area(item[1]), lr_scale(item[0]), item[1].dim() >= 2))
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        wide = torch.promote_types(self.parameters[0].dtype, torch.float32)
        sizes = [p.numel() for p in self.parameters]
        self.offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        self.master = torch.empty(sum(sizes), dtype=wide, device=self.parameters[0].device)
        self.grad = torch.zeros_like(self.master)
        self._sharded = sum(size for size, p in zip(sizes, self.parameters, strict=True) if area(p) == 0)
        self._whole = self._sharded + sum(size for size, p in zip(sizes, self.parameters, strict=True) if area(p) == 1)
        self.groups = self._groups(sizes, [lr_scale(name) for name in self.names])
        self._adopt(wide)

    def _groups(self, sizes: list[int], scales: list[float]) -> tuple[Group, ...]:
        groups: list[Group] = []
        for offset, size, scale, p in zip(self.offsets, sizes, scales, self.parameters, strict=True):
            decays = p.dim() >= 2
            last = groups[-1] if groups else None
            if last and (last.lr_scale, last.decays) == (scale, decays):
                groups[-1] = Group(last.start, offset + size, scale, decays)
            else:
                groups.append(Group(offset, offset + size, scale, decays))
        return tuple(groups)

    def _adopt(self, wide: torch.dtype) -> None:
        """Turns parameters and gradients into views, or keeps low-precision parameters beside their fp32 masters."""
        for p, master, grad in zip(self.parameters, self.views(self.master), self.views(self.grad), strict=True):
            master.copy_(p.data)
            if p.dtype == wide:
                p.data, p.grad = master, grad
            else:
                p.register_post_accumulate_grad_hook(_accumulate_into(grad))

    def views(self, buffer: Tensor) -> list[Tensor]:
        """One view per parameter, in parameter shape, into a buffer of this layout."""
        return [buffer[o : o + p.numel()].view(p.shape) for o, p in zip(self.offsets, self.parameters, strict=True)]

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Sums gradients over data and context ranks, and partial ones over tensor-parallel ranks."""
        if self.mesh.tp.size > 1 and self._whole < len(self.grad):
            dist.all_reduce(self.grad[self._whole :], group=self.mesh.tp.group)
        if self.mesh.dp_cp.size > 1:
            dist.all_reduce(self.grad, group=self.mesh.dp_cp.group)

    @torch.no_grad()
    def grad_norm(self) -> float:
        """Global L2 norm of the reduced gradient; not finite if any entry on any rank is not."""
        sharded = torch.linalg.vector_norm(self.grad[: self._sharded]).square()
        if self.mesh.tp.size > 1:
            dist.all_reduce(sharded, group=self.mesh.tp.group)
        return float((sharded + torch.linalg.vector_norm(self.grad[self._sharded :]).square()).sqrt())

    def first_bad_gradient(self) -> str:
        """Name of the first parameter with a gradient that is not finite, or an empty string."""
        for name, grad in zip(self.names, self.views(self.grad), strict=True):
            if not torch.isfinite(grad).all():
                return name
        return ""

    @torch.no_grad()
    def publish(self) -> None:
        """Copies the masters into parameters that are not views of them."""
        for p, master in zip(self.parameters, self.views(self.master), strict=True):
            if p.dtype != master.dtype:
                p.copy_(master)

    def zero_grad(self) -> None:
        self.grad.zero_()


def _accumulate_into(grad: Tensor):
    @torch.no_grad()
    def hook(p: nn.Parameter) -> None:
        grad.add_(p.grad)
        p.grad = None

    return hook
