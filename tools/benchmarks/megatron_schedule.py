"""One iteration of a method on Megatron-Core's own pipeline schedules, one branch of one
phase after the other: what pipeline.py compares with.

A branch of one segment runs in forward_backward_pipelining_without_interleaving, a branch
of two in ..._with_interleaving: model chunk 0 of a rank is its stage of the first
network, chunk 1 its stage of the second. Those schedules pass one tensor of one shape
from stage to stage, so our state is packed into one, padded to the largest; and they send
a gradient back through every stage, so a network that takes none answers with zeros.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence

import megatron_apt  # noqa: F401  first: where there is no CUDA it adapts megatron.core

# isort: split
import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_pipelining_with_interleaving,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_apt.data.microbatch import Microbatch
from megatron_apt.methods.base import Branch, Phase, Segment
from megatron_apt.models.stages import State
from megatron_apt.parallel.mesh import Mesh
from megatron_apt.schedule.execute import frozen
from megatron_apt.training.networks import Network

Shape = tuple[int, ...]


class _NoGradient(torch.autograd.Function):
    """y, and a gradient of zeros for x."""

    @staticmethod
    def forward(ctx, x, y):
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):  # ty: ignore[incompatible-method-override]  # torch says *grads
        return torch.zeros_like(dy), None


class _Chunk(nn.Module):
    """This rank's stage of one segment as such a schedule wants it: tensor in, tensor out.

    Attributes:
        size: numbers in that tensor.
        config: by which the schedule finds its settings.
    """

    model_type = ModelType.encoder_or_decoder

    def __init__(
        self,
        config: TransformerConfig,
        networks: Mapping[str, Network],
        branch: Branch,
        number: int,
        stage: int,
        size: int,
    ):
        super().__init__()
        self.config, self.networks, self.branch, self.number, self.stage, self.size = (
            config,
            networks,
            branch,
            number,
            stage,
            size,
        )
        self.segment = branch.segments[number]
        self.network = networks[self.segment.role].module
        self.ends = stage == self.network.cut.stages - 1
        self._input: Tensor | None = None

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        (self._input,) = tensors

    @property
    def arrived(self) -> Tensor:
        """What the stage before sent; a first stage has it only if its segment reads another."""
        assert self._input is not None
        return self._input

    def forward(self, batch: Microbatch, outputs: dict[int, Tensor]) -> Tensor:
        """What leaves this stage, packed; the branch's output as it is. `outputs` notes
        those of segments that end on this rank.
        """
        segment = self.segment
        with torch.no_grad() if segment.grad == "none" else contextlib.nullcontext():
            condition = segment.condition(batch)
            layout = batch.layout_for(condition)
            if self.stage:
                carried = self.network.carried(self.stage - 1, layout)
                state = unpacked(self.arrived, {name: shape for name, (shape, _) in carried.items()})
                # A frozen network takes no gradient on paths that lead to its weights alone.
                state = {
                    name: value if carried[name][1] or segment.grad == "full" else value.detach()
                    for name, value in state.items()
                }
            else:
                segments = self.branch.segments
                shapes = {r: output_shape(self.networks, segments[r], batch) for r in segment.reads}
                read = {r: unpacked(self.arrived, {"": shape})[""] for r, shape in shapes.items()}
                state = self.network.enter(*segment.feed(batch, read), condition, layout)
            made = self.network.run_stage(self.stage, state, layout)
        if self.ends:
            assert isinstance(made, Tensor)  # as every network's last stage makes
            outputs[self.number] = made.detach()
            if self.number == len(self.branch.segments) - 1:
                return made
        made = packed(made if isinstance(made, dict) else {"": made}, self.size).view(
            -1, 1, self.config.hidden_size
        )
        if segment.grad == "none" and self._input is not None:
            return _NoGradient.apply(self._input, made)
        return made


def packed(state: State, size: int) -> Tensor:
    flat = torch.cat([value.flatten() for value in state.values()])
    return nn.functional.pad(flat, (0, size - len(flat)))


def unpacked(flat: Tensor, shapes: Mapping[str, Shape]) -> State:
    sizes = [math.prod(shape) for shape in shapes.values()]
    parts = flat.flatten()[: sum(sizes)].split(sizes)
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


class MegatronSchedule:
    """A method's phases on those schedules, for networks of one stage on each rank."""

    def __init__(self, phases: Sequence[Phase], networks: Mapping[str, Network], mesh: Mesh, width: int):
        self.phases, self.networks, self.mesh, self.width = phases, networks, mesh, width

    def run(self, batches: Sequence[Microbatch], step: Callable[[str], None]) -> None:
        """One iteration; `step` updates a role."""
        for phase in self.phases:
            for branch in phase.branches:
                self._branch(branch, [batch.for_phase(phase.name) for batch in batches])
            self.networks[phase.updates].start_reduction()
            step(phase.updates)

    def _branch(self, branch: Branch, batches: Sequence[Microbatch]) -> None:
        chunks, rank = len(branch.segments), self.mesh.pp.rank
        if chunks > 2 or any(segment.reads != tuple(range(s)) for s, segment in enumerate(branch.segments)):
            raise ValueError(f"branch {branch.name!r} is not a chain of one or two segments")
        config, rows = self._config(chunks), math.ceil(self._largest(branch, batches[0]) / self.width)
        model = [_Chunk(config, self.networks, branch, s, rank, rows * self.width) for s in range(chunks)]
        outputs: list[dict[int, Tensor]] = [{} for _ in batches]

        def forward_step(numbers, chunk: _Chunk):
            m = next(numbers)
            made = chunk(batches[m], outputs[m])

            def loss(output: Tensor):
                value, metrics = branch.loss(batches[m], outputs[m] | {chunks - 1: output})
                return value, torch.tensor(0, dtype=torch.int), metrics

            return made, loss

        schedule = (
            forward_backward_pipelining_with_interleaving
            if chunks > 1
            else forward_backward_pipelining_without_interleaving
        )
        with contextlib.ExitStack() as stack:
            for segment in branch.segments:
                if segment.grad == "input":
                    stack.enter_context(frozen(self.networks[segment.role].module))
            schedule(
                forward_step_func=forward_step,
                data_iterator=[iter(range(len(batches))) for _ in range(chunks)],
                model=list[torch.nn.Module](model),
                num_microbatches=len(batches),
                seq_length=rows,
                micro_batch_size=1,
            )

    def _config(self, chunks: int) -> TransformerConfig:
        several = chunks > 1
        return TransformerConfig(
            num_layers=2 * self.mesh.pp.size,
            hidden_size=self.width,
            num_attention_heads=1,
            pipeline_model_parallel_size=self.mesh.pp.size,
            virtual_pipeline_model_parallel_size=chunks if several else None,
            pipeline_dtype=next(iter(self.networks.values())).module.dtype,
            # Sends and receives beside the computation. Batched ones would meet the wrong
            # partner where the next rank is the previous one too.
            overlap_p2p_comm=several,
            batch_p2p_comm=False,
            calculate_per_token_loss=True,  # losses are contributions: not to be averaged over microbatches
        )

    def _largest(self, branch: Branch, batch: Microbatch) -> int:
        """Numbers in the largest message."""
        found = [math.prod(output_shape(self.networks, segment, batch)) for segment in branch.segments[:-1]]
        for segment in branch.segments:
            network, layout = self.networks[segment.role].module, batch.layout_for(segment.condition(batch))
            for stage in range(network.cut.stages - 1):
                found.append(sum(math.prod(shape) for shape, _ in network.carried(stage, layout).values()))
        return max(found)


def output_shape(networks: Mapping[str, Network], segment: Segment, batch: Microbatch) -> Shape:
    return networks[segment.role].module.output_shape(batch.layout_for(segment.condition(batch)))
