"""Layers on Megatron-Core: Transformer Engine's on CUDA, torch's on CPU. Nothing else in
the package asks which machine it is.
"""

import copy
import functools
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine as te
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    _grad_accum_fusion_available,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_te_version, is_te_min_version

from megatron_apt.models.parameters import declared
from megatron_apt.parallel import deferred
from megatron_apt.parallel.context import RINGS
from megatron_apt.parallel.mesh import Mesh

# Of Transformer Engine: delayed weight gradients, and parameters that say so to
# Megatron-Core
OLDEST = "2.8.0"


if TYPE_CHECKING:  # the linear layer that the next two classes are put before
    _Linear = Any
else:
    _Linear = object


class _FusedBias(_Linear):
    """Linear without communication as one call: bias inside the matrix product, and no
    weight gradient when the weight is frozen.

    Megatron-Core's own function adds the bias in a second pass over the output, and
    cannot put the weight gradient off.
    """

    def __init__(self, *args, config: TransformerConfig, **kwargs):
        config = copy.copy(config)
        config.gradient_accumulation_fusion &= _grad_accum_fusion_available  # here it is Apex's
        super().__init__(*args, config=config, **kwargs)

    def _forward_impl(
        self, input, weight, bias=None, allreduce_dgrad=False, sequence_parallel=False, **kwargs
    ):
        store = deferred.current()
        if store is not None and weight.requires_grad and input.requires_grad:
            return deferred.linear(
                input, weight, bias, store, allreduce_dgrad, sequence_parallel, self.tp_group
            )
        if allreduce_dgrad or sequence_parallel:
            kwargs |= {"allreduce_dgrad": allreduce_dgrad, "sequence_parallel": sequence_parallel}
            return super()._forward_impl(input=input, weight=weight, bias=bias, **kwargs)
        return F.linear(input, weight, bias)


class LocalColumnParallelLinear(_FusedBias, ColumnParallelLinear):
    pass


class LocalRowParallelLinear(_FusedBias, RowParallelLinear):
    def forward(self, input_):
        if self.tp_group.size() == 1 and not self.skip_bias_add:
            return self._forward_impl(input_, self.weight, self.bias), None
        return super().forward(input_)


class _Layer(_Linear):
    """Transformer Engine's linear among several networks and branches. Never run: there
    was no GPU to run it on.

    Weight gradients: its own delayed ones, which the pass's store calls. Its queue gives
    out products first in, first out, so the W of one microbatch may do another's. Both go
    into the same STEP, which waits for all. Everything goes into the fp32 buffer as soon
    as it is there, because a second microbatch may be on its way before the first one's
    W: `.grad`, which Transformer Engine's own backward_dw goes through, holds one
    gradient.

    FP8 copies of the weight: kept from one STEP to the next (models/fp8.py). It never
    hears of a first microbatch, at which it would also overwrite the weight's gradient;
    and a pass without gradients keeps no copy, because the one it makes lacks the layout
    that backward passes need.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.is_first_microbatch = False
        if self.config.delay_wgrad_compute:
            # What autograd brings: of the weight a placeholder, of the bias its gradient
            # where the product for the weight does not make it.
            self.weight.register_post_accumulate_grad_hook(_drop)
            self.bias.register_post_accumulate_grad_hook(_add_to_buffer)

    def backward_dw(self) -> None:
        (_, bias_gradient), _ = self.wgrad_store.pop()  # the weight's was added to the buffer
        if bias_gradient is not None and self.bias.requires_grad:
            self.bias.main_grad.add_(bias_gradient)

    def forward(self, x):
        self.disable_parameter_transpose_cache = not (torch.is_grad_enabled() and x.requires_grad)
        store = deferred.current()
        if store is not None and self.weight.requires_grad and self.config.delay_wgrad_compute:
            output, bias = super().forward(x)
            # A layer whose output gets no gradient has nothing to do later
            output.register_hook(lambda _: store.later(self.backward_dw))
            return output, bias
        return super().forward(x)


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _add_to_buffer(parameter: torch.nn.Parameter) -> None:
    if parameter.grad is not None:  # called too where a function returns no gradient for it
        declared(parameter).main_grad.add_(parameter.grad)
        parameter.grad = None


def _layer(linear: type) -> type:
    return type(f"Apt{linear.__name__}", (_Layer, linear), {}) if te.HAVE_TE else linear


class LocalAttention(torch.nn.Module):
    """Full attention on (g, lq, H, K), (g, lk, H, K), (g, lk, H, K) -> (g, lq, H, K).

    `cross`: keys and values come from elsewhere and are whole on every rank, so that
    neither they nor heads are exchanged.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, mesh: Mesh, cross: bool = False):
        super().__init__()
        if mesh.context_parallel in RINGS and not cross:
            raise ValueError(
                f"parallel.context_parallel={mesh.context_parallel!r} needs Transformer Engine and "
                "model.dtype='bfloat16'; use ulysses or all_gather"
            )

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        ).transpose(1, 2)


class TransformerEngineAttention(torch.nn.Module):
    """The same contract on Transformer Engine's fused attention.

    Ulysses and all_gather stay outside (parallel/context.py), because they take packed
    samples of any length; p2p and a2a+p2p happen inside, and then q, k and v are this
    rank's tokens of samples that are equally long on every rank. Without a mask their
    order does not matter.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, mesh: Mesh, cross: bool = False):
        super().__init__()
        import transformer_engine.pytorch

        heads = config.num_attention_heads // config.tensor_model_parallel_size
        if mesh.context_parallel == "ulysses" and not cross:
            heads //= mesh.cp.size
        size = config.kv_channels or 0
        if size % 8 and layer_number == 1:
            warnings.warn(
                f"model.width / model.heads = {size} is no multiple of 8, which Transformer "
                "Engine's fused attention needs: its other one keeps all scores in memory; use another "
                "number of heads",
                stacklevel=2,
            )
        self.attention = transformer_engine.pytorch.DotProductAttention(
            heads,
            config.kv_channels,
            qkv_format="bshd",
            attn_mask_type="no_mask",
            attention_dropout=0.0,
            layer_number=layer_number,
            attention_type="cross" if cross else "self",
        )
        if mesh.cp.size > 1 and not cross and mesh.context_parallel in RINGS:
            self.attention.set_context_parallel_group(
                list(mesh.cp_levels) or mesh.cp.group,
                torch.distributed.get_process_group_ranks(mesh.cp.group),
                _ring_stream(),
                cp_comm_type=mesh.context_parallel,
            )

    def forward(self, q, k, v):
        # It takes no tensor for contiguous that does not begin its storage, as every
        # group of packed samples after the first.
        qkv = (
            x.contiguous() if x.storage_offset() == 0 else x.clone(memory_format=torch.contiguous_format)
            for x in (q, k, v)
        )
        return self.attention(*qkv).unflatten(-1, q.shape[-2:])


@functools.lru_cache
def _ring_stream() -> torch.cuda.Stream:
    """The stream on which every layer's ring sends while it computes."""
    return torch.cuda.Stream()


class LocalBackend:
    column_parallel_linear: type = LocalColumnParallelLinear
    row_parallel_linear: type = LocalRowParallelLinear
    vector_linear: type = LocalColumnParallelLinear
    core_attention: type = LocalAttention


class TransformerEngineBackend:
    column_parallel_linear: type = _layer(te.TEColumnParallelLinear)
    row_parallel_linear: type = _layer(te.TERowParallelLinear)
    vector_linear: type = LocalColumnParallelLinear
    core_attention: type = TransformerEngineAttention


@functools.lru_cache
def choose_backend(device_type: str, dtype: str) -> LocalBackend | TransformerEngineBackend:
    """Transformer Engine where it can run; otherwise torch, with one warning if that
    wastes a GPU.

    Transformer Engine is for bfloat16 alone: it multiplies float32 in TF32, and knows no
    float64.
    """
    if device_type != "cuda" or dtype != "bfloat16":
        return LocalBackend()
    if te.HAVE_TE and is_te_min_version(OLDEST):  # without it the classes are mocks that build silently
        return TransformerEngineBackend()
    problem = f"{get_te_version()} is too old ({OLDEST} is needed)" if te.HAVE_TE else "is not installed"
    warnings.warn(
        f"Transformer Engine {problem}: using torch layers on CUDA. `pip install megatron_apt[gpu]` for its "
        "kernels and FP8.",
        stacklevel=2,
    )
    return LocalBackend()
