"""The whole way, at tiny size: a pipeline as it comes from a hub in, consistency
distillation and APT, a one-step pipeline for diffusers out.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from megatron_apt.config import DataConfig, InitConfig, OptimizerConfig
from megatron_apt.convert.errors import ConvertError
from megatron_apt.demo.digits import write_digit_clips, write_digit_images
from megatron_apt.encode.command import encode
from megatron_apt.encode.config import EncodeConfig
from megatron_apt.encoders.load import open_text_encoder
from megatron_apt.methods.apt.config import AptConfig
from megatron_apt.methods.consistency.config import ConsistencyConfig
from megatron_apt.models.condition import Condition
from support.conversions import PROMPT, assert_equal, convert, imported, one_step, trained
from support.pipelines import change_json, save_hunyuan, save_sd3, save_wan


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """With a second network for little noise, as Wan2.2 has."""
    folder = save_wan(tmp_path_factory.mktemp("hub"))
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    change_json(
        folder / "model_index.json",
        transformer_2=["diffusers", "WanTransformer3DModel"],
        boundary_ratio=0.875,
    )
    return folder


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return save_sd3(tmp_path_factory.mktemp("hub"))


@torch.no_grad()
def test_wan_from_pipeline_to_pipeline(wan, mesh, tmp_path):
    from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanPipeline

    base = imported(mesh, wan, tmp_path / "pretrained")
    sources = {
        "images": write_digit_images(tmp_path / "png", count=6),
        "videos": write_digit_clips(tmp_path / "webm", count=6),
    }
    for name, frames in (("images", 1), ("videos", 5)):
        options = {"codec": "wan", "codec_path": str(wan), "text": str(wan), "allow_upscale": True}
        encode(
            EncodeConfig(
                str(sources[name]), str(tmp_path / name), height=32, width=32, frames=frames, **options
            ),
            progress=False,
        )
    pretrained, images, videos = (str(tmp_path / name) for name in ("pretrained", "images", "videos"))
    with torch.enable_grad():
        both = DataConfig(shards=(images, videos), text_length=512)
        distilled = trained(
            mesh,
            base,
            tmp_path / "consistency",
            method="consistency",
            data=both,
            init=InitConfig(diffusion=pretrained),
        )
        heads = AptConfig(head_layers=(0.5, 1.0))
        adversarial = replace(
            base, method="apt", apt=heads, optimizer=OptimizerConfig(kind="rmsprop", lr=1e-4, ema=0.9)
        )
        start = InitConfig(generator=distilled, diffusion=pretrained)
        of_images = trained(
            mesh, adversarial, tmp_path / "image", data=replace(both, shards=(images,)), init=start
        )
        start = InitConfig(generator=f"{of_images}:ema", diffusion=pretrained)
        final = trained(
            mesh,
            adversarial,
            tmp_path / "video",
            data=replace(both, shards=(videos,)),
            init=start,
            apt=replace(heads, ar1_sigma=0.1, timestep_shift=12.0),
        )
    out = tmp_path / "one-step"
    assert (
        convert(mesh, "export", final, out, "--base", wan, "--discriminator", "--license", "apache-2.0") == 0
    )
    assert convert(mesh, "verify", final, out) == 0
    pipeline = DiffusionPipeline.from_pretrained(out)
    assert isinstance(pipeline, WanPipeline) and isinstance(
        pipeline.scheduler, FlowMatchEulerDiscreteScheduler
    )
    assert pipeline.transformer_2 is None and not (out / "transformer_2").exists()
    z = torch.randn(4, 2, 4, 4)
    options = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 1, "guidance_scale": 1.0}
    theirs = pipeline(PROMPT, latents=z[None], output_type="latent", **options).frames[0]
    condition = Condition.pack(open_text_encoder(wan).encode([PROMPT]), 512)
    assert_equal(one_step(mesh, final, "ema", z, condition), theirs)
    assert not torch.allclose(one_step(mesh, final, "raw", z, condition), theirs)
    assert not torch.allclose(one_step(mesh, pretrained, "raw", z, condition), theirs)
    assert pipeline(PROMPT, output_type="np", **options).frames.shape == (1, 5, 32, 32, 3)
    card = (out / "README.md").read_text()
    assert (
        card.startswith('---\nlicense: "apache-2.0"\n')
        and "method `apt`, 2 iterations of 4 samples" in card
        and "- `videos`: clips of 5 frames (all of their sources' frames), 32 pixels high, 32 wide" in card
        and "- prompts padded or cut to 512 tokens" in card
        and "guidance_scale=1, num_frames=5, height=32, width=32)" in card
    )
    discriminator = load_file(out / "discriminator/model.safetensors")
    assert {name.split(".")[0] for name in discriminator} == {
        "backbone",
        "heads",
        "norm_weight",
        "norm_bias",
        "logit",
    }
    assert json.loads((out / "discriminator/config.json").read_text())["apt"]["head_layers"] == [0.5, 1.0]


def test_a_model_of_many_steps_keeps_its_scheduler(wan, mesh, tmp_path):
    from diffusers import DiffusionPipeline, UniPCMultistepScheduler

    imported(mesh, wan, tmp_path / "run")
    assert convert(mesh, "export", tmp_path / "run", tmp_path / "out", "--base", wan) == 0
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(pipeline.scheduler, UniPCMultistepScheduler) and pipeline.transformer_2 is not None
    assert pipeline.config.boundary_ratio == 0.875


def test_what_cannot_be_a_base_is_named(wan, sd3, mesh, tmp_path):
    imported(mesh, wan, tmp_path / "run")

    def attempt(change, message):
        base = shutil.copytree(wan, tmp_path / "base", dirs_exist_ok=True)
        change(base)
        with pytest.raises(ConvertError, match=message):
            convert(mesh, "export", tmp_path / "run", tmp_path / "out", "--base", base)
        assert not (tmp_path / "out").exists()

    attempt(
        lambda base: change_json(base / "transformer/config.json", in_channels=8),
        "condition_channels is 4, of this checkpoint 0",
    )
    attempt(
        lambda base: change_json(base / "model_index.json", **{"../escape": ["diffusers", "X"]}),
        r"'\.\./escape' names no part",
    )
    attempt(lambda base: shutil.rmtree(base / "vae"), r"names vae, and \S+ is not there")
    attempt(
        lambda base: (base / "vae/config.json").unlink() or (base / "vae/config.json").symlink_to("gone"),
        r"vae/config\.json: cannot be copied",
    )
    for value in ("x", 3, ["diffusers"], None):
        attempt(
            lambda base, value=value: change_json(base / "model_index.json", transformer=value),
            "its transformer is .*, not a WanTransformer3D",
        )
    with pytest.raises(ConvertError, match=r"lies in the base .*, which is copied"):
        convert(mesh, "export", tmp_path / "run", wan / "vae/out", "--base", wan)
    attempt(
        lambda base: (base / "model_index.json").write_text("[]"),
        "Expected object, got array; it must be a JSON object",
    )
    with pytest.raises(ConvertError, match="not a WanTransformer3DModel"):
        convert(mesh, "export", tmp_path / "run", tmp_path / "out", "--base", sd3)


@torch.no_grad()
def test_sd3_from_pipeline_to_pipeline(sd3, mesh, tmp_path):
    from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

    base = imported(mesh, sd3, tmp_path / "pretrained")
    pictures = write_digit_images(tmp_path / "png", count=6)
    options = {"codec": "kl", "codec_path": str(sd3), "text": str(sd3), "allow_upscale": True}
    encode(
        EncodeConfig(str(pictures), str(tmp_path / "images"), height=32, width=32, **options), progress=False
    )
    pretrained = str(tmp_path / "pretrained")
    with torch.enable_grad():
        final = trained(
            mesh,
            base,
            tmp_path / "apt",
            method="apt",
            data=DataConfig(shards=(str(tmp_path / "images"),), text_length=333),
            init=InitConfig(generator=pretrained, diffusion=pretrained),
            optimizer=OptimizerConfig(kind="rmsprop", lr=1e-4, ema=0.9),
        )
    out = tmp_path / "one-step"
    assert convert(mesh, "export", final, out, "--base", sd3) == 0
    assert convert(mesh, "verify", final, out) == 0
    pipeline = DiffusionPipeline.from_pretrained(out)
    assert isinstance(pipeline, StableDiffusion3Pipeline) and pipeline.scheduler.config.shift == 1.0
    z, options = (
        torch.randn(4, 1, 8, 10),
        {"height": 32, "width": 40, "num_inference_steps": 1, "guidance_scale": 1.0},
    )
    theirs = pipeline(PROMPT, latents=z.transpose(0, 1), output_type="latent", **options).images[0]
    text, pooled = open_text_encoder(sd3).encode_pooled([PROMPT])
    condition = Condition.pack(text, 333, pooled)
    assert_equal(one_step(mesh, final, "ema", z, condition).squeeze(1), theirs)
    assert not torch.allclose(one_step(mesh, pretrained, "raw", z, condition).squeeze(1), theirs)
    assert pipeline(PROMPT, output_type="np", **options).images.shape == (1, 32, 40, 3)


@torch.no_grad()
def test_hunyuan_from_pipeline_to_pipeline(mesh, tmp_path):
    from diffusers import DiffusionPipeline, HunyuanVideoPipeline

    hunyuan = save_hunyuan(tmp_path / "hub")
    base = imported(mesh, hunyuan, tmp_path / "pretrained")
    clips = write_digit_clips(tmp_path / "webm", count=6)
    options = {"codec": "hunyuan", "codec_path": str(hunyuan), "text": str(hunyuan), "allow_upscale": True}
    encode(
        EncodeConfig(str(clips), str(tmp_path / "videos"), height=32, width=32, frames=5, **options),
        progress=False,
    )
    pretrained, data = str(tmp_path / "pretrained"), DataConfig(shards=(str(tmp_path / "videos"),))
    with torch.enable_grad():
        no_guidance = ConsistencyConfig(guidance_scale=1.0)
        start = InitConfig(diffusion=pretrained)
        distilled = trained(
            mesh,
            base,
            tmp_path / "consistency",
            method="consistency",
            data=data,
            init=start,
            consistency=no_guidance,
        )
        final = trained(
            mesh,
            base,
            tmp_path / "apt",
            method="apt",
            data=data,
            init=InitConfig(generator=distilled, diffusion=pretrained),
            optimizer=OptimizerConfig(kind="rmsprop", lr=1e-4, ema=0.9),
            apt=AptConfig(ar1_sigma=0.1, timestep_shift=12.0),
        )
    out = tmp_path / "one-step"
    assert convert(mesh, "export", final, out, "--base", hunyuan) == 0
    assert convert(mesh, "verify", final, out) == 0
    pipeline = DiffusionPipeline.from_pretrained(out)
    assert isinstance(pipeline, HunyuanVideoPipeline) and pipeline.scheduler.config.shift == 1.0
    called = "pipeline(prompt, num_inference_steps=1, guidance_scale=6, num_frames=5, height=32, width=32)"
    assert called in (out / "README.md").read_text()
    z, options = (
        torch.randn(4, 2, 4, 4),
        {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 1, "guidance_scale": 6.0},
    )
    theirs = pipeline(PROMPT, latents=z[None], output_type="latent", **options).frames[0]
    text, pooled = open_text_encoder(hunyuan).encode_pooled([PROMPT])
    condition = Condition.pack(text, 0, pooled)
    assert_equal(one_step(mesh, final, "ema", z, condition), theirs)
    assert not torch.allclose(one_step(mesh, pretrained, "raw", z, condition), theirs)
    assert pipeline(PROMPT, output_type="np", **options).frames.shape == (1, 5, 32, 32, 3)
