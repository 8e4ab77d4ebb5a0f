"""Wan 2.1 and 2.2 (dense): visual tokens attend to each other, then to the text, which no
block changes.

Compared with MMDiT: one stream; queries and keys are normalised over ALL heads together,
so under tensor parallelism the mean square is a sum over ranks; one projection of the
time modulates every block (AdaLN-single), the last layer the time itself. Text, and the
image tokens of Wan2.1 I2V, are few, so every context-parallel rank makes their keys and
values whole. Letters as in layout.py.

With model.first_frame (Wan2.2 TI2V; diffusers' `expand_timesteps`) a clip's first
frame is given: it enters in the place of whatever x holds there, and at time 0. A sample
then has two sets of modulation vectors, its first frame's and the rest's: m = 2 n of
them, else m = n. As no network sees another first frame, and none sends a gradient into
it, methods only leave it out of their means, and samplers put it into their results.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_apt.families.wan.config import WanConfig
from megatron_apt.kernels.gated_residual import gated_residual
from megatron_apt.kernels.modulated_norm import modulated_norm
from megatron_apt.kernels.rms_norm import EPS
from megatron_apt.kernels.rows import Rows
from megatron_apt.models import parameters
from megatron_apt.models.backbone import Backbone, FinalLayer, LayerNorm, Modulation
from megatron_apt.models.condition import Condition
from megatron_apt.models.embeddings import TimestepEmbedding
from megatron_apt.models.layout import Layout
from megatron_apt.models.parameters import column_linear, declare, linear, row_linear
from megatron_apt.models.parts import (
    DTYPES,
    StreamSubmodules,
    block_parts,
    choose_backend,
    transformer_config,
)
from megatron_apt.models.stages import WHOLE, Cut, State
from megatron_apt.parallel.collectives import sum_over
from megatron_apt.parallel.context import cross_attention, self_attention
from megatron_apt.parallel.megatron import scatter_to_sequence_parallel_region
from megatron_apt.parallel.mesh import Mesh


class NormAcrossHeads(nn.Module):
    """RMSNorm of several projections to heads, each over all heads together: (..., H,
    count, K), of which each tensor-parallel rank has its H.
    """

    def __init__(self, count: int, model: WanConfig, mesh: Mesh):
        super().__init__()
        self.axis, self.width = mesh.tp, model.width
        self.heads, self.head_size = model.heads // mesh.tp.size, model.head_size
        shape = (count, model.width // mesh.tp.size)
        self.weight = declare(
            nn.Parameter(torch.empty(shape, dtype=DTYPES[model.dtype])), parameters.ones, sharded_dim=1
        )

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        square = sum_over(wide.square().sum((-3, -1), keepdim=True), self.axis) / self.width
        weight = self.weight.unflatten(1, (self.heads, self.head_size)).transpose(0, 1)
        return (wide * torch.rsqrt(square + EPS)).to(x.dtype) * weight


class CrossAttention(nn.Module):
    """Visual tokens read the text, and the image tokens where there are any."""

    def __init__(
        self, model: WanConfig, mesh: Mesh, parts: StreamSubmodules, attention: type, layer_number: int
    ):
        super().__init__()
        config, d = transformer_config(model, mesh), model.width
        # Text is whole on every tensor-parallel rank
        whole = transformer_config(model, mesh, sequence_parallel=False)
        self.heads, self.head_size = model.heads // mesh.tp.size, model.head_size
        self.linear_q = column_linear(parts.linear_qkv, d, d, config, mesh)
        self.q_norm = NormAcrossHeads(1, model, mesh)
        sources = ("text", "image") if model.image_width else ("text",)
        # Output features are ordered (head, k | v, K).
        self.linear_kv = nn.ModuleDict(
            {source: column_linear(parts.linear_qkv, d, 2 * d, whole, mesh) for source in sources}
        )
        self.k_norm = nn.ModuleDict({source: NormAcrossHeads(1, model, mesh) for source in sources})
        self.linear_proj = row_linear(parts.linear_proj, d, d, config, mesh)
        self.attention = attention(config, layer_number, mesh, cross=True)

    def forward(self, x: Tensor, text: Tensor, image: Tensor | None, layout: Layout) -> Tensor:
        q = self.q_norm(self.linear_q(x)[0].unflatten(-1, (self.heads, 1, self.head_size))).squeeze(-2)
        attended = self._read("text", q, text, layout.text.lengths, layout)
        if image is not None:
            attended = attended + self._read(
                "image", q, image.flatten(0, 1), (image.shape[1],) * layout.samples, layout
            )
        return self.linear_proj(attended)[0]

    def _read(
        self, source: str, q: Tensor, tokens: Tensor, lengths: tuple[int, ...], layout: Layout
    ) -> Tensor:
        k, v = (
            self.linear_kv[source](tokens)[0].unflatten(-1, (self.heads, 2, self.head_size)).split(1, dim=-2)
        )
        return cross_attention(
            q, self.k_norm[source](k).squeeze(-2), v.squeeze(-2), lengths, layout, self.attention
        )


def rows_of(model: WanConfig, layout: Layout) -> Rows:
    """Which visual tokens each of the m sets of modulation vectors acts on."""
    return layout.first.rows if model.first_frame else layout.visual.rows


class WanBlock(nn.Module):
    """Self-attention, cross-attention, MLP; the first and the last modulated and gated."""

    def __init__(
        self, model: WanConfig, mesh: Mesh, parts: StreamSubmodules, attention: type, layer_number: int
    ):
        super().__init__()
        config, d = transformer_config(model, mesh), model.width
        self.model, self.mesh, self.heads, self.head_size = (
            model,
            mesh,
            model.heads // mesh.tp.size,
            model.head_size,
        )
        self.modulation = Modulation(6, model, mesh, parts.modulation)
        self.linear_qkv = column_linear(parts.linear_qkv, d, 3 * d, config, mesh)  # (head, q | k | v, K)
        self.qk_norm = NormAcrossHeads(2, model, mesh)
        self.linear_proj = row_linear(parts.linear_proj, d, d, config, mesh)
        self.cross_norm = (
            LayerNorm(d, DTYPES[model.dtype], tp_partial=mesh.sequence_parallel)
            if model.cross_norm
            else nn.Identity()
        )
        self.cross = CrossAttention(model, mesh, parts, attention, layer_number)
        self.linear_fc1 = column_linear(parts.linear_fc1, d, model.mlp, config, mesh)
        self.linear_fc2 = row_linear(parts.linear_fc2, model.mlp, d, config, mesh)
        self.attention = attention(config, layer_number, mesh)

    def forward(self, x, text, image, c, shared, layout: Layout, rotary: Tensor) -> tuple[Tensor]:
        rows = rows_of(self.model, layout)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(c, shared)
        qk, v = (
            self.linear_qkv(modulated_norm(x, shift, scale, rows))[0]
            .unflatten(-1, (self.heads, 3, self.head_size))
            .split((2, 1), dim=-2)
        )
        attended = self_attention(
            torch.cat((self.qk_norm(qk), v), dim=-2), None, rotary, layout, self.mesh, self.attention
        )
        x = gated_residual(x, gate, self.linear_proj(attended)[0], rows)
        x = x + self.cross(self.cross_norm(x), text, image, layout)
        h = F.gelu(self.linear_fc1(modulated_norm(x, shift_mlp, scale_mlp, rows))[0], approximate="tanh")
        return (gated_residual(x, gate_mlp, self.linear_fc2(h)[0], rows),)


class ImageEmbedding(nn.Module):
    """Tokens of an image encoder, (n, L, E) -> (n, L, D)."""

    def __init__(self, width_in: int, width: int, dtype: torch.dtype):
        super().__init__()
        self.norm_in, self.norm_out = LayerNorm(width_in, dtype, eps=1e-5), LayerNorm(width, dtype, eps=1e-5)
        self.linear_1, self.linear_2 = linear(width_in, width_in, dtype), linear(width_in, width, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_out(self.linear_2(F.gelu(self.linear_1(self.norm_in(x)))))


class Wan(Backbone):
    """v = model(x_t, t, condition) of the Wan family."""

    model: WanConfig

    hidden = ("visual",)
    constant = ("text", "image", "c", "shared")

    def __init__(
        self, model: WanConfig, mesh: Mesh, depth: int | None = None, output: bool = True, cut: Cut = WHOLE
    ):
        super().__init__(model, mesh, depth, output, cut)
        dtype, d = DTYPES[model.dtype], model.width
        if cut.first:
            self.x_embed = linear(model.input_width, d, dtype)
            self.text_embed_1, self.text_embed_2 = linear(model.text_width, d, dtype), linear(d, d, dtype)
            self.time_embed = TimestepEmbedding(d, dtype)
            self.shared_modulation = linear(d, 6 * d, dtype, parameters.zeros)
            self.image_embed = ImageEmbedding(model.image_width, d, dtype) if model.image_width else None
        spec = block_parts(choose_backend(mesh.device.type, model.dtype))
        self.blocks = nn.ModuleDict(
            {str(i): WanBlock(model, mesh, spec.visual, spec.core_attention, i + 1) for i in self.held}
        )
        self.final = FinalLayer(model, mesh, spec.visual.modulation) if output and cut.last else None

    def enter(self, x: Tensor, t: Tensor, condition: Condition, layout: Layout) -> State:
        """Embeddings: visual hidden states, text (sum of lengths, D), image tokens, time
        vectors c (m, D) and the shared (m, 6 D) modulation.
        """
        dtype, model = self.x_embed.weight.dtype, self.model
        if model.first_frame:
            if condition.first is None:
                raise ValueError(
                    "model.first_frame=True: this model is given the first frames of clips, and the "
                    "condition has none"
                )
            x, t = condition.over(x, layout), torch.stack((torch.zeros_like(t), t), dim=1).flatten()
        h = layout.visual.fold(self.x_embed(condition.beside(x, layout).to(dtype)))
        if self.mesh.sequence_parallel:
            h = scatter_to_sequence_parallel_region(h, group=self.mesh.tp.group)
        c = self.time_embed(t)
        text = self.text_embed_2(F.gelu(self.text_embed_1(condition.tokens.to(dtype)), approximate="tanh"))
        state = {"visual": h, "text": text, "c": c, "shared": self.shared_modulation(F.silu(c))}
        if self.image_embed is None:
            return state
        if condition.image is None:
            raise ValueError(
                f"model.image_width={model.image_width}: this model reads image tokens, and the condition "
                "has none"
            )
        if condition.image.shape[1:] != (model.image_tokens, model.image_width):
            raise ValueError(
                f"image tokens of shape {tuple(condition.image.shape[1:])}: this model reads "
                f"{model.image_tokens} of {model.image_width}"
            )
        return state | {"image": self.image_embed(condition.image.to(dtype))}

    def last_layer(self, state: State, layout: Layout) -> Tensor:
        c = state["c"]
        return self.final(state["visual"], c, c.repeat(1, 2), rows_of(self.model, layout))

    def carried(self, stage: int, layout: Layout) -> dict[str, tuple[tuple[int, ...], bool]]:
        """See models/stages.py."""
        d, n, tp = self.model.width, layout.samples, self.mesh.tp.size if self.mesh.sequence_parallel else 1
        m = rows_of(self.model, layout).samples
        shapes = {
            "visual": (layout.visual.folded(d, tp), True),
            "text": ((sum(layout.text.lengths), d), False),
        }
        shapes |= {"c": ((m, d), False), "shared": ((m, 6 * d), False)}
        return shapes | (
            {"image": ((n, self.model.image_tokens, d), False)} if self.model.image_width else {}
        )


MODEL = Wan
