"""MMDiT: a diffusion transformer with separate weights for text and visual tokens and joint attention (Esser et al. 2024).

Built from Megatron-Core linear layers: tensor parallelism splits heads and MLP features, sequence parallelism the activations between them,
context parallelism the tokens of each sample. Letters as in layout.py.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import checkpoint
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from megatron_apt.kernels.gated_residual import gated_residual
from megatron_apt.kernels.modulated_norm import modulated_norm
from megatron_apt.kernels.rms_norm import rms_norm
from megatron_apt.models import parameters
from megatron_apt.models.config import ModelConfig
from megatron_apt.models.embeddings import TimestepEmbedding, rotary_table
from megatron_apt.models.fp8 import Fp8Blocks
from megatron_apt.models.layout import Layout, Stream
from megatron_apt.models.parameters import column_linear, declare, linear, row_linear
from megatron_apt.models.spec import DTYPES, BlockSubmodules, StreamSubmodules, choose_backend, mmdit_block_spec, transformer_config
from megatron_apt.models.stages import WHOLE, Cut, State, run_all
from megatron_apt.parallel.context import joint_attention
from megatron_apt.parallel.mesh import Mesh


@dataclass(frozen=True)
class Condition:
    """Text conditions of a microbatch, whole on every rank: packed tokens (sum of lengths, E), their lengths, and each sample's mean (n, E)."""

    tokens: Tensor
    lengths: tuple[int, ...]
    pooled: Tensor

    @staticmethod
    def pack(texts: list[Tensor], length: int = 0) -> "Condition":
        """From one (length_i, E) embedding per sample, each cut or padded with zeros to `length` tokens unless that is 0.

        Means are over each caption's own tokens, before padding.
        """
        tokens, lengths = torch.cat(texts), torch.tensor([len(t) for t in texts])
        sample = torch.repeat_interleave(torch.arange(len(texts)), lengths)
        pooled = tokens.new_zeros(len(texts), tokens.shape[1]).index_add(0, sample, tokens) / lengths[:, None].to(tokens.dtype)
        if not length:
            return Condition(tokens, tuple(lengths.tolist()), pooled)
        place = torch.arange(len(tokens)) - (lengths.cumsum(0) - lengths)[sample]
        kept = place < length
        fitted = tokens.new_zeros(len(texts) * length, tokens.shape[1])
        fitted[(sample * length + place)[kept]] = tokens[kept]
        return Condition(fitted, (length,) * len(texts), pooled)

    def repeat(self, n: int) -> "Condition":
        """A single sample's condition for n samples."""
        return Condition(self.tokens.repeat(n, 1), self.lengths * n, self.pooled.repeat(n, 1))

    def to(self, device: torch.device) -> "Condition":
        return Condition(self.tokens.to(device), self.lengths, self.pooled.to(device))

    def join(self, other: "Condition") -> "Condition":
        """The samples of both, one after the other."""
        return Condition(torch.cat((self.tokens, other.tokens)), self.lengths + other.lengths, torch.cat((self.pooled, other.pooled)))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension with a learned scale; statistics in at least fp32."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, tp_partial: bool):
        super().__init__()
        self.weight = declare(nn.Parameter(torch.empty(shape, dtype=dtype)), parameters.ones, tp_partial=tp_partial)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight)


class Modulation(nn.Module):
    """AdaLN vectors of one place: (n, count * D) from the condition c, as `count` tensors (n, D).

    "block": a projection of silu(c) of its own. "single": a learned offset added to vectors projected once for all blocks.
    """

    def __init__(self, count: int, model: ModelConfig, mesh: Mesh, part: type):
        super().__init__()
        self.count, self.mesh = count, mesh
        self.single = model.modulation == "single"
        if self.single:
            self.offset = declare(nn.Parameter(torch.empty(count * model.width, dtype=DTYPES[model.dtype])), parameters.normal(0.02))
        else:
            config = transformer_config(model, mesh, sequence_parallel=False)
            self.linear = column_linear(part, model.width, count * model.width, config, mesh, parameters.zeros, gather_output=True)

    def forward(self, c: Tensor, shared: Tensor | None) -> tuple[Tensor, ...]:
        vectors = shared[:, : len(self.offset)] + self.offset if self.single else self.linear(F.silu(c))[0]
        if self.mesh.sequence_parallel:
            # Each rank uses the vectors on its own tokens only, so their gradients are parts of a sum.
            vectors = copy_to_tensor_model_parallel_region(vectors, group=self.mesh.tp.group)
        return vectors.chunk(self.count, dim=-1)


class BlockStream(nn.Module):
    """One stream (visual or text) of a block: modulated norms, QKV, output projection and MLP.

    With `update=False` the stream only supplies keys and values, as text does in a last block whose text output nothing reads.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh, parts: StreamSubmodules, update: bool):
        super().__init__()
        config, d = transformer_config(model, mesh), model.width
        self.update, self.heads, self.head_size = update, model.heads // mesh.tp.size, model.head_size
        self.modulation = Modulation(6 if update else 2, model, mesh, parts.modulation)
        # Output features are ordered (head, q | k | v, K), so that a tensor-parallel slice holds whole heads.
        self.linear_qkv = column_linear(parts.linear_qkv, d, 3 * d, config, mesh)
        self.qk_norm = RMSNorm((2, model.head_size), DTYPES[model.dtype], tp_partial=True)
        if update:
            self.linear_proj = row_linear(parts.linear_proj, d, d, config, mesh)
            self.linear_fc1 = column_linear(parts.linear_fc1, d, model.mlp_ratio * d, config, mesh)
            self.linear_fc2 = row_linear(parts.linear_fc2, model.mlp_ratio * d, d, config, mesh)

    def before_attention(self, x: Tensor, c: Tensor, shared: Tensor | None, stream: Stream):
        """x (a, b, D) -> q, k and v (a, b, H, 3, K), not yet normalised, and the vectors for `after_attention`."""
        shift, scale, *rest = self.modulation(c, shared)
        return self.linear_qkv(modulated_norm(x, shift, scale, stream.rows))[0].unflatten(-1, (self.heads, 3, self.head_size)), rest

    def after_attention(self, x: Tensor, attended: Tensor, vectors: list[Tensor], stream: Stream) -> Tensor:
        gate, shift_mlp, scale_mlp, gate_mlp = vectors
        x = gated_residual(x, gate, self.linear_proj(attended)[0], stream.rows)
        h = self.linear_fc1(modulated_norm(x, shift_mlp, scale_mlp, stream.rows))[0]
        return gated_residual(x, gate_mlp, self.linear_fc2(F.gelu(h, approximate="tanh"))[0], stream.rows)


class Block(nn.Module):
    """One MMDiT layer."""

    def __init__(self, model: ModelConfig, mesh: Mesh, parts: BlockSubmodules, layer_number: int, update_text: bool):
        super().__init__()
        self.mesh = mesh
        self.visual = BlockStream(model, mesh, parts.visual, update=True)
        self.text = BlockStream(model, mesh, parts.text, update=update_text)
        self.attention = parts.core_attention(transformer_config(model, mesh), layer_number, mesh)

    def forward(self, x: Tensor, text: Tensor, c: Tensor, shared: Tensor | None, layout: Layout, rotary: Tensor) -> tuple[Tensor, Tensor]:
        visual, visual_vectors = self.visual.before_attention(x, c, shared, layout.visual)
        caption, text_vectors = self.text.before_attention(text, c, shared, layout.text)
        norms = self.text.qk_norm.weight, self.visual.qk_norm.weight
        text_out, visual_out = joint_attention(caption, visual, norms, rotary, layout, self.mesh, self.attention)
        x = self.visual.after_attention(x, visual_out, visual_vectors, layout.visual)
        return x, self.text.after_attention(text, text_out, text_vectors, layout.text) if self.text.update else text


class MMDiT(nn.Module):
    """The diffusion transformer: v = model(x_t, t, condition).

    Args:
        model: shape.
        mesh: device mesh.
        depth: layers to build; fewer than model.depth gives the lower part of the network.
        output: with the final projection to a velocity (a discriminator's backbone has none).
        cut: its pipeline stages; only the parts of this rank's are built.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh, depth: int | None = None, output: bool = True, cut: Cut = WHOLE):
        super().__init__()
        self.model, self.mesh, self.depth, self.cut = model, mesh, depth or model.depth, cut
        dtype, d = DTYPES[model.dtype], model.width
        if cut.first:
            self.x_embed = linear(model.patch_width, d, dtype)
            self.text_embed = linear(model.text_width, d, dtype)
            self.time_embed = TimestepEmbedding(d, dtype)
            self.pooled_embed = linear(model.text_width, d, dtype) if model.pooled_text else None
            self.shared_modulation = linear(d, 6 * d, dtype, parameters.zeros) if model.modulation == "single" else None
        spec = mmdit_block_spec(choose_backend(mesh.device.type, model.dtype))
        last_text = [i < model.depth - 1 or model.last_block_text for i in range(self.depth)]
        held = [i for i in range(self.depth) if cut.holds(self.depth, i)]
        self.blocks = nn.ModuleDict({str(i): Block(model, mesh, spec, i + 1, last_text[i]) for i in held})
        self.final = FinalLayer(model, mesh, spec.visual.modulation) if output and cut.last else None
        self.fp8 = Fp8Blocks(model.fp8, self.depth, mesh.device)

    def forward(self, x: Tensor, t: Tensor, condition: Condition, layout: Layout) -> Tensor:
        """Velocity of every local visual token.

        Args:
            x: (T_visual, C * patch) this context-parallel rank's tokens, as `patchify` orders them.
            t: (n,) times in [0, 1], one per sample.
            condition: text of the n samples, whole.
            layout: from `build_layout` with the samples' grids and condition.lengths.

        Returns:
            (T_visual, C * patch), in x's dtype.
        """
        return run_all(self, x, t, condition, layout).to(x.dtype)

    def enter(self, x: Tensor, t: Tensor, condition: Condition, layout: Layout) -> State:
        """Embeddings: hidden states of both streams, the condition vector c (n, D) and, with modulation "single", the shared (n, 6 D) vectors."""
        dtype = self.x_embed.weight.dtype
        h = layout.visual.fold(self.x_embed(x.to(dtype)))
        text = layout.text.fold(self.text_embed(condition.tokens.to(dtype).index_select(0, layout.text.index)))
        c = self.time_embed(t)
        if self.pooled_embed is not None:
            c = c + self.pooled_embed(condition.pooled.to(dtype))
        if self.mesh.sequence_parallel:
            h, text = (scatter_to_sequence_parallel_region(y, group=self.mesh.tp.group) for y in (h, text))
        state = {"visual": h, "text": text, "c": c}
        return state | ({"shared": self.shared_modulation(F.silu(c))} if self.shared_modulation is not None else {})

    def run_stage(self, stage: int, state: State, layout: Layout) -> State | Tensor:
        """The state behind a stage, or behind the last one the velocity."""
        state, _ = self.run_blocks(stage, state, layout)
        if stage < self.cut.stages - 1 or self.final is None:
            return state
        v = self.final(state["visual"], state["c"], state.get("shared"), layout)
        if self.mesh.sequence_parallel:
            v = gather_from_sequence_parallel_region(v, tensor_parallel_output_grad=False, group=self.mesh.tp.group)
        return layout.visual.unfold(v)

    def run_blocks(self, stage: int, state: State, layout: Layout, taps: tuple[int, ...] = ()) -> tuple[State, dict[int, Tensor]]:
        """The state behind the blocks of a stage, and the visual hidden states behind those of them that are numbered (from 1) in `taps`."""
        h, text, c, shared = state["visual"], state["text"], state["c"], state.get("shared")
        rotary = rotary_table(layout, self.model.head_size, self.model.rope_theta, h.dtype)
        tapped = {}
        for i in self.cut.blocks(self.depth, stage):
            h, text = self._run(i, h, text, c, shared, layout, rotary)
            if i + 1 in taps:
                tapped[i + 1] = h
        return state | {"visual": h, "text": text}, tapped

    def carried(self, stage: int, layout: Layout) -> dict[str, tuple[tuple[int, ...], bool]]:
        """See models/stages.py."""
        d, n, tp = self.model.width, layout.samples, self.mesh.tp.size if self.mesh.sequence_parallel else 1
        shapes = {name: (stream.folded(d, tp), True) for name, stream in (("visual", layout.visual), ("text", layout.text))}
        return shapes | {"c": ((n, d), False)} | ({"shared": ((n, 6 * d), False)} if self.model.modulation == "single" else {})

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.model.dtype]

    def output_shape(self, layout: Layout) -> tuple[int, ...]:
        return len(layout.positions), self.model.patch_width

    def _run(self, i: int, h, text, c, shared, layout, rotary):
        def block(h, text, c, shared):
            with self.fp8.products(i):
                return self.blocks[str(i)](h, text, c, shared, layout, rotary)

        if self.model.recompute == "full" and torch.is_grad_enabled():
            return checkpoint(block, False, h, text, c, shared)
        return block(h, text, c, shared)


class FinalLayer(nn.Module):
    """Modulated norm and projection of each visual token to its patch of velocity."""

    def __init__(self, model: ModelConfig, mesh: Mesh, part: type):
        super().__init__()
        self.modulation = Modulation(2, model, mesh, part)
        self.linear = linear(model.width, model.patch_width, DTYPES[model.dtype], parameters.zeros, tp_partial=mesh.sequence_parallel)

    def forward(self, x: Tensor, c: Tensor, shared: Tensor | None, layout: Layout) -> Tensor:
        return self.linear(modulated_norm(x, *self.modulation(c, shared), layout.visual.rows))
