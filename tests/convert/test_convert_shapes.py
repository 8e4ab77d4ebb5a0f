"""Published shapes and configurations of the families, and those that are refused."""

from dataclasses import replace

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import nn

from megatron_apt.config import ParallelConfig, check_heads
from megatron_apt.convert.counterpart import Counterpart
from megatron_apt.families.flux.config import flux_dev, flux_schnell
from megatron_apt.families.flux.weights import WEIGHTS as FLUX
from megatron_apt.families.hunyuan.config import hunyuan_video
from megatron_apt.families.hunyuan.weights import WEIGHTS as HUNYUAN
from megatron_apt.families.mmdit.config import MMDiTConfig
from megatron_apt.families.sd3.config import Sd3Config, sd3_medium, sd35_large, sd35_medium
from megatron_apt.families.sd3.weights import WEIGHTS as SD3
from megatron_apt.families.wan.config import wan_1_3b, wan_5b, wan_5b_i2v, wan_14b, wan_14b_i2v
from megatron_apt.families.wan.weights import WEIGHTS as WAN
from megatron_apt.models.condition import Condition
from megatron_apt.models.config import ModelConfig
from megatron_apt.models.embeddings import patch_grid, patchify, unpatchify
from megatron_apt.models.layout import build_layout
from support.families import CONFIGS, FAMILIES, ours, shape, theirs


def published(**changes) -> dict:
    """transformer/config.json as published, without what only says which version of diffusers wrote it."""
    common = {
        "_class_name": "SD3Transformer2DModel",
        "attention_head_dim": 64,
        "in_channels": 16,
        "joint_attention_dim": 4096,
        "out_channels": 16,
        "patch_size": 2,
        "pooled_projection_dim": 2048,
        "sample_size": 128,
    }
    return common | changes


PUBLISHED_HUNYUAN = {
    "_class_name": "HunyuanVideoTransformer3DModel",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 16,
    "mlp_ratio": 4.0,
    "num_attention_heads": 24,
    "num_layers": 20,
    "num_refiner_layers": 2,
    "num_single_layers": 40,
    "out_channels": 16,
    "patch_size": 2,
    "patch_size_t": 1,
    "pooled_projection_dim": 768,
    "qk_norm": "rms_norm",
    "rope_axes_dim": [16, 56, 56],
    "rope_theta": 256.0,
    "text_embed_dim": 4096,
}
PUBLISHED = {
    "sd3_medium": published(
        caption_projection_dim=1536, num_attention_heads=24, num_layers=24, pos_embed_max_size=192
    ),
    "sd35_large": published(
        caption_projection_dim=2432,
        num_attention_heads=38,
        num_layers=38,
        pos_embed_max_size=192,
        qk_norm="rms_norm",
    ),
    "sd35_medium": published(
        caption_projection_dim=1536,
        num_attention_heads=24,
        num_layers=24,
        pos_embed_max_size=384,
        qk_norm="rms_norm",
        dual_attention_layers=list(range(13)),
    ),
}


@pytest.mark.parametrize(
    ("name", "preset"),
    [("sd3_medium", sd3_medium()), ("sd35_large", sd35_large()), ("sd35_medium", sd35_medium())],
)
def test_presets_of_sd3_are_the_published_shapes(name, preset):
    assert SD3.read_config(PUBLISHED[name]) == preset


PUBLISHED_FLUX = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}


def test_presets_of_flux_and_hunyuan_video_are_the_published_shapes():
    assert HUNYUAN.read_config(PUBLISHED_HUNYUAN) == hunyuan_video()
    assert FLUX.read_config(PUBLISHED_FLUX) == flux_dev()
    assert FLUX.read_config(PUBLISHED_FLUX | {"guidance_embeds": False}) == flux_schnell()


@pytest.mark.parametrize(
    ("family", "model", "billions"),
    [
        (WAN, wan_1_3b(), 1.42),
        (WAN, wan_5b(), 5.00),
        (WAN, wan_5b_i2v(), 5.00),
        (WAN, wan_14b(), 14.29),
        (WAN, wan_14b_i2v(), 16.39),
        (SD3, sd3_medium(), 2.03),
        (SD3, sd35_large(), 8.06),
        (SD3, sd35_medium(), 2.24),
        (FLUX, flux_dev(), 11.90),
        (FLUX, flux_schnell(), 11.89),
        (HUNYUAN, hunyuan_video(), 12.82),
    ],
    ids=lambda value: (
        ""
        if isinstance(value, ModelConfig)
        else value.config.family
        if isinstance(value, Counterpart)
        else str(value)
    ),
)
def test_presets_have_the_tensors_of_diffusers(mesh, family, model, billions):
    with torch.device("meta"):
        reference = FAMILIES[family.config.family][1].from_config(family.write_config(model))
    assert sum(p.numel() for p in reference.parameters()) == pytest.approx(billions * 1e9, rel=5e-3)
    mapped = {key: size for one in family.tensors(model, mesh) for key, size in one.theirs.items()}
    assert mapped == {key: t.shape for key, t in reference.state_dict().items()}


@torch.no_grad()
def test_a_time_for_every_token_is_the_samples_time_where_they_are_one(mesh):
    """How diffusers calls Wan 2.2's 5B as text to video."""
    original = theirs("wan", CONFIGS["wan"](0), seed=1)
    inputs = WAN.example(shape("wan", CONFIGS["wan"](0)), 2, torch.Generator().manual_seed(0))
    frames, rows, columns = (
        side // p for side, p in zip(inputs.latents.shape[2:], original.config.patch_size, strict=True)
    )
    each = (1000 * inputs.t)[:, None].expand(-1, frames * rows * columns)
    want = original(inputs.latents, each, inputs.text, return_dict=False)[0]
    torch.testing.assert_close(WAN.forward(original, inputs), want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_padding_that_hunyuans_pipeline_hides_is_as_if_it_were_not_there(mesh):
    """diffusers is given padded captions and a mask, we the captions alone."""
    config, lengths = CONFIGS["hunyuan"](0), (5, 2, 7)
    original, model = theirs("hunyuan", config, seed=1), shape("hunyuan", config)
    inputs = HUNYUAN.example(model, len(lengths), torch.Generator().manual_seed(0))
    visible = (torch.arange(inputs.text.shape[1]) < torch.tensor(lengths)[:, None]).long()
    want = original(
        inputs.latents,
        1000 * inputs.t,
        inputs.text,
        visible,
        inputs.pooled,
        1000 * inputs.guidance,
        return_dict=False,
    )[0]
    condition = Condition.pack(
        [text[:length] for text, length in zip(inputs.text, lengths, strict=True)], pooled=inputs.pooled
    )
    grid = patch_grid(tuple(inputs.latents.shape[2:]), model.patch)
    layout = build_layout((grid,) * len(lengths), condition.lengths, mesh)
    network = ours("hunyuan", model, mesh, original.state_dict())
    got = unpatchify(
        network(patchify(inputs.latents, model.patch), inputs.t, condition, layout), grid, model.patch
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_every_norm_of_sd3_has_our_eps():
    norms = [
        m
        for m in theirs("sd3", CONFIGS["sd3"](7), seed=1).modules()
        if hasattr(m, "eps") and not isinstance(m, nn.ModuleList)
    ]
    assert len(norms) > 10
    assert {m.eps for m in norms} == {1e-6}


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (SD3, {"qk_norm": "layer_norm"}, "qk_norm='layer_norm'"),
        (SD3, {"caption_projection_dim": 64}, "caption_projection_dim=64"),
        (SD3, {"pos_embed_max_size": None}, "pos_embed_max_size=None"),
        (SD3, {"dual_attention_layers": [9]}, r"dual_layers names blocks \[9\]"),
        (SD3, {"attention_head_dim": 5, "caption_projection_dim": 10}, "width=10"),
        (WAN, {"qk_norm": "rms_norm"}, "qk_norm='rms_norm'"),
        (WAN, {"eps": 1e-5}, "eps=1e-05"),
        (WAN, {"num_layers": 2.0}, "num_layers=2.0 of a WanTransformer3DModel must be a whole number"),
        (WAN, {"num_layers": True}, "num_layers=True"),
        (
            WAN,
            {"patch_size": [2, 2]},
            r"patch_size=\[2, 2\] of a WanTransformer3DModel must be 3 whole numbers",
        ),
        (
            SD3,
            {"dual_attention_layers": ["0"]},
            r"dual_attention_layers=\['0'\] of a SD3Transformer2DModel must be a list of whole numbers",
        ),
        (WAN, {"freq_dim": 128}, "freq_dim=128"),
        (WAN, {"pos_embed_seq_len": 514}, "pos_embed_seq_len=514"),
        (FLUX, {"patch_size": 2}, "patch_size=2"),
        (FLUX, {"in_channels": 6}, "in_channels=6"),
        (FLUX, {"axes_dims_rope": [2, 2, 2]}, r"rope_axes=\(2, 2, 2\): must add up"),
        (HUNYUAN, {"qk_norm": "layer_norm"}, "qk_norm='layer_norm'"),
        (HUNYUAN, {"image_condition_type": "token_replace"}, "image_condition_type='token_replace'"),
        (
            HUNYUAN,
            {"mlp_ratio": "4"},
            "mlp_ratio='4' of a HunyuanVideoTransformer3DModel must be a positive number",
        ),
        (HUNYUAN, {"rope_theta": float("nan")}, "rope_theta=nan"),
        (HUNYUAN, {"rope_axes_dim": [2, 2, 2]}, r"rope_axes=\(2, 2, 2\): must add up"),
        (HUNYUAN, {"rope_axes_dim": [3, 4, 5]}, r"rope_axes=\(3, 4, 5\): each must be even"),
    ],
)
def test_configurations_that_we_do_not_have_are_refused(family, change, message):
    config = CONFIGS[family.config.family](0) | (
        {"num_attention_heads": 2, "caption_projection_dim": 32} if family is SD3 else {}
    )
    with pytest.raises(ValueError, match=message):
        family.read_config(config | change)


def test_diffusers_reads_the_width_that_is_written():
    """Its quotient by the width, times the width again, may lie a little below."""
    for heads, size, mlp in ((1, 22, 15), (1, 112, 467), (2, 24, 79 * 2)):
        axes = (size - 8, 4, 4)
        model = replace(
            hunyuan_video(),
            depth=2,
            width=heads * size,
            heads=heads,
            mlp_width=mlp,
            double_blocks=1,
            rope_axes=axes,
        )
        written = HUNYUAN.write_config(model)
        assert HUNYUAN.read_config(written) == model
        with torch.device("meta"):
            theirs = HunyuanVideoTransformer3DModel.from_config(written)
        assert theirs.single_transformer_blocks[0].proj_mlp.out_features == mlp


def test_mlps_that_do_not_split_over_ranks_are_refused():
    with pytest.raises(ValueError, match=r"MLPs are 7 wide, which does not split over parallel\.tp=2"):
        check_heads(MMDiTConfig(mlp_width=7), ParallelConfig(tp=2))


def test_a_width_that_diffusers_cannot_say_is_not_written():
    with pytest.raises(ValueError, match=r"4 \* 48 wide, here 100"):
        SD3.write_config(replace(Sd3Config(width=48, heads=4), mlp_width=100))
