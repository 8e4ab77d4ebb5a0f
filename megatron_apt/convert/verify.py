"""Forward parity of one of our checkpoints with the original library's model, on random inputs."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron_apt.convert.family import Family, Inputs
from megatron_apt.convert.source import ConvertError, Source
from megatron_apt.models.config import Fp8Config, ModelConfig
from megatron_apt.models.embeddings import patch_grid, patchify, unpatchify
from megatron_apt.models.families import build_backbone
from megatron_apt.models.layout import build_layout
from megatron_apt.networks import load_weights
from megatron_apt.parallel.mesh import Mesh


def velocity(ours: nn.Module, inputs: Inputs, mesh: Mesh) -> Tensor:
    """What our model says to the inputs, (n, C, F, H, W)."""
    patch = ours.model.patch
    grid = patch_grid(tuple(inputs.latents.shape[2:]), patch)
    condition = inputs.condition(patch).to(mesh.device)
    layout = build_layout((grid,) * len(inputs.t), condition.lengths, mesh)
    v = ours(patchify(inputs.latents, patch).to(mesh.device), inputs.t.to(mesh.device), condition, layout)
    return unpatchify(v, grid, patch)


@torch.no_grad()
def parity(checkpoint: str, family: Family, model: ModelConfig, source: Source, mesh: Mesh, samples: int, seed: int) -> float:
    """Largest difference of the velocities in float32, relative to their largest value. One model at a time is in memory.

    Args:
        checkpoint: `path`, `path:ema` or `path:raw`.
        source: the original.

    Raises:
        ConvertError: the original does not make the model that its config.json describes.
    """
    source.check(family.tensors(model, mesh))
    inputs = family.example(model, samples, torch.Generator().manual_seed(seed))
    ours = build_backbone(replace(model, dtype="float32", fp8=Fp8Config()), mesh).to(mesh.device)
    load_weights(checkpoint, ours, mesh)
    got = velocity(ours, inputs, mesh).cpu()
    del ours
    want = family.forward(original(family, source), inputs)
    return float((got - want).abs().max() / want.abs().max())


def original(family: Family, source: Source) -> nn.Module:
    """The library's own model with the source's weights, in float32.

    Raises:
        ConvertError: they do not fit its config.json.
    """
    import diffusers  # seconds to import

    module = getattr(diffusers, family.architecture).from_config(source.config)
    state = module.state_dict()
    if wrong := sorted(state.keys() ^ source.entries.keys()):
        raise ConvertError(f"{source.path}: diffusers' {family.architecture} and the weights differ in {wrong[0]}; config.json is of another model")
    for name, tensor in state.items():
        tensor.copy_(source.read(name))
    return module.eval()
