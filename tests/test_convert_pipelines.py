"""What we export, run by diffusers' own pipelines: one step gives exactly our one-step sample."""

import json
from dataclasses import replace

import pytest
import torch
import tyro
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from megatron_apt.convert.command import Command, perform
from megatron_apt.models.condition import Condition
from megatron_apt.sample import load_generator
from megatron_apt.sampling import Sampler

TEXT = 12  # width of the text encoders
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "cat", "runs"]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=77)


def spread(module: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that every part of the network shows in its output."""
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return module


@pytest.fixture(scope="module")
def wan_pipeline(tmp_path_factory):
    """Folder of a tiny whole WanPipeline as it comes from a hub."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=TEXT, ffn_dim=20, num_layers=2
    )
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True])
    text = UMT5EncoderModel(UMT5Config(vocab_size=len(WORDS), d_model=TEXT, d_kv=4, d_ff=16, num_layers=1, num_heads=3))
    pipeline = WanPipeline(
        tokenizer(), text, vae, UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), spread(transformer)
    )
    folder = tmp_path_factory.mktemp("hub") / "wan"
    pipeline.save_pretrained(folder)
    return folder


def clip(width: int) -> CLIPTextModelWithProjection:
    shape = {"hidden_size": width, "projection_dim": width, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=len(WORDS), eos_token_id=1, max_position_embeddings=77, **shape))


@pytest.fixture(scope="module")
def sd3_pipeline(tmp_path_factory):
    """Folder of a tiny whole StableDiffusion3Pipeline, of the kind of 3.5 medium."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=6,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        latent_channels=4,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
    )
    t5 = T5EncoderModel(T5Config(vocab_size=len(WORDS), d_model=TEXT, d_kv=4, d_ff=16, num_layers=1, num_heads=3))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = StableDiffusion3Pipeline(spread(transformer), scheduler, vae, clip(4), tokenizer(), clip(6), tokenizer(), t5, tokenizer())
    folder = tmp_path_factory.mktemp("hub") / "sd3"
    pipeline.save_pretrained(folder)
    return folder


def convert(mesh, *argv) -> int:
    """As on the command line, but on the mesh of the tests."""
    return perform(tyro.cli(Command, args=list(map(str, argv))), mesh)


def test_wan_pipeline_takes_our_one_step(wan_pipeline, mesh, tmp_path):
    assert convert(mesh, "import", wan_pipeline, tmp_path / "run") == 0
    assert convert(mesh, "export", tmp_path / "run", tmp_path / "out", "--base", wan_pipeline, "--license", "apache-2.0") == 0
    assert convert(mesh, "verify", tmp_path / "run", tmp_path / "out") == 0
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(pipeline, WanPipeline) and isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    z, text = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 9, TEXT)
    options = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 1, "guidance_scale": 1.0}
    theirs = pipeline(prompt_embeds=text, latents=z, output_type="latent", **options).frames
    loaded = load_generator(str(tmp_path / "run"), mesh, "raw")
    ours = Sampler(loaded.model, mesh, Condition.pack([text[0]]), Condition.pack([text[0]])).one_step(z)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    video = pipeline(prompt="a red cat runs", output_type="np", **options).frames
    assert video.shape == (1, 5, 32, 32, 3)
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n") and "text-to-video" in card
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]


def test_sd3_pipeline_takes_our_one_step(sd3_pipeline, mesh, tmp_path):
    assert convert(mesh, "import", sd3_pipeline, tmp_path / "run") == 0
    assert convert(mesh, "export", tmp_path / "run", tmp_path / "out", "--base", sd3_pipeline) == 0
    assert convert(mesh, "verify", tmp_path / "run", tmp_path / "out") == 0
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(pipeline, StableDiffusion3Pipeline) and pipeline.scheduler.config.shift == 1.0
    z, text, pooled = torch.randn(1, 4, 8, 10), torch.randn(1, 9, TEXT), torch.randn(1, 10)
    options = {"height": 16, "width": 20, "num_inference_steps": 1, "guidance_scale": 1.0}
    theirs = pipeline(prompt_embeds=text, pooled_prompt_embeds=pooled, latents=z, output_type="latent", **options).images
    loaded = load_generator(str(tmp_path / "run"), mesh, "raw")
    condition = replace(Condition.pack([text[0]]), pooled=pooled)
    ours = Sampler(loaded.model, mesh, condition, condition).one_step(z.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    assert pipeline(prompt="a red cat runs", output_type="np", **options).images.shape == (1, 16, 20, 3)
