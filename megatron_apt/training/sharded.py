"""One network's weights and gradients over the data x context ranks: Megatron-Core's
buffers and reduce-scatter, our shards (ZeRO-1).

Megatron-Core's DistributedDataParallel lays parameters and gradients into contiguous
buckets and, while the last microbatch's backward still runs, reduce-scatters each bucket
that is complete. Every rank then owns an equal slice of each bucket, keeps fp32 master
weights, optimiser state and average for that slice only, and gathers the updated weights.

Megatron-Core's own DistributedOptimizer is not used: it takes Adam only and saves exp_avg
and exp_avg_sq by name, so a one-state RMSProp would carry a dead state of 4 bytes for
each weight, which is the memory the method saves (APT paper, section 3.5).

Losses are contributions (parallel/collectives.py), so gradients are SUMMED over ranks:
Megatron-Core calls this calculate_per_token_loss.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_apt.config import OptimizerConfig
from megatron_apt.kernels import rmsprop_ema
from megatron_apt.models.parameters import declared
from megatron_apt.parallel.mesh import Mesh


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter that lies in one rank's shard."""

    parameter: int  # index in ShardedParameters.names
    start: int  # range of the flattened parameter
    stop: int
    offset: int  # place in the rank's shard

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class Stretch(rmsprop_ema.Stretch):
    """A run of this rank's shard inside one bucket whose weights share a learning-rate
    scale and weight decay.
    """

    decays: bool


@dataclass(frozen=True, eq=False)
class _Slice:
    """This rank's slice of one bucket."""

    weights: Tensor  # view into the parameter buffer
    grad: Tensor  # view into the gradient buffer
    offset: int  # place in the shard


class ShardedParameters:
    """The trainable parameters of a module.

    Attributes:
        names, parameters: in the module's order.
        master: (N / ranks,) fp32 (fp64 for a float64 model) weights of this rank's shard,
            the ones that are updated.
        stretches: the shard cut up for an optimiser.
    """

    def __init__(
        self,
        module: nn.Module,
        mesh: Mesh,
        config: OptimizerConfig,
        lr_scale: Callable[[str], float] = lambda name: 1.0,
    ):
        self.mesh = mesh
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError(
                "a network without trainable parameters cannot be optimised; unfreeze its heads or its "
                "backbone"
            )
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        self.dtype = torch.promote_types(self.parameters[0].dtype, torch.float32)
        self.ddp = _distributed(module, mesh, config, reduce_in_fp32=self.dtype == torch.float32)
        self._slices, self.fragments = self._cut()
        size = sum(len(part.weights) for part in self._slices)
        self.master = torch.empty(size, dtype=self.dtype, device=mesh.device)
        mine = self.fragments[mesh.dp_cp.rank]
        self.stretches = self._stretches(mine, [lr_scale(name) for name in self.names])
        self._grads = [self._grad(fragment) for fragment in mine]
        partial = [declared(p).tp_partial and mesh.tp.size > 1 for p in self.parameters]
        self._partial = [
            grad for grad, fragment in zip(self._grads, mine, strict=True) if partial[fragment.parameter]
        ]
        # A gradient that every tensor-parallel rank holds whole counts once in the norm over all ranks.
        copies = [
            1.0 if declared(self.parameters[f.parameter]).sharded_dim is not None else 1.0 / mesh.tp.size
            for f in mine
        ]
        self._weights = torch.tensor(copies, dtype=torch.float64, device=mesh.device)
        self.adopt()

    # --- layout

    def _cut(self) -> tuple[list[_Slice], list[list[Fragment]]]:
        """This rank's slices, and every rank's fragments."""
        axis, number = self.mesh.dp_cp, {p: i for i, p in enumerate(self.parameters)}
        slices, fragments, offset = [], [[] for _ in range(axis.size)], 0
        for buffer in cast(Any, self.ddp).buffers:  # Megatron-Core's, not torch's
            for bucket in buffer.buckets:
                size = len(bucket.grad_data) // axis.size
                own = slice(axis.rank * size, (axis.rank + 1) * size)
                slices.append(_Slice(bucket.param_data[own], bucket.grad_data[own], offset))
                for p in bucket.params_list:
                    start, stop, _ = buffer.param_index_map[p]
                    for rank in range(axis.size):
                        low = bucket.offset + rank * size
                        a, b = max(start, low), min(stop, low + size)
                        if a < b:
                            fragments[rank].append(
                                Fragment(number[p], a - start, b - start, offset + a - low)
                            )
                offset += size
        return slices, [sorted(part, key=lambda f: f.offset) for part in fragments]

    def _slice_of(self, fragment: Fragment) -> _Slice:
        return next(part for part in reversed(self._slices) if part.offset <= fragment.offset)

    def _grad(self, fragment: Fragment) -> Tensor:
        part = self._slice_of(fragment)
        start = fragment.offset - part.offset
        return part.grad[start : start + fragment.size]

    def _stretches(self, fragments: list[Fragment], scales: list[float]) -> list[Stretch]:
        """Neighbouring fragments of one kind become one stretch; the padding between them
        has no gradient, so updates leave it alone.
        """
        runs: list[list] = []
        for f in fragments:
            kind = (scales[f.parameter], self.parameters[f.parameter].dim() >= 2, self._slice_of(f))
            if runs and runs[-1][0] == kind:
                runs[-1][2] = f.offset + f.size
            else:
                runs.append([kind, f.offset, f.offset + f.size])
        within = lambda part, start, stop: slice(start - part.offset, stop - part.offset)  # noqa: E731
        return [
            Stretch(
                slice(start, stop),
                part.grad[within(part, start, stop)],
                part.weights[within(part, start, stop)],
                scale,
                decays,
            )
            for (scale, decays, part), start, stop in runs
        ]

    # --- weights

    @torch.no_grad()
    def adopt(self) -> None:
        """Takes the module's present weights as masters."""
        for part in self._slices:
            self.master[part.offset : part.offset + len(part.weights)].copy_(part.weights)

    @torch.no_grad()
    def set_master(self, name: str, value: Tensor) -> None:
        """Takes this rank's fragments of one whole parameter, in master precision."""
        flat, index = value.reshape(-1), self.names.index(name)
        for f in self.fragments[self.mesh.dp_cp.rank]:
            if f.parameter == index:
                self.master[f.offset : f.offset + f.size].copy_(flat[f.start : f.stop])

    @torch.no_grad()
    def publish(self) -> None:
        """Writes the masters into the module's parameters on every rank."""
        self.write(self.master)
        self.gather()

    @torch.no_grad()
    def write(self, weights: Tensor) -> None:
        """Writes a buffer of the shard's layout into this rank's part of the module's parameters."""
        for part in self._slices:
            part.weights.copy_(weights[part.offset : part.offset + len(part.weights)])

    @torch.no_grad()
    def gather(self) -> None:
        """Gives every rank's part of the module's parameters to all ranks."""
        if self.mesh.dp_cp.size > 1:
            self.ddp.start_param_sync(force_sync=True)

    # --- gradients

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        """Context of a microbatch's backward: with the last one, each complete bucket
        starts on its way (optimizer.overlap).
        """
        return contextlib.nullcontext() if last else self.ddp.no_sync()

    @torch.no_grad()
    def start_reduction(self) -> None:
        """Sends the buckets that are not yet on their way: all gradients are there."""
        if self.mesh.dp_cp.size > 1 and self.ddp.ddp_config.overlap_grad_reduce:
            for group in self.ddp.bucket_groups:
                if group.grad_reduce_handle is None:
                    group.start_grad_sync()

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Leaves this rank's shard of the gradient summed over data and context ranks,
        and over tensor ranks where those hold parts of it.
        """
        if self.mesh.dp_cp.size > 1:
            self.ddp.finish_grad_sync()
        if self._partial:
            joined = torch.cat(self._partial)
            dist.all_reduce(joined, group=self.mesh.tp.group)
            for grad, value in zip(
                self._partial, joined.split([len(grad) for grad in self._partial]), strict=True
            ):
                grad.copy_(value)

    @torch.no_grad()
    def grad_square(self) -> float:
        """Sum of squares of the reduced gradient over the ranks of this pipeline stage,
        the same on all of them; NaN if any entry is not finite.
        """
        norms = torch.stack(torch._foreach_norm(self._grads)).double() if self._grads else self._weights
        square = torch.dot(norms.square(), self._weights)
        if self.mesh.stage.size > 1:
            dist.all_reduce(square, group=self.mesh.stage.group)
        return float(square) if math.isfinite(square) else float("nan")

    def bad_gradients(self) -> list[str]:
        """Names of parameters whose unreduced gradient on this rank is not finite."""
        return [
            name
            for name, p in zip(self.names, self.parameters, strict=True)
            if not torch.isfinite(declared(p).main_grad).all()
        ]

    def zero_grad(self) -> None:
        # Megatron-Core asserts that every parameter of a bucket has had a gradient. One
        # that never gets any (behind the last head of a short discriminator, say) leaves
        # its bucket in the state of the first iteration: reduced when all is done,
        # without overlap.
        for group in self.ddp.bucket_groups:
            if group.is_first_batch and len(group.per_param_grad_ready_counts) < len(group.params):
                group.per_param_grad_ready_counts = {}
        self.ddp.zero_grad_buffer()

    # --- whole parameters, for checkpoints

    def owners(self) -> list[int]:
        """For each parameter the data x context rank that writes and reads it: largest
        first, to the rank with the least so far.
        """
        load, owner = [0] * self.mesh.dp_cp.size, [0] * len(self.parameters)
        for i in sorted(range(len(owner)), key=lambda i: (-self.parameters[i].numel(), i)):
            owner[i] = load.index(min(load))
            load[owner[i]] += self.parameters[i].numel()
        return owner

    def owned(self) -> list[int]:
        """Indices of the parameters this rank owns."""
        return [i for i, rank in enumerate(self.owners()) if rank == self.mesh.dp_cp.rank]

    @torch.no_grad()
    def gather_owned(self, buffer: Tensor, into: dict[str, Tensor]) -> None:
        """Exchanges shards of a buffer so that each rank holds, whole, the parameters it
        owns. No rank ever holds all of them.

        Args:
            into: one tensor of the parameter's shape for each that this rank owns. Where
                they are pinned host memory of a GPU, they are filled once the current
                stream has come this far.
        """
        sent, received = self._routes()
        arrived = self._all_to_all(
            [buffer[f.offset : f.offset + f.size] for route in sent for f in route], sent, received, buffer
        )
        for f, values in zip((f for route in received for f in route), arrived, strict=True):
            into[self.names[f.parameter]].view(-1)[f.start : f.stop].copy_(values, non_blocking=True)

    @torch.no_grad()
    def scatter_owned(self, whole: dict[str, Tensor], buffer: Tensor) -> None:
        """Inverse of `gather_owned`, into `buffer`."""
        received, sent = self._routes()
        flat = {self.names.index(name): value.reshape(-1) for name, value in whole.items()}
        arrived = self._all_to_all(
            [flat[f.parameter][f.start : f.stop] for route in sent for f in route], sent, received, buffer
        )
        for f, values in zip((f for route in received for f in route), arrived, strict=True):
            buffer[f.offset : f.offset + f.size] = values

    def _routes(self) -> tuple[list[list[Fragment]], list[list[Fragment]]]:
        """Fragments this rank's shard has for each owner, and those each rank's shard has for this owner."""
        owner, rank, ranks = self.owners(), self.mesh.dp_cp.rank, range(self.mesh.dp_cp.size)
        sent = [[f for f in self.fragments[rank] if owner[f.parameter] == to] for to in ranks]
        received = [[f for f in self.fragments[source] if owner[f.parameter] == rank] for source in ranks]
        return sent, received

    def _all_to_all(
        self, pieces: list[Tensor], sent: list[list[Fragment]], received: list[list[Fragment]], like: Tensor
    ) -> Sequence[Tensor]:
        """Sends one piece for each fragment of `sent`; returns one for each fragment of `received`."""
        if self.mesh.dp_cp.size == 1:
            return pieces
        incoming, outgoing = ([sum(f.size for f in route) for route in routes] for routes in (received, sent))
        joined = torch.cat(pieces).to(like) if pieces else like.new_empty(0)
        rows = like.new_empty(sum(incoming))
        dist.all_to_all_single(rows, joined, incoming, outgoing, group=self.mesh.dp_cp.group)
        return rows.split([f.size for route in received for f in route])

    @torch.no_grad()
    def whole_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter's reduced gradient on this tensor-parallel rank, whole on every
        rank: for comparisons at small scale.
        """
        shard = torch.zeros_like(self.master)
        for part in self._slices:
            shard[part.offset : part.offset + len(part.grad)] = part.grad
        return self.whole(shard)

    @torch.no_grad()
    def whole(self, shard: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Every parameter from a buffer of the shard's layout, whole on every rank: for
        comparisons at small scale.
        """
        axis = self.mesh.dp_cp
        rows = shard.new_empty(axis.size, len(shard))
        dist.all_gather_into_tensor(rows.view(-1), shard, group=axis.group)
        values = [shard.new_empty(p.numel()) for p in self.parameters]
        for row, fragments in zip(rows, self.fragments, strict=True):
            for f in fragments:
                values[f.parameter][f.start : f.stop] = row[f.offset : f.offset + f.size]
        for name, p, value in zip(self.names, self.parameters, values, strict=True):
            yield name, value.view(p.shape)


def _distributed(
    module: nn.Module, mesh: Mesh, config: OptimizerConfig, reduce_in_fp32: bool
) -> DistributedDataParallel:
    groups = ProcessGroupCollection()
    groups.dp, groups.dp_cp, groups.tp, groups.pp = (
        mesh.dp.group,
        mesh.dp_cp.group,
        mesh.tp.group,
        mesh.pp.group,
    )
    # There are no experts; given so that no group is made for them
    groups.ep = groups.expt_dp = mesh.dp.group
    return DistributedDataParallel(
        TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1, calculate_per_token_loss=True),
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=reduce_in_fp32,
            overlap_grad_reduce=config.overlap and mesh.dp_cp.size > 1,
            use_distributed_optimizer=True,
            # Transformer Engine's delayed gradients (models/spec.py) come in backward_dw,
            # where the buffer's hook must then be.
            delay_wgrad_compute=mesh.pp.size > 1 and mesh.device.type == "cuda",
            bucket_size=config.bucket_size,
        ),
        module,
        pg_collection=groups,
    )
