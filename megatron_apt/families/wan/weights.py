"""Wan 2.1 and 2.2, dense: diffusers' WanTransformer3DModel, text to video and image to video."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_apt.convert.counterpart import SECOND, Authors, Counterpart, Inputs, flags, only, whole
from megatron_apt.convert.errors import ConvertError
from megatron_apt.convert.weights import ByHead, ChannelsFirst, Rule, Stacked, View, joined, layer
from megatron_apt.families.wan.config import WanConfig, wan_1_3b
from megatron_apt.models.embeddings import patch_grid

_CLASS, _IMAGE_TO_VIDEO = "WanTransformer3DModel", "WanImageToVideoPipeline"
_LONGEST = 2**16  # positions of a side that diffusers keeps angles for


def _read(config: dict) -> WanConfig:
    whole(
        config,
        _CLASS,
        num_attention_heads=1,
        attention_head_dim=1,
        num_layers=1,
        in_channels=1,
        out_channels=1,
    )
    whole(config, _CLASS, patch_size=3, ffn_dim=1, text_dim=1, image_dim=1, rope_max_seq_len=1)
    flags(config, _CLASS, "cross_attn_norm")
    if config.get("rope_max_seq_len", 0) > _LONGEST:
        raise ValueError(
            f"config.json: rope_max_seq_len={config['rope_max_seq_len']} of a {_CLASS} must be at most "
            f"{_LONGEST}"
        )
    only(config, _CLASS, qk_norm="rms_norm_across_heads", eps=1e-6, freq_dim=256, pos_embed_seq_len=None)
    heads, size, channels = config["num_attention_heads"], config["attention_head_dim"], config["in_channels"]
    out, image = config.get("out_channels") or channels, config.get("image_dim") or 0
    only(config, _CLASS, added_kv_proj_dim=heads * size if image else None)
    return replace(
        wan_1_3b(),
        depth=config["num_layers"],
        width=heads * size,
        heads=heads,
        mlp_width=config["ffn_dim"],
        latent_channels=out,
        condition_channels=channels - out,
        patch=tuple(config["patch_size"]),
        text_width=config["text_dim"],
        cross_norm=config.get("cross_attn_norm", True),
        image_width=image,
    )


def _write(model: WanConfig) -> dict:
    if model.rope_theta != 10000.0:
        raise ValueError(f"model.rope_theta={model.rope_theta}: a {_CLASS} rotates with 10000")
    return {
        "_class_name": _CLASS,
        "patch_size": list(model.patch),
        "num_attention_heads": model.heads,
        "attention_head_dim": model.head_size,
        "in_channels": model.latent_channels + model.condition_channels,
        "out_channels": model.latent_channels,
        "text_dim": model.text_width,
        "freq_dim": 256,
        "ffn_dim": model.mlp,
        "num_layers": model.depth,
        "cross_attn_norm": model.cross_norm,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": model.image_width or None,
        "added_kv_proj_dim": model.width if model.image_width else None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    }


def _rules(model: WanConfig) -> list[Rule]:
    channels, row = model.latent_channels + model.condition_channels, View((1, -1), (-1,))
    outside, block, cross = "condition_embedder", "blocks.{i}", "blocks.{i}.attn2"
    return [
        Rule(
            "x_embed.weight",
            ("patch_embedding.weight",),
            View((model.width, -1), (model.width, channels, *model.patch)),
        ),
        Rule("x_embed.bias", ("patch_embedding.bias",)),
        *layer("time_embed.linear_1", f"{outside}.time_embedder.linear_1"),
        *layer("time_embed.linear_2", f"{outside}.time_embedder.linear_2"),
        *layer("shared_modulation", f"{outside}.time_proj"),
        *layer("text_embed_1", f"{outside}.text_embedder.linear_1"),
        *layer("text_embed_2", f"{outside}.text_embedder.linear_2"),
        *layer("image_embed.norm_in", f"{outside}.image_embedder.norm1"),
        *layer("image_embed.linear_1", f"{outside}.image_embedder.ff.net.0.proj"),
        *layer("image_embed.linear_2", f"{outside}.image_embedder.ff.net.2"),
        *layer("image_embed.norm_out", f"{outside}.image_embedder.norm2"),
        Rule(f"{block}.modulation.offset", (f"{block}.scale_shift_table",), View((-1,), (1, 6, model.width))),
        *joined(
            f"{block}.linear_qkv",
            [f"{block}.attn1.to_{x}" for x in "qkv"],
            ByHead(model.heads, (model.head_size,) * 3),
        ),
        Rule(
            f"{block}.qk_norm.weight",
            (f"{block}.attn1.norm_q.weight", f"{block}.attn1.norm_k.weight"),
            Stacked(2),
        ),
        *layer(f"{block}.linear_proj", f"{block}.attn1.to_out.0"),
        *layer(f"{block}.cross_norm", f"{block}.norm2"),
        *layer(f"{block}.cross.linear_q", f"{cross}.to_q"),
        Rule(f"{block}.cross.q_norm.weight", (f"{cross}.norm_q.weight",), row),
        *joined(
            f"{block}.cross.linear_kv.text",
            [f"{cross}.to_k", f"{cross}.to_v"],
            ByHead(model.heads, (model.head_size,) * 2),
        ),
        Rule(f"{block}.cross.k_norm.text.weight", (f"{cross}.norm_k.weight",), row),
        *joined(
            f"{block}.cross.linear_kv.image",
            [f"{cross}.add_k_proj", f"{cross}.add_v_proj"],
            ByHead(model.heads, (model.head_size,) * 2),
        ),
        Rule(f"{block}.cross.k_norm.image.weight", (f"{cross}.norm_added_k.weight",), row),
        *layer(f"{block}.cross.linear_proj", f"{cross}.to_out.0"),
        *layer(f"{block}.linear_fc1", f"{block}.ffn.net.0.proj"),
        *layer(f"{block}.linear_fc2", f"{block}.ffn.net.2"),
        Rule("final.modulation.offset", ("scale_shift_table",), View((-1,), (1, 2, model.width))),
        *layer("final.linear", "proj_out", ChannelsFirst(model.patch)),
    ]


def _example(model: WanConfig, samples: int, generator: torch.Generator) -> Inputs:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    size = tuple(tokens * side for tokens, side in zip((3, 4, 5), model.patch, strict=True))
    image = model.image_width
    return Inputs(
        normal(samples, model.latent_channels, *size),
        torch.rand(samples, generator=generator),
        # Beside image tokens, diffusers takes the last 512 for the text
        normal(samples, 512 if image else 77, model.text_width),
        given=normal(samples, model.condition_channels, *size) if model.condition_channels else None,
        image=normal(samples, model.image_tokens, image) if image else None,
        first=normal(samples, model.latent_channels, 1, *size[1:]) if model.first_frame else None,
    )


def _forward(original: Any, inputs: Inputs) -> Tensor:
    latents, t = inputs.latents, 1000 * inputs.t
    # As WanImageToVideoPipeline with expand_timesteps: a time for every token, 0 for
    # those of the first frame
    if inputs.first is not None:
        latents = torch.cat((inputs.first, latents[:, :, 1:]), dim=2)
        frames, rows, columns = patch_grid(tuple(latents.shape[2:]), tuple(original.config.patch_size))
        t = torch.cat(
            (torch.zeros(len(t), rows * columns), t[:, None].expand(-1, (frames - 1) * rows * columns)), dim=1
        )
    if inputs.given is not None:
        latents = torch.cat((latents, inputs.given), dim=1)
    return original(latents, t, inputs.text, inputs.image, return_dict=False)[0]


def _adapted(index: dict, model: WanConfig, file: Path, one_step: bool) -> dict:
    """What makes a pipeline give the first frame as such models read it; Wan2.2's TI2V is
    published as text to video.

    Raises:
        ConvertError: no pipeline does, or this one gives a first frame to a model without.
    """
    if not model.first_frame:
        if one_step and index.get("_class_name") == _IMAGE_TO_VIDEO and index.get("expand_timesteps"):
            raise ConvertError(
                f"{file}: gives a first frame among the tokens, and this checkpoint was trained without: "
                "model.first_frame=False; give the pipeline as text to video (WanPipeline), or train with "
                "model.first_frame"
            )
        return index
    if model.patch != (1, 2, 2):
        raise ConvertError(
            f"{file}: {_IMAGE_TO_VIDEO} takes every second latent row and column for a token, "
            f"model.patch={model.patch}; leave out --base"
        )
    given = {name: index.get(name, [None, None]) for name in ("image_encoder", "image_processor", SECOND)}
    return index | given | {"_class_name": _IMAGE_TO_VIDEO, "expand_timesteps": True}


WEIGHTS = Counterpart(
    WanConfig,
    _CLASS,
    _read,
    _write,
    _rules,
    _example,
    _forward,
    roots=frozenset({"patch_embedding", "condition_embedder", "blocks", "proj_out", "scale_shift_table"}),
    authors=Authors(
        "Wan",
        r"head\.(modulation|head\.)|(time|text)_embedding\.\d|time_projection\.\d"
        r"|blocks\.\d+\.(self|cross)_attn\.[qkvo]\.",
        architecture="WanModel",
        remedy="the layout of Wan's authors; use the repository with -Diffusers in its name",
    ),
    unread=r"blocks\.\d+\.attn2\.norm_added_q\.weight",
    interface=("cross_norm", "image_width", "image_tokens"),
    adapted=_adapted,
)
