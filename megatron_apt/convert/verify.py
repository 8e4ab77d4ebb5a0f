"""Forward parity of one of our checkpoints with the original library's model, on random inputs."""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from megatron_apt.convert.counterpart import Counterpart
from megatron_apt.convert.errors import ConvertError
from megatron_apt.convert.source import Source
from megatron_apt.families.registry import build_backbone
from megatron_apt.models.config import Fp8Config, ModelConfig
from megatron_apt.models.embeddings import patch_grid, patchify
from megatron_apt.models.layout import build_layout
from megatron_apt.models.stages import Cut, run_line
from megatron_apt.parallel.collectives import max_over
from megatron_apt.parallel.mesh import Mesh
from megatron_apt.training.networks import load_weights


@torch.no_grad()
def parity(
    checkpoint: str,
    family: Counterpart,
    model: ModelConfig,
    source: Source,
    mesh: Mesh,
    samples: int,
    seed: int,
) -> float:
    """Largest difference of the velocities in float32, relative to their largest value,
    over all ranks. One model at a time is in memory.

    Args:
        checkpoint: `path`, `path:ema` or `path:raw`.
        source: the original, which the first rank runs.
        mesh: our model's; diffusers' is always whole.

    Raises:
        ConvertError: the original does not make the model that its config.json describes.
    """
    for shape in (model, family.model(source.config, source.path)):  # the second is what diffusers builds
        source.bound(shape)
        source.check(family.tensors(shape, mesh))
    inputs = family.example(model, samples, torch.Generator().manual_seed(seed))
    cut = Cut(mesh.pp.size, (mesh.pp.rank,))
    ours = build_backbone(replace(model, dtype="float32", fp8=Fp8Config()), mesh, cut=cut).to(mesh.device)
    load_weights(checkpoint, ours, mesh)
    condition = inputs.condition(model.patch).to(mesh.device)
    layout = build_layout(
        (patch_grid(tuple(inputs.latents.shape[2:]), model.patch),) * samples, condition.lengths, mesh
    )
    x = patchify(inputs.latents, model.patch).to(mesh.device).index_select(0, layout.visual.index)
    got = run_line(ours, x, inputs.t.to(mesh.device), condition, layout, mesh.pp)
    del ours
    want = torch.empty_like(inputs.latents)
    if mesh.is_main:
        want.copy_(family.forward(original(family, source), inputs))
    want = want.to(mesh.device)
    dist.broadcast(want, 0)
    difference, largest = want.new_zeros(()), want.abs().max()
    if got is not None:
        difference = (got - patchify(want, model.patch).index_select(0, layout.visual.index)).abs().max()
    smallest = torch.finfo(want.dtype).tiny  # of models that answer with zeros
    return float(
        max_over(torch.nan_to_num(difference / largest.clamp_min(smallest), nan=torch.inf), mesh.world)
    )


def original(family: Counterpart, source: Source) -> nn.Module:
    """The library's own model with the source's weights, in float32.

    Raises:
        ConvertError: they do not fit its config.json.
    """
    import diffusers  # seconds to import

    module = getattr(diffusers, family.architecture).from_config(source.config)
    state = module.state_dict()
    shapes, held = (
        {name: t.shape for name, t in state.items()},
        {name: entry.shape for name, entry in source.entries.items()},
    )
    if wrong := sorted(name for name, _ in shapes.items() ^ held.items()):
        raise ConvertError(
            f"{source.path}: diffusers' {family.architecture} and the weights differ in {wrong[0]}; "
            "config.json is of another model"
        )
    for name, tensor in state.items():
        tensor.copy_(source.read(name))
    return module.eval()
