"""Codecs against definitions written out by hand and against diffusers' own pipeline."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.fft import dctn

from megatron_apt.encoders.codec import PixelCodec, PixelCodecConfig
from megatron_apt.encoders.load import load_codec
from megatron_apt.families.wan.codec import WanCodec


def pixels(*shape: int, grey: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit values and the same in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(256, shape, generator=generator)
    if grey:
        values = values[..., :1, :, :, :].expand(shape)
    return values, values / 127.5 - 1


CASES = [
    (PixelCodecConfig(), (3, 1, 7, 5)),
    (PixelCodecConfig(), (3, 9, 5, 3)),
    (PixelCodecConfig(temporal=1, spatial=2), (3, 3, 6, 2)),
    (PixelCodecConfig(temporal=3, spatial=3, shift=-0.4, scale=0.7), (3, 7, 3, 9)),
    (PixelCodecConfig(temporal=8, spatial=4, shift=0.2, scale=2.0), (3, 17, 8, 12)),
    (PixelCodecConfig(channels=1, shift=-0.7), (3, 5, 8, 16)),
    (PixelCodecConfig(channels=1, spatial=2, scale=0.5), (3, 1, 2, 2)),
    (PixelCodecConfig(causal=False), (3, 8, 3, 5)),
    (PixelCodecConfig(channels=1, temporal=3, causal=False, spatial=2, shift=-0.6, scale=0.8), (3, 9, 2, 6)),
]


@pytest.mark.parametrize("config, shape", CASES)
def test_pixel_codec_is_lossless(config, shape):
    codec = PixelCodec(config)
    values, x = pixels(*shape, grey=config.channels == 1)
    latent = codec.encode(x)
    assert latent.dtype == torch.float32 and tuple(latent.shape) == codec.latent_shape(*shape[1:])
    assert codec.pixel_size(*latent.shape[1:]) == shape[1:]
    back = codec.decode(latent)
    assert back.shape == x.shape and (back - x).abs().max() < 1e-5
    assert torch.equal((back * 127.5 + 127.5).round().long(), values)


@pytest.mark.parametrize("config, shape", CASES)
def test_pixel_codec_is_the_orthonormal_dct(config, shape):
    _, x = pixels(*shape, grey=config.channels == 1)
    latent = PixelCodec(config).encode(x).double().numpy()
    t, s, k = config.temporal, config.spatial, config.channels
    padded = x.double().numpy()
    if config.causal:
        padded = np.concatenate([np.repeat(padded[:, :1], t, 1), padded[:, 1:]], 1)
    for c in range(k):
        for f in range(latent.shape[1]):
            for h in range(latent.shape[2]):
                for w in range(latent.shape[3]):
                    block = dctn(
                        padded[c, f * t : (f + 1) * t, h * s : (h + 1) * s, w * s : (w + 1) * s], norm="ortho"
                    )
                    block[0, 0, 0] -= config.shift * math.sqrt(t) * s
                    ours = latent[c * t * s * s : (c + 1) * t * s * s, f, h, w]
                    np.testing.assert_allclose(ours, block.ravel() / config.scale, atol=2e-5)


def test_first_frame_stands_alone():
    _, x = pixels(3, 5, 4, 4)
    latent = PixelCodec().encode(x).unflatten(0, (3, 4))
    assert torch.allclose(latent[:, 0, 0], 2 * x[:, 0], atol=1e-6) and latent[:, 1:, 0].abs().max() < 1e-6
    image = PixelCodec().encode(x[:, :1]).unflatten(0, (3, 4))
    assert torch.equal(image[:, :, 0], latent[:, :, 0])


def test_shift_and_scale_give_unit_statistics():
    _, x = pixels(3, 9, 16, 16)
    x = 0.3 * x - 0.5
    latent = PixelCodec(PixelCodecConfig(shift=-0.5, scale=0.3 / math.sqrt(3))).encode(x)[:, 1:]
    assert abs(latent.mean()) < 0.05 and abs(latent.std() - 1) < 0.05


def test_batches_equal_single_samples():
    codec = PixelCodec(PixelCodecConfig(spatial=2))
    x = torch.stack([pixels(3, 5, 4, 6)[1], -pixels(3, 5, 4, 6)[1]])
    latent = codec.encode(x)
    assert torch.allclose(latent[1], codec.encode(x[1]), atol=1e-6) and torch.allclose(
        codec.decode(latent)[1], x[1], atol=1e-5
    )


def test_sizes_that_do_not_fit_name_the_remedy():
    codec = PixelCodec(PixelCodecConfig(spatial=4))
    with pytest.raises(ValueError, match=r"frames=7 .* nearest legal count is (5|9)"):
        codec.latent_shape(7, 8, 8)
    with pytest.raises(ValueError, match=r"width=10 is not a multiple of 4; the nearest legal width is 8"):
        codec.encode(torch.zeros(3, 5, 8, 10))
    with pytest.raises(ValueError, match=r"frames=5 is not a multiple of 4; the nearest legal count is 4"):
        PixelCodec(PixelCodecConfig(causal=False)).latent_shape(5, 8, 8)
    with pytest.raises(ValueError, match="192"):
        codec.decode(torch.zeros(4, 1, 2, 2))
    for bad in ({"channels": 2}, {"temporal": 0}, {"scale": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            PixelCodecConfig(**bad)


def test_config_survives_json():
    codec = PixelCodec(
        PixelCodecConfig(channels=1, temporal=2, causal=False, spatial=2, shift=-0.3, scale=0.6)
    )
    again = load_codec(json.loads(json.dumps(codec.config_dict())))
    assert again.config == codec.config
    with pytest.raises(ValueError, match="spatail"):
        load_codec({"kind": "pixel", "spatail": 2})
    with pytest.raises(ValueError, match="'vae' is unknown"):
        load_codec({"kind": "vae"})


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory):
    """A small AutoencoderKLWan with random weights, saved as diffusers saves it."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 2.0, 1.5, 1.0],
    )
    folder = tmp_path_factory.mktemp("wan")
    vae.save_pretrained(folder)
    return folder


def test_wan_codec_follows_diffusers_pipelines(wan_folder):
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(wan_folder).eval()
    codec = load_codec(json.loads(json.dumps(WanCodec(wan_folder).config_dict())))
    _, x = pixels(3, 5, 32, 16)
    with torch.no_grad():
        raw = vae.encode(x[None]).latent_dist.mode()
        mean = torch.tensor(vae.config.latents_mean).view(1, 4, 1, 1, 1)
        std = 1.0 / torch.tensor(vae.config.latents_std).view(1, 4, 1, 1, 1)
        expected = (raw - mean) * std  # WanImageToVideoPipeline.prepare_latents
        latent = codec.encode(x)
        assert tuple(latent.shape) == codec.latent_shape(5, 32, 16) == (4, 2, 4, 2)
        torch.testing.assert_close(latent, expected[0])
        video = vae.decode(expected / std + mean).sample  # WanPipeline.__call__
        torch.testing.assert_close(codec.decode(latent), video[0])
        torch.testing.assert_close(codec.encode(torch.stack((x, x)))[1], latent)
    with pytest.raises(ValueError, match="height=36"):
        codec.latent_shape(5, 36, 16)


def test_wan_codec_never_reads_pickles(wan_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        WanCodec(tmp_path)
    (tmp_path / "config.json").write_text((wan_folder / "config.json").read_text())
    torch.save({}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="safetensors"):
        WanCodec(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ValueError, match="AutoencoderKL"):
        WanCodec(tmp_path)
