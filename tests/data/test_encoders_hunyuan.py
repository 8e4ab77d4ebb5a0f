"""HunyuanVideo's codec and text encoders against diffusers' own pipeline, and their way
from encoding to samples.
"""

import json
import shutil

import pytest
import torch

from megatron_apt.cli import main
from megatron_apt.data.shards import LatentShards
from megatron_apt.demo.digits import write_digit_clips, write_digit_images
from megatron_apt.encode.command import encode
from megatron_apt.encode.config import EncodeConfig
from megatron_apt.encoders.load import load_codec, load_text_encoder, open_text_encoder
from megatron_apt.families.hunyuan.codec import HunyuanCodec
from megatron_apt.families.hunyuan.text import HunyuanTextEncoder
from megatron_apt.families.wan.codec import WanCodec
from megatron_apt.training.train import train
from support.encodings import DIRTY, copy, run, through_json
from support.pipelines import change_json, hunyuan_vae, llama_tokenizer, save_hunyuan
from support.problems import model_config


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory):
    return save_hunyuan(tmp_path_factory.mktemp("hunyuan"))


def open_pipeline(folder, **options):
    from diffusers import HunyuanVideoPipeline

    pipeline = HunyuanVideoPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def hunyuan_text(folder, prompts, length=256, **options):
    """(n, length, D) text, (n, P) pooled and (n, length) mask of
    HunyuanVideoPipeline.encode_prompt, under no_grad as in __call__.
    """
    return open_pipeline(folder, **options).encode_prompt(prompts, max_sequence_length=length)


# Codec


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_codec_follows_the_pipeline(hunyuan, dtype):
    pipeline = open_pipeline(hunyuan, torch_dtype=getattr(torch, dtype))
    # The pipeline's folder, whose VAE is in vae/
    codec = load_codec(through_json(HunyuanCodec(hunyuan, dtype=dtype).config_dict()))
    assert codec.config_dict() == {"kind": "hunyuan", "path": str(hunyuan), "dtype": dtype}
    options = {"num_frames": 21, "height": 32, "width": 48, "num_inference_steps": 2}
    latents = torch.randn(1, 4, 6, 4, 6, generator=torch.Generator().manual_seed(0))
    denoised = pipeline(DIRTY[0], latents=latents, output_type="latent", **options).frames
    pixels = pipeline(DIRTY[0], latents=latents, output_type="pt", **options).frames
    ours = codec.decode(denoised)
    assert ours.shape == (1, 3, 21, 32, 48) and ours.std() > 0.2
    # 21 frames: in overlapping pieces of time
    assert torch.equal((ours.to(pixels.dtype) * 0.5 + 0.5).clamp(0, 1), pixels.transpose(1, 2))
    raw = latents.to(pipeline.vae.dtype) / 0.476986  # its line for latents that are more precise than the VAE
    assert torch.equal(codec.decode(latents), pipeline.vae.decode(raw).sample.float().clamp(-1, 1))
    mode = pipeline.vae.encode(ours.to(pipeline.vae.dtype)).latent_dist.mode()
    assert torch.equal(codec.encode(ours), 0.476986 * mode.float())
    assert torch.equal(codec.encode(ours[0]), codec.encode(ours)[0]) and torch.equal(
        codec.decode(denoised[0]), ours[0]
    )


def test_sizes_of_the_codec(hunyuan):
    codec = HunyuanCodec(hunyuan / "vae")
    for frames in (1, 5, 13, 17, 25, 33):
        latent = codec.encode(torch.zeros(3, frames, 8, 16))
        assert tuple(latent.shape) == codec.latent_shape(frames, 8, 16) == (4, 1 + frames // 4, 1, 2)
        assert codec.pixel_size(*latent.shape[1:]) == tuple(codec.decode(latent).shape[1:]) == (frames, 8, 16)
    for sizes, message in (
        ((6, 32, 32), "frames=6 is not 1 [+] a multiple of 4; .* is 5"),
        ((5, 36, 32), "height=36 is not a multiple of 8"),
    ):
        with pytest.raises(ValueError, match=message):
            codec.latent_shape(*sizes)
    with pytest.raises(ValueError, match=r"latent has 16 channels, .* has 4"):
        codec.decode(torch.zeros(16, 1, 8, 6))
    with pytest.raises(ValueError, match=r"holds \['AutoencoderKLHunyuanVideo'\], not AutoencoderKLWan"):
        WanCodec(hunyuan)
    with pytest.raises(ValueError, match=r"tiling=48: use 0 \(off\) or a multiple of 32 pixels, such as 64"):
        HunyuanCodec(hunyuan, tiling=48)


def test_tiles_are_diffusers_tiles(tmp_path):
    torch.manual_seed(0)
    hunyuan_vae().save_pretrained(tmp_path)
    whole = load_codec({"kind": "hunyuan", "path": str(tmp_path)})
    tiled = load_codec(through_json({**whole.config_dict(), "tiling": 96}))
    latent = torch.randn(4, 2, 16, 20, generator=torch.Generator().manual_seed(1))
    calls = {"whole": 0, "tiled": 0}
    for name, codec in (("whole", whole), ("tiled", tiled)):
        codec.vae.decoder.register_forward_hook(
            lambda *_, name=name: calls.__setitem__(name, calls[name] + 1)
        )
    pixels, from_tiles = whole.decode(latent), tiled.decode(latent)
    assert calls == {"whole": 1, "tiled": 2 * 3}  # 128 x 160 pixels in tiles of 96 at every 72
    assert not torch.allclose(pixels, from_tiles, atol=0.01)
    whole.vae.enable_tiling(
        tile_sample_min_height=96,
        tile_sample_min_width=96,
        tile_sample_stride_height=72,
        tile_sample_stride_width=72,
    )
    assert torch.equal(whole.decode(latent), from_tiles)
    assert torch.equal(whole.encode(pixels), tiled.encode(pixels))


# Text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_text_is_the_pipelines(hunyuan, dtype):
    text, pooled, mask = hunyuan_text(hunyuan, DIRTY, torch_dtype=getattr(torch, dtype))
    encoder = open_text_encoder(hunyuan, dtype=dtype)
    assert type(encoder) is HunyuanTextEncoder and encoder.width == 16
    ours, our_pooled = load_text_encoder(through_json(encoder.config_dict())).encode_pooled(DIRTY)
    assert [len(t) for t in ours] == mask.sum(1).tolist()
    assert len(ours[1]) == 1 and len(ours[3]) == 256 and ours[0].dtype == our_pooled.dtype == torch.float32
    for row, real, t in zip(text, mask.bool(), ours, strict=True):
        assert torch.equal(t, row[real].float())
    assert (
        torch.equal(our_pooled, pooled.float())
        and our_pooled.shape == (len(DIRTY), 20)
        and our_pooled.std(0).mean() > 0.1
    )
    assert torch.cat(ours).std(0).mean() > 0.1 and all(
        torch.equal(a, b) for a, b in zip(encoder.encode(DIRTY), ours, strict=True)
    )


def test_other_lengths_and_no_captions(hunyuan):
    encoder = load_text_encoder({"kind": "hunyuan", "path": str(hunyuan), "max_length": 6})
    text, _, mask = hunyuan_text(hunyuan, DIRTY[:3], 6)
    ours = encoder.encode(DIRTY[:3])
    assert [len(t) for t in ours] == mask.sum(1).tolist() == [6, 1, 6]
    assert all(torch.equal(t, row[: len(t)]) for row, t in zip(text, ours, strict=True))
    assert encoder.encode_pooled([]) == ([], None)


@torch.no_grad()
def test_transformer_reads_no_padding(hunyuan):
    """Why rows of padding need not be kept: of a caption's own length, without a mask to
    speak of, the velocity is the same.
    """
    transformer = open_pipeline(hunyuan).transformer
    text, pooled, mask = hunyuan_text(hunyuan, DIRTY[:2])
    rows, vectors = open_text_encoder(hunyuan).encode_pooled(DIRTY[:2])
    latents = torch.randn(2, 4, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    given = dict(timestep=torch.tensor([700.0]), guidance=torch.tensor([6000.0]), return_dict=False)
    for i in range(2):
        one = slice(i, i + 1)
        padded = transformer(
            latents[one],
            encoder_hidden_states=text[one],
            encoder_attention_mask=mask[one],
            pooled_projections=pooled[one],
            **given,
        )
        ones = torch.ones(1, len(rows[i]), dtype=mask.dtype)
        own = transformer(
            latents[one],
            encoder_hidden_states=rows[i][None],
            encoder_attention_mask=ones,
            pooled_projections=vectors[one],
            **given,
        )
        torch.testing.assert_close(own[0], padded[0], atol=1e-6 * float(padded[0].abs().max()), rtol=0)


def test_tokenizer_is_what_its_file_says(hunyuan, tmp_path):
    """The published index names a class that loses the spaces of Llama 3's tokenizer.json.

    It does so since transformers 5.
    """
    from transformers import PreTrainedTokenizerFast

    folder = copy(hunyuan, tmp_path)
    change_json(folder / "model_index.json", tokenizer=["transformers", "LlamaTokenizerFast"])
    change_json(
        folder / "tokenizer" / "tokenizer_config.json",
        tokenizer_class="LlamaTokenizer",
        add_bos_token=True,
        add_eos_token=False,
    )
    text, _, mask = hunyuan_text(
        folder, DIRTY, tokenizer=PreTrainedTokenizerFast.from_pretrained(hunyuan, subfolder="tokenizer")
    )
    for row, real, ours in zip(text, mask.bool(), open_text_encoder(folder).encode(DIRTY), strict=True):
        assert torch.equal(ours, row[real])


def test_pipeline_folder_problems(hunyuan, tmp_path):
    def message(**options) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            open_text_encoder(folder, **options)
        return str(caught.value)

    folder = copy(hunyuan, tmp_path)
    assert (
        f"text_tokenizer='x': {folder} is a pipeline with several tokenizers and uses its own; leave it empty"
        in message(tokenizer_path="x")
    )
    weights = folder / "text_encoder" / "model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert "text_encoder: no *.safetensors file; pickled weights are not read" in message()
    change_json(folder / "text_encoder_2" / "config.json", architectures=["CLIPModel"])
    assert (
        "text_encoder_2/config.json: holds ['clip_text_model', 'CLIPModel'], not CLIPTextModel" in message()
    )
    shutil.rmtree(folder / "text_encoder_2")
    assert "text_encoder_2/config.json does not exist" in message()
    (folder / "tokenizer_2" / "tokenizer.json").unlink()
    assert "tokenizer_2: no tokenizer; it must hold one of tokenizer.json" in message()
    plain = llama_tokenizer()
    plain.add_tokens([" by detailing the following aspects:"])
    plain.save_pretrained(folder / "tokenizer")
    assert (
        "tokenizer/tokenizer.json: HunyuanVideo's prompt template is 91 tokens, of which diffusers cuts off "
        "95" in message()
    )
    change_json(folder / "tokenizer" / "tokenizer_config.json", padding_side="left")
    assert "tokenizer/tokenizer_config.json: padding_side='left', but " in message()
    (folder / "tokenizer" / "tokenizer.json").unlink()
    assert "tokenizer/tokenizer.json does not exist; copy it from the pipeline" in message()
    change_json(folder / "model_index.json", _class_name="HunyuanVideoImageToVideoPipeline")
    assert "the text of HunyuanVideoImageToVideoPipeline cannot be encoded" in message()


# From encoding to samples


@pytest.fixture(scope="module")
def encoded(hunyuan, tmp_path_factory):
    """Six clips of five frames through the pipeline's VAE and text encoders, by the command line."""
    folder = tmp_path_factory.mktemp("encoded")
    clips = write_digit_clips(folder / "webm", count=6)
    models = [
        "--codec",
        "hunyuan",
        "--codec-path",
        str(hunyuan / "vae"),
        "--codec-tiling",
        "32",
        "--text",
        str(hunyuan),
    ]
    sizes = ["--frames", "5", "--height", "32", "--width", "48", "--allow-upscale"]
    main(["encode", "--source", str(clips), "--output", str(folder / "clips"), *sizes, *models])
    return folder / "clips"


def test_datasets_are_the_pipelines(hunyuan, encoded):
    dataset = LatentShards(encoded)
    encoder, codec = dataset.text_encoder(), dataset.codec()
    assert (
        type(encoder) is HunyuanTextEncoder
        and type(codec) is HunyuanCodec
        and codec.tiling == 32
        and dataset.codec(tiling=0).tiling == 0
    )
    assert dataset.shapes == [(4, 2, 4, 6)] * 6 and dataset.pooled_width == 20 and dataset.info["format"] == 2
    for i in (0, 5):
        text, pooled, mask = hunyuan_text(hunyuan, [dataset.captions[i]])
        torch.testing.assert_close(dataset[i].text, text[mask.bool()], atol=1e-6, rtol=0)
        torch.testing.assert_close(dataset[i].pooled, pooled[0], atol=1e-6, rtol=0)
    for prompt, text, pooled in (
        ("", dataset.null_text, dataset.null_pooled),
        ("blurry, distorted, low quality", dataset.negative_text, dataset.negative_pooled),
    ):
        expected = hunyuan_text(hunyuan, [prompt])
        assert torch.equal(text, expected[0][expected[2].bool()]) and torch.equal(pooled, expected[1])


def test_pictures_are_clips_of_one_frame(hunyuan, tmp_path):
    pictures = write_digit_images(tmp_path / "png", count=3)
    options = {"codec": "hunyuan", "codec_path": str(hunyuan), "text": str(hunyuan), "allow_upscale": True}
    info = encode(
        EncodeConfig(str(pictures), str(tmp_path / "out"), height=32, width=32, **options), progress=False
    )
    dataset = LatentShards(tmp_path / "out")
    assert (
        info["codec"]["kind"] == info["text_encoder"]["kind"] == "hunyuan"
        and dataset.shapes == [(4, 1, 4, 4)] * 3
    )
    assert dataset.codec().decode(dataset[0].latent).shape == (3, 1, 32, 32)
    with pytest.raises(ValueError, match="codec='h': use 'pixel', 'wan', 'hunyuan', 'kl'"):
        EncodeConfig("", "", codec="h")
    with pytest.raises(ValueError, match="image_to_video=True: needs codec='wan', not 'hunyuan'"):
        EncodeConfig("", "", image_to_video=True, frames=5, **options)


def test_samples_are_decoded_by_the_pipelines_vae(hunyuan, encoded, mesh, tmp_path, monkeypatch):
    train(
        run(
            encoded, tmp_path / "run", model=model_config(text_width=16, latent_channels=4, pooled_text=False)
        ),
        mesh,
    )
    decoded, decode = [], HunyuanCodec.decode
    monkeypatch.setattr(
        HunyuanCodec,
        "decode",
        lambda self, latent: decoded.append((latent, decode(self, latent))) or decoded[-1][1],
    )
    main(
        [
            "sample",
            str(tmp_path / "run"),
            "--prompts",
            DIRTY[0],
            "--decode-tiling",
            "0",
            "--format",
            "gif",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    (latent, pixels), vae = decoded[0], open_pipeline(hunyuan).vae
    with torch.no_grad():
        assert torch.equal(pixels, vae.decode(latent[None] / 0.476986).sample[0].clamp(-1, 1))
    assert json.loads((encoded / "dataset.json").read_text())["text_encoder"]["path"] == str(hunyuan)
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".gif"]
