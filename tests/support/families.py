"""Published families at toy size: diffusers' model, ours with the same weights, samples
for both, and how far the two are apart.
"""

import random
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from diffusers import (
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn

from megatron_apt.convert.counterpart import Counterpart, Inputs
from megatron_apt.families.flux.config import FluxConfig
from megatron_apt.families.flux.weights import WEIGHTS as FLUX
from megatron_apt.families.hunyuan.config import HunyuanConfig
from megatron_apt.families.hunyuan.weights import WEIGHTS as HUNYUAN
from megatron_apt.families.registry import build_backbone
from megatron_apt.families.sd3.weights import WEIGHTS as SD3
from megatron_apt.families.wan.weights import WEIGHTS as WAN
from megatron_apt.kernels.launch import implementation
from megatron_apt.models.condition import Condition
from megatron_apt.models.config import ModelConfig
from megatron_apt.models.embeddings import patch_grid, patchify
from megatron_apt.models.layout import Layout, build_layout
from megatron_apt.models.stages import Cut
from megatron_apt.parallel.mesh import Mesh
from support.problems import whole

FAMILIES: dict[str, tuple[Counterpart, type[nn.Module]]] = {
    "wan": (WAN, WanTransformer3DModel),
    "sd3": (SD3, SD3Transformer2DModel),
    "flux": (FLUX, FluxTransformer2DModel),
    "hunyuan": (HUNYUAN, HunyuanVideoTransformer3DModel),
}
TEXT, POOLED, IMAGE = 10, 14, 20  # widths
# What diffusers takes of the text, when there are image tokens before it, is its last 512 tokens.
IMAGE_TEXT = 512


def wan_config(seed: int) -> dict:
    """A random shape; with the seed go the two kinds of text norm, image conditioning and given channels."""
    rng = random.Random(seed)
    heads, size, channels = rng.choice((2, 4)), rng.choice((6, 8, 10, 14, 24)), rng.choice((2, 3))
    image = seed % 3 == 2
    return {
        "patch_size": rng.choice(((1, 2, 2), (1, 1, 1), (2, 1, 2), (1, 2, 1))),
        "num_attention_heads": heads,
        "attention_head_dim": size,
        "in_channels": channels + (rng.choice((1, 3)) if image or seed % 4 == 1 else 0),
        "out_channels": channels,
        "text_dim": TEXT,
        "ffn_dim": rng.randint(17, 50) * 2,
        "num_layers": 1 + seed % 3,
        "cross_attn_norm": seed % 2 == 0,
        "qk_norm": "rms_norm_across_heads",
        "image_dim": IMAGE if image else None,
        "added_kv_proj_dim": heads * size if image else None,
    }


def sd3_config(seed: int) -> dict:
    """A random shape; with the seed go norms of queries and keys, and blocks with a second attention."""
    rng = random.Random(seed)
    heads, size, depth, channels = (
        rng.choice((2, 4)),
        rng.choice((4, 6, 10, 16)),
        1 + (seed + 1) % 3,
        rng.choice((2, 4)),
    )
    return {
        "sample_size": rng.choice((8, 16)),
        "patch_size": rng.choice((1, 2, 3)),
        "in_channels": channels + (1 if seed % 4 == 3 else 0),
        "num_layers": depth,
        "attention_head_dim": size,
        "num_attention_heads": heads,
        "joint_attention_dim": TEXT,
        "caption_projection_dim": heads * size,
        "pooled_projection_dim": POOLED,
        "out_channels": channels,
        "pos_embed_max_size": rng.choice((7, 12)),
        "dual_attention_layers": tuple(i for i in range(depth) if seed >> i & 1),
        "qk_norm": (None, "rms_norm", "rms_norm")[seed % 3],
    }


def hunyuan_config(seed: int) -> dict:
    """A random shape; with the seed go double and single blocks (none of one kind, too)
    and the input for guidance.
    """
    rng = random.Random(seed)
    heads, axes, channels = rng.choice((2, 4)), [2 * rng.randint(1, 4) for _ in range(3)], rng.choice((2, 3))
    return {
        "in_channels": channels + (1 if seed % 4 == 3 else 0),
        "out_channels": channels,
        "num_attention_heads": heads,
        "attention_head_dim": sum(axes),
        "num_layers": (seed + 1) % 3,
        "num_single_layers": (2, 1, 1, 0)[seed % 4] + (seed % 3 == 2),
        "num_refiner_layers": 1 + seed % 2,
        "mlp_ratio": rng.choice((2.0, 3.5, 4.0)),
        "patch_size": rng.choice((1, 2)),
        "patch_size_t": rng.choice((1, 2)),
        "guidance_embeds": seed % 4 != 2,
        "text_embed_dim": TEXT,
        "pooled_projection_dim": POOLED,
        "rope_theta": rng.choice((256.0, 100.0)),
        "rope_axes_dim": tuple(axes),
    }


def flux_config(seed: int) -> dict:
    """As of HunyuanVideo, of which Flux has parts."""
    like = hunyuan_config(seed)
    return {
        "in_channels": 4 * like["in_channels"],
        "out_channels": 4 * like["out_channels"],
        "num_layers": like["num_layers"],
        "num_single_layers": like["num_single_layers"],
        "attention_head_dim": like["attention_head_dim"],
        "num_attention_heads": like["num_attention_heads"],
        "joint_attention_dim": TEXT,
        "pooled_projection_dim": POOLED,
        "guidance_embeds": like["guidance_embeds"],
        "axes_dims_rope": like["rope_axes_dim"],
    }


CONFIGS = {"wan": wan_config, "sd3": sd3_config, "flux": flux_config, "hunyuan": hunyuan_config}


@dataclass
class Sample:
    latent: Tensor  # (C, F, H, W)
    time: Tensor  # ()
    text: Tensor  # (L, E)
    pooled: Tensor  # (P,)
    given: Tensor | None  # (C', F, H, W)
    image: Tensor | None  # (257, width)
    first: Tensor | None  # (C, 1, H, W)
    target: Tensor  # (C, F, H, W)


def theirs(family: str, config: dict, seed: int) -> nn.Module:
    """diffusers' model with random numbers in every tensor of its checkpoint."""
    model = FAMILIES[family][1](**config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            scale = tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 0.3
            tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
    return model


def shape(family: str, config: dict) -> ModelConfig:
    return replace(FAMILIES[family][0].read_config(config), dtype="float32", recompute="none")


def ours(family: str, model: ModelConfig, mesh: Mesh, state: dict[str, Tensor]) -> nn.Module:
    """Our model, or this rank's stage of it, from diffusers' tensors, every one of which
    must be used once.
    """
    network = build_backbone(model, mesh, cut=Cut(mesh.pp.size, (mesh.pp.rank,)))
    parameters, used = dict(network.named_parameters()), Counter()
    for one in FAMILIES[family][0].tensors(model, mesh):
        used.update(list(one.theirs))
        value = one.change.ours([state[key] for key in one.theirs])
        parameter = parameters.pop(one.name, None)
        if parameter is None:
            assert mesh.pp.size > 1  # on another stage
            continue
        if parameter.sharded_dim is not None:
            value = value.chunk(mesh.tp.size, parameter.sharded_dim)[mesh.tp.rank]
        with torch.no_grad():
            parameter.copy_(value)
    assert not parameters
    assert used == Counter(state.keys())
    return network


def samples(
    family: str,
    config: dict,
    sizes: list[tuple[int, int, int]],
    texts: list[int],
    seed: int,
    first_frame: bool = False,
) -> list[Sample]:
    """One sample for each grid of tokens and each length of text; with `first_frame` that
    of each clip is given.
    """
    generator = torch.Generator().manual_seed(seed)
    model = shape(family, config)
    patch = model.patch
    made = []
    for grid, length in zip(sizes, texts, strict=True):
        size = tuple(g * p for g, p in zip(grid, patch, strict=True))
        image, channels, given = config.get("image_dim"), model.latent_channels, model.condition_channels
        made.append(
            Sample(
                torch.randn(channels, *size, generator=generator),
                torch.rand((), generator=generator),
                torch.randn(IMAGE_TEXT if image else length, TEXT, generator=generator),
                torch.randn(POOLED, generator=generator),
                torch.randn(given, *size, generator=generator) if given else None,
                torch.randn(257, image, generator=generator) if image else None,
                torch.randn(channels, 1, *size[1:], generator=generator)
                if first_frame and size[0] > 1
                else None,
                torch.randn(channels, *size, generator=generator),
            )
        )
    return made


def their_velocities(family: str, model: nn.Module, batch: list[Sample]) -> list[Tensor]:
    """(C, F, H, W) for each sample: as one batch where all are of one size, else one by one."""
    if len({(s.latent.shape, s.text.shape) for s in batch}) > 1:
        return [v for one in batch for v in their_velocities(family, model, [one])]
    fields = (
        [getattr(s, name) for s in batch]
        for name in ("latent", "time", "text", "pooled", "given", "image", "first")
    )
    scale = {"flux": FluxConfig.guidance, "hunyuan": HunyuanConfig.guidance}.get(family)
    guidance = torch.full((len(batch),), scale) if model.config.get("guidance_embeds") else None
    inputs = Inputs(
        *(None if values[0] is None else torch.stack(values) for values in fields), guidance=guidance
    )
    return list(FAMILIES[family][0].forward(model, inputs))


def our_inputs(
    batch: list[Sample], model: ModelConfig, mesh: Mesh
) -> tuple[Tensor, Tensor, Condition, Layout]:
    """Arguments of our forward: this rank's tokens, times, conditions, layout."""
    tokens = torch.cat([patchify(s.latent[None], model.patch) for s in batch])
    condition = Condition.pack([s.text for s in batch], pooled=torch.stack([s.pooled for s in batch]))
    if batch[0].given is not None:
        condition = replace(
            condition, visual=torch.cat([patchify(s.given[None], model.patch) for s in batch])
        )
    if batch[0].image is not None:
        condition = replace(condition, image=torch.stack([s.image for s in batch]))
    if model.first_frame:
        firsts = [patchify(s.first[None], model.patch) for s in batch if s.first is not None]
        condition = replace(condition, first=torch.cat([torch.empty(0, model.patch_width), *firsts]))
    layout = build_layout(
        tuple(patch_grid(tuple(s.latent.shape[1:]), model.patch) for s in batch), condition.lengths, mesh
    )
    return (
        tokens.index_select(0, layout.visual.index),
        torch.stack([s.time for s in batch]),
        condition,
        layout,
    )


def staged(network: nn.Module, inputs: tuple, mesh: Mesh, loss: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Forward and backward of loss(network(*inputs)), its stages one after another on the
    ranks of the pipeline; the output on the last one.
    """
    stage, group, layout = mesh.pp.rank, mesh.pp.group, inputs[-1]
    before, after = (None if rank is None else dist.get_global_rank(group, rank) for rank in neighbours(mesh))
    if before is None:
        state = arrived = network.enter(*inputs)
    else:
        arrived = {name: torch.empty(size) for name, (size, _) in network.carried(stage - 1, layout).items()}
        for tensor in arrived.values():
            dist.recv(tensor, before, group=group)
        state = {name: tensor.requires_grad_() for name, tensor in arrived.items()}
    out = network.run_stage(stage, dict(state), layout)
    if after is None:
        loss(out).backward()
    else:
        sent = [out[name] for name in network.carried(stage, layout)]
        for tensor in sent:
            dist.send(tensor.detach().contiguous(), after, group=group)
        gradients = [torch.empty_like(tensor) for tensor in sent]
        for gradient in gradients:
            dist.recv(gradient, after, group=group)
        torch.autograd.backward(sent, gradients)
    if before is not None:
        for tensor in arrived.values():
            dist.send(
                torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.contiguous(),
                before,
                group=group,
            )
    return out if after is None else None


def neighbours(mesh: Mesh) -> tuple[int | None, int | None]:
    """Ranks of the pipeline before and after this one."""
    return (mesh.pp.rank - 1 if mesh.pp.rank else None), (
        mesh.pp.rank + 1 if mesh.pp.rank < mesh.pp.size - 1 else None
    )


def gradient_of(parameter: nn.Parameter, mesh: Mesh) -> Tensor:
    """The gradient over all ranks, whole."""
    grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    dist.all_reduce(grad, group=mesh.dp_cp.group)
    if parameter.tp_partial and mesh.tp.size > 1:
        dist.all_reduce(grad, group=mesh.tp.group)
    return whole(grad, parameter, mesh)


def compare(
    mesh: Mesh,
    family: str,
    config: dict,
    sizes: list[tuple[int, int, int]],
    texts: list[int],
    kernels: bool = False,
    recompute: str = "none",
    first_frame: bool = False,
) -> tuple[float, float, str]:
    """Forward and backward of the mean squared error to random targets, in fp32, by both
    models from the same weights.

    Returns:
        The largest difference of a velocity over the largest velocity; the largest
        difference of a gradient over the largest entry of its tensor, or over 1e-3 of the
        largest gradient of all if that is more (gradients that are zero but for
        rounding); and the name of that tensor.
    """
    reference, batch = (
        theirs(family, config, seed=1),
        samples(family, config, sizes, texts, seed=2, first_frame=first_frame),
    )
    model = replace(shape(family, config), recompute=recompute)
    model = replace(model, **({"first_frame": True} if first_frame else {}))
    network = ours(family, model, mesh, reference.state_dict())

    velocities = their_velocities(family, reference, batch)
    sum((v - s.target).square().mean() for v, s in zip(velocities, batch, strict=True)).backward()

    x, t, condition, layout = our_inputs(batch, model, mesh)
    want, target = (
        torch.cat([patchify(v[None], model.patch) for v in values]).index_select(0, layout.visual.index)
        for values in (velocities, [s.target for s in batch])
    )

    def loss(v: Tensor) -> Tensor:
        return (layout.sample_sum((v - target).square()) / layout.sample_numel(v.shape[1])).sum()

    with implementation("kernels") if kernels else nullcontext():
        got = staged(network, (x, t, condition, layout), mesh, loss)
    forward = 0.0 if got is None else float(((got - want).abs().max() / want.abs().max()).detach())

    gradients = {
        name: torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in reference.named_parameters()
    }
    largest, worst = max(float(g.abs().max()) for g in gradients.values()), (0.0, "")
    parameters = dict(network.named_parameters())
    for one in FAMILIES[family][0].tensors(model, mesh):
        if one.name not in parameters:
            continue  # on another stage
        if parameters[one.name].fixed:
            assert parameters[one.name].grad is None
            continue
        expected = one.change.ours([gradients[key] for key in one.theirs])
        error = float(
            (gradient_of(parameters[one.name], mesh) - expected).abs().max()
            / max(float(expected.abs().max()), 1e-3 * largest)
        )
        worst = max(worst, (error, one.name))
    return forward, *worst


# Both models compute in fp32. Measured over all cases and meshes below: velocities differ
# by up to 5e-7, gradients by up to 3e-6.
TOLERANCE = 1e-5


def assert_parity(errors: tuple[float, float, str], which: str = "") -> None:
    forward, gradient, name = errors
    assert forward <= TOLERANCE, f"{which}velocities differ by {forward:.1e}"
    assert gradient <= TOLERANCE, f"{which}gradients of {name} differ by {gradient:.1e}"
