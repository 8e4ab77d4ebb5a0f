"""FLUX.1: diffusers' FluxTransformer2DModel, whose latents its pipeline packs into
patches of 2 x 2 that it calls channels.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron_apt.convert.counterpart import Authors, Counterpart, Inputs, flags, only, whole
from megatron_apt.convert.weights import ByHead, Reordered, Rule, layer
from megatron_apt.families.flux.config import FluxConfig, flux_dev
from megatron_apt.families.single_stream.weights import ROOTS, double_blocks, single_blocks, two_layers
from megatron_apt.models.embeddings import patch_grid, patchify, unpatchify

_CLASS, _PATCH = "FluxTransformer2DModel", (1, 2, 2)


def _read(config: dict) -> FluxConfig:
    whole(
        config,
        _CLASS,
        num_attention_heads=1,
        attention_head_dim=1,
        num_layers=1,
        in_channels=1,
        out_channels=1,
    )
    whole(
        config, _CLASS, num_single_layers=1, joint_attention_dim=1, pooled_projection_dim=1, axes_dims_rope=3
    )
    flags(config, _CLASS, "guidance_embeds")
    only(config, _CLASS, patch_size=1)
    heads, channels = config["num_attention_heads"], config["in_channels"]
    out = config.get("out_channels") or channels
    if channels % 4 or out % 4:
        raise ValueError(
            f"config.json: in_channels={channels}, out_channels={out} of a {_CLASS} must be multiples of the "
            "4 latents in a patch"
        )
    return replace(
        flux_dev(),
        depth=config["num_layers"] + config["num_single_layers"],
        width=heads * config["attention_head_dim"],
        heads=heads,
        latent_channels=out // 4,
        condition_channels=(channels - out) // 4,
        text_width=config["joint_attention_dim"],
        double_blocks=config["num_layers"],
        pooled_width=config["pooled_projection_dim"],
        rope_axes=tuple(config.get("axes_dims_rope", FluxConfig.rope_axes)),
        guidance=FluxConfig.guidance if config.get("guidance_embeds", False) else 0.0,
    )


def _write(model: FluxConfig) -> dict:
    if model.mlp != 4 * model.width:
        raise ValueError(f"model.mlp_width: MLPs of a {_CLASS} are 4 * {model.width} wide, here {model.mlp}")
    if model.rope_theta != 10000.0:
        raise ValueError(f"model.rope_theta={model.rope_theta}: a {_CLASS} rotates with 10000")
    if model.patch != _PATCH:
        raise ValueError(f"model.patch={model.patch}: pipelines of a {_CLASS} make patches of {_PATCH}")
    return {
        "_class_name": _CLASS,
        "patch_size": 1,
        "in_channels": 4 * (model.latent_channels + model.condition_channels),
        "out_channels": 4 * model.latent_channels,
        "num_layers": model.double_blocks,
        "num_single_layers": model.depth - model.double_blocks,
        "attention_head_dim": model.head_size,
        "num_attention_heads": model.heads,
        "joint_attention_dim": model.text_width,
        "pooled_projection_dim": model.pooled_width,
        "guidance_embeds": model.guidance > 0,
        "axes_dims_rope": list(model.rope_axes),
    }


def _rules(model: FluxConfig) -> list[Rule]:
    outside = "time_text_embed"
    return [
        *layer("x_embed", "x_embedder"),
        *layer("text_embed", "context_embedder"),
        *two_layers("time_embed", f"{outside}.timestep_embedder"),
        *two_layers("pooled_embed", f"{outside}.text_embedder"),
        *two_layers("guidance_embed", f"{outside}.guidance_embedder"),
        *double_blocks("blocks.{i}", "transformer_blocks.{i}", ByHead(model.heads, (model.head_size,) * 3)),
        *single_blocks(model, "blocks.{i}", "single_transformer_blocks.{i}"),
        # Theirs scale, shift; ours shift, scale
        *layer("final.modulation.linear", "norm_out.linear", Reordered((1, 0))),
        *layer("final.linear", "proj_out"),
    ]


def _example(model: FluxConfig, samples: int, generator: torch.Generator) -> Inputs:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    guidance = model.guidance
    return Inputs(
        normal(samples, model.latent_channels, 1, 24, 30),
        torch.rand(samples, generator=generator),
        normal(samples, 77, model.text_width),
        pooled=normal(samples, model.pooled_width),
        given=normal(samples, model.condition_channels, 1, 24, 30) if model.condition_channels else None,
        guidance=torch.full((samples,), guidance) if guidance else None,
    )


def _forward(original: nn.Module, inputs: Inputs) -> Tensor:
    n, grid = len(inputs.t), patch_grid(tuple(inputs.latents.shape[2:]), _PATCH)
    tokens = [patchify(x, _PATCH) for x in (inputs.latents, inputs.given) if x is not None]
    x = torch.cat(tokens, dim=1).unflatten(0, (n, -1))
    places = torch.cartesian_prod(*(torch.arange(size) for size in grid))  # (0, row, column); of text all 0
    texts = places.new_zeros(inputs.text.shape[1], 3)
    v = original(x, inputs.text, inputs.pooled, inputs.t, places, texts, inputs.guidance, return_dict=False)[
        0
    ]
    return unpatchify(v.flatten(0, 1), grid, _PATCH)


WEIGHTS = Counterpart(
    FluxConfig,
    _CLASS,
    _read,
    _write,
    _rules,
    _example,
    _forward,
    roots=ROOTS,
    authors=Authors(
        "FLUX",
        r"(double|single)_blocks\.\d|(img|txt)_in\.(weight|bias)$|(vector|guidance)_in\.in_layer",
    ),
)
