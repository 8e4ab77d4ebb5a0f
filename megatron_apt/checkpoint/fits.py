"""Whether the model that a checkpoint describes is the one that it holds, before anything of it is built."""

from dataclasses import replace

import torch

from megatron_apt.checkpoint.files import CheckpointError
from megatron_apt.checkpoint.state import DAMAGED, STATE
from megatron_apt.checkpoint.store import Stored
from megatron_apt.families.registry import build_backbone
from megatron_apt.models.config import MOST_BLOCKS, Fp8Config, ModelConfig
from megatron_apt.models.parameters import full_shape
from megatron_apt.parallel.mesh import Mesh


def check_model(stored: Stored, model: ModelConfig, role: str, mesh: Mesh) -> None:
    """Compares every weight of the role that is such a model with the index, without memory for any.

    Raises:
        CheckpointError: state.json describes another model than the files hold.
    """
    file = stored.folder / STATE
    blocks = model.blocks
    if blocks > len(stored.index):
        raise CheckpointError(
            f"{file}: config.model: has {blocks} blocks, and the files hold {len(stored.index)} tensors; "
            f"{DAMAGED}"
        )
    if blocks > MOST_BLOCKS:
        raise CheckpointError(
            f"{file}: config.model: has {blocks} blocks, and no model has more than {MOST_BLOCKS}; {DAMAGED}"
        )
    with torch.device("meta"):
        parameters = build_backbone(
            replace(model, fp8=Fp8Config()), replace(mesh, device=torch.device("meta"))
        ).named_parameters()
    for name, parameter in parameters:
        shape, _ = stored.index.get(f"{role}.{name}", (None, None))
        if shape != (described := torch.Size(full_shape(parameter, mesh))):
            held = "none" if shape is None else f"one of {tuple(shape)}"
            raise CheckpointError(
                f"{file}: config.model: has a weight {name} of shape {tuple(described)}, and the files hold "
                f"{held}; {DAMAGED}"
            )
