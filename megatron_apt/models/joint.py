"""Transformers with separate weights for text and visual tokens and joint attention
(MMDiT, Esser et al. 2024), and their layers.

Built from Megatron-Core linear layers: tensor parallelism splits heads and MLP features,
sequence parallelism the activations between them, context parallelism the tokens of each
sample. Letters as in layout.py.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_apt.kernels.gated_residual import gated_residual
from megatron_apt.kernels.modulated_norm import modulated_norm
from megatron_apt.models import parameters
from megatron_apt.models.backbone import Backbone, FinalLayer, Modulation, RMSNorm
from megatron_apt.models.condition import Condition
from megatron_apt.models.config import ModelConfig
from megatron_apt.models.embeddings import TimestepEmbedding
from megatron_apt.models.layout import Layout, Stream
from megatron_apt.models.parameters import column_linear, linear, row_linear
from megatron_apt.models.parts import (
    DTYPES,
    BlockSubmodules,
    StreamSubmodules,
    block_parts,
    choose_backend,
    transformer_config,
)
from megatron_apt.models.stages import WHOLE, Cut, State
from megatron_apt.parallel.context import joint_attention
from megatron_apt.parallel.megatron import scatter_to_sequence_parallel_region
from megatron_apt.parallel.mesh import Mesh


class BlockStream(nn.Module):
    """One stream (visual or text) of a block: modulated norms, QKV, output projection and
    MLP.

    With `update=False` the stream only supplies keys and values, as text does in a last
    block whose text output nothing reads. `vectors` of modulation: six, and those that a
    subclass of Block has use for.
    """

    def __init__(
        self, model: ModelConfig, mesh: Mesh, parts: StreamSubmodules, update: bool, vectors: int = 6
    ):
        super().__init__()
        config, d = transformer_config(model, mesh), model.width
        self.update, self.heads, self.head_size = update, model.heads // mesh.tp.size, model.head_size
        self.modulation = Modulation(vectors if update else 2, model, mesh, parts.modulation)
        # Output features are ordered (head, q | k | v, K), so that a tensor-parallel slice holds whole heads.
        self.linear_qkv = column_linear(parts.linear_qkv, d, 3 * d, config, mesh)
        self.qk_norm = (
            RMSNorm((2, model.head_size), DTYPES[model.dtype], tp_partial=True) if model.qk_norm else None
        )
        if update:
            self.linear_proj = row_linear(parts.linear_proj, d, d, config, mesh)
            self.linear_fc1 = column_linear(parts.linear_fc1, d, model.mlp, config, mesh)
            self.linear_fc2 = row_linear(parts.linear_fc2, model.mlp, d, config, mesh)

    @property
    def qk_scales(self) -> Tensor | None:
        return None if self.qk_norm is None else self.qk_norm.weight

    def before_attention(self, x: Tensor, c: Tensor, shared: Tensor | None, stream: Stream):
        """x (a, b, D) -> q, k and v (a, b, H, 3, K), not yet normalised, and the vectors
        for `after_attention`.
        """
        shift, scale, *rest = self.modulation(c, shared)
        return self.linear_qkv(modulated_norm(x, shift, scale, stream.rows))[0].unflatten(
            -1, (self.heads, 3, self.head_size)
        ), rest

    def after_attention(self, x: Tensor, attended: Tensor, vectors: list[Tensor], stream: Stream) -> Tensor:
        gate, shift_mlp, scale_mlp, gate_mlp = vectors
        x = gated_residual(x, gate, self.linear_proj(attended)[0], stream.rows)
        h = self.linear_fc1(modulated_norm(x, shift_mlp, scale_mlp, stream.rows))[0]
        return gated_residual(x, gate_mlp, self.linear_fc2(F.gelu(h, approximate="tanh"))[0], stream.rows)


class Block(nn.Module):
    """One layer."""

    vectors = 6  # of the visual stream's modulation

    def __init__(
        self, model: ModelConfig, mesh: Mesh, parts: BlockSubmodules, layer_number: int, update_text: bool
    ):
        super().__init__()
        self.mesh = mesh
        self.visual = BlockStream(model, mesh, parts.visual, update=True, vectors=self.vectors)
        self.text = BlockStream(model, mesh, parts.text, update=update_text)
        self.attention = parts.core_attention(transformer_config(model, mesh), layer_number, mesh)

    def forward(
        self, x: Tensor, text: Tensor, c: Tensor, shared: Tensor | None, layout: Layout, rotary: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        visual, visual_vectors = self.visual.before_attention(x, c, shared, layout.visual)
        caption, text_vectors = self.text.before_attention(text, c, shared, layout.text)
        norms = self.text.qk_scales, self.visual.qk_scales
        text_out, visual_out = joint_attention(
            caption, visual, norms, rotary, layout, self.mesh, self.attention
        )
        x = self.after_attention(x, visual_out, visual_vectors, layout)
        return x, self.text.after_attention(
            text, text_out, text_vectors, layout.text
        ) if self.text.update else text

    def after_attention(self, x: Tensor, attended: Tensor, vectors: list[Tensor], layout: Layout) -> Tensor:
        """Visual tokens behind the block from those before it, what they attended to, and
        the modulation not yet used.
        """
        return self.visual.after_attention(x, attended, vectors, layout.visual)


class JointTransformer(Backbone):
    """Text and visual tokens with weights of their own, which meet in every attention."""

    hidden = ("visual", "text")
    constant = ("c", "shared")

    def __init__(
        self, model: ModelConfig, mesh: Mesh, depth: int | None = None, output: bool = True, cut: Cut = WHOLE
    ):
        super().__init__(model, mesh, depth, output, cut)
        dtype, d = DTYPES[model.dtype], model.width
        if cut.first:
            self.x_embed = linear(model.input_width, d, dtype)
            self.text_embed = self.text_embedding()
            self.time_embed = TimestepEmbedding(d, dtype)
            self.pooled_embed = self.pooled_embedding() if model.pooled_text else None
            self.shared_modulation = (
                linear(d, 6 * d, dtype, parameters.zeros) if model.modulation == "single" else None
            )
        spec = block_parts(choose_backend(mesh.device.type, model.dtype))
        self.blocks = nn.ModuleDict({str(i): self.block(i, spec) for i in self.held})
        self.final = FinalLayer(model, mesh, spec.visual.modulation) if output and cut.last else None

    def block(self, i: int, parts: BlockSubmodules) -> nn.Module:
        """Layer i (from 0)."""
        update_text = i < self.model.depth - 1 or self.model.last_block_text
        return Block(self.model, self.mesh, parts, i + 1, update_text)

    def text_embedding(self) -> nn.Module:
        return linear(self.model.text_width, self.model.width, DTYPES[self.model.dtype])

    def pooled_embedding(self) -> nn.Module:
        return linear(self.model.text_width, self.model.width, DTYPES[self.model.dtype])

    def embed(self, x: Tensor, layout: Layout) -> Tensor:
        """(T, input_width) -> (T, D): this rank's visual tokens."""
        return self.x_embed(x.to(self.x_embed.weight.dtype))

    def embed_text(self, condition: Condition, t: Tensor, layout: Layout) -> Tensor:
        """(T_text, D): this rank's text tokens."""
        return self.text_embed(
            condition.tokens.to(self.x_embed.weight.dtype).index_select(0, layout.text.index)
        )

    def embed_condition(self, condition: Condition, t: Tensor) -> Tensor:
        """(n, D): what modulates every block."""
        c = self.time_embed(t)
        return (
            c
            if self.pooled_embed is None
            else c + self.pooled_embed(condition.pooled.to(self.x_embed.weight.dtype))
        )

    def enter(self, x: Tensor, t: Tensor, condition: Condition, layout: Layout) -> State:
        """Embeddings: hidden states of both streams, the condition vector c (n, D) and,
        with modulation "single", the shared (n, 6 D) vectors.
        """
        h = layout.visual.fold(self.embed(condition.beside(x, layout), layout))
        text = layout.text.fold(self.embed_text(condition, t, layout))
        c = self.embed_condition(condition, t)
        if self.mesh.sequence_parallel:
            h, text = (scatter_to_sequence_parallel_region(y, group=self.mesh.tp.group) for y in (h, text))
        state = {"visual": h, "text": text, "c": c}
        return state | (
            {"shared": self.shared_modulation(F.silu(c))} if self.shared_modulation is not None else {}
        )

    def carried(self, stage: int, layout: Layout) -> dict[str, tuple[tuple[int, ...], bool]]:
        """See models/stages.py."""
        d, n, tp = self.model.width, layout.samples, self.mesh.tp.size if self.mesh.sequence_parallel else 1
        shapes = {
            name: (stream.folded(d, tp), True)
            for name, stream in (("visual", layout.visual), ("text", layout.text))
        }
        return (
            shapes
            | {"c": ((n, d), False)}
            | ({"shared": ((n, 6 * d), False)} if self.model.modulation == "single" else {})
        )
