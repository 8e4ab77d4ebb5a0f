"""Flux the whole way at tiny size: its pipeline's text, and from pipeline to one-step pipeline."""

from dataclasses import replace

import pytest
import torch

from megatron_apt.config import DataConfig, InitConfig, OptimizerConfig
from megatron_apt.demo.digits import write_digit_images
from megatron_apt.encode.command import encode
from megatron_apt.encode.config import EncodeConfig
from megatron_apt.encoders.load import load_text_encoder, open_text_encoder
from megatron_apt.families.flux.text import FluxTextEncoder
from megatron_apt.methods.apt.config import AptConfig
from megatron_apt.methods.consistency.config import ConsistencyConfig
from megatron_apt.models.condition import Condition
from megatron_apt.models.embeddings import patchify
from support.conversions import PROMPT, assert_equal, convert, imported, one_step, trained
from support.pipelines import save_flux

PROMPTS = ["the quick fox runs", "", "red", "a very long caption " * 200]


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return save_flux(tmp_path_factory.mktemp("hub"))


@torch.no_grad()  # as in FluxPipeline.__call__
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_text_is_the_pipelines(flux, dtype):
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(flux, dtype=getattr(torch, dtype), transformer=None, vae=None)
    text, pooled, _ = pipeline.encode_prompt(PROMPTS)
    encoder = open_text_encoder(flux, dtype=dtype)
    assert type(encoder) is FluxTextEncoder and encoder.width == 16
    ours, our_pooled = load_text_encoder(encoder.config_dict()).encode_pooled(PROMPTS)
    assert (
        text.shape == (4, 512, 16)
        and pooled.shape == (4, 20)
        and ours[0].dtype == our_pooled.dtype == torch.float32
    )
    assert torch.equal(torch.stack(ours), text.float()) and torch.equal(our_pooled, pooled.float())
    assert (
        all(torch.equal(a, b) for a, b in zip(encoder.encode(PROMPTS), ours, strict=True))
        and encoder.encode([]) == []
    )


def test_what_its_folder_lacks_is_named(flux, tmp_path):
    with pytest.raises(ValueError, match=r"text_tokenizer='x': \S+ is a pipeline with several tokenizers"):
        open_text_encoder(flux, "x")
    (tmp_path / "model_index.json").write_text((flux / "model_index.json").read_text())
    with pytest.raises(FileNotFoundError, match="text_encoder"):
        open_text_encoder(tmp_path)


@torch.no_grad()
def test_from_pipeline_to_pipeline(flux, mesh, tmp_path):
    """Latents of diffusers' Flux are packed: patches of 2 x 2 one after another."""
    from diffusers import DiffusionPipeline, FluxPipeline

    base = imported(mesh, flux, tmp_path / "pretrained")
    pictures = write_digit_images(tmp_path / "png", count=6)
    options = {"codec": "kl", "codec_path": str(flux), "text": str(flux), "allow_upscale": True}
    encode(
        EncodeConfig(str(pictures), str(tmp_path / "images"), height=32, width=32, **options), progress=False
    )
    pretrained, data = (
        str(tmp_path / "pretrained"),
        DataConfig(shards=(str(tmp_path / "images"),), text_length=512),
    )
    with torch.enable_grad():
        start, no_guidance = InitConfig(diffusion=pretrained), ConsistencyConfig(guidance_scale=1.0)
        distilled = trained(
            mesh,
            base,
            tmp_path / "consistency",
            method="consistency",
            data=data,
            init=start,
            consistency=no_guidance,
        )
        adversarial = replace(
            base, method="apt", apt=AptConfig(), optimizer=OptimizerConfig(kind="rmsprop", lr=1e-4, ema=0.9)
        )
        final = trained(
            mesh,
            adversarial,
            tmp_path / "apt",
            data=data,
            init=InitConfig(generator=distilled, diffusion=pretrained),
        )
    out = tmp_path / "one-step"
    assert convert(mesh, "export", final, out, "--base", flux) == 0
    assert convert(mesh, "verify", final, out) == 0
    pipeline = DiffusionPipeline.from_pretrained(out)
    assert isinstance(pipeline, FluxPipeline) and not pipeline.scheduler.config.get("use_dynamic_shifting")
    card = (out / "README.md").read_text()
    assert (
        "pipeline_tag: text-to-image" in card
        and "pipeline(prompt, num_inference_steps=1, guidance_scale=3.5, height=32, width=32)" in card
    )
    z, options = (
        torch.randn(4, 1, 8, 12),
        {"height": 32, "width": 48, "num_inference_steps": 1, "guidance_scale": 3.5},
    )
    packed = patchify(z[None], (1, 2, 2))
    theirs = pipeline(PROMPT, latents=packed[None], output_type="latent", **options).images[0]
    text, pooled = open_text_encoder(flux).encode_pooled([PROMPT])
    condition = Condition.pack(text, 512, pooled)
    assert_equal(patchify(one_step(mesh, final, "ema", z, condition)[None], (1, 2, 2)), theirs)
    assert not torch.allclose(
        patchify(one_step(mesh, pretrained, "raw", z, condition)[None], (1, 2, 2)), theirs
    )
    assert pipeline(PROMPT, output_type="np", **options).images.shape == (1, 32, 48, 3)
