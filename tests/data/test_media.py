"""Every file is read back by another library and its pixels compared."""

import io

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from megatron_apt.sample import media


def random_pixels(*shape: int, levels: int = 256) -> torch.Tensor:
    """Values of [-1, 1] that are exactly `levels` different bytes."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(levels, shape, generator=generator) * (255 // (levels - 1)) / 127.5 - 1


def as_bytes(x: torch.Tensor) -> np.ndarray:
    return ((x + 1) * 127.5).round().to(torch.uint8).numpy()


def gif_frames(data: bytes) -> list[np.ndarray]:
    return [
        np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(Image.open(io.BytesIO(data)))
    ]


def test_png_grid_is_exact(tmp_path):
    x = random_pixels(5, 3, 4, 6)
    media.save_png_grid(x, tmp_path / "new" / "grid.png", columns=3, scale=2)
    picture = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    gap = media.GAP
    assert picture.shape == (2 * 8 + gap, 3 * 12 + 2 * gap, 3)
    for index in range(5):
        top, left = index // 3 * (8 + gap), index % 3 * (12 + gap)
        cell = picture[top : top + 8, left : left + 12]
        np.testing.assert_array_equal(cell, as_bytes(x[index]).transpose(1, 2, 0).repeat(2, 0).repeat(2, 1))
    assert (picture[8 : 8 + gap] == 255).all() and (picture[8 + gap :, 2 * 12 + gap :] == 255).all()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["grid.png"]


def test_values_outside_are_clipped_and_not_finite_ones_magenta():
    x = torch.zeros(1, 3, 1, 4)
    x[0, 0, 0] = torch.tensor([-7.0, 7.0, float("nan"), float("inf")])
    picture = np.asarray(Image.open(io.BytesIO(media.png_bytes(x, 1))))
    assert picture[0].tolist() == [[0, 128, 128], [255, 128, 128], [255, 0, 255], [255, 0, 255]]


def test_gif_with_few_colours_is_exact(tmp_path):
    x = random_pixels(3, 1, 5, 7, 4, levels=6).expand(-1, 3, -1, -1, -1)
    media.save_gif(x, tmp_path / "a.gif", fps=8, columns=2)
    picture = Image.open(tmp_path / "a.gif")
    assert picture.info["loop"] == 0 and picture.info["duration"] == 120
    frames = gif_frames((tmp_path / "a.gif").read_bytes())
    assert len(frames) == 5
    for f, frame in enumerate(frames):
        np.testing.assert_array_equal(frame[:7, :4], as_bytes(x[0, :, f]).transpose(1, 2, 0))
        np.testing.assert_array_equal(frame[7 + media.GAP :, :4], as_bytes(x[2, :, f]).transpose(1, 2, 0))


def test_gif_with_many_colours_is_close():
    ramp = torch.linspace(-1, 1, 32)
    x = torch.stack([ramp[:, None].expand(32, 32), ramp.expand(32, 32), (ramp[:, None] * ramp)])[
        None, :, None
    ]
    x = torch.cat([x, x.flip(-1), x.flip(-2)], 2)
    frames = gif_frames(media.gif_bytes(x, 24, 1))
    error = np.abs(np.stack(frames).astype(int) - as_bytes(x[0]).transpose(1, 2, 3, 0).astype(int))
    assert len(frames) == 3 and error.mean() < 6 and error.max() < 40


def test_still_gif_frames_keep_their_total_time():
    x = random_pixels(1, 3, 1, 4, 4).repeat(1, 1, 4, 1, 1)
    x[:, :, 3] = -x[:, :, 3]
    picture = Image.open(io.BytesIO(media.gif_bytes(x, 10, 1)))
    assert [frame.info["duration"] for frame in ImageSequence.Iterator(picture)] == [300, 100]


@pytest.mark.parametrize(("height", "width", "scale"), [(32, 48, 1), (15, 33, 1), (7, 9, 3)])
def test_mp4_is_close_and_pads_odd_sizes(tmp_path, height, width, scale):
    t, y, x = torch.meshgrid(torch.arange(6), torch.arange(height), torch.arange(width), indexing="ij")
    clip = torch.stack([torch.sin(y / 6 + t / 3), torch.cos(x / 7 + t / 3), torch.sin((x + y) / 9)])
    media.save_mp4(clip, tmp_path / "a.mp4", fps=12.5, scale=scale)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, float(stream.average_rate)) == (
            "h264",
            "yuv420p",
            12.5,
        )
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    wanted = as_bytes(clip).transpose(1, 2, 3, 0).repeat(scale, 1).repeat(scale, 2)
    height, width = wanted.shape[1:3]
    assert frames.shape == (6, height + height % 2, width + width % 2, 3)
    # Half-resolution colour costs most at the padded edge and between enlarged pixels.
    error = np.abs(frames[:, :height, :width].astype(int) - wanted.astype(int))
    assert error.mean() < (6 if scale == 1 else 12)
    assert np.abs(frames[:, :height, :width].mean((0, 1, 2)) - wanted.mean((0, 1, 2))).max() < 3


def test_mp4_keeps_flat_colours():
    # A wrong or missing colour matrix shifts these by 10 and more.
    clip = torch.tensor([1.0, -1.0, 0.2]).view(3, 1, 1, 1).expand(3, 2, 16, 16)
    with av.open(io.BytesIO(media.mp4_bytes(clip, 10))) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 2 and np.abs(frames[1].astype(int) - [255, 0, 153]).max() <= 3


def test_output_is_deterministic():
    x = random_pixels(2, 3, 4, 8, 8)
    for write in (
        lambda: media.png_bytes(x[:, :, 0], 2),
        lambda: media.gif_bytes(x, 8, 2),
        lambda: media.mp4_bytes(x[0], 8),
    ):
        assert write() == write()


@pytest.mark.parametrize(
    "call",
    [
        lambda: media.png_bytes(torch.zeros(2, 1, 4, 4), 2),
        lambda: media.png_bytes(torch.zeros(0, 3, 4, 4), 2),
        lambda: media.gif_bytes(torch.zeros(3, 4, 4), 8, 1),
        lambda: media.gif_bytes(torch.zeros(1, 3, 2, 4, 4), 0, 1),
        lambda: media.mp4_bytes(torch.zeros(3, 2, 4, 4), float("nan")),
        lambda: media.png_bytes(torch.zeros(1, 3, 4, 4), 0),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError, match=r"need|must be"):
        call()
