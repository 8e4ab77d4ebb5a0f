"""HunyuanVideo: an MMDiT whose later layers have one set of weights for text and visual tokens.

    double blocks   an MMDiT layer, as in mmdit.py
    single blocks   attention and MLP side by side, from one norm, with weights that both streams share
Before the first block a small transformer refines the text, told the time and the mean of the text. A scale of guidance, which distillation has
folded into the published weights, enters like the time; here it is a constant of the model. Letters as in layout.py.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_apt.kernels.gated_residual import gated_residual
from megatron_apt.kernels.modulated_norm import modulated_norm
from megatron_apt.kernels.rows import Rows
from megatron_apt.models import parameters
from megatron_apt.models.backbone import LayerNorm, Modulation, RMSNorm
from megatron_apt.models.condition import Condition
from megatron_apt.models.config import ModelConfig
from megatron_apt.models.embeddings import PooledEmbedding, TimestepEmbedding
from megatron_apt.models.layout import Layout, Stream
from megatron_apt.models.mmdit import Block, MMDiT
from megatron_apt.models.parameters import column_linear, linear, row_linear
from megatron_apt.models.spec import DTYPES, BlockSubmodules, choose_backend, mmdit_block_spec, transformer_config
from megatron_apt.models.stages import WHOLE, Cut
from megatron_apt.parallel.context import joint_attention, whole_attention
from megatron_apt.parallel.mesh import Mesh


class SingleBlock(nn.Module):
    """Attention of text and visual tokens to each other, beside an MLP of each: y = x + gate (W [attention | MLP] + b).

    Features of both projections are ordered by head, so that a tensor-parallel slice holds whole heads and their share of the MLP: each stream is
    gathered once and reduced once.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh, parts: BlockSubmodules, layer_number: int):
        super().__init__()
        config, d = transformer_config(model, mesh), model.width
        self.mesh, self.heads, self.head_size = mesh, model.heads // mesh.tp.size, model.head_size
        self.modulation = Modulation(3, model, mesh, parts.visual.modulation)
        self.linear_in = column_linear(parts.visual.linear_qkv, d, 3 * d + model.mlp, config, mesh)  # (head, q | k | v | MLP)
        self.qk_norm = RMSNorm((2, model.head_size), DTYPES[model.dtype], tp_partial=True)
        self.linear_out = row_linear(parts.visual.linear_proj, d + model.mlp, d, config, mesh)  # (head, attention | MLP)
        self.attention = parts.core_attention(config, layer_number, mesh)

    def forward(self, x: Tensor, text: Tensor, c: Tensor, shared: Tensor | None, layout: Layout, rotary: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale, gate = self.modulation(c, shared)
        qkv, mlp = self._project(x, shift, scale, layout.visual)
        text_qkv, text_mlp = self._project(text, shift, scale, layout.text)
        norms = (self.qk_norm.weight,) * 2
        text_out, out = joint_attention(text_qkv, qkv, norms, rotary, layout, self.mesh, self.attention)
        return self._join(x, gate, out, mlp, layout.visual), self._join(text, gate, text_out, text_mlp, layout.text)

    def _project(self, x: Tensor, shift: Tensor, scale: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
        """(a, b, D) -> q, k and v (a, b, H, 3, K), not yet normalised, and what enters the MLP's nonlinearity (a, b, H, M / H)."""
        y = self.linear_in(modulated_norm(x, shift, scale, stream.rows))[0].unflatten(-1, (self.heads, -1))
        qkv, mlp = y.split((3 * self.head_size, y.shape[-1] - 3 * self.head_size), dim=-1)
        return qkv.unflatten(-1, (3, self.head_size)), mlp

    def _join(self, x: Tensor, gate: Tensor, attended: Tensor, mlp: Tensor, stream: Stream) -> Tensor:
        both = torch.cat((attended.unflatten(-1, (self.heads, -1)), F.gelu(mlp, approximate="tanh")), dim=-1)
        return gated_residual(x, gate, self.linear_out(both.flatten(-2))[0], stream.rows)


class RefinerBlock(nn.Module):
    """Attention of each caption's tokens among themselves, then an MLP, both gated; text is whole on every rank."""

    def __init__(self, model: ModelConfig, mesh: Mesh, parts: BlockSubmodules):
        super().__init__()
        config, d, dtype = transformer_config(model, mesh, sequence_parallel=False), model.width, DTYPES[model.dtype]
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
        return gated_residual(x, gate_mlp, self.linear_fc2(F.silu(self.linear_fc1(self.norm_2(x))[0]))[0], rows)


class Refiner(nn.Module):
    """Text (T, E) of all captions -> (T, D), each read by itself."""

    def __init__(self, model: ModelConfig, mesh: Mesh, parts: BlockSubmodules):
        super().__init__()
        d, dtype = model.width, DTYPES[model.dtype]
        self.linear_in = linear(model.text_width, d, dtype)
        self.time_embed, self.mean_embed = TimestepEmbedding(d, dtype), PooledEmbedding(model.text_width, d, dtype)
        self.blocks = nn.ModuleList(RefinerBlock(model, mesh, parts) for _ in range(model.hunyuan.refiner_blocks))

    def forward(self, tokens: Tensor, lengths: tuple[int, ...], t: Tensor) -> Tensor:
        rows = _packed(lengths, tokens.device)
        wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        mean = wide.new_zeros(len(lengths), wide.shape[1]).index_add(0, rows.sample, wide) / wide.new_tensor(lengths)[:, None]
        c = self.time_embed(t) + self.mean_embed(mean.to(tokens.dtype))
        x = self.linear_in(tokens).unsqueeze(1)
        for block in self.blocks:
            x = block(x, c, lengths, rows)
        return x.squeeze(1)


@lru_cache(maxsize=16)
def _packed(lengths: tuple[int, ...], device: torch.device) -> Rows:
    return Rows.packed(lengths, device)


class Hunyuan(MMDiT):
    """v = model(x_t, t, condition) of HunyuanVideo."""

    def __init__(self, model: ModelConfig, mesh: Mesh, depth: int | None = None, output: bool = True, cut: Cut = WHOLE):
        super().__init__(model, mesh, depth, output, cut)
        if cut.first and model.hunyuan.guidance:
            self.guidance_embed = TimestepEmbedding(model.width, DTYPES[model.dtype])

    def block(self, i: int, parts: BlockSubmodules) -> nn.Module:
        if i < self.model.hunyuan.double_blocks:
            return Block(self.model, self.mesh, parts, i + 1, update_text=True)
        return SingleBlock(self.model, self.mesh, parts, i + 1)

    def text_embedding(self) -> nn.Module:
        return Refiner(self.model, self.mesh, mmdit_block_spec(choose_backend(self.mesh.device.type, self.model.dtype)))

    def pooled_embedding(self) -> nn.Module:
        return PooledEmbedding(self.model.pooled_width, self.model.width, DTYPES[self.model.dtype])

    def embed_text(self, condition: Condition, t: Tensor, layout: Layout) -> Tensor:
        refined = self.text_embed(condition.tokens.to(self.x_embed.weight.dtype), condition.lengths, t)
        return refined.index_select(0, layout.text.index)

    def embed_condition(self, condition: Condition, t: Tensor) -> Tensor:
        c = super().embed_condition(condition, t)
        guidance = self.model.hunyuan.guidance
        return c + self.guidance_embed(torch.full_like(t, guidance)) if guidance else c
