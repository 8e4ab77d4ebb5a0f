"""Stable Diffusion 3 and 3.5: the MMDiT of pictures (Esser et al. 2024), with a table of
positions in place of rotation.

In 3.5 medium ("MMDiT-X") the first blocks have a second attention, of visual tokens among
themselves. Letters as in layout.py.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn

from megatron_apt.families.sd3.config import Sd3Config
from megatron_apt.kernels.gated_residual import gated_residual
from megatron_apt.kernels.modulated_norm import modulated_norm
from megatron_apt.models import parameters
from megatron_apt.models.backbone import RMSNorm
from megatron_apt.models.embeddings import PooledEmbedding
from megatron_apt.models.joint import Block, JointTransformer
from megatron_apt.models.layout import Layout
from megatron_apt.models.parameters import column_linear, declare, row_linear
from megatron_apt.models.parts import DTYPES, BlockSubmodules, transformer_config
from megatron_apt.models.stages import WHOLE, Cut
from megatron_apt.parallel.context import self_attention
from megatron_apt.parallel.mesh import Mesh


class SelfAttention(nn.Module):
    """Attention of each sample's visual tokens among themselves: (a, b, D) -> (a, b, D), folded."""

    def __init__(self, model: Sd3Config, mesh: Mesh, parts: BlockSubmodules, layer_number: int):
        super().__init__()
        config, d = transformer_config(model, mesh), model.width
        self.mesh, self.heads, self.head_size = mesh, model.heads // mesh.tp.size, model.head_size
        # (head, q | k | v, K)
        self.linear_qkv = column_linear(parts.visual.linear_qkv, d, 3 * d, config, mesh)
        self.qk_norm = (
            RMSNorm((2, model.head_size), DTYPES[model.dtype], tp_partial=True) if model.qk_norm else None
        )
        self.linear_proj = row_linear(parts.visual.linear_proj, d, d, config, mesh)
        self.attention = parts.core_attention(config, layer_number, mesh)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        qkv = self.linear_qkv(x)[0].unflatten(-1, (self.heads, 3, self.head_size))
        scales = None if self.qk_norm is None else self.qk_norm.weight
        return self.linear_proj(self_attention(qkv, scales, None, layout, self.mesh, self.attention))[0]


class DualBlock(Block):
    """A layer whose visual tokens attend twice, both times from its input: to text and
    picture, and to the picture alone.
    """

    vectors = 9  # shift, scale and gate of the second attention last

    def __init__(
        self, model: Sd3Config, mesh: Mesh, parts: BlockSubmodules, layer_number: int, update_text: bool
    ):
        super().__init__(model, mesh, parts, layer_number, update_text)
        self.second = SelfAttention(model, mesh, parts, layer_number)

    def after_attention(self, x: Tensor, attended: Tensor, vectors: list[Tensor], layout: Layout) -> Tensor:
        *vectors, shift, scale, gate = vectors
        rows = layout.visual.rows
        x = gated_residual(x, gate, self.second(modulated_norm(x, shift, scale, rows), layout), rows)
        return super().after_attention(x, attended, vectors, layout)


def sines_and_cosines(size: int, extent: float) -> parameters.Init:
    """Fills a table (size^2, D) of row-major cells: a quarter of D each for sin and cos
    of the column's angles, then of the row's.

    Angles of place p are p * extent / size * 10000^(-4 j / D).
    """

    def fill(table: Tensor, generator: torch.Generator) -> None:
        quarter = table.shape[1] // 4
        places = torch.arange(size, dtype=torch.float32) / (size / extent)
        angles = torch.outer(
            places.double(), 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
        )
        axis = torch.cat((angles.sin(), angles.cos()), dim=1)
        table.copy_(torch.cat((axis.repeat(size, 1), axis.repeat_interleave(size, 0)), dim=1))

    return fill


@lru_cache(maxsize=8)
def table_rows(layout: Layout, size: int) -> Tensor:
    """(T,) row of a (size^2, D) table of positions for each local visual token: each
    sample takes the table's centre.

    Raises:
        ValueError: a sample that is no picture, or larger than the table.
    """
    for frames, rows, columns in layout.grids:
        if frames != 1 or max(rows, columns) > size:
            raise ValueError(
                f"a sample of {frames} x {rows} x {columns} tokens (frames, rows, columns): "
                f"model.family='sd3' takes pictures of one frame and at most model.position_size={size} "
                "tokens a side"
            )
    corners = torch.tensor(
        [((size - rows) // 2, (size - columns) // 2) for _, rows, columns in layout.grids],
        device=layout.positions.device,
    )
    cells = layout.positions[:, 1:] + corners.index_select(0, layout.visual.sample)
    return cells[:, 0] * size + cells[:, 1]


class Sd3(JointTransformer):
    """v = model(x_t, t, condition) of Stable Diffusion 3 and 3.5."""

    model: Sd3Config

    def __init__(
        self, model: Sd3Config, mesh: Mesh, depth: int | None = None, output: bool = True, cut: Cut = WHOLE
    ):
        super().__init__(model, mesh, depth, output, cut)
        size = model.position_size
        if cut.first:
            # Never trained, so that nothing is saved by rounding it; what came in goes out.
            table = nn.Parameter(
                torch.empty(
                    size * size, model.width, dtype=torch.promote_types(DTYPES[model.dtype], torch.float32)
                )
            )
            self.position_table = declare(
                table, sines_and_cosines(size, model.sample_size // model.patch[1]), fixed=True
            )

    def block(self, i: int, parts: BlockSubmodules) -> nn.Module:
        kind = DualBlock if i in self.model.dual_layers else Block
        return kind(self.model, self.mesh, parts, i + 1, update_text=i < self.model.depth - 1)

    def pooled_embedding(self) -> nn.Module:
        return PooledEmbedding(self.model.pooled_width, self.model.width, DTYPES[self.model.dtype])

    def embed(self, x: Tensor, layout: Layout) -> Tensor:
        h = super().embed(x, layout)
        return h + self.position_table.index_select(0, table_rows(layout, self.model.position_size)).to(
            h.dtype
        )


MODEL = Sd3
