"""HunyuanVideo: diffusers' HunyuanVideoTransformer3DModel, text to video."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron_apt.convert.counterpart import Authors, Counterpart, Inputs, flags, only, positive, whole
from megatron_apt.convert.weights import ByHead, Reordered, Rule, View, joined, layer
from megatron_apt.families.hunyuan.config import HunyuanConfig, hunyuan_video
from megatron_apt.families.single_stream.weights import ROOTS, double_blocks, single_blocks, two_layers

_CLASS = "HunyuanVideoTransformer3DModel"


def _read(config: dict) -> HunyuanConfig:
    whole(
        config,
        _CLASS,
        num_attention_heads=1,
        attention_head_dim=1,
        num_layers=1,
        in_channels=1,
        out_channels=1,
    )
    whole(config, _CLASS, num_single_layers=1, num_refiner_layers=1, patch_size=1, patch_size_t=1)
    positive(config, _CLASS, "mlp_ratio", "rope_theta")
    whole(config, _CLASS, text_embed_dim=1, pooled_projection_dim=1, rope_axes_dim=3)
    flags(config, _CLASS, "guidance_embeds")
    only(config, _CLASS, qk_norm="rms_norm", image_condition_type=None)
    heads, size, channels = config["num_attention_heads"], config["attention_head_dim"], config["in_channels"]
    out, patch = config.get("out_channels") or channels, config["patch_size"]
    return replace(
        hunyuan_video(),
        depth=config["num_layers"] + config["num_single_layers"],
        width=heads * size,
        heads=heads,
        mlp_width=int(heads * size * config.get("mlp_ratio", 4.0)),
        latent_channels=out,
        condition_channels=channels - out,
        patch=(config["patch_size_t"], patch, patch),
        text_width=config["text_embed_dim"],
        rope_theta=float(config.get("rope_theta", 256.0)),
        double_blocks=config["num_layers"],
        refiner_blocks=config["num_refiner_layers"],
        pooled_width=config["pooled_projection_dim"],
        rope_axes=tuple(config.get("rope_axes_dim", HunyuanConfig.rope_axes)),
        guidance=HunyuanConfig.guidance if config.get("guidance_embeds", True) else 0.0,
    )


def _write(model: HunyuanConfig) -> dict:
    mlp_ratio = model.mlp / model.width
    if int(model.width * mlp_ratio) < model.mlp:  # diffusers rounds the product down
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    return {
        "_class_name": _CLASS,
        "in_channels": model.latent_channels + model.condition_channels,
        "out_channels": model.latent_channels,
        "num_attention_heads": model.heads,
        "attention_head_dim": model.head_size,
        "num_layers": model.double_blocks,
        "num_single_layers": model.depth - model.double_blocks,
        "num_refiner_layers": model.refiner_blocks,
        "mlp_ratio": mlp_ratio,
        "patch_size": model.patch[1],
        "patch_size_t": model.patch[0],
        "qk_norm": "rms_norm",
        "guidance_embeds": model.guidance > 0,
        "text_embed_dim": model.text_width,
        "pooled_projection_dim": model.pooled_width,
        "rope_theta": model.rope_theta,
        "rope_axes_dim": list(model.rope_axes),
        "image_condition_type": None,
    }


def _rules(model: HunyuanConfig) -> list[Rule]:
    channels, size, outside = (
        model.latent_channels + model.condition_channels,
        model.head_size,
        "time_text_embed",
    )
    text = "context_embedder"
    return [
        Rule(
            "x_embed.weight",
            ("x_embedder.proj.weight",),
            View((model.width, -1), (model.width, channels, *model.patch)),
        ),
        Rule("x_embed.bias", ("x_embedder.proj.bias",)),
        *two_layers("time_embed", f"{outside}.timestep_embedder"),
        *two_layers("pooled_embed", f"{outside}.text_embedder"),
        *two_layers("guidance_embed", f"{outside}.guidance_embedder"),
        *layer("text_embed.linear_in", f"{text}.proj_in"),
        *two_layers("text_embed.time_embed", f"{text}.time_text_embed.timestep_embedder"),
        *two_layers("text_embed.mean_embed", f"{text}.time_text_embed.text_embedder"),
        *_refiner(
            "text_embed.blocks.{i}",
            f"{text}.token_refiner.refiner_blocks.{{i}}",
            ByHead(model.heads, (size,) * 3),
        ),
        *double_blocks("blocks.{i}", "transformer_blocks.{i}", ByHead(model.heads, (size,) * 3)),
        *single_blocks(model, "blocks.{i}", "single_transformer_blocks.{i}"),
        # Theirs scale, shift; ours shift, scale
        *layer("final.modulation.linear", "norm_out.linear", Reordered((1, 0))),
        *layer("final.linear", "proj_out"),
    ]


def _refiner(ours: str, theirs: str, by_head: ByHead) -> list[Rule]:
    return [
        *layer(f"{ours}.norm_1", f"{theirs}.norm1"),
        *joined(f"{ours}.linear_qkv", [f"{theirs}.attn.to_{x}" for x in "qkv"], by_head),
        *layer(f"{ours}.linear_proj", f"{theirs}.attn.to_out.0"),
        *layer(f"{ours}.norm_2", f"{theirs}.norm2"),
        *layer(f"{ours}.linear_fc1", f"{theirs}.ff.net.0.proj"),
        *layer(f"{ours}.linear_fc2", f"{theirs}.ff.net.2"),
        *layer(f"{ours}.gates", f"{theirs}.norm_out.linear"),
    ]


def _example(model: HunyuanConfig, samples: int, generator: torch.Generator) -> Inputs:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    size = tuple(tokens * side for tokens, side in zip((3, 4, 5), model.patch, strict=True))
    guidance = model.guidance
    return Inputs(
        normal(samples, model.latent_channels, *size),
        torch.rand(samples, generator=generator),
        normal(samples, 77, model.text_width),
        pooled=normal(samples, model.pooled_width),
        given=normal(samples, model.condition_channels, *size) if model.condition_channels else None,
        guidance=torch.full((samples,), guidance) if guidance else None,
    )


def _forward(original: nn.Module, inputs: Inputs) -> Tensor:
    latents = inputs.latents if inputs.given is None else torch.cat((inputs.latents, inputs.given), dim=1)
    guidance = None if inputs.guidance is None else 1000 * inputs.guidance
    visible = torch.ones(inputs.text.shape[:2], dtype=torch.int64)
    return original(
        latents, 1000 * inputs.t, inputs.text, visible, inputs.pooled, guidance, return_dict=False
    )[0]


WEIGHTS = Counterpart(
    HunyuanConfig,
    _CLASS,
    _read,
    _write,
    _rules,
    _example,
    _forward,
    roots=ROOTS,
    authors=Authors(
        "HunyuanVideo",
        r"double_blocks\.\d+\.(img|txt)_attn_qkv|txt_in\.individual_token_refiner|img_in\.proj\."
        r"|guidance_in\.mlp",
    ),
)
