"""Stable Diffusion 3 and 3.5: diffusers' SD3Transformer2DModel. Its norms all have eps
1e-6, ours too, which config.json does not say.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron_apt.convert.counterpart import Authors, Counterpart, Inputs, only, whole
from megatron_apt.convert.weights import (
    ByHead,
    ChannelsFirst,
    Reordered,
    Rule,
    Same,
    Stacked,
    View,
    joined,
    layer,
)
from megatron_apt.families.sd3.config import Sd3Config, sd3_medium

_CLASS = "SD3Transformer2DModel"


def _read(config: dict) -> Sd3Config:
    whole(
        config,
        _CLASS,
        num_attention_heads=1,
        attention_head_dim=1,
        num_layers=1,
        in_channels=1,
        out_channels=1,
    )
    whole(config, _CLASS, patch_size=1, sample_size=1, joint_attention_dim=1, pooled_projection_dim=1)
    whole(config, _CLASS, pos_embed_max_size=1, dual_attention_layers=0)
    heads, size, channels, patch = (
        config[name] for name in ("num_attention_heads", "attention_head_dim", "in_channels", "patch_size")
    )
    out = config.get("out_channels") or channels
    only(config, _CLASS, qk_norm=(None, "rms_norm"), caption_projection_dim=heads * size)
    return replace(
        sd3_medium(),
        depth=config["num_layers"],
        width=heads * size,
        heads=heads,
        latent_channels=out,
        condition_channels=channels - out,
        patch=(1, patch, patch),
        text_width=config["joint_attention_dim"],
        pooled_width=config["pooled_projection_dim"],
        position_size=config["pos_embed_max_size"],
        sample_size=config["sample_size"],
        qk_norm=config.get("qk_norm") is not None,
        dual_layers=tuple(config.get("dual_attention_layers") or ()),
    )


def _write(model: Sd3Config) -> dict:
    if model.mlp != 4 * model.width:
        raise ValueError(f"model.mlp_width: MLPs of a {_CLASS} are 4 * {model.width} wide, here {model.mlp}")
    return {
        "_class_name": _CLASS,
        "sample_size": model.sample_size,
        "patch_size": model.patch[1],
        "in_channels": model.latent_channels + model.condition_channels,
        "num_layers": model.depth,
        "attention_head_dim": model.head_size,
        "num_attention_heads": model.heads,
        "joint_attention_dim": model.text_width,
        "caption_projection_dim": model.width,
        "pooled_projection_dim": model.pooled_width,
        "out_channels": model.latent_channels,
        "pos_embed_max_size": model.position_size,
        "dual_attention_layers": list(model.dual_layers),
        "qk_norm": "rms_norm" if model.qk_norm else None,
    }


def _rules(model: Sd3Config) -> list[Rule]:
    channels, last = model.latent_channels + model.condition_channels, model.depth - 1
    block, ours, outside = "transformer_blocks.{i}", "blocks.{i}", "time_text_embed"
    by_head = ByHead(model.heads, (model.head_size,) * 3)
    scale_shift = Reordered((1, 0))  # theirs scale, shift; ours shift, scale
    return [
        Rule(
            "x_embed.weight",
            ("pos_embed.proj.weight",),
            View((model.width, -1), (model.width, channels, *model.patch[1:])),
        ),
        Rule("x_embed.bias", ("pos_embed.proj.bias",)),
        Rule("position_table", ("pos_embed.pos_embed",), View((-1, model.width), (1, -1, model.width))),
        *layer("time_embed.linear_1", f"{outside}.timestep_embedder.linear_1"),
        *layer("time_embed.linear_2", f"{outside}.timestep_embedder.linear_2"),
        *layer("pooled_embed.linear_1", f"{outside}.text_embedder.linear_1"),
        *layer("pooled_embed.linear_2", f"{outside}.text_embedder.linear_2"),
        *layer("text_embed", "context_embedder"),
        *_stream(
            f"{ours}.visual",
            f"{block}.attn",
            [f"to_{x}" for x in "qkv"],
            "norm",
            "to_out.0",
            f"{block}.ff",
            by_head,
        ),
        *_stream(
            f"{ours}.text",
            f"{block}.attn",
            [f"add_{x}_proj" for x in "qkv"],
            "norm_added",
            "to_add_out",
            f"{block}.ff_context",
            by_head,
        ),
        *layer(f"{ours}.visual.modulation.linear", f"{block}.norm1.linear"),
        *_text_modulation(last, scale_shift),
        *joined(f"{ours}.second.linear_qkv", [f"{block}.attn2.to_{x}" for x in "qkv"], by_head),
        Rule(
            f"{ours}.second.qk_norm.weight",
            (f"{block}.attn2.norm_q.weight", f"{block}.attn2.norm_k.weight"),
            Stacked(2),
        ),
        *layer(f"{ours}.second.linear_proj", f"{block}.attn2.to_out.0"),
        *layer("final.modulation.linear", "norm_out.linear", scale_shift),
        *layer("final.linear", "proj_out", ChannelsFirst(model.patch)),
    ]


def _stream(
    ours: str, attention: str, qkv: list[str], norm: str, out: str, mlp: str, by_head: ByHead
) -> list[Rule]:
    """Attention and MLP of one stream of a block."""
    return [
        *joined(f"{ours}.linear_qkv", [f"{attention}.{x}" for x in qkv], by_head),
        Rule(
            f"{ours}.qk_norm.weight",
            (f"{attention}.{norm}_q.weight", f"{attention}.{norm}_k.weight"),
            Stacked(2),
        ),
        *layer(f"{ours}.linear_proj", f"{attention}.{out}"),
        *layer(f"{ours}.linear_fc1", f"{mlp}.net.0.proj"),
        *layer(f"{ours}.linear_fc2", f"{mlp}.net.2"),
    ]


def _text_modulation(last: int, scale_shift: Reordered) -> list[Rule]:
    """Of each block its own rule, because the last one's text has two vectors, in the other order."""
    names = [
        (f"blocks.{i}.text.modulation.linear", f"transformer_blocks.{i}.norm1_context.linear")
        for i in range(last + 1)
    ]
    return [
        rule for i, (a, b) in enumerate(names) for rule in layer(a, b, scale_shift if i == last else Same())
    ]


def _example(model: Sd3Config, samples: int, generator: torch.Generator) -> Inputs:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    size = (1, *(min(tokens, model.position_size) * model.patch[1] for tokens in (12, 15)))
    return Inputs(
        normal(samples, model.latent_channels, *size),
        torch.rand(samples, generator=generator),
        normal(samples, 77, model.text_width),
        pooled=normal(samples, model.pooled_width),
        given=normal(samples, model.condition_channels, *size) if model.condition_channels else None,
    )


def _forward(original: nn.Module, inputs: Inputs) -> Tensor:
    latents = inputs.latents if inputs.given is None else torch.cat((inputs.latents, inputs.given), dim=1)
    return original(latents.squeeze(2), inputs.text, inputs.pooled, 1000 * inputs.t, return_dict=False)[
        0
    ].unsqueeze(2)


WEIGHTS = Counterpart(
    Sd3Config,
    _CLASS,
    _read,
    _write,
    _rules,
    _example,
    _forward,
    roots=frozenset(
        {"pos_embed", "context_embedder", "time_text_embed", "transformer_blocks", "norm_out", "proj_out"}
    ),
    authors=Authors(
        "Stable Diffusion 3",
        r"joint_blocks\.\d",
        own_names=r"^x_embedder\.proj\.",  # in HunyuanVideo diffusers' name too
    ),
)
