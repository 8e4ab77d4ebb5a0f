"""An MMDiT whose later layers have one set of weights for text and visual tokens.

    double blocks   an MMDiT layer, as in models/joint.py
    single blocks   attention and MLP side by side, from one norm, with weights that both streams share
A scale of guidance, which distillation has folded into the published weights, enters like
the time; here it is a constant of the model. Letters as in layout.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_apt.families.single_stream.config import SingleStreamConfig
from megatron_apt.kernels.gated_residual import gated_residual
from megatron_apt.kernels.modulated_norm import modulated_norm
from megatron_apt.models.backbone import Modulation, RMSNorm
from megatron_apt.models.condition import Condition
from megatron_apt.models.config import ModelConfig
from megatron_apt.models.embeddings import PooledEmbedding, TimestepEmbedding
from megatron_apt.models.joint import Block, JointTransformer
from megatron_apt.models.layout import Layout, Stream
from megatron_apt.models.parameters import column_linear, row_linear
from megatron_apt.models.parts import DTYPES, BlockSubmodules, transformer_config
from megatron_apt.models.stages import WHOLE, Cut
from megatron_apt.parallel.context import joint_attention
from megatron_apt.parallel.mesh import Mesh


class SingleBlock(nn.Module):
    """Attention of text and visual tokens to each other, beside an MLP of each: y = x +
    gate (W [attention | MLP] + b).

    Features of both projections are ordered by head, so that a tensor-parallel slice
    holds whole heads and their share of the MLP: each stream is gathered once and reduced
    once.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh, parts: BlockSubmodules, layer_number: int):
        super().__init__()
        config, d = transformer_config(model, mesh), model.width
        self.mesh, self.heads, self.head_size = mesh, model.heads // mesh.tp.size, model.head_size
        self.modulation = Modulation(3, model, mesh, parts.visual.modulation)
        # (head, q | k | v | MLP)
        self.linear_in = column_linear(parts.visual.linear_qkv, d, 3 * d + model.mlp, config, mesh)
        self.qk_norm = RMSNorm((2, model.head_size), DTYPES[model.dtype], tp_partial=True)
        # (head, attention | MLP)
        self.linear_out = row_linear(parts.visual.linear_proj, d + model.mlp, d, config, mesh)
        self.attention = parts.core_attention(config, layer_number, mesh)

    def forward(
        self, x: Tensor, text: Tensor, c: Tensor, shared: Tensor | None, layout: Layout, rotary: Tensor
    ) -> tuple[Tensor, Tensor]:
        shift, scale, gate = self.modulation(c, shared)
        qkv, mlp = self._project(x, shift, scale, layout.visual)
        text_qkv, text_mlp = self._project(text, shift, scale, layout.text)
        norms = self.qk_norm.weight, self.qk_norm.weight
        text_out, out = joint_attention(text_qkv, qkv, norms, rotary, layout, self.mesh, self.attention)
        return self._join(x, gate, out, mlp, layout.visual), self._join(
            text, gate, text_out, text_mlp, layout.text
        )

    def _project(self, x: Tensor, shift: Tensor, scale: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
        """(a, b, D) -> q, k and v (a, b, H, 3, K), not yet normalised, and what enters
        the MLP's nonlinearity (a, b, H, M / H).
        """
        y = self.linear_in(modulated_norm(x, shift, scale, stream.rows))[0].unflatten(-1, (self.heads, -1))
        qkv, mlp = y.split((3 * self.head_size, y.shape[-1] - 3 * self.head_size), dim=-1)
        return qkv.unflatten(-1, (3, self.head_size)), mlp

    def _join(self, x: Tensor, gate: Tensor, attended: Tensor, mlp: Tensor, stream: Stream) -> Tensor:
        both = torch.cat((attended.unflatten(-1, (self.heads, -1)), F.gelu(mlp, approximate="tanh")), dim=-1)
        return gated_residual(x, gate, self.linear_out(both.flatten(-2))[0], stream.rows)


class SingleStream(JointTransformer):
    """v = model(x_t, t, condition) of double blocks, then single ones."""

    model: SingleStreamConfig

    def __init__(
        self,
        model: SingleStreamConfig,
        mesh: Mesh,
        depth: int | None = None,
        output: bool = True,
        cut: Cut = WHOLE,
    ):
        super().__init__(model, mesh, depth, output, cut)
        self.guidance = model.guidance
        if cut.first and self.guidance:
            self.guidance_embed = TimestepEmbedding(model.width, DTYPES[model.dtype])

    def block(self, i: int, parts: BlockSubmodules) -> nn.Module:
        if i < self.model.double_blocks:
            return Block(self.model, self.mesh, parts, i + 1, update_text=True)
        return SingleBlock(self.model, self.mesh, parts, i + 1)

    def pooled_embedding(self) -> nn.Module:
        return PooledEmbedding(self.model.pooled_width, self.model.width, DTYPES[self.model.dtype])

    def embed_condition(self, condition: Condition, t: Tensor) -> Tensor:
        c = super().embed_condition(condition, t)
        return c + self.guidance_embed(torch.full_like(t, self.guidance)) if self.guidance else c
