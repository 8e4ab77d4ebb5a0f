"""What a model is put together from. Its layers are chosen by machine (models/spec.py),
or stand for shapes alone on the meta device.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import nn

from megatron_apt.models.config import ModelConfig
from megatron_apt.parallel.mesh import Mesh

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Backend(Protocol):
    """The parts that differ between machines; the rest of a model is plain torch."""

    column_parallel_linear: type
    row_parallel_linear: type
    vector_linear: type  # of one vector per sample
    core_attention: type


class _ColumnShape(nn.Module):
    def __init__(self, width_in: int, width_out: int, *, config, **_):
        super().__init__()
        width = width_out // config.tensor_model_parallel_size
        self.weight = nn.Parameter(torch.empty(width, width_in, dtype=config.params_dtype, device="meta"))
        self.bias = nn.Parameter(torch.empty(width, dtype=config.params_dtype, device="meta"))


class _RowShape(nn.Module):
    def __init__(self, width_in: int, width_out: int, *, config, **_):
        super().__init__()
        width = width_in // config.tensor_model_parallel_size
        self.weight = nn.Parameter(torch.empty(width_out, width, dtype=config.params_dtype, device="meta"))
        self.bias = nn.Parameter(torch.empty(width_out, dtype=config.params_dtype, device="meta"))


class ShapeBackend:
    """Parameters like those of Megatron-Core's layers, which take a second to import, and no forward pass."""

    column_parallel_linear: type = _ColumnShape
    row_parallel_linear: type = _RowShape
    vector_linear: type = _ColumnShape
    core_attention: type = nn.Identity


def choose_backend(device_type: str, dtype: str) -> Backend:
    """Shapes alone on the meta device; elsewhere what models/spec.py has for the machine."""
    if device_type == "meta":
        return ShapeBackend()
    from megatron_apt.models import spec

    return spec.choose_backend(device_type, dtype)


@dataclass(frozen=True)
class StreamSubmodules:
    """Linear layers of one stream (visual or text) of a block."""

    linear_qkv: type
    linear_proj: type
    linear_fc1: type
    linear_fc2: type
    modulation: type


@dataclass(frozen=True)
class BlockSubmodules:
    visual: StreamSubmodules
    text: StreamSubmodules
    core_attention: type


def block_parts(backend: Backend) -> BlockSubmodules:
    """Parts of an MMDiT block on a backend."""
    stream = StreamSubmodules(
        linear_qkv=backend.column_parallel_linear,
        linear_proj=backend.row_parallel_linear,
        linear_fc1=backend.column_parallel_linear,
        linear_fc2=backend.row_parallel_linear,
        modulation=backend.vector_linear,
    )
    return BlockSubmodules(visual=stream, text=stream, core_attention=backend.core_attention)


def transformer_config(model: ModelConfig, mesh: Mesh, sequence_parallel: bool | None = None) -> Any:
    """Megatron-Core's view of the model. Weights are initialised by
    `parameters.initialise`, so Megatron-Core leaves them alone.
    """
    sequence_parallel = mesh.sequence_parallel if sequence_parallel is None else sequence_parallel
    if mesh.device.type == "meta":  # what shapes depend on
        return SimpleNamespace(
            tensor_model_parallel_size=mesh.tp.size,
            sequence_parallel=sequence_parallel,
            params_dtype=DTYPES[model.dtype],
        )
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=model.depth,
        hidden_size=model.width,
        ffn_hidden_size=model.mlp,
        num_attention_heads=model.heads,
        kv_channels=model.head_size,
        tensor_model_parallel_size=mesh.tp.size,
        sequence_parallel=sequence_parallel,
        params_dtype=DTYPES[model.dtype],
        bf16=model.dtype == "bfloat16",
        use_cpu_initialization=mesh.device.type != "cuda",
        perform_initialization=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # The weight gradient's product adds into the fp32 buffer, in layers that can
        gradient_accumulation_fusion=mesh.device.type == "cuda",
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
    )
    # Set afterwards: Megatron-Core allows it with its own mixture-of-experts overlap
    # only, but Transformer Engine's layers take it anywhere.
    config.delay_wgrad_compute = mesh.pp.size > 1 and mesh.device.type == "cuda"
    return config
