"""HunyuanVideo: double and single blocks (families/single_stream), before which a small
transformer refines the text.

It is told the time and the mean of the text, and reads each caption by itself. Letters as
in layout.py.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_apt.families.hunyuan.config import HunyuanConfig
from megatron_apt.families.single_stream.model import SingleStream
from megatron_apt.kernels.gated_residual import gated_residual
from megatron_apt.kernels.rows import Rows
from megatron_apt.models import parameters
from megatron_apt.models.backbone import LayerNorm
from megatron_apt.models.condition import Condition
from megatron_apt.models.embeddings import PooledEmbedding, TimestepEmbedding
from megatron_apt.models.layout import Layout
from megatron_apt.models.parameters import column_linear, linear, row_linear
from megatron_apt.models.parts import (
    DTYPES,
    BlockSubmodules,
    block_parts,
    choose_backend,
    transformer_config,
)
from megatron_apt.parallel.context import whole_attention
from megatron_apt.parallel.mesh import Mesh


class RefinerBlock(nn.Module):
    """Attention of each caption's tokens among themselves, then an MLP, both gated; text
    is whole on every rank.
    """

    def __init__(self, model: HunyuanConfig, mesh: Mesh, parts: BlockSubmodules):
        super().__init__()
        config, d, dtype = (
            transformer_config(model, mesh, sequence_parallel=False),
            model.width,
            DTYPES[model.dtype],
        )
        self.heads, self.head_size = model.heads // mesh.tp.size, model.head_size
        self.norm_1, self.norm_2 = LayerNorm(d, dtype), LayerNorm(d, dtype)
        self.linear_qkv = column_linear(parts.text.linear_qkv, d, 3 * d, config, mesh)  # (head, q | k | v, K)
        self.linear_proj = row_linear(parts.text.linear_proj, d, d, config, mesh)
        self.linear_fc1 = column_linear(parts.text.linear_fc1, d, 4 * d, config, mesh)
        self.linear_fc2 = row_linear(parts.text.linear_fc2, 4 * d, d, config, mesh)
        self.gates = linear(d, 2 * d, dtype, parameters.zeros)
        self.attention = parts.core_attention(config, 1, mesh, cross=True)

    def forward(self, x: Tensor, c: Tensor, lengths: tuple[int, ...], rows: Rows) -> Tensor:
        """x (T, 1, D) of all captions, c (n, D)."""
        gate, gate_mlp = self.gates(F.silu(c)).chunk(2, dim=-1)
        qkv = self.linear_qkv(self.norm_1(x))[0].squeeze(1).unflatten(-1, (self.heads, 3, self.head_size))
        attended = whole_attention(*qkv.unbind(-2), lengths, self.attention)
        x = gated_residual(x, gate, self.linear_proj(attended.unsqueeze(1))[0], rows)
        return gated_residual(
            x, gate_mlp, self.linear_fc2(F.silu(self.linear_fc1(self.norm_2(x))[0]))[0], rows
        )


class Refiner(nn.Module):
    """Text (T, E) of all captions -> (T, D), each read by itself."""

    def __init__(self, model: HunyuanConfig, mesh: Mesh, parts: BlockSubmodules):
        super().__init__()
        d, dtype = model.width, DTYPES[model.dtype]
        self.linear_in = linear(model.text_width, d, dtype)
        self.time_embed, self.mean_embed = (
            TimestepEmbedding(d, dtype),
            PooledEmbedding(model.text_width, d, dtype),
        )
        self.blocks = nn.ModuleList(RefinerBlock(model, mesh, parts) for _ in range(model.refiner_blocks))

    def forward(self, tokens: Tensor, lengths: tuple[int, ...], t: Tensor) -> Tensor:
        rows = _packed(lengths, tokens.device)
        wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        assert rows.sample is not None  # as in packed rows
        mean = (
            wide.new_zeros(len(lengths), wide.shape[1]).index_add(0, rows.sample, wide)
            / wide.new_tensor(lengths)[:, None]
        )
        c = self.time_embed(t) + self.mean_embed(mean.to(tokens.dtype))
        x = self.linear_in(tokens).unsqueeze(1)
        for block in self.blocks:
            x = block(x, c, lengths, rows)
        return x.squeeze(1)


@lru_cache(maxsize=16)
def _packed(lengths: tuple[int, ...], device: torch.device) -> Rows:
    return Rows.packed(lengths, device)


class Hunyuan(SingleStream):
    """v = model(x_t, t, condition) of HunyuanVideo."""

    model: HunyuanConfig  # ty: ignore[incompatible-mutable-override]  # is never set anew

    def text_embedding(self) -> nn.Module:
        return Refiner(
            self.model, self.mesh, block_parts(choose_backend(self.mesh.device.type, self.model.dtype))
        )

    def embed_text(self, condition: Condition, t: Tensor, layout: Layout) -> Tensor:
        refined = self.text_embed(condition.tokens.to(self.x_embed.weight.dtype), condition.lengths, t)
        return refined.index_select(0, layout.text.index)


MODEL = Hunyuan
