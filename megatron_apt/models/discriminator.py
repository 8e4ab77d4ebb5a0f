"""The discriminator: the diffusion backbone with learned-query cross-attention heads at
several depths and one fp32 logit per sample.

A head (APT paper, Figure 1), with h the visual tokens after its block:
    q = norm(Wq token); k = norm(Wk RMSNorm(h)); v = Wv RMSNorm(h)
    y = token + Wo attention(q, k, v);   y = y + MLP(Norm(y))
With one query per head, attention(q, k, Wv x) = Wv attention(q, k, x): each head pools
its input, and values are projected once per sample instead of once per token. That halves
the head's arithmetic and the activations it keeps. The heads' tokens are joined on
channels, normalised and projected to the logit. The last projection of the diffusion
model is not used.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_apt.families.registry import build_backbone
from megatron_apt.kernels.learnable_query_pooling import learnable_query_pooling
from megatron_apt.models import parameters
from megatron_apt.models.backbone import RMSNorm
from megatron_apt.models.condition import Condition
from megatron_apt.models.config import ModelConfig
from megatron_apt.models.layout import Layout, Stream
from megatron_apt.models.parameters import column_linear, declare, linear, row_linear
from megatron_apt.models.parts import DTYPES, Backend, choose_backend, transformer_config
from megatron_apt.models.stages import WHOLE, Cut, Staged, State, run_all
from megatron_apt.parallel import deferred
from megatron_apt.parallel.collectives import max_over, sum_over
from megatron_apt.parallel.megatron import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron_apt.parallel.mesh import Mesh


class HeadLinear(nn.Module):
    """A projection of whole tokens to this rank's heads: (..., D) -> (..., H K), features
    ordered (head, K); leaves communication to the caller.
    """

    def __init__(self, width: int, dtype: torch.dtype, mesh: Mesh):
        super().__init__()
        self.group, out = mesh.tp.group, width // mesh.tp.size
        self.weight = declare(
            nn.Parameter(torch.empty(out, width, dtype=dtype)), parameters.xavier, sharded_dim=0
        )
        self.bias = declare(nn.Parameter(torch.empty(out, dtype=dtype)), parameters.zeros, sharded_dim=0)

    def forward(self, x: Tensor) -> Tensor:
        store = deferred.current()
        if store is not None and self.weight.requires_grad and x.requires_grad:
            return deferred.linear(x, self.weight, self.bias, store, False, False, self.group)
        return F.linear(x, self.weight, self.bias)

    def of_pooled(self, acc: Tensor, total: Tensor, head_size: int) -> Tensor:
        """The projection of each head's own sums over tokens: (n, H, D), whose weights
        add up to total (n, H) -> (n, H, K), in acc's dtype.
        """
        weight, bias = (p.to(acc.dtype).unflatten(0, (-1, head_size)) for p in (self.weight, self.bias))
        return torch.einsum("nhd,hkd->nhk", acc, weight) + total.unsqueeze(-1) * bias


class QueryHead(nn.Module):
    """One cross-attention-only transformer block whose single query is a learned token:
    visual tokens -> (n, D).
    """

    def __init__(self, model: ModelConfig, mesh: Mesh, backend: Backend):
        super().__init__()
        self.mesh, self.heads, self.head_size = mesh, model.heads // mesh.tp.size, model.head_size
        d, dtype = model.width, DTYPES[model.dtype]
        # Acts on one vector per sample, whole on every rank
        single = transformer_config(model, mesh, sequence_parallel=False)
        column, row = backend.column_parallel_linear, backend.row_parallel_linear
        self.token = declare(nn.Parameter(torch.empty(1, d, dtype=dtype)), parameters.normal(0.02))
        self.norm_tokens = RMSNorm((d,), dtype, tp_partial=mesh.sequence_parallel)
        self.linear_q = column_linear(column, d, d, single, mesh)
        self.linear_k, self.linear_v = HeadLinear(d, dtype, mesh), HeadLinear(d, dtype, mesh)
        self.q_norm = RMSNorm((self.head_size,), dtype, tp_partial=True)
        self.k_norm = RMSNorm((self.head_size,), dtype, tp_partial=True)
        self.linear_proj = row_linear(row, d, d, single, mesh)
        self.norm_mlp = RMSNorm((d,), dtype, tp_partial=False)
        self.linear_fc1 = column_linear(column, d, model.mlp_ratio * d, single, mesh)
        self.linear_fc2 = row_linear(row, model.mlp_ratio * d, d, single, mesh)

    def forward(self, h: Tensor, layout: Layout) -> Tensor:
        q = self.q_norm(self.linear_q(self.token)[0].view(self.heads, self.head_size))
        x = self._all_tokens(self.norm_tokens(h), layout.visual)
        k = self.linear_k(x).unflatten(-1, (self.heads, self.head_size))
        top, total, acc = learnable_query_pooling(q, k, x, self.k_norm.weight, layout.visual.whole)
        attended = (
            self._merge(top, total, self.linear_v.of_pooled(acc, total, self.head_size))
            .flatten(1)
            .to(self.token.dtype)
        )
        y = self.token + self.linear_proj(attended)[0]
        return y + self.linear_fc2(F.gelu(self.linear_fc1(self.norm_mlp(y))[0]))[0]

    def _all_tokens(self, x: Tensor, stream: Stream) -> Tensor:
        """The folded tokens of this context-parallel rank, without padding. Their
        gradient is summed over the ranks that share the heads.
        """
        group = self.mesh.tp.group
        if self.mesh.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)
        elif self.mesh.tp.size > 1:
            x = copy_to_tensor_model_parallel_region(x, group=group)
        return stream.unfold(x).unsqueeze(1) if stream.padding else x

    def _merge(self, top: Tensor, total: Tensor, acc: Tensor) -> Tensor:
        """Softmax over ALL tokens of a sample, whose parts lie on the context-parallel
        ranks: log-sum-exp of three small tensors.
        """
        axis = self.mesh.cp
        if axis.size == 1:
            return acc / total.unsqueeze(-1)
        share = torch.exp(top - max_over(top, axis)).unsqueeze(-1)
        both = sum_over(torch.cat((total.unsqueeze(-1), acc), dim=-1) * share, axis)
        return both[..., 1:] / both[..., :1]


class Discriminator(Staged):
    """D(x, t, condition) -> one logit per sample.

    Args:
        model: shape of the diffusion model.
        mesh: device mesh.
        depth: layers kept of the backbone.
        taps: blocks (from 1, in order) after which the heads stand.
        cut: its pipeline stages; a head stands on the stage of its block, the logit on
            the last.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh, depth: int, taps: tuple[int, ...], cut: Cut = WHOLE):
        super().__init__()
        self.taps, self.cut = taps, cut
        self.backbone = build_backbone(model, mesh, depth=depth, output=False, cut=cut)
        backend, width = choose_backend(mesh.device.type, model.dtype), len(self.taps) * model.width
        held = [i for i, tap in enumerate(self.taps) if cut.holds(depth, tap - 1)]
        self.heads = nn.ModuleDict({str(i): QueryHead(model, mesh, backend) for i in held})
        if not cut.last:
            return
        logit_dtype = torch.promote_types(DTYPES[model.dtype], torch.float32)
        self.norm_weight = declare(nn.Parameter(torch.empty(width, dtype=logit_dtype)), parameters.ones)
        self.norm_bias = declare(nn.Parameter(torch.empty(width, dtype=logit_dtype)), parameters.zeros)
        # Zero logits at the start. Random ones begin with an offset and a penalty, and
        # undoing those costs tens of updates, whose sign-like RMSProp steps spoil the
        # diffusion weights on the way (measured on the demo's clips: logit gap after 60
        # updates 0.19 against 0.67).
        self.logit = linear(width, 1, logit_dtype, parameters.zeros)

    def forward(self, x: Tensor, t: Tensor, condition: Condition, layout: Layout) -> Tensor:
        """Logits (n,), at least fp32, equal on every tensor- and context-parallel rank.
        Arguments as in Backbone.forward.
        """
        return run_all(self, x, t, condition, layout)

    def enter(self, x: Tensor, t: Tensor, condition: Condition, layout: Layout) -> State:
        return self.backbone.enter(x, t, condition, layout)

    def run_stage(self, stage: int, state: State, layout: Layout) -> State | Tensor:
        """The state behind a stage, with the tokens of the heads passed so far; behind
        the last one the logits.
        """
        state, hidden = self.backbone.run_blocks(stage, state, layout, self.taps)
        state |= {
            f"token.{i}": self.heads[str(i)](hidden[tap], layout)
            for i, tap in enumerate(self.taps)
            if tap in hidden
        }
        if stage < self.cut.stages - 1:
            return state
        tokens = torch.cat([state[f"token.{i}"] for i in range(len(self.taps))], dim=-1).to(
            self.logit.weight.dtype
        )
        tokens = F.layer_norm(tokens, tokens.shape[-1:], self.norm_weight, self.norm_bias, eps=1e-6)
        return self.logit(tokens).squeeze(-1)

    def carried(self, stage: int, layout: Layout) -> dict[str, tuple[tuple[int, ...], bool]]:
        """See models/stages.py."""
        passed = [
            i for i, tap in enumerate(self.taps) if tap <= self.cut.blocks(self.backbone.depth, stage).stop
        ]
        tokens = {f"token.{i}": ((layout.samples, self.backbone.model.width), True) for i in passed}
        return self.backbone.carried(stage, layout) | tokens

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.dtype

    def output_shape(self, layout: Layout) -> tuple[int, ...]:
        return (layout.samples,)
