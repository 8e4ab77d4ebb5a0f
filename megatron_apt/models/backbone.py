"""What diffusion transformers of every family have in common: blocks cut into stages,
recomputation, FP8, norms, modulation, and the last layer.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_apt.kernels.modulated_norm import modulated_norm
from megatron_apt.kernels.rms_norm import rms_norm
from megatron_apt.kernels.rows import Rows
from megatron_apt.models import parameters
from megatron_apt.models.condition import Condition
from megatron_apt.models.config import ModelConfig
from megatron_apt.models.embeddings import rotary_table
from megatron_apt.models.fp8 import Fp8Blocks
from megatron_apt.models.layout import Layout
from megatron_apt.models.parameters import column_linear, declare, linear
from megatron_apt.models.parts import DTYPES, transformer_config
from megatron_apt.models.stages import WHOLE, Cut, Staged, State, run_all
from megatron_apt.parallel.megatron import (
    checkpoint,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron_apt.parallel.mesh import Mesh


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension with a learned scale; statistics in at least fp32."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, tp_partial: bool):
        super().__init__()
        self.weight = declare(
            nn.Parameter(torch.empty(shape, dtype=dtype)), parameters.ones, tp_partial=tp_partial
        )

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight)


class LayerNorm(nn.Module):
    """Layer norm over the last dimension with learned scale and shift, in at least fp32."""

    def __init__(self, width: int, dtype: torch.dtype, tp_partial: bool = False, eps: float = 1e-6):
        super().__init__()
        self.weight = declare(
            nn.Parameter(torch.empty(width, dtype=dtype)), parameters.ones, tp_partial=tp_partial
        )
        self.bias = declare(
            nn.Parameter(torch.empty(width, dtype=dtype)), parameters.zeros, tp_partial=tp_partial
        )
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.layer_norm(x.to(wide), x.shape[-1:], self.weight.to(wide), self.bias.to(wide), self.eps).to(
            x.dtype
        )


class Modulation(nn.Module):
    """AdaLN vectors of one place: (n, count * D) from the condition c, as `count` tensors
    (n, D).

    "block": a projection of silu(c) of its own. "single": a learned offset added to
    vectors projected once for all blocks.
    """

    def __init__(self, count: int, model: ModelConfig, mesh: Mesh, part: type):
        super().__init__()
        self.count, self.mesh = count, mesh
        self.single = model.modulation == "single"
        if self.single:
            self.offset = declare(
                nn.Parameter(torch.empty(count * model.width, dtype=DTYPES[model.dtype])),
                parameters.normal(0.02),
            )
        else:
            config = transformer_config(model, mesh, sequence_parallel=False)
            self.linear = column_linear(
                part, model.width, count * model.width, config, mesh, parameters.zeros, gather_output=True
            )

    def forward(self, c: Tensor, shared: Tensor | None) -> tuple[Tensor, ...]:
        if self.single:
            assert shared is not None
            vectors = shared[:, : len(self.offset)] + self.offset
        else:
            vectors = self.linear(F.silu(c))[0]
        if self.mesh.sequence_parallel:
            # Each rank uses the vectors on its own tokens only, so their gradients are parts of a sum.
            vectors = copy_to_tensor_model_parallel_region(vectors, group=self.mesh.tp.group)
        return vectors.chunk(self.count, dim=-1)


class FinalLayer(nn.Module):
    """Modulated norm and projection of each visual token to its patch of velocity."""

    def __init__(self, model: ModelConfig, mesh: Mesh, part: type):
        super().__init__()
        self.modulation = Modulation(2, model, mesh, part)
        self.linear = linear(
            model.width,
            model.patch_width,
            DTYPES[model.dtype],
            parameters.zeros,
            tp_partial=mesh.sequence_parallel,
        )

    def forward(self, x: Tensor, c: Tensor, shared: Tensor | None, rows: Rows) -> Tensor:
        shift, scale = self.modulation(c, shared)
        return self.linear(modulated_norm(x, shift, scale, rows))


class Backbone(Staged):
    """A diffusion transformer: v = model(x_t, t, condition).

    A family defines `enter`, `carried`, `hidden`, `constant`, and builds `blocks` and
    `final`. Its blocks take the hidden parts of the state, the constant ones (None where
    there is none), the layout and the rotary table, and return the hidden parts.

    Args:
        model: shape.
        mesh: device mesh.
        depth: layers to build; fewer than model.depth gives the lower part of the
            network.
        output: with the final projection to a velocity (a discriminator's backbone has
            none).
        cut: its pipeline stages; only the parts of this rank's are built.
    """

    hidden: tuple[str, ...]  # what blocks change, the visual tokens first
    constant: tuple[str, ...]  # what they read
    blocks: nn.ModuleDict  # that this rank holds, by number
    final: Any  # FinalLayer, or None where there is no output

    def __init__(
        self, model: ModelConfig, mesh: Mesh, depth: int | None = None, output: bool = True, cut: Cut = WHOLE
    ):
        super().__init__()
        self.model, self.mesh, self.depth, self.cut, self.output = (
            model,
            mesh,
            depth or model.depth,
            cut,
            output,
        )
        self.held = [i for i in range(self.depth) if cut.holds(self.depth, i)]
        self.fp8 = Fp8Blocks(model.fp8, self.depth, mesh.device)

    def forward(self, x: Tensor, t: Tensor, condition: Condition, layout: Layout) -> Tensor:
        """Velocity of every local visual token.

        Args:
            x: (T_visual, C * patch) this context-parallel rank's tokens, as `patchify`
                orders them.
            t: (n,) times in [0, 1], one per sample.
            condition: of the n samples, whole.
            layout: from `build_layout` with the samples' grids and condition.lengths.

        Returns:
            (T_visual, C * patch), in x's dtype.
        """
        return run_all(self, x, t, condition, layout).to(x.dtype)

    def run_stage(self, stage: int, state: State, layout: Layout) -> State | Tensor:
        """The state behind a stage, or behind the last one the velocity."""
        state, _ = self.run_blocks(stage, state, layout)
        if stage < self.cut.stages - 1 or self.final is None:
            return state
        v = self.last_layer(state, layout)
        if self.mesh.sequence_parallel:
            v = gather_from_sequence_parallel_region(
                v, tensor_parallel_output_grad=False, group=self.mesh.tp.group
            )
        return layout.visual.unfold(v)

    def last_layer(self, state: State, layout: Layout) -> Tensor:
        """The folded velocity of this rank's (sequence-parallel) tokens."""
        return self.final(state["visual"], state["c"], state.get("shared"), layout.visual.rows)

    def run_blocks(
        self, stage: int, state: State, layout: Layout, taps: tuple[int, ...] = ()
    ) -> tuple[State, dict[int, Tensor]]:
        """The state behind the blocks of a stage, and the visual hidden states behind
        those of them that are numbered (from 1) in `taps`.
        """
        hidden, constant = (
            tuple(state[name] for name in self.hidden),
            tuple(state.get(name) for name in self.constant),
        )
        rotary = (
            rotary_table(layout, self.model.rotary_pairs, self.model.rope_theta, hidden[0].dtype)
            if self.model.rotary
            else None
        )
        tapped = {}
        for i in self.cut.blocks(self.depth, stage):
            hidden = self._run(i, (*hidden, *constant), layout, rotary)
            if i + 1 in taps:
                tapped[i + 1] = hidden[0]
        return state | dict(zip(self.hidden, hidden, strict=True)), tapped

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.model.dtype]

    def output_shape(self, layout: Layout) -> tuple[int, ...]:
        return len(layout.positions), self.model.patch_width

    def _run(
        self, i: int, tensors: tuple[Tensor | None, ...], layout: Layout, rotary: Tensor | None
    ) -> tuple[Tensor, ...]:
        def block(*tensors):
            with self.fp8.products(i):
                return self.blocks[str(i)](*tensors, layout, rotary)

        if self.model.recompute == "full" and torch.is_grad_enabled():
            return checkpoint(block, False, *tensors)
        return block(*tensors)
