"""Codecs and text encoders from pipeline folders against diffusers' own pipelines, and
the way of pooled text from encoding to samples.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_apt.cli import main
from megatron_apt.data.batches import Batches
from megatron_apt.data.microbatch import mixed, rolled
from megatron_apt.data.shards import LatentShards
from megatron_apt.demo.digits import write_digit_images
from megatron_apt.encode.command import encode
from megatron_apt.encode.config import EncodeConfig
from megatron_apt.encoders.codec import KlCodec
from megatron_apt.encoders.load import load_codec, load_text_encoder, open_text_encoder
from megatron_apt.encoders.text import HuggingFaceTextEncoder
from megatron_apt.families.sd3.text import Sd3TextEncoder
from megatron_apt.families.wan.codec import WanCodec
from megatron_apt.families.wan.text import WanTextEncoder, clean_prompt
from megatron_apt.models.condition import Condition
from megatron_apt.sample.config import SampleConfig
from megatron_apt.training.train import train
from support.encodings import DIRTY, copy, run, through_json
from support.pipelines import PROMPTS, change_json, kl_vae, save_sd3, save_wan, sentencepiece_folder, wan_vae


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return save_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return save_sd3(tmp_path_factory.mktemp("sd3"))


# Codecs


def test_kl_codec_follows_diffusers_pipelines(sd3):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(sd3 / "vae").eval()
    # The pipeline's folder, whose VAE is in vae/
    codec = load_codec(through_json(KlCodec(sd3).config_dict()))
    assert codec.config_dict() == {"kind": "kl", "path": str(sd3), "dtype": "float32"}
    x = torch.rand(3, 1, 32, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        raw = vae.encode(x[None, :, 0]).latent_dist.mode()
        expected = (raw - 0.0609) * 1.5305  # StableDiffusion3Img2ImgPipeline.prepare_latents
        latent = codec.encode(x)
        assert tuple(latent.shape) == codec.latent_shape(1, 32, 24) == (4, 1, 8, 6)
        assert torch.equal(latent[:, 0], expected[0])
        picture = vae.decode(expected / 1.5305 + 0.0609).sample  # StableDiffusion3Pipeline.__call__
        assert torch.equal(codec.decode(latent)[:, 0], picture[0].clamp(-1, 1))
        torch.testing.assert_close(codec.encode(torch.stack((x, -x)))[0], latent)
    for sizes, message in (
        ((5, 32, 24), "frames=5: codec 'kl' encodes pictures"),
        ((1, 30, 24), "height=30 is not a multiple of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            codec.latent_shape(*sizes)
    with pytest.raises(ValueError, match="latent has 2 frames"):
        codec.decode(torch.zeros(4, 2, 8, 6))
    with pytest.raises(ValueError, match=r"latent has 16 channels, .* has 4"):
        codec.decode(torch.zeros(16, 1, 8, 6))


def test_kl_codec_without_a_shift(tmp_path):
    """As in VAEs before SD3: quant convolutions, scale alone."""
    torch.manual_seed(0)
    vae = kl_vae(shift_factor=None, scaling_factor=0.18215, use_quant_conv=True, use_post_quant_conv=True)
    vae.save_pretrained(tmp_path)
    x = torch.rand(3, 1, 16, 16) * 2 - 1
    with torch.no_grad():
        assert torch.equal(
            KlCodec(tmp_path).encode(x)[:, 0], 0.18215 * vae.encode(x[None, :, 0]).latent_dist.mode()[0]
        )
    change_json(tmp_path / "config.json", latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    with pytest.raises(ValueError, match="latents_mean"):
        KlCodec(tmp_path)


def test_kl_codec_never_reads_pickles(sd3, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"config\.json does not exist; give a local folder with an AutoencoderKL"
    ):
        KlCodec(tmp_path)
    (tmp_path / "config.json").write_text((sd3 / "vae" / "config.json").read_text())
    torch.save({}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="safetensors"):
        KlCodec(tmp_path)
    with pytest.raises(ValueError, match=r"holds \['AutoencoderKL'\], not AutoencoderKLWan"):
        WanCodec(sd3)


@pytest.mark.parametrize("kind", ["kl", "wan"])
def test_tiles_agree_with_diffusers_and_about_with_the_whole(kind, tmp_path):
    """Random weights are the worst case: their norms see little of a tile, and their
    values are all detail.
    """
    torch.manual_seed(0)
    (kl_vae() if kind == "kl" else wan_vae()).save_pretrained(tmp_path)
    whole = load_codec({"kind": kind, "path": str(tmp_path)})
    tiled = load_codec(through_json({**whole.config_dict(), "tiling": 96}))
    assert (
        "tiling" not in whole.config_dict() and tiled.config_dict()["tiling"] == 96 and tiled.vae.use_slicing
    )
    latent = torch.randn(
        4, 1, *((32, 40) if kind == "kl" else (16, 20)), generator=torch.Generator().manual_seed(1)
    )
    calls = {"whole": 0, "tiled": 0}
    for name, codec in (("whole", whole), ("tiled", tiled)):
        codec.vae.decoder.register_forward_hook(
            lambda *_, name=name: calls.__setitem__(name, calls[name] + 1)
        )
    pixels, from_tiles = whole.decode(latent), tiled.decode(latent)
    assert calls == {"whole": 1, "tiled": 2 * 3}  # 128 x 160 pixels in tiles of 96 at every 72
    difference = (pixels - from_tiles).square().mean().sqrt() / pixels.std()
    assert 0.001 < difference < 0.25  # 0.19 for kl, 0.09 for wan
    both = tiled.decode(torch.stack((latent, -latent)))
    assert calls["tiled"] == 3 * 6 and torch.equal(both[0], from_tiles)  # one sample after the other
    if kind == "kl":  # the calls a user of diffusers would make
        whole.vae.enable_tiling()
        whole.vae.tile_sample_min_size, whole.vae.tile_latent_min_size = 96, 24
    else:
        whole.vae.enable_tiling(
            tile_sample_min_height=96,
            tile_sample_min_width=96,
            tile_sample_stride_height=72,
            tile_sample_stride_width=72,
        )
    assert torch.equal(whole.decode(latent), from_tiles)
    x = pixels.clamp(-1, 1)
    assert torch.equal(whole.encode(x), tiled.encode(x))


def test_tiles_that_cannot_be_cut(sd3):
    with pytest.raises(ValueError, match=r"tiling=100: use 0 \(off\) or a multiple of 16 pixels, such as 96"):
        KlCodec(sd3, tiling=100)
    with pytest.raises(ValueError, match="tiling=-16"):
        KlCodec(sd3, tiling=-16)
    with pytest.raises(ValueError, match="codec pixel has no tiles"):
        load_codec({"kind": "pixel", "tiling": 64})


# Text of Wan


@torch.no_grad()
def wan_rows(folder, prompts, length=512, **options):
    """WanPipeline.encode_prompt, under no_grad as in WanPipeline.__call__."""
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(folder, **options)
    return pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=length)[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wan_text_is_the_pipelines(wan, dtype):
    expected = wan_rows(wan, DIRTY, torch_dtype=getattr(torch, dtype))
    encoder = open_text_encoder(wan, dtype=dtype)
    assert type(encoder) is WanTextEncoder and encoder.width == 16
    ours = load_text_encoder(through_json(encoder.config_dict())).encode(DIRTY)
    assert torch.equal(
        torch.stack([t.abs().sum(1) > 0 for t in expected]).sum(1), torch.tensor([len(t) for t in ours])
    )
    assert len(ours[1]) == 1 and len(ours[3]) == 512 and ours[0].dtype == torch.float32
    for row, text in zip(expected, ours, strict=True):
        assert torch.equal(text, row[: len(text)].float())
    # data.text_length=512 makes what the pipeline gives its transformer.
    assert torch.equal(Condition.pack(ours, 512).tokens, expected.flatten(0, 1).float())


def test_wan_text_from_other_folders(wan, tmp_path):
    expected = wan_rows(wan, DIRTY)
    pieces = sentencepiece_folder(tmp_path / "pieces")  # spiece.model alone
    separate = load_text_encoder(through_json(open_text_encoder(wan, str(pieces)).config_dict()))
    assert separate.tokenizer_path == str(pieces)
    assert all(
        torch.equal(text, row[: len(text)])
        for row, text in zip(expected, separate.encode(DIRTY), strict=True)
    )
    # The encoder's own folder: prompts as they are, without padding, so equal up to rounding.
    plain = open_text_encoder(wan / "text_encoder", str(pieces))
    assert type(plain) is HuggingFaceTextEncoder
    for row, text in zip(
        expected, load_text_encoder(through_json(plain.config_dict())).encode(PROMPTS), strict=False
    ):
        torch.testing.assert_close(text, row[: len(text)], atol=1e-5, rtol=1e-4)
    with pytest.raises(
        FileNotFoundError, match=r"text_encoder: neither spiece\.model nor tokenizer\.json; .* text_tokenizer"
    ):
        open_text_encoder(wan / "text_encoder")


def test_prompts_are_cleaned_as_wan_pipelines_clean_them():
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    for prompt in (*DIRTY, "a\x1cb\u2003c\u200bd", " &nbsp; ", "&amp;lt;", "ﬁne “quotes” Ã©"):
        assert clean_prompt(prompt) == prompt_clean(prompt)
    assert clean_prompt(" &lt;b&gt;\n &amp;amp;  c ") == "<b> & c"


# Text of Stable Diffusion 3


@torch.no_grad()
def sd3_text(folder, prompts, length=256, **options):
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **options)
    text, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=length
    )
    return text, pooled


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sd3_text_is_the_pipelines(sd3, dtype):
    text, pooled = sd3_text(sd3, DIRTY, torch_dtype=getattr(torch, dtype))
    encoder = open_text_encoder(sd3, dtype=dtype)
    assert type(encoder) is Sd3TextEncoder and encoder.width == 48
    ours, our_pooled = load_text_encoder(through_json(encoder.config_dict())).encode_pooled(DIRTY)
    assert (
        text.shape == (8, 77 + 256, 48)
        and pooled.shape == (8, 48)
        and our_pooled.dtype == ours[0].dtype == torch.float32
    )
    assert torch.equal(torch.stack(ours), text.float()) and torch.equal(our_pooled, pooled.float())
    assert pooled.float().std(0).mean() > 0.1 and all(
        torch.equal(a, b) for a, b in zip(encoder.encode(DIRTY), ours, strict=True)
    )


def test_sd3_text_without_the_t5(tmp_path):
    folder = save_sd3(tmp_path, with_t5=False)
    text, pooled = sd3_text(folder, PROMPTS, 32, text_encoder_3=None, tokenizer_3=None)
    ours, our_pooled = Sd3TextEncoder(folder, max_length=32).encode_pooled(PROMPTS)
    assert torch.equal(torch.stack(ours), text) and torch.equal(our_pooled, pooled)
    assert text[:, 77:].abs().max() == 0 and text.shape == (4, 77 + 32, 48)
    (folder / "transformer" / "config.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"transformer/config\.json does not exist; without text_encoder_3"
    ):
        Sd3TextEncoder(folder)


def test_pipeline_folder_problems(wan, sd3, tmp_path):
    folder = copy(sd3, tmp_path)
    shutil.rmtree(folder / "text_encoder_3")
    with pytest.raises(
        FileNotFoundError, match=r"text_encoder_3 does not exist, .* set text_encoder_3 to \[null, null\]"
    ):
        open_text_encoder(folder)
    weights = folder / "text_encoder_2" / "model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(
        FileNotFoundError, match=r"text_encoder_2: no \*\.safetensors file; pickled weights are not read"
    ):
        open_text_encoder(folder)
    weights.with_suffix(".bin").rename(weights)
    change_json(folder / "tokenizer" / "tokenizer_config.json", model_max_length=100)
    with pytest.raises(
        ValueError,
        match=r"tokenizer_config\.json: model_max_length=100, but the CLIP models have 77 positions",
    ):
        open_text_encoder(folder)
    (folder / "tokenizer_2" / "tokenizer.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"tokenizer_2: no tokenizer; it must hold one of tokenizer\.json"
    ):
        open_text_encoder(folder)
    change_json(folder / "model_index.json", tokenizer_2=["mine", "Loader"])
    with pytest.raises(ValueError, match=r"tokenizer_2 is \['mine', 'Loader'\]"):
        open_text_encoder(folder)
    change_json(folder / "model_index.json", _class_name="LTXPipeline")
    with pytest.raises(
        ValueError,
        match=r"model_index\.json: the text of LTXPipeline cannot be encoded, .* Wan, StableDiffusion3",
    ):
        open_text_encoder(folder)
    with pytest.raises(ValueError, match=r"text_tokenizer='x': .* leave it empty"):
        open_text_encoder(sd3, "x")
    with pytest.raises(FileNotFoundError, match=r"model_index\.json does not exist"):
        load_text_encoder({"kind": "wan", "path": str(tmp_path)})
    folder = copy(wan, tmp_path)
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(FileNotFoundError, match=r"text_encoder/config\.json does not exist"):
        open_text_encoder(folder)


def test_damaged_pipelines_are_named(wan, tmp_path):
    """Above all weights that are missing: the libraries draw them at random and only warn."""

    def attempt(part, change, message):
        folder = copy(wan, tmp_path)
        change(folder / part)
        with pytest.raises(ValueError, match=message):
            WanCodec(folder) if part.startswith("vae") else open_text_encoder(folder)
        shutil.rmtree(folder)

    def without(name):
        def change(file):
            held = load_file(file)
            del held[name]
            save_file(held, file, metadata={"format": "pt"})

        return change

    def cut(file):
        file.write_bytes(file.read_bytes()[:-1])

    attention, vae = (
        "encoder.block.0.layer.0.SelfAttention.k.weight",
        "vae/diffusion_pytorch_model.safetensors",
    )
    attempt(
        "text_encoder/model.safetensors",
        without(attention),
        rf"text_encoder: the weights of UMT5EncoderModel lack {attention}; download",
    )
    attempt(
        "text_encoder/model.safetensors",
        cut,
        r"text_encoder/model\.safetensors: is no whole safetensors file \(.*end at byte",
    )
    attempt(
        vae,
        without("decoder.conv_in.bias"),
        r"vae: the weights of AutoencoderKLWan lack decoder\.conv_in\.bias; download",
    )
    attempt(vae, cut, f"{vae}: is no whole safetensors file")
    attempt(
        "tokenizer/tokenizer.json",
        lambda file: file.write_text("{}"),
        r"tokenizer: the tokenizer cannot be read \(KeyError",
    )
    for file in ("model_index.json", "text_encoder/config.json", "vae/config.json"):
        attempt(file, lambda file: file.write_text("{"), rf"{file}: not JSON")
        attempt(file, lambda file: file.write_text("[]"), rf"{file}: Expected object, got array")
    attempt(
        "model_index.json",
        lambda file: change_json(file, tokenizer="x"),
        "tokenizer is x; it must name a tokenizer",
    )


# Pooled text, from encoding to samples


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_digit_images(tmp_path_factory.mktemp("pictures"), count=12)


@pytest.fixture(scope="module")
def encoded(sd3, pictures, tmp_path_factory):
    """12 digits through the SD3 pipeline's VAE and text encoders, by the command line."""
    out = tmp_path_factory.mktemp("encoded") / "digits"
    folders = ["--codec", "kl", "--codec-path", str(sd3), "--text", str(sd3)]
    main(
        [
            "encode",
            "--source",
            str(pictures),
            "--output",
            str(out),
            "--height",
            "16",
            "--width",
            "16",
            "--allow-upscale",
            *folders,
        ]
    )
    return out


def test_pooled_text_is_stored(sd3, encoded):
    dataset = LatentShards(encoded)
    encoder, codec = dataset.text_encoder(), dataset.codec()
    assert (
        type(encoder) is Sd3TextEncoder
        and type(codec) is KlCodec
        and dataset.info["format"] == 2
        and dataset.pooled_width == 48
    )
    assert dataset.shapes == [(4, 1, 4, 4)] * 12
    for i in (0, 7):
        text, pooled = sd3_text(sd3, [dataset.captions[i]])
        torch.testing.assert_close(dataset[i].text, text[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(dataset[i].pooled, pooled[0], atol=1e-6, rtol=0)
    for prompt, text, pooled in (
        ("", dataset.null_text, dataset.null_pooled),
        ("blurry, distorted, low quality", dataset.negative_text, dataset.negative_pooled),
    ):
        expected = sd3_text(sd3, [prompt])
        assert torch.equal(text, expected[0][0]) and torch.equal(pooled, expected[1])


def test_pooled_text_is_plain_webdataset(encoded):
    import webdataset

    dataset = LatentShards(encoded)
    samples = list(
        webdataset.WebDataset(
            [str(path) for path in sorted(encoded.glob("*.tar"))], shardshuffle=False
        ).decode()
    )
    assert len(samples) == 12 and all(
        (s["pooled.npy"] == dataset[i].pooled.numpy()).all() for i, s in enumerate(samples)
    )


def test_damaged_pooled_text_is_named(encoded, tmp_path):
    folder = copy(encoded, tmp_path)
    line = json.loads((folder / "index.jsonl").read_text().splitlines()[3])
    data = bytearray((folder / line["shard"]).read_bytes())
    data[line["pooled"][0] : sum(line["pooled"])] = bytes(line["pooled"][1])
    (folder / line["shard"]).write_bytes(data)
    with pytest.raises(ValueError, match=f"{line['shard']}, offset {line['pooled'][0]}: no readable array"):
        LatentShards(folder)[3]


def test_given_pooled_text_replaces_the_mean():
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randn(n, 8, generator=generator) for n in (3, 5)]
    pooled = torch.randn(2, 6, generator=generator)
    for length in (0, 4):
        given, mean = Condition.pack(texts, length, pooled), Condition.pack(texts, length)
        assert (
            torch.equal(given.pooled, pooled)
            and torch.equal(given.tokens, mean.tokens)
            and given.lengths == mean.lengths
        )
        torch.testing.assert_close(mean.pooled, torch.stack([text.mean(0) for text in texts]))
    assert torch.equal(rolled(given).pooled, pooled.flip(0))
    assert torch.equal(mixed(rolled(given), given, [True, False]).pooled, pooled[[1, 1]])
    assert torch.equal(given.join(given).pooled, torch.cat((pooled, pooled)))


def test_pooled_text_reaches_training(encoded, pictures, mesh, tmp_path):
    config, dataset = run(encoded), LatentShards(encoded)
    (batch,) = Batches(config.data, config.model, mesh, 0, 4, 4).iteration(0)
    assert torch.equal(batch.condition.pooled, torch.stack([dataset[i].pooled for i in batch.sample_ids]))
    assert torch.equal(batch.null.pooled, dataset.null_pooled.expand(4, -1))
    assert torch.equal(batch.negative.pooled, dataset.negative_pooled.expand(4, -1))
    assert torch.equal(batch.condition.tokens, torch.cat([dataset[i].text for i in batch.sample_ids]))
    # Two datasets with vectors mix; one without them does not.
    both = replace(config.data, shards=(str(encoded), str(encoded)), block=1)
    (batch,) = Batches(both, config.model, mesh, 0, 4, 4).iteration(0)
    assert torch.equal(batch.null.pooled, dataset.null_pooled.expand(4, -1)) and batch.null.pooled.shape == (
        4,
        48,
    )
    plain = EncodeConfig(
        str(pictures), str(tmp_path / "plain"), height=8, width=8, text_width=48, pixel_channels=1
    )
    encode(plain, progress=False)
    with pytest.raises(ValueError, match=r"widths of the pooled text differ, .*: 48, .*: 'none'"):
        Batches(replace(both, shards=(str(encoded), plain.output)), config.model, mesh, 0, 4, 4)


def test_pooled_text_reaches_samples(sd3, encoded, mesh, tmp_path, monkeypatch):
    """Trains a run, samples by the command line, and compares with the model fed by hand."""
    from megatron_apt.encoders.codec import VaeCodec
    from megatron_apt.sample import command as sample
    from megatron_apt.sample.sampler import Sampler, sample_noise

    train(run(encoded, tmp_path / "run"), mesh)
    opened, decode = [], VaeCodec.decode

    def recorded(self, latent):
        opened.append((self.tiling, latent))
        return decode(self, latent)

    monkeypatch.setattr(VaeCodec, "decode", recorded)
    prompt = "a handwritten seven"
    main(
        [
            "sample",
            str(tmp_path / "run"),
            "--prompts",
            prompt,
            "--steps",
            "2",
            "--euler",
            "--guidance",
            "3",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["000-a-handwritten-seven-seed0.png"]
    loaded = sample.load_generator(str(tmp_path / "run"), mesh)
    conditions = [
        Condition.pack(list(text), 0, pooled)
        for text, pooled in (sd3_text(sd3, [prompt]), sd3_text(sd3, [""]))
    ]
    z = sample_noise(0, torch.zeros(1, dtype=torch.int64), (4, 1, 4, 4))
    torch.testing.assert_close(opened[0][1], Sampler(loaded.model, mesh, *conditions).euler(z, 2, 3.0)[0])
    means = [Condition.pack(list(sd3_text(sd3, [p])[0])) for p in (prompt, "")]
    assert not torch.allclose(opened[0][1], Sampler(loaded.model, mesh, *means).euler(z, 2, 3.0)[0])
    main(
        [
            "sample",
            str(tmp_path / "run"),
            "--prompts",
            prompt,
            "--decode-tiling",
            "32",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    assert [tiling for tiling, _ in opened] == [0, 32]
    assert SampleConfig("").decode_tiling is None


def test_codec_and_text_settings(pictures, sd3, wan, tmp_path):
    def message(**changes) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            encode(
                EncodeConfig(
                    str(pictures), str(tmp_path / "out"), height=16, width=16, allow_upscale=True, **changes
                ),
                progress=False,
            )
        return str(caught.value)

    assert "codec_path='': codec='kl' needs a local folder" in message(codec="kl")
    assert "codec_tiling=64: applies to VAEs" in message(codec_tiling=64)
    assert "text_tokenizer='x': text='builtin' has its own" in message(text_tokenizer="x")
    assert "frames=5: codec 'kl' encodes pictures" in message(codec="kl", codec_path=str(sd3), frames=5)
    # A Wan pipeline for both; tiles are part of the settings, and of the codec that the dataset names.
    config = EncodeConfig(
        str(pictures),
        str(tmp_path / "wan"),
        height=16,
        width=16,
        allow_upscale=True,
        codec="wan",
        codec_path=str(wan),
    )
    config = replace(config, text=str(wan), codec_tiling=32)
    info = encode(config, progress=False)
    assert (
        info["format"] == 1
        and info["codec"]["tiling"] == 32
        and info["text_encoder"]["kind"] == "wan"
        and info["settings"]["codec_tiling"] == 32
    )
    dataset = LatentShards(config.output)
    assert (
        dataset.codec().tiling == 32
        and dataset.codec(tiling=0).tiling == 0
        and dataset[0].pooled is None
        and dataset.null_pooled is None
    )
    expected = wan_rows(wan, [dataset.captions[0]])[0]
    torch.testing.assert_close(dataset[0].text, expected[: len(dataset[0].text)], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="codec_tiling=32, now codec_tiling=None"):
        encode(replace(config, codec_tiling=0), progress=False)


def test_datasets_of_format_1_are_as_before(pictures, tmp_path):
    """Without pooled text nothing changed: neither the files' members nor the settings
    that an interrupted encoding compares.
    """
    config = EncodeConfig(str(pictures), str(tmp_path / "out"), height=8, width=8, text_width=8)
    info = encode(config, progress=False)
    line = json.loads((tmp_path / "out" / "index.jsonl").read_text().splitlines()[0])
    assert info["format"] == 1 and set(line) == {
        "id",
        "key",
        "shard",
        "latent",
        "text",
        "meta",
        "latent_shape",
        "text_length",
        "caption",
        "crc32",
    }
    assert not {"codec_tiling", "text_tokenizer", "text_dtype"} & set(info["settings"])
    dataset = LatentShards(tmp_path / "out")
    assert (
        dataset.pooled_width == 8
        and dataset[0].latent.isfinite().all()
        and encode(config, progress=False) == info
    )
