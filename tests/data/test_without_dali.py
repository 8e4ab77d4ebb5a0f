"""Decoding where DALI is not installed, against DALI's own."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import megatron_apt.encode
from megatron_apt.encode import decode, with_dali
from support.clips import numbered_frames, write_video

LEVEL = 1 / 127.5  # of an 8-bit pixel


@pytest.fixture(scope="module")
def hidden():
    """decode.py, loaded anew where `import nvidia.dali` finds nothing."""
    spec = importlib.util.spec_from_file_location("decode_without_dali", decode.__file__)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nvidia.dali", "nvidia.dali.experimental.dynamic"):
            patch.setitem(sys.modules, name, None)
        for name in ("with_dali", "without_dali"):
            patch.delitem(sys.modules, f"megatron_apt.encode.{name}", raising=False)
            patch.delattr(megatron_apt.encode, name, raising=False)
        with pytest.warns(UserWarning, match="DALI is not installed: .*pip install nvidia-dali-cuda130"):
            spec.loader.exec_module(module)
    return module


def test_every_kind_of_file_is_decoded_without_dali(hidden, tmp_path):
    frames = numbered_frames(12)
    clips = [
        hidden.Clip(write_video(tmp_path / name, frames, codec), 48, 64, 5, stride=2)
        for name, codec in (("a.webm", "libvpx-vp9"), ("b.mp4", "libx264"), ("c.avi", "mjpeg"))
    ]
    picture = Image.fromarray(numbered_frames(1)[0])
    for name in ("d.png", "e.jpg", "f.webp"):
        picture.save(tmp_path / name, quality=95)
        clips.append(hidden.Clip(tmp_path / name, 40, 40))
    (tmp_path / "g.png").write_bytes(b"no picture")
    damaged = hidden.Clip(tmp_path / "g.png", 40, 40)
    plans = [hidden._plan(clip, "cpu").route for clip in clips]
    assert plans == ["pyav"] * 3 + ["pillow"] * 3
    *decoded, rejected = hidden.decode_clips([*clips, damaged])
    for ours, reference in zip(decoded, decode.decode_clips(clips), strict=True):
        assert ours.shape == reference.shape and ours.dtype == torch.float32
        # Two decoders' chroma, then rounding of the scaled
        assert (ours - reference).abs().max() < 5 * LEVEL
    assert "payload" in str(rejected)


def test_the_gpu_is_dalis(hidden, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        ValueError, match=r"device='gpu' is DALI's, .*use device='cpu', or pip install nvidia"
    ):
        hidden.decode_clip(hidden.Clip(tmp_path / "a.png", 8, 8), "gpu")


def treatments(count: int):
    """Pictures and clips of noise with (height, width, scaled, shown)."""
    rng = np.random.default_rng(0)
    for number in range(count):
        size, bucket = rng.integers(8, 120, 2), rng.integers(4, 100, 2)
        picture = rng.integers(0, 256, (*([2] if number % 3 == 0 else []), *size, 3), dtype=np.uint8)
        aspect = float(rng.uniform(0.5, 2))
        if number % 4 == 0:
            yield picture, (*map(int, np.minimum(size, bucket)), False, None)
        elif number % 4 == 1:
            yield picture, (*map(int, bucket), True, (float(size[0]), size[1] * aspect))
        else:
            yield picture, (*map(int, bucket), True, None)


def test_pictures_are_scaled_and_cropped_as_by_dali(hidden):
    for picture, (height, width, scaled, shown) in treatments(200):
        (reference,) = with_dali.fitted([with_dali.as_pixels(picture, "cpu")], height, width, scaled, shown)
        (ours,) = hidden.backend.fitted([picture], height, width, scaled, shown)
        assert ours.shape == reference.shape and ours.is_contiguous()
        # Both round to whole levels; without scaling there is nothing to round
        limit = 1.01 * LEVEL if scaled else 1e-6
        assert (ours - reference).abs().max() < limit, (picture.shape, height, width, shown)
